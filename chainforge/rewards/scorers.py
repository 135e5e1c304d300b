"""Scorers of reasoning-gym that compare two texts or two decimals, and do nothing else.

Most of its data sets have a scorer of their own, and some of these parse or run what the model
wrote: one of them needs minutes for a nine-digit number. Those belong into a judging process. The
others can be asked here, so that no such process, which takes two seconds to start, is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

Scorer = Callable[[str, dict[str, Any]], float]

# What the code of a scorer may name: a comparison of decimals, which takes any text.
_DECIMALS = {"utils", "compute_decimal_reward"}


def plain_scorer(dataset: str) -> Scorer | None:
    """Return the scorer of a data set if it is safe to call, else None.

    None, too, while reasoning-gym is not loaded in this process: importing it takes longer than
    asking the judges.
    """
    return _plain(dataset) if "reasoning_gym" in sys.modules else None


@lru_cache(maxsize=256)
def _plain(name: str) -> Scorer | None:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    kind = DATASETS[name][0] if name in DATASETS else None
    code = getattr(getattr(kind, "score_answer", None), "__code__", None)
    if kind is None or code is None:
        return None
    shared = kind.score_answer is ProceduralDataset.score_answer
    if not shared and set(code.co_names) != _DECIMALS:
        return None
    scorer = kind.score_answer

    def plain(answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(scorer(None, answer, entry))  # type: ignore[arg-type]
        except Exception:
            return 0.0  # as in a judging process: what a scorer chokes on is not the gold answer

    return plain
