"""A stage's file that is torn, or holds something else, is named; it raises nothing else."""

import contextlib
import json
import random

import pytest
from chains import answered, question, rows, tiny

from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.generate.sampling import sample
from chainforge.report.html import write_report

VALUES = [None, [], {}, "x", "", True, -1, 0, 1.5, 1e308, 10**400, float("nan"), [[]]]
VALUES += [{"a": {}}, ["x", None], "\x00\ud800"]
DEEP = "[" * 50_000


def places(value, path=()):
    """Yield the way to every value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(value, path, new):
    """Return a JSON value with another one at a place; `...` takes out what is there."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if path[1:] or new is not ...:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    else:
        del copy[path[0]]
    return copy


def mutate(text, lines, rng):
    """Tear a text, or put something else at one place in its JSON."""
    if rng.random() < 0.1:
        return rng.choice([text[: rng.randrange(len(text) + 1)], DEEP, "", "\x00", "NaN\n"])
    parts = text.splitlines() if lines else [text]
    number = rng.randrange(len(parts))
    value = json.loads(parts[number])
    path = rng.choice(list(places(value)))
    new = ... if path and rng.random() < 0.2 else rng.choice(VALUES)
    parts[number] = json.dumps(changed(value, path, new))
    return "\n".join(parts) + "\n"


def whole(root):
    """Write a chain with a file of each kind; return the files."""
    tiny(root)
    (root / "rl/metrics.jsonl").unlink()  # the plots of one RL stage are enough
    chain = json.loads((root / "chain.json").read_text())
    gates = [{"metric": "accuracy", "min": 0.2}, {"beats": "cold_start", "p": 0.5}]
    models = {f"models.{name}": name for name in ("base", "cold_start", "rl", "rl_final")}
    chain["stages"][-1] |= {"gate": gates, "inputs": models}
    chain["stages"].append({"name": "more", "recipe": "collect", "inputs": {"model": "rl_final"}})
    write_json(root / "chain.json", chain)
    more = root / "more"
    started = {"recipe": "collect", "fingerprint": "ab", "given": {}, "inputs": {"model": "cd"}}
    write_json(more / "stage.json", started)
    write_json(more / "progress.json", {"done": 1, "total": 3, "unit": "rows", "note": "a"})
    alarms = [{"step": 3, "rule": "kl", "action": "warn", "seen": "kl 3", "means": "m"}]
    rows(root / "rl_final", "health.jsonl", alarms)
    steps = [(step, i) for step in (1, 2) for i in range(2)]
    rolled = [answered(question(1), "rl_final", True, i, step=s, reward=0.5) for s, i in steps]
    rows(root / "rl_final", "rollouts.jsonl", rolled)
    teacher = sample(question(3), "x", 0, source="teacher", drop=None, correct=None, reward=1.0)
    rows(more, "samples.jsonl", [teacher])
    return sorted(path for path in root.rglob("*.json*") if path.is_file())


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_in_a_file_the_report_is_written_or_the_file_named(tmp_path, seed):
    rng = random.Random(seed)
    files = whole(tmp_path / "tiny")
    write_report(tmp_path / "tiny")
    for file in files:
        before = file.read_bytes()
        text = mutate(before.decode(), file.suffix == ".jsonl", rng)
        file.write_text(text, encoding="utf-8", errors="replace")
        with contextlib.suppress(InputError):
            write_report(tmp_path / "tiny")
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["samples.jsonl", "rollouts.jsonl", "metrics.jsonl"])
def test_a_file_that_is_being_written_or_is_gone_does_not_cost_the_report(chain, name):
    stage = chain / ("eval" if name == "samples.jsonl" else "rl_final")
    rows(stage, name, [answered(question(i), "rl_final", True, step=1) for i in range(4)])
    with open(stage / name, "ab") as file:
        file.write(b'{"id": "torn')
    assert b"torn" not in write_report(chain).read_bytes()
    (stage / name).unlink()
    write_report(chain)
