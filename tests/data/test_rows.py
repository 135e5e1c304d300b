"""Bad rows are named and set aside, good rows are kept, and too many bad ones stop the run."""

import json

import pytest

from chainforge.core.errors import InputError
from chainforge.data.rows import MAX_LINE, read_file, rejects_in
from chainforge.data.tasks import TaskArgs, load_examples

BAD = {
    "null": (b"null", "a NoneType, not an object"),
    "a list": (b'["a"]', "a list, not an object"),
    "an empty object": (b"{}", "an empty object"),
    "not JSON": (b"{'question': 1}", "not JSON"),
    "invalid UTF-8": (b'{"question": "\xff\xfe", "answer": "1"}', "not JSON: 'utf-8'"),
    "half a character": (b'{"question": "a\\ud800b", "answer": "1"}', "not JSON"),
    "not a number": (b'{"question": "why?", "answer": NaN}', "not JSON"),
    "more than a float holds": (b'{"question": "why?", "answer": 1e999}', "out of range"),
    "1 MB": (b'{"question": "' + b"x" * MAX_LINE + b'", "answer": "1"}', "bytes long"),
    "nested too deep": (b'{"question": ' + b"[" * 100_000, "not JSON"),
    "no question": (b'{"question": null, "answer": "1"}', "question"),
    "no answer": (b'{"question": "why?"}', "no column 'answer'"),
    "an answer that is a list": (b'{"question": "?", "answer": []}', "expected text or a number"),
}


def lines(n):
    return [
        json.dumps({"id": str(i), "question": f"What is {i} + 1?", "answer": i + 1}).encode()
        for i in range(n)
    ]


def load(path, **params):
    task = {"fn": "jsonl", "params": {"path": str(path)} | params, "split": "all"}
    return load_examples(TaskArgs([task]))


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_among_many_is_set_aside(name, tmp_path, caplog):
    bad, reason = BAD[name]
    path = tmp_path / "rows.jsonl"
    good = lines(200)
    path.write_bytes(b"\n".join([*good[:150], bad, *good[150:]]) + b"\n")
    with rejects_in(tmp_path):
        rows = load(path)
    assert [row["answer"] for row in rows] == [str(i + 1) for i in range(200)]
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["row"]) == (str(path), 151)
    assert reason in reject["reason"]
    assert "1 of 201 rows are malformed and left out" in caplog.text
    assert "line 151" in caplog.text


def test_too_many_bad_rows_stop_the_run_and_are_written_down(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines(100), *(bad for bad, _ in BAD.values())]))
    what = f"{len(BAD)} of {100 + len(BAD)} rows are malformed, more than 1%"
    with rejects_in(tmp_path), pytest.raises(InputError, match=what):
        load(path)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == len(BAD)


def test_what_is_not_wrong_and_a_torn_tail_that_is(tmp_path):
    """A byte order mark, carriage returns, blank lines and a missing last newline do not count."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines(20)))
    found = read_file(path)
    assert not found.faults
    assert [number for number, _ in found.rows] == list(range(1, 40, 2))
    path.write_bytes(b"\n".join(lines(3)) + b'\n{"question": "What')
    ((number, reason),) = read_file(path).faults
    assert (number, reason) == (4, "not JSON: Input data was truncated")


def test_bad_rows_are_written_once_and_into_the_next_stage_if_none_is_open(tmp_path):
    path, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(b"\n".join(lines(30)))
    with rejects_in(tmp_path):
        load(path)
    path.write_bytes(b"\n".join([*lines(200), b"null"]))
    load(path)
    assert not rejects.exists()
    for count in (1, 0):
        with rejects_in(tmp_path):
            assert rejects.exists() == bool(count)
