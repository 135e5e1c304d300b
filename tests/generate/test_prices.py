from datetime import UTC, datetime

import pytest

from chainforge.core.errors import InputError
from chainforge.generate.budget import find_price

HOST = "api.deepseek.com"
USAGE = {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000}
# 2026-11-16 is a Monday.
OFF_PEAK = datetime(2026, 11, 16, 5, 0, tzinfo=UTC)
PEAK = datetime(2026, 11, 16, 6, 0, tzinfo=UTC)


def test_what_the_shipped_table_says():
    price = find_price(HOST, "deepseek-flash")
    assert price.date >= "2026-11-15"
    assert price.source.startswith("https://api-docs.deepseek.com")
    assert price.cost(USAGE, OFF_PEAK) == pytest.approx(0.75)
    assert price.cost(USAGE, PEAK) == pytest.approx(1.50)
    assert price.cost(USAGE, OFF_PEAK, PEAK) == pytest.approx(1.50)
    assert find_price(HOST, "deepseek-v4-pro").cost(USAGE, OFF_PEAK) == pytest.approx(2.64)
    assert price.worst(1_000_000, 1_000_000) == pytest.approx(1.50)


@pytest.mark.parametrize(
    ("moment", "peak"),
    [
        (datetime(2026, 11, 16, 0, 59, tzinfo=UTC), False),
        (datetime(2026, 11, 16, 1, 0, tzinfo=UTC), True),
        (datetime(2026, 11, 16, 3, 59, tzinfo=UTC), True),
        (datetime(2026, 11, 16, 4, 0, tzinfo=UTC), False),
        (datetime(2026, 11, 20, 9, 59, tzinfo=UTC), True),
        (datetime(2026, 11, 20, 10, 0, tzinfo=UTC), False),
        (datetime(2026, 11, 21, 2, 0, tzinfo=UTC), False),  # Saturday
    ],
)
def test_peak_hours(moment, peak):
    price = find_price(HOST, "deepseek-flash")
    assert price.at(moment) == (price.peak if peak else price.off_peak)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_cache_hit_tokens": 600_000, "prompt_cache_miss_tokens": 400_000},
        {"prompt_tokens_details": {"cached_tokens": 600_000}},
    ],
)
def test_cached_input_is_cheaper(usage):
    cost = find_price(HOST, "deepseek-flash").cost(USAGE | usage, OFF_PEAK)
    assert cost == pytest.approx(0.6 * 0.003 + 0.4 * 0.15 + 0.6)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 5}, USAGE | {"prompt_tokens": "9"}])
def test_a_usage_that_says_too_little_has_no_cost(usage):
    assert find_price(HOST, "deepseek-flash").cost(usage, OFF_PEAK) is None


def test_an_unknown_model_has_no_price():
    assert find_price(HOST, "deepseek-v9") is None
    assert find_price("localhost:8000", "deepseek-flash") is None


def test_a_table_of_ones_own_wins(tmp_path):
    own = tmp_path / "prices.yaml"
    own.write_text(
        "api.deepseek.com:\n  date: 2027-01-01\n  peak_hours: ['06:00-24:00']\n"
        "  models: {deepseek-flash: {cache_hit: 1, cache_miss: 2, output: 3,\n"
        "    peak: {cache_hit: 2, cache_miss: 4, output: 6}}}\n"
        "my.host:\n  date: 2027-01-01\n  models: {m: {cache_hit: 0, cache_miss: 0, output: 0}}\n"
    )
    price = find_price(HOST, "deepseek-flash", str(own))
    assert (price.date, price.cost(USAGE, OFF_PEAK), price.cost(USAGE, PEAK)) == (
        "2027-01-01",
        5,
        10,
    )
    assert find_price("my.host", "m", str(own)).cost(USAGE, PEAK) == 0
    assert find_price(HOST, "deepseek-v4-pro", str(own)).date == "2026-11-15"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("api.deepseek.com: 3", "expected a host with date"),
        ("api.deepseek.com: {models: {deepseek-flash: {output: 1}}}", "expected a date"),
        ("api.deepseek.com: {date: 2027-01-01, models: {deepseek-flash: {output: 1}}}",
         "cache_hit: expected USD"),
        ("api.deepseek.com: {date: 2027-01-01, models: {deepseek-flash: {cache_hit: 1, "
         "cache_miss: -1, output: 1}}}", "cache_miss: expected USD"),
        ("api.deepseek.com: {datum: 2027-01-01, models: {}}", "unknown key 'datum'"),
        ("api.deepseek.com: {date: 2027-01-01, peak_hours: ['1-4'], models: {deepseek-flash: "
         "{cache_hit: 1, cache_miss: 1, output: 1}}}", "peak_hours: expected UTC"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        find_price(HOST, "deepseek-flash", str(tmp_path / "prices.yaml"))
