"""Find prompts that give evaluation questions away, verbatim or in other surroundings.

The published rule (any 8-gram in common) flags every prompt of a templated task and never a short
one. Here runs of words that many prompts share do not count, and of an evaluation question's
other runs at least 80 % must stand in the prompt, with all of its numbers and its formulas whole.
Formulas are compared by what they say, not by how they are spelled.
Where hardly any run is left, as in a short question, the whole question must, to the end of its
sentence: `... if you have 1 cat?` does not stand in `... if you have 1 cat, 2 dogs?`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from chainforge.data.mathtext import plain_question
from chainforge.data.shingles import formulas, hashed, numbers, runs, shingles, tokens

N = 5  # Short questions have few runs of 8 words: there 8 of 10 leaks were found, 10 of 10 with 5.
COVERAGE = 0.8
COMMON = 0.05  # A run in more than this share of the prompts, or of a task's, is boilerplate ...
ALWAYS_RARE = 10  # ... but never one that so few prompts have.
FEW = 10  # A question with fewer runs that are no boilerplate is looked for whole.
SHORTEST = 3  # A question of fewer words is looked for as the whole prompt only.
_END = re.compile(r"[.?!。？！…]+(?=[\s\"'”»)\]*]|$)")


@dataclass(frozen=True)
class Hit:
    """An evaluation question that a prompt gives away."""

    source: str
    question: str
    coverage: float

    def __str__(self) -> str:
        return f"{self.coverage:.0%} of {self.source}: {' '.join(self.question.split())[:80]!r}"


@dataclass
class _Item:
    """An evaluation question, cut up."""

    source: str
    question: str
    plain: str
    words: list[str]
    grams: set[int]
    text: str = field(init=False)
    figures: Counter[str] = field(init=False)
    rare: int = 0

    def __post_init__(self) -> None:
        self.text = sentences(self.plain)
        self.figures = figures(self.words, self.plain)


def sentences(text: str) -> str:
    """Return the tokens of a text, with a mark where a sentence ends."""
    return f" {' '.join(tokens(_END.sub(' ¶ ', text)))} "


def figures(words: Sequence[str], text: str) -> Counter[str]:
    """Count the numbers and the formulas of a text, by which problems of one form differ."""
    return Counter(numbers(words)) + Counter(formulas(text))


class Screen:
    """Evaluation questions, ready to be looked for: `Screen(questions).screen(prompts)`.

    `questions` are (source, text) pairs.
    """

    def __init__(self, questions: Iterable[tuple[str, str]], n: int = N) -> None:
        self.n = n
        self.items: list[_Item] = []
        self.exact: dict[str, int] = {}
        for source, question in questions:
            text = plain_question(question)
            words = tokens(text)
            key = " ".join(words)
            if words and key not in self.exact:
                self.exact[key] = len(self.items)
                grams = set(shingles(hashed(words), n).tolist())
                self.items.append(_Item(source, question, text, words, grams))
        # Questions shorter than a run are runs of their own length.
        self.sizes = sorted({n, *(min(len(item.words), n) for item in self.items)} - {0})
        self.known = {gram for item in self.items for gram in item.grams}

    def screen(self, prompts: Sequence[tuple[str, str]]) -> list[Hit | None]:
        """Return what each prompt gives away; `prompts` are (task, text) pairs, each once."""
        texts = [plain_question(text) for _, text in prompts]
        words = [tokens(text) for text in texts]
        found = [self._grams(part) for part in words]
        common = self._common([task for task, _ in prompts], found)
        rare: dict[int, list[int]] = {}
        anchors: dict[int, list[int]] = {}
        counts = Counter(gram for grams in found for gram in grams)
        for number, item in enumerate(self.items):
            for gram in item.grams - common:
                rare.setdefault(gram, []).append(number)
            item.rare = len(item.grams - common)
            if len(item.words) >= SHORTEST:
                rarest = min(item.grams, key=lambda gram: (counts[gram], gram))
                anchors.setdefault(rarest, []).append(number)
        return [
            self._hit(text, part, grams, rare, anchors)
            for text, part, grams in zip(texts, words, found, strict=True)
        ]

    def _grams(self, words: list[str]) -> set[int]:
        """Return the runs of a prompt that some question has too."""
        hashes = hashed(words)
        grams = (gram for size in self.sizes for gram in runs(hashes, size).tolist())
        return self.known.intersection(grams)

    def _common(self, tasks: Sequence[str], found: Sequence[set[int]]) -> set[int]:
        """Return the runs that many prompts have, of all or of one task."""
        groups: dict[str, list[set[int]]] = {"": list(found)}
        for task, grams in zip(tasks, found, strict=True):
            groups.setdefault(f"task {task}", []).append(grams)
        common: set[int] = set()
        for members in [*groups.values(), [item.grams for item in self.items]]:
            most = max(ALWAYS_RARE, COMMON * len(members))
            counts = Counter(gram for grams in members for gram in grams)
            common.update(gram for gram, count in counts.items() if count > most)
        return common

    def _hit(
        self,
        prompt: str,
        words: list[str],
        grams: set[int],
        rare: dict[int, list[int]],
        anchors: dict[int, list[int]],
    ) -> Hit | None:
        """Return the question that a prompt gives away most of; None when there is none."""
        near = [number for gram in grams & anchors.keys() for number in anchors[gram]]
        text = sentences(f"{prompt}\n!") if near else ""
        shares = {number: 1.0 for number in near if self.items[number].text in text}
        whole = self.exact.get(" ".join(words))
        if whole is not None:
            shares[whole] = 1.0
        covered = Counter(number for gram in grams & rare.keys() for number in rare[gram])
        for number, count in covered.items():
            item = self.items[number]
            if item.rare >= FEW and count / item.rare >= COVERAGE:
                shares.setdefault(number, count / item.rare)
        if not shares:
            return None
        own = figures(words, prompt)
        given = {n: share for n, share in shares.items() if not self.items[n].figures - own}
        best = max(given, key=lambda number: (given[number], -number), default=None)
        return None if best is None else self._as_hit(best, given[best])

    def _as_hit(self, number: int, coverage: float) -> Hit:
        item = self.items[number]
        return Hit(item.source, item.question, coverage)
