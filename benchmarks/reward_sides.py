"""What one run of a side of `rewards.py` does, in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from hostile import TRICKS, trick

from chainforge.core.jsonl import Row
from chainforge.core.transcript import write

BATCH = 512
# Texts and golds that make both sides start what they need: a parser, ours in its own program.
WARM = (
    [write("A start.", answer) for answer in (r"$\boxed{2}$", r"$\boxed{0.5x+\sqrt{7}}$")],
    [r"\boxed{3}", r"\boxed{0.25x+\sqrt{7}}"],
)


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def reward_of(side: str) -> Any:
    """Return a function of completions and golds."""
    if side == "trl":
        from trl.rewards import accuracy_reward

        return lambda texts, golds: accuracy_reward([message(text) for text in texts], golds)
    from chainforge.rewards.reward import RewardArgs, load_rewards

    args = RewardArgs(rewards=[{"fn": "accuracy_reward"}])
    [reward] = load_rewards(args, {"prompt", "answer"})
    return lambda texts, golds: reward(
        [None] * len(texts), [message(text) for text in texts], answer=golds
    )


def score_once(side: str, rows: list[Row]) -> Row:
    """Score all rows in this process; return verdicts, seconds, and seconds of all processors."""
    from chainforge.rewards.verify import POOL

    reward = reward_of(side)
    reward(*WARM)
    used, started, verdicts = processor_seconds(POOL), time.perf_counter(), []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        verdicts += reward([row["completion"] for row in batch], [row["gold"] for row in batch])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": processor_seconds(POOL) - used,
            "verdicts": verdicts}  # fmt: skip


def processor_seconds(pool: Any) -> float:
    """Return what this process and the verifier pool with its children have used so far."""
    total = time.process_time()
    program = pool._process
    if program is None or not Path("/proc").is_dir():
        return total
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    for pid in (str(program.pid), *children):
        # After the name in brackets, from field 3: the 14th to 17th are user, system, and the same
        # of the children that were waited for.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def by_kind(seed: int, patience: float) -> dict[str, Row]:
    """Give TRL's reward each kind of hostile answer once; return seconds and verdicts."""
    reward = reward_of("trl")
    reward(*WARM)
    kinds = {}
    for name in TRICKS:
        row = trick(name, random.Random(seed))
        kinds[row["kind"]] = timed(reward, row["completion"], patience)
    return kinds


def timed(reward: Any, text: str, patience: float) -> Row:
    """Score in a forked process; return seconds, the verdict, and whether it was stopped."""
    read, said = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if not child:
        os.write(said, json.dumps(reward([text], [r"\boxed{4}"])[0]).encode())
        os._exit(0)
    os.close(said)
    while time.perf_counter() - started < patience and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    stopped = seconds >= patience
    if stopped:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    verdict = b"" if stopped else os.read(read, 64)
    os.close(read)
    return {"seconds": seconds, "stopped": stopped, "verdict": json.loads(verdict or b"null")}
