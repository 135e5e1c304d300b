"""What is printed before money is spent, and beside the data afterwards."""

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, example
from chainforge.generate.api import request_key
from chainforge.generate.settings import Draw, TeacherArgs
from chainforge.generate.teacher import card_sections, endpoints_of, estimate

ROWS = [
    example([{"role": "user", "content": f"What is {n} and two?"}], "4", task="sums")
    for n in range(10)
]


def lines(text):
    return dict(line.split(None, 1) for line in text.replace("at most", "at_most").splitlines())


def test_the_estimate_needs_no_key(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    args = TeacherArgs(teacher="deepseek", num_samples=100, expected_tokens=6000)
    said = lines(estimate(args, ROWS))
    assert said["answers"] == "1,000 (10 prompts x 100)"
    assert said["cost"].startswith("$3.6")
    assert "off-peak, $7.2" in said["cost"]
    assert said["at_most"].startswith("$39.")
    assert "of 2026-11-15" in said["prices"]
    assert said["limits"].startswith("none: set max_usd")


def test_the_estimate_leaves_out_what_is_there(tmp_path):
    args = TeacherArgs(teacher="deepseek", max_usd=2.0)
    endpoints = endpoints_of(args)
    with JsonLines(tmp_path / "samples.jsonl") as file:
        file.append({"request": request_key(endpoints, Draw(ROWS[0], 0, 0))})
    with JsonLines(tmp_path / "failures.jsonl") as file:
        file.append({"request": request_key(endpoints, Draw(ROWS[1], 0, 0)), "rejected": True})
        file.append({"request": request_key(endpoints, Draw(ROWS[2], 0, 0)), "rejected": False})
    said = lines(estimate(args, ROWS, str(tmp_path)))
    assert "2 of them there already" in said["answers"]
    assert "48,000 out" in said["tokens"]
    assert said["limits"] == "max_usd 2.0"


def test_an_unknown_price_is_said():
    args = TeacherArgs(teacher="openai", model="m", base_url="http://localhost:8000/v1")
    assert lines(estimate(args, ROWS))["cost"].startswith("unknown")
    args.max_usd = 1.0
    with pytest.raises(InputError, match="price of 'm' at localhost:8000 is not known"):
        estimate(args, ROWS)


def test_the_offline_teacher_costs_nothing():
    assert "nothing to pay" in estimate(TeacherArgs(), ROWS)


def test_the_card_tells_teacher_terms_and_cost():
    args = TeacherArgs(teacher="deepseek")
    common = {"completion": "x", "tokens": 50, "correct": True}
    asked = {"source": "deepseek-flash", "teacher": "deepseek", "host": "api.deepseek.com",
             "time": "2026-11-20T10:00:00+00:00", "sampling": {"max_tokens": 9}}  # fmt: skip
    evil = "`</code><script>alert(1)</script>|\n# Title"
    rows = [
        {**ROWS[0], **common, **asked, "model": "served-model"},
        {**ROWS[1], **common, **asked, "model": evil, "tokens": 70, "correct": None},
        {**ROWS[2], **common, "source": "offline-fallback", "teacher": "offline", "tokens": None},
    ]
    spending = {"requests": 6, "tokens": 900, "usd": 0.5, "untold_requests": 1,
                "untold_usd_at_most": 0.04}  # fmt: skip
    told = card_sections(args, rows, spending)
    said = "1 rows: asked for `deepseek-flash` at `api.deepseek.com`, answered by `served-model`"
    assert said in told["Teacher"]
    assert "`offline-fallback`. Worked solutions" in told["Teacher"]
    assert "They replace answers of a teacher that failed" in told["Teacher"]
    assert "$0.50 for 6 requests and 900 tokens, and at most $0.0400 for 1 req" in told["Cost"]
    assert "allow training other models" in told["Terms"]
    assert "\n# Title" not in told["Teacher"]
    assert "`'</code><script>" in told["Teacher"]  # inside a code span, which it cannot end
