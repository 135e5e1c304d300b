"""Lay out which stage was made from which: a rail for each model and data set, as in `git log`.

A row is a stage or a model from outside, in the order in which they run. A rail leaves the row that
makes something and ends at the last that takes it. Evaluations take every model; their rails would
hide the others and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainforge.report.evidence import StageEvidence

GAP, EDGE, NODE = 18, 14, 26  # between rails, left of the first, down to a row's node; in pixels
COLOURS = 6  # that the style sheet has


@dataclass(frozen=True)
class Rail:
    """A line of one row: through the `whole` row, `down` from its node, or `in`to it."""

    shape: str
    path: str
    x: int
    colour: int
    data: bool


@dataclass
class Node:
    """A row of the picture: a stage, or a model from outside (`stage` is None)."""

    name: str
    stage: StageEvidence | None = None
    x: int = 0
    rails: list[Rail] = field(default_factory=list)


@dataclass
class _Lane:
    """What a rail carries while it is in use, and which row takes it last."""

    name: str
    last: int
    colour: int
    data: bool


def name_inputs(stages: Sequence[StageEvidence]) -> None:
    """Find what each stage is made from, by fingerprint, where nobody said it; and
    call a stage stale that was made from what has been made anew since.
    """
    made = {s.manifest.fingerprint: s.name for s in stages if s.manifest}
    for stage in stages:  # an evaluation names the models from outside, too
        for role, value in stage.prints.items():
            if role.startswith("models."):
                made.setdefault(value, role.removeprefix("models."))
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        prints = stage.prints
        if not stage.inputs:
            stage.inputs = {
                role: made.get(value) or _outside(role, value) for role, value in prints.items()
            }
        for role, name in stage.inputs.items():
            source = by_name.get(name)
            if stage.state != "done" or source is None or role not in prints:
                continue
            if source.manifest is None or source.manifest.fingerprint != prints[role]:
                stage.state, stage.note = "stale", f"made from an earlier {name}"


def _outside(role: str, fingerprint: str) -> str:
    """Name what no stage made: a Hub id, or a local model or file by its hash."""
    if fingerprint.startswith("hub:"):
        return fingerprint.removeprefix("hub:")
    return f"{role.partition('.')[0]} {fingerprint[:8]}"


def lay_out(stages: Sequence[StageEvidence]) -> tuple[list[Node], int]:
    """Return the rows with their rails, and the width of all rails in pixels."""
    nodes = _nodes(stages)
    rows = {node.name: number for number, node in enumerate(nodes)}
    last: dict[str, int] = {}
    for node in nodes:
        for name in _sources(node):
            last[name] = rows[node.name]
    lanes: list[_Lane | None] = []
    widest, colour = 1, 0
    for number, node in enumerate(nodes):
        taken = _sources(node)
        before = list(lanes)
        ending = [i for i, lane in enumerate(lanes) if lane and lane.name in taken
                  and lane.last == number]  # fmt: skip
        for i in ending:
            lanes[i] = None
        straight = [i for i in ending if (lane := before[i]) and not lane.data] + ending
        at = straight[0] if straight else _free(lanes)
        node.x = _x(at)
        node.rails = [
            _rail(i, at, lane, lane.name in taken, i in ending)
            for i, lane in enumerate(before)
            if lane
        ]
        # A rail that both serves this row and goes on is drawn twice: into the node and past it.
        node.rails += [
            _whole(i, lane) for i, lane in enumerate(before)
            if lane and lane.name in taken and i not in ending
        ]  # fmt: skip
        if node.name in last and last[node.name] > number:
            data = node.stage is not None and _leaves_data(node.stage)
            lane = _Lane(node.name, last[node.name], colour % COLOURS, data)
            colour += 1
            lanes += [None] * (at + 1 - len(lanes))
            lanes[at] = lane
            node.rails.append(Rail("down", "", _x(at), lane.colour, data))
        widest = max(widest, at + 1, sum(1 for _ in before))
    return nodes, 2 * EDGE + GAP * (widest - 1)


def _nodes(stages: Sequence[StageEvidence]) -> list[Node]:
    """List the stages, and before the first that takes it each model from outside."""
    own = {stage.name for stage in stages}
    nodes: list[Node] = []
    seen: set[str] = set()
    for stage in stages:
        for name in _sources(Node(stage.name, stage)):
            if name not in own | seen:
                seen.add(name)
                nodes.append(Node(name))
        nodes.append(Node(stage.name, stage))
    return nodes


def _sources(node: Node) -> list[str]:
    """Return what a row takes, evaluations' models left out, once each."""
    inputs = node.stage.inputs if node.stage else {}
    return list(dict.fromkeys(n for role, n in inputs.items() if not role.startswith("models.")))


def _leaves_data(stage: StageEvidence) -> bool:
    return stage.recipe in ("collect", "reject") or stage.funnel is not None


def _free(lanes: Sequence[_Lane | None]) -> int:
    return next((i for i, lane in enumerate(lanes) if lane is None), len(lanes))


def _x(lane: int) -> int:
    return EDGE + GAP * lane


def _whole(number: int, lane: _Lane) -> Rail:
    return Rail("whole", "", _x(number), lane.colour, lane.data)


def _rail(number: int, at: int, lane: _Lane, taken: bool, ends: bool) -> Rail:
    """Draw what a rail does in a row: it goes by, or bends into the node."""
    if not taken:
        return _whole(number, lane)
    a, b = _x(number), _x(at)
    path = f"M{a} 0C{a} {NODE * 2 // 3} {b} {NODE // 3} {b} {NODE}"
    return Rail("in", path, a, lane.colour, lane.data)
