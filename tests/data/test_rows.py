"""Bad rows are named and set aside, good rows are kept, and too many bad ones stop the run."""

import json

import pytest

from chainforge.core.errors import InputError
from chainforge.data.rows import MAX_LINE, read_file, rejects_in
from chainforge.data.tasks import TaskArgs, load_examples

BAD = {
    "null": (b"null", "a NoneType, not an object"),
    "an empty object": (b"{}", "an empty object"),
    "not JSON": (b"{'question': 1}", "not a line of JSON"),
    "invalid UTF-8": (b'{"question": "\xff\xfe", "answer": "1"}', "not a line of JSON: 'utf-8'"),
    "half a character": (b'{"question": "a\\ud800b", "answer": "1"}', "not a line of JSON"),
    "not a number": (b'{"question": "why?", "answer": NaN}', "not a line of JSON"),
    "more than a float holds": (b'{"question": "why?", "answer": 1e999}', "out of range"),
    "1 MB": (b'{"question": "' + b"x" * MAX_LINE + b'", "answer": "1"}', "bytes long"),
    "nested too deep": (b'{"question": ' + b"[" * 100_000, "not a line of JSON"),
    "no question": (b'{"question": null, "answer": "1"}', "question"),
    "an answer that is a list": (b'{"question": "?", "answer": []}', "expected text or a number"),
}


def lines(n):
    rows = [{"id": str(i), "question": f"What is {i} + 1?", "answer": i + 1} for i in range(n)]
    return [json.dumps(row).encode() for row in rows]


def load(path):
    return load_examples(TaskArgs([{"fn": "jsonl", "params": {"path": str(path)}, "split": "all"}]))


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_among_many_is_set_aside(name, tmp_path, caplog):
    bad, reason = BAD[name]
    path, good = tmp_path / "rows.jsonl", lines(200)
    path.write_bytes(b"\n".join([*good[:150], bad, *good[150:]]) + b"\n")
    with rejects_in(tmp_path):
        assert [row["answer"] for row in load(path)] == [str(i + 1) for i in range(200)]
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["row"], reason in reject["reason"]) == (str(path), 151, True)
    assert "1 of 201 rows are malformed and left out" in caplog.text


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
    assert [number for number, _ in found.rows] == list(range(1, 40, 2))
    assert not found.faults
    path.write_bytes(b"\n".join(lines(3)) + b'\n{"question": "What')
    found = read_file(path)
    assert len(list(found.rows)) == 3
    ((number, reason),) = found.faults
    assert (number, reason) == (4, "not a line of JSON: Input data was truncated")


def test_bad_rows_are_written_once_and_into_the_next_stage_if_none_is_open(tmp_path):
    path, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(b"\n".join([*lines(200), b"null"]))
    load(path)
    assert not rejects.exists()
    for count in (1, 0):
        with rejects_in(tmp_path):
            assert rejects.exists() == bool(count)
