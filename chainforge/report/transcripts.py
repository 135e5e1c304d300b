"""Choose which transcripts the report shows: as many as fit, by a fixed rule, failures among them.

Files of rows may be larger than memory: each is read twice, row by row, once to choose prompts and
once for their texts. Ids are hashes, so the first prompts by id are random ones.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, row_of
from chainforge.core.run_dir import StageDir
from chainforge.core.transcript import PRESETS, read
from chainforge.data.sources import has_answer
from chainforge.report.formatting import finite

PROMPTS = 300  # of one file at most
SAMPLES = 8  # of one prompt, stage and fate at most
LONGEST = 4000  # characters of one text before its middle is left out
MARKUP = 420  # bytes that the page needs around each text
# Bytes of the page for each kind of prompt; with everything else it stays well under 5 MB.
HELD_OUT, DATA, ROLLOUTS = "evaluations", "data stages", "rollouts"
BUDGET = {HELD_OUT: 1_200_000, DATA: 700_000, ROLLOUTS: 500_000}
LABELS = {HELD_OUT: "{stage}", DATA: "{stage}, sample {sample}", ROLLOUTS: "{stage}, step {step}"}
Kinds = dict[tuple[bool | None, bool | None], str]
# Held-out prompts, by how two models did; together they show gains and losses.
KINDS: Kinds = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong before and after",
    (True, True): "right before and after",
}
OPEN = "no answer to check"
# By verdict, a mark and words.
VERDICTS = {
    "right": ("✓", "right"),
    "wrong": ("✗", "wrong"),
    "form": ("✓", "right, wrong form"),
    "unknown": ("?", "not judged"),
}
# Characters that change the direction of the text around them are shown as codes, not applied.
TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
Key = tuple[int, str]  # of a prompt: the step, for rollouts, and the id
Groups = defaultdict[Any, set[Key]]
Filter = tuple[str, str, list[str]]  # name, label, options


@dataclass(frozen=True)
class Text:
    """One completion as the page shows it; `stage` wrote it, `label` tells it from others.

    `fate` is `kept`, `dropped: <reason>`, or empty where nothing has been decided.
    """

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


def cases_of(
    stages: Sequence[StageDir], results: StageDir | None, before: str, after: str
) -> tuple[list[Case], dict[str, int], dict[str, list[Row]]]:
    """Return the prompts to show, counts of held-out ones by kind, and each stage's sources."""
    cases: list[Case] = []
    kinds: dict[str, int] = {}
    written: dict[str, list[Row]] = {}
    if results is not None:
        cases, kinds = held_out(results.samples, before, after, BUDGET[HELD_OUT])
    data = [s for s in stages if s.samples.is_file() and not s.results and s.recipe != "evaluate"]
    for stage in data:
        some, written[stage.name] = of_data(stage.name, stage.samples, BUDGET[DATA] // len(data))
        cases += some
    rolled = [(stage.name, stage.directory / "rollouts.jsonl") for stage in stages]
    rolled = [(name, path) for name, path in rolled if path.is_file()]
    for name, path in rolled:
        cases += of_rollouts(name, path, BUDGET[ROLLOUTS] // len(rolled))
    return cases, kinds, written


def held_out(path: Path, before: str, after: str, budget: int) -> tuple[list[Case], dict[str, int]]:
    """Show all models on held-out prompts, alternating over kinds and tasks; also count each kind.

    Only first samples are shown. `budget` is in bytes of the page.
    """
    verdicts: dict[str, dict[Key, bool | None]] = {before: {}, after: {}}
    tasks: dict[Key, str] = {}
    for row in _first_samples(path):
        if row["model"] in verdicts:
            right = bool(row.get("correct")) if has_answer(row) else None
            verdicts[row["model"]][_key(row)] = right
            tasks[_key(row)] = row["task"]
    was, now = verdicts[before], verdicts[after]
    alone: Kinds = {(False, False): "wrong", (True, True): "right"}
    words = KINDS if before != after else alone
    kinds = {key: words.get((was[key], now[key]), OPEN) for key in was.keys() & now.keys()}
    groups: Groups = defaultdict(set)
    for key, kind in kinds.items():
        groups[kind, tasks[key]].add(key)
    wanted = {key: kinds[key] for key in _turns(groups)}
    cases = _cases(_first_samples(path), HELD_OUT, wanted, budget)
    counts, order = Counter(kinds.values()), [*words.values(), OPEN]
    cases.sort(key=lambda case: order.index(case.kind))
    order = order if counts[OPEN] else order[:-1]
    return cases, {word: counts[word] for word in order} if kinds else {}


def of_data(stage: str, path: Path, budget: int) -> tuple[list[Case], list[Row]]:
    """Show prompts with what a data stage wrote for them, alternating over fates and tasks.

    Also count who wrote the rows: `{"source", "rows", "kept"}`, most rows first.
    """
    groups: Groups = defaultdict(set)
    written: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for row in _samples(path):
        written[row["source"]] += 1
        kept[row["source"]] += not row["fate"].startswith("dropped")
        keys = groups[row["fate"], row["task"]]
        keys.add(_key(row))
        if len(keys) > 4 * PROMPTS:
            keys.intersection_update(heapq.nsmallest(PROMPTS, keys))
    wanted = dict.fromkeys(_turns(groups), "")
    sources = [{"source": s, "rows": n, "kept": kept[s]} for s, n in written.most_common()]
    return _cases(_samples(path), DATA, wanted, budget, stage), sources


def of_rollouts(stage: str, path: Path, budget: int) -> list[Case]:
    """Show groups of completions that RL scored against one another, early ones and late ones."""
    sizes = Counter(map(_key, _samples(path)))
    whole = max(sizes.values(), default=0)
    groups: Groups = defaultdict(set)
    for key, size in sizes.items():
        if size == whole:  # none is torn
            groups[key[0]].add(key)
    ends = {step: groups[step] for step in (min(groups), max(groups))} if groups else {}
    wanted = {key: f"step {key[0]}" for key in _turns(ends)}
    cases = _cases(_samples(path), ROLLOUTS, wanted, budget, stage)
    return sorted(cases, key=lambda case: int(case.kind.removeprefix("step ")))


def _turns(groups: Mapping[Any, Collection[Key]]) -> list[Key]:
    """Return the first prompts by id, taken from the groups in turn."""
    parts = [sorted(groups[name]) for name in sorted(groups)]
    turns = (key for turn in zip_longest(*parts) for key in turn if key is not None)
    return list(islice(dict.fromkeys(turns), PROMPTS))


def _samples(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of Samples, with `fate`, and with types that can be relied on."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # it is being written
                return
            try:
                row = row_of(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: {error}") from None
            if "completion" in row:
                fate = f"dropped: {row['drop']}" if row.get("drop") else "kept"
                row["fate"] = fate if "drop" in row else ""
                row["source"] = str(row.get("source") or "not recorded")
                row |= {key: str(row.get(key) or "") for key in ("id", "model", "task")}
                row |= {key: int(finite(row.get(key)) or 0) for key in ("sample", "step")}
                yield row


def _first_samples(path: Path) -> Iterator[Row]:
    return (row for row in _samples(path) if row["sample"] == 0)


def _key(row: Row) -> Key:
    return row["step"], row["id"]


def _cases(
    rows: Iterable[Row], where: str, wanted: Mapping[Key, str], budget: int, stage: str = ""
) -> list[Case]:
    """Return as many of the wanted prompts, given with their kinds, as fit into the budget.

    There is at least one. Without `stage`, each row's model wrote it.
    """
    found: dict[Key, Case] = {}
    for row in rows:
        key = _key(row)
        if key not in wanted:
            continue
        if key not in found:
            found[key] = _case(row, where, wanted[key])
        text, texts = _text(row, stage or row["model"], where), found[key].texts
        if sum((t.stage, t.fate) == (text.stage, text.fate) for t in texts) < SAMPLES:
            texts.append(text)
    cases = [found[key] for key in wanted if key in found]
    sizes = accumulate(case.size for case in cases)
    return [case for case, size in zip(cases, sizes, strict=True) if size <= budget] or cases[:1]


def _case(row: Row, where: str, kind: str) -> Case:
    """Return the prompt of a row, without texts."""
    prompt = row.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    asked = last.get("content", "") if isinstance(last, dict) else prompt
    gold = str(row.get("answer") or "")
    return Case(where, kind, _shorten(str(asked)), _shorten(gold), row["task"], [])


def _text(row: Row, stage: str, where: str) -> Text:
    completion = str(row["completion"] or "")
    transcript = next((t for preset in PRESETS if (t := read(completion, preset))), None)
    reward = finite(row.get("reward"))
    notes = {
        f"{row.get('tokens')} tokens": row.get("tokens") is not None,
        f"reward {reward or 0:.3g}": reward is not None,
        "cut at the length limit": row.get("finish_reason") == "length",
        "not in the transcript form": transcript is None,
        f"by {row['source']}": row["source"] not in ("not recorded", "policy"),
    }
    wrong = "form" if row.get("lenient_correct") else "wrong"
    judged = "unknown" if row.get("correct") is None else "right" if row["correct"] else wrong
    return Text(
        label=LABELS[where].format(stage=stage, sample=row["sample"], step=row["step"]),
        stage=stage,
        reasoning=_shorten(transcript.reasoning) if transcript else "",
        answer=_shorten(transcript.answer if transcript else completion),
        verdict=judged if "correct" in row and has_answer(row) else "none",
        fate=row["fate"],
        note=", ".join(note for note, holds in notes.items() if holds),
    )


def _shorten(text: str) -> str:
    """Leave out the middle of a long text, and show control characters as a replacement mark."""
    clean = "".join(c if c in "\n\t" or c.isprintable() or c > "\x9f" else "\ufffd" for c in text)
    clean = clean.translate(TURNS)
    if len(clean) <= LONGEST:
        return clean
    head, tail = LONGEST * 3 // 4, LONGEST // 4
    left_out = f"[… {len(clean) - head - tail:,} characters left out …]"
    return f"{clean[:head]}\n{left_out}\n{clean[-tail:]}"


def filters_of(cases: Sequence[Case], stages: Sequence[str]) -> list[Filter]:
    """Return each filter; one with a single option is left out."""
    texts = [text for case in cases for text in case.texts]
    names = {text.stage for text in texts}
    verdicts = {text.verdict for text in texts}
    fates = sorted({text.fate for text in texts} - {""}, key=lambda fate: (fate != "kept", fate))
    if sum(fate.startswith("dropped") for fate in fates) > 1:
        fates.insert(int(fates[0] == "kept"), "dropped")
    options: dict[tuple[str, str], Collection[str]] = {
        ("where", "prompts"): dict.fromkeys(case.where for case in cases),
        ("stage", "stage"): [*sorted(names - set(stages)), *(s for s in stages if s in names)],
        ("verdict", "verdict"): [verdict for verdict in VERDICTS if verdict in verdicts],
        ("fate", "kept or dropped"): fates,
        ("kind", "change"): dict.fromkeys(case.kind for case in cases if case.where == HELD_OUT),
        ("task", "task"): sorted({case.task for case in cases} - {""}),
    }
    return [
        (name, label, list(values))
        for (name, label), values in options.items()
        if len(values) > 1 or name in ("where", "stage")
    ]


def brief(text: str, most: int = 110) -> str:
    """Put a text on one short line: its start and its end, since prompts of a task start alike."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"
