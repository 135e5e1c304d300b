"""`report_to` reaches the real trackers: each has the loss of every step of a short training."""

import json
import sqlite3

import pytest
import yaml
from runs import CPU, ROOT, receipt, recipe

from chainforge.core.jsonl import read_rows

STEPS = 3


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "sums/cold_start/tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def trackio(folder):
    (file,) = folder.glob("trackio/*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, metrics from metrics order by step").fetchall()
    assert {name for name, _ in rows} == {"sums/cold_start"}
    logs = [json.loads(log) for _, log in rows]
    return [log["train/loss"] for log in logs if "train/loss" in log]


def wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    losses = []
    for data in leveldb_records(file.read_bytes()):
        record = Record.FromString(data)
        assert not record.HasField("run") or record.run.display_name == "sums/cold_start"
        logged = {item.key or "/".join(item.nested_key): item for item in record.history.item}
        if "train/loss" in logged:
            losses.append(json.loads(logged["train/loss"].value_json))
    return losses


def leveldb_records(data, block=32_768, header=7):
    """Yield the records of LevelDB's log format, here after a header of the file's own."""
    place, record = header, b""
    while place + header <= len(data):
        if (left := block - place % block) < header:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + header : place + header + size]
        place += header + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


@pytest.mark.parametrize("read", [tensorboard, trackio, wandb], ids=lambda read: read.__name__)
def test_every_loss_reaches_the_tracker(read, traces, tmp_path, monkeypatch):
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/chain.json").write_text('{"name": "sums"}')
    settings = yaml.safe_load((ROOT / "recipes/quickstart/cold_start.yaml").read_text())
    settings |= CPU | {"report_to": read.__name__, "max_steps": STEPS, "logging_steps": 1}
    settings |= {"model_name_or_path": ROOT / "recipes/quickstart/base", "data": traces}
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = recipe(tmp_path, "sft", **settings, output_dir="sums/cold_start")
    logged = [row["loss"] for row in read_rows(tmp_path / "sums/cold_start/metrics.jsonl")
              if "loss" in row]  # fmt: skip
    assert read(tmp_path) == pytest.approx(logged)
    assert len(logged) == STEPS
    receipt(f"report-to-{read.__name__}", done, read.__name__, steps=STEPS, loss=logged[-1])
