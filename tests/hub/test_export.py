"""Export: what is sent, what never is, and that it loads again from a Hub on the loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hubserver import HubServer

from chainforge.core.artifacts import read_json, read_manifest, write_json
from chainforge.core.errors import Failed, InputError
from chainforge.hub.export import export, write_folder

ROOT = Path(__file__).parents[2]
SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TASK = {"fn": "reasoning_gym", "params": SUMS, "size": 24}
# One process does what a user does in several, because each would import torch again: it uploads a
# base, trains LoRA on it with `push_to_hub`, evaluates, exports, and loads everything again.
JOURNEY = """
import json, runpy, sys
from pathlib import Path
import torch

def recipe(name, *argv):
    sys.argv = [name, *argv]
    runpy.run_path(f"{ROOT}/recipes/{name}.py", run_name="__main__")

def chainforge(*argv):
    from chainforge import cli
    sys.argv = ["chainforge", *argv]
    try:
        cli.main()
    except SystemExit as leaving:
        assert not leaving.code, leaving.code

ROOT, tiny = sys.argv[1:]
chainforge("export", tiny, "--to", "me/tiny", "--license", "apache-2.0")
recipe("collect", "--config", "traces.yaml", "--output_dir", "runs/c/traces")
recipe("sft", "--config", "cold.yaml", "--data", "runs/c/traces", "--output_dir", "runs/c/cold")
recipe("reject", "--config", "picks.yaml", "--pool", "runs/c/traces", "--output_dir", "runs/c/picks")
recipe("evaluate", "--config", "scores.yaml", "--models", "base=me/tiny", "cold=runs/c/cold/model",
       "--output_dir", "runs/c/scores")
chainforge("export", "runs/c/cold", "--what", "model", "--to", "me/merged", "--public")
chainforge("export", "runs/c/traces", "--what", "dataset", "--to", "me/traces")
chainforge("export", "runs/c/cold", "--to", "./folder")
for published in ("me/adapter", "me/merged", "folder"):
    chainforge("verify", published)

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("me/adapter")
batch = tokenizer("1 + 2 =", return_tensors="pt")
def logits(model):
    with torch.no_grad():
        return model.eval()(**batch).logits

here = logits(AutoModelForCausalLM.from_pretrained("runs/c/cold/model"))
base = AutoModelForCausalLM.from_pretrained("me/tiny")
moved = (logits(base) - here).abs().max()
adapted = logits(PeftModel.from_pretrained(base, "runs/c/cold/adapter"))
there = {
    "adapter": logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter")) - adapted,
    "folder": logits(AutoPeftModelForCausalLM.from_pretrained("folder")) - adapted,
    "on base": logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny"),
                                                "me/adapter")) - adapted,
    "merged": logits(AutoModelForCausalLM.from_pretrained("me/merged")) - here,
}
def rows_of(*source, **files):
    return load_dataset(*source, **files, split="train").to_list()

rows = rows_of("me/traces")
same = rows == rows_of("parquet", data_files="runs/c/traces/dataset/train.parquet")
picks = rows_of("me/picks")
same &= picks == rows_of("parquet", data_files="runs/c/picks/dataset/train.parquet")
Path("seen.json").write_text(json.dumps({
    "moved": moved.item(), "there": {name: d.abs().max().item() for name, d in there.items()},
    "rows": [len(rows), len(picks)], "same rows": same,
    "tokens": tokenizer("1 + 2 =")["input_ids"] == AutoTokenizer.from_pretrained(tiny)("1 + 2 =")["input_ids"],
}))
"""


@pytest.fixture(scope="module")
def journey(tmp_path_factory, tiny_model):
    """Return the folder of a run that was uploaded, the Hub, and what was loaded from it."""
    folder = tmp_path_factory.mktemp("journey")
    train = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    train |= {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}
    train |= {"save_strategy": "no", "model_name_or_path": "me/tiny", "use_peft": True}
    files = {
        "traces": {"tasks": [TASK], "system_prompt": ""},
        "cold": train | {"push_to_hub": True, "hub_model_id": "me/adapter"},
        "picks": {"push_to_hub": True, "hub_dataset_id": "me/picks", "system_prompt": ""},
        "scores": {
            "tasks": [TASK | {"size": 8, "split": "test"}],
            "num_samples": 1,
            "max_new_tokens": 4,
        },
    }
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (folder / "journey.py").write_text(JOURNEY)
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "journey.py", str(ROOT), tiny_model],
            cwd=folder,
            env=os.environ | hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, hub, json.loads((folder / "seen.json").read_text()), done


def test_what_was_sent_loads_back_with_the_same_logits_and_rows(journey):
    _, _, seen, _ = journey
    assert seen["moved"] > 1e-3
    assert seen["there"] == dict.fromkeys(("adapter", "folder", "on base", "merged"), 0.0)
    assert seen["rows"] == [24, 24]
    assert seen["same rows"]
    assert seen["tokens"]


def test_the_key_is_in_no_file_and_in_headers_alone(journey):
    folder, hub, _, done = journey
    assert not hub.carried(hub.secret)
    assert any(hub.token in headers.values() for _, _, headers, _ in hub.requests)
    assert hub.secret not in done.stdout + done.stderr
    for file in folder.rglob("*"):
        if file.is_file():
            assert hub.secret.encode() not in file.read_bytes(), file


def test_only_files_of_a_loader_are_sent_and_privately_by_default(journey):
    _, hub, _, done = journey
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    evidence = {f"evidence/{name}" for name in ("files.json", "cold/manifest.json")}
    evidence |= {"evidence/traces/manifest.json"}
    assert set(hub.files("me/adapter")) == tokenizer | evidence | {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.files("me/tiny")) == tokenizer | weights
    names = ("manifest.json", "results.json", "samples.jsonl.gz")
    evidence |= {f"evidence/scores/{name}" for name in names}
    assert set(hub.files("me/merged")) == tokenizer | weights | evidence
    assert (done.stdout.count("passed  card"), done.stdout.count("FAILED")) == (3, 0)
    assert done.stdout.count("passed  samples of scores    16\n") == 2
    for rows in ("me/traces", "me/picks"):
        assert set(hub.files(rows, "datasets")) == {"README.md", "train.parquet"}
    private = {name: repository.private for (_, name), repository in hub.repositories.items()}
    assert private == {"me/tiny": True, "me/adapter": True, "me/merged": False, "me/traces": True,
                       "me/picks": True}  # fmt: skip
    assert f"{hub.url}/me/adapter (private)" in done.stderr
    assert f"uploaded: {hub.url}/datasets/me/traces (private)" in done.stdout


def test_the_cards_show_base_lineage_results_and_terms(journey):
    folder, hub, _, _ = journey
    card = hub.files("me/adapter")["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    expected = {"base_model": "me/tiny", "base_model_relation": "adapter", "library_name": "peft"}
    assert head.items() >= (expected | {"license": "apache-2.0"}).items()  # as in the base's card
    made = "model: [me/tiny](https://huggingface.co/me/tiny); data: `traces` | 2 steps"
    for text in ("AutoPeftModelForCausalLM", "24 of 24 samples kept", made, "learning_rate: 0.01",
                 "no language model wrote them"):  # fmt: skip
        assert text in card, text
    assert str(folder) not in card
    # Trained and sent before anything was measured; the merged model went out later.
    assert "Nothing was measured" in card
    merged = hub.files("me/merged")["README.md"].decode()
    assert "Evaluation `scores`: 8 held-out rows of `chain_sum`" in merged
    assert "| **`cold`** | 0.0 (0.0 to 32.4) |" in merged
    picks = hub.files("me/picks", "datasets")["README.md"].decode()
    assert "| `picks` | rejection sampling | data: `traces` | 24 of 24 samples kept" in picks
    # What is sent is not how it was made.
    cold = folder / "runs/c/cold"
    assert not [key for key in read_manifest(cold).given if "hub" in key]
    assert "hub_model_id" not in card
    assert not list(cold.rglob("training_args.bin"))


@pytest.fixture
def run(journey, tmp_path):
    """The finished run, to be spoilt."""
    shutil.copytree(journey[0] / "runs/c", tmp_path / "runs/c")
    return tmp_path / "runs/c"


def refused(path, to="./out", what=None, **options):
    """Return the message, on one line."""
    with pytest.raises(InputError) as error:
        export(path, to, what, **options)
    return str(error.value)


def test_what_cannot_be_exported_is_refused(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cold = run / "cold"
    assert "did you mean 'adapter'" in refused(cold, what="adaptor")
    assert "no dataset to export; it has adapter and model" in refused(cold, what="dataset")
    assert "or dataset to export; give a finished stage" in refused(run)
    assert "neither owner/name nor a folder, as ./cold" in refused(cold, "cold")
    assert "no such directory" in refused(run / "clod")
    assert "was trained on me/tiny" in refused(cold, base="me/other")
    assert "goes with an adapter" in refused(cold, what="model", base="me/tiny")
    for folder in (".", "..", str(run)):
        assert "name a new folder" in refused(cold, folder)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_json(model / "model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}})
    assert "pytorch_model.bin" in refused(model, what="model")
    weights = cold / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors is not what was signed" in refused(cold, what="model")
    weights.unlink()
    assert "model.safetensors is missing" in refused(cold, what="model")
    (cold / "manifest.json").unlink()
    assert "not finished" in refused(cold)


def test_files_that_no_loader_reads_are_left_out_and_a_folder_appears_whole(run, tmp_path):
    adapter = run / "cold/adapter"
    (adapter / "training_args.bin").write_bytes(b"pickle")
    (adapter / "ref").mkdir()
    (adapter / "ref/adapter_model.safetensors").write_bytes(b"reference")
    lines = export(run / "cold", str(tmp_path / "out"))
    assert "left out: ref/adapter_model.safetensors, training_args.bin" in lines
    assert not list((tmp_path / "out").rglob("*.bin")) + list((tmp_path / "out").rglob("ref"))
    with pytest.raises(FileNotFoundError):
        write_folder({"a": b"a", "lost.json": tmp_path / "lost.json"}, tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_a_secret_in_any_file_stops_the_export(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "final answer")  # in the rows, compressed
    assert "train.parquet holds the value of MY_API_KEY" in refused(run / "traces")
    monkeypatch.setenv("MY_API_KEY", "Reasoning traces")  # in the card of the data set
    assert "README.md holds the value of MY_API_KEY" in refused(run / "traces", str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
    monkeypatch.setenv("OTHER_TOKEN", "base_model.model")  # in the weights' names
    assert "adapter_model.safetensors holds the value of OTHER_TOKEN" in refused(run / "cold")


def test_an_adapter_on_a_local_base_needs_to_know_it_on_the_hub(run, tiny_model, tmp_path):
    adapter, out = shutil.copytree(run / "cold/adapter", tmp_path / "adapter"), tmp_path / "out"
    config = adapter / "adapter_config.json"
    write_json(config, read_json(config) | {"base_model_name_or_path": tiny_model})
    message = refused(adapter, "me/adapter", dry_run=True)
    assert "--base owner/name" in message
    assert "--what model" in message
    assert "expected a Hub id" in refused(adapter, base="../tiny")
    lines = export(adapter, "me/adapter", base="me/tiny", dry_run=True)
    assert "base: me/tiny" in lines
    lines = export(adapter, str(out))
    assert f"base: {tiny_model}, a folder here" in lines
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "tiny"


def test_an_existing_repository_is_never_mixed_nor_made_public(journey, run, hub, monkeypatch):
    """A public repository of that name, one with other files, and a wrong token."""
    hub.repositories, cold = journey[1].repositories, run / "cold"
    assert "exists and is public: add --public" in refused(cold, "me/merged", "model")
    assert "adapter_config.json of another upload" in refused(cold, "me/adapter", "model")
    assert "base: me/gone is not on the Hub" in refused(cold, "me/adapter", base="me/gone")
    assert "(public)" in export(cold, "me/merged", "model", public=True)[-1]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-token")
    said = refused(cold, "me/merged", "model", public=True)
    assert "the Hub refused: " in said
    assert "hf_wrong-token" not in said


@pytest.mark.parametrize("given", ["adapter", "stage without a model"])
def test_an_adapter_is_merged_where_a_model_is_wanted(given, run, tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = adapter = run / "cold/adapter"
    if given == "stage without a model":
        path = run / "cold"
        shutil.rmtree(path / "model")
        manifest = read_json(path / "manifest.json")
        outputs = {k: v for k, v in manifest["outputs"].items() if not k.startswith("model/")}
        write_json(path / "manifest.json", manifest | {"outputs": outputs})
    out = tmp_path / "out"
    lines = export(path, str(out), "model", base=tiny_model)
    assert f"written: {out}" in lines
    ids = torch.arange(1, 30)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)
    assert (out / "tokenizer.json").exists()


def test_a_gguf_file_is_made_by_the_converter_or_its_commands_are_printed(
    tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"gguf: 'q4_k_m' is not one of: f32, "):
        export(Path(tiny_model), f"{tmp_path}/none", gguf="q4_k_m")
    lines = export(Path(tiny_model), f"{tmp_path}/plain", gguf="q8_0")
    command = f"  python llama.cpp/convert_hf_to_gguf.py {tmp_path}/plain --outtype q8_0"
    assert command in lines
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:4]))\n")
    script.chmod(0o755)
    export(Path(tiny_model), f"{tmp_path}/whole", gguf="q8_0")
    made = (tmp_path / "whole/whole-q8_0.gguf").read_text()
    assert made == f"{tiny_model} --outtype q8_0"
    assert (tmp_path / "whole/model.safetensors").exists()
    script.write_text("raise SystemExit('pre-tokenizer was not recognized')")
    with pytest.raises(Failed, match=r"exit code 1:\n  pre-tokenizer was not recognized"):
        export(Path(tiny_model), f"{tmp_path}/failed", gguf="f16")
    assert not (tmp_path / "failed").exists()
