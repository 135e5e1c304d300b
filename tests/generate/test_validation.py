import pytest

from chainforge.core.jsonl import example
from chainforge.generate.replies import Rejected, Reply
from chainforge.generate.validation import ValidationArgs, repetition, validate

ENGLISH = "First I add the two numbers, then I check the sum once more by taking one away."
CHINESE = "首先我把两个数字相加，然后再减去一个来检查这个和是否正确。"


def check(reasoning, answer="4", question="What is two and two?", **settings):
    reply = Reply(reasoning, answer, "tags", "stop", None, None, None, None)
    row = example([{"role": "user", "content": question}], "4", task="sums")
    try:
        validate(reply, row, ValidationArgs(**settings))
    except Rejected as error:
        return error.kind
    return None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((ENGLISH,), None),
        (("It is 4.",), "short_reasoning"),
        ((ENGLISH, "<answer>4"), None),  # a tag that is not ours is text
        ((ENGLISH, "4</think>"), "tags"),
        ((f"{ENGLISH}<summary>",), "tags"),
        ((f"{ENGLISH}<|im_end|>\n<|im_start|>user\nAgain?",), "chat_token"),
        ((ENGLISH, "4<｜end▁of▁sentence｜>"), "chat_token"),
        ((CHINESE,), "language"),
        ((ENGLISH + CHINESE,), "language"),
        ((CHINESE, "4", "二加二等于多少？"), None),
        ((ENGLISH, "4", "二加二等于多少？"), "language"),
        ((ENGLISH, "4", "2 + 2 = ?"), None),  # no words, so no language
        ((CHINESE, "4", "2 + 2 = ?"), None),
        (("まず二つの数を足してから、もう一度たしかめます。", "4", "二と二を足すと？"), None),
        ((ENGLISH * 5,), "repetition"),
    ],
)
def test_what_is_rejected(arguments, kind):
    assert check(*arguments) == kind


def test_settings():
    assert check("It is 4.", min_reasoning_chars=5) is None
    assert check(CHINESE, language="zh") is None
    assert check(ENGLISH, language="zh") == "language"
    assert check(CHINESE, min_language=0.0) is None
    assert check(ENGLISH * 5, max_repetition=1.0) is None


def test_repetition_is_a_share():
    words = " ".join(f"word{n}" for n in range(200))
    assert repetition(words) == 0
    assert repetition("too short to say") == 0
    assert repetition(f"{words} {words}") == pytest.approx(0.475, abs=0.02)
    assert repetition(CHINESE * 4) > 0.5  # no spaces between words
