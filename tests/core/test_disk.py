import contextlib
import resource

import pytest

from chainforge.core.disk import DiskFull, writing
from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines


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
