"""No secret is written down, and no setting may hold one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chainforge.core import artifacts, secrets
from chainforge.core.config import given, read_settings
from chainforge.core.errors import InputError
from chainforge.core.secrets import (
    check_settings,
    is_secret_name,
    public,
    public_settings,
    read_secret,
    redact,
    redact_file,
)

VALUE = 'c0f"fee-c0f\\fee<é>/='


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in (
            "OPENAI_API_KEY_2", "DB_PASS", "HF_TOKEN_WRITE", "MYSQL_PWD", "PGPASSWORD", "TOKEN2",
            "GITHUB_PAT", "MY_SECRET_VALUE", "KEY", "OPENAI_APIKEY", "SERVICE_CREDENTIALS_JSON",
            "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "DOCKER_AUTH_CONFIG")),
        *((name, False) for name in (
            "PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "KEYBOARD_LAYOUT", "MONKEY", "AUTHOR",
            "GIT_AUTHOR_NAME", "SSH_AUTH_SOCK", "XAUTHORITY", "COMPASS", "HF_TOKEN_PATH",
            "SECRET_FILE", "TOKEN_TTL", "2")),
    ],
)  # fmt: skip
def test_secret_variables_are_known_by_the_words_in_their_names(name, secret):
    assert is_secret_name(name) == secret


@pytest.mark.parametrize("value", [VALUE, "sk-c0ffee-c0ffee-1"], ids=["odd", "plain"])
@pytest.mark.parametrize(
    "write", [str, json.dumps, lambda value: json.dumps(value, ensure_ascii=False)]
)
def test_a_secret_is_left_out_however_it_is_written(monkeypatch, write, value):
    monkeypatch.setenv("SOME_KEY_2", value)
    assert redact(f"before {write(value)} after").replace('"', "") == "before [SOME_KEY_2] after"
    assert redact("before and after") == "before and after"


@pytest.mark.parametrize("value", ["EMPTY", "", "/", sys.executable, "1234567"])
def test_what_is_no_secret_is_left_alone(monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    assert redact(f"a {value} b") == f"a {value} b"
    check_settings({"model": value}, "x.yaml")


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        *((key, "abc", True) for key in (
            "api_key", "hub_token", "password", "Authorization", "x-api-key", "apiKey", "token",
            "aws_secret_access_key", "client-secret", "judge_api_key", "credentials")),
        *((key, "abc", False) for key in (
            "max_tokens", "eos_token", "pad_token", "keys", "label_key", "tokenizer", "author",
            "image_token", "push_to_hub", "passes")),
        ("hub_token", None, False), ("api_key", "", False), ("max_tokens", 5, False),
        ("notes", "see sk-abcdefghijklmnopqrstuv", True), ("notes", "hf_" + "a" * 34, True),
        ("notes", "the sk-ill of it", False), ("notes", "so v4lue-of-a-key it is", True),
        ("base_url", "http://me:hunter2@host:8000/v1", True), ("base_url", "http://host:8000/v1/@cf", False),
        ("base_url", "http://[::1]:8/@a", False), ("repo", "ssh://git@host/x", False),
    ],
)  # fmt: skip
def test_a_secret_in_the_settings_is_refused_and_never_repeated(
    tmp_path, monkeypatch, key, value, refused
):
    monkeypatch.setenv("SOME_TOKEN", "v4lue-of-a-key")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"rewards": [{"params": {key: value}}]}))
    nested = json.dumps({"more": {key: value}})
    for read in (lambda: read_settings(path), lambda: given(["--extra_body", nested])):
        if not refused:
            read()
            continue
        with pytest.raises(InputError, match="a secret goes into no file") as error:
            read()
        assert key in str(error.value)
        assert str(value) not in str(error.value).replace(key, "")


def test_files_that_are_written_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", VALUE)
    artifacts.write_json(tmp_path / "a.json", {"said": f"401: {VALUE}"})
    assert artifacts.read_json(tmp_path / "a.json")["said"] == "401: [SOME_TOKEN]"
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff kept " + VALUE.encode() + b"\nof a launcher " + VALUE.encode() + b"\n")
    redact_file(log, start=7)
    assert log.read_bytes() == b"\xff kept [SOME_TOKEN]\nof a launcher [SOME_TOKEN]\n"


def test_a_login_to_the_hub_is_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_logged-in\n")
    secrets._login.cache_clear()
    try:
        assert redact("Bearer hf_logged-in") == "Bearer [the Hub login]"
    finally:
        secrets._login.cache_clear()


def test_a_recipe_prints_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "sk-c0ffee-c0ffee-1")
    code = (
        "import os, sys\nfrom chainforge.core import process\n"
        "def main():\n print(os.environ['SOME_TOKEN'])\n raise RuntimeError(os.environ)\n"
        "process.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert done.stdout == "[SOME_TOKEN]\n"
    assert "c0ffee" not in done.stderr


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("runs/q/rl/model", "runs/q/rl/model"),
        ("/home/alice/model", "model"), ("../../alice/base", "base"), ("~/base/", "base"),
        ("/", "elsewhere"), ("/home/alice/mine.py:good", "mine.py:good"),
    ],
)  # fmt: skip
def test_of_a_path_from_elsewhere_only_the_end_is_public(path, shown):
    assert public(path) == shown


def test_settings_are_shown_without_keys_and_places(tmp_path):
    (tmp_path / "cold_start/model").mkdir(parents=True)
    (tmp_path / "cold_start/manifest.json").touch()
    settings = {
        "rewards": [{"fn": "/home/alice/mine.py:good", "params": {"judge_api_key": "k", "n": 2}}],
        "base_url": "https://alice:word@server/v1",
        "model": str(tmp_path / "cold_start/model"),
        "pad_token": "<pad>",
        "system_prompt": "/no_think Say it.",
        "notes": f"in {Path.home()}/x",
    }
    assert public_settings(settings) == {
        "rewards": [{"fn": "mine.py:good", "params": {"n": 2}}],
        "base_url": "https://server/v1",
        "model": "cold_start/model",
        "pad_token": "<pad>",
        "system_prompt": "/no_think Say it.",
        "notes": "in ~/x",
    }


@pytest.mark.parametrize(
    "value",
    ["sk-c4n\nsk-c4n", '"sk-c4n"', "sk-c4n'", "\u201csk-c4n\u201d", "Bearer sk-c4n", "sk-c4n\u00a0c4n",
     "sk-\u0456c4n", "sk-c4n\u200b", "sk-\x07c4n", "sk-\udcffc4n"],
)  # fmt: skip
def test_what_no_key_looks_like_is_refused_by_the_name_of_its_variable(value, monkeypatch):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(InputError, match="SOME_KEY: the value contains") as error:
        read_secret("SOME_KEY")
    assert "c4n" not in str(error.value)


@pytest.mark.parametrize("value", ["sk-proj-A_b-9+/=.~", "hf_abc", "EMPTY", "", "k:e|y$%\\"])
def test_a_key_is_read_without_the_blanks_around_it(value, monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {value}\n")
    assert read_secret("SOME_KEY") == value
    monkeypatch.delenv("SOME_KEY")
    assert read_secret("SOME_KEY") == ""
