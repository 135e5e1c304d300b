"""What is shown of the rows follows a fixed rule: failures are shown, tasks take turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row
from chainforge.report.transcripts import (
    brief,
    fetch,
    held_out,
    index,
    of_data,
    of_rollouts,
    sources,
)

MUCH = 1_000_000


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


def save(path: Path, rows: list[Row]) -> Path:
    with JsonLines(path) as file:
        file.extend(rows)
    return path


def test_a_title_keeps_the_end_where_prompts_of_a_task_differ() -> None:
    start = "Your task is to count how many legs there are in total when given a list of animals. "
    cow, hen = (brief(f"{start}Now, how\nmany legs have {what}?") for what in ("2 cows", "9 hens"))
    assert cow.startswith("Your task is to count how many legs")
    assert cow.endswith("how many legs have 2 cows?")
    assert hen.endswith("9 hens?")
    assert len(brief("x" * 300)) == 110
    assert brief("short\n one") == "short one"


def test_prompts_are_sorted_into_kinds_and_counted_all(tmp_path: Path) -> None:
    before = {"a": False, "b": True, "c": False, "d": True, "e": False}
    after = {"a": True, "b": False, "c": False, "d": True, "e": True}
    both = (("cold_start", before), ("rl_final", after))
    rows = [row(key, name, right) for name, verdicts in both for key, right in verdicts.items()]
    rows.insert(0, row("a", "rl_final", False, sample=1))  # the first sample counts, in any order
    path = save(tmp_path / "rows.jsonl", rows)
    cases, kinds = held_out(path, ["cold_start", "rl_final"], "cold_start", "rl_final", MUCH)
    assert [(case.question, case.kind) for case in cases] == [
        ("question a", "wrong before, right after"),
        ("question e", "wrong before, right after"),
        ("question b", "right before, wrong after"),
        ("question c", "wrong before and after"),
        ("question d", "right before and after"),
    ]
    assert list(kinds.values()) == [2, 1, 1, 1]
    assert [text.verdict for text in cases[0].texts] == ["wrong", "right"]
    assert {
        case.kind for case in held_out(path, ["cold_start"], "cold_start", "cold_start", MUCH)[0]
    } == {
        "right",
        "wrong",
    }
    assert held_out(path, ["cold_start"], "cold_start", "elsewhere", MUCH) == ([], {})


def test_where_not_all_fit_every_kind_and_task_has_its_share(tmp_path: Path) -> None:
    rows = []
    for i in range(400):
        task = "rare" if i % 40 == 0 else "common"
        rows.append(row(f"{i:03}", "cold_start", i % 20 == 1, task))
        rows.append(row(f"{i:03}", "rl_final", i % 20 != 1, task))
    path = save(tmp_path / "rows.jsonl", rows)
    cases, kinds = held_out(path, ["cold_start", "rl_final"], "cold_start", "rl_final", 40_000)
    assert kinds["wrong before, right after"] == 380
    assert 10 <= len(cases) <= 35
    assert sum(case.size for case in cases) <= 40_000
    gained = [case.task for case in cases if case.kind == "wrong before, right after"]
    assert gained.count("rare") >= len(gained) // 2
    assert len(gained) < len(cases) // 2 + 2
    assert len(held_out(path, ["cold_start", "rl_final"], "cold_start", "rl_final", 1)[0]) == 1


def test_a_prompt_of_data_has_what_every_stage_wrote_and_every_fate_is_shown(
    tmp_path: Path,
) -> None:
    first = [row(str(i), "m", True) | {"drop": None} for i in range(8)]
    second = [row(str(i), "p", i > 5, sample=k) | {"drop": "twice" if k else None}
              for i in range(8) for k in range(6)]  # fmt: skip
    second += [row("9", "p", False) | {"drop": "odd"}]
    stages = [("traces", save(tmp_path / "1.jsonl", first)),
              ("rejection", save(tmp_path / "2.jsonl", second))]  # fmt: skip
    cases = of_data(stages, MUCH)
    assert sorted(case.question[-1] for case in cases) == [*"01234567", "9"]
    by_id = {case.question[-1]: case for case in cases}
    assert by_id["0"].texts[0].label == "traces, sample 1"
    assert [text.stage for text in by_id["0"].texts] == ["traces"] + ["rejection"] * 4
    shown = {(text.stage, text.fate) for case in cases[:4] for text in case.texts[:2]}
    assert ("rejection", "dropped: odd") in {
        (text.stage, text.fate) for case in cases[:3] for text in case.texts
    }
    assert ("traces", "kept") in shown


def test_rollouts_are_whole_groups_from_the_start_and_the_end(tmp_path: Path) -> None:
    rows = [row(f"{step}-{prompt}", "m", k > 1) | {"step": step}
            for step in range(50) for prompt in range(2) for k in range(4)]  # fmt: skip
    path = save(tmp_path / "rollouts.jsonl", rows)
    rows.append(rows[-1] | {"id": "torn", "step": 50})
    cases = of_rollouts("rl", save(path, rows[-1:]), MUCH)
    assert [case.kind for case in cases] == ["step 0"] * 2 + ["step 49"] * 2
    assert {len(case.texts) for case in cases} == {4}
    assert cases[0].texts[0].label == "rl, step 0"


def test_sources_are_counted_over_kept_and_dropped_rows(tmp_path: Path) -> None:
    done = {"completion": "x"}
    rows = [{"source": "offline"} | done, {"source": "offline", "drop": "twice"} | done, done]
    assert sources(save(tmp_path / "rows.jsonl", rows)) == [
        {"source": "offline", "rows": 2, "kept": 1},
        {"source": "not recorded", "rows": 1, "kept": 1},
    ]
    assert sources(tmp_path / "none.jsonl") == []


def test_rows_are_found_by_their_place_and_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row(str(i), "ümläut", True) for i in range(9)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) + '{"id": "t')
    entries = index(path)
    assert [entry.id for entry in entries] == [r["id"] for r in rows]
    assert [row for _, row in fetch(path, entries[::-2])] == rows[::-2]
    assert index(path) is entries  # not read again
    path.write_text("{}\nnot json\n")
    with pytest.raises(InputError, match=r"rows.jsonl: the row at byte 3: "):
        index(path)
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="the row at byte 0"):
        index(path)
    assert fetch(path, entries[3:]) == []
