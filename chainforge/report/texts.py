"""One prompt and what was written for it, as the report shows it: split, marked, never too long."""

from __future__ import annotations

from dataclasses import dataclass

from chainforge.core.jsonl import Row, question
from chainforge.core.transcript import PRESETS, read
from chainforge.report.rows import finite

LONGEST = 4000  # characters of one text before its middle is left out
MARKUP = 420  # bytes that the page needs around each text
# What turns the direction of the text around it is shown, not obeyed.
TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Text:
    """One completion as the page shows it; `stage` wrote it, `label` tells it from others."""

    label: str
    stage: str
    reasoning: str  # empty when the text is not a transcript; then `answer` is all of it
    answer: str
    verdict: str  # right | wrong | form | unknown | none
    fate: str  # kept | dropped: <reason> | empty
    note: str

    @property
    def size(self) -> int:
        """About how many bytes of the page it takes."""
        return MARKUP + len((self.reasoning + self.answer).encode("utf-8", "replace"))


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
        """About how many bytes of the page it takes."""
        own = 2 * MARKUP + len((self.question + self.gold).encode("utf-8", "replace"))
        return own + sum(text.size for text in self.texts)


def case_of(where: str, kind: str, row: Row, texts: list[Text]) -> Case:
    """Show the prompt of a row with some texts."""
    try:
        asked = str(question(row))
    except (KeyError, TypeError, AttributeError):  # a prompt that is no list of messages
        asked = str(row.get("prompt", ""))
    gold, task = str(row.get("answer") or ""), str(row.get("task", ""))
    return Case(where, kind, _shorten(asked), _shorten(gold), task, texts)


def text_of(row: Row, label: str, stage: str) -> Text:
    """Show the completion of a Sample."""
    completion = str(row.get("completion") or "")
    transcript = next((t for preset in PRESETS if (t := read(completion, preset))), None)
    notes = []
    if row.get("tokens") is not None:
        notes.append(f"{row['tokens']} tokens")
    if (reward := finite(row.get("reward"))) is not None:
        notes.append(f"reward {reward:.3g}")
    if row.get("finish_reason") == "length":
        notes.append("cut at the length limit")
    if transcript is None:
        notes.append("not in the transcript form")
    if row.get("source") not in (None, "policy"):
        notes.append(f"by {row['source']}")
    return Text(
        label=label,
        stage=stage,
        reasoning=_shorten(transcript.reasoning) if transcript else "",
        answer=_shorten(transcript.answer if transcript else completion),
        verdict=_verdict(row),
        fate=f"dropped: {row['drop']}" if row.get("drop") else "kept" if "drop" in row else "",
        note=", ".join(notes),
    )


def _verdict(row: Row) -> str:
    if "correct" not in row:
        return "none"
    if row["correct"] is None:
        return "unknown"
    if row["correct"]:
        return "right"
    return "form" if row.get("lenient_correct") else "wrong"


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
