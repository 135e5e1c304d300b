import os

import pytest

from chainforge.core.jsonl import read_rows
from chainforge.generate.budget import SYNC_SECONDS, Amount, Ledger, Limits

WORST = Amount(0.4, 100)


def sum_of(ledger):
    return ledger.told + ledger.unsure


@pytest.fixture
def path(tmp_path):
    return tmp_path / "requests.jsonl"


def test_the_worst_case_is_set_aside_and_settled(path):
    with Ledger(path, Limits(max_usd=1.0)) as ledger:
        first, second = ledger.send("a", WORST), ledger.send("b", WORST)
        assert ledger.forbids(WORST) == "max_usd"
        ledger.settle(first, "a", "answered", Amount(0.1, 20), {"completion": "x"})
        assert ledger.forbids(WORST) is None
        ledger.settle(second, "b", "timeout", None)  # nobody told: it counts in full
        assert ledger.forbids(Amount(0.5, 1)) is None
        assert ledger.forbids(Amount(0.51, 1)) == "max_usd"
    assert ledger.summary() == {
        "requests": 2,
        "tokens": 20,
        "usd": 0.1,
        "untold_requests": 1,
        "untold_usd_at_most": 0.4,
    }


def test_tokens_and_requests(path):
    with Ledger(path, Limits(max_tokens_total=250, max_requests=2)) as ledger:
        ledger.send("a", WORST)
        assert ledger.forbids(Amount(None, 150)) is None
        assert ledger.forbids(Amount(None, 151)) == "max_tokens_total"
        ledger.send("b", Amount(None, 10))
        assert ledger.forbids(Amount(None, 10)) == "max_requests"


def test_a_later_run_begins_with_what_was_spent(path):
    with Ledger(path, Limits()) as ledger:
        ledger.settle(ledger.send("a", WORST), "a", "answered", Amount(0.1, 20), {"c": 1})
        ledger.send("b", WORST)  # and then the process is killed
    with open(path, "ab") as file:
        file.write(b'{"request": 3, "ke')
    with Ledger(path, Limits(max_usd=0.9)) as ledger:
        assert ledger.answers == {"a": {"c": 1}}
        assert (ledger.told + ledger.unsure).usd == pytest.approx(0.5)
        assert ledger.forbids(Amount(0.4, 1)) is None
        assert ledger.forbids(Amount(0.41, 1)) == "max_usd"
        assert ledger.send("c", WORST) == 3
        ledger.forget_answers()
        ledger.settle(3, "c", "answered", Amount(0.2, 1))
    assert not any("answer" in row for row in read_rows(path))
    assert sum_of(Ledger(path, Limits())).usd == pytest.approx(0.7)


def test_unknown_money_is_not_nothing(path):
    with Ledger(path, Limits()) as ledger:
        ledger.settle(ledger.send("a", Amount(None, 9)), "a", "answered", Amount(None, 5))
        assert ledger.summary()["usd"] is None
        assert ledger.summary()["tokens"] == 5


def test_what_was_promised_survives_a_power_cut(path, monkeypatch):
    """Of a file that is never closed there is on disk what was forced there."""
    real, clock = os.fsync, [0.0]
    on_disk = {}

    def fsync(descriptor):
        real(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        on_disk[name] = None if os.path.isdir(name) else path.read_bytes()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    ledger = Ledger(path, Limits(max_usd=10.0))
    for number in range(12):
        clock[0] += 0.25
        request = ledger.send(str(number), WORST)
        if number % 3:
            ledger.settle(request, str(number), "answered", Amount(0.3, 20), {"c": number})
    assert set(on_disk) == {str(path), str(path.parent)}
    assert on_disk[str(path)] != path.read_bytes()
    path.write_bytes(on_disk[str(path)])
    spent = Ledger(path, Limits())
    assert ledger.requests - spent.requests < SYNC_SECONDS / 0.25
    assert sum_of(spent).usd >= 0.3 * spent.requests
