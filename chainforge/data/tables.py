"""The built-in task `jsonl`, and how the columns of any table become an Example's."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import is_blank
from chainforge.data.salvage import SHARE, salvage, settle
from chainforge.rewards.answers import boxed_answers

EXTRACTS = ("text", "hashes", "boxed")
# Under these names others keep the gold answer: a file that has one was meant to have answers.
ANSWERS = ("solution", "answers", "final_answer", "gold", "target", "label", "ground_truth",
           "expected", "expected_answer", "output", "reference")  # fmt: skip


def wrong_turns(turns: Any) -> str | None:
    """Return what keeps a value from being a prompt; None when it is one."""
    if turns is None:
        return "neither `question` nor `prompt`"
    if not isinstance(turns, list) or not turns:
        return f"the prompt must be a list of messages, found {turns!r:.80}"
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            return f"a message must be {{role, content}}, found {turn!r:.80}"
        if not isinstance(turn["content"], str) or is_blank(turn["content"]):
            return f"the {turn['role']} turn must be text, found {turn['content']!r:.80}"
    if turns[-1]["role"] != "user":
        return f"the last turn must be the user's, found {turns[-1]['role']!r}"
    return None


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a table keeps what an Example needs."""

    question: str = "question"
    answer: str = "answer"
    prompt: str | None = None
    verifier: str | None = None
    extract: str = "text"
    keep: list[str] | None = None

    def __post_init__(self) -> None:
        if self.extract not in EXTRACTS:
            raise InputError(f"extract: {self.extract!r} is none of {', '.join(EXTRACTS)}")

    def without_answers(self, raws: Iterable[Any]) -> bool:
        """Return whether a table holds prompts alone, not answers under a name of its own."""
        own = {self.answer, *ANSWERS}
        return self.answer == "answer" and not any(
            isinstance(raw, dict) and own & raw.keys() for raw in raws
        )

    def row(self, raw: Any, prompts_only: bool = False) -> Row:
        """Return a table's row as one of a task; raise `InputError` saying what is wrong."""
        if not isinstance(raw, dict):
            raise InputError(f"a {type(raw).__name__}, not a mapping")
        # Rows that are Examples already have messages and no question.
        messages = self.prompt or ("prompt" if self.question not in raw and "prompt" in raw else "")
        asked = messages or self.question
        self._check(raw, "prompt" if messages else "question", asked)
        if not prompts_only:
            self._check(raw, "answer", self.answer)
        for name in self.keep or ():
            self._check(raw, "keep", name)
        # A prompt may be a text, too: `{"prompt": "Explain entanglement"}`.
        is_text = not messages or isinstance(raw[asked], str)
        turns = [{"role": "user", "content": raw[asked]}] if is_text else raw[asked]
        if wrong := wrong_turns(turns):
            raise InputError(f"column {asked!r}: {wrong}")
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        verifier = self.verifier or raw.get("verifier") or "math"
        keep = raw.keys() if self.keep is None else self.keep
        extra = {key: raw[key] for key in keep if key not in (asked, self.answer)}
        if "id" in extra:  # an Example's id is the hash of its content
            extra["source_id"] = extra.pop("id")
        answer = raw.get(self.answer)
        answer = None if answer is None else self._answer(answer)
        return extra | {"prompt": turns, "answer": answer, "verifier": verifier}

    def _check(self, raw: Row, key: str, name: str) -> None:
        """Raise `InputError` when the column that `key` names is not there."""
        if name not in raw:
            there = ", ".join(map(str, raw))
            raise InputError(f"no column {name!r}, but {there}; name yours in params, as `{key}:`")

    def _answer(self, value: Any) -> str:
        """Return the gold answer as text."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"column {self.answer!r}: expected text or a number, found {value!r}")
        text = _plain(value) if isinstance(value, float) else str(value).strip()
        if self.extract == "hashes":  # gsm8k: the solution, then #### and the number
            text = text.rpartition("####")[2].strip() if "####" in text else ""
            text = _THOUSANDS.sub("", text)
        elif self.extract == "boxed":  # MATH: the box of the solution, or several
            try:
                text = ", ".join(boxed_answers(text))
            except ValueError as error:
                raise InputError(f"column {self.answer!r}: {error} in {_shown(value)}") from None
        if is_blank(text) or text in ("nan", "inf", "-inf"):
            raise InputError(
                f"column {self.answer!r}: no answer ({self.extract}) in {_shown(value)}"
            )
        return text


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _plain(value: float) -> str:
    """Write a number of JSON as people do: 0.00001, not 1e-05."""
    written = repr(value)
    small = "e" in written and abs(int(written.partition("e")[2])) <= 30
    return format(Decimal(written), "f") if small else written


def _shown(value: Any) -> str:
    return repr(value) if len(str(value)) < 60 else f"...{str(value)[-50:]!r}"


def jsonl(
    path: str,
    *,
    size: int | None = None,
    seed: int = 0,
    question: str = "question",
    answer: str = "answer",
    prompt: str | None = None,
    verifier: str | None = None,
    extract: str = "text",
    keep: list[str] | None = None,
    max_bad_rows: float = SHARE,
) -> list[Row]:
    """Read a file of JSON lines; `question` (or `prompt`, messages) and `answer` name its columns.

    A column `verifier` counts unless one is given here; other columns are kept (`keep`: only
    these). A file without answers holds prompts for rewards that need none. With a `size` the rows
    are drawn by `seed`. Malformed rows, and rows with the `id` of an earlier one, are left out and
    written to the stage's rejects; more than the share `max_bad_rows` of them raises `InputError`.
    """
    columns = Columns(question, answer, prompt, verifier, extract, keep)
    found = salvage(path, unique="id")
    if not found.rows and not found.faults:
        raise InputError(f"{path} is empty: expected one JSON object a line")
    rows: list[Row] = []
    prompts_only = columns.without_answers(raw for _, raw in found.rows)
    for number, raw in found.rows:
        try:
            rows.append(columns.row(raw, prompts_only))
        except InputError as error:
            found.faults.append((number, str(error)))
    total = len(rows) + len(found.faults)
    settle(Path(path), found.faults, total, max_bad_rows)
    name = Path(path).stem
    return draw([{"task": name} | row for row in rows], size, seed)


def convert(
    raws: Iterable[tuple[str, Any]], columns: Columns, prompts_only: bool = False
) -> tuple[list[Row], list[str]]:
    """Return the rows that could be read, and for each other one where and why not."""
    rows: list[Row] = []
    wrong: list[str] = []
    for label, raw in raws:
        try:
            rows.append(columns.row(raw, prompts_only))
        except InputError as error:
            wrong.append(f"{label}: {error}")
    return rows, wrong


def listed(wrong: list[str]) -> str:
    """Return the first few complaints, one a line."""
    more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return "\n  " + "\n  ".join(wrong[:5]) + more


def draw(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    """Put rows in random order when only some are wanted: files are often sorted."""
    return rows if size is None else random.Random(seed).sample(rows, len(rows))
