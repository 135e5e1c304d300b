"""Choose which transcripts the report shows: as many as fit, by a fixed rule, failures among them.

Files of rows may be larger than memory: each is indexed once, and the rows that are shown are read
by their place. Ids are hashes, so taking prompts by id is taking them at random.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question
from chainforge.core.run_dir import StageDir
from chainforge.core.transcript import PRESETS, read

SAMPLES = 4  # of one prompt and one stage
GROUPS = 6  # of rollouts, from the start and from the end of each RL stage
LONGEST = 4000  # characters of one text before its middle is left out
MARKUP = 420  # bytes that the page needs around each text
# Bytes of the page for each kind of prompt; with everything else it stays well under 5 MB.
HELD_OUT, DATA, ROLLOUTS = "held-out problems", "data stages", "rollouts"
BUDGET = {HELD_OUT: 1_200_000, DATA: 700_000, ROLLOUTS: 500_000}
# Held-out prompts, by how two models did; together they show gains and losses.
KINDS = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong before and after",
    (True, True): "right before and after",
}
VERDICTS = {
    "right": "right",
    "wrong": "wrong",
    "form": "right, wrong form",
    "unknown": "not judged",
}
# Characters that turn the direction of the text around them are shown, not obeyed.
TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
T = TypeVar("T")
Options = list[tuple[str, str]]  # value and label


@dataclass(frozen=True, slots=True)
class Entry:
    """What must be known of a row to choose it; `place` is the byte in its file at which it starts.

    `fate` is `kept`, `dropped: <reason>`, or empty where nothing has been decided.
    """

    place: int
    id: str
    model: str
    sample: int
    correct: bool | None
    task: str
    source: str
    fate: str
    step: int


@dataclass(frozen=True)
class Text:
    """One completion as the page shows it; `stage` wrote it, `label` tells it from others."""

    label: str
    stage: str
    reasoning: str  # empty when the text is not a transcript; then `answer` is all of it
    answer: str
    verdict: str  # right | wrong | form | unknown | none
    fate: str
    note: str


@dataclass(frozen=True)
class Case:
    """One prompt and what was written for it."""

    where: str
    kind: str
    question: str
    gold: str
    task: str
    texts: list[Text]

    @property
    def size(self) -> int:
        """Return about how many bytes of the page it takes."""
        texts = [self.question + self.gold, *(text.reasoning + text.answer for text in self.texts)]
        return sum(MARKUP + len(text.encode("utf-8", "replace")) for text in [*texts, ""])


# Reading rows -------------------------------------------------------------------------------------


def index(path: Path) -> list[Entry]:
    """Return what is in a file of Samples. A file that has not changed is not read again."""
    if not path.is_file():
        return []
    state = path.stat()
    return _index(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _index(path: Path, *state: int) -> list[Entry]:
    entries, place = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip() and (row := _row(path, place, line)) and "completion" in row:
                entries.append(_entry(place, row))
            place += len(line)
    return entries


def _row(path: Path, place: int, line: bytes) -> Row | None:
    """Read a line; None for a last one that is being written."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if line.endswith(b"\n"):
            raise InputError(f"{path}: the line at byte {place} is not JSON: {error}") from None
        return None
    if not isinstance(row, dict):
        raise InputError(f"{path}: the line at byte {place} is not a JSON object")
    return row


def _entry(place: int, row: Row) -> Entry:
    verdict = row.get("correct")
    return Entry(
        place=place,
        id=str(row.get("id", "")),
        model=str(row.get("model", "")),
        sample=int(finite(row.get("sample")) or 0),
        correct=None if verdict is None else bool(verdict),
        task=str(row.get("task", "")),
        source=str(row.get("source") or "not recorded"),
        fate=_fate(row),
        step=int(finite(row.get("step")) or 0),
    )


def _fate(row: Row) -> str:
    return f"dropped: {row['drop']}" if row.get("drop") else "kept" if "drop" in row else ""


def finite(value: Any) -> float | None:
    """Return a value as a number where it is one, and finite."""
    if not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def fetch(path: Path, entries: Iterable[Entry]) -> list[tuple[Entry, Row]]:
    """Read the rows of some entries, in their order.

    A row that is no longer at its place, because a stage is writing the file, is left out.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for entry in entries:
                file.seek(entry.place)
                try:
                    row = json.loads(file.readline())
                except ValueError:
                    continue
                if isinstance(row, dict) and _entry(entry.place, row) == entry:
                    rows.append((entry, row))
    except FileNotFoundError:
        return []
    return rows


def sources(path: Path) -> list[dict[str, Any]]:
    """Count who wrote the rows: `{"source", "rows", "kept"}`, most rows first."""
    counts: dict[str, dict[str, Any]] = {}
    for entry in index(path):
        mine = counts.setdefault(entry.source, {"source": entry.source, "rows": 0, "kept": 0})
        mine["rows"] += 1
        mine["kept"] += not entry.fate.startswith("dropped")
    return sorted(counts.values(), key=lambda one: -one["rows"])


# Choosing prompts ---------------------------------------------------------------------------------


def cases_of(
    stages: Sequence[StageDir], results: StageDir | None, before: str, after: str
) -> tuple[list[Case], dict[str, int]]:
    """Return the prompts that the report shows, and how many held-out ones there are by kind."""
    cases: list[Case] = []
    kinds: dict[str, int] = {}
    if results is not None and results.results:
        models = [str(model["name"]) for model in results.results["models"]]
        cases, kinds = held_out(results.samples, models, before, after, BUDGET[HELD_OUT])
    data = [(s.name, s.samples) for s in stages if not s.results and s.recipe != "evaluate"]
    cases += of_data([(name, path) for name, path in data if path.is_file()], BUDGET[DATA])
    rolled = [(stage.name, stage.directory / "rollouts.jsonl") for stage in stages]
    rolled = [(name, path) for name, path in rolled if path.is_file()]
    for name, path in rolled:
        cases += of_rollouts(name, path, BUDGET[ROLLOUTS] // len(rolled))
    return cases, kinds


def held_out(
    path: Path, models: Sequence[str], before: str, after: str, budget: int
) -> tuple[list[Case], dict[str, int]]:
    """Show all models on held-out prompts, each kind in turn; also count the prompts of each kind.

    `budget` is in bytes of the page.
    """
    first: dict[str, dict[str, Entry]] = {name: {} for name in models}
    for entry in index(path):  # each model's first sample of each prompt
        mine = first.get(entry.model, {})
        if entry.id not in mine or entry.sample < mine[entry.id].sample:
            mine[entry.id] = entry
    was, now = first.get(before, {}), first.get(after, {})
    words = KINDS if before != after else {(False, False): "wrong", (True, True): "right"}
    kinds = {
        key: words[bool(was[key].correct), bool(now[key].correct)]
        for key in sorted(was.keys() & now.keys())
    }

    def show(key: str) -> Case | None:
        rows = fetch(path, [mine[key] for mine in first.values() if key in mine])
        texts = [_text(row, entry.model, entry.model) for entry, row in rows]
        return _case(HELD_OUT, kinds[key], rows[-1][1], texts) if rows else None

    in_turns = _turns(kinds, lambda key: kinds[key], lambda key: now[key].task)
    cases = list(_within(budget, filter(None, map(show, in_turns))))
    order = list(words.values())
    cases.sort(key=lambda case: order.index(case.kind))  # stable: within a kind by turns
    counts = {word: list(kinds.values()).count(word) for word in order}
    return cases, counts if kinds else {}


def of_data(stages: Sequence[tuple[str, Path]], budget: int) -> list[Case]:
    """Show prompts with all that data stages wrote for them; each stage and fate has its turn."""
    written: dict[str, list[tuple[str, Entry]]] = {}
    for stage, path in stages:
        for entry in sorted(index(path), key=lambda entry: (entry.id, entry.sample)):
            written.setdefault(entry.id, []).append((stage, entry))
    seen = {(key, stage, e.fate, e.task) for key, mine in written.items() for stage, e in mine}
    wanted: dict[str, tuple[str, str]] = {}
    for key, stage, fate, _ in _turns(sorted(seen), lambda s: f"{s[1]}\0{s[2]}", lambda s: s[3]):
        wanted.setdefault(key, (stage, fate))

    def show(key: str) -> Case | None:
        texts: list[Text] = []
        row: Row = {}
        for stage, path in stages:
            mine = [entry for name, entry in written[key] if name == stage]
            # What the prompt is shown for comes first, so that it is not left out.
            mine.sort(key=lambda entry: (stage, entry.fate) != wanted[key])
            for entry, row in fetch(path, mine[:SAMPLES]):
                label = stage if len(mine) == 1 else f"{stage}, sample {entry.sample + 1}"
                texts.append(_text(row, label, stage))
        return _case(DATA, "", row, texts) if texts else None

    return list(_within(budget, filter(None, map(show, wanted))))


def of_rollouts(stage: str, path: Path, budget: int) -> list[Case]:
    """Show groups of completions that RL scored against one another, early ones and late ones."""
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in index(path):
        groups.setdefault((entry.step, entry.id), []).append(entry)
    whole = max(map(len, groups.values()), default=0)
    keys = [key for key, group in sorted(groups.items()) if len(group) == whole]  # none is torn
    early = [key for key in keys if key[0] == keys[0][0]]
    late = [key for key in keys if key[0] == keys[-1][0] and key[0] != keys[0][0]]
    chosen = [key for pair in zip_longest(early[:GROUPS], late[:GROUPS]) for key in pair if key]

    def show(key: tuple[int, str]) -> Case | None:
        rows = fetch(path, groups[key])
        texts = [_text(row, f"{stage}, step {key[0]}", stage) for _, row in rows]
        return _case(ROLLOUTS, f"step {key[0]}", rows[0][1], texts) if rows else None

    shown = _within(budget, filter(None, map(show, chosen)))
    return sorted(shown, key=lambda case: int(case.kind[5:]))


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


def filters_of(cases: Sequence[Case], stages: Sequence[str]) -> list[tuple[str, str, Options]]:
    """Return each filter's name, label and options; a filter with one option only is left out."""
    texts = [text for case in cases for text in case.texts]
    names = {text.stage for text in texts}
    order = [*sorted(names - set(stages)), *(name for name in stages if name in names)]
    verdicts = {text.verdict for text in texts}
    fates = sorted({text.fate for text in texts} - {""}, key=lambda fate: (fate != "kept", fate))
    if sum(fate.startswith("dropped") for fate in fates) > 1:
        fates.insert(int(fates[0] == "kept"), "dropped")
    kinds = dict.fromkeys(case.kind for case in cases if case.where == HELD_OUT)
    wheres = dict.fromkeys(case.where for case in cases)
    tasks = sorted({case.task for case in cases} - {""})
    found: list[tuple[str, str, Options]] = [
        ("where", "prompts", [(where, where) for where in wheres]),
        ("stage", "stage", [(name, name) for name in order]),
        ("verdict", "verdict", [(v, word) for v, word in VERDICTS.items() if v in verdicts]),
        ("fate", "kept or dropped", [(f, "dropped, any reason" if f == "dropped" else f)
                                     for f in fates]),
        ("kind", "change", [(kind, kind) for kind in kinds]),
        ("task", "task", [(task, task) for task in tasks]),
    ]  # fmt: skip
    return [entry for entry in found if len(entry[2]) > 1 or entry[0] in ("where", "stage")]


# Texts as they are shown --------------------------------------------------------------------------


def _case(where: str, kind: str, row: Row, texts: list[Text]) -> Case:
    try:
        asked = str(question(row))
    except (KeyError, TypeError, AttributeError):  # a prompt that is not a list of messages
        asked = str(row.get("prompt", ""))
    gold = _shorten(str(row.get("answer") or ""))
    return Case(where, kind, _shorten(asked), gold, str(row.get("task", "")), texts)


def _text(row: Row, label: str, stage: str) -> Text:
    completion = str(row.get("completion") or "")
    transcript = next((t for preset in PRESETS if (t := read(completion, preset))), None)
    reward = finite(row.get("reward"))
    notes = {
        f"{row.get('tokens')} tokens": row.get("tokens") is not None,
        f"reward {reward or 0:.3g}": reward is not None,
        "cut at the length limit": row.get("finish_reason") == "length",
        "not in the transcript form": transcript is None,
        f"by {row.get('source')}": row.get("source") not in (None, "policy"),
    }
    verdict = "none" if "correct" not in row else "unknown" if row["correct"] is None else (
        "right" if row["correct"] else "form" if row.get("lenient_correct") else "wrong"
    )  # fmt: skip
    return Text(
        label=label,
        stage=stage,
        reasoning=_shorten(transcript.reasoning) if transcript else "",
        answer=_shorten(transcript.answer if transcript else completion),
        verdict=verdict,
        fate=_fate(row),
        note=", ".join(note for note, holds in notes.items() if holds),
    )


def brief(text: str, most: int = 110) -> str:
    """Put a text on one short line: its start and its end, since prompts of a task start alike."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    head, tail = line[: most // 2 - 2], line[2 - most // 2 :]
    # Whole words, where there are any.
    head, tail = head.rpartition(" ")[0] or head, tail.partition(" ")[2] or tail
    return f"{head} … {tail}"


def _shorten(text: str) -> str:
    """Leave out the middle of a long text, and show control characters as a replacement mark."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c > "\x9f" else "\ufffd" for c in text)
    clean = clean.translate(TURNS)
    if len(clean) <= LONGEST:
        return clean
    head, tail = LONGEST * 3 // 4, LONGEST // 4
    left_out = f"[… {len(clean) - head - tail:,} characters left out …]"
    return f"{clean[:head]}\n{left_out}\n{clean[-tail:]}"
