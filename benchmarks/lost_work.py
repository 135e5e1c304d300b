"""Count what is done twice after a SIGKILL at a random point, for each kind of stage.

    python benchmarks/lost_work.py --kills 5

Each run is killed once and started again with the same command. Training: steps are counted as
they begin, in every run; done twice is what goes beyond the run's own number. The peer is the raw
script of `benchmarks/raw` with TRL's default save settings (every 500 steps, none before), and
`resume_from_checkpoint` where there is a checkpoint. Data stages: completions are counted as they
end. On disk at the kill and made again must be none; those that had ended, or were under way, and
were not on disk yet, are lost in any case, and are counted apart. A script that writes at its end,
such as `raw/reject.py`, does all of it again. Writes `lost_work.json` and prints Markdown.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from killing import forked
from measuring import QUICKSTART, ROOT, results, save, tail
from sides import RAW, asked, prepared, recipe, tasks_of

from chainforge.core.jsonl import write_rows

SETTINGS: dict[str, dict[str, int]] = {  # steps of a run, and its save interval
    "sft": {"steps": 120, "save": 40},
    "grpo": {"steps": 12, "save": 4},
    "distill": {"steps": 12, "save": 4},
}
DATA = ("collect", "reject", "evaluate")
DEFAULT_SAVE = 500  # TRL's
ROWS = 240  # of a data stage


def main() -> None:
    """Kill and resume each kind, count, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=[*SETTINGS, *DATA],
                        default=[*SETTINGS, *DATA])  # fmt: skip
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    parser.add_argument("--seed", type=int, default=0, help="of the points of the kills")
    args = parser.parse_args()
    chain, draw = prepared(args.chain, "cold_start").resolve(), random.Random(args.seed)
    result: dict[str, Any] = {"kills": args.kills, "default_save_steps": DEFAULT_SAVE}
    result |= {"training": {}, "data": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:  # collect starts threads, after which nothing should fork
            if kind in SETTINGS:
                result["training"][kind] = training(kind, chain, Path(folder), args.kills, draw)
            elif kind != "collect":
                result["data"][kind] = sampling(kind, chain, Path(folder), args.kills, draw)
        if "collect" in args.kinds:
            result["data"]["collect"] = collecting(Path(folder), args.kills, draw)
    save(results() / "lost_work.json", result)
    print(table(result))


def training(kind: str, chain: Path, folder: Path, kills: int, draw: random.Random) -> Any:
    """Kill a training stage, and its raw script where there is one, at the same steps."""
    steps, interval = SETTINGS[kind]["steps"], SETTINGS[kind]["save"]
    tasks = tasks_of("rl.yaml", folder / "tasks.json")
    model, rows, base = chain / "cold_start/model", chain / "traces", QUICKSTART / "base"
    out = folder / kind
    settings = ["--max_steps", steps, "--save_steps", interval]
    ours = {
        "sft": recipe("sft", "cold_start.yaml", out, "--model_name_or_path", base, "--data", rows),
        "grpo": recipe("grpo", "rl.yaml", out, "--model_name_or_path", model,
                       "--per_device_train_batch_size", 8),
        "distill": recipe("distill", "distill.yaml", out, "--tasks",
                          json.dumps(asked("rl.yaml")), "--model_name_or_path",
                          QUICKSTART / "student_base", "--teacher_model_name_or_path", model,
                          "--per_device_train_batch_size", 16),
    }  # fmt: skip
    commands = {"ours": [*ours[kind][1:], *map(str, settings)]}
    raw = {
        "sft": ["--model", base, "--data", rows / "dataset/train.parquet"],
        "grpo": ["--model", model, "--tasks", tasks, "--batch", 8, "--updates", 4],
    }
    if kind in raw:
        words = [RAW / f"{kind}.py", *raw[kind], "--output_dir", out, "--max_steps", steps]
        commands["raw"] = [str(word) for word in words]
    found: dict[str, list[int]] = {side: [] for side in commands}
    points = [draw.randrange(1, steps + 1) for _ in range(kills)]
    for point in points:
        for side, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            counter = folder / "steps"
            counter.unlink(missing_ok=True)
            assert forked(command, folder / "log", counter, count_steps, point) == -signal.SIGKILL
            again = [*command, "--resume"] if side == "raw" and checkpoints(out) else command
            assert forked(again, folder / "log", counter, count_steps) == 0, tail(folder / "log")
            found[side].append(counter.stat().st_size - steps)
        print(kind, "killed before step", point, {s: v[-1] for s, v in found.items()}, flush=True)
    return {"steps": steps, "save_steps": interval, "killed_before": points, "done_twice": found}


def checkpoints(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*"))


def count_steps(counter: int, last: int | None) -> None:
    """Note each step as it begins; die where the one numbered `last` would begin."""
    from transformers import Trainer

    step, taken = Trainer.training_step, [0]

    def counted(self: Any, *args: Any, **given: Any) -> Any:
        if taken[0] + 1 == last:
            os.kill(os.getpid(), signal.SIGKILL)
        taken[0] += 1
        os.write(counter, b".")
        return step(self, *args, **given)

    Trainer.training_step = counted


def sampling(kind: str, chain: Path, folder: Path, kills: int, draw: random.Random) -> Any:
    """Kill a stage that samples; count completions that had ended, by what is on disk."""
    model, out = chain / "cold_start/model", folder / kind
    config, few = folder / f"{kind}.json", ROWS // 2
    task = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum", "max_digits": 1},
            "size": few, "split": "test"}  # fmt: skip
    config.write_text(json.dumps({
        "tasks": [task], "system_prompt": "", "num_samples": 2, "max_new_tokens": 72,
        "generation_batch_size": 32,
    }))  # fmt: skip
    given = ["--models", f"cold={model}"] if kind == "evaluate" else []
    given = given or ["--model_name_or_path", str(model)]
    command = recipe(kind, config, out, *given)[1:]
    found: dict[str, list[int]] = {"made_again": [], "ended_not_on_disk": [], "on_disk": []}
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        counter = folder / "completions"
        counter.unlink(missing_ok=True)
        point = draw.randrange(1, ROWS)
        code = forked(command, folder / "log", counter, count_completions, until=point)
        assert code == -signal.SIGKILL, tail(folder / "log")
        ended, there = counter.stat().st_size, lines(out, "samples*.jsonl*")
        assert forked(command, folder / "log", counter, count_completions) == 0
        note(found, made=counter.stat().st_size, ended=ended, there=there)
        print(kind, {name: of[-1] for name, of in found.items()}, flush=True)
    return {"rows": ROWS} | found


def note(found: dict[str, list[int]], made: int, ended: int, there: int) -> None:
    """Add a kill's figures; `made` in both runs together, `ended` and `there` at the kill."""
    found["made_again"].append(made - ended + there - ROWS)
    found["ended_not_on_disk"].append(ended - there)
    found["on_disk"].append(there)


def count_completions(counter: int, last: int | None) -> None:
    """Note each completion as it ends."""
    from chainforge.generate.local import LocalEngine

    hand_over = LocalEngine._hand_over

    def counted(self: Any, done: Any, take: Any) -> None:
        os.write(counter, b"." * len(done))
        hand_over(self, done, take)

    LocalEngine._hand_over = counted  # type: ignore[method-assign]


def lines(folder: Path, pattern: str) -> int:
    """Count whole lines."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob(pattern))


def collecting(folder: Path, kills: int, draw: random.Random) -> Any:
    """Kill a collector; count what the server was asked, by what is on disk."""
    sys.path.insert(0, str(ROOT / "tests"))
    from server import GOOD, Answer, Server  # type: ignore[import-not-found]

    out, asked = folder / "collect", folder / "questions.jsonl"
    write_rows(asked, [{"question": f"What is {n} and two?", "answer": "4"} for n in range(ROWS)])
    found: dict[str, list[int]] = {"made_again": [], "ended_not_on_disk": [], "on_disk": []}
    log = open(folder / "log", "wb")  # noqa: SIM115
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        with Server(lambda _: Answer(GOOD, seconds=0.05)) as server:
            config = folder / "collect.json"
            config.write_text(json.dumps({
                "tasks": [{"fn": "jsonl", "params": {"path": str(asked)}, "split": "all"}],
                "teacher": "openai", "model": "teacher", "base_url": server.url,
            }))  # fmt: skip
            command = recipe("collect", config, out)
            given = os.environ | {"OPENAI_API_KEY": "sk-benchmark-0000"}
            point = draw.randrange(1, ROWS)
            with subprocess.Popen(command, stdout=log, stderr=log, env=given) as child:
                while len(server.asked) < point:
                    assert child.poll() is None, tail(folder / "log")
                    time.sleep(0.002)
                child.kill()
            ended, there = len(server.asked), answers(out / "requests.jsonl")
            subprocess.run(command, stdout=log, stderr=log, env=given, check=True)
            note(found, made=len(server.asked), ended=ended, there=there)
        print("collect", {name: of[-1] for name, of in found.items()}, flush=True)
    return {"rows": ROWS} | found


def answers(ledger: Path) -> int:
    """Count the requests of a ledger that have an outcome."""
    rows = [json.loads(line) for line in ledger.read_text().splitlines(True) if line[-1:] == "\n"]
    return sum("outcome" in row for row in rows)


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = ["| stage | killed before step | steps done twice | save interval | TRL's defaults |",
            "|---|---|---|--:|---|"]  # fmt: skip
    for kind, found in result["training"].items():
        twice = {side: ", ".join(map(str, of)) for side, of in found["done_twice"].items()}
        rows.append(
            f"| {kind} | {', '.join(map(str, found['killed_before']))} | {twice['ours']} | "
            f"{found['save_steps']} | {twice.get('raw', 'no script')} |"
        )
    rows += ["", "| stage | rows on disk at the kill | of these made again | ended or under way, "
             "not on disk |", "|---|---|---|---|"]  # fmt: skip
    for kind, found in result["data"].items():
        cells = (found[name] for name in ("on_disk", "made_again", "ended_not_on_disk"))
        rows.append(f"| {kind} | {' | '.join(', '.join(map(str, cell)) for cell in cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
