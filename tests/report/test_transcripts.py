"""What is shown of the rows follows a fixed rule: failures are shown, tasks take turns."""

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines
from chainforge.report.transcripts import brief, held_out, of_data, of_rollouts

MUCH = 1_000_000
BOTH = ("cold_start", "rl_final")


def row(identity, model, correct, task="sums", sample=0, **more):
    prompt = [{"role": "user", "content": f"question {identity}"}]
    values = {"id": identity, "model": model, "correct": correct, "task": task, "sample": sample}
    return values | {"prompt": prompt, "answer": "1", "completion": "1"} | more


@pytest.fixture
def save(tmp_path):
    def write(rows, name="rows.jsonl"):
        with JsonLines(tmp_path / name) as file:
            file.extend(rows)
        return tmp_path / name

    return write


def test_a_title_keeps_the_end_where_prompts_of_a_task_differ():
    start = "Your task is to count how many legs there are in total when given a list of animals. "
    cow, hen = (brief(f"{start}Now, how\nmany legs have {what}?") for what in ("2 cows", "9 hens"))
    assert cow.startswith("Your task is to count how many legs")
    assert cow.endswith("how many legs have 2 cows?")
    assert hen.endswith("9 hens?")
    assert len(brief("x" * 300)) == 110
    assert brief("short\n one") == "short one"


def test_prompts_are_sorted_into_kinds_and_counted_all(save):
    before = {"a": False, "b": True, "c": False, "d": True, "e": False}
    after = {"a": True, "b": False, "c": False, "d": True, "e": True}
    verdicts = zip(BOTH, (before, after), strict=True)
    rows = [row(key, name, right) for name, found in verdicts for key, right in found.items()]
    rows.insert(0, row("a", "rl_final", False, sample=1))  # the first sample counts, in any order
    path = save(rows)
    cases, kinds = held_out(path, *BOTH, MUCH)
    assert [(case.question, case.kind) for case in cases] == [
        ("question a", "wrong before, right after"),
        ("question e", "wrong before, right after"),
        ("question b", "right before, wrong after"),
        ("question c", "wrong before and after"),
        ("question d", "right before and after"),
    ]
    assert list(kinds.values()) == [2, 1, 1, 1]
    assert [text.verdict for text in cases[0].texts] == ["wrong", "right"]
    alone, _ = held_out(path, "cold_start", "cold_start", MUCH)
    assert {case.kind for case in alone} == {"right", "wrong"}
    assert held_out(path, "cold_start", "elsewhere", MUCH) == ([], {})


def test_where_not_all_fit_every_kind_and_task_has_its_share(save):
    rows = []
    for i in range(400):
        task = "rare" if i % 40 == 0 else "common"
        rows.append(row(f"{i:03}", "cold_start", i % 20 == 1, task))
        rows.append(row(f"{i:03}", "rl_final", i % 20 != 1, task))
    path = save(rows)
    cases, kinds = held_out(path, *BOTH, 40_000)
    assert kinds["wrong before, right after"] == 380
    assert 10 <= len(cases) <= 35
    assert sum(case.size for case in cases) <= 40_000
    shown = [(case.kind, case.task) for case in cases]
    numbers = [shown.count(one) for one in set(shown)]
    assert len(numbers) == 3
    assert max(numbers) - min(numbers) <= 1
    assert len(held_out(path, *BOTH, 1)[0]) == 1


def test_every_fate_of_a_data_stage_is_shown_with_what_else_was_written(save):
    rows = [
        row(f"{i:04}", "m", i % 2 > 0, sample=k, drop="twice" if k else None)
        for i in range(2000)
        for k in range(20)
    ]
    cases, _ = of_data("picks", save([*rows, row("9", "m", False, drop="odd")]), MUCH)
    assert len(cases) < 300
    assert cases[0].question == "question 9"  # the only one of its fate
    assert cases[0].texts[0].fate == "dropped: odd"
    labels = {text.label: text.fate for text in cases[1].texts}
    assert labels["picks, sample 0"] == "kept"
    assert labels["picks, sample 8"] == "dropped: twice"
    assert len(labels) == 9  # eight of each fate at most
    assert [case.question for case in cases[1:4]] == [f"question {i:04}" for i in range(3)]


def test_rollouts_are_whole_groups_from_the_start_and_the_end(save):
    rows = [
        row(f"{group // 2}-{group}", "m", k > 1, step=group // 2)
        for group in range(100)
        for k in range(4)
    ]
    cases = of_rollouts("rl", save([*rows, row("torn", "m", True, step=50)]), MUCH)
    assert [case.kind for case in cases] == ["step 0"] * 2 + ["step 49"] * 2
    assert {len(case.texts) for case in cases} == {4}
    assert cases[0].texts[0].label == "rl, step 0"


def test_sources_are_counted_and_a_torn_or_foreign_line_is_left_out_or_named(save, tmp_path):
    done = {"completion": "x"}
    path = save([{"source": "offline"} | done, {"source": "offline", "drop": "twice"} | done, done])
    with open(path, "a") as file:
        file.write('{"completion": "tor')
    assert of_data("picks", path, MUCH)[1] == [
        {"source": "offline", "rows": 2, "kept": 1},
        {"source": "not recorded", "rows": 1, "kept": 1},
    ]
    assert of_data("picks", tmp_path / "none.jsonl", MUCH) == ([], [])
    for text in ("{}\nnot json\n", "{}\n[1]\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"rows.jsonl: line 2: "):
            of_data("picks", path, MUCH)
