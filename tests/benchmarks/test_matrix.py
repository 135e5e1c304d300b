"""The tables of the documentation are those of the receipts, and a receipt says what was run."""

import shlex
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import matrix
from receipt import Cell, Receipt, cell_of, read_receipts, record, write_receipt

RECEIPTS = read_receipts()


@pytest.mark.parametrize("page", matrix.PAGES)
def test_a_page_has_the_table_of_the_receipts(page):
    text = (matrix.ROOT / page).read_text(encoding="utf-8")
    assert matrix.filled(page, text) == text, "run `python benchmarks/matrix.py --write`"


@pytest.mark.parametrize("name", RECEIPTS)
def test_a_receipt_is_of_what_its_command_trains(name):
    receipt = RECEIPTS[name]
    assert receipt.exit == 0
    if receipt.cell:
        assert receipt.cell == cell_of(shlex.split(receipt.command))
        assert receipt.steps
        assert receipt.loss is not None
    assert {"torch", "transformers", "trl"} <= receipt.versions.keys()


def test_a_cell_says_what_was_run_what_is_refused_and_what_was_not_run():
    some = next(iter(RECEIPTS.values()))
    cell = Cell("grpo", "LoRA", "transformers", "zero2")
    one = msgspec.structs.replace(some, cell=cell, hardware="x86_64 (2 cores)")
    other = msgspec.structs.replace(some, cell=None)
    lines = matrix.long_text({"one.json": one, "other.json": other}).splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines}
    cpu = "GRPO [CPU](../benchmarks/receipts/one.json)"
    assert rows["| LoRA, transformers"] == ["not run", "not run", "not run", cpu, "not run |"]
    assert rows["| QLoRA, transformers"][2] == "refused (1)"
    assert any(line.startswith("1. FSDP 2 cannot shard 4-bit") for line in lines)


def test_a_run_leaves_a_receipt_also_when_it_fails(tmp_path):
    script, stage = tmp_path / "sft.py", tmp_path / "stage"
    script.write_text(
        "import pathlib, sys\npath = pathlib.Path(sys.argv[-1])\npath.mkdir()\n"
        '(path / \'metrics.jsonl\').write_text(\'{"step": 3, "loss": 0.5, "num_tokens": 40}\\n\')\n'
        "sys.exit('no room')\n"
    )
    words = [sys.executable, str(script), "--use_peft", "true", "--output_dir", str(stage)]
    found = record("one", words, tmp_path / "log", KEY="1")
    write_receipt(found, tmp_path / "one.json")
    assert read_receipts(tmp_path) == {"one.json": found}
    assert found.command == "KEY=1 python sft.py --use_peft true --output_dir stage"
    assert (found.exit, found.steps, found.loss, found.output) == (1, 3, 0.5, ["no room"])
    assert found.cell == Cell("sft", "LoRA", "transformers", "single")
    assert found.tokens_per_second > 0
    late = record(
        "late", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "l", 0.1
    )
    assert (late.exit, late.cell) == ("cut", None)
    (tmp_path / "one.json").write_bytes(msgspec.json.encode({"name": "one"}))
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        read_receipts(tmp_path)
    assert Receipt.__struct_config__.forbid_unknown_fields
