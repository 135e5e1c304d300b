"""Completions to score: real ones of the quickstart, made ones with answers as in MATH and GSM8K.

Each row has a completion in the transcript's form with its answer in a box, a gold answer in a box
(the form that TRL's reward and ours both read), its kind, and whether it is right. Rows come in
groups of eight to one problem, as in GRPO. The same seed makes the same rows.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

from hostile import TRICKS, trick

from chainforge.core.jsonl import Row
from chainforge.core.transcript import write

REAL = Path(__file__).parent / "data/completions.jsonl.gz"
GROUP = 8
Problem = tuple[str, list[str], list[str]]  # a gold answer, right forms of it, wrong answers

_PROSE = (
    "we know that the total is given by adding each part so first let us write it down then we see "
    "that both sides agree which means the next value follows from the last one and because every "
    "term is positive there is only one way to continue hence it suffices to look at the remainder"
)
_WORDS = _PROSE.split()


def make(count: int, seed: int = 0, hostile: float = 0.0) -> list[Row]:
    """Return so many rows: a quarter real, a quarter as in GSM8K, half as in MATH, in groups."""
    rng = random.Random(seed)
    groups = real_groups(count // 4 // GROUP)
    for number in range(count // GROUP - len(groups)):
        kind = "money" if number < count // 4 // GROUP else rng.choices(*_WEIGHTS)[0]
        groups.append(made_group(rng, kind))
    rng.shuffle(groups)
    rows = [row for group in groups for row in group]
    for number in rng.sample(range(len(rows)), round(hostile * len(rows))):
        rows[number] = rows[number] | trick(rng.choice(list(TRICKS)), rng)
    return rows


def real_groups(count: int) -> list[list[Row]]:
    """Return groups that the quickstart's policy wrote in RL, each answer in a box."""
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [_boxed(json.loads(line)) for line in file]
    return [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)][:count]


def _boxed(row: Row) -> Row:
    head, tag, tail = row["completion"].partition("<summary>")
    answer, end, rest = tail.partition("</summary>")
    text = f"{head}{tag}\\boxed{{{answer}}}{end}{rest}" if tag and end else row["completion"]
    return {"kind": "real", "gold": f"\\boxed{{{row['answer']}}}", "right": row["correct"],
            "completion": text}  # fmt: skip


def made_group(rng: random.Random, kind: str) -> list[Row]:
    """Return a problem's completions, about six in ten of them right."""
    gold, right, wrong = _SHARES[kind][1](rng)
    rows = []
    for _ in range(GROUP):
        good = rng.random() < 0.6
        answer = rng.choice([gold, gold, *right] if good else wrong)
        text = write(reasoning(rng), f"The answer is $\\boxed{{{answer}}}$.")
        rows.append({"kind": kind, "gold": f"\\boxed{{{gold}}}", "right": good, "completion": text})
    return rows


def reasoning(rng: random.Random) -> str:
    """Return some lines of prose with mathematics between them, 200 to 2,000 characters."""
    lines = []
    for _ in range(rng.randint(2, 16)):
        words = " ".join(rng.choices(_WORDS, k=rng.randint(8, 20)))
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        lines.append(f"{words.capitalize()}: ${a} \\cdot {b} = {a * b}$.")
    return "\n".join(lines)


def _money(rng: random.Random) -> Problem:
    n = rng.randint(2, 20_000)
    return str(n), [f"{n:,}", f"\\${n}", f"{n}.00", f"x = {n}"], [str(n + 1), str(n * 2), f"-{n}"]


def _integer(rng: random.Random) -> Problem:
    n = rng.randint(-60, 900)
    return str(n), [str(n), f"{n}.0", f"n = {n}"], [str(n + rng.randint(1, 9)), str(-n - 1), "0.5"]


def _decimal(rng: random.Random) -> Problem:
    n = rng.randint(1, 99)
    return (f"{n / 100:.2f}", [f"\\frac{{{n}}}{{100}}", f".{n:02d}", f"{n}/100"],
            [f"{n / 10:.1f}", f"\\frac{{{n}}}{{10}}", str(n)])  # fmt: skip


def _fraction(rng: random.Random) -> Problem:
    a, b = rng.choice([(1, 2), (2, 3), (3, 7), (5, 12), (-4, 9), (11, 6), (7, 24), (-1, 8)])
    sign, top = ("-", -a) if a < 0 else ("", a)
    right = [f"{sign}\\dfrac{{{top}}}{{{b}}}", f"{a}/{b}", f"\\frac{{{a}}}{{{b}}}"]
    wrong = [f"\\frac{{{b}}}{{{top}}}", f"\\frac{{{top + 1}}}{{{b + 4}}}", str(b)]
    return f"{sign}\\frac{{{top}}}{{{b}}}", right, wrong


def _radical(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10, 13])
    right = [f"{a} \\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a}\\cdot\\sqrt{{{b}}}"]
    return f"{a}\\sqrt{{{b}}}", right, [f"{a + 1}\\sqrt{{{b}}}", f"{b}\\sqrt{{{a + 17}}}", str(a)]


def _root_fraction(rng: random.Random) -> Problem:
    a, b, c = rng.choice([2, 3, 5, 7]), rng.choice([2, 3, 5, 6]), rng.choice([4, 9, 11])
    right = [f"\\frac{{{a} \\sqrt{{{b}}}}}{{{c}}}", f"\\frac{{{a}}}{{{c}}}\\sqrt{{{b}}}"]
    wrong = [f"\\frac{{{c}\\sqrt{{{b}}}}}{{{a}}}", f"\\frac{{{a}\\sqrt{{{b + 9}}}}}{{{c}}}"]
    return f"\\frac{{{a}\\sqrt{{{b}}}}}{{{c}}}", right, wrong


def _surd(rng: random.Random) -> Problem:
    a, b, c = rng.randint(1, 9), rng.randint(2, 9), rng.choice([2, 3, 5, 7])
    right = [f"{b}\\sqrt{{{c}}} + {a}", f"{a} + {b} \\sqrt{{{c}}}"]
    return f"{a}+{b}\\sqrt{{{c}}}", right, [f"{a}-{b}\\sqrt{{{c}}}", f"{b}+{a + 9}\\sqrt{{{c}}}"]


def _pi(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 40), rng.choice([1, 1, 3, 5])
    gold = f"{a}\\pi" if b == 1 else f"\\frac{{{a}\\pi}}{{{b}}}"
    right = [f"{a} \\pi"] if b == 1 else [f"\\frac{{{a}}}{{{b}}}\\pi", f"\\frac{{{a} \\pi}}{{{b}}}"]
    return gold, right, [f"{a + 1}\\pi", str(a), f"\\frac{{\\pi}}{{{a}}}"]


def _point(rng: random.Random) -> Problem:
    a, b = rng.randint(-9, 9), rng.randint(10, 19)
    wrong = [f"({b},{a})", f"({a},{b + 1})", f"(0,{b})" if a else f"(1,{b})"]
    return f"({a},{b})", [f"({a}, {b})", f"\\left({a}, {b}\\right)"], wrong


def _polar(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 9), rng.choice([2, 3, 4, 6])
    gold = f"\\left( {a}, \\frac{{\\pi}}{{{b}}} \\right)"
    right = [f"\\left({a},\\frac{{\\pi}}{{{b}}}\\right)", f"({a}, \\pi/{b})"]
    return gold, right, [f"({a + 1}, \\frac{{\\pi}}{{{b}}})", f"({a}, \\frac{{2\\pi}}{{{b + 1}}})"]


def _interval(rng: random.Random) -> Problem:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    right = [f"[{a}, {b})", f"\\left[{a},{b}\\right)"]
    return f"[{a},{b})", right, [f"({a},{b})", f"[{a},{b}]", f"[{a},{b + 1})"]


def _union(rng: random.Random) -> Problem:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    right = [f"(-\\infty, {a}) \\cup ({b}, \\infty)",
             f"\\left(-\\infty,{a}\\right)\\cup\\left({b},\\infty\\right)"]  # fmt: skip
    wrong = [f"(-\\infty,{a}]\\cup({b},\\infty)", f"({a},{b})", f"(-\\infty,{a})"]
    return f"(-\\infty,{a})\\cup({b},\\infty)", right, wrong


def _set(rng: random.Random) -> Problem:
    a, b, c = sorted(rng.sample(range(-9, 20), 3))
    right = [f"\\{{{c}, {a}, {b}\\}}", f"\\{{{a}, {b}, {c}\\}}"]
    return f"\\{{{a},{b},{c}\\}}", right, [f"\\{{{a},{b}\\}}", f"\\{{{a},{b},{c + 1}\\}}"]


def _list(rng: random.Random) -> Problem:
    a, b = sorted(rng.sample(range(-20, 60), 2))
    return f"{a}, {b}", [f"{a},{b}"], [f"{a}, {b + 1}", str(a), f"{a - 1}, {b}"]


def _polynomial(rng: random.Random) -> Problem:
    r, s = rng.randint(1, 9), rng.randint(1, 9)
    gold = f"x^2+{r + s}x+{r * s}"
    right = [f"x^2 + {r + s}x + {r * s}", f"{r * s}+{r + s}x+x^2", f"(x+{r})(x+{s})"]
    return gold, right, [f"x^2+{r + s}x-{r * s}", f"x^2+{r + s + 1}x+{r * s}", f"x+{r}"]


def _expression(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{a}a-{b}", [f"{a}a - {b}", f"-{b}+{a}a"], [f"{a}a+{b}", f"{b + 10}a-{a}", f"{a}a"]


def _equation(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (f"y={a}x+{b}", [f"y = {a}x + {b}", f"y={b}+{a}x", f"{a}x+{b}"],
            [f"y={a}x-{b}", f"y={a + 1}x+{b}"])  # fmt: skip


def _power(rng: random.Random) -> Problem:
    a, b = rng.choice([2, 3, 5]), rng.randint(3, 9)
    right = [f"{a}^{{{b}}}", str(a**b)]
    return f"{a}^{b}", right, [f"{a}^{{{b + 1}}}", str(a * b), f"{b}^{{{a + 9}}}"]


def _degrees(rng: random.Random) -> Problem:
    n = rng.randint(10, 170)
    return f"{n}^\\circ", [str(n), f"{n}^{{\\circ}}"], [f"{n + 5}^\\circ", str(n - 5)]


def _unit(rng: random.Random) -> Problem:
    n, unit = rng.randint(2, 300), rng.choice(["cm", "hours", "square units", "feet", "mph"])
    right = [str(n), f"{n} \\text{{ {unit}}}", f"{n}\\mbox{{ {unit}}}"]
    return f"{n}\\text{{ {unit}}}", right, [f"{n + 1}\\text{{ {unit}}}", str(n * 2)]


def _percent(rng: random.Random) -> Problem:
    n = rng.randint(2, 98)
    return f"{n}\\%", [f"{n}%", str(n), f"{n}"], [f"{n + 1}\\%", f"{n * 10}\\%"]


def _text(rng: random.Random) -> Problem:
    right, *wrong = rng.sample(["Monday", "Evelyn", "parabola", "even", "blue", "ellipse"], 3)
    return f"\\text{{{right}}}", [right], [f"\\text{{{word}}}" for word in wrong]


def _letter(rng: random.Random) -> Problem:
    right, *wrong = rng.sample("ABCDE", 3)
    others = [f"\\text{{({letter})}}" for letter in wrong]
    return f"\\text{{({right})}}", [f"\\text{{{right}}}", right], others


def _base(rng: random.Random) -> Problem:
    n = rng.randint(5, 60)
    return f"{n:b}_2", [f"{n:b}_{{2}}"], [f"{n + 1:b}_2", f"{n:b}_3"]


def _matrix(rng: random.Random) -> Problem:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))
    gold = f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}"
    return gold, [gold.replace(" ", "").replace("\\\\", " \\\\ ")], [gold.replace(str(d), "17")]


def _complex(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 9), rng.randint(2, 9)
    return f"{a}+{b}i", [f"{b}i + {a}", f"{a} + {b}i"], [f"{a}-{b}i", f"{b + 10}+{a}i"]


# Per thousand; of MATH's answers about six in ten are whole numbers, one in ten a fraction.
_SHARES: dict[str, tuple[int, Callable[[random.Random], Problem]]] = {
    "integer": (560, _integer), "decimal": (30, _decimal), "fraction": (110, _fraction),
    "radical": (35, _radical), "root fraction": (20, _root_fraction), "surd": (15, _surd),
    "pi": (25, _pi), "point": (25, _point), "polar": (8, _polar), "interval": (20, _interval),
    "union": (10, _union), "set": (8, _set), "list": (20, _list), "polynomial": (25, _polynomial),
    "expression": (20, _expression), "equation": (8, _equation), "power": (8, _power),
    "degrees": (10, _degrees), "unit": (15, _unit), "percent": (8, _percent), "text": (10, _text),
    "letter": (8, _letter), "base": (6, _base), "matrix": (6, _matrix), "complex": (6, _complex),
    "money": (0, _money),  # GSM8K's
}  # fmt: skip
_WEIGHTS = (list(_SHARES), [share for share, _ in _SHARES.values()])
