"""Uploads: retries, refusals, and that nothing secret leaves this machine."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainforge.core.errors import InputError
from chainforge.hub import upload
from chainforge.hub.upload import check_secrets

FILES = {"README.md": b"# Mine\n", "config.json": b"{}"}
VALUE = "c0ffee-c0ffee"


def push(files=FILES, private=True):
    return upload.push(files, "me/mine", "model", private=private)


def test_files_go_out_in_one_commit(hub, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights" * 1000)
    assert push(FILES | {"model.safetensors": weights}) == (f"{hub.url}/me/mine", True)
    assert hub.files("me/mine") == FILES | {"model.safetensors": weights.read_bytes()}
    assert hub.repositories["models", "me/mine"].commits == 1
    assert not hub.carried(hub.secret)


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "me/mine", "drop"),
        ("POST", "repos/create", 409),
        ("POST", "me/mine/preupload", 503),
        ("POST", "me/mine/commit", 429),
        ("POST", "me/mine/commit", "drop"),
    ],
)
def test_a_transient_failure_is_retried(hub, method, path, what):
    hub.faults.append([method, path, what, 2])
    assert push(private=False)[1] is False
    assert hub.files("me/mine") == FILES
    assert hub.repositories["models", "me/mine"].commits == 1


@pytest.mark.parametrize(
    ("what", "message", "times"),
    [
        (401, "The token is not valid: set HF_TOKEN, or run `hf auth login`", 1),
        (403, "The token may not write to me", 1),
        (500, "Run the same command again to resume", 3),
        ("drop", "Run the same command again to resume", 3),
    ],
)
def test_a_permanent_failure_is_one_clear_message(hub, what, message, times, capfd):
    hub.faults.append(["POST", "me/mine/commit", what, 99])
    with pytest.raises(InputError, match="me/mine: the Hub refused: ") as error:
        push()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.secret not in str(error.value) + capfd.readouterr().err
    assert hub.files("me/mine") == {}
    assert hub.faults[0][3] == 99 - times


def test_a_secret_stops_an_upload_before_the_first_request(hub):
    with pytest.raises(InputError, match="holds the value of HF_TOKEN"):
        push(FILES | {"notes.txt": f"my {hub.secret}".encode()})
    assert hub.requests == []


def test_secrets_are_found_in_texts_weights_and_compressed_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPSEEK_API_KEY", VALUE)
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")  # too short to be one
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    rows, weights = Path("train.parquet"), Path("weights.safetensors")
    values = [["x", f"so {VALUE}!"]] * 100
    pq.write_table(pa.table({"a": values}), rows, compression="zstd")
    weights.write_bytes(b"\0" * 100_000 + VALUE.encode())
    for content in (rows, weights, f"key: {VALUE}\n".encode()):
        with pytest.raises(InputError, match="card holds the value of DEEPSEEK_API_KEY") as error:
            check_secrets({"card": content})
        assert VALUE not in str(error.value)
    Path("empty.json").touch()
    check_secrets({"empty.json": Path("empty.json"), "card": b"EMPTY, false-false"})
    rows.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"train.parquet is not a parquet file"):
        check_secrets({"card": rows})
