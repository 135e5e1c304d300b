"""The pairs of the answer benchmark are decided rightly, and its README says what was measured."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delenv("BENCH_RESULTS", raising=False)
    yield
    sys.modules.pop("answers", None)


def test_no_wrong_answer_is_paid():
    from answers import count, ours, read_pairs

    pairs = read_pairs()
    found = count(pairs, ours(pairs))
    assert found["pairs"] >= 300
    assert 0.4 <= sum(pair.right for pair in pairs) / len(pairs) <= 0.6
    assert found["wrong answers paid"] == 0
    assert found["decided rightly"] >= 0.97 * found["pairs"]


def test_the_readme_has_the_table_of_the_result():
    from answers import table
    from measuring import stored

    assert table(stored("answers")["sides"]) in (BENCHMARKS / "README.md").read_text()
