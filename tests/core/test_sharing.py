"""Nothing secret and nothing of this machine leaves it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainforge.core.errors import InputError
from chainforge.core.secrets import read_secret
from chainforge.core.sharing import check_secrets, places_told, public, public_settings

VALUE = "c0ffee-c0ffee"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "DEEPSEEK_API_KEY", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD",
     "GITHUB_PAT", "my_secret", "SERVICE_CREDENTIALS", "DB_PASSWD", "API_KEYS", "TOKEN"],
)  # fmt: skip
def test_the_value_of_a_secret_variable_stops_what_holds_it(name, monkeypatch):
    monkeypatch.setenv(name, VALUE)
    with pytest.raises(InputError, match=rf"card holds the value of {name}") as error:
        check_secrets({"card": f"key: {VALUE}\n".encode()})
    assert VALUE not in str(error.value)
    check_secrets({"card": b"key: none"})


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "PWD"])
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


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("runs/quickstart/rl_final/model", "runs/quickstart/rl_final/model"),
        ("/home/alice/models/qwen", "qwen"),
        ("/home/alice/model", "model"),
        ("../../alice/base", "base"),
        ("~/base/", "base"),
        ("~", "elsewhere"),
        ("/", "elsewhere"),
        ("/home/alice/mine.py:good", "mine.py:good"),
    ],
)
def test_of_a_path_from_elsewhere_only_the_end_is_public(path, shown):
    assert public(path) == shown


def test_a_part_of_a_stage_keeps_the_name_of_the_stage(tmp_path):
    (tmp_path / "cold_start/model").mkdir(parents=True)
    (tmp_path / "cold_start/manifest.json").touch()
    assert public(str(tmp_path / "cold_start/model")) == "cold_start/model"


def test_settings_are_shown_without_keys_and_places():
    settings = {
        "rewards": [{"fn": "/home/alice/mine.py:good", "params": {"judge_api_key": "k", "n": 2}}],
        "base_url": "https://alice:word@server/v1",
        "model_init_kwargs": {"token": "t", "dtype": "float32"},
        "pad_token": "<pad>",
        "max_tokens": 5,
        "system_prompt": "/no_think Say it.",
        "notes": f"in {Path.home()}/x",
    }
    assert public_settings(settings) == {
        "rewards": [{"fn": "mine.py:good", "params": {"n": 2}}],
        "base_url": "https://server/v1",
        "model_init_kwargs": {"dtype": "float32"},
        "pad_token": "<pad>",
        "max_tokens": 5,
        "system_prompt": "/no_think Say it.",
        "notes": "in ~/x",
    }


def test_files_that_name_a_place_here_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"model": [f"{tmp_path}/runs/rl_final"]}), "train.parquet")
    files = {"train.parquet": Path("train.parquet"), "README.md": b"nothing",
             "model.safetensors": f"{tmp_path}/x".encode()}  # fmt: skip
    assert places_told(files) == [f"train.parquet names {tmp_path}, a folder of this machine"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("sk-c4n\nsk-c4n", "a line break"),
        ("sk-c4n\r\nsk-c4n", "a line break"),
        ('"sk-c4n"', "a quotation mark"),
        ("sk-c4n'", "a quotation mark"),
        ("\u201csk-c4n\u201d", "a quotation mark"),
        ("Bearer sk-c4n", "a blank"),
        ("sk-c4n\u00a0c4n", "a blank"),
        ("sk-\u0456c4n", "not printable ASCII"),
        ("sk-c4n\u200b", "not printable ASCII"),
        ("sk-\x07c4n", "not printable ASCII"),
        ("sk-\udcffc4n", "not printable ASCII"),
    ],
)
def test_what_no_key_looks_like_is_refused_by_the_name_of_its_variable(value, fault, monkeypatch):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(InputError, match=f"SOME_KEY: the value contains .*{fault}") as error:
        read_secret("SOME_KEY")
    assert "c4n" not in str(error.value)


@pytest.mark.parametrize("value", ["sk-proj-A_b-9+/=.~", "hf_abc", "EMPTY", "", "k:e|y$%\\"])
def test_a_key_is_read_without_the_blanks_around_it(value, monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {value}\n")
    assert read_secret("SOME_KEY") == value
    monkeypatch.delenv("SOME_KEY")
    assert read_secret("SOME_KEY") == ""
