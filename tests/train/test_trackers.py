"""A tracker that cannot be used is reported before training; a resumed stage is one run."""

import os
import re
import sys
from types import SimpleNamespace

import pytest
from trl import SFTConfig

from chainforge.core.errors import InputError
from chainforge.train.trackers import check_trackers, name_run


@pytest.fixture(autouse=True)
def wandb(tmp_path, monkeypatch):
    """A package called wandb, and a machine that knows no key."""
    (tmp_path / "lib/wandb").mkdir(parents=True)
    (tmp_path / "lib/wandb/__init__.py").write_text("run = None")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    yield tmp_path
    sys.modules.pop("wandb", None)


LOGIN = "machine {}\n  login user\n  password 0123\n"
WAYS = [
    ({}, "", False),
    ({"WANDB_API_KEY": "0123456789abcdef"}, "", True),
    ({"WANDB_MODE": "offline"}, "", True),
    ({}, LOGIN.format("api.wandb.ai"), True),
    ({}, LOGIN.format("example.org"), False),
]


@pytest.mark.parametrize(("environment", "logins", "fine"), WAYS)
def test_wandb_without_a_key_is_refused(wandb, monkeypatch, environment, logins, fine):
    (wandb / "netrc").write_text(logins)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if fine:
        check_trackers(["wandb"])
        return
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("mlflow", "mlflow is not installed; pip install mlflow"),
     ("tensorbord", "no tracker 'tensorbord'; did you mean 'tensorboard'?")],
)  # fmt: skip
def test_a_tracker_that_is_not_there_is_refused(name, words):
    with pytest.raises(InputError, match=f"report_to: {re.escape(words)}"):
        check_trackers([name])


def test_a_resumed_stage_resumes_its_run(tmp_path, monkeypatch):
    (tmp_path / "chain.json").write_text('{"name": "mine"}')
    seen = []
    for stage in ("one", "one", "two"):
        for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT", "TRACKIO_PROJECT"):
            monkeypatch.setenv(name, "")  # so that it is as it was after the test
            monkeypatch.delenv(name)
        (tmp_path / stage).mkdir(exist_ok=True)
        project = SFTConfig.__dataclass_fields__["project"]
        training = SimpleNamespace(report_to=["wandb"], run_name=None, project=project.default,
                                   __dataclass_fields__={"project": project})  # fmt: skip
        name_run(training, tmp_path / stage)
        assert (training.run_name, training.project) == (f"mine/{stage}", "mine")
        assert os.environ["WANDB_RESUME"] == "allow"
        seen.append(os.environ["WANDB_RUN_ID"])
    assert seen[0] == seen[1] != seen[2]
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    name_run(training, tmp_path / "one")
    assert os.environ["WANDB_RUN_ID"] == "given"
