"""Filter single samples by their scores and texts; a dropped sample gets a reason and a detail.

After DeepSeek-R1, appendix B.3.3: mixed languages, long paragraphs and code blocks are left out of
what rejection sampling keeps. A filter is off, and not measured, where its threshold is None or
false.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import ALL_TAGS, PRESETS, Transcript, chat_mark, is_blank
from chainforge.data.sources import has_answer, question
from chainforge.rewards.functions import count_words, share


@dataclass
class FilterArgs:
    """What a completion must be like before a model may learn from it."""

    min_reasoning_chars: int | None = field(
        default=None, metadata={"help": "Drop shorter reasoning: too_short."}
    )
    max_completion_tokens: int | None = field(
        default=None, metadata={"help": "Drop longer completions (SFT's max_length): too_long."}
    )
    max_repetition: float | None = field(
        default=0.3,
        metadata={"help": "Largest share of the reasoning that may repeat itself: repetition."},
    )
    min_language: float | None = field(
        default=0.8,
        metadata={"help": "Smallest share of words in a script of the question: language."},
    )
    max_paragraph_chars: int | None = field(
        default=None, metadata={"help": "Drop reasoning with a longer paragraph: long_paragraph."}
    )
    drop_code: bool = field(
        default=False, metadata={"help": "Drop reasoning with a fenced block of code: code."}
    )


@dataclass
class SelectionArgs:
    """Which samples of each prompt to keep."""

    max_per_prompt: int = field(default=1, metadata={"help": "Most samples kept of one prompt."})
    select: Literal["best", "random", "shortest", "diverse", "all"] = field(
        default="best",
        metadata={
            "help": "Which are kept: those of highest reward (random among equals), random ones, "
            "the shortest, those that differ most, or all, whatever `max_per_prompt` says."
        },
    )
    min_reward: float | None = field(
        default=None, metadata={"help": "Smallest total reward: below_min_reward."}
    )
    require_correct: bool = field(
        default=True,
        metadata={"help": "Drop wrong and unverified answers; without a gold answer all pass."},
    )
    require_format: bool = field(
        default=True, metadata={"help": "Drop samples that are not a strict transcript."}
    )
    near_duplicates: float | None = field(
        default=None,
        metadata={
            "help": "Keep one of a prompt's completions with at least this share of 5-word runs "
            "in common, such as 0.8: near_duplicate."
        },
    )
    decontaminate: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Evaluations whose questions no kept prompt may contain: YAML files of "
            "evaluate.py, .jsonl files, folders, Hub ids, or tasks written as text: '{fn: hub, "
            "params: {dataset: gsm8k}, split: test}'. A chain adds its own evaluate stages."
        },
    )
    preference_pairs: int = field(
        default=0, metadata={"help": "Most pairs of a prompt, kept and worse, written for dpo.py."}
    )
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Most rows kept in all, spread evenly over the tasks: over_quota."},
    )


Finding = tuple[str, str]  # the reason, and what was measured

_PARTS = [(tags.reasoning_open, tags.reasoning_close) for tags in PRESETS.values()]
_TAGS = re.compile("|".join(map(re.escape, ALL_TAGS)))
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_FENCE = re.compile(r"\n[ \t]*(?:```|~~~)")


def parts(completion: str) -> Transcript:
    """Return reasoning and answer of any completion; without tags all of it is reasoning."""
    for opening, closing in _PARTS:
        before, closed, after = completion.partition(closing)
        if closed:
            return Transcript(before.partition(opening)[2] or before, _TAGS.sub("", after))
    return Transcript(_TAGS.sub("", completion), "")


def fault(row: Row, args: SelectionArgs, filters: FilterArgs | None = None) -> Finding | None:
    """Return the first reason to drop a sample, by its scores or its text; None to keep it."""
    correct, reward = row.get("correct"), row.get("reward")
    if row.get("finish_reason") not in ("stop", None):
        return "truncated", f"ended by {row['finish_reason']}"
    if mark := row.get("chat_token") or chat_mark(row["completion"]):
        return "chat_token", f"contains {str(mark)[:60]}"
    if is_blank(row["completion"]):
        return "empty", "an empty completion"
    if args.require_format and not row.get("formatted"):
        return "format", "not a strict transcript"
    if args.require_correct and correct is None and has_answer(row):
        return "unverified", "the answer could not be checked"
    if args.require_correct and correct not in (None, True):
        return "wrong", f"answered {str(row.get('extracted'))[:60]!r}"
    if args.min_reward is not None and (reward is None or reward < args.min_reward):
        return "below_min_reward", f"reward {reward}"
    return None if filters is None else text_fault(row, filters)


def text_fault(row: Row, args: FilterArgs) -> Finding | None:
    """Return the first reason to drop a sample by its text; None to keep it."""
    reasoning = parts(row["completion"]).reasoning
    if args.min_reasoning_chars is not None and len(reasoning) < args.min_reasoning_chars:
        return "too_short", f"{len(reasoning)} characters of reasoning"
    if args.max_completion_tokens is not None:
        if row.get("tokens") is None:
            raise InputError("max_completion_tokens: a sample has no count of tokens; leave it out")
        if row["tokens"] > args.max_completion_tokens:
            return "too_long", f"{row['tokens']} tokens"
    if args.max_repetition is not None and (found := repetition(reasoning)) > args.max_repetition:
        return "repetition", f"{found:.0%} repeats itself"
    if args.min_language:
        right = language_share(reasoning, question(row) if row.get("prompt") else "")
        if right < args.min_language:
            return "language", f"{right:.0%} of the words are in the expected script"
    if args.max_paragraph_chars:
        longest = max(len(paragraph.strip()) for paragraph in _PARAGRAPH.split(reasoning))
        if longest > args.max_paragraph_chars:
            return "long_paragraph", f"{longest} characters in a paragraph"
    if args.drop_code and _FENCE.search(f"\n{reasoning}"):
        return "code", "a fenced block"
    return None


Run = tuple[str, ...]

# A word, a number, an operator, or one character of a script that is written without spaces.
# Left out are marks that may change while a text stays the same; operators may not.
_MARKS = ".,;:!?'\"`()[]{}$\\…“”‘’„«»*_#|~–—、。，：；？！"
_TOKENS = re.compile(
    rf"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_]+|[^\w\s{re.escape(_MARKS)}]"
)
_SPACES = str.maketrans(dict.fromkeys(f"{_MARKS}\t\n\v\f\r", " "))
_OPERATORS = "%&+-/<=>@^"  # of ASCII, all that are neither marks nor words
RUN = 20  # a run of so many tokens occurs twice by accident in hardly any text
SHORT = 700  # tokens of a text in which searching for some words is faster than counting all runs
SHINGLE = 5  # as for the near duplicates of most corpora


def tokens(text: str) -> list[str]:
    """Return words, numbers and operators; case, punctuation and spacing do not count."""
    if text.isascii() and (plain := text.lower().translate(_SPACES)).isprintable():
        for operator in _OPERATORS:  # the same tokens in a third of the time
            if operator in plain:
                plain = plain.replace(operator, f" {operator} ")
        return plain.split()
    return _TOKENS.findall(unicodedata.normalize("NFKC", text).lower())


def runs(words: Sequence[str], size: int) -> list[Run]:
    """Return each `size` words that follow one another."""
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def shingles(completion: str) -> frozenset[Run]:
    """Return the runs of five tokens of a completion without its tags; a shorter one is one run."""
    said = parts(completion)
    words = tokens(f"{said.reasoning}\n{said.answer}")
    return frozenset(runs(words, min(SHINGLE, len(words))))


def repetition(text: str) -> float:
    """Return the share of a text's runs of 20 tokens that occurred before, from 0 to 1.

    Tokens are words, numbers and operators.
    """
    words = tokens(text)
    if len(words) <= SHORT:
        # Two equal runs would share the words at one of these places: nearly always none repeats.
        said = f" {' '.join(words)} "
        probes = (words[at : at + 4] for at in range(0, len(words) - 3, RUN - 3))
        if all(said.count(f" {' '.join(probe)} ") == 1 for probe in probes):
            return 0.0
    found = runs(words, RUN)
    return 1 - len(set(found)) / len(found) if found else 0.0


def language_share(text: str, asked: str) -> float:
    """Return the share of a text's words in a script of what was asked."""
    if text.isascii() and asked.isascii():
        return 1.0  # nearly every text: counting its words would cost ten times as much
    scripts = count_words(asked)
    return share(text, scripts) if scripts else 1.0
