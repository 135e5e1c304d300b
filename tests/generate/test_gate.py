import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example, sample, write_rows
from chainforge.generate.rollouts import GateArgs, gate

RATES = {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}


def prompts(count=6):
    return [
        example([{"role": "user", "content": str(n)}], "1", task="t", verifier="exact")
        for n in range(count)
    ]


@pytest.fixture
def pool(tmp_path):
    """Four samples of five prompts, right as often as `RATES` says; rewards say something else."""
    rows = [
        sample(row, f"{n}", n, source="policy", correct=n < RATES[place] * 4, reward=n * 0.1)
        for place, row in enumerate(prompts(5))
        for n in range(4)
    ]
    write_rows(tmp_path / "samples.jsonl", rows)
    return str(tmp_path)


def test_what_is_always_or_never_right_is_left_out(pool):
    gated = gate(prompts(5), GateArgs(gate_pool=pool))
    assert [row["pass_rate"] for row in gated.rows] == [0.25, 0.5, 0.75]
    assert gated.counts == {"in": 5, "kept": 3, "too_hard": 1, "too_easy": 1, "unmeasured": 0}


def test_the_band_includes_its_ends(pool):
    gated = gate(prompts(5), GateArgs(gate_pool=pool, min_pass_rate=0.5, max_pass_rate=1.0))
    assert [row["pass_rate"] for row in gated.rows] == [0.5, 0.75, 1.0]


def test_what_was_never_measured_is_kept_or_dropped_by_choice(pool):
    with pytest.raises(InputError, match="no verdict on 1 of 6 prompts"):
        gate(prompts(), GateArgs(gate_pool=pool))
    kept = gate(prompts(), GateArgs(gate_pool=pool, unmeasured_prompts="keep"))
    assert [row["pass_rate"] for row in kept.rows] == [0.25, 0.5, 0.75, None]
    dropped = gate(prompts(), GateArgs(gate_pool=pool, unmeasured_prompts="drop"))
    assert len(dropped.rows) == 3
    assert dropped.counts["unmeasured"] == kept.counts["unmeasured"] == 1


def test_without_a_gate_everything_passes():
    gated = gate(prompts(), GateArgs())
    assert (gated.rows, gated.counts) == (prompts(), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_pool": None, "min_pass_rate": 0.1}, "require gate_pool"),
        ({"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "0 <= least <= largest"),
        ({"min_pass_rate": 0.6, "max_pass_rate": 0.7}, "no prompt has a pass rate"),
        ({"gate_pool": "nowhere"}, "nowhere: no samples"),
    ],
)
def test_bad_gates(pool, changes, message):
    with pytest.raises(InputError, match=message):
        gate(prompts(5), GateArgs(**{"gate_pool": pool} | changes))
