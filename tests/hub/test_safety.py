"""Nothing secret and nothing of this machine leaves it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainforge.core.errors import InputError
from chainforge.hub.safety import check_secrets, local_paths

VALUE = "c0ffee-c0ffee"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "DEEPSEEK_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"],
)
def test_the_value_of_a_secret_variable_stops_what_holds_it(name, monkeypatch):
    monkeypatch.setenv(name, VALUE)
    with pytest.raises(InputError, match=rf"card holds the value of {name}") as error:
        check_secrets({"card": f"key: {VALUE}\n".encode()})
    assert VALUE not in str(error.value)
    check_secrets({"card": b"key: none"})


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PWD"])
def test_other_variables_are_no_secrets(name, monkeypatch):
    monkeypatch.setenv(name, VALUE)
    check_secrets({"card": VALUE.encode()})


def test_secrets_are_found_in_files_and_in_the_rows_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    rows, text = tmp_path / "train.parquet", tmp_path / "weights.safetensors"
    pq.write_table(pa.table({"a": [["x", f"so {VALUE}!"]] * 100}), rows, compression="zstd")
    text.write_bytes(b"\0" * 100_000 + VALUE.encode())
    for path in (rows, text):
        with pytest.raises(InputError, match=path.name):
            check_secrets({path.name: path})
    (tmp_path / "empty.json").touch()
    check_secrets({"empty.json": tmp_path / "empty.json"})


def test_a_short_value_is_part_of_other_words(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    check_secrets({"card": b"EMPTY"})


def test_files_that_name_a_place_here_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"model": [f"{tmp_path}/runs/rl_final"]}), "train.parquet")
    files = {"train.parquet": Path("train.parquet"), "README.md": b"nothing",
             "model.safetensors": f"{tmp_path}/x".encode()}  # fmt: skip
    assert local_paths(files) == [f"train.parquet names {tmp_path}, a folder of this machine"]
