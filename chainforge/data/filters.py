"""What may be wrong with a completion itself: each filter has a name, a threshold, and a finding.

After DeepSeek-R1, appendix B.3.3: mixed languages, long paragraphs and code blocks are left out of
what rejection sampling keeps. Only what is on is measured; a filter is off where its threshold is
None, 0 or false.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import PRESETS, Transcript
from chainforge.data.codeblocks import code_block
from chainforge.data.languages import check_vote, language_share, voted_share
from chainforge.data.repetition import repetition
from chainforge.rewards.answers import boxes, clean
from chainforge.rewards.language import scripts_of
from chainforge.rewards.quantities import squeeze


@dataclass
class FilterArgs:
    """What a completion must be like before it may teach."""

    min_completion_tokens: int | None = field(
        default=None, metadata={"help": "Fewer tokens than this: too_short."}
    )
    max_completion_tokens: int | None = field(
        default=None, metadata={"help": "More tokens than this: too_long (SFT's max_length, say)."}
    )
    min_reasoning_chars: int | None = field(
        default=None, metadata={"help": "A reasoning of fewer characters: too_short."}
    )
    max_reasoning_chars: int | None = field(
        default=None, metadata={"help": "A reasoning of more characters: too_long."}
    )
    max_repetition: float | None = field(
        default=0.3,
        metadata={"help": "Most of the reasoning that may repeat itself, as a share: repetition."},
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language of the reasoning, such as en; when left out, one that is written in "
            "the same script as the question."
        },
    )
    min_language: float | None = field(
        default=0.8,
        metadata={"help": "Least share of the reasoning's words in that script: language."},
    )
    language_vote: bool = field(
        default=False,
        metadata={
            "help": "Hold the words of whole paragraphs against min_language too, each identified "
            "by py3langid: scripts cannot tell French from English."
        },
    )
    max_paragraph_chars: int | None = field(
        default=None,
        metadata={"help": "A paragraph of the reasoning with more characters: long_paragraph."},
    )
    drop_code: bool = field(
        default=False, metadata={"help": "Drop reasoning with a block of code in it: code."}
    )
    drop_leaked: bool = field(
        default=False,
        metadata={
            "help": "Drop reasoning that opens with its final answer, so that what follows is no "
            "reasoning: leaked_answer."
        },
    )
    drop_several: bool = field(
        default=False,
        metadata={"help": "Drop completions that box different answers: several_answers."},
    )


Finding = tuple[str, str]  # the reason, and what was measured
Filter = Callable[[Row, Transcript], Finding | None]
Bounds = tuple[int | None, int | None]

# In the order in which they are looked for.
REASONS = (
    "too_short",
    "too_long",
    "repetition",
    "language",
    "long_paragraph",
    "code",
    "leaked_answer",
    "several_answers",
)

_PARTS = [(tags.reasoning_open, tags.reasoning_close) for tags in PRESETS.values()]
_TAGS = re.compile("|".join(re.escape(tag) for tags in PRESETS.values() for tag in tags.all))
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SAID = re.compile(r"\b(?:answer|result)\s+(?:is|must be|should be|will be|=|:)\s*(.+)", re.I)
_FIRST = re.compile(r".+?(?:[.!?](?=\s)|\n|$)", re.DOTALL)
OPENING = 200  # characters of a first sentence


def parts(completion: str) -> Transcript:
    """Return reasoning and answer of any completion; without tags all of it is reasoning."""
    for opening, closing in _PARTS:
        before, closed, after = completion.partition(closing)
        if closed:
            return Transcript(before.partition(opening)[2] or before, _TAGS.sub("", after))
    return Transcript(_TAGS.sub("", completion), "")


def filters(args: FilterArgs) -> list[Filter]:
    """Return the filters that are on, in the order of `REASONS`; raise `InputError` for nonsense.

    Each takes a Sample and its parts, and returns a finding against it, or None.
    """
    _check(args)
    made: list[Filter] = []
    tokens = args.min_completion_tokens, args.max_completion_tokens
    characters = args.min_reasoning_chars, args.max_reasoning_chars
    if any(bound is not None for bound in (*tokens, *characters)):
        made.append(lambda row, said: _length(row, said, tokens, characters))
    if args.max_repetition is not None and args.max_repetition < 1:
        most = args.max_repetition
        made.append(lambda row, said: _repeats(said.reasoning, most))
    if args.min_language:
        made.append(lambda row, said: _mixes(row, said.reasoning, args))
    if args.max_paragraph_chars:
        longest = args.max_paragraph_chars
        made.append(lambda row, said: _rambles(said.reasoning, longest))
    if args.drop_code:
        made.append(lambda row, said: _codes(said.reasoning))
    if args.drop_leaked:
        made.append(lambda row, said: _leaks(row, said))
    if args.drop_several:
        made.append(lambda row, said: _several(row["completion"]))
    return made


def _check(args: FilterArgs) -> None:
    for name in ("max_repetition", "min_language"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{name}: expected a share from 0 to 1, found {value}")
    for what in ("completion_tokens", "reasoning_chars"):
        least, most = getattr(args, f"min_{what}"), getattr(args, f"max_{what}")
        for name, value in ((f"min_{what}", least), (f"max_{what}", most)):
            if value is not None and value < 0:
                raise InputError(f"{name}: expected 0 or more, found {value}")
        if least is not None and most is not None and least > most:
            raise InputError(f"min_{what} ({least}) is more than max_{what} ({most})")
    if args.language is not None:
        scripts_of(args.language)
    if args.language_vote:
        check_vote(args.language)


def _length(row: Row, said: Transcript, tokens: Bounds, characters: Bounds) -> Finding | None:
    if tokens != (None, None) and row.get("tokens") is None:
        raise InputError(
            f"sample {row.get('sample')} of {row.get('id')} has no count of tokens: leave "
            "min_completion_tokens and max_completion_tokens out, or use *_reasoning_chars"
        )
    for found, unit, (least, most) in (
        (row.get("tokens") or 0, "tokens", tokens),
        (len(said.reasoning), "characters of reasoning", characters),
    ):
        if least is not None and found < least:
            return "too_short", f"{found} {unit}"
        if most is not None and found > most:
            return "too_long", f"{found} {unit}"
    return None


def _repeats(reasoning: str, most: float) -> Finding | None:
    found = repetition(reasoning)
    return ("repetition", f"{found:.0%} repeats itself") if found > most else None


def _mixes(row: Row, reasoning: str, args: FilterArgs) -> Finding | None:
    asked = "" if args.language else _asked(row)
    right = language_share(reasoning, args.language, asked)
    least = args.min_language or 0.0
    if right < least:
        return "language", f"{right:.0%} of the words are in the script asked for"
    if args.language_vote and args.language:
        right = voted_share(reasoning, args.language)
        if right < least:
            return "language", f"{right:.0%} of the words are in paragraphs of {args.language}"
    return None


def _asked(row: Row) -> str:
    turns = [turn["content"] for turn in row.get("prompt") or () if turn["role"] == "user"]
    return turns[-1] if turns else ""


def _rambles(reasoning: str, longest: int) -> Finding | None:
    found = max(len(paragraph.strip()) for paragraph in _PARAGRAPH.split(reasoning))
    return ("long_paragraph", f"{found} characters in a paragraph") if found > longest else None


def _codes(reasoning: str) -> Finding | None:
    found = code_block(reasoning)
    return None if found is None else ("code", found)


def _leaks(row: Row, said: Transcript) -> Finding | None:
    """Look for the final answer in the first sentence of a reasoning that goes on after it."""
    reasoning = said.reasoning.strip()
    first = _FIRST.match(reasoning[:OPENING])
    if first is None or len(reasoning) < 2 * len(first[0]):
        return None
    answer = _bare(str(row.get("extracted") or said.answer or row.get("answer") or ""))
    opening = first[0].strip()
    claimed = [opening, *_SAID.findall(opening)]
    if answer and any(_bare(text) == answer for text in claimed):
        return "leaked_answer", f"opens with {opening[:60]!r}"
    return None


def _several(completion: str) -> Finding | None:
    if completion.count("\\boxed") < 2:
        return None
    found = boxes(completion)
    different = {_bare(text) for text in found} if found else set()
    if found is None or len(different) > 1:
        return "several_answers", "boxes: " + ", ".join(sorted(different))[:60]
    return None


def _bare(text: str) -> str:
    return squeeze(clean(text.strip().rstrip(".!"))).casefold()
