"""Prices, the ledger, and what is printed before money is spent."""

from datetime import UTC, datetime

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.data.sources import example
from chainforge.generate.budget import Amount, Ledger, find_price
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import card_sections, estimate

ROWS = [
    example([{"role": "user", "content": f"What is {n} and two?"}], "4", task="sums")
    for n in range(10)
]


def test_the_estimate_needs_no_key_and_says_an_unknown_price(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    said = estimate(TeacherArgs(teacher="deepseek", num_samples=100), ROWS)
    for words in ("1,000 (10 prompts x 100)", "$3.6", "off-peak, $7.2", "2026-11-15", "at most  $39.",
                  "no limit: set max_usd"):  # fmt: skip
        assert words in said
    assert "nothing to pay" in estimate(TeacherArgs(), ROWS)
    args = TeacherArgs(teacher="openai", model="m", base_url="http://localhost:8000/v1")
    assert "cost     unknown" in estimate(args, ROWS)
    args.max_usd = 1.0
    with pytest.raises(InputError, match="price of 'm' at localhost:8000 is not known"):
        estimate(args, ROWS)


def test_the_card_tells_teacher_terms_and_cost():
    args = TeacherArgs(teacher="deepseek")
    common = {"completion": "x", "tokens": 50, "correct": True}
    asked = {"source": "deepseek-flash", "teacher": "deepseek", "host": "api.deepseek.com",
             "time": "2026-11-20T10:00:00+00:00", "sampling": {"max_tokens": 9}}  # fmt: skip
    evil = "`</code><script>alert(1)</script>|\n# Title"
    rows = [
        {**ROWS[0], **common, **asked, "model": "served-model"},
        {**ROWS[1], **common, **asked, "model": evil, "tokens": 70, "correct": None},
        {**ROWS[2], **common, "source": "offline-fallback", "teacher": "offline", "tokens": None},
    ]
    spending = {"requests": 6, "tokens": 900, "usd": 0.5, "untold_requests": 1,
                "untold_usd_at_most": 0.04}  # fmt: skip
    told = card_sections(args, rows, spending)
    said = "1 rows: asked for `deepseek-flash` at `api.deepseek.com`, answered by `served-model`"
    assert said in told["Teacher"]
    assert "`offline-fallback`. Worked solutions" in told["Teacher"]
    assert "They replace answers of a teacher that failed" in told["Teacher"]
    assert (
        "$0.50 for 6 requests and 900 tokens. 1 requests have no known cost: $0.0400"
        in told["Cost"]
    )
    assert "allow training other models" in told["Terms"]
    assert "\n# Title" not in told["Teacher"]
    assert "`'</code><script>" in told["Teacher"]  # inside a code span, which it cannot end


WORST = Amount(0.4, 100)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "requests.jsonl"


def test_the_worst_case_is_set_aside_and_settled(path):
    with Ledger(path, {"max_usd": 1.0}) as ledger:
        first, second = ledger.send("a", WORST), ledger.send("b", WORST)
        assert ledger.forbids(WORST) == "max_usd"
        ledger.settle(first, "a", "answered", Amount(0.1, 20), {"completion": "x"})
        assert ledger.forbids(WORST) is None
        ledger.settle(second, "b", "timeout", None)  # nobody told: it counts in full
        assert ledger.forbids(Amount(0.5, 1)) is None
        assert ledger.forbids(Amount(0.51, 1)) == "max_usd"
    told = {"requests": 2, "tokens": 20, "usd": 0.1}
    assert ledger.summary() == told | {"untold_requests": 1, "untold_usd_at_most": 0.4}
    with Ledger(path, {"max_tokens_total": 250, "max_requests": 3}) as ledger:
        assert ledger.forbids(Amount(None, 130)) is None
        assert ledger.forbids(Amount(None, 131)) == "max_tokens_total"
        ledger.send("c", Amount(None, 10))
        assert ledger.forbids(Amount(None, 10)) == "max_requests"


def test_a_later_run_begins_with_what_was_spent(path):
    with Ledger(path) as ledger:
        ledger.settle(ledger.send("a", WORST), "a", "answered", Amount(0.1, 20), {"c": 1})
        ledger.send("b", WORST)  # and then the process is killed
    with open(path, "ab") as file:
        file.write(b'{"request": 3, "ke')
    with Ledger(path, {"max_usd": 0.9}) as ledger:
        assert ledger.answers == {"a": {"c": 1}}
        assert (ledger.told + ledger.unsure).usd == pytest.approx(0.5)
        assert ledger.forbids(Amount(0.4, 1)) is None
        assert ledger.forbids(Amount(0.41, 1)) == "max_usd"
        assert ledger.send("c", WORST) == 3
        ledger.forget_answers()
        ledger.settle(3, "c", "answered", Amount(0.2, 1))
    assert not any("answer" in row for row in read_rows(path))
    again = Ledger(path)
    assert (again.told + again.unsure).usd == pytest.approx(0.7)


HOST = "api.deepseek.com"
USAGE = {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000}
# 2026-11-16 is a Monday.
OFF_PEAK = datetime(2026, 11, 16, 5, 0, tzinfo=UTC)
PEAK = datetime(2026, 11, 16, 6, 0, tzinfo=UTC)


def test_what_the_shipped_table_says():
    price = find_price(HOST, "deepseek-flash")
    assert price.date >= "2026-11-15"
    assert price.source.startswith("https://api-docs.deepseek.com")
    for moments, usd in (([OFF_PEAK], 0.75), ([PEAK], 1.5), ([OFF_PEAK, PEAK], 1.5)):
        assert price.cost(USAGE, *moments) == pytest.approx(usd)
    assert find_price(HOST, "deepseek-v4-pro").cost(USAGE, OFF_PEAK) == pytest.approx(2.64)
    assert price.worst(1_000_000, 1_000_000) == pytest.approx(1.50)
    # The 16th is a Monday, the 21st a Saturday.
    for day, hour, peak in ((16, 0, False), (16, 1, True), (20, 9, True), (20, 10, False),
                            (21, 2, False)):  # fmt: skip
        moment = datetime(2026, 11, day, hour, tzinfo=UTC)
        assert price.at(moment) == (price.peak if peak else price.off_peak)
    for cached in (
        {"prompt_cache_hit_tokens": 600_000, "prompt_cache_miss_tokens": 400_000},
        {"prompt_tokens_details": {"cached_tokens": 600_000}},
    ):
        cost = price.cost(USAGE | cached, OFF_PEAK)
        assert cost == pytest.approx(0.6 * 0.003 + 0.4 * 0.15 + 0.6)


@pytest.mark.parametrize(
    "wrong",
    [{"prompt_tokens": "9"}, {"prompt_tokens": None}, {"completion_tokens": 0},
     {"completion_tokens": True}, None],
)  # fmt: skip
def test_a_usage_that_says_too_little_has_no_cost(wrong):
    usage = wrong and USAGE | wrong
    assert find_price(HOST, "deepseek-flash").cost(usage, OFF_PEAK) is None


def test_a_table_of_ones_own_wins(tmp_path):
    own = tmp_path / "prices.yaml"
    own.write_text(
        "api.deepseek.com:\n  date: 2027-01-01\n  peak_hours: ['06:00-24:00']\n"
        "  models: {deepseek-flash: {cache_hit: 1, cache_miss: 2, output: 3,\n"
        "    peak: {cache_hit: 2, cache_miss: 4, output: 6}}}\n"
        "my.host:\n  date: 2027-01-01\n  models: {m: {cache_hit: 0, cache_miss: 0, output: 0}}\n"
    )
    price = find_price(HOST, "deepseek-flash", str(own))
    assert price.date == "2027-01-01"
    assert (price.cost(USAGE, OFF_PEAK), price.cost(USAGE, PEAK)) == (5, 10)
    assert find_price("my.host", "m", str(own)).cost(USAGE, PEAK) == 0
    assert find_price(HOST, "deepseek-v4-pro", str(own)).date == "2026-11-15"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("api.deepseek.com: 3", "Expected `object`"),
        ("api.deepseek.com: {date: 2027-01-01, models: {deepseek-flash: {cache_hit: 1, "
         "cache_miss: -1, output: 1}}}", ">= 0.*cache_miss"),
        ("api.deepseek.com: {datum: 2027-01-01, models: {}}", "unknown field `datum`"),
        ("api.deepseek.com: {date: 2027-01-01, peak_hours: ['1-4'], models: {}}", "peak_hours"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        find_price(HOST, "deepseek-flash", str(tmp_path / "prices.yaml"))
