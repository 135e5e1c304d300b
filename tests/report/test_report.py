"""The report tells the truth about what is on disk, and runs nothing that is in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from chains import HOSTILE, answered, evaluation, grpo, hostile, question, rows, sign
from pages import Page, assert_harmless

from chainforge.core import artifacts
from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, sample
from chainforge.data.metrics import compare
from chainforge.report import formatting as wording
from chainforge.report.accuracy import evaluation_of
from chainforge.report.evidence import read_chain
from chainforge.report.report import watch, write_report
from chainforge.report.rows import index


def report(chain: Path, **options: Any) -> Page:
    path = write_report(chain, **options)
    assert path == chain / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_harmless(page)
    return page


def test_the_headline_compares_the_last_rl_stage_with_the_cold_start(chain: Path) -> None:
    page = report(chain)
    results = json.loads((chain / "scores" / "results.json").read_text())
    by_name: dict[str, list[Row]] = {}
    for line in (chain / "scores" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_name.setdefault(row["model"], []).append(row)
    pair = compare("cold", by_name["cold"], "final", by_name["final"])
    sentence = f"{wording.solved(results['models'][3])}, {wording.gained(pair)}."
    assert " ".join(sentence.split()) in page.text
    assert "60.0 points more than cold" in page.text
    assert "85.0 % of 40 held-out problems" in page.text


def test_every_section_holds_its_numbers(chain: Path) -> None:
    page = report(chain)
    for words in (
        "tiny chain",
        "kept 16 of 20 rows",
        "reward 0.53 → 0.89",
        "loss 1.50 → 0.07",
        "1 min 01 s",
        "pass@2",
        "maj@2",
        "Reward by function",
        "accuracy_reward",
        "KL to the reference",
        "Groups without spread",
        "Truncated",
        "dropped: duplicate",
        "max_steps: 29",
        "trl 1.16.0",
        "cpu (2 cores)",
        "24 wrong before, right after; 0 right before, wrong after; 6 wrong before and after",
        "traces: 15 of 20 rows were written by the built-in solver, not by a language model.",
    ):
        assert words in page.text
    assert "not accounted for" not in page.text
    ids = {attributes.get("id") for _, attributes in page.elements}
    targets = {a["href"] for tag, a in page.elements if tag == "a"}
    assert targets == {
        "#chain",
        "#accuracy",
        "#training",
        "#data",
        "#transcripts",
        "#configuration",
    }
    assert {target[1:] for target in targets} <= ids


def test_all_that_an_evaluation_measured_is_shown_and_how(chain: Path) -> None:
    page = report(chain)
    for words in (
        # final: 34 of 40 right, 12 tokens each, two tasks of 20.
        "final 40 85.0 % 70.9–92.9 85.0 % 70.9–92.9 100.0 % 100.0 % 12 14.1 0.0 %",
        "script of “en”",
        "temperature 0.7, top-p 0.9, up to 2,048 tokens, 2 samples of each prompt, seed 7",
        "transformers, dtype bfloat16",
        '{"fn": "hub", "params": {"dataset": "gsm8k"}, "split": "test"}',
        "Think before you speak.",
        "chains sums Mean of the tasks",
        "All numbers by task",
        "final 20 85.0 % 64.0–94.8",
    ):
        assert words in page.text
    results = json.loads((chain / "scores" / "results.json").read_text())
    once = results["models"][3]["pass_at_1"]
    assert f"final 85.0 % {100 * once['low']:.1f}–{100 * once['high']:.1f} 85.0 %" in page.text
    mean = results["models"][3]["macro"]["strict"]
    assert f"{100 * mean['low']:.1f}–{100 * mean['high']:.1f} Strict accuracy. In" in page.text


def test_an_evaluation_of_an_earlier_version_is_shown_as_far_as_it_goes(chain: Path) -> None:
    path = chain / "scores" / "results.json"
    results = json.loads(path.read_text())
    for model in results["models"]:
        for key in ("language", "tokens_per_solved", "pass_at_1", "macro", "tasks", "unjudged"):
            del model[key]
    write_json(path, {key: results[key] for key in ("models", "pairs")})
    page = report(chain)
    assert "Tokens per solved" not in page.text
    assert "How it was measured" not in page.text
    assert "final 40 85.0 % 70.9–92.9" in page.text


def test_gains_stand_on_an_axis_that_holds_them_all(chain: Path) -> None:
    evaluation = evaluation_of(read_chain(chain))
    assert evaluation.axis == [(0.0, "0"), (100.0, "+80")]
    for gain in evaluation.gains:
        assert 0 <= gain.low <= gain.at <= gain.high <= 100
    results = json.loads((chain / "scores" / "results.json").read_text())
    results["pairs"][0] |= {"difference": -0.62, "low": -0.71, "high": -0.4, "p": 0.001}
    write_json(chain / "scores" / "results.json", results)
    evaluation = evaluation_of(read_chain(chain))
    assert [label for _, label in evaluation.axis] == ["−80", "0", "+80"]
    assert evaluation.gains[0].kind == "loss"


def test_an_rl_stage_shows_what_its_evaluation_found_before_and_after(chain: Path) -> None:
    more = [{"step": step, "accuracy": 0.3} for step in range(41, 51)]
    rows(chain / "reason", "metrics.jsonl", more)
    stages = [{"name": name, "recipe": "sft"} for name in ("cold", "scores")]
    stages.insert(1, {"name": "reason", "recipe": "grpo", "inputs": {"model": "cold"}})
    assert "held out, as evaluated 25 % → 62 %" in report(chain, stages=stages).text
    assert "as evaluated" not in report(chain).text  # without its start there is no before


def test_the_page_needs_and_allows_nothing_from_elsewhere(chain: Path) -> None:
    html = write_report(chain).read_text(encoding="utf-8")
    for way_out in ("url(", "@import", "://", "fetch(", "XMLHttpRequest", "innerHTML", "eval("):
        assert way_out not in html


def test_the_same_files_give_the_same_bytes(chain: Path) -> None:
    assert write_report(chain).read_bytes() == write_report(chain).read_bytes()
    assert [path.name for path in chain.iterdir() if path.is_file()].count("report.html") == 1
    assert not list(chain.glob(".*.tmp"))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = report(hostile(tmp_path / "hostile"))
    raw = "".join(page.words)
    assert raw.count(HOSTILE) >= 25
    assert "49" not in page.text  # nothing evaluated it as a template


def test_text_that_is_no_text_does_not_cost_the_report(chain: Path) -> None:
    row = answered(question(99), "cold", True) | {"completion": "a\ud800b\x00\x07\x1b[31m\u202ec"}
    rows(chain / "traces", "samples.jsonl", [row | {"drop": "odd"}])
    write_json(
        chain / "traces" / "funnel.json",
        {"in": 21, "kept": 16, "dropped": {"duplicate": 4, "odd": 1}},
    )
    page = report(chain)
    assert "\x00" not in page.text
    assert "\x1b" not in page.text
    assert "a?b\ufffd\ufffd\ufffd[31m[U+202E]c" in page.text


def test_reasoning_and_answer_are_told_apart(chain: Path) -> None:
    html = write_report(chain).read_text(encoding="utf-8")
    assert re.search(r'class="said reasoning"[^>]*>final thinks<', html)
    assert re.search(r'class="said answer"[^>]*>wrong<', html)
    assert "&lt;reasoning_process&gt;" not in html
    broken = answered(question(50), "cold", False, finish_reason="length", lenient_correct=True)
    rows(chain / "traces", "samples.jsonl", [broken | {"completion": "no form", "drop": "cut"}])
    page = report(chain)
    assert "as written no form 12 tokens, cut at the length limit, not in the" in page.text
    assert "✓ right, wrong form" in page.text


def test_a_half_finished_chain_with_a_failed_stage(chain: Path) -> None:
    for name in ("reason", "scores"):
        (chain / name / "manifest.json").unlink()
    write_json(chain / "reason" / "stage.json", {"recipe": "grpo", "fingerprint": "x"})
    write_json(chain / "reason" / "progress.json", {"done": 12, "total": 40, "unit": "steps"})
    noise = "".join(f"step {i}\r" for i in range(50))
    (chain / "reason" / "log.txt").write_text(
        f"old line\n{noise}\nTraceback (most recent call last):\n"
        "failed: OutOfMemoryError: too big\n  by 2 GiB\n" + "the launcher's own traceback\n" * 20
    )
    with open(chain / "reason" / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "rew')  # killed while it wrote
    for path in list((chain / "scores").iterdir()):
        path.unlink()
    page = report(chain)
    assert "No model of this chain has been evaluated yet." in page.text
    assert "3 of 5" in page.text
    assert "failed 12 of 40 steps" in page.text
    assert "not started" in page.text
    assert "reason failed after 12 of 40 steps. No model of this chain" in page.text
    assert "failed: OutOfMemoryError: too big by 2 GiB" in page.text
    assert "launcher's own" not in page.text
    assert "step 3 " not in page.text
    assert "Not finished yet: scores." in page.text
    assert "reason failed" in page.text


def test_a_stage_that_is_not_finished_has_a_time_once_it_has_worked(chain: Path) -> None:
    for manifest in chain.glob("*/manifest.json"):
        manifest.unlink()
    # The last goes on from where it was cut, and what it told is from before that.
    for name, begun, told in (("cold", 100, 163), ("reason", 100, 100.02), ("final", 100, 40)):
        write_json(chain / name / "stage.json", {"recipe": "sft"})
        write_json(chain / name / "progress.json", {"done": 1, "total": 2, "unit": "steps"})
        os.utime(chain / name / "stage.json", (begun, begun))
        os.utime(chain / name / "progress.json", (told, told))
    page = report(chain)
    html = (chain / "report.html").read_text(encoding="utf-8")
    times = re.findall(r'<div class="time">(.*?)</div>', html)
    assert times == ["–", "1\u00a0min 03\u00a0s", "–", "–", "–"]
    assert "time, all stages 1 min 03 s" in page.text
    (chain / "cold" / "progress.json").unlink()
    assert "time, all stages –" in report(chain).text


def test_the_caller_may_know_more_than_the_files(chain: Path) -> None:
    stages = [
        {"name": "cold", "recipe": "sft", "state": "stale", "note": "learning_rate changed"},
        {"name": "later", "recipe": "grpo"},
    ]
    page = report(chain, stages=stages)
    assert "stale learning_rate changed" in page.text
    assert "Not finished yet: later." in page.text
    assert "traces" not in page.text


def test_without_chain_json_stages_stand_in_the_order_they_finished(chain: Path) -> None:
    (chain / "chain.json").unlink()
    grpo(chain / "aborted")
    page = report(chain)
    html = (chain / "report.html").read_text(encoding="utf-8")
    rows_of_table = re.findall(
        r"<strong><bdi>(\w+)</bdi></strong>\s+<span class=.soft.>\w*</span>\s+<span class=.state (\w+).>",
        html,
    )
    assert rows_of_table == [
        ("traces", "done"),
        ("cold", "done"),
        ("reason", "done"),
        ("final", "done"),
        ("scores", "done"),
        ("aborted", "unfinished"),
    ]
    assert "Not finished yet: aborted." in page.text


def test_a_funnel_that_does_not_add_up_says_so(chain: Path) -> None:
    write_json(chain / "traces" / "funnel.json", {"in": 25, "kept": 16, "dropped": {"old": 4}})
    assert "The parts do not add up: 5 rows are not accounted for." in report(chain).text


def test_a_control_and_a_fallback_are_named(chain: Path) -> None:
    sign(chain / "final", "grpo", config={"random_rewards": True})
    rows(
        chain / "traces", "samples.jsonl", [sample(question(3), "x", 0, source="offline-fallback")]
    )
    text = report(chain).text
    assert "final was trained on random rewards: it is a control." in text
    assert "1 of 21 rows were written by the built-in solver, for the teacher did not" in text


def test_a_long_run_stays_small(chain: Path) -> None:
    (chain / "final" / "metrics.jsonl").unlink()
    grpo(chain / "final", steps=20_000)
    long = [
        sample(question(i), "so " * 100_000, 0, source="policy", drop=f"reason {i}")
        for i in range(20)
    ]
    rows(chain / "traces", "samples.jsonl", long)
    html = write_report(chain).read_bytes()
    assert len(html) < 2_000_000
    assert b"296,000 characters left out" in html


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores/results.json", "{", "results.json is not JSON"),
        ("scores/results.json", "[]", "results.json is not an evaluation's results: .*array"),
        ("scores/results.json", '{"models": [{"n": 1}], "pairs": []}', r"`\$.models\[0\]`"),
        ("traces/funnel.json", '{"in": 3}', "funnel.json is not a .*: .* missing required field"),
        ("traces/funnel.json", "[" * 5000, "funnel.json is not JSON"),
        ("traces/progress.json", '{"done": "1", "total": 3, "unit": "rows"}', r"`\$.done`"),
        ("cold/metrics.jsonl", "{\n{}\n", "metrics.jsonl.*\n.*line 1"),
        ("cold/manifest.json", '{"recipe": "sft"}', "manifest.json is not a manifest"),
        ("chain.json", "[]", "chain.json: expected a JSON object, found a list"),
        ("chain.json", "{}", "chain.json: need an object with a list `stages`"),
        ("chain.json", '{"stages": [{"recipe": "sft"}]}', "each stage needs a `name`"),
        ("chain.json", '{"stages": []}', "holds no stage"),
    ],
)
def test_a_malformed_file_is_named(chain: Path, name: str, content: str, message: str) -> None:
    (chain / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(chain)
    assert not (chain / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no stage"):
        write_report(tmp_path)


def test_a_chain_of_several_states_says_each(chain: Path) -> None:
    for name in ("reason", "final"):
        (chain / name / "manifest.json").unlink()
    (chain / "reason" / "log.txt").write_text("stopped: step 12, truncated: too long\n")
    (chain / "final" / "log.txt").write_text("$ old\nfailed: long ago\n$ new\nstep 3\n")
    assert_state = report(chain).text
    assert "reason grpo stopped" in assert_state
    assert "reason stopped: step 12, truncated: too long" in assert_state
    assert "final grpo unfinished" in assert_state
    with artifacts.lock(chain), artifacts.lock(chain / "final"):
        page = report(chain)
    assert "final grpo running" in page.text
    assert "progress" not in [a.get("class") for _, a in page.elements]  # none was told
    assert "while the chain runs" in page.text
    assert ("body", {"data-running": None}) in page.elements
    assert "while the chain runs" not in report(chain).text


def test_a_stage_at_work_shows_how_far_it_is(chain: Path) -> None:
    for name in ("final", "scores"):
        (chain / name / "manifest.json").unlink()
    (chain / "scores" / "results.json").unlink()
    write_json(chain / "final" / "progress.json", {"done": 12, "total": 40, "unit": "steps"})
    with artifacts.lock(chain), artifacts.lock(chain / "final"):
        page = report(chain)
    assert "final is at work, 12 of 40 steps. No model" in page.text
    bars = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "progress"]
    assert [bar["aria-label"] for bar in bars] == ["30\u00a0% done"]


def test_a_stage_made_from_what_was_made_anew_since_is_stale(chain: Path) -> None:
    entry = [{"name": "cold", "recipe": "sft"}]
    entry.append({"name": "reason", "recipe": "grpo", "inputs": {"model": "cold"}})
    for print_, state in (("cd" * 32, "done"), ("ef" * 32, "stale made from an earlier cold")):
        sign(chain / "cold", "sft", fingerprint=print_)
        assert f"reason grpo {state}" in report(chain, stages=entry).text


def test_health_messages_are_marked_where_they_arose(chain: Path) -> None:
    found = {"rule": "kl_growth", "action": "stop", "means": "it runs `away`", "change": "a `beta`"}
    rows(
        chain / "final",
        "health.jsonl",
        [{"step": 9, "seen": "kl is 0.9"} | found, {"step": 20, "message": "all is odd"}],
    )
    page = report(chain)
    html = (chain / "report.html").read_text()
    assert "step 9, kl growth: stopped the stage kl is 0.9." in page.text
    assert "It usually means that it runs away ." in page.text
    assert "<code>away</code>" in html
    labels = [str(a.get("aria-label")) for tag, a in page.elements if tag == "svg"]
    assert [label.split(";")[0] for label in labels if "warning 1 at step 9" in label] == [
        "KL to the reference"
    ]
    assert sum("warning 2 at step 20" in label for label in labels) == 7
    assert "final: 2 warnings of RL's health, below." in page.text


def test_the_teacher_s_bill_is_shown_signed_or_not(chain: Path) -> None:
    assert "teacher" not in report(chain).text.split("stages done")[1].split("The chain")[0]
    spent = {"requests": 20, "tokens": 1234, "usd": 0.5, "untold_requests": 2,
             "untold_usd_at_most": 0.1}  # fmt: skip
    sign(chain / "traces", "collect", metrics={"spending": spent})
    text = report(chain).text
    assert "teacher $0.50 20 requests, 1,234 tokens" in text
    assert "and at most $0.10 more for 2 requests whose cost nobody told" in text
    (chain / "traces" / "manifest.json").unlink()
    rows(
        chain / "traces",
        "requests.jsonl",
        [
            {"request": 1, "key": "a", "usd": 0.9, "tokens": 900},
            {"request": 1, "key": "a", "outcome": "ok", "usd": 0.2, "tokens": 10, "told": True},
            {"request": 2, "key": "b", "usd": 0.9, "tokens": 900},
        ],
    )
    text = report(chain).text
    assert "no cost" not in text
    assert "teacher $0.20 2 requests, 10 tokens" in text
    assert "and an unknown amount for 1 requests" in text


def test_watching_rewrites_the_page_until_the_run_ends(chain: Path) -> None:
    (chain / "scores" / "manifest.json").unlink()
    told: list[str] = []
    seen: list[bool] = []

    def tell(text: str) -> None:
        """Move the chain on, as a run does, each time that something is said."""
        told.append(text)
        seen.append("while the chain runs" in (chain / "report.html").read_text())
        if len(told) == 1:
            run.enter_context(artifacts.lock(chain))
        elif len(told) == 2:
            (chain / "cold" / "metrics.jsonl").write_text("{\n{}\n")
        elif len(told) == 3:
            (chain / "cold" / "metrics.jsonl").unlink()
            sign(chain / "scores", "evaluate", finished="2026-01-01T09:00:00Z")
            run.close()

    with contextlib.ExitStack() as run:
        assert watch(chain, 0.01, tell) == chain / "report.html"
    assert told[:2] == [
        "4 of 5 stages done, nobody runs it just now",
        "4 of 5 stages done",
    ]
    assert told[2].startswith("not written: ")
    assert told[3] == "5 of 5 stages done"
    assert seen == [False, True, True, False]
    with pytest.raises(InputError, match="no such run"):
        watch(chain / "nowhere", 0.01, tell)


def test_a_file_of_samples_is_not_held_in_memory_and_not_read_twice(chain: Path) -> None:
    first = index(chain / "scores" / "samples.jsonl")
    assert index(chain / "scores" / "samples.jsonl") is first
    evaluation(chain / "scores", {"cold": 10, "final": 34})
    assert len(index(chain / "scores" / "samples.jsonl")) != len(first)
