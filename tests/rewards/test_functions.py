"""Accuracy, format, language and the cosine: what they pay for."""

import subprocess
import sys

import pytest

from chainforge.core.errors import InputError
from chainforge.core.transcript import PRESETS, write
from chainforge.rewards.answers import lenient_answer
from chainforge.rewards.functions import (
    accuracy_reward,
    format_reward,
    get_cosine_scaled_reward,
    language_consistency_reward,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_answer_part_is_scored_and_format_is_that_of_its_preset(preset):
    right = write("2 and 2 make 4.", "4", preset)
    assert accuracy_reward(right, "4", transcript=preset) == 1.0
    assert accuracy_reward(write("2 and 2 make 4.", "5", preset), "4", transcript=preset) == 0.0
    assert accuracy_reward(write("It is 5.", "4", preset), 4, transcript=preset) == 1.0
    assert [format_reward(text, preset) for text in (right, "4", "")] == [1.0, 0.0, 0.0]
    others = [name for name in PRESETS if PRESETS[name] != PRESETS[preset]]
    assert not any(format_reward(right, other) for other in others)


R, S = "<reasoning_process>{}</reasoning_process>", "<summary>{}</summary>"
UNREAD = [
    "4",
    r"\boxed{4}",
    R.format("4") + S.format("I do not know."),
    R.format(r"So \boxed{4}."),
    r"<reasoning_process>So \boxed{4}",
    R.format("Well.") + S.format("5") + S.format("4"),
    R.format("Well.") + S.format("4") + S.format("4"),
    R.format("") + S.format("4"),
    R.format("Well.") + S.format(""),
    S.format("4") + R.format("Well."),
    R.format("Well.") + S.format("4") + " or 5",
    "4 " + R.format("Well.") + S.format("4"),
    "",
]


@pytest.mark.parametrize("completion", UNREAD)
def test_what_is_no_transcript_earns_nothing(completion):
    assert accuracy_reward(completion, "4") == 0.0
    assert format_reward(completion) == float("I do not know." in completion)


def test_no_gold_answer_is_no_verdict_and_an_unknown_verifier_an_error():
    for gold in (None, "", "{"):
        assert accuracy_reward(write("Well.", "4"), gold) is None
    with pytest.raises(InputError, match="no verifier 'numerik'; did you mean 'numeric'"):
        accuracy_reward("x", "4", "numerik")


def test_nothing_of_trl_or_a_parser_is_imported():
    code = (
        "import sys; from chainforge.rewards.reward import *; load_rewards(RewardArgs(), "
        "{'answer'}); print({'trl', 'torch', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LANGUAGES = [
    ("We add two and two and get four.", "en", 1.0),
    ("We add $2+2$ and get \\boxed{4}: `print(x)`.", "en", 1.0),
    ("We add двa", "en", 2 / 3),
    ("我们把二和二相加得到四", "zh", 1.0),
    ("我们把 two 和 two 相加", "zh", 4 / 6),  # Two characters make about one word.
    ("设x=5，则 $y = 10$。", "zh", 1.0),
    ("C'est la vie à l'été", "fr", 1.0),
    ("二と二を足すとヨンになります", "ja", 1.0),
    ("दो और दो चार होते हैं", "hi", 1.0),
    ("สองบวกสองเท่ากับสี่", "th", 1.0),
    ("We add two and two.", "zh", 0.0),
    ("```python\nобъект = 1\n``` is code", "en", 1.0),
    ("x_1 and y2 and \\alpha", "en", 1.0),
    ("ℝ and 𝑥, $ℵ_0$, $x \\in ℝ$", "en", 1.0),
    # Prices are no formulas, and language is language also between the marks of a formula.
    ("costs $20, 但是今天打折, so he has $10 left", "en", 5 / 8),
    ("costs US$20 但是 $x=5$ left", "en", 3 / 4),
    ("We add $\\text{但是今天打折} = 5$ now", "en", 3 / 6),
    ("我们 $\\text{the area of the base} = 5$ 得到", "zh", 2 / 7),
    # Formulas are no language, spaced or not, on one line or several.
    ("三角形 $ABC$ 中 $ AB = CD $ 得 $\\sin x = \\text{area}$", "zh", 1.0),
    ("设 $$speed = 20$$ 和 \\begin{aligned} x &= y \\\\ ab &= 3 \\end{aligned} 得到", "zh", 1.0),
    ("设 $x =\n 20$，则 \\(abc\\) 得到", "zh", 1.0),
    ("A $20 note, and $x=1$, $10 more: $y = ab$ и", "en", 3 / 4),
]


@pytest.mark.parametrize(("reasoning", "language", "share"), LANGUAGES)
def test_language_is_the_share_of_its_words(reasoning, language, share):
    completion = write(reasoning, "4")
    assert language_consistency_reward(completion, language) == pytest.approx(share)


def test_only_the_reasoning_counts_for_language_and_an_unknown_one_is_named_with_the_nearest():
    assert language_consistency_reward(write("We add.", "四"), "en") == 1.0
    assert language_consistency_reward("We add.", "en") == 0.0
    assert language_consistency_reward(write("We add.", "4", "think"), transcript="think") == 1.0
    with pytest.raises(InputError, match="no language 'eng'; did you mean 'en'"):
        language_consistency_reward(write("We add.", "4"), "eng")


@pytest.mark.parametrize("text", ["$" * 50_000, "\\(" * 50_000, "`$" * 30_000, "a'" * 50_000])
def test_language_is_linear_in_hostile_text(text):
    assert 0.0 <= language_consistency_reward(write(text + "a", "4"), "en") <= 1.0


def test_the_cosine_is_trls_curve_where_the_answer_can_be_verified():
    from trl.rewards import get_cosine_scaled_reward as trls

    answers, lengths = ["4", "5", "4", "5", "4"], (0, 10, 50, 100, 900)
    ids = [[1] * length for length in lengths]
    theirs = [[{"role": "assistant", "content": f"\\boxed{{{a}}}"}] for a in answers]
    settings = {"max_len": 100, "min_value_wrong": -2.0}
    expected = trls(**settings)(completions=theirs, solution=["4"] * 5, completion_ids=ids)
    ours = get_cosine_scaled_reward(**settings)
    texts = [write("Well.", answer) for answer in answers]
    assert [ours(*pair, "4") for pair in zip(texts, ids, strict=True)] == pytest.approx(expected)
    assert ours(texts[0], [1], "") is None
    with pytest.raises(InputError, match="max_len"):
        get_cosine_scaled_reward(0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (R.format("3") + S.format("2"), "2"),
        ((R + S).format("r", "2") + (R + S).format("r", "3"), "3"),
        ("<summary>2", "2"),
        ("<reasoning_process>r 7</reasoning_process> 2", "2"),
        (r"so \boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1 + \boxed{2}} and \boxed{3", "2"),
        (r"\boxed{\left\{ x \right.} {", r"\left\{ x \right."),
        (r"\boxed{\begin{pmatrix}1\\2\\\end{pmatrix}}", r"\begin{pmatrix}1\\2\\\end{pmatrix}"),
        ("The answer is 5. The answer is 6.", "6"),
        ("Answer: -3", "-3"),
        ("3 + 4 = 7 and 7 - 9 = -2", "-2"),
        ("no idea\nParis", "Paris"),
        ("4", "4"),
        ("", None),
        ("<summary></summary>", None),
    ],
)
def test_lenient_finds_an_answer_outside_of_a_transcript(text, answer):
    assert lenient_answer(text) == answer
    if answer is not None:
        assert accuracy_reward(text, answer, "exact", lenient=True) == 1.0
        assert accuracy_reward(text, f"{answer}5", "exact", lenient=True) == 0.0
