"""Choose what the report shows of the rows: few, by a fixed rule, the failures among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from chainforge.core.records import Row, question
from chainforge.core.transcript import PRESETS, read

LONGEST = 3000  # characters of one text before its middle is left out
# How many prompts of each kind stand side by side; together they show gains and losses.
KINDS = {
    "won": ("wrong before, right after", 3),
    "lost": ("right before, wrong after", 2),
    "missed": ("wrong before and after", 2),
    "kept": ("right before and after", 1),
}


@dataclass(frozen=True)
class Text:
    """One completion as the page shows it."""

    label: str
    reasoning: str  # empty when the text is not a transcript; then `answer` is all of it
    answer: str
    verdict: str  # right | wrong | form | unknown | none
    note: str


@dataclass(frozen=True)
class Case:
    """One prompt and what was written for it."""

    kind: str
    question: str
    gold: str
    task: str
    texts: list[Text]


def side_by_side(
    by_model: dict[str, dict[str, Row]], before: str, after: str
) -> tuple[list[Case], dict[str, int]]:
    """Choose held-out prompts and show all models on each; also count the prompts of each kind.

    `by_model` maps a model to its first sample per prompt id. The kinds compare `before` with
    `after`; within a kind, tasks take turns and prompts come by id, which is a hash: nobody chose.
    """
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for key in sorted(by_model[before].keys() & by_model[after].keys()):
        was, now = (bool(by_model[name][key].get("correct")) for name in (before, after))
        kind = ("kept" if was else "won") if now else ("lost" if was else "missed")
        groups[kind].append(key)
    cases = []
    for kind, (words, most) in KINDS.items():
        for key in _turns(groups[kind], lambda key: by_model[after][key].get("task"))[:most]:
            rows = {name: rows[key] for name, rows in by_model.items() if key in rows}
            texts = [_text(name, row) for name, row in rows.items()]
            cases.append(_case(words, by_model[after][key], texts))
    return cases, {KINDS[kind][0]: len(keys) for kind, keys in groups.items()}


def first_samples(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Return each model's first sample per prompt id, models in the order of the file."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        mine = found.setdefault(str(row.get("model", "")), {})
        known = mine.get(str(row.get("id")))
        if known is None or (row.get("sample") or 0) < (known.get("sample") or 0):
            mine[str(row.get("id"))] = row
    return found


def kept_and_dropped(rows: Sequence[Row], kept: int = 3, each: int = 1) -> list[Case]:
    """Show some kept rows of a data stage and, for every reason, some that were dropped."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["drop"]) if row.get("drop") else "", []).append(row)
    cases = []
    for reason in sorted(groups):
        turns = _turns(groups[reason], lambda row: row.get("task"))
        for row in turns[: each if reason else kept]:
            word = f"dropped: {reason}" if reason else "kept"
            cases.append(_case(word, row, [_text(str(row.get("source") or ""), row)]))
    return cases


def sources(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Count who wrote the rows: `{"source", "rows", "kept"}`, most rows first."""
    written: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for row in rows:
        source = str(row.get("source") or "not recorded")
        written[source] += 1
        kept[source] += not row.get("drop")
    return [
        {"source": source, "rows": count, "kept": kept[source]}
        for source, count in written.most_common()
    ]


def _turns(items: Sequence[Any], task: Any) -> list[Any]:
    """Return the items so that tasks take turns."""
    by_task: dict[str, list[Any]] = {}
    for item in items:
        by_task.setdefault(str(task(item)), []).append(item)
    rounds = zip_longest(*(by_task[name] for name in sorted(by_task)))
    return [item for turn in rounds for item in turn if item is not None]


def _case(kind: str, row: Row, texts: list[Text]) -> Case:
    asked = question(row) if isinstance(row.get("prompt"), list) else str(row.get("prompt", ""))
    return Case(kind, _shorten(asked), str(row.get("answer", "")), str(row.get("task", "")), texts)


def _text(label: str, row: Row) -> Text:
    completion = str(row.get("completion") or "")
    transcript = next((t for preset in PRESETS if (t := read(completion, preset))), None)
    notes = []
    if row.get("tokens") is not None:
        notes.append(f"{row['tokens']} tokens")
    if row.get("reward") is not None:
        notes.append(f"reward {row['reward']:.3g}")
    if row.get("finish_reason") == "length":
        notes.append("cut at the length limit")
    if transcript is None:
        notes.append("not in the transcript form")
    return Text(
        label=label,
        reasoning=_shorten(transcript.reasoning) if transcript else "",
        answer=_shorten(transcript.answer if transcript else completion),
        verdict=_verdict(row),
        note=", ".join(notes),
    )


def _verdict(row: Row) -> str:
    if "correct" not in row:
        return "none"
    if row["correct"] is None:
        return "unknown"
    if row["correct"]:
        return "right"
    return "form" if row.get("lenient_correct") else "wrong"


def _shorten(text: str) -> str:
    """Leave out the middle of a long text, and show control characters as a replacement mark."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c > "\x9f" else "\ufffd" for c in text)
    if len(clean) <= LONGEST:
        return clean
    head, tail = LONGEST * 3 // 4, LONGEST // 4
    left_out = f"[… {len(clean) - head - tail:,} characters left out …]"
    return f"{clean[:head]}\n{left_out}\n{clean[-tail:]}"
