import json
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines
from chainforge.core.transcript import write
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.rows import rejects_in
from chainforge.data.sft_dataset import DataArgs, sft_dataset
from chainforge.data.sources import example
from chainforge.generate.build import BuildArgs, build
from chainforge.generate.sampling import sample


def rows_of(paths, **settings):
    return sft_dataset(DataArgs([str(path) for path in paths], **settings))[0]


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(n, source="offline", **columns):
    made = []
    for i in range(n):
        turns = [{"role": "user", "content": f"{i} + 1?"}]
        row = example(turns, str(i + 1), task="sums", n=i)
        rewards = {"accuracy_reward": 1.0} if i % 2 else {"format_reward": 1.0}
        text = write("Count on.", str(i + 1))
        made.append(sample(row, text, 0, source=source, rewards=rewards, **columns))
    return made


def saved(rows, path):
    """Build a data set of rows as they are; return its file."""
    anything = SelectionArgs(select="all", require_correct=False, require_format=False)
    build(rows, path, anything, FilterArgs(max_repetition=None, min_language=None), BuildArgs())
    return path / "dataset/train.parquet"


def stage(path, rows, dataset=False):
    with JsonLines(path / "samples.jsonl") as file:
        file.extend(rows)
    if dataset:
        saved([row for row in rows if not row.get("drop")], path)
    return str(path)


@pytest.mark.parametrize("dataset", [True, False])
def test_rows_of_stages_and_files(tmp_path, caplog, dataset):
    rows = samples(4) + samples(2, drop="wrong")
    one = stage(tmp_path / "traces", rows, dataset)
    two = stage(tmp_path / "picks", samples(3, "policy"), dataset)
    made = rows_of([one, two])
    assert (made.column_names, len(made)) == (["prompt", "completion"], 7)
    answer = {"role": "assistant", "content": write("Count on.", "4")}
    assert made[3] == {"prompt": [{"role": "user", "content": "3 + 1?"}], "completion": [answer]}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    parquet = saved(samples(2), tmp_path / "saved")
    made = rows_of([written(tmp_path, {"messages": turns}), parquet, parquet.parent])
    assert (len(made), made[0]) == (5, {"prompt": turns[:1], "completion": turns[1:]})
    rows = samples(2) + samples(1, drop=None, correct=False) + samples(3, drop="wrong")
    path = stage(tmp_path / "final", rows) + "/samples.jsonl"
    made, counts = sft_dataset(DataArgs([path]))
    assert (len(made), counts) == (3, {path: {"rows": 3, "dropped": 3}})
    assert "left out 3 rows that are marked `drop`" in caplog.text


def test_rows_and_what_is_made_of_them_are_mapped_from_files(tmp_path):
    made = rows_of([stage(tmp_path / "traces", samples(2500), dataset=True)] * 2)
    assert (len(made), made[2500]) == (5000, made[0])
    assert made[2499]["prompt"][0]["content"] == "2499 + 1?"
    for rows in (made, made.map(lambda row: {"n": len(row["prompt"])})):
        (file,) = rows.cache_files
        assert Path(file["filename"]).parent.name.startswith("chainforge-")


SUM = {"role": "user", "content": "1 + 1?"}


@pytest.mark.parametrize("transcript", ["r1-cold-start", "think"])
@pytest.mark.parametrize("said", ["2", "<think>\nCount on.\n</think>\n\n2"])
def test_a_reasoning_beside_the_text_is_trained_on(tmp_path, transcript, said):
    whole = {"role": "assistant", "content": write("Count on.", "2", transcript)}
    for key in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": said, key: "Count on."}
        rows = [{"messages": [SUM, turn]}, {"prompt": [SUM, turn, SUM], "completion": [turn]}]
        made = rows_of([written(tmp_path, *rows)], transcript=transcript)
        assert made["completion"][:] == [[whole], [whole]]
        assert made["prompt"][1] == [SUM, whole, SUM]


def messages(**turn):
    return {"messages": [SUM, {"role": "assistant", "content": "2"} | turn]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (messages(reasoning_content="So <summary>."), "contains the tag <summary>"),
        (messages(reasoning=["So."]), "reasoning must be text"),
        (messages(reasoning="So.", content=""), "the answer is empty"),
        (messages(content=write("So.", "2", "think")), "form think.*set `transcript: think`"),
        (messages(tool_calls=[{"name": "add"}]), "tool_calls, which would be lost"),
        ({"prompt": "text", "completion": "x"}, "line 2: prompt: the prompt must be a list"),
        ({"completion": "x"}, "line 2: prompt: neither"),
        ({"prompt": [SUM]}, "line 2: completion: expected text"),
        ({"prompt": [SUM], "completion": [SUM]}, "not the assistant's"),
        ({"prompt": [{"role": "user", "content": None}], "completion": "b"}, "must be text"),
    ],
)
def test_malformed_sft_rows_and_what_a_message_would_lose_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=f"(?s)rows.jsonl: 1 of 2 rows.*{message}"):
        rows_of([written(tmp_path, *samples(1), row)])


def test_few_bad_rows_are_left_out_and_written_down(tmp_path):
    path = written(tmp_path, *samples(100), {"prompt": 3}, *samples(200))
    with rejects_in(tmp_path):
        assert len(rows_of([path])) == 300
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert reject["row"] == 101
    with pytest.raises(InputError, match="2 of 102 rows are malformed, more than 1%"):
        rows_of([written(tmp_path, *samples(100), {"prompt": 3}, {"prompt": 4})])


def test_fallback_rows_are_refused_unless_allowed(tmp_path):
    path = stage(tmp_path / "traces", samples(3) + samples(2, "offline-fallback"))
    message = r"(?s)traces: 2 of 5 rows \(the first: row 4\).*allow_offline_rows: true"
    with pytest.raises(InputError, match=message):
        rows_of([path])
    assert len(rows_of([path], allow_offline_rows=True)) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty.jsonl", "no rows to train on"), ("torn.parquet", "not a parquet"),
     ("nothing", "contains no rows"), ("none", "no such file"), ("lost", "no rows to train on")],
)  # fmt: skip
def test_places_without_rows(tmp_path, name, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "nothing").mkdir()
    stage(tmp_path / "lost", samples(3, drop="wrong"))
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        rows_of([tmp_path / name])
    with pytest.raises(InputError, match="none given"):
        rows_of([])


def test_a_saved_data_set_opens_anywhere(tmp_path):
    from datasets import load_dataset

    file = saved(samples(5, tokens=3, stage="traces", drop=None), tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {
        "dataset", "README.md", file.name, "samples.jsonl", "funnel.json",
    }  # fmt: skip
    made = load_dataset(str(file.parent), split="train", cache_dir=str(tmp_path / "cache"))
    assert (file.name, len(made), made[1]["n"]) == ("train.parquet", 5, 1)
    assert made[1]["completion"][0]["role"] == "assistant"
    # A mapping would come back with every other row's keys, set to None.
    assert json.loads(made[1]["rewards"]) == {"accuracy_reward": 1.0}
    saved(samples(2), tmp_path)
    assert len(rows_of([tmp_path])) == 2
    with pytest.raises(InputError, match="no row was kept"):
        saved(samples(1, finish_reason="length"), tmp_path)
