"""What evaluations measured of a finished stage, and of those before it, as a card shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import Manifest
from chainforge.data.datasheet import code
from chainforge.train.lineage import Ancestor, signed_json, stages_in

RESULTS = "results.json"
NAMED_TASKS = 6  # of more tasks only the number is said


@dataclass(frozen=True)
class Measurement:
    """An evaluation of a model: its name, what it calls the model, and what it found.

    `rows` are those of the model and of what it was made from, as they stand in the results.
    """

    name: str
    own: frozenset[str]
    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """The numbers of the model itself."""
        return next(row for row in self.rows if row["name"] in self.own)


def measurements(stages: Sequence[Ancestor]) -> list[Measurement]:
    """Return the evaluations, of this run or beside it, that measured the last of some stages.

    Which model was measured is known by its fingerprint, whatever it was called. One that was
    measured before the stage was last made is another one.
    """
    stage = stages[-1]
    origins = [origin.fingerprint for one in stages for origin in one.took.values()]
    known = {one.manifest.fingerprint for one in stages} | set(origins)
    found = []
    for directory, manifest in _evaluations(stage.directory):
        prints = {
            role.removeprefix("models."): fingerprint
            for role, fingerprint in manifest.inputs.items()
            if role.startswith("models.")
        }
        own = {name for name, print in prints.items() if print == stage.manifest.fingerprint}
        if not own or manifest.finished < stage.manifest.finished:
            continue
        results = signed_json(directory, manifest, RESULTS)
        if results is None:
            continue
        rows = [row for row in results["models"] if prints.get(row["name"]) in known]
        pairs = [pair for pair in results["pairs"] if own & {pair["from"], pair["to"]}]
        settings = results.get("settings") or {}
        found.append(Measurement(directory.name, frozenset(own), rows, pairs, settings))
    return found


def _evaluations(stage: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield the evaluations beside a stage, and those beside its run."""
    for folder in (stage.parent, stage.parent.parent):
        for directory, manifest in stages_in(folder):
            if RESULTS in manifest.outputs:
                yield directory, manifest


def results(stages: Sequence[Ancestor]) -> list[str]:
    """Show what was measured of the last of some stages, or say that nothing was."""
    parts = []
    for found in measurements(stages):
        lines = [
            "| model | strict % | lenient % | well formed % | tokens an answer |",
            "|---|--:|--:|--:|--:|",
            *(_row(row, row["name"] in found.own) for row in found.rows),
        ]
        parts += [_asked(found), "\n".join(lines), _of_several(found), _by_task(found)]
        parts.append("\n".join(_difference(pair) for pair in found.pairs))
    return parts or ["Nothing was measured: no evaluation in this run, or beside it, names it."]


def _asked(found: Measurement) -> str:
    """Return what an evaluation asked, how answers were sampled, and what the intervals are."""
    row = found.row
    tasks = [f"`{code(task)}`" for task in row.get("tasks") or ()]
    named = ", ".join(tasks) if len(tasks) <= NAMED_TASKS else f"{len(tasks)} tasks"
    of = f" of {named}" if named else ""
    sampling = found.settings.get("sampling") or {}
    words = [f"{key} {sampling[key]}" for key in ("temperature", "top_p") if sampling.get(key)]
    if sampling.get("max_new_tokens"):
        words.append(f"at most {sampling['max_new_tokens']:,} tokens")
    how = f", sampled with {', '.join(words)}" if words else ""
    return (
        f"Evaluation `{code(found.name)}`: {row['n']:,} held-out rows{of}{how}. Strict: right and "
        "in the form; lenient: right in any form; with 95 % Wilson intervals."
    )


def _row(row: Mapping[str, Any], own: bool) -> str:
    name = f"`{code(row['name'])}`"
    return (
        f"| {f'**{name}**' if own else name} | {_interval(row['strict'])} "
        f"| {_interval(row['lenient'])} | {100 * row['format']:.1f} "
        f"| {'-' if row['tokens_mean'] is None else format(row['tokens_mean'], '.1f')} |"
    )


def _of_several(found: Measurement) -> str:
    """Return what several samples of each row come to, where there are several."""
    row = found.row
    most = str(row.get("samples_per_prompt", 1))
    if most == "1" or most not in row["pass_at_k"]:
        return ""
    one, several = 100 * row["pass_at_k"][most], 100 * row["maj_at_k"][most]
    return (
        f"Of {most} samples for each row at least one is right for {one:.1f} % (pass@{most}), and "
        f"the most frequent answer for {several:.1f} % (maj@{most})."
    )


def _by_task(found: Measurement) -> str:
    """Show the model's own accuracy on each task, where there are several."""
    row = found.row
    tasks = row.get("tasks") or {}
    if len(tasks) < 2:
        return ""
    lines = [
        f"| task of `{code(row['name'])}` | rows | strict % | lenient % |",
        "|---|--:|--:|--:|",
    ]
    for title, task in tasks.items():
        strict, lenient = _interval(task["strict"]), _interval(task["lenient"])
        lines.append(f"| `{code(title)}` | {task['n']:,} | {strict} | {lenient} |")
    return "\n".join(lines)


def _interval(share: Mapping[str, float]) -> str:
    mean, low, high = (100 * share[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _difference(pair: Mapping[str, Any]) -> str:
    points, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
    chance = "< 0.0001" if pair["p"] < 0.0001 else f"= {pair['p']:.2g}"
    return (
        f"- `{code(pair['from'])}` to `{code(pair['to'])}`, on the same rows: {points:+.1f} points "
        f"of strict accuracy ({low:+.1f} to {high:+.1f}), McNemar's p {chance}"
    )
