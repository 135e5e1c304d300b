"""The report tells the truth about what is on disk, and runs nothing that is in it."""

import contextlib
import json

import pytest
from chains import HOSTILE, answered, grpo, hostile, question, rows, sign, tiny
from pages import Page, assert_harmless

from chainforge.core import artifacts
from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.generate.sampling import sample
from chainforge.report import formatting
from chainforge.report.html import watch, write_report


def report(chain):
    path = write_report(chain)
    assert path == chain / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_harmless(page)
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished chain and its report, not to be changed."""
    chain = tiny(tmp_path_factory.mktemp("finished") / "tiny")
    return chain, report(chain)


def test_every_section_holds_its_numbers(finished):
    chain, page = finished
    models = json.loads((chain / "eval/results.json").read_text())["models"]
    once, mean = models[3]["pass_at_1"], models[3]["macro"]["strict"]
    for words in (
        "tiny chain",
        # The headline is about the last RL stage.
        f"{formatting.solved(models[3])}, 22.5 points more than rl",
        "85.0 % of 40 held-out problems",
        "kept 16 of 20 rows",
        "training 0.525 → 0.885",
        "training 1.5 → ",
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
        # rl_final: 34 of 40 right, 12 tokens each, two tasks of 20.
        "rl_final 40 85.0 % 70.9–92.9 85.0 % 70.9–92.9 100.0 % 100.0 % 12 – 14.1 0.0 % 0",
        "script of “en”",
        "temperature 0.7, top-p 0.9, up to 2,048 tokens, 2 per prompt, seed 7",
        "dtype bfloat16",
        '{"fn": "hub", "params": {"dataset": "gsm8k"}, "split": "test"}',
        "Think before you speak.",
        "chains sums Mean of the tasks",
        "All numbers by task",
        "rl_final 20 85.0 % 64.0–94.8",
        f"rl_final 85.0 % {100 * once['low']:.1f}–{100 * once['high']:.1f} 85.0 %",
        f"{100 * mean['low']:.1f}–{100 * mean['high']:.1f} Strict accuracy. In",
    ):
        assert words in page.text
    assert "not accounted for" not in page.text
    ids = {attributes.get("id") for _, attributes in page.elements}
    targets = {a["href"] for tag, a in page.elements if tag == "a"}
    names = ("chain", "accuracy", "training", "data", "transcripts", "configuration")
    assert targets == {f"#{name}" for name in names}
    assert set(names) <= ids


def test_the_same_files_give_the_same_bytes(finished):
    chain, _ = finished
    before = (chain / "report.html").read_bytes()
    assert write_report(chain).read_bytes() == before
    assert not list(chain.glob(".*.tmp"))


def test_hostile_text_stays_text(tmp_path):
    page = report(hostile(tmp_path / "hostile"))
    assert "".join(page.words).count(HOSTILE) >= 25
    assert "49" not in page.text  # nothing evaluated it as a template


def test_completions_of_any_kind_are_shown_as_what_they_are(chain):
    """Text that is no text, a form that is none, and texts and runs of any length."""
    odd = {"completion": "a\ud800b\x00\x07\x1b[31m\u202ec", "drop": "odd"}
    broken = {"completion": "no form", "drop": "cut", "finish_reason": "length"}
    more = [answered(question(99), "cold_start", True) | odd]
    more += [answered(question(50), "cold_start", False, lenient_correct=True) | broken]
    more += [
        sample(question(i), "so " * 100_000, 0, source="policy", drop=f"rl {i}") for i in range(20)
    ]
    rows(chain / "traces", "samples.jsonl", more)
    (chain / "rl_final/metrics.jsonl").unlink()
    grpo(chain / "rl_final", steps=20_000)
    page, html = report(chain), (chain / "report.html").read_text()
    assert "\x00" not in page.text
    assert "\x1b" not in page.text
    assert "a?b\ufffd\ufffd\ufffd[31m[U+202E]c" in page.text
    assert '<div class="said reasoning" dir="auto">rl_final thinks</div>' in html
    assert '<div class="said answer" dir="auto">wrong</div>' in html
    assert "&lt;reasoning_process&gt;" not in html
    assert "as written no form 12 tokens, cut at the length limit, not in the" in page.text
    assert "✓ right, wrong form" in page.text
    assert "296,000 characters left out" in page.text
    assert len(html) < 2_500_000


def test_a_half_finished_chain_with_a_failed_stage(chain):
    for name in ("rl", "eval"):
        (chain / name / "manifest.json").unlink()
    write_json(chain / "rl/stage.json", {"recipe": "grpo", "fingerprint": "x"})
    write_json(chain / "rl/progress.json", {"done": 12, "total": 40, "unit": "steps"})
    noise = "".join(f"step {i}\r" for i in range(50))
    (chain / "rl/log.txt").write_text(
        f"old line\n{noise}\nTraceback (most recent call last):\n"
        "failed: OutOfMemoryError: too big\n  by 2 GiB\n" + "the launcher's own traceback\n" * 20
    )
    with open(chain / "rl/metrics.jsonl", "a") as file:
        file.write('{"step": 41, "rew')  # killed while it wrote
    for path in list((chain / "eval").iterdir()):
        path.unlink()
    page = report(chain)
    for words in (
        "No model of this chain has been evaluated yet.",
        "3 of 5",
        "pending",
        "rl failed after 12 of 40 steps. No model of this chain",
        "failed: OutOfMemoryError: too big by 2 GiB",
        "Not finished yet: eval.",
    ):
        assert words in page.text
    assert "launcher's own" not in page.text
    assert "step 3 " not in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval/results.json", "{", "results.json is not JSON"),
        ("eval/results.json", "[]", "results.json: expected a JSON object, found a list"),
        ("eval/results.json", '{"models": [{"n": 1}], "pairs": []}', r"`\$.models\[0\]`"),
        ("traces/funnel.json", '{"in": 3}', "funnel.json is damaged.*: .* missing required field"),
        ("traces/funnel.json", "[" * 5000, "funnel.json is not JSON"),
        ("cold_start/metrics.jsonl", "{\n{}\n", "metrics.jsonl.*\n.*line 1"),
        ("cold_start/manifest.json", '{"recipe": "sft"}', "manifest.json is damaged, or not of"),
        ("chain.json", "[]", "chain.json: expected a JSON object, found a list"),
        ("chain.json", "{}", "chain.json: need an object with a list `stages`"),
        ("chain.json", '{"stages": [{"recipe": "sft"}]}', "each stage needs a folder's `name`"),
        ("chain.json", '{"stages": []}', "holds no stage"),
    ],
)
def test_a_malformed_file_is_named(chain, name, content, message):
    (chain / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(chain)
    assert not (chain / "report.html").exists()


def test_a_chain_of_several_states_says_each(chain):
    for name in ("rl", "rl_final"):
        (chain / name / "manifest.json").unlink()
    (chain / "rl/log.txt").write_text("stopped: step 12, truncated: too long\n")
    (chain / "rl_final/log.txt").write_text("$ old\nfailed: long ago\n$ new\nstep 3\n")
    still = report(chain).text
    assert "rl grpo – resumable" in still
    assert "Not finished yet: rl, stopped: step 12, truncated: too long." in still
    assert "rl_final grpo – pending" in still
    assert "while the chain runs" not in still
    with artifacts.lock(chain), artifacts.lock(chain / "rl_final"):
        page = report(chain)
    assert "rl_final grpo – running" in page.text
    assert "progress" not in [a.get("class") for _, a in page.elements]  # none was told
    assert "while the chain runs" in page.text
    assert ("body", {"data-running": None}) in page.elements


def test_a_stage_whose_input_was_made_again_since_is_stale(chain):
    stages = [{"name": "cold_start", "recipe": "sft"}]
    stages.append({"name": "rl", "recipe": "grpo", "inputs": {"model": "cold_start"}})
    write_json(chain / "chain.json", {"stages": stages})
    for print_, state in (("cd", "done"), ("ef", "stale made from an earlier cold_start")):
        sign(chain / "cold_start", "sft", fingerprint=print_ * 32)
        assert f"rl grpo cold_start {state}" in report(chain).text


def test_health_messages_are_marked_where_they_arose(chain):
    found = {"rule": "kl_growth", "action": "stop", "means": "it runs `away`", "change": "a `beta`"}
    alarms = [{"step": 9, "seen": "kl is 0.9"} | found, {"step": 20, "seen": "all is odd"}]
    rows(chain / "rl_final", "health.jsonl", alarms)
    page = report(chain)
    assert "step 9, kl growth: stopped the stage kl is 0.9." in page.text
    assert "It usually means that it runs away ." in page.text
    assert "<code>away</code>" in (chain / "report.html").read_text()
    labels = [str(a["alt"]) for tag, a in page.elements if tag == "img"]
    marked = [label for label in labels if "warning 1 at step 9" in label]
    assert [label.split(";")[0] for label in marked] == ["KL to the reference"]
    assert sum("warning 2 at step 20" in label for label in labels) == 7
    assert "rl_final: warnings of RL's health (2), below." in page.text


def test_watching_rewrites_the_page_until_the_run_ends(chain):
    (chain / "eval/manifest.json").unlink()
    told: list[str] = []
    seen: list[bool] = []

    def tell(text: str) -> None:
        """Move the chain on, as a run does, each time that something is said."""
        told.append(text)
        seen.append("while the chain runs" in (chain / "report.html").read_text())
        if len(told) == 1:
            run.enter_context(artifacts.lock(chain))
        elif len(told) == 2:
            (chain / "cold_start/metrics.jsonl").write_text("{\n{}\n")
        elif len(told) == 3:
            (chain / "cold_start/metrics.jsonl").unlink()
            sign(chain / "eval", "evaluate", finished="2026-01-01T09:00:00Z")
            run.close()

    with contextlib.ExitStack() as run:
        watch(chain, tell, 0.01)
    resumable = "4 of 5 stages done, eval resumable"
    assert told[:2] == [f"{resumable}, not running", resumable]
    assert told[2].startswith("not written: ")
    assert told[3] == "5 of 5 stages done, not running"
    assert seen == [False, True, True, False]
    with pytest.raises(InputError, match="no such run"):
        watch(chain / "nowhere", tell, 0.01)


def test_a_stage_at_work_a_control_and_a_funnel_with_a_gap_are_named(chain):
    sign(chain / "rl", "grpo", config={"random_rewards": True})
    rows(
        chain / "traces", "samples.jsonl", [sample(question(3), "x", 0, source="offline-fallback")]
    )
    write_json(chain / "traces/funnel.json", {"in": 25, "kept": 16, "dropped": {"old": 4}})
    for name in ("rl_final", "eval"):
        (chain / name / "manifest.json").unlink()
    (chain / "eval/results.json").unlink()
    write_json(chain / "rl_final/progress.json", {"done": 12, "total": 40, "unit": "steps"})
    with artifacts.lock(chain), artifacts.lock(chain / "rl_final"):
        page = report(chain)
    assert "rl_final is running, 12 of 40 steps. No model" in page.text
    bars = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "progress"]
    assert [bar["aria-label"] for bar in bars] == ["30 % done"]
    assert "rl was trained on random rewards: it is a control." in page.text
    assert "1 of 21 rows were written by the built-in solver, since the teacher did" in page.text
    assert "The parts do not add up: 5 rows are not accounted for." in page.text
