"""Choose which transcripts the report shows: as many as fit, by a fixed rule, failures among them.

Files of rows may be larger than memory: each is indexed once, and the rows that are shown are read
by their place. Ids are hashes, so taking prompts by id is taking them at random.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
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
Filter = tuple[str, str, list[tuple[str, str]]]  # name, label, options as value and label


class Entry(NamedTuple):
    """What must be known of a row to choose it; `place` is the byte in its file at which it starts.

    `fate` is `kept`, `dropped: <reason>`, or empty where nothing has been decided.
    """

    place: int
    id: str
    model: str
    sample: int
    correct: bool
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
        return sum(MARKUP + len(text.encode("utf-8", "replace")) for text in texts)


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
            if line.endswith(b"\n"):  # a last line without is being written
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise TypeError("not a JSON object")
                    if "completion" in row:
                        entries.append(_entry(place, row))
                except (ValueError, TypeError, RecursionError) as error:
                    raise InputError(f"{path}: the row at byte {place}: {error}") from None
            place += len(line)
    return entries


def _entry(place: int, row: Row) -> Entry:
    fate = f"dropped: {row['drop']}" if row.get("drop") else "kept" if "drop" in row else ""
    name, model, task = (str(row.get(key) or "") for key in ("id", "model", "task"))
    sample, step = (int(finite(row.get(key)) or 0) for key in ("sample", "step"))
    source, correct = str(row.get("source") or "not recorded"), bool(row.get("correct"))
    return Entry(place, name, model, sample, correct, task, source, fate, step)


def finite(value: Any) -> float | None:
    """Return a value as a number where it is one, and finite."""
    if not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def fetch(path: Path, entries: Iterable[Entry]) -> list[tuple[Entry, Row]]:
    """Read the rows of some entries, in their order.

    A row that is no longer at its place, because a stage replaced the file, is left out.
    """
    rows: list[tuple[Entry, Row]] = []
    if not path.is_file():
        return rows
    with open(path, "rb") as file:
        for entry in entries:
            file.seek(entry.place)
            try:
                row = json.loads(file.readline())
                if _entry(entry.place, row) == entry:
                    rows.append((entry, row))
            except (ValueError, TypeError, AttributeError):
                continue
    return rows


def sources(path: Path) -> list[dict[str, Any]]:
    """Count who wrote the rows: `{"source", "rows", "kept"}`, most rows first."""
    entries = index(path)
    written = Counter(entry.source for entry in entries)
    kept = Counter(entry.source for entry in entries if not entry.fate.startswith("dropped"))
    return [{"source": s, "rows": n, "kept": kept[s]} for s, n in written.most_common()]


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
    cases += of_data(data, BUDGET[DATA])
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
    for entry in sorted(index(path), key=lambda entry: entry.sample):
        first.get(entry.model, {}).setdefault(entry.id, entry)
    was, now = first.get(before, {}), first.get(after, {})
    words = KINDS if before != after else {(False, False): "wrong", (True, True): "right"}
    both = sorted(was.keys() & now.keys())
    kinds = {key: words[was[key].correct, now[key].correct] for key in both}

    def show(key: str) -> Case | None:
        rows = fetch(path, [mine[key] for mine in first.values() if key in mine])
        return _case(HELD_OUT, kinds[key], [(entry.model, entry.model, row) for entry, row in rows])

    in_turns = _turns(_turns(kinds, lambda key: now[key].task), lambda key: kinds[key])
    order = list(words.values())
    cases = sorted(_within(budget, map(show, in_turns)), key=lambda case: order.index(case.kind))
    counts = Counter(kinds.values())
    return cases, {word: counts[word] for word in order} if kinds else {}


def of_data(stages: Sequence[tuple[str, Path]], budget: int) -> list[Case]:
    """Show prompts with all that data stages wrote for them; each stage and fate has its turn."""
    written: dict[str, list[tuple[str, Path, Entry]]] = {}
    for stage, path in stages:
        for entry in sorted(index(path), key=lambda entry: (entry.id, entry.sample)):
            written.setdefault(entry.id, []).append((stage, path, entry))
    seen = {(key, stage, e.fate, e.task) for key, mine in written.items() for stage, _, e in mine}
    wanted: dict[str, tuple[str, str]] = {}
    for key, stage, fate, _ in _turns(_turns(sorted(seen), lambda s: s[3]), lambda s: s[1:3]):
        wanted.setdefault(key, (stage, fate))

    def show(key: str) -> Case | None:
        texts: list[tuple[str, str, Row]] = []
        # What the prompt is shown for comes first, so that it is not left out.
        mine = sorted(written[key], key=lambda one: (one[0], one[2].fate) != wanted[key])
        for stage, path, entry in mine:
            if sum(of == stage for _, of, _ in texts) < SAMPLES:
                label = f"{stage}, sample {entry.sample + 1}"
                texts += [(label, stage, row) for _, row in fetch(path, [entry])]
        order = [stage for stage, _ in stages]
        return _case(DATA, "", sorted(texts, key=lambda text: order.index(text[1])))

    return list(_within(budget, map(show, wanted)))


def of_rollouts(stage: str, path: Path, budget: int) -> list[Case]:
    """Show groups of completions that RL scored against one another, early ones and late ones."""
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in index(path):
        groups.setdefault((entry.step, entry.id), []).append(entry)
    whole = max(map(len, groups.values()), default=0)
    keys = [key for key, group in sorted(groups.items()) if len(group) == whole]  # none is torn
    early = [key for key in keys if key[0] == keys[0][0]]
    late = [key for key in keys if key[0] == keys[-1][0] and key not in early]
    chosen = [key for pair in zip_longest(early[:GROUPS], late[:GROUPS]) for key in pair if key]

    def show(key: tuple[int, str]) -> Case | None:
        label = f"step {key[0]}"
        rows = fetch(path, groups[key])
        return _case(ROLLOUTS, label, [(f"{stage}, {label}", stage, row) for _, row in rows])

    return sorted(_within(budget, map(show, chosen)), key=lambda case: int(case.kind[5:]))


def _within(budget: int, cases: Iterable[Case | None]) -> Iterator[Case]:
    """Yield the cases that fit into so many bytes, and at least one."""
    spent = 0
    for case in filter(None, cases):
        spent += case.size
        if spent > budget and spent > case.size:
            return
        yield case


def _turns(items: Iterable[T], kind: Callable[[T], Any]) -> list[T]:
    """Return the items so that their kinds take turns."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    parts = [groups[name] for name in sorted(groups)]
    return [item for turn in zip_longest(*parts) for item in turn if item is not None]


def filters_of(cases: Sequence[Case], stages: Sequence[str]) -> list[Filter]:
    """Return each filter; one with a single option is left out."""
    texts = [text for case in cases for text in case.texts]
    names = {text.stage for text in texts}
    verdicts = {text.verdict for text in texts}
    fates = sorted({text.fate for text in texts} - {""}, key=lambda fate: (fate != "kept", fate))
    if sum(fate.startswith("dropped") for fate in fates) > 1:
        fates.insert(int(fates[0] == "kept"), "dropped")
    options = {
        ("where", "prompts"): dict.fromkeys(case.where for case in cases),
        ("stage", "stage"): [*sorted(names - set(stages)), *(s for s in stages if s in names)],
        ("verdict", "verdict"): [verdict for verdict in VERDICTS if verdict in verdicts],
        ("fate", "kept or dropped"): fates,
        ("kind", "change"): dict.fromkeys(case.kind for case in cases if case.where == HELD_OUT),
        ("task", "task"): sorted({case.task for case in cases} - {""}),
    }
    words = VERDICTS | {"dropped": "dropped, any reason"}
    return [
        (name, label, [(value, words.get(value, value)) for value in values])
        for (name, label), values in options.items()
        if len(values) > 1 or name in ("where", "stage")
    ]


# Texts as they are shown --------------------------------------------------------------------------


def _case(where: str, kind: str, written: list[tuple[str, str, Row]]) -> Case | None:
    """Return a prompt with its texts, each given by label, stage and row; None without any."""
    if not written:
        return None
    row = written[-1][2]
    prompt = row.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    asked = last.get("content", "") if isinstance(last, dict) else prompt
    gold = _shorten(str(row.get("answer") or ""))
    texts = [_text(label, stage, row) for label, stage, row in written]
    return Case(where, kind, _shorten(str(asked)), gold, str(row.get("task") or ""), texts)


def _text(label: str, stage: str, row: Row) -> Text:
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
    wrong = "form" if row.get("lenient_correct") else "wrong"
    judged = "unknown" if row.get("correct") is None else "right" if row["correct"] else wrong
    return Text(
        label=label,
        stage=stage,
        reasoning=_shorten(transcript.reasoning) if transcript else "",
        answer=_shorten(transcript.answer if transcript else completion),
        verdict=judged if "correct" in row else "none",
        fate=_entry(0, row).fate,
        note=", ".join(note for note, holds in notes.items() if holds),
    )


def brief(text: str, most: int = 110) -> str:
    """Put a text on one short line: its start and its end, since prompts of a task start alike."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"


def _shorten(text: str) -> str:
    """Leave out the middle of a long text, and show control characters as a replacement mark."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c > "\x9f" else "\ufffd" for c in text)
    clean = clean.translate(TURNS)
    if len(clean) <= LONGEST:
        return clean
    head, tail = LONGEST * 3 // 4, LONGEST // 4
    left_out = f"[… {len(clean) - head - tail:,} characters left out …]"
    return f"{clean[:head]}\n{left_out}\n{clean[-tail:]}"
