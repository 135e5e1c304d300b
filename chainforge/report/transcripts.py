"""Choose what the report shows of the rows: as many as fit, by a fixed rule, failures among them.

Ids are hashes, so that taking prompts by id is taking them at random, and nobody chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from chainforge.core.jsonl import Row
from chainforge.report.rows import Entry, fetch, index
from chainforge.report.texts import Case, Text, case_of, text_of

SAMPLES = 4  # of one prompt and one stage
GROUPS = 6  # of rollouts, from the start and from the end of each RL stage
WINDOW = 2 * 2**20  # bytes of rollouts that are read at each end
# Held-out prompts, by how `before` and `after` did; together they show gains and losses.
KINDS = {
    "won": "wrong before, right after",
    "lost": "right before, wrong after",
    "missed": "wrong before and after",
    "kept": "right before and after",
}
ALONE = {"missed": "wrong", "kept": "right"}  # where there is one model, and no before
HELD_OUT, DATA, ROLLOUTS = "held-out problems", "data stages", "rollouts"

T = TypeVar("T")


def first_samples(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    """Return each model's first sample per prompt id, models in the order of the file."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        mine = found.setdefault(entry.model, {})
        known = mine.get(entry.id)
        if known is None or entry.sample < known.sample:
            mine[entry.id] = entry
    return found


def held_out(
    path: Path, models: Sequence[str], before: str, after: str, budget: int
) -> tuple[list[Case], dict[str, int]]:
    """Show all models on held-out prompts, each kind in turn; also count the prompts of each kind.

    `budget` is in bytes of the page.
    """
    samples = first_samples(index(path))
    by_model = {name: samples[name] for name in models if name in samples}
    if before not in by_model or after not in by_model:
        return [], {}
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for key in sorted(by_model[before].keys() & by_model[after].keys()):
        was, now = (bool(by_model[name][key].correct) for name in (before, after))
        groups[("kept" if was else "won") if now else ("lost" if was else "missed")].append(key)
    tasks = {key: entry.task for key, entry in by_model[after].items()}
    kinds = {key: kind for kind, keys in groups.items() for key in keys}
    words = KINDS if before != after else ALONE
    fair = _turns(kinds, lambda key: kinds[key], lambda key: tasks[key])

    def show(key: str) -> Case | None:
        rows = fetch(path, [mine[key] for mine in by_model.values() if key in mine])
        texts = [text_of(row, entry.model, entry.model) for entry, row in rows]
        return case_of(HELD_OUT, words[kinds[key]], rows[-1][1], texts) if rows else None

    cases = list(_within(budget, filter(None, map(show, fair))))
    order = list(words.values())
    cases.sort(key=lambda case: order.index(case.kind))  # stable: within a kind by turns
    return cases, {words[kind]: len(keys) for kind, keys in groups.items() if kind in words}


def of_data(stages: Sequence[tuple[str, Path]], budget: int) -> list[Case]:
    """Show prompts with all that data stages wrote for them; each stage and fate has its turn."""
    written: dict[str, list[tuple[str, Path, Entry]]] = {}
    for stage, path in stages:
        for entry in sorted(index(path), key=lambda entry: (entry.id, entry.sample)):
            written.setdefault(entry.id, []).append((stage, path, entry))
    seen = {(key, stage, e.fate, e.task) for key, mine in written.items() for stage, _, e in mine}
    wanted: dict[str, tuple[str, str]] = {}
    for key, stage, fate, _ in _turns(sorted(seen), lambda s: f"{s[1]}\0{s[2]}", lambda s: s[3]):
        wanted.setdefault(key, (stage, fate))

    def show(key: str) -> Case | None:
        texts: list[Text] = []
        row: Row = {}
        for stage, path in stages:
            mine = [entry for name, _, entry in written[key] if name == stage]
            # What the prompt is shown for comes first, lest it be left out.
            mine.sort(key=lambda entry: (stage, entry.fate) != wanted[key])
            for entry, row in fetch(path, mine[:SAMPLES]):
                label = stage if len(mine) == 1 else f"{stage}, sample {entry.sample + 1}"
                texts.append(text_of(row, label, stage))
        return case_of(DATA, "", row, texts) if texts else None

    return list(_within(budget, filter(None, map(show, wanted))))


def of_rollouts(stage: str, path: Path, budget: int) -> list[Case]:
    """Show groups of completions that RL scored against one another, early ones and late ones."""
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in index(path, WINDOW):
        groups.setdefault((entry.step, entry.id), []).append(entry)
    whole = max(map(len, groups.values()), default=0)
    keys = [key for key, group in sorted(groups.items()) if len(group) == whole]  # none cut
    early = [key for key in keys if key[0] == keys[0][0]]
    late = [key for key in keys if key[0] == keys[-1][0] and key[0] != keys[0][0]]
    chosen = [key for pair in zip_longest(early[:GROUPS], late[:GROUPS]) for key in pair if key]

    def show(key: tuple[int, str]) -> Case | None:
        rows = fetch(path, groups[key])
        texts = [text_of(row, f"{stage}, step {key[0]}", stage) for _, row in rows]
        return case_of(ROLLOUTS, f"step {key[0]}", rows[0][1], texts) if rows else None

    shown = _within(budget, filter(None, map(show, chosen)))
    return sorted(shown, key=lambda case: int(case.kind[5:]))


def sources(path: Path) -> list[dict[str, Any]]:
    """Count who wrote the rows: `{"source", "rows", "kept"}`, most rows first."""
    counts: dict[str, dict[str, Any]] = {}
    for entry in index(path):
        mine = counts.setdefault(entry.source, {"source": entry.source, "rows": 0, "kept": 0})
        mine["rows"] += 1
        mine["kept"] += not entry.fate.startswith("dropped")
    return sorted(counts.values(), key=lambda one: -one["rows"])


def _within(budget: int, cases: Iterator[Case]) -> Iterator[Case]:
    """Yield the cases that fit into so many bytes, and at least one."""
    spent = 0
    for case in cases:
        spent += case.size
        if spent > budget and spent > case.size:
            return
        yield case


def _turns(items: Iterable[T], *kinds: Callable[[T], str]) -> list[T]:
    """Return the items so that their kinds take turns, and within each the next sort of kinds."""
    if not kinds:
        return list(items)
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(kinds[0](item), []).append(item)
    parts = [_turns(groups[name], *kinds[1:]) for name in sorted(groups)]
    return [item for turn in zip_longest(*parts) for item in turn if item is not None]
