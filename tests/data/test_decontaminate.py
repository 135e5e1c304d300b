"""Whether copies of mathematical problems are found in other surroundings, and no others."""

import json
import re
from pathlib import Path

import pytest
from planted import Maker

from chainforge.core.errors import InputError
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.sources import question
from chainforge.data.tasks import TaskArgs, load_examples

# Problems as competitions set them: short and long, with formulas and units.
LIST = Path(__file__).with_name("problems.txt").read_text().splitlines()
FORMULA = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|(?<!\\)\$(?:\\.|[^$\\])+\$", re.DOTALL)


def formulas(change):
    return lambda text: FORMULA.sub(lambda match: change(match[0]), text)


def swap(*pairs):
    def change(text):
        for old, new in pairs:
            text = re.sub(old, new, text)
        return text

    return change


def delimiters(opening, closing):
    marks = re.compile(r"^(?:\$\$?|\\\[)|(?:\$\$?|\\\])$")
    return formulas(lambda formula: opening + marks.sub("", formula) + closing)


CHANGES = {
    "dfrac": swap((r"\\frac", r"\\dfrac")),
    "blanks added": formulas(swap((r"([-+=<>()])", r" \1 "))),
    "thin spaces": formulas(swap((r"([=+])", r"\\,\1\\!"))),
    "brackets for dollars": delimiters(r"\(", r"\)"),
    "display": delimiters("$$", "$$"),
    "left and right": formulas(swap((r"(?<![\\t])\(", r"\\left("), (r"(?<!\\)\)", r"\\right)"))),
    "display style": formulas(swap((r"^(\$+|\\\[)", r"\1\\displaystyle "))),
    "commands": swap((r"\\le\b", r"\\leqslant"), (r"\\cdot\b", r"\\times")),
    "thousands": swap((r"(\d),\\!(?=\d)", r"\1,"), (r"\b(\d)(\d{3})\b", r"\1,\2")),
    "punctuation": swap((r"[,;](?=\s)", ""), (r"\?", " ?")),
    "capitals": lambda text: text.upper().replace(". ", ".\n") if "\\" not in text else text,
    "instructions": lambda text: f"Solve this problem.\n\n{text}\n\nThink step by step.",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_in_another_spelling_is_found(name):
    copies = [CHANGES[name](text) for text in LIST]
    hits = Screen([("math", text) for text in LIST]).screen([("train", text) for text in copies])
    changed = sum(copy != text for copy, text in zip(copies, LIST, strict=True))
    missed = [copy for copy, hit in zip(copies, hits, strict=True) if hit is None]
    assert changed >= 1
    assert len(missed) <= 0.03 * changed, missed


def test_other_problems_are_not_found():
    make = Maker(seed=7)
    others = [make.question() for _ in range(1000)]
    others += [re.sub(r"\d+", lambda m: str(int(m[0]) + 1), text) for text in LIST
               if re.search(r"\d", text) and "[asy]" not in text]  # fmt: skip
    others += [f"Find $x$ if $3^{{x+{n}}} = 9^{{2x-{n}}}$." for n in range(9)]
    others += [r"Simplify $\sqrt{50} - \sqrt{18}$.", r"Find $f(x)$. What is the value of $x$?"]
    hits = Screen([("math", text) for text in LIST]).screen([("train", text) for text in others])
    assert [(text, hit) for text, hit in zip(others, hits, strict=True) if hit] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("Calculate 3 * ( 4 + 5 ).", "Calculate 3 * 4 + 5."), ("What is 8 + 9 - 7?", "What is 8 + 9 - 7 - 4?"),
     ("How many legs do you have with 1 cat?", "How many legs do you have with 1 cat, 2 dogs?"),
     ("Ana has 3 red hats and 5 blue ones. How many hats has she got in all?",
      "Ana has 3 red hats and 6 blue ones. How many hats has she got in all?")],
)  # fmt: skip
def test_another_problem_in_the_same_words_is_no_leak(one, other):
    assert Screen([("exam", one)]).screen([("", other)]) == [None]
    (hit,) = Screen([("exam", one)]).screen([("", f"Solve this.\n{one} Show your work, please.")])
    assert hit == f"100% of exam: {one!r}"


SUMS = "{fn: reasoning_gym, params: {dataset: chain_sum, max_digits: 1}, size: 5, split: test}"
TASK = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum", "max_digits": 1}, "size": 5}
EXPECTED = [question(row) for row in load_examples(TaskArgs([TASK | {"split": "test"}]), seed=7)]


def test_what_names_an_evaluation(tmp_path):
    file = tmp_path / "scores.yaml"
    file.write_text(f"tasks:\n  - {SUMS}\nnum_samples: 4\n")
    for entry, source in (
        (SUMS, "reasoning_gym"),
        (TASK | {"split": "test"}, "reasoning_gym"),
        (str(file), "scores.yaml"),
    ):
        assert evaluation_questions([entry], 7) == [(source, text) for text in EXPECTED]
    assert evaluation_questions([str(file)], 8) != evaluation_questions([str(file)], 7)
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]}
    (tmp_path / "bench").mkdir()
    for name, answer in (("test", "1"), ("train", "2")):
        line = json.dumps(row | {"answer": answer}) + "\n"
        (tmp_path / "bench" / f"{name}.jsonl").write_text(line)
    jsonl, folder = str(tmp_path / "bench/test.jsonl"), str(tmp_path / "bench")
    assert evaluation_questions([jsonl, folder], 0) == [("test.jsonl", "Why?"), (folder, "Why?")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gone.jsonl", r"decontaminate\[0\]: .*gone.jsonl: no such file"),
        ("{fn}", "the key 'fn' is missing"),
        ("me/no-such-data", "cannot load 'me/no-such-data'"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("odd.jsonl", "no column 'question', but id"),
        ("sft.yaml", "has no `tasks`"),
    ],
)
def test_what_names_no_evaluation(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("odd.jsonl").write_text('{"id": 1}\n')
    Path("sft.yaml").write_text("max_steps: 3\n")
    with pytest.raises(InputError, match=message):
        evaluation_questions([entry], 0)
