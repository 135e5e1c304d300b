import contextlib
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import DiskFull, JsonLines, read_rows, writing


def test_rows_come_back_as_they_went(tmp_path):
    rows = [
        {"text": "a\nb\u2028ü"},
        {"text": "lone \ud800 surrogate"},
        {"n": 1.5, "none": None, "large": 10**30, "small": 1e-300, "numpy": np.float64(0.1)},
    ]
    with JsonLines(tmp_path / "deep/rows.jsonl") as lines:
        lines.append(rows[0])
        lines.extend(rows[1:])
    assert read_rows(tmp_path / "deep/rows.jsonl") == rows


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_tail_is_cut_and_never_glued(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    line = b'{"n": 2222}\n'
    path.write_bytes(b'{"n": 1}\n' + line[:cut])
    assert read_rows(path, torn_tail=True) in ([{"n": 1}], [{"n": 1}, {"n": 2222}])
    with JsonLines(path) as lines:
        lines.append({"n": 3})
    kept = [{"n": 1}, {"n": 2222}] if cut == len(line) - 1 else [{"n": 1}]
    assert read_rows(path) == [*kept, {"n": 3}]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float64("nan")])
def test_not_a_number_is_refused_before_it_is_written(tmp_path, number):
    with JsonLines(tmp_path / "rows.jsonl") as lines, pytest.raises(ValueError, match="JSON"):
        lines.append({"deep": [{"reward": number}]})
    assert (tmp_path / "rows.jsonl").read_bytes() == b""


@pytest.mark.parametrize("tail", ["[1]\n", "{oops}\n", '{"torn": '])
def test_malformed_lines_are_named_and_windows_files_read(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' + tail)
    with pytest.raises(InputError, match=r"rows.jsonl: 1 of \d lines.*\n  line 3: "):
        read_rows(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_a_killed_writer_loses_nothing_it_was_told_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from chainforge.core.jsonl import JsonLines\n"
        f"lines = JsonLines({str(path)!r})\n"
        "for n in range(10**9):\n"
        "    lines.append({'n': n, 'text': 'x' * 500}); print(n, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    told = [int(writer.stdout.readline()) for _ in range(300)]
    os.kill(writer.pid, signal.SIGKILL)
    told += [int(word) for word in writer.communicate()[0].split()]
    with JsonLines(path) as lines:
        lines.append({"n": -1})
    numbers = [row["n"] for row in read_rows(path)]
    assert numbers[: len(told)] == told
    assert numbers[-1] == -1
    assert all(json.loads(line) for line in path.read_text().splitlines())


@contextlib.contextmanager
def largest_file(size):
    """Let no file of this process grow beyond a size: the kernel refuses as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_json_lines(path):
    with JsonLines(path) as lines:
        for _ in range(1000):
            lines.append({"text": "x" * 100})


def save_by_torch(path):
    import torch

    torch.save({"one": torch.zeros(20_000)}, path)


def save_by_safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(20_000)}, path)


@pytest.mark.parametrize("save", [save_json_lines, save_by_torch, save_by_safetensors])
def test_a_full_disk_is_named_with_the_file(tmp_path, save):
    path = tmp_path / "file"
    save(tmp_path / "other")  # what it imports it may have to write, too
    with pytest.raises(DiskFull) as full, writing(path), largest_file(20_000):
        save(path)
    assert f"no room to write {path}: " in str(full.value)
    assert "are free on its disk" in str(full.value)
    assert "run the same command again" in str(full.value)


def test_the_innermost_name_is_told_and_a_folder_where_none_is_known(tmp_path):
    named = pytest.raises(DiskFull, match="no room to write .*/rows.jsonl: ")
    with named, writing(tmp_path), largest_file(20_000):
        save_json_lines(tmp_path / "rows.jsonl")
    with pytest.raises(DiskFull, match=f"a file, probably in {tmp_path}: "), writing(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="rows.jsonl"), writing(tmp_path):
        (tmp_path / "rows.jsonl/below").write_text("")
