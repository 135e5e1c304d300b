"""Numbers in words, rounded, with sign and interval; an evaluation's tables in 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from chainforge.data.metrics import summarize
from chainforge.report import formatting as wording


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.percent(0.8723), "87.2 %"),
        (wording.points(0.252), "+25.2"),
        (wording.points(-0.03), "−3.0"),
        (wording.p_value(0.00001), "< 0.0001"),
        (wording.p_value(0.00042), "0.0004"),
        (wording.p_words(0.63), "p = 0.63"),
        (wording.count(12345), "12,345"),
        (wording.count(83.44), "83.4"),
        (wording.duration(4.23), "4.2 s"),
        (wording.duration(59.4), "59 s"),
        (wording.duration(185), "3 min 05 s"),
        (wording.duration(7620), "2 h 07 min"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written.replace("\u00a0", " ") == expected


def test_a_difference_that_chance_explains_is_not_sold_as_a_gain() -> None:
    pair = {"from": "cold_start", "difference": -0.012, "low": -0.03, "high": 0.006, "p": 0.2}
    words = wording.gained(pair).replace("\u00a0", " ")
    assert words == (
        "1.2 points fewer than cold_start (−3.0 to +0.6, p = 0.20); chance alone could explain that"
    )
    assert "chance" not in wording.gained(pair | {"p": 0.01})


TASKS = ("basic_arithmetic", "chain_sum", "leg_counting")
MODELS = {"base": 0, "cold_start": 31, "rl_final": 57, "student_base": 0, "student": 60}
SETTINGS = {
    "sampling": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 32768,
                 "num_samples": 4},
    "seed": 42,
}  # fmt: skip


def results(models: dict[str, int], samples: int = 4) -> dict[str, Any]:
    """Return what 60 problems of three tasks give, of which each model gets the first so many."""
    judged = {
        name: [
            {
                "id": f"{i:02d}",
                "task": TASKS[i % 3],
                "sample": sample,
                "correct": i < right,
                "lenient_correct": i < right + 1,
                "formatted": right > 0,
                "extracted": str(i < right),
                "completion": "<reasoning_process>so</reasoning_process>\n<summary>1</summary>",
                "tokens": 1234 + i,
                "reasoning_tokens": 1200,
                "finish_reason": "length" if i == 0 else "stop",
            }
            for i in range(60)
            for sample in range(samples)
        ]
        for name, right in models.items()
    }
    return summarize(judged) | {"settings": SETTINGS}


def shown(found: dict[str, Any]) -> list[str]:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    wording.show_results(found, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_every_number_is_there_within_80_columns() -> None:
    lines = shown(results(MODELS))
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "student 100 (94.0 to 100) 100 (94.0 to 100) 100.0 1,264" in text
    assert "rl_final 1,200 1,330 1.7 100.0" in text  # tokens per solved: 1,263.5 * 60 / 57
    assert "rl_final 95.0 (86.3 to 98.3) 95.0 95.0" in text  # all samples of a problem are alike
    assert "basic_ leg_" in text
    assert "arithmetic chain_sum counting mean" in text
    assert "cold_start 55.0 50.0 50.0 51.7 (39.9 to 63.1)" in text
    assert "cold_start rl_final +43.3 +31.7 to +56.7 < 0.0001" in text
    assert text.endswith("up to 32,768 tokens, 4 per prompt,\nseed 42")


def test_one_sample_of_one_task_needs_fewer_tables_and_old_results_have_fewer() -> None:
    found = results({"cold_start": 30}, samples=1)
    found["settings"] = {"sampling": {"temperature": 0, "max_new_tokens": 64}, "seeds": [1, 2]}
    text = "\n".join(shown(found))
    assert "samples of each prompt" not in text
    assert text.endswith("sampled with greedy decoding, up to 64 tokens, seed 1, 2")
    (model,) = found["models"]
    for key in ("language", "tokens_per_solved", "pass_at_1", "macro", "tasks"):
        del model[key]
    old = "\n".join(shown({"models": [model], "pairs": []}))
    assert "cold_start" in old
    assert "sampled" not in old
