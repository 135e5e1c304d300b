"""The real FSDP2 and DeepSpeed on two CPU processes compute, save and resume what one process does.

`make test-distributed` runs this in an environment of its own, with DeepSpeed. One process and two
see the same batches in SFT; in GRPO and distillation each process draws its own completions, so
there plain DDP is what the other layouts must equal. RECEIPTS names a folder for their receipts.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from chainforge.core.artifacts import read_manifest, sha256
from chainforge.core.jsonl import read_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import distributed
from receipt import ROOT, write_receipt

SPLIT = ("fsdp2", "zero2", "zero3")
# In bfloat16 two processes round other sums than one, and ZeRO keeps the adapter in it, too.
CLOSE = {"full": 1e-4, "lora": 1e-4, "qlora": 0.05}  # losses
APART = {"full": 1e-3, "lora": 1e-3, "qlora": 0.2}  # what training changed, relative
TIMES = re.compile("time$|per_second$")
RESUMED = [(layout, *kind) for layout in SPLIT for kind in (("sft", "full"), ("grpo", "lora"))]


class Jobs:
    """Every job, run when it is first asked for."""

    def __init__(self, work):
        self.work, self.done = work, {}
        distributed.write_traces(work)

    def run(self, layout, recipe, method):
        """Return the folder of a job that was run to its end."""
        job = distributed.Job(layout, recipe, method)
        if job not in self.done:
            receipt = self.done[job] = job.run(self.work)
            if folder := os.environ.get("RECEIPTS"):
                write_receipt(receipt, Path(folder) / f"{receipt.name}.json")
        assert self.done[job].exit == 0, "\n".join(self.done[job].output)
        return self.work / job.name


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    os.environ["PYTHONPATH"] = str(ROOT)
    return Jobs(tmp_path_factory.mktemp("jobs"))


def logs(stage):
    """Return what a stage logged, without what it took in time."""
    rows = read_rows(stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not TIMES.search(key)} for row in rows]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def change(stage):
    """Return by how much each weight of what a stage saved differs from its base, in one vector."""
    base = distributed.STUDENT if "distill" in stage.name else distributed.BASE
    left, base = weights(stage / "model"), weights(ROOT / base)
    assert left.keys() == base.keys()
    return torch.cat([(left[name] - weight).flatten() for name, weight in base.items()])


@pytest.mark.parametrize("job", distributed.JOBS, ids=lambda job: job.name)
def test_a_layout_trains_and_saves_what_plain_training_does(jobs, job):
    plain = "single" if job.recipe == "sft" or job.layout == "single" else "ddp"
    wanted, found = (jobs.run(kind, job.recipe, job.method) for kind in (plain, job.layout))
    losses = [[row["loss"] for row in logs(stage)] for stage in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE[job.method])
    mine, theirs = change(found), change(wanted)
    assert float(theirs.norm()) > 0.1
    assert float((mine - theirs).norm() / theirs.norm()) < APART[job.method]
    if job.method != "full":
        assert weights(found / "adapter").keys() == weights(wanted / "adapter").keys()
    assert read_manifest(found).metrics["steps"] == distributed.STEPS
    assert not list(found.glob("*rank*"))


@pytest.mark.parametrize(("layout", "recipe", "method"), RESUMED)
def test_a_killed_run_resumes_and_ends_bit_equal(jobs, layout, recipe, method):
    whole = jobs.run(layout, recipe, method)
    job, name = distributed.Job(layout, recipe, method), f"killed-{whole.name}"
    killed = jobs.work / name
    assert job.run(jobs.work, name, kill_at=3).exit != 0
    assert [path.name for path in killed.glob("checkpoints/checkpoint-*")] == ["checkpoint-2"]
    resumed = job.run(jobs.work, name)
    assert resumed.exit == 0, resumed.output
    assert "resuming from" in (jobs.work / f"{name}.log").read_text()
    assert logs(killed) == logs(whole)
    assert sha256(killed / "model/model.safetensors") == sha256(whole / "model/model.safetensors")


def test_an_adapter_that_trains_on_has_its_own_start_as_the_reference(jobs):
    """In GRPO the KL to it starts at 0, and every layout ends with the same adapter."""
    given = {"model_name_or_path": jobs.run("single", "sft", "lora") / "adapter"}
    ended = []
    for layout in ("ddp", *SPLIT):
        name = f"continued-{layout}"
        job = distributed.Job(layout, "grpo", "lora")
        done = job.run(jobs.work, name, adapter="continue", **given)
        assert done.exit == 0, done.output
        kl = [row["kl"] for row in logs(jobs.work / name)]
        assert kl[0] == 0 < kl[-1]
        ended.append(change(jobs.work / name))
    for other in ended[1:]:
        assert float((other - ended[0]).norm() / ended[0].norm()) < APART["lora"]
