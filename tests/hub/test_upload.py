"""Pushing to a Hub on the loopback that refuses, fails, or loses the connection."""

from pathlib import Path

import pytest
from hubserver import HubServer
from huggingface_hub import constants

from chainforge.core.errors import InputError
from chainforge.hub import upload
from chainforge.hub.export import write_folder

FILES = {"README.md": b"# Mine\n", "config.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this very process takes for the Hub."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(upload, "WAITS", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", server.secret)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def push(files=FILES, to="me/mine", private=True, kind="model"):
    return upload.push(files, to, kind, private=private, message="Add it")


def test_files_go_out_in_one_commit(hub, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights" * 1000)
    done = push(FILES | {"model.safetensors": weights})
    assert done == (f"{hub.url}/me/mine", True)
    assert hub.files("me/mine") == FILES | {"model.safetensors": weights.read_bytes()}
    assert hub.repositories["models", "me/mine"].commits == 1
    assert not hub.carried(hub.secret)


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "me/mine", 500),
        ("GET", "me/mine", "drop"),
        ("POST", "repos/create", 409),
        ("POST", "repos/create", "drop"),
        ("POST", "me/mine/preupload", 503),
        *(("POST", "me/mine/commit", what) for what in (409, 412, 429, 500, 502, 504, "drop")),
    ],
)
def test_what_passes_is_tried_again(hub, method, path, what):
    hub.faults.append([method, path, what, 2])
    assert push(private=False)[1] is False
    assert hub.files("me/mine") == FILES
    assert hub.repositories["models", "me/mine"].commits == 1
    assert not hub.carried(hub.secret)


def test_large_files_are_tried_again_too(hub, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights" * 1000)
    hub.faults += [["PUT", "/put/", "drop", 1], ["POST", "objects/batch", 503, 1]]
    push(FILES | {"model.safetensors": weights})
    assert hub.files("me/mine")["model.safetensors"] == weights.read_bytes()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (401, "The token is not valid: set HF_TOKEN, or run `hf auth login`"),
        (403, "The token may not write there: is me you, and does it allow writing"),
        (404, "me/mine"),
        (500, "Run the same command again to resume"),
        (409, "Run the same command again to resume"),
        ("drop", "Run the same command again to resume"),
    ],
)
def test_what_stays_wrong_is_one_clear_message(hub, what, message, capfd):
    hub.faults.append(["POST", "me/mine/commit", what, 99])
    with pytest.raises(InputError, match="me/mine: the Hub refused: ") as error:
        push()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.secret not in str(error.value) + capfd.readouterr().err
    assert hub.files("me/mine") == {}
    hub.faults.clear()
    assert push()[1]
    assert hub.files("me/mine") == FILES


def test_a_refusal_is_not_repeated(hub):
    hub.faults.append(["POST", "repos/create", 403, 99])
    with pytest.raises(InputError, match="may not write there"):
        push()
    assert sum(path == "/api/repos/create" for _, path, _, _ in hub.requests) == 1


def test_a_hub_that_is_not_there_is_said_to_be(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="the Hub refused: .*again to resume"):
        push()


def test_a_secret_is_found_before_anything_is_asked_of_the_hub(hub):
    with pytest.raises(InputError, match="holds the value of HF_TOKEN"):
        push(FILES | {"notes.txt": f"my {hub.secret}".encode()})
    assert hub.requests == []


@pytest.mark.parametrize("folder", [".", "..", "full"])
def test_a_folder_that_exists_is_refused(tmp_path, monkeypatch, folder):
    (tmp_path / "here/full").mkdir(parents=True)
    (tmp_path / "here/full/file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="name a new folder"):
        write_folder(FILES, Path(folder))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_folder(FILES | {"lost.json": tmp_path / "lost.json"}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_folder(FILES, tmp_path / "out/deep")
    assert {path.name for path in (tmp_path / "out/deep").iterdir()} == set(FILES)
