"""A tracker that cannot be used is reported before training; a resumed stage is one run."""

import os
import re
import sys
from unittest import mock

import pytest
from trl import SFTConfig

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
FINE = [
    ({"WANDB_API_KEY": "0123456789abcdef"}, ""),
    ({"WANDB_MODE": "offline"}, ""),
    ({}, LOGIN.format("api.wandb.ai")),
]
REFUSED = [
    ("wandb", "", "WANDB_API_KEY"),
    ("wandb", LOGIN.format("example.org"), "WANDB_API_KEY"),
    ("mlflow", "", "report_to: mlflow is not installed; pip install mlflow"),
    ("tensorbord", "", "report_to: no tracker 'tensorbord'; did you mean 'tensorboard'?"),
]


@pytest.mark.parametrize(("environment", "logins"), FINE)
def test_a_tracker_that_is_ready(wandb, environment, logins):
    (wandb / "netrc").write_text(logins)
    os.environ.update(environment)
    check_trackers(["wandb"])


@pytest.mark.parametrize(("name", "logins", "words"), REFUSED)
def test_a_tracker_that_cannot_be_used_is_refused(wandb, name, logins, words):
    (wandb / "netrc").write_text(logins)
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
    os.environ["WANDB_RUN_ID"] = "given"
    name_run(training, tmp_path / "one")
    assert os.environ["WANDB_RUN_ID"] == "given"
