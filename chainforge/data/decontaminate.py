r"""Find prompts that contain questions of an evaluation, verbatim or in other surroundings.

The published rule (any 8-gram in common) flags every prompt of a templated task and never a short
one. Here runs of words that many prompts share do not count, and of an evaluation question's
other runs at least 80 % must occur in the prompt, with all of its numbers and its formulas whole.
Where hardly any run is left, as in a short question, the whole question must, to the end of its
sentence: `... if you have 1 cat?` is not in `... if you have 1 cat, 2 dogs?`.
Formulas are compared by what they mean: `$\dfrac{1}{2} x$`, `\(\frac12x\)` and `1/2 x` are equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from chainforge.core.config import read_settings, yaml_value
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question, read_rows
from chainforge.data.dedup import hashed, runs, shingles, tokens
from chainforge.data.sources import PRESETS, QUESTIONS, load_dataset
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.answers import unicode_to_latex
from chainforge.rewards.language import end_of_formula

N = 5  # Short questions have few runs of 8 words: there 8 of 10 leaks were found, 10 of 10 with 5.
COVERAGE = 0.8
COMMON = 0.05  # A run in more than this share of the prompts, or of a task's, is boilerplate ...
ALWAYS_RARE = 10  # ... but never one that so few prompts have.
FEW = 10  # A question with fewer runs that are no boilerplate is searched as a whole.
SHORTEST = 3  # A question of fewer words is compared with whole prompts only.


def evaluation_questions(entries: Sequence[Any], seed: int) -> list[tuple[str, str]]:
    """Return (source, question) of everything that `entries` name.

    An entry is a task ({fn, params, size, split}, or YAML text of it), the path of a YAML with
    `tasks`, of a .jsonl file or of a folder, or a Hub id as `owner/name`, `owner/name:config` or
    `owner/name:config:split`. Without a split its test rows count, or all where it has none.
    """
    found: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        try:
            questions = list(_questions(entry, seed))
            if not questions:
                raise InputError(f"{entry} contains no question")
        except InputError as error:
            raise InputError(f"decontaminate[{number}]: {error}") from None
        found += questions
    return found


def _questions(entry: Any, seed: int) -> Iterable[tuple[str, str]]:
    if isinstance(entry, str) and entry.startswith("{"):
        entry = yaml_value(entry)
    if isinstance(entry, dict):
        return _of_tasks([entry], seed, str(entry.get("name") or entry.get("fn")))
    if not isinstance(entry, str) or not entry:
        raise InputError(f"expected a task, a path or a Hub id, found {entry!r}")
    path = Path(entry)
    if path.suffix in (".yaml", ".yml"):
        settings = read_settings(path)
        if not settings.get("tasks"):
            raise InputError(f"{entry} has no `tasks`; name a configuration of evaluate.py")
        return _of_tasks(settings["tasks"], seed, path.name)
    if path.suffix == ".jsonl":
        return ((path.name, _question(row, entry)) for row in read_rows(path))
    if entry in PRESETS:
        task = {"fn": "hub", "params": {"dataset": entry}, "split": "test"}
        return _of_tasks([task], seed, entry)
    return ((entry, _question(row, entry)) for row in _of_dataset(entry))


def _of_tasks(tasks: list[dict[str, Any]], seed: int, source: str) -> list[tuple[str, str]]:
    rows = load_examples(TaskArgs(tasks=tasks, system_prompt=""), seed=seed)
    return [(source, question(row)) for row in rows]


def _question(row: Row, where: str) -> str:
    """Return the question of a row, whatever its column is called."""
    for name in QUESTIONS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            return question({"prompt": value})
    raise InputError(f"{where}: no column with a question ({', '.join(QUESTIONS)}) in {list(row)}")


def _of_dataset(reference: str) -> Iterable[Row]:
    """Yield the rows of a folder's or the Hub's data set: the test rows, if it has some."""
    name, _, rest = reference.partition(":")
    config, _, split = rest.partition(":")
    if "/" not in name and not Path(name).exists():
        raise InputError(
            f"{reference!r}: not a file, a folder, a Hub id (owner/name) or a preset "
            f"({', '.join(PRESETS)})"
        )
    loaded = load_dataset(name, config or None)
    if split and split not in loaded:
        raise InputError(f"{name} has no split {split!r}; there are: {', '.join(loaded)}")
    for part in [split] if split else ["test"] if "test" in loaded else list(loaded):
        yield from loaded[part]


@dataclass(frozen=True)
class Hit:
    """An evaluation question that a prompt contains."""

    source: str
    question: str
    coverage: float

    def __str__(self) -> str:
        return f"{self.coverage:.0%} of {self.source}: {' '.join(self.question.split())[:80]!r}"


class _Text:
    """A question or a prompt, cut up."""

    def __init__(self, text: str) -> None:
        self.plain = plain_question(text)
        self.words = tokens(self.plain)

    @cached_property
    def figures(self) -> Counter[str]:
        """Count the numbers and the formulas, by which problems of one form differ."""
        numbers = (word for word in self.words if word[0].isdigit())
        return Counter([*numbers, *_formulas(self.plain)])

    @cached_property
    def sentences(self) -> str:
        """Return the tokens, with a mark where a sentence ends."""
        return f" {' '.join(tokens(_END.sub(' ¶ ', self.plain)))} "


_END = re.compile(r"[.?!。？！…]+(?=[\s\"'”»)\]*]|$)")
_OPERATORS = frozenset("+-*/^×÷·=<>%()[]−")
_PIECES = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")


def _formulas(text: str) -> list[str]:
    """Return the formulas of a text, such as `3*(4+5)`: part of a formula is another problem."""
    found: list[str] = []
    run: list[str] = []
    for piece in [*_PIECES.findall(unicodedata.normalize("NFKC", text)), ""]:
        if piece and (piece in _OPERATORS or piece[0].isdigit()):
            run.append(piece)
            continue
        if sum(part[0].isdigit() for part in run) > 1 and len(run) > 2:
            found.append("".join(run).lstrip(")]=").rstrip("([="))
        run = []
    return found


class Screen:
    """Evaluation questions to search prompts for: `Screen(questions).screen(prompts)`.

    `questions` are (source, text) pairs.
    """

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        self.items: list[tuple[str, str, _Text]] = []
        self.grams: list[set[int]] = []
        self.exact: dict[str, int] = {}
        for source, text in questions:
            cut = _Text(text)
            if cut.words and self.exact.setdefault(" ".join(cut.words), len(self.items)) == len(
                self.items
            ):
                self.items.append((source, text, cut))
                self.grams.append(set(shingles(hashed(cut.words), N).tolist()))
        # Questions shorter than a run are runs of their own length.
        self.sizes = {N, *(min(len(cut.words), N) for _, _, cut in self.items)}
        self.known = set().union(*self.grams)

    def screen(self, prompts: Sequence[tuple[str, str]]) -> list[Hit | None]:
        """Return what each prompt contains; `prompts` are (task, text) pairs, each once."""
        texts = [_Text(text) for _, text in prompts]
        found = [self._known_runs(text.words) for text in texts]
        common = self._common([task for task, _ in prompts], found)
        counts = Counter(gram for grams in found for gram in grams)
        rare: dict[int, list[int]] = {}  # run -> questions in which it is no boilerplate
        anchors: dict[int, list[int]] = {}  # a question's rarest run -> the question
        for number, grams in enumerate(self.grams):
            for gram in grams - common:
                rare.setdefault(gram, []).append(number)
            if len(self.items[number][2].words) >= SHORTEST:
                rarest = min(grams, key=lambda gram: (counts[gram], gram))
                anchors.setdefault(rarest, []).append(number)
        totals = [len(grams - common) for grams in self.grams]
        hits: list[Hit | None] = []
        for text, grams in zip(texts, found, strict=True):
            shares = self._whole(text, grams, anchors)
            covered = Counter(number for gram in grams & rare.keys() for number in rare[gram])
            for number, count in covered.items():
                if totals[number] >= FEW and count / totals[number] >= COVERAGE:
                    shares.setdefault(number, count / totals[number])
            hits.append(self._best(text, shares))
        return hits

    def _known_runs(self, words: list[str]) -> set[int]:
        """Return the runs of a prompt that some question has too."""
        hashes = hashed(words)
        return self.known.intersection(
            gram for size in self.sizes for gram in runs(hashes, size).tolist()
        )

    def _common(self, tasks: Sequence[str], found: Sequence[set[int]]) -> set[int]:
        """Return the runs that many prompts have, of all or of one task, or many questions."""
        groups: dict[str | None, list[set[int]]] = {None: list(found)}
        for task, grams in zip(tasks, found, strict=True):
            groups.setdefault(task, []).append(grams)
        common: set[int] = set()
        for members in [*groups.values(), self.grams]:
            most = max(ALWAYS_RARE, COMMON * len(members))
            counts = Counter(gram for grams in members for gram in grams)
            common.update(gram for gram, count in counts.items() if count > most)
        return common

    def _whole(
        self, text: _Text, grams: set[int], anchors: dict[int, list[int]]
    ) -> dict[int, float]:
        """Return the questions that occur in a prompt as a whole, each with its share of 1."""
        near = [number for gram in grams & anchors.keys() for number in anchors[gram]]
        inside: dict[int, float] = {}
        for number in near:
            if self.items[number][2].sentences in f"{text.sentences}¶ ":
                inside[number] = 1.0
        same = self.exact.get(" ".join(text.words))
        return inside if same is None else inside | {same: 1.0}

    def _best(self, text: _Text, shares: dict[int, float]) -> Hit | None:
        """Return the question with the largest share of those whose numbers are all there."""
        given = [n for n in shares if not self.items[n][2].figures - text.figures]
        if not given:
            return None
        best = max(given, key=lambda number: (shares[number], -number))
        source, question, _ = self.items[best]
        return Hit(source, question, shares[best])


_SPELLINGS = yaml.safe_load(Path(__file__).with_name("latex.yaml").read_text(encoding="utf-8"))
_COMMANDS = {name: name for name in _SPELLINGS["names"].split()} | {
    name: common for common, names in _SPELLINGS["same"].items() for name in names.split()
}
# Longer names first, since blanks after a command may be missing: `\infty` is not `\in`.
_KNOWN = "|".join(sorted([*_COMMANDS, *_SPELLINGS["looks"].split()], key=len, reverse=True))
_ENVIRONMENT = r"\\(?:begin|end)\{[A-Za-z*]*\}"
# In a formula: a command, an environment, the bar of a fraction, a number, letter or operator.
_PIECE = re.compile(
    rf"\\(?P<known>{_KNOWN})|{_ENVIRONMENT}|(?P<over>\}}\s*\{{)"
    r"|(?P<piece>\d+|[^\W\d_]|[^\s\w{}$\\&~.,;:!'\"…])"
)
# Outside formulas: the same without the pieces.
_MARKUP = re.compile(
    rf"\\(?P<known>{_KNOWN})(?![A-Za-z])|{_ENVIRONMENT}|\\[,;:!]|(?P<over>\}}\s*\{{)"
)
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL | re.IGNORECASE)
# These start with a character that is rare: a search for one is fast.
_THOUSANDS = re.compile(r"(\d)(?:\{,\}|,\\!|\\,|,)(?=\d{3}(?!\d))")
_JOINT = re.compile(r"(\d)(?=[A-Za-z])")
_HYPHEN = re.compile(r"-(?<=[A-Za-z]-)(?=[A-Za-z])")
_SHORT_FRACTION = re.compile(r"frac\s*(\d)\s*(\d)")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\b")
_OPENING = re.compile(r"\\\$|\$\$|\$|\\\(|\\\[")
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}


def plain_question(text: str) -> str:
    """Return a question in lower case, its formulas in pieces, its verbs as one of each meaning.

    Drawings (`[asy]`) are left out. Takes linear time.
    """
    if not text.isascii():
        text = unicode_to_latex(text)
    if "[" in text:
        text = _DRAWING.sub(" ", text)
    text = _THOUSANDS.sub(r"\1", text)
    if "\\" in text or "$" in text:
        text = _DEGREES.sub(r"\\circ ", _SHORT_FRACTION.sub(r"frac{\1}{\2}", text))
        text = "".join(_written_out(text))
    else:
        text = _in_prose(text)
    text = " ".join(text.lower().split())
    for meaning, words in _SPELLINGS["words"].items():
        for word in words:
            text = text.replace(word, meaning)
    return text


def _in_prose(text: str) -> str:
    """Return a text outside formulas, its commands written out and its joints opened."""
    if "\\" in text or "{" in text:
        text = _MARKUP.sub(lambda found: f" {_name(found)} ", text)
    return _HYPHEN.sub(" ", _JOINT.sub(r"\1 ", text))


def _written_out(text: str) -> list[str]:
    """Return the parts of a text, those between the marks of a formula in single pieces."""
    parts: list[str] = []
    never: set[str] = set()  # marks that no longer occur, so that open ones cost one search
    position = 0
    while match := _OPENING.search(text, position):
        parts += _in_prose(text[position : match.start()]), " "
        position = match.end()
        closing = _CLOSING.get(match[0], "$")
        if match[0] == "\\$" or closing in never:
            continue
        end = end_of_formula(text, position) if closing == "$" else text.find(closing, position)
        if end < 0:
            never |= {closing} - {"$"}
            continue
        pieces = _PIECE.finditer(text, position, end)
        parts += " ".join(filter(None, (one["piece"] or _name(one) for one in pieces))), " "
        position = end + len(closing)
    parts.append(_in_prose(text[position:]))
    return parts


def _name(found: re.Match[str]) -> str:
    """Return the common name of a command; nothing for one that changes the looks alone."""
    return "/" if found["over"] else _COMMANDS.get(found["known"] or "", "")
