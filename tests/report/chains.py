"""Chains as stages leave them on disk, made by hand, and text that means no good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainforge.core.artifacts import Manifest, write_json
from chainforge.core.jsonl import JsonLines, Row
from chainforge.core.transcript import write
from chainforge.data.metrics import summarize
from chainforge.data.sources import example
from chainforge.generate.sampling import sample

# Each of these would set `hacked` if the page took it for more than text.
HOSTILE = (
    "<script>top.hacked=1</script></script></textarea></style></title></template></noscript>"
    "<img src=x onerror=top.hacked=2>{{ 7 * 7 }}{% raw %}&lt;b&gt;&#60;script&#62;"
    "<a href=\"javascript:top.hacked=3\" onclick='top.hacked=4'>x</a><base href=//example.invalid>"
    '"\' autofocus onfocus="top.hacked=5" onmouseover="top.hacked=5" style="position:fixed'
    "<svg/onload=top.hacked=6><math><mtext></form><!-- ]]><![CDATA[</bdi></div></details>"
    "<iframe srcdoc='<script>top.hacked=7</script>'></iframe><meta http-equiv=refresh content=0>"
    "\uff1cscript\uff1etop.hacked=8\uff1c/script\uff1e\u2028\u2029\ufeff"
)


SETTINGS: dict[str, Any] = {
    "sampling": {"engine": "transformers", "temperature": 0.7, "top_p": 0.9, "top_k": 0,
                 "max_new_tokens": 2048, "num_samples": 2},
    "seed": 7,
    "dtype": "bfloat16",
    "tasks": [{"fn": "hub", "params": {"dataset": "gsm8k"}, "split": "test"}],
    "transcript": "r1-cold_start-start",
    "system_prompt": "Think before you speak.",
    "language": "en",
}  # fmt: skip


def sign(directory: Path, recipe: str, finished: str = "2026-01-01T00:00:00Z", **more: Any) -> None:
    values: dict[str, Any] = {"recipe": recipe, "fingerprint": "ab" * 32, "finished": finished}
    values |= {"given": {"learning_rate": 1e-4}, "inputs": {"model": "cd" * 32}, "outputs": {}}
    values |= {"config": {}, "metrics": {}, "versions": {"trl": "1.16.0"}, "seconds": 61.2}
    values |= {"device": "cpu (2 cores)", "seed": 7}
    write_json(directory / "manifest.json", Manifest(**(values | more)).__dict__)


def rows(directory: Path, name: str, values: list[Row]) -> None:
    with JsonLines(directory / name) as file:
        file.extend(values)


def question(number: int, task: str = "sums", text: str = "") -> Row:
    prompt = [{"role": "user", "content": text or f"What is {number} + {number}?"}]
    return example(prompt, str(2 * number), task=task)


def answered(row: Row, model: str, right: bool, index: int = 0, **more: Any) -> Row:
    answer = row["answer"] if right else "wrong"
    values = {"model": model, "correct": right, "lenient_correct": right, "formatted": True}
    values |= {"tokens": 12, "finish_reason": "stop", "extracted": answer}
    text = write(f"{model} thinks", answer)
    return sample(row, text, index, source="policy", **(values | more))


def grpo(directory: Path, steps: int = 40) -> None:
    same = {"rewards/format_reward/mean": 1.0, "completions/clipped_ratio": 0.25, "entropy": 0.3}
    same |= {"frac_zero_advantage": 0.5, "loss": None}
    logged = [
        {
            "step": step,
            "reward": 0.5 + step / 100,
            "rewards/accuracy_reward/mean": 0.4 + step / 100,
            "completions/mean_length": 40.0 + step,
            "kl": 0.001 * step,
        }
        for step in range(1, steps + 1)
    ]
    rows(directory, "metrics.jsonl", [row | same for row in logged])


def evaluation(directory: Path, right: dict[str, int], n: int = 40) -> dict[str, list[Row]]:
    """Models that get the first so many of n questions right, two samples each."""
    models = {
        name: [
            answered(question(i, "sums" if i % 2 else "chains"), name, i < most, index)
            for i in range(n)
            for index in range(2)
        ]
        for name, most in right.items()
    }
    rows(directory, "samples.jsonl", [row for part in models.values() for row in part])
    write_json(directory / "results.json", summarize(models) | {"settings": SETTINGS})
    sign(directory, "evaluate", finished="2026-01-01T09:00:00Z")
    return models


def tiny(root: Path) -> Path:
    """A finished chain of five stages."""
    recipes = {"traces": "collect", "cold_start": "sft", "rl": "grpo", "rl_final": "grpo"}
    for hour, (name, recipe) in enumerate(recipes.items()):
        sign(root / name, recipe, finished=f"2026-01-01T0{hour}:00:00Z")
    traces = []
    for i in range(20):
        source, drop = "offline" if i % 4 else "some-teacher", None if i % 5 else "duplicate"
        text = write("add", str(2 * i))
        traces.append(sample(question(i), text, 0, source=source, drop=drop, reward=1.2))
    rows(root / "traces", "samples.jsonl", traces)
    write_json(root / "traces/funnel.json", {"in": 20, "kept": 16, "dropped": {"duplicate": 4}})
    losses = [{"step": i, "loss": 2 / i, "eval_loss": 3 / i} for i in range(1, 30)]
    rows(root / "cold_start", "metrics.jsonl", losses)
    (root / "cold_start/config.yaml").write_text("max_steps: 29\n")
    grpo(root / "rl")
    grpo(root / "rl_final")
    evaluation(root / "eval", {"base": 2, "cold_start": 10, "rl": 25, "rl_final": 34})
    stages = (recipes | {"eval": "evaluate"}).items()
    listed = [{"name": name, "recipe": recipe} for name, recipe in stages]
    write_json(root / "chain.json", {"name": "tiny chain", "stages": listed})
    return root


def hostile(root: Path) -> Path:
    """A chain whose every text, name and number that can be a text is `HOSTILE`."""
    row = question(1, task=HOSTILE, text=HOSTILE) | {"answer": HOSTILE}
    models = {}
    for name, right in (("cold_start", False), ("rl_final" + HOSTILE, True)):
        written = answered(row, name, right, extracted=HOSTILE)
        well_formed = HOSTILE + write(HOSTILE, HOSTILE) if right else write(HOSTILE, HOSTILE)
        models[name] = [written | {"completion": well_formed, "finish_reason": HOSTILE}]
    rows(root / "eval", "samples.jsonl", [row for part in models.values() for row in part])
    asked = dict.fromkeys(SETTINGS, HOSTILE) | {"tasks": [HOSTILE], "extra_body": {HOSTILE: 1}}
    asked["sampling"] = {"engine": HOSTILE}
    write_json(root / "eval" / "results.json", summarize(models) | {"settings": asked})
    sign(root / "eval", "evaluate", versions={HOSTILE: HOSTILE}, device=HOSTILE)
    dropped = sample(row, HOSTILE, 0, source=HOSTILE, drop=HOSTILE, reward=0.0)
    kept = sample(row, HOSTILE, 0, source="offline" + HOSTILE, drop=None)
    rows(root / "rejection", "samples.jsonl", [dropped, kept])
    write_json(root / "rejection" / "funnel.json", {"in": 2, "kept": 1, "dropped": {HOSTILE: 1}})
    (root / "rejection" / "config.yaml").write_text(f"key: {HOSTILE}\n")
    (root / "rejection" / "log.txt").write_text(f"{HOSTILE}\nfailed: {HOSTILE}\n")
    metrics = [{"step": i, "reward": i, f"rewards/{HOSTILE}/mean": i} for i in range(3)]
    rows(root / "rl_final", "metrics.jsonl", metrics)
    sign(root / "rl_final", HOSTILE, given={HOSTILE: HOSTILE}, inputs={HOSTILE: f"hub:{HOSTILE}"})
    stages = [
        {"name": "rejection", "recipe": HOSTILE, "state": HOSTILE, "note": HOSTILE},
        {"name": "broken", "recipe": "sft"},
        {"name": "gate", "recipe": "evaluate", "gate": {"metric": "accuracy", "min": 2},
         "inputs": {"models." + HOSTILE: HOSTILE}},
        {"name": "waits", "recipe": HOSTILE},
        {"name": "rl_final", "recipe": "grpo"},
        {"name": "eval", "recipe": "evaluate"},
    ]  # fmt: skip
    write_json(root / "chain.json", {"name": HOSTILE, "stages": stages})
    (root / "broken").mkdir()
    (root / "broken" / "log.txt").write_text(f"{HOSTILE}\nfailed: {HOSTILE}\n")
    written = [answered(question(1), HOSTILE, True)]
    write_json(root / "gate" / "results.json", summarize({HOSTILE: written}))
    sign(root / "gate", "evaluate")
    alarm = {"step": 1, "rule": HOSTILE, "action": HOSTILE, "seen": HOSTILE}
    rows(root / "rl_final", "health.jsonl", [alarm | {"means": HOSTILE, "change": f"`{HOSTILE}`"}])
    rolled = sample(row, HOSTILE, 0, source="policy", step=1, policy=HOSTILE, correct=False)
    rows(root / "rl_final", "rollouts.jsonl", [rolled])
    return root
