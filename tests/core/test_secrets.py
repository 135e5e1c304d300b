"""No secret is written down, in whatever form; and no setting may hold one."""

import base64
import json
import subprocess
import sys
from urllib.parse import quote

import pytest

from chainforge.core import artifacts, secrets
from chainforge.core.config import given, read_settings
from chainforge.core.errors import InputError
from chainforge.core.secrets import (
    check_settings,
    is_secret_name,
    read_secret,
    redact,
)  # fmt: skip

VALUE = "c0f'fee\"c0f\\fee&<é>/=\nsecond-line-of-it"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in (
            "OPENAI_API_KEY_2", "DB_PASS", "HF_TOKEN_WRITE", "MYSQL_PWD", "PGPASSWORD", "apiKey",
            "GITHUB_PAT", "MY_SECRET_VALUE", "KEY", "TOKEN2", "OPENAI_APIKEY", "NPM_CONFIG__AUTH",
            "SERVICE_CREDENTIALS_JSON", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSFILE_PASS",
            "WANDB_API_KEY", "SMTP_PASSWD", "clientSecret", "REDIS_PASSPHRASE", "DOCKER_AUTH_CONFIG")),
        *((name, False) for name in (
            "PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "KEYBOARD_LAYOUT", "MONKEY", "AUTHOR",
            "GIT_AUTHOR_NAME", "SSH_AUTH_SOCK", "XAUTHORITY", "PASSENGER", "COMPASS", "PATTERN",
            "HF_TOKEN_PATH", "KEYCLOAK", "SECRET_FILE", "TOKEN_TTL", "PASSWORD_STORE", "2")),
    ],
)  # fmt: skip
def test_secret_variables_are_known_by_the_words_in_their_names(name, secret):
    assert is_secret_name(name) == secret


FORMS = {
    "plain": str,
    "JSON": json.dumps,
    "JSON of UTF-8": lambda value: json.dumps(value, ensure_ascii=False),
    "repr": repr,
    "repr of bytes": lambda value: repr(value.encode()),
    "an address": lambda value: quote(value, safe=""),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "base64 of more": lambda value: base64.b64encode(f"user:{value}:x".encode()).decode(),
    "a line": lambda value: value.splitlines()[0],
    "the other line": lambda value: value.splitlines()[1],
}


@pytest.mark.parametrize("value", [VALUE, "sk-c0ffee-c0ffee-1"], ids=["odd", "plain"])
@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_a_secret_is_left_out_however_it_is_written(monkeypatch, write, value):
    monkeypatch.setenv("SOME_KEY_2", value)
    if "\n" not in value and write is FORMS["the other line"]:
        return
    text = f"before {write(value)} after"
    clean = redact(text)
    assert "[SOME_KEY_2]" in clean
    assert clean.startswith("before ")
    assert clean.endswith(" after")
    for part in ("c0ffee", "c0f", "second", write(value)[3:-8]):
        assert part not in clean
    assert redact("before and after") == "before and after"


@pytest.mark.parametrize(
    "value", ["EMPTY", "password", "", "/", "http://localhost:8000/v1", sys.executable, "1234567"]
)
def test_what_is_no_secret_is_left_alone(monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    assert redact(f"a {value} b") == f"a {value} b"
    check_settings({"model": value}, "x.yaml")


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        *((key, "abc", True) for key in (
            "api_key", "hub_token", "password", "Authorization", "x-api-key", "apiKey", "token",
            "aws_secret_access_key", "db_passwd", "client-secret", "auth", "hf_token",
            "judge_api_key", "proxy-authorization", "access_key_id", "credentials")),
        *((key, "abc", False) for key in (
            "max_tokens", "eos_token", "pad_token", "keys", "label_key", "tokenizer", "author",
            "secretary", "image_token", "stop_token", "push_to_hub", "passes")),
        ("token", "<|im_end|>", False), ("hub_token", None, False), ("api_key", "", False),
        ("notes", "see sk-abcdefghijklmnopqrstuv", True), ("notes", "hf_" + "a" * 34, True),
        ("notes", "the sk-ill of it", False), ("notes", "so v4lue-of-a-key it is", True),
        ("max_tokens", 5, False),
        ("base_url", "http://me:hunter2@host:8000/v1", True), ("where", "git+ssh://a:b/c@host", True),
        ("base_url", "http://host:8000/v1/@cf", False), ("base_url", "http://[::1]:8/@a", False),
        ("repo", "ssh://git@host/x", False),
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
        with pytest.raises(InputError, match="a secret must not be in a file") as error:
            read()
        assert key in str(error.value)
        assert str(value) not in str(error.value).replace(key, "")
        assert "v4lue" not in str(error.value)


def test_files_that_are_written_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", VALUE)
    artifacts.write_json(tmp_path / "a.json", {"said": f"401: {VALUE}", "n": [repr(VALUE)]})
    assert artifacts.read_json(tmp_path / "a.json")["said"] == "401: [SOME_TOKEN]"
    assert "c0f" not in (tmp_path / "a.json").read_text()


def test_a_login_to_the_hub_is_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_logged-in\n")
    secrets._login.cache_clear()
    try:
        assert redact("Bearer hf_logged-in") == "Bearer [the Hub login]"
    finally:
        secrets._login.cache_clear()


def test_a_recipe_prints_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", VALUE)
    code = (
        "import os, sys\nfrom chainforge.core import process\n"
        "def main():\n print(os.environ['SOME_TOKEN'])\n raise RuntimeError(os.environ)\n"
        "process.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert done.stdout == "[SOME_TOKEN]\n"
    assert "c0f" not in done.stderr
    assert "second-line" not in done.stderr


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
