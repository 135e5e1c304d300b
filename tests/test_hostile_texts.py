"""Whether what runs over completions in the trainer's own process takes linear time."""

import subprocess
import sys

ATOMS = [
    "\\boxed{", "\\boxed ", "{", "}", "\\{", "\\(", "\\[", "$", "$$", "$ x", "`", "```", "\\begin{",
    "answer ", "answer is ", "answer:", "1,", "1", "-", "a", "a ", "a_", "é", "\u200b", "\n", " ", "\n ",
    "a=", "a= ", "import ", "def a", "for ", "\nreturn ", "\nimport  ", "\nclass a", "; ", "但", "'",
    "<summary>", "</summary>", "<think>", "</think>", "</reasoning_process>", "<", "a.b", ". ",
    "\\frac{1}{6} + ", "= ", "1/6 + ", "\\text{", "[asy]", "\\left", "?!",
]  # fmt: skip
PROGRAM = r"""
import sys
from chainforge.core.transcript import PRESETS, read, tags_of
from chainforge.data import decontaminate, select
from chainforge.data.filters import FilterArgs, text_fault
from chainforge.rewards.answers import lenient_answer
from chainforge.rewards.functions import format_reward, language_consistency_reward

SIZE = 100_000
checks = FilterArgs(
    min_reasoning_chars=1, max_completion_tokens=10**9, max_repetition=1.0 - 1e-9,
    min_language=0.01, max_paragraph_chars=10**9, drop_code=True,
)
row = {"id": "a", "tokens": 9, "answer": "4", "prompt": [{"role": "user", "content": "但 a"}]}
for text in map(eval, sys.stdin):
    text = (text * SIZE)[:SIZE]
    whole = tags_of("think").template.format(reasoning=text, answer=text)
    for preset in PRESETS:
        read(whole, preset)
        lenient_answer(f"{text}!", preset)
    format_reward(whole, "think")
    language_consistency_reward(whole, "zh", "think")
    completion = f"import a\n{text}!"
    text_fault(row | {"completion": completion}, checks)
    select.text_key(text)
    decontaminate.Screen([("a", text)]).screen([("b", f"{text}?")])
"""


def test_hostile_texts_cost_linear_time():
    # Quadratic code takes minutes for one of these texts, linear code seconds for all.
    texts = "\n".join(map(repr, ATOMS))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=texts, text=True, capture_output=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
