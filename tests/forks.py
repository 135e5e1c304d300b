"""Run recipes in forks of one warm process, so that killing a run costs no import.

torch and TRL take ten seconds to import, a run of the tiny model one. A `Warm` process imports
them once, runs nothing itself, and forks a child for each run, which is the recipe's own command
line from then on: its own arguments, files and exit code. A fault is one of

    {"step": n}            SIGKILL when n steps are taken and the next one begins
    {"save": n, "file": i} SIGKILL in the middle of the i-th file that checkpoint n saves by torch
    {"signal": s, "step": n} send itself a signal there instead
    {"file_size": bytes}   no file may grow beyond this (RLIMIT_FSIZE), as on a full disk
"""

import importlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINERS = ("sft", "grpo", "distillation")
WARM = ("peft", "chainforge.training.loop", *(f"trl.trainer.{name}_trainer" for name in TRAINERS))


class Warm:
    """The warm process, from the outside."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, recipe, *argv, log, fault=None):
        """Run a recipe to its end; return its exit code, as a shell or `Popen` would, and words."""
        before = log.stat().st_size if log.exists() else 0
        job = {"recipe": recipe, "argv": [str(word) for word in argv], "log": str(log)}
        self._process.stdin.write(json.dumps(job | {"fault": fault or {}}) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())["code"]
        return code, log.read_bytes()[before:].decode()

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve():
    sys.path.insert(0, str(ROOT))
    import torch

    for name in WARM:
        importlib.import_module(name)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _work(**job)
        _, status = os.waitpid(child, 0)
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()


def _work(recipe, argv, log, fault):
    """Become the recipe's command line."""
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from chainforge.core import process

        spec = importlib.util.spec_from_file_location(recipe, ROOT / f"recipes/{recipe}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.argv = [f"{recipe}.py", *argv]
        _arm(fault)
        process.run(module.main)
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(fault):
    if "file_size" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_size"], resource.RLIM_INFINITY))
    if "save" in fault:
        _kill_while_saving(fault["save"], fault["file"])
    elif "step" in fault:
        _signal_at(fault["step"], fault.get("signal", signal.SIGKILL))


def _signal_at(step, number):
    from transformers import Trainer

    train = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return train(self, *args, **kwargs)

    Trainer.training_step = training_step


def _kill_while_saving(step, count):
    import torch

    save, seen = torch.save, []

    def torn(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if f"checkpoint-{step}/" in str(path):
            seen.append(path)
            if len(seen) == count:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


if __name__ == "__main__":
    serve()
