"""Filter single samples, by their scores and by their texts: a reason, and what was measured.

After DeepSeek-R1, appendix B.3.3: mixed languages, long paragraphs and code blocks are left out of
what rejection sampling keeps. Only what is on is measured; a filter is off where its threshold is
None, 0 or false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, has_answer, question
from chainforge.core.transcript import PRESETS, Transcript, chat_mark, is_blank
from chainforge.data.dedup import Hashes, cached_tokens, runs
from chainforge.rewards.language import LANGUAGES, count_words, scripts_of, share


@dataclass
class FilterArgs:
    """What a completion must be like before a model may learn from it."""

    min_reasoning_chars: int | None = field(
        default=None, metadata={"help": "Drop shorter reasoning: too_short."}
    )
    max_reasoning_chars: int | None = field(
        default=None, metadata={"help": "Drop longer reasoning: too_long."}
    )
    max_completion_tokens: int | None = field(
        default=None, metadata={"help": "Drop longer completions (SFT's max_length): too_long."}
    )
    max_repetition: float | None = field(
        default=0.3,
        metadata={"help": "Largest share of the reasoning that may repeat itself: repetition."},
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language of the reasoning, such as en. Default: any language in the script "
            "of the question."
        },
    )
    min_language: float | None = field(
        default=0.8,
        metadata={"help": "Smallest share of the reasoning's words in that script: language."},
    )
    max_paragraph_chars: int | None = field(
        default=None, metadata={"help": "Drop reasoning with a longer paragraph: long_paragraph."}
    )
    drop_code: bool = field(
        default=False, metadata={"help": "Drop reasoning with a block of code: code."}
    )

    def check(self) -> None:
        """Raise `InputError` for a setting that is out of range."""
        for name in ("max_repetition", "min_language"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}: expected a share from 0 to 1, found {value}")
        for name in ("min_reasoning_chars", "max_reasoning_chars", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name}: expected 0 or more, found {value}")
        least, most = self.min_reasoning_chars, self.max_reasoning_chars
        if least is not None and most is not None and least > most:
            raise InputError(
                f"min_reasoning_chars ({least}) is more than max_reasoning_chars ({most})"
            )
        if self.language is not None:
            scripts_of(self.language)


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
        metadata={
            "help": "Drop samples that are wrong or could not be verified. Prompts without an "
            "answer pass."
        },
    )
    require_format: bool = field(
        default=True, metadata={"help": "Drop samples that are not a strict transcript."}
    )
    min_pass_rate: float | None = field(
        default=None,
        metadata={"help": "Smallest share of a prompt's samples that must be right: pass_rate."},
    )
    max_pass_rate: float | None = field(
        default=None, metadata={"help": "Largest such share: easier prompts teach little."}
    )
    drop_duplicates: bool = field(
        default=True,
        metadata={
            "help": "Keep one of equal completions of a prompt, and one of equal prompts; case "
            "and white space do not count."
        },
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
            "evaluate.py, .jsonl files, folders, Hub ids, tasks written as text: '{fn: hub, "
            "params: {dataset: gsm8k}, split: test}'. A chain adds its own evaluate stages."
        },
    )
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Most rows kept in all, spread evenly over the tasks: over_quota."},
    )

    def check(self) -> None:
        """Raise `InputError` for settings that are out of range or contradict each other."""
        for name in ("max_per_prompt", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected 1 or more, found {value}")
        for name in ("near_duplicates", "min_pass_rate", "max_pass_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}: expected a share from 0 to 1, found {value}")
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            raise InputError(f"min_pass_rate ({low}) is more than max_pass_rate ({high})")


Finding = tuple[str, str]  # the reason, and what was measured
Filter = Callable[[Row, Transcript], Finding | None]

# In the order in which the filters run.
REASONS = ("too_short", "too_long", "repetition", "language", "long_paragraph", "code")

_PARTS = [(tags.reasoning_open, tags.reasoning_close) for tags in PRESETS.values()]
_TAGS = re.compile("|".join(re.escape(tag) for tags in PRESETS.values() for tag in tags.all))
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def parts(completion: str) -> Transcript:
    """Return reasoning and answer of any completion; without tags all of it is reasoning."""
    for opening, closing in _PARTS:
        before, closed, after = completion.partition(closing)
        if closed:
            return Transcript(before.partition(opening)[2] or before, _TAGS.sub("", after))
    return Transcript(_TAGS.sub("", completion), "")


def filters(args: FilterArgs) -> list[Filter]:
    """Return the filters that are on, in the order of `REASONS`; raise `InputError` if invalid.

    A filter takes a Sample and its parts, and returns a finding against it, or None.
    """
    args.check()
    made: list[Filter] = []
    bounds = args.min_reasoning_chars, args.max_reasoning_chars, args.max_completion_tokens
    if any(bound is not None for bound in bounds):
        made.append(lambda row, said: _length(row, said.reasoning, args))
    if args.max_repetition is not None and args.max_repetition < 1:
        most = args.max_repetition
        made.append(lambda row, said: _repetition(said.reasoning, most))
    if args.min_language:
        made.append(lambda row, said: _language(row, said.reasoning, args))
    if args.max_paragraph_chars:
        longest = args.max_paragraph_chars
        made.append(lambda row, said: _paragraph(said.reasoning, longest))
    if args.drop_code:
        made.append(lambda row, said: _code(said.reasoning))
    return made


def text_fault(row: Row, said: Transcript, checks: Sequence[Filter]) -> Finding | None:
    """Return the first finding of `filters` against a sample; None when there is none."""
    return next((found for check in checks if (found := check(row, said))), None)


def fault(row: Row, args: SelectionArgs) -> Finding | None:
    """Return the first reason to drop a sample for its scores; None when there is none."""
    if not isinstance(row.get("completion"), str) or "id" not in row:
        raise InputError(f"a sample needs `id` and `completion` (text), found {str(row)[:120]}")
    ended, correct, reward = row.get("finish_reason"), row.get("correct"), row.get("reward")
    if ended not in ("stop", None):
        return "truncated", f"ended by {ended}"
    if mark := row.get("chat_token") or chat_mark(row["completion"]):
        return "chat_token", f"contains {str(mark)[:60]}"
    if is_blank(row["completion"]):
        return "empty", "an empty completion"
    if args.require_format and not row.get("formatted"):
        return "format", "not a strict transcript"
    if args.require_correct and correct is None and has_answer(row):
        return "unverified", "the answer could not be checked"
    if args.require_correct and correct is not None and not correct:
        return "wrong", f"answered {str(row.get('extracted'))[:60]!r}"
    if args.min_reward is not None and (reward is None or reward < args.min_reward):
        return "below_min_reward", f"reward {reward}"
    return None


def _length(row: Row, reasoning: str, args: FilterArgs) -> Finding | None:
    size = len(reasoning)
    if args.min_reasoning_chars is not None and size < args.min_reasoning_chars:
        return "too_short", f"{size} characters of reasoning"
    if args.max_reasoning_chars is not None and size > args.max_reasoning_chars:
        return "too_long", f"{size} characters of reasoning"
    if args.max_completion_tokens is None:
        return None
    if row.get("tokens") is None:
        raise InputError(
            f"sample {row.get('sample')} of {row.get('id')} has no count of tokens: leave "
            "max_completion_tokens out, or use max_reasoning_chars"
        )
    longer = row["tokens"] > args.max_completion_tokens
    return ("too_long", f"{row['tokens']} tokens") if longer else None


def _repetition(reasoning: str, most: float) -> Finding | None:
    found = repetition(reasoning)
    return ("repetition", f"{found:.0%} repeats itself") if found > most else None


def _language(row: Row, reasoning: str, args: FilterArgs) -> Finding | None:
    asked = question(row) if args.language is None and row.get("prompt") else ""
    right = language_share(reasoning, args.language, asked)
    if right < (args.min_language or 0.0):
        return "language", f"{right:.0%} of the words are in the expected script"
    return None


def _paragraph(reasoning: str, longest: int) -> Finding | None:
    found = max(len(paragraph.strip()) for paragraph in _PARAGRAPH.split(reasoning))
    return ("long_paragraph", f"{found} characters in a paragraph") if found > longest else None


def _code(reasoning: str) -> Finding | None:
    found = code_block(reasoning)
    return None if found is None else ("code", found)


# Both patterns start with a line's end, so that the search finds candidates quickly.
_FENCE = re.compile(r"\n[ \t]*(?:```|~~~)")
_CODE_MARK = re.compile(
    r"\n[ \t]*(?:def \w+\(|class \w+[(:]|import \w+|from \w+ import|print\(|return\b|#include"
    r"|for \w+ in .*:|while .*:|(?:int|void|public|static|const|let|var|function) )"
)
# Matches a stripped line. No part may overlap the next, or a hostile line costs quadratic time.
_CODE_LINE = re.compile(
    r"(?:def|class)\s+\w.*:|(?:from\s+[\w.]+\s+)?import\s+\w[\w., *]*|#include\s*<.*"
    r"|(?:if|elif|for|while|with|try|except|else)\b.*:|return\b.*[\w)\]]|print\(.*\)"
    r"|[\w.\[\]]++\s*[-+*/]?=(?!=).*[\w)\]'\"]|.*[;{}]"
)


def code_block(text: str) -> str | None:
    """Return which block of code a text contains: a fence, or three lines of code in a row."""
    whole = f"\n{text}"
    if _FENCE.search(whole):
        return "a fenced block"
    if not _CODE_MARK.search(whole):
        return None
    lines = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        lines = lines + 1 if _CODE_LINE.fullmatch(line) else 0
        if lines == 3:
            return "3 lines of code"
    return None


def language_share(text: str, language: str | None, asked: str) -> float:
    """Return the share of words in the language's script, or in the script of what was asked."""
    if _plain(text) and ("latin" in scripts_of(language) if language else _plain(asked)):
        return 1.0  # nearly every text: counting its words would cost ten times as much
    if language is not None:
        return share(text, language)
    wanted = count_words(asked)
    if not wanted:
        return 1.0
    main = wanted.most_common(1)[0][0]
    scripts = {main}
    for known in LANGUAGES.values():  # Japanese is written in two
        if main in known and len(known) > 1 and any(wanted[other] for other in known - {main}):
            scripts |= known
    counts = count_words(text)
    total = sum(counts.values())
    return sum(counts[script] for script in scripts) / total if total else 1.0


def _plain(text: str) -> bool:
    """Return whether all letters are ASCII."""
    return text.isascii() or not any(char > "\x7f" and char.isalpha() for char in set(text))


RUN = 20  # a run of so many tokens occurs twice by accident in hardly any text
LINE = 20  # characters from which on a repeated line counts
MATH = 128  # tokens of mathematics that may repeat themselves, as a sum of 32 fractions
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[^\W\d_]{2}|[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")


def repetition(text: str) -> float:
    """Return the share of a text that repeats itself, from 0 to 1.

    The larger of two: the share of runs of 20 tokens (words, numbers, operators) that occurred
    before, and the share of characters in lines that occurred before. Mathematics without a word
    may repeat itself for 128 tokens.
    """
    found = runs(cached_tokens(text)[1], RUN)
    share = _repeated_lines(text)
    if not _repeats(found):  # nearly every text
        return share
    return max(_repeats(found[_counted(text)]) / len(found), share)


def _repeats(found: Hashes) -> int:
    """Count the values that occurred before."""
    ordered = np.sort(found)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))


def _counted(text: str) -> NDArray[np.bool_]:
    """Return which runs of 20 tokens are more than a short stretch of mathematics."""
    commands = {name.lower() for name in _COMMAND.findall(text)}
    pieces, _ = cached_tokens(text)
    is_word = {one: one not in commands and bool(_WORD.search(one)) for one in set(pieces)}
    words = np.array([is_word[piece] for piece in pieces])
    lengths = np.diff(np.flatnonzero(np.concatenate(([True], words, [True]))))
    counted = words | np.repeat(lengths > MATH, lengths)[: len(words)]
    ends = np.cumsum(np.concatenate(([0], counted)))
    return ends[RUN:] > ends[:-RUN]


def _repeated_lines(text: str) -> float:
    """Return the share of the characters in lines that occurred before and contain a word."""
    if "\n" not in text:
        return 0.0
    seen: set[str] = set()
    again = 0
    for line in map(str.strip, text.splitlines()):
        if len(line) >= LINE:
            if line in seen and _WORD.search(_COMMAND.sub(" ", line)):
                again += len(line)
            seen.add(line)
    return again / len(text)
