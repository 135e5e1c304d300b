"""A run that is killed, stopped or out of disk space resumes, and ends bit-equal to a whole one.

By default a few steps of each kind of stage are tried; `--every-step` tries all of them.
"""

import operator
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from forks import Warm
from stages import adapted, logits, opened, same

from chainforge.core.artifacts import read_json, read_manifest, sha256
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.core.transcript import write
from chainforge.train.checkpoints import SEAL, last_good

STEPS = 12
FIXED = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
FIXED |= {"max_steps": STEPS, "learning_rate": 0.01, "save_steps": 2, "logging_steps": 5}
LORA = {"beta": 0.1, "use_peft": True}
QLORA = LORA | {"load_in_4bit": True}
# in an order that transformers draws from what training itself draws from
GROUPED = {"train_sampling_strategy": "group_by_length"}
# the best of several checkpoints becomes the policy, and only the newest is kept beside it
BEST = {"keep_best": True, "save_total_limit": 1}
# Each goes through its data more than once, and so through several orders of them.
KINDS = {
    "sft": ("sft", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "packed": ("sft", {"per_device_train_batch_size": 1, "packing": True, "max_length": 128}),
    "grpo": ("grpo", {"per_device_train_batch_size": 8, "steps_per_generation": 2, "beta": 0.1}),
    "lora": ("grpo", {"per_device_train_batch_size": 16, "num_iterations": 2} | LORA),
    "distill": ("distill", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "dpo": ("dpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "grouped": ("sft", {"per_device_train_batch_size": 4, "save_strategy": "epoch"} | GROUPED),
    # an adapter that no stage left, merged and trained by two processes
    "two": ("grpo", {"per_device_train_batch_size": 4, "steps_per_generation": 2} | LORA),
    "best": ("grpo", {"per_device_train_batch_size": 8, "heldout_size": 4} | BEST),
    # an adapter that an earlier stage left, trained further over a base in four bits
    "qlora": ("grpo", {"per_device_train_batch_size": 8, "adapter": "continue"} | QLORA),
}
# Killed when so many steps are taken; after 12 only the policy is left to save.
FEW = {"sft": [0], "packed": [7], "grpo": [5, 12], "lora": [3], "distill": [9]}
FEW |= {"dpo": [7], "grouped": [7], "two": [7], "best": [1, 12], "qlora": [7]}
TIMES = re.compile("_(time|runtime|per_second)$")


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--every-step")
    if "killed_at" in metafunc.fixturenames:
        steps = {kind: range(STEPS + 1) if every else few for kind, few in FEW.items()}
        cases = [(kind, step) for kind in KINDS for step in steps[kind]]
        metafunc.parametrize(("kind", "killed_at"), cases)
    if "torn" in metafunc.fixturenames:
        files = (1, 2, 3)  # that torch saves: optimizer, scheduler, random numbers
        cases = [(kind, n) for kind in ("sft", "lora") for n in files]
        metafunc.parametrize(("kind", "torn"), cases if every else cases[:1])


class Runs:
    """Runs of each kind of stage, of the same settings, in folders of their own."""

    def __init__(self, folder, model, teacher):
        self.folder, self.warm, self.model, self.done = folder, Warm(), model, set()
        sums = [(f"{n} + 1 =", str(n + 1)) for n in range(100)]
        asks = [{"question": q, "answer": a, "verifier": "exact"} for q, a in sums]
        write_rows(folder / "questions.jsonl", asks)
        said = [(q, write(f"{q} {a}", a)) for q, a in sums[:22]]
        turns = [{"prompt": [{"role": "user", "content": q}], "completion": a} for q, a in said]
        write_rows(folder / "traces.jsonl", turns)
        pairs = [{"prompt": t["prompt"], "chosen": t["completion"]} for t in turns]
        others = [{"rejected": t["completion"]} for t in turns[1:] + turns[:1]]
        write_rows(folder / "pairs.jsonl", map(operator.or_, pairs, others))
        (folder / "reward.py").write_text("def short(completion):\n    return -len(completion)\n")
        task = {"fn": "jsonl", "params": {"path": str(folder / "questions.jsonl")}, "size": 14}
        asked = {"tasks": [task], "max_completion_length": 8}
        reward = [{"fn": f"{folder}/reward.py:short"}]
        own = {
            "sft": {"data": [str(folder / "traces.jsonl")]},
            "dpo": {"data": [str(folder / "pairs.jsonl")]},
            "grpo": asked | {"rewards": reward, "num_generations": 4},
            "distill": asked | {"teacher_model_name_or_path": teacher},
        }
        for kind, (recipe, settings) in KINDS.items():
            (folder / f"{kind}.yaml").write_text(yaml.safe_dump(FIXED | own[recipe] | settings))

    def place(self, kind, name):
        return self.folder / kind / name / "stage"

    def run(self, kind, name, *flags, fault=None):
        """Run a stage; return its exit code and what it said."""
        place = self.place(kind, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        words = ["--config", self.folder / f"{kind}.yaml", "--output_dir", place, *flags]
        words += ["--model_name_or_path", self.begin(kind)]
        ranks = 2 if kind == "two" else 1
        log = place.with_name("log.txt")
        return self.warm.run(KINDS[kind][0], *words, log=log, fault=fault, ranks=ranks)

    def begin(self, kind):
        """Return what a kind of stage starts from."""
        if kind not in ("two", "qlora"):
            return self.model
        adapter = self.place("lora", self.whole("lora")) / "adapter"
        if kind == "two":
            adapter = shutil.copytree(adapter, self.folder / "bare", dirs_exist_ok=True)
        return adapter

    def finish(self, kind, name, *flags, fault=None):
        """Run a stage to its end and compare it with an undisturbed one; return what it said."""
        code, text = self.run(kind, name, *flags, fault=fault)
        assert code == 0, text
        found, whole = self.left(kind, name), self.left(kind, self.whole(kind))
        for key in whole if "no" not in flags else ("model", "rollouts"):
            assert found[key] == whole[key], key
        assert re.match("reward .* → " if found["rollouts"] else "loss .* → ", whole["note"])
        return text

    def whole(self, kind):
        """Return the name of an undisturbed run."""
        if kind not in self.done:
            code, text = self.run(kind, "whole")
            assert code == 0, text
            self.done.add(kind)
        return "whole"

    def left(self, kind, name):
        """Return what a run leaves, without what it took in time."""
        stage = self.place(kind, name)
        logs = read_rows(stage / "metrics.jsonl")
        rollouts = stage / "rollouts.jsonl"
        return {
            "model": sha256(stage / "model/model.safetensors"),
            "logs": [{k: v for k, v in log.items() if not TIMES.search(k)} for log in logs],
            "rollouts": read_rows(rollouts) if rollouts.exists() else None,
            "metrics": read_manifest(stage).metrics,
            "note": read_json(stage / "progress.json")["note"],
        }

    def checkpoints(self, kind, name):
        found = self.place(kind, name).glob("checkpoints/*checkpoint-*")
        return sorted(path.name for path in found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, padded_models):
    found = Runs(tmp_path_factory.mktemp("runs"), tiny_model, padded_models["teacher", 320])
    yield found
    found.warm.close()


def resumed(text):
    """Return the checkpoint that a run resumed from; None if it began."""
    found = re.search(r"resuming from \S+/(checkpoint-\d+)", text)
    return found and found[1]


def test_a_killed_run_ends_as_an_undisturbed_one(runs, kind, killed_at):
    name = f"killed-{killed_at}"
    assert runs.run(kind, name, fault={"step": killed_at})[0] == -signal.SIGKILL
    assert not (runs.place(kind, name) / "manifest.json").exists()
    before = runs.checkpoints(kind, name)
    text = runs.finish(kind, name)
    assert bool(resumed(text)) == bool(before)
    assert "not whole" not in text


def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(runs, kind, torn):
    """Even when only one is to be kept: the old one goes when the new one is whole."""
    name = f"torn-{torn}"
    fault = {"save": 6, "file": torn}
    code, _ = runs.run(kind, name, "--save_total_limit", 1, fault=fault)
    assert code == -signal.SIGKILL
    assert runs.checkpoints(kind, name) == ["checkpoint-4", "checkpoint-6"]
    text = runs.finish(kind, name, "--save_total_limit", 1)
    assert "checkpoint-6 is not whole (it was not written to its end" in text
    assert resumed(text) == "checkpoint-4"
    assert runs.checkpoints(kind, name) == ["checkpoint-12"]


def test_two_processes_merge_an_adapter_once_and_save_what_they_trained(runs):
    stage = runs.place("two", runs.whole("two"))
    manifest = read_manifest(stage)
    assert manifest.notes["starts_from"] == str(stage / "start")
    assert {"start", "adapter", "model"} <= {Path(name).parts[0] for name in manifest.outputs}
    config = read_json(stage / "adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(stage / "start")
    same(logits(opened(stage / "model")), logits(adapted(stage / "adapter")))


FAULTS = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "missing": lambda path: path.unlink(),
}


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", ["sft", "lora"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_any_file_of_the_newest_is_found(runs, tmp_path, caplog, kind, fault):
    whole = runs.place(kind, runs.whole(kind)) / "checkpoints"
    names = [path.name for path in (whole / "checkpoint-12").iterdir()]
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", SEAL}
    weights = {"sft": "model.safetensors", "lora": "adapter_model.safetensors"}
    assert needed | {weights[kind]} < set(names)
    for name in names:
        place = tmp_path / name
        for checkpoint in ("checkpoint-10", "checkpoint-12"):
            shutil.copytree(whole / checkpoint, place / checkpoint)
        FAULTS[fault](place / "checkpoint-12" / name)
        assert last_good(place).name == "checkpoint-10", name
        assert (place / "damaged-checkpoint-12").is_dir()
        assert name in caplog.messages[-1]
        assert "renamed to damaged-checkpoint-12" in caplog.messages[-1]


def test_without_a_whole_checkpoint_a_run_starts_from_the_beginning(runs):
    runs.run("sft", "again", fault={"step": 5})
    for checkpoint in runs.place("sft", "again").glob("checkpoints/checkpoint-*"):
        FAULTS["missing"](checkpoint / "model.safetensors")
    assert "has no whole checkpoint: starting from the beginning" in runs.finish("sft", "again")


@pytest.mark.parametrize(
    ("kind", "number", "at"),
    [("sft", signal.SIGINT, 5), ("grpo", signal.SIGTERM, 4), ("two", signal.SIGTERM, 4)],
)
def test_a_signal_stops_a_run_where_it_can_resume(runs, kind, number, at):
    """Step 5 is in the middle of what GRPO generated at step 4; nothing was to be saved at all."""
    flags = ["--save_strategy", "no"]
    code, text = runs.run(kind, "stopped", *flags, fault={"step": at, "signal": number})
    assert code == 128 + number
    assert f"stopped: by {number.name} after step 6 of 12; run the same" in text
    waits = f"{number.name}: stopping after step 6, the end of this generation window"
    assert (waits in text) == (kind != "sft")
    assert runs.checkpoints(kind, "stopped") == ["checkpoint-6"]
    assert resumed(runs.finish(kind, "stopped", *flags)) == "checkpoint-6"


def test_a_signal_after_the_last_step_is_too_late(runs):
    runs.finish("sft", "late", fault={"step": STEPS, "signal": signal.SIGTERM})


def test_a_full_disk_is_named_and_leaves_the_last_good_state(runs):
    runs.run("sft", "full", fault={"step": 5})
    code, text = runs.run("sft", "full", fault={"file_size": 150_000})
    assert code == 1
    folder = runs.place("sft", "full") / "checkpoints/checkpoint-6"
    assert f"failed: no room to write {folder}: " in text
    assert "are free on its disk" in text
    assert "save_total_limit: 1" in text
    assert "Traceback" not in text
    assert runs.checkpoints("sft", "full") == ["checkpoint-2", "checkpoint-4"]
    assert resumed(runs.finish("sft", "full")) == "checkpoint-4"
