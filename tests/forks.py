"""Run recipes in forks of one warm process, so that killing a run costs no import.

torch and TRL take ten seconds to import, a run of the tiny model one. A `Warm` process imports
them once, runs nothing itself, and forks a child for each run, which is the recipe's own command
line from then on: its own arguments, files and exit code. With `ranks` it is a launch of several
processes, which are killed when one of them fails, as torchrun does it. A fault, of the last rank
of a launch, is one of

    {"step": n}              SIGKILL when n steps are taken and the next one begins, or the last ends
    {"step": n, "signal": s} another signal there
    {"save": n, "file": i}   SIGKILL in the middle of the i-th file that torch saves in checkpoint n
    {"file_size": bytes}     no file may grow beyond this (RLIMIT_FSIZE), as on a full disk
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import configs

ROOT = Path(__file__).parents[1]
TRAINERS = ("sft", "dpo", "grpo", "distillation")
WARM = ("peft", "chainforge.train.loop", *(f"trl.trainer.{name}_trainer" for name in TRAINERS))


class Warm:
    """The warm process, from the outside."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)

    def run(self, recipe, *argv, log, fault=None, ranks=1):
        """Run a recipe to its end; return its exit code, as `Popen` would, and its words."""
        before = log.stat().st_size if log.exists() else 0
        job = {"recipe": recipe, "argv": [str(word) for word in argv], "log": str(log)}
        self._process.stdin.write(json.dumps(job | {"fault": fault or {}, "ranks": ranks}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
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
        answers.write(f"{_launch(job.pop('ranks'), job.pop('fault'), job)}\n")
        answers.flush()


def _launch(ranks, fault, job):
    """Fork a run; return the exit code of the first process that failed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _work(fault=fault if rank == ranks - 1 else {}, **job)
        children.add(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            if code not in (130, 143):  # the others stop by themselves
                for other in children:
                    os.kill(other, signal.SIGKILL)
    return failed


def _work(recipe, argv, log, fault):
    """Become the recipe's command line."""
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from chainforge.core import process

        module = configs.recipe(recipe)
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
    """Set up the fault of a run."""
    if "file_size" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_size"], resource.RLIM_INFINITY))
    if "save" in fault:
        _kill_while_saving(fault["save"], fault["file"])
    if "step" in fault:
        sent = []
        for method in ("training_step", "_finalize_training"):
            _signal_at(method, fault["step"], fault.get("signal", signal.SIGKILL), sent)


def _signal_at(name, step, number, sent):
    from transformers import Trainer

    method = getattr(Trainer, name)

    def signalled(self, *args, **kwargs):
        if self.state.global_step == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return method(self, *args, **kwargs)

    setattr(Trainer, name, signalled)


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
