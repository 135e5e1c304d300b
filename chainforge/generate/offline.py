"""A teacher that needs no network: it writes worked solutions to tasks that it can solve."""

from __future__ import annotations

import hashlib
import json
import random

from chainforge.core.errors import InputError, hint
from chainforge.core.jsonl import Row
from chainforge.core.transcript import write
from chainforge.generate.ledger import NOTHING, Amount


class OfflineTeacher:
    """Write solutions from the data set's own metadata, in several styles, as real teachers do."""

    def __init__(self, styles: dict[str, float], seed: int, transcript: str) -> None:
        from chainforge.data.solver import STYLES

        for name, share in styles.items():
            if name not in STYLES:
                raise InputError(f"styles: no style {name!r}; {hint(str(name), STYLES)}")
            if type(share) not in (int, float) or not 0 <= share < float("inf"):
                raise InputError(f"styles: {name}: expected a share from 0 up, found {share!r}")
        if not sum(styles.values()):
            raise InputError("styles: at least one needs a share above 0")
        self.styles, self.seed, self.transcript = styles, seed, transcript

    def check(self, examples: list[Row]) -> None:
        """Raise `InputError` for a task without a solver, before any work."""
        first = {row["task"]: row for row in reversed(examples)}
        for task, row in first.items():
            for style, share in self.styles.items():
                if share and self._solve(row, style, random.Random(0)) is None:
                    raise InputError(
                        f"the offline teacher has no solver for the task {task!r}; take a task "
                        "that it knows (chain_sum, gsm_symbolic, ...) or another teacher"
                    )

    metered = False

    def request_key(self, row: Row, index: int) -> str:
        """Return a hash of what decides the solution."""
        content = ["offline", row["id"], self.styles, self.seed, self.transcript, index]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    def worst(self, row: Row, *, longer: bool) -> Amount:
        """Return what it costs: nothing."""
        return NOTHING

    async def ask(self, row: Row, index: int, *, longer: bool = False) -> tuple[Row, Amount | None]:
        """Write a worked solution, as `answer` does."""
        return self.answer(row, index), NOTHING

    def answer(self, row: Row, index: int) -> Row:
        """Write a worked solution; the style is drawn by seed, row and index."""
        rng = random.Random(f"{self.seed}/{row['id']}/{index}")
        style = rng.choices(list(self.styles), list(self.styles.values()))[0]
        solved = self._solve(row, style, rng)
        if solved is None:
            raise InputError(f"the offline teacher cannot solve row {row['id']} of {row['task']!r}")
        reasoning, answer = solved
        return {
            "completion": write(reasoning, answer, self.transcript),
            "source": "offline",
            "teacher": "offline",
            "model": "offline",
            "sampling": {"style": style},
            "finish_reason": "stop",
            "tokens": None,
        }

    async def close(self) -> None:
        """Hold nothing, so there is nothing to let go."""

    def _solve(self, row: Row, style: str, rng: random.Random) -> tuple[str, str] | None:
        from chainforge.data.solver import solve

        if "entry" not in row:
            return None
        entry = json.loads(row["entry"])
        return solve(entry["metadata"]["source_dataset"], entry, style, rng)
