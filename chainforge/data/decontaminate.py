"""Find prompts that contain questions of an evaluation, verbatim or in other surroundings.

The published rule (any 8-gram in common) flags every prompt of a templated task and never a short
one. Here runs of words that many prompts share do not count, and of an evaluation question's
other runs at least 80 % must occur in the prompt, with all of its numbers and operators. Where
hardly any run is left, as in a short question, the whole question must, to the end of its
sentence: `... if you have 1 cat?` is not in `... if you have 1 cat, 2 dogs?`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from chainforge.core.config import read_settings, yaml_value
from chainforge.core.errors import InputError
from chainforge.data.filters import Run, runs
from chainforge.data.sources import PRESETS, question
from chainforge.data.tasks import TaskArgs, load_examples

N = 5  # Short questions have few runs of 8 words: there 8 of 10 leaks were found, 10 of 10 with 5.
COVERAGE = 0.8
COMMON = 0.05  # A run in more than this share of the prompts, or of a task's, is boilerplate ...
ALWAYS_RARE = 10  # ... but never one that so few prompts have.
FEW = 10  # A question with fewer runs that are no boilerplate is searched as a whole.
SHORTEST = 3  # A question of fewer words is compared with whole prompts only.


def evaluation_questions(entries: Sequence[Any], seed: int) -> list[tuple[str, str]]:
    """Return (source, question) of everything that `entries` name.

    An entry is a task ({fn, params, size, split}, or YAML text of it), the path of a YAML with
    `tasks`, a .jsonl file, or a folder, Hub id or preset, of which the test rows count.
    """
    found: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        try:
            source, tasks = _tasks_of(entry)
            args = TaskArgs(tasks=tasks, system_prompt="")
            rows = load_examples(args, seed=seed) if tasks else []
        except InputError as error:
            raise InputError(f"decontaminate[{number}]: {error}") from None
        found += [(source, question(row)) for row in rows]
    return found


def _tasks_of(entry: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return what an entry is called, and its questions as tasks."""
    if isinstance(entry, str) and entry.startswith("{"):
        entry = yaml_value(entry)
    if isinstance(entry, dict):
        return str(entry.get("name") or entry.get("fn")), [entry]
    if not isinstance(entry, str) or not entry:
        raise InputError(f"expected a task, a path or a Hub id, found {entry!r}")
    path = Path(entry)
    if path.suffix in (".yaml", ".yml"):
        settings = read_settings(path)
        tasks = settings.get("tasks") or []
        if not (tasks or settings.get("prompts")):
            raise InputError(f"{entry} has no `tasks`; name a configuration of evaluate.py")
        return path.name, tasks
    if path.suffix == ".jsonl":
        return path.name, [{"fn": "jsonl", "params": {"path": entry}, "split": "all"}]
    if not (entry in PRESETS or "/" in entry or path.is_dir()):
        known = ", ".join(PRESETS)
        raise InputError(
            f"{entry!r}: not a file, a folder, a Hub id (owner/name) or one of {known}"
        )
    return entry, [{"fn": "hub", "params": {"dataset": entry}, "split": "test"}]


# LaTeX that changes how a formula looks, not what it means, and other names of a few signs.
_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|q?quad)"
    r"(?![A-Za-z])|\\[,;:!()\[\]]|[${}~\\]"
)
_SAME = {
    "*": re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·⋅]"),
    " frac ": re.compile(r"\\[dtc]?frac(?![A-Za-z])"),
    "<=": re.compile(r"\\leq?(?:slant)?(?![A-Za-z])|≤"),
    ">=": re.compile(r"\\geq?(?:slant)?(?![A-Za-z])|≥"),
    "-": re.compile("[−–]"),
}
_THOUSANDS = re.compile(r"(\d)(?:,|,\\!|\{,\})(?=\d{3}(?!\d))")
# The end of a sentence, a number, a word, or a sign that is no punctuation.
_TOKEN = re.compile(r"(?P<end>[.?!。？！…]+(?=\W|$))|\d+|[^\W\d_]+|[^\s\w.,;:!?'\"`。？！…]")


class _Text:
    """A question or a prompt, cut up; `source` is a question's evaluation."""

    def __init__(self, text: str, source: str = "") -> None:
        self.source, self.text = source, text
        text = _THOUSANDS.sub(r"\1", text)
        for common, names in _SAME.items():
            text = names.sub(common, text)
        text = unicodedata.normalize("NFKC", _LOOKS.sub(" ", text)).lower()
        self.sentences = ["¶" if one["end"] else one[0] for one in _TOKEN.finditer(text)]
        self.words = [word for word in self.sentences if word != "¶"]

    def runs(self, size: int) -> set[Run]:
        """Return each run of `size` words."""
        return set(runs(self.words, size))

    @cached_property
    def whole(self) -> str:
        """Return all words, with a mark where a sentence ends."""
        return f" {' '.join(self.sentences)} "

    @cached_property
    def ended(self) -> str:
        """Return all words as if the text ended with a sentence."""
        return self.whole.rstrip("¶ ") + " ¶ "

    @cached_property
    def figures(self) -> Counter[str]:
        """Count numbers, operators and brackets, by which problems of one form differ."""
        return Counter(word for word in self.words if not word[0].isalpha())


# How many prompts, and how many with each run; of all prompts `()`, and of a task `(task,)`.
Counts = dict[tuple[Any, ...], tuple[int, Any]]
Rules = tuple[dict[Run, list[int]], dict[Run, list[int]], list[int]]


def add(counts: Counts, more: Counts) -> None:
    """Add up counts of prompts."""
    for group, (size, grams) in more.items():
        before, known = counts.get(group, (0, Counter()))
        known.update(grams)
        counts[group] = before + size, known


class Screen:
    """Evaluation questions to search prompts for: `Screen(questions).screen(prompts)`.

    `questions` are (source, text) pairs. Prompts in several processes: each counts its own, the
    counts make rules, and each searches for hits by the rules.
    """

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        distinct: dict[tuple[str, ...], _Text] = {}
        for source, text in questions:
            cut = _Text(text, source)
            if cut.words:
                distinct.setdefault(tuple(cut.words), cut)
        self.questions = list(distinct.values())
        self.exact = {words: number for number, words in enumerate(distinct)}
        # Questions shorter than a run are runs of their own length.
        self.grams = [text.runs(min(N, len(text.words))) for text in self.questions]
        self.sizes = {min(N, len(text.words)) for text in self.questions}
        self.known = set().union(*self.grams)

    def screen(self, prompts: Sequence[tuple[Any, str]]) -> list[str | None]:
        """Return which question each prompt contains; `prompts` are (task, text) pairs."""
        counts, suspects = self.count(prompts)
        rules = self.rules(counts)
        texts = (text for _, text in prompts)
        return [self.hit(t, rules) if suspect else None for t, suspect in zip(texts, suspects)]

    def count(self, prompts: Sequence[tuple[Any, str]]) -> tuple[Counts, list[bool]]:
        """Count the prompts, and those with each run of a question, in all and by task.

        Also returns which prompts may contain a question at all.
        """
        counts: Counts = {}
        suspects = []
        for task, prompt in prompts:
            text = _Text(prompt)
            grams = self._found(text)
            add(counts, dict.fromkeys(((), (task,)), (1, grams)))
            suspects.append(bool(grams) or tuple(text.words) in self.exact)
        return counts, suspects

    def rules(self, counts: Counts) -> Rules:
        """Return what makes a run decisive, given the counts of all prompts."""
        common = self._common(counts)
        rare: dict[Run, list[int]] = defaultdict(list)  # run -> questions it is no boilerplate in
        rarest: dict[Run, list[int]] = defaultdict(list)  # a question's rarest run -> the question
        _, everywhere = counts.get((), (0, Counter()))
        for number, grams in enumerate(self.grams):
            for gram in grams - common:
                rare[gram].append(number)
            if len(self.questions[number].words) >= SHORTEST:
                rarest[min(grams, key=lambda gram: (everywhere[gram], gram))].append(number)
        return rare, rarest, [len(grams - common) for grams in self.grams]

    def hit(self, prompt: str, rules: Rules) -> str | None:
        """Return which question a prompt contains."""
        rare, rarest, totals = rules
        text = _Text(prompt)
        grams = self._found(text)
        covered = Counter(n for gram in grams & rare.keys() for n in rare[gram])
        shares = {n: count / totals[n] for n, count in covered.items() if totals[n] >= FEW}
        near = (n for gram in grams & rarest.keys() for n in rarest[gram])
        shares |= {n: 1.0 for n in near if self.questions[n].whole in text.ended}
        if (same := self.exact.get(tuple(text.words))) is not None:
            shares[same] = 1.0
        return self._best(text, shares)

    def _found(self, text: _Text) -> set[Run]:
        return self.known & set().union(*map(text.runs, self.sizes))

    def _common(self, counts: Counts) -> set[Run]:
        """Return the runs that many prompts have, of all or of one task, or many questions."""
        asked = Counter(gram for grams in self.grams for gram in grams)
        common: set[Run] = set()
        for size, grams in [*counts.values(), (len(self.grams), asked)]:
            most = max(ALWAYS_RARE, COMMON * size)
            common.update(gram for gram, count in grams.items() if count > most)
        return common

    def _best(self, text: _Text, shares: dict[int, float]) -> str | None:
        """Return the question with the largest share of those whose figures are all there."""
        for number in sorted(shares, key=lambda number: (-shares[number], number)):
            asked = self.questions[number]
            if shares[number] >= COVERAGE and asked.figures <= text.figures:
                what = " ".join(asked.text.split())[:80]
                return f"{shares[number]:.0%} of {asked.source}: {what!r}"
        return None
