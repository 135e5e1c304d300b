"""Say where the time of a GRPO stage goes: imports, generation, rewards, gradients, files.

    python benchmarks/step_profile.py --model runs/quickstart/cold_start/model
    python benchmarks/step_profile.py --model MODEL --functions 25       # and Python's own profile
    python benchmarks/step_profile.py --model MODEL --operators 15       # and torch's operators

Runs `recipes/grpo.py` in this process, by default with the quickstart's `rl.yaml`, and clocks
the parts of a step: each part's own time, without that of the parts inside it, by the clock and by
the processor (all threads together, which on a busy machine says more). What follows `--` goes to
the recipe: `-- --max_steps 8`. Writes `benchmarks/results/step_profile.json` and prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import runpy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START = "imports, settings and the rest"
STEP = "a step's rest"


class Clock:
    """Adds up each part's own seconds: by the clock, and by the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.calls: dict[str, int] = defaultdict(int)
        self._open = [START]
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _turn(self) -> None:
        """Book the time since the last turn on the part that is open."""
        now = self._now()
        booked = self.seconds[self._open[-1]]
        for number in (0, 1):
            booked[number] += now[number] - self._last[number]
        self._last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book what happens inside on this part."""
        self._turn()
        self._open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time is booked on a part."""

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*given, **named)

        return call

    def wrap(self, name: str, owner: Any, *methods: str) -> None:
        """Book these methods of a class, or functions of a module, on a part."""
        for method in methods:
            setattr(owner, method, self.clocked(name, getattr(owner, method)))

    def rows(self, steps: int) -> list[dict[str, Any]]:
        """Return the parts, the largest first."""
        self._turn()
        whole = sum(wall for wall, _ in self.seconds.values())
        rows = [
            {"part": name, "calls": self.calls[name], "seconds": round(wall, 3),
             "cpu_seconds": round(cpu, 3), "share": round(wall / whole, 4),
             "ms_a_step": round(1000 * wall / steps, 2)}
            for name, (wall, cpu) in self.seconds.items()
        ]  # fmt: skip
        return sorted(rows, key=lambda row: -row["seconds"])


def install(clock: Clock) -> None:
    """Clock TRL's and our own parts of a stage."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import GenerationMixin, Trainer
    from transformers.trainer_callback import CallbackHandler
    from trl import GRPOTrainer

    from chainforge.generate.local import RolloutSampler
    from chainforge.generate.rollouts import Recorder
    from chainforge.train import saving

    clock.wrap("building the trainer, loading the model", GRPOTrainer, "__init__")
    clock.wrap(STEP, GRPOTrainer, "training_step")
    clock.wrap("around generation: tokenising, decoding", GRPOTrainer, "_generate")
    clock.wrap("padding, advantages, metrics", GRPOTrainer, "_generate_and_score_completions")
    clock.wrap("rewards", GRPOTrainer, "_calculate_rewards")
    clock.wrap("writing rollouts", Recorder, "write")
    clock.wrap("forward: log probabilities", GRPOTrainer, "_get_per_token_logps_and_entropies")
    clock.wrap("the loss around them", GRPOTrainer, "compute_loss")
    clock.wrap("backward", Accelerator, "backward")
    clock.wrap("clipping", Accelerator, "clip_grad_norm_")
    clock.wrap("optimizer", AcceleratedOptimizer, "step", "zero_grad")
    clock.wrap("generation", GenerationMixin, "generate", "generate_batch")
    clock.wrap("generation", RolloutSampler, "__call__")
    clock.wrap("checkpoints", Trainer, "_maybe_log_save_evaluate", "_save_checkpoint")
    clock.wrap("callbacks: metrics, progress, seals", CallbackHandler, "call_event")
    clock.wrap("saving the model", saving, "save")


def run(recipe: Path, given: list[str], clock: Clock, functions: int, operators: int) -> None:
    """Run the recipe in this process, profiled as asked."""
    sys.argv = [str(recipe), *given]
    with contextlib.ExitStack() as stack:
        if functions:
            import cProfile
            import pstats

            profile = cProfile.Profile()
            stack.callback(lambda: pstats.Stats(profile).sort_stats("tottime")
                           .print_stats(functions))  # fmt: skip
            stack.enter_context(profile)
        if operators:
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as of_torch

            seen = of_torch(activities=[ProfilerActivity.CPU])
            stack.callback(lambda: print(
                seen.key_averages().table("self_cpu_time_total", row_limit=operators)))  # fmt: skip
            stack.enter_context(seen)
        runpy.run_path(str(recipe), run_name="__main__")


def main() -> None:
    clock = Clock()  # before the imports, which a stage has too
    from measuring import QUICKSTART, ROOT, results, save

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/grpo.py")
    parser.add_argument("--config", type=Path, default=QUICKSTART / "rl.yaml")
    parser.add_argument("--model", default="runs/quickstart/cold_start/model")
    parser.add_argument("--functions", type=int, default=0, help="so many lines of cProfile")
    parser.add_argument("--operators", type=int, default=0, help="so many lines of torch.profiler")
    parser.add_argument("--out", type=Path, default=results() / "step_profile.json")
    args, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        given = ["--config", str(args.config), "--model_name_or_path", str(args.model)]
        given += ["--output_dir", f"{folder}/stage", *(one for one in others if one != "--")]
        install(clock)
        try:
            run(args.recipe, given, clock, args.functions, args.operators)
        except SystemExit as ended:
            if ended.code:
                raise
        lines = Path(folder, "stage/metrics.jsonl").read_text().splitlines()
        manifest = Path(folder, "stage/manifest.json")
        steps = json.loads(manifest.read_text())["metrics"]["steps"]
    result = {
        "config": args.config.name, "given": others, "steps": steps, "parts": clock.rows(steps),
        "tokens": json.loads(lines[-1]).get("num_tokens"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip
    if not (args.functions or args.operators):  # profilers cost time themselves
        save(args.out, result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the parts as Markdown."""
    lines = [f"{result['config']}: {result['steps']} steps", "",
             "| part | calls | seconds | share | ms a step | processor seconds |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in result["parts"]:
        lines.append(
            f"| {row['part']} | {row['calls']} | {row['seconds']:.2f} | {100 * row['share']:.1f} % "
            f"| {row['ms_a_step']:.1f} | {row['cpu_seconds']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
