"""The picture's rails lead from what is made to what takes it."""

from __future__ import annotations

from types import SimpleNamespace

from chainforge.report.lineage import EDGE, GAP, lay_out


def stage(name, recipe="sft", **inputs):
    return SimpleNamespace(name=name, recipe=recipe, inputs=inputs, funnel=None)


def drawn(*stages):
    nodes, width = lay_out(stages)
    return {node.name: node for node in nodes}, width


def lane(x):
    return (x - EDGE) // GAP


def test_a_line_of_stages_is_one_straight_rail():
    nodes, width = drawn(stage("a"), stage("b", model="a"), stage("c", model="b"))
    assert {node.x for node in nodes.values()} == {EDGE}
    assert width == 2 * EDGE
    assert [rail.shape for rail in nodes["b"].rails] == ["in", "down"]
    assert [rail.shape for rail in nodes["c"].rails] == ["in"]


def test_models_from_outside_stand_before_what_takes_them_first():
    stages = [
        stage("traces", "collect"),
        stage("cold", model="base", data="traces"),
        stage("mixed", model="base", data="traces"),
        stage("student", model="small", data="mixed"),
    ]
    nodes, width = drawn(*stages)
    assert list(nodes) == ["traces", "base", "cold", "mixed", "small", "student"]
    assert nodes["base"].stage is None
    assert [rail.data for rail in nodes["traces"].rails] == [True]
    assert [rail.data for rail in nodes["base"].rails if rail.shape == "down"] == [False]
    # Both go by `cold` and into it, and end at `mixed`.
    assert sorted(rail.shape for rail in nodes["cold"].rails) == ["in", "in", "whole", "whole"]
    assert sorted(rail.shape for rail in nodes["mixed"].rails) == ["down", "in", "in"]
    assert lane(nodes["mixed"].x) == lane(nodes["base"].x)  # the model goes straight on
    assert all(0 <= rail.x <= width for node in nodes.values() for rail in node.rails)


def test_every_rail_ends_where_it_is_taken_last_and_none_crosses_a_node():
    stages = [stage("a"), stage("b"), stage("c", model="a"), stage("d", model="b"),
              stage("e", model="c", data="d"), stage("f", model="a")]  # fmt: skip
    nodes, _ = lay_out(stages)
    open_rails: dict[int, int] = {}  # by place: the colour that comes down there
    for node in nodes:
        above = {rail.x: rail.colour for rail in node.rails if rail.shape in ("in", "whole")}
        assert above == open_rails, node.name
        below = [rail for rail in node.rails if rail.shape in ("whole", "down")]
        assert len({rail.x for rail in below}) == len(below), node.name
        assert node.x not in {rail.x for rail in node.rails if rail.shape == "whole"}, node.name
        open_rails = {rail.x: rail.colour for rail in below}
    assert open_rails == {}


def test_evaluations_are_rows_without_rails():
    nodes, _ = drawn(stage("a"), stage("scores", "evaluate", **{"models.a": "a", "models.b": "b"}))
    assert list(nodes) == ["a", "scores"]
    assert nodes["a"].rails == []
    assert nodes["scores"].rails == []
