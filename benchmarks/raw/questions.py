"""Questions and verdicts as one writes them by hand: reasoning-gym, a split, a regular expression.

`tasks.json` lists what to ask: `[{"dataset": "chain_sum", "params": {...}, "size": 1000, "seed": 1,
"split": "train"}, ...]`.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import reasoning_gym

FORM = re.compile(
    r"\s*<reasoning_process>(?P<reasoning>.*?)</reasoning_process>"
    r"\s*<summary>(?P<answer>.*?)</summary>\s*",
    re.DOTALL,
)


def load(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file of tasks: `prompt`, `question` and `answer`."""
    return [row for task in json.loads(Path(path).read_text()) for row in ask(**task)]


def ask(
    dataset: str, params: dict[str, Any], size: int, seed: int, split: str
) -> list[dict[str, Any]]:
    """Return distinct questions of one split, which a hash of the text decides."""
    items = reasoning_gym.create_dataset(dataset, seed=seed, size=100 * size, **params)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for number in range(len(items)):
        item = items[number]
        text = " ".join(item["question"].lower().split())
        if text not in seen and part_of(text) == split:
            turns = [{"role": "user", "content": item["question"]}]
            rows.append({"prompt": turns, "question": text, "answer": str(item["answer"])})
            if len(rows) == size:
                break
        seen.add(text)
    return rows


def part_of(text: str) -> str:
    """Return the split of a question."""
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 20 else "validation" if bucket < 25 else "train"


def formatted(text: str) -> bool:
    """Return whether a completion has the form: each tag once, and something between them."""
    found = FORM.fullmatch(text)
    once = all(text.count(f"<{end}{tag}>") == 1
               for tag in ("reasoning_process", "summary") for end in ("", "/"))  # fmt: skip
    return bool(found and once and found["reasoning"].strip() and found["answer"].strip())


def correct(text: str, answer: str) -> bool:
    """Return whether a well-formed completion gives the answer."""
    return formatted(text) and FORM.fullmatch(text)["answer"].strip() == answer  # type: ignore[index]
