"""Compare several models, such as those of a chain's stages, on the same held-out rows.

    python recipes/evaluate.py --config recipes/evals/gsm8k.yaml --output_dir eval \
        --models base=recipes/quickstart/base cold_start=runs/quickstart/cold_start/model

Leaves `results.json` (accuracy strict and lenient with Wilson intervals, format, language, lengths,
pass@k, maj@k, all of them by task too, what McNemar's test and a paired bootstrap say of each two
models, and how it was sampled) and every scored sample. Of prompts without answers it measures
format, language, lengths and `rewards`. `recipes/evals` holds configurations for published
benchmarks. `chainforge merge` joins the results of several seeds.
"""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from chainforge.core import artifacts, process
from chainforge.core.config import parse
from chainforge.core.errors import InputError, hint
from chainforge.core.paths import unplaced
from chainforge.core.transcript import tags_of
from chainforge.data.metrics import summarize
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate import shards
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import open_engine, roll_out
from chainforge.generate.settings import RunArgs, SamplingArgs, check_prompts
from chainforge.report.formatting import show_results
from chainforge.rewards.functions import scripts_of
from chainforge.rewards.reward import RewardArgs, check_bound, load_rewards
from chainforge.train.model_source import check_model
from chainforge.train.stage import is_main_process, open_stage
from chainforge.train.templates import load_tokenizer


@dataclass
class EvaluateArgs(RewardArgs):
    """Which models are compared, in which pairs, and by which rewards beside accuracy."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "name=path_or_hub_id of each model, in order."}
    )
    pairs: list[str] = field(
        default_factory=list,
        metadata={"help": "first:second of each comparison; each model with the next if left out."},
    )
    rewards: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Rewards to measure, such as a judge or a reward model; as in grpo.py."},
    )
    language: str = field(
        default="en", metadata={"help": "The language that the reasoning should be in."}
    )


def named(models: list[str]) -> dict[str, str]:
    """Read `name=path` pairs."""
    found: dict[str, str] = {}
    for word in models:
        name, equals, path = word.partition("=")
        if not equals or not name or name in found:
            raise InputError(f"models: expected distinct name=path pairs, found {word!r}")
        found[name] = check_model(path)
    if not found:
        raise InputError("models: none given; for instance --models base=PATH cold_start=PATH")
    return found


def paired(pairs: list[str], models: dict[str, str]) -> list[tuple[str, str]] | None:
    """Read `first:second` pairs of model names; raise `InputError` for an unknown one."""
    found = []
    for word in pairs:
        first, _, second = word.partition(":")
        for name in (first, second):
            if name not in models:
                raise InputError(f"pairs: {word!r}: no model {name!r}; {hint(name, models)}")
        found.append((first, second))
    return found or None


def settings(
    run: RunArgs, tasks: TaskArgs, args: EvaluateArgs, sampling: SamplingArgs
) -> dict[str, Any]:
    """Return the settings that the numbers depend on, for results.json."""
    asked = tasks.system_prompt
    if asked is None:
        asked = tags_of(args.transcript).system_prompt
    return {
        "sampling": sampling.parameters() | {"num_samples": sampling.num_samples},
        "extra_body": sampling.extra_body,
        "engine_options": sampling.engine_options,
        "seed": run.seed,
        "dtype": run.dtype,
        "tasks": unplaced(tasks.tasks),
        "transcript": args.transcript,
        "system_prompt": asked,
        "language": args.language,
    } | ({"rewards": unplaced(args.rewards)} if args.rewards else {})


CONFIGS = (RunArgs, TaskArgs, EvaluateArgs, SamplingArgs)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows and tokenizers; return what was loaded. No weights are read."""
    run, tasks, args, sampling = configs
    models = named(args.models)
    pairs = paired(args.pairs, models)
    scripts_of(args.language)
    if sampling.adaptive:
        raise InputError("max_samples: every model is measured on `num_samples` of each prompt")
    if sampling.served_model and len(models) > 1:
        raise InputError("served_model: names one model, and `models` several; evaluate each alone")
    sampling.check()
    rows = load_examples(tasks, args.transcript, run.seed)
    rewards = load_rewards(args, set().union(*rows)) if args.rewards else []
    check_bound(rewards, rows)
    tokenizers = {}
    for name, path in models.items():
        tokenizers[name] = load_tokenizer(path, args.transcript, rows=rows,
                                          template=sampling.chat_template_path,
                                          template_options=sampling.chat_template_kwargs,
                                          served=sampling.engine == "api")  # fmt: skip
        check_prompts(tokenizers[name], rows, path, sampling.max_new_tokens, "max_new_tokens")
    return SimpleNamespace(models=models, pairs=pairs, rows=rows, tokenizers=tokenizers,
                           rewards=rewards, transcript=args.transcript)  # fmt: skip


def main() -> None:
    run, tasks, args, sampling = configs = parse(*CONFIGS)
    ready = preflight(configs)
    models = ready.models
    inputs = {f"models.{name}": path for name, path in models.items()}
    with open_stage(
        "evaluate", run.output_dir, *configs, inputs=inputs, seed=run.seed, shared=True
    ) as stage:
        scored = {}
        for number, (name, path) in enumerate(models.items()):
            scored[name] = roll_out(
                partial(
                    open_engine,
                    sampling,
                    path,
                    ready.tokenizers[name],
                    dtype=run.dtype,
                    directory=stage.directory,
                ),
                ready.rows,
                sampling,
                path=stage.path("samples.jsonl"),
                seed=run.seed,
                provenance={"model": name, "stage": stage.directory.name},
                score=partial(
                    score_samples,
                    transcript=args.transcript,
                    rewards=ready.rewards,
                    tokenizer=ready.tokenizers[name],
                ),
                progress=lambda done, total, unit, note, number=number, name=name: stage.progress(
                    number * total + done, len(models) * total, unit, f"{name}: {note}"
                ),
            ).samples
        if not is_main_process():
            return
        if shards.shards_of(stage.path("samples.jsonl")):
            shards.merge(stage.path("samples.jsonl"), (row for s in scored.values() for row in s))
        results = summarize(scored, ready.pairs, run.seed, args.language, args.transcript)
        results["settings"] = settings(run, tasks, args, sampling)
        artifacts.write_json(stage.path("results.json"), results)
        stage.metrics |= {m["name"]: m["strict"]["mean"] for m in results["models"] if m["strict"]}
        show_results(results, Console())


if __name__ == "__main__":
    process.run(main)
