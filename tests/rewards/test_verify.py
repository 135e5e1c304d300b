"""What each verifier takes for the gold answer, and what it does not."""

import json
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.rewards.verify import VERIFIERS, Claim, verify, verify_all

HONEST = [
    ("42", "42"),
    ("42", "$42$"),
    ("42", r"\boxed{42}"),
    ("42", r"\(42\)"),
    ("42", " 42.\n"),
    ("42", "**42**"),
    ("42", "The answer is 42."),
    ("42", "The final answer is $42$."),
    ("42", "**Answer:** 42"),
    ("42", r"Adding up, we get \boxed{42}."),
    ("42", r"\boxed{42}, that is \boxed{42}"),
    ("42", "You have $42$ apples."),
    ("42", "42 apples"),
    ("42", r"42\text{ apples}"),
    ("42", "+42"),
    ("42", "042"),
    ("42", "42.0"),
    ("42", "(42)"),
    ("42", "\uff14\uff12"),
    ("-3", "−3"),
    ("5", "x=5"),
    ("5", "$x = 5$"),
    ("5", r"x \approx 5"),
    ("x=5", "5"),
    ("x=5", "x = 5"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("0.5", r"\frac12"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
    ("1/3", "0.333333"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", "$(1,2)$"),
    ("1234", "1,234"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    ("5", r"\$5"),
    ("5", "$5"),
    ("Paris", r"\text{Paris}"),
    (r"\text{Paris}", "Paris"),
    ("Paris", "paris"),
    ("hello world", "Hello  world."),
    (r"50\%", "50%"),
    ("50%", "50"),
    ("50%", "0.5"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("x^2+1", "1+x^2"),
    ("2x+3", "y=2x+3"),
    ("y=2x+3", "y=3+2x"),
    (r"\pi", "π"),
    ("4", r"\sqrt{16}"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("10^{100}", "10^{100}"),
    ("9^{9^{9}}", "9^{9^{9}}"),
]


@pytest.mark.parametrize(("gold", "answer"), HONEST)
def test_math_takes_honest_forms(gold, answer):
    assert verify("math", answer, gold) is True


GAMES = [
    ("4", "x=3=5=4"),
    ("4", r"\boxed{x=3=5=4}"),
    ("4", "3=4"),
    ("4", "2+2=4"),
    ("4", "2+2"),
    ("4", r"4\%"),
    ("4", r"400\%"),
    ("4", "4 percent"),
    ("0.04", r"4\%"),
    (r"4\%", r"400\%"),
    ("4", "4 or 5"),
    ("4", "4, 5"),
    ("4", "3 4"),
    ("4", "4;5"),
    ("4", r"4\text{ or }5"),
    ("4", r"4\text{ and }4"),
    ("4", r"4 \lor 5"),
    ("4", r"\pm 4"),
    ("4", r"\neq 4"),
    ("4", "≠4"),
    ("4", "4>3"),
    ("4", "not 4"),
    ("4", "The answer is not 4"),
    ("4", "It is not $4$."),
    ("4", "The answer is 3. The answer is 4."),
    ("4", r"\boxed{3} or maybe \boxed{4}"),
    ("4", r"\boxed{4} \boxed{5}"),
    ("4", "1 2 3 4 5 6 7 8 9"),
    ("4", r"$4$\%"),
    ("4", "4 hundred"),
    ("4", "4!"),
    ("4", "four score"),
    ("4", "I do not know"),
    ("4", "4.0000001"),
    ("4", r"\max(3,4)"),
    ("574575", "574, 575"),
    ("4", r"\boxed{4"),
    ("4", r"\boxed{}"),
    ("4", ""),
    ("42", "4 2"),
    ("hello world", "dlrow olleh"),
    ("(1,2)", "(2,1)"),
    ("x=5", "y=5"),
]


@pytest.mark.parametrize(("gold", "answer"), GAMES)
def test_math_is_not_fooled(gold, answer):
    assert verify("math", answer, gold) is False


@pytest.mark.parametrize("gold", ["", "  ", "{", "}{", r"\frac{1}{", None])
@pytest.mark.parametrize("answer", ["4", "", "{"])
def test_a_gold_answer_that_cannot_be_read_is_not_judged(gold, answer):
    assert verify("math", answer, gold) is None


ARITHMETIC = [
    ("4", "4", True),
    ("4", "x = 4", True),
    ("4", r"\boxed{4}", True),
    ("4", "4.0", True),
    ("4", "2+2", False),
    ("4", "2+2=4", False),
    ("4", "8/2", False),
    ("4", r"\sqrt{16}", False),
    ("4", r"\frac{8}{2}", False),
    ("56088", "123*456", False),
    ("56088", r"123 \times 456", False),
    ("1/2", "1/2", True),
    ("1/2", r"\frac{1}{2}", True),
    ("1/2", "0.5", True),
    ("1/2", "2/4", False),
    ("0.5", "1/2", False),
    ("-1/2", "-1/2", True),
    ("x", "x", None),
    ("", "4", None),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), ARITHMETIC)
def test_arithmetic_wants_a_number_worked_out(gold, answer, verdict):
    assert verify("arithmetic", answer, gold) is verdict


NUMERIC = [
    ("3.14", "3.14", True),
    ("3.14", "3.1400001", True),
    ("3.14", "3.2", False),
    ("1000", "1e3", True),
    ("1500", r"1.5 \times 10^{3}", True),
    ("1000000", "1000000.5", True),
    ("0", "0.0000001", False),
    ("0", "1.6e-19", False),
    ("1.6e-19", "0", False),
    ("0", "0.1", False),
    ("5", "nan", False),
    ("5", "inf", False),
    ("5", "1e999999999", False),
    ("5", "five", False),
    ("5", "4 or 5", False),
    ("5%", "5%", True),
    ("five", "5", None),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), NUMERIC)
def test_numeric(gold, answer, verdict):
    assert verify("numeric", answer, gold) is verdict


def test_numeric_takes_a_tolerance():
    assert verify("numeric", "3.2", "3.14", tolerance=0.1) is True
    assert verify("numeric", "9", "3.14", tolerance=0.1) is False


CHOICE = [
    ("B", "B", True),
    ("B", "(b)", True),
    ("(B)", "B.", True),
    ("B", r"\boxed{\text{B}}", True),
    ("B", "The answer is B.", True),
    ("B", "B) Paris", True),
    ("B", "A", False),
    ("B", "A or B", False),
    ("B", "B or A", False),
    ("B", "A) B) C)", False),
    ("B", "B) Paris or A) Rome", False),
    ("B", "A B C D", False),
    ("B", "ABCD", False),
    ("B", "", False),
    ("yes", "Yes", True),
    ("yes", "no", False),
    ("", "B", None),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), CHOICE)
def test_choice(gold, answer, verdict):
    assert verify("choice", answer, gold) is verdict


EXACT = [
    ("Paris", "Paris", True),
    ("Paris", " Paris.\n", True),
    ("New York", "New  York", True),
    ("Paris", r"\boxed{Paris}", True),
    ("Paris", "paris", False),
    ("Paris", "Paris or Rome", False),
    ("Paris", "", False),
    ("", "Paris", None),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), EXACT)
def test_exact(gold, answer, verdict):
    assert verify("exact", answer, gold) is verdict


HIDDEN = {"⏎": "\n", "<zwsp>": "\u200b", "<bom>": "\ufeff", "<nnbsp>": "\u202f", "<zwj>": "\u200d"}


def groups():
    """Read `answers.txt`: a verifier and its gold answer, then right (+) and wrong (-) answers."""
    found = []
    for line in (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").split("\n"):
        mark, _, rest = line.partition(" ")
        for written, hidden in HIDDEN.items():
            rest = rest.replace(written, hidden)
        if mark in ("+", "-"):
            found[-1][2].extend((answer, mark == "+") for answer in rest.split(" ¦ "))
        elif mark:
            found.append((mark, rest, []))
    return found


@pytest.mark.parametrize(("verifier", "gold", "answers"), groups())
def test_right_answers_are_taken_and_wrong_ones_are_not(verifier, gold, answers):
    said = verify_all([Claim(verifier, answer, gold) for answer, _ in answers])
    assert [pair for pair, one in zip(answers, said, strict=True) if pair[1] is not one] == []


def entry(dataset="chain_sum", answer="4", **metadata):
    metadata = {"source_dataset": dataset, "source_index": 0, **metadata}
    return json.dumps({"question": "?", "answer": answer, "metadata": metadata})


COUNTDOWN = entry("countdown", "8 * 3", numbers=[3, 8], target=24)


def test_reasoning_gym_uses_the_data_sets_own_scorer():
    claims = [
        Claim("reasoning_gym", "8 * 3", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", "3*8", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", r"\boxed{3 * 8}", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", "3 * 8", None, COUNTDOWN),
        Claim("reasoning_gym", "3 + 8", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", "24", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", "nonsense", "8 * 3", COUNTDOWN),
        Claim("reasoning_gym", "", "8 * 3", COUNTDOWN),
    ]
    assert verify_all(claims) == [True, True, True, True, False, False, False, False]


@pytest.mark.parametrize("answer", ["4, 5", "4%", "5 or 4", "The answer is 4 and 5", "44", "4 5"])
def test_reasoning_gym_refuses_an_answer_stuffed_into_a_generous_scorer(answer):
    assert verify("reasoning_gym", answer, "4", entry("gsm_symbolic", difficulty=1.0)) is False


def test_reasoning_gym_takes_part_credit_for_none():
    gold = "alpha, beta"
    own = entry("chain_sum", gold)
    assert verify("reasoning_gym", "alpha, beta, gamma", gold, own) is False
    assert verify("reasoning_gym", gold, gold, own) is True


def test_text_is_never_a_program(tmp_path):
    target = tmp_path / "written"
    for text in (
        f"open('{target}', 'w')",
        f"exec('open({str(target)!r}, chr(119))')",
        f"(lambda: __import__('os').system('touch {target}'))()",
        f"sympify('op' + 'en(\"{target}\", \"w\")')",
        f"preview(1, viewer='file', filename='{target}')",
    ):
        assert verify("reasoning_gym", text, "8 * 3", COUNTDOWN) is False
    assert not target.exists()


@pytest.mark.parametrize("broken", [None, "", "{", "[]", "{}", '{"answer": "4"}', 3, "[" * 100_000])
def test_reasoning_gym_says_what_an_entry_must_hold(broken):
    with pytest.raises(InputError, match="source_dataset"):
        verify("reasoning_gym", "4", "4", broken)


def test_an_unknown_verifier_is_named_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'numeric'"):
        verify("numerik", "4", "4")


def test_a_batch_keeps_its_order_and_equals_single_calls():
    pairs = [*HONEST, *GAMES, ("", "4")] * 3
    batch = verify_all([Claim("math", answer, gold) for gold, answer in pairs])
    assert batch == [*[True] * len(HONEST), *[False] * len(GAMES), None] * 3


def test_nothing_to_judge_is_no_work():
    assert verify_all([]) == []
    assert set(VERIFIERS) == {"math", "arithmetic", "numeric", "choice", "exact", "reasoning_gym"}
