"""A tracker that cannot be used is reported before training; a resumed stage is one run."""

import os
import re
import sys
from unittest import mock

import pytest
from trl import SFTConfig

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.train.trackers import check_trackers, name_run


def forget():
    for name in [name for name in os.environ if "WANDB_" in name or "TRACKIO_" in name]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def wandb(tmp_path, monkeypatch):
    """A package called wandb, and a machine that knows no key."""
    (tmp_path / "lib/wandb").mkdir(parents=True)
    (tmp_path / "lib/wandb/__init__.py").write_text("run = None")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    with mock.patch.dict(os.environ, NETRC=str(tmp_path / "netrc")):
        forget()
        yield tmp_path
    sys.modules.pop("wandb", None)


LOGIN = "machine {}\n  login user\n  password 0123\n"
NO_KEY = "report_to: wandb has no key: set WANDB_API_KEY"
CASES = [
    ("wandb", {"WANDB_API_KEY": "0123456789abcdef"}, "", None),
    ("wandb", {"WANDB_MODE": "offline"}, "", None),
    ("wandb", {}, LOGIN.format("api.wandb.ai"), None),
    ("wandb", {}, LOGIN.format("example.org"), NO_KEY),
    ("wandb", {}, "", NO_KEY),
    ("mlflow", {}, "", "report_to: mlflow is not installed; pip install mlflow"),
    ("tensorbord", {}, "", "report_to: no tracker 'tensorbord'; did you mean 'tensorboard'?"),
]


@pytest.mark.parametrize(("name", "environment", "logins", "words"), CASES)
def test_a_tracker_that_cannot_be_used_is_refused(wandb, name, environment, logins, words):
    (wandb / "netrc").write_text(logins)
    os.environ.update(environment)
    if words is None:
        check_trackers([name])
        return
    with pytest.raises(InputError, match=re.escape(words)):
        check_trackers([name])


def test_a_resumed_stage_resumes_its_run(tmp_path):
    (tmp_path / "chain.json").write_text('{"name": "mine"}')
    seen = []
    for stage in ("one", "one", "two"):
        forget()
        (tmp_path / stage).mkdir(exist_ok=True)
        training = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=["wandb"])
        name_run(training, tmp_path / stage)
        assert (training.run_name, training.project) == (f"mine/{stage}", "mine")
        assert os.environ["WANDB_RESUME"] == "allow"
        seen.append(os.environ["WANDB_RUN_ID"])
    assert seen[0] == seen[1] != seen[2]
    os.environ |= {"WANDB_RUN_ID": "given", "WANDB_PROJECT": "own"}
    training.run_name = "first"
    name_run(training, tmp_path / "one")
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_PROJECT"]) == ("given", "own")
    assert training.run_name == "first"


def test_one_line_of_the_chain_tracks_every_training_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "base/config.json", {})
    stages = [
        {"name": "traces", "recipe": "collect"},
        {"name": "cold", "recipe": "sft", "model": "base", "data": "traces"},
        {"name": "reason", "recipe": "grpo", "model": "cold", "set": {"report_to": "none"}},
    ]

    def planned(**more):
        chain = {"name": "sums", "base": "base", "stages": stages} | more
        write_json(tmp_path / "chain.yaml", chain)
        return plan_chain(load_chain("chain.yaml"), "runs")

    tracked = planned(report_to=["trackio", "tensorboard"])
    found = ["--report_to trackio tensorboard" in step.shell for step in tracked]
    assert found == [False, True, False]
    assert "--report_to none" in tracked[2].shell
    # A tracker is not part of the fingerprint.
    assert [step.fingerprint for step in planned()] == [step.fingerprint for step in tracked]
