"""Excerpts follow a fixed rule: failures are shown, tasks take turns."""

from __future__ import annotations

from chainforge.core.records import Row
from chainforge.pipeline.excerpts import (
    first_samples,
    kept_and_dropped,
    side_by_side,
    sources,
)


def row(identity: str, model: str, correct: bool, task: str = "sums", sample: int = 0) -> Row:
    return {
        "id": identity,
        "model": model,
        "correct": correct,
        "task": task,
        "sample": sample,
        "prompt": [{"role": "user", "content": f"question {identity}"}],
        "answer": "1",
        "completion": "1",
    }


def test_the_first_sample_counts_whatever_the_order() -> None:
    rows = [row("a", "m", False, sample=1), row("a", "m", True, sample=0), row("b", "n", True)]
    found = first_samples(rows)
    assert list(found) == ["m", "n"]
    assert found["m"]["a"]["correct"] is True


def test_prompts_are_sorted_into_kinds_and_counted_all() -> None:
    before = {"a": False, "b": True, "c": False, "d": True, "e": False}
    after = {"a": True, "b": False, "c": False, "d": True, "e": True}
    models = {
        name: {key: row(key, name, right) for key, right in verdicts.items()}
        for name, verdicts in (("cold", before), ("final", after))
    }
    cases, kinds = side_by_side(models, "cold", "final")
    assert [(case.question, case.kind) for case in cases] == [
        ("question a", "wrong before, right after"),
        ("question e", "wrong before, right after"),
        ("question b", "right before, wrong after"),
        ("question c", "wrong before and after"),
        ("question d", "right before and after"),
    ]
    assert list(kinds.values()) == [2, 1, 1, 1]
    assert [text.verdict for text in cases[0].texts] == ["wrong", "right"]


def test_tasks_take_turns_and_every_reason_is_shown() -> None:
    rows = [row(str(i), "m", True, task="a" if i < 8 else "b") | {"drop": None} for i in range(10)]
    rows += [row("x", "m", False) | {"drop": reason} for reason in ("wrong", "twice", "wrong")]
    cases = kept_and_dropped(rows)
    assert [(case.kind, case.task) for case in cases] == [
        ("kept", "a"),
        ("kept", "b"),
        ("kept", "a"),
        ("dropped: twice", "sums"),
        ("dropped: wrong", "sums"),
    ]


def test_sources_are_counted_over_kept_and_dropped_rows() -> None:
    rows = [{"source": "offline"}, {"source": "offline", "drop": "twice"}, {}]
    assert sources(rows) == [
        {"source": "offline", "rows": 2, "kept": 1},
        {"source": "not recorded", "rows": 1, "kept": 1},
    ]
