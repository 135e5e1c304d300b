"""The report tells the truth about what is on disk, and runs nothing that is in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chainforge.core.artifacts import Manifest, write_json
from chainforge.core.errors import InputError
from chainforge.core.records import JsonLines, Row, example, sample
from chainforge.core.transcript import write
from chainforge.data.measures import compare, summarize
from chainforge.pipeline import wording
from chainforge.pipeline.report import write_report

HOSTILE = (
    "<script>alert(1)</script></textarea></style></title><img src=x onerror=alert(2)>"
    "<a href=\"javascript:alert(3)\" onclick='alert(4)'>x</a>{{ 7 * 7 }}{% raw %}&lt;b&gt;"
    '"\' onmouseover="alert(5)<svg/onload=alert(6)><!-- ]]>'
)
TAGS = """html head meta title style body header main footer section nav article h1 h2 h3 h4 p
small strong bdi ul li a dl dt dd div span table thead tbody tr th td details summary pre code
figure figcaption svg line circle rect polyline text"""


class Page(HTMLParser):
    """What a browser would make of the page: its elements and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(chain: Path, **options: Any) -> Page:
    path = write_report(chain, **options)
    assert path == chain / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_harmless(page)
    return page


def assert_harmless(page: Page) -> None:
    """No element, attribute or address that could run or fetch anything."""
    assert {tag for tag, _ in page.elements} <= set(TAGS.split())
    assert page.comments == []
    assert page.open == []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "style", "srcdoc", "xlink:href", "action")
            if name == "href":
                assert re.fullmatch("#[a-z]+", value or ""), value
        if tag == "meta" and "http-equiv" in attributes:
            assert attributes["http-equiv"] == "Content-Security-Policy"


def sign(directory: Path, recipe: str, finished: str = "2026-01-01T00:00:00Z", **more: Any) -> None:
    values: dict[str, Any] = {
        "recipe": recipe,
        "fingerprint": "ab" * 32,
        "given": {"learning_rate": 1e-4},
        "inputs": {"model": "cd" * 32},
        "outputs": {},
        "config": {},
        "metrics": {},
        "versions": {"trl": "1.16.0"},
        "device": "cpu (2 cores)",
        "seed": 7,
        "seconds": 61.2,
        "finished": finished,
    }
    write_json(directory / "manifest.json", Manifest(**(values | more)).__dict__)


def rows(directory: Path, name: str, values: list[Row]) -> None:
    with JsonLines(directory / name) as file:
        file.extend(values)


def question(number: int, task: str = "sums", text: str = "") -> Row:
    prompt = [{"role": "user", "content": text or f"What is {number} + {number}?"}]
    return example(prompt, str(2 * number), task=task)


def answered(row: Row, model: str, right: bool, index: int = 0, **more: Any) -> Row:
    answer = row["answer"] if right else "wrong"
    values = {
        "model": model,
        "correct": right,
        "lenient_correct": right,
        "formatted": True,
        "tokens": 12,
        "finish_reason": "stop",
        "extracted": answer,
    }
    text = write(f"{model} thinks", answer)
    return sample(row, text, index, source="policy", **(values | more))


def grpo(directory: Path, steps: int = 40) -> None:
    rows(
        directory,
        "metrics.jsonl",
        [
            {
                "step": step,
                "reward": 0.5 + step / 100,
                "rewards/accuracy_reward/mean": 0.4 + step / 100,
                "rewards/format_reward/mean": 1.0,
                "completions/mean_length": 40.0 + step,
                "completions/clipped_ratio": 0.25,
                "entropy": 0.3,
                "kl": 0.001 * step,
                "frac_reward_zero_std": 0.5,
                "loss": None,
            }
            for step in range(1, steps + 1)
        ],
    )


def evaluation(directory: Path, right: dict[str, int], n: int = 40) -> dict[str, list[Row]]:
    """Models that get the first so many of n questions right, two samples each."""
    models = {
        name: [
            answered(question(i, "sums" if i % 2 else "chains"), name, i < most, index)
            for i in range(n)
            for index in range(2)
        ]
        for name, most in right.items()
    }
    rows(directory, "samples.jsonl", [row for part in models.values() for row in part])
    write_json(directory / "results.json", summarize(models))
    sign(directory, "evaluate", finished="2026-01-01T09:00:00Z")
    return models


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A finished chain of five stages."""
    root = tmp_path / "tiny"
    traces = [
        sample(
            question(i),
            write("add", str(2 * i)),
            0,
            source="offline" if i % 4 else "some-teacher",
            drop="duplicate" if i % 5 == 0 else None,
            reward=1.2,
        )
        for i in range(20)
    ]
    rows(root / "traces", "samples.jsonl", traces)
    write_json(root / "traces" / "funnel.json", {"in": 20, "kept": 16, "dropped": {"duplicate": 4}})
    sign(root / "traces", "collect", finished="2026-01-01T01:00:00Z")
    losses = [{"step": i, "loss": 2 / i, "eval_loss": 3 / i} for i in range(1, 30)]
    rows(root / "cold", "metrics.jsonl", losses)
    sign(root / "cold", "sft", finished="2026-01-01T02:00:00Z")
    (root / "cold" / "config.yaml").write_text("max_steps: 29\n")
    grpo(root / "reason")
    sign(root / "reason", "grpo", finished="2026-01-01T03:00:00Z")
    grpo(root / "final")
    sign(root / "final", "grpo", finished="2026-01-01T04:00:00Z")
    evaluation(root / "scores", {"base": 2, "cold": 10, "reason": 25, "final": 34})
    stages = [
        {"name": name, "recipe": recipe}
        for name, recipe in [
            ("traces", "collect"),
            ("cold", "sft"),
            ("reason", "grpo"),
            ("final", "grpo"),
            ("scores", "evaluate"),
        ]
    ]
    write_json(root / "chain.json", {"name": "tiny chain", "stages": stages})
    return root


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
    assert {f"#{name}" for name in ids if name} == targets


def test_the_page_needs_and_allows_nothing_from_elsewhere(chain: Path) -> None:
    html = write_report(chain).read_text(encoding="utf-8")
    css = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert css is not None
    digest = base64.b64encode(hashlib.sha256(css[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(html).elements if "http-equiv" in a)
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in css[1]
    assert "@import" not in css[1]
    assert "://" not in html


def test_the_same_files_give_the_same_bytes(chain: Path) -> None:
    assert write_report(chain).read_bytes() == write_report(chain).read_bytes()
    assert [path.name for path in chain.iterdir() if path.is_file()].count("report.html") == 1
    assert not list(chain.glob(".*.tmp"))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    root = tmp_path / "hostile"
    row = question(1, task=HOSTILE, text=HOSTILE) | {"answer": HOSTILE}
    models = {}
    for name, right in (("cold", False), ("final" + HOSTILE, True)):
        written = answered(row, name, right, extracted=HOSTILE)
        well_formed = HOSTILE + write(HOSTILE, HOSTILE) if right else write(HOSTILE, HOSTILE)
        models[name] = [written | {"completion": well_formed, "finish_reason": HOSTILE}]
    rows(root / "scores", "samples.jsonl", [row for part in models.values() for row in part])
    write_json(root / "scores" / "results.json", summarize(models))
    sign(root / "scores", "evaluate", versions={HOSTILE: HOSTILE}, device=HOSTILE)
    dropped = sample(row, HOSTILE, 0, source=HOSTILE, drop=HOSTILE, reward=0.0)
    kept = sample(row, HOSTILE, 0, source="offline" + HOSTILE, drop=None)
    rows(root / "picks", "samples.jsonl", [dropped, kept])
    write_json(root / "picks" / "funnel.json", {"in": 2, "kept": 1, "dropped": {HOSTILE: 1}})
    (root / "picks" / "config.yaml").write_text(f"key: {HOSTILE}\n")
    (root / "picks" / "log.txt").write_text(f"{HOSTILE}\nfailed: {HOSTILE}\n")
    metrics = [{"step": i, "reward": i, f"rewards/{HOSTILE}/mean": i} for i in range(3)]
    rows(root / "final", "metrics.jsonl", metrics)
    sign(root / "final", HOSTILE, given={HOSTILE: HOSTILE}, inputs={HOSTILE: f"hub:{HOSTILE}"})
    stages = [
        {"name": "picks", "recipe": HOSTILE, "state": HOSTILE, "note": HOSTILE},
        {"name": "final", "recipe": "grpo"},
        {"name": "scores", "recipe": "evaluate"},
    ]
    write_json(root / "chain.json", {"name": HOSTILE, "stages": stages})
    page = report(root)
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
    assert "a?b\ufffd\ufffd\ufffd[31m" in page.text


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
    assert "failed: OutOfMemoryError: too big by 2 GiB" in page.text
    assert "launcher's own" not in page.text
    assert "step 3 " not in page.text
    assert "Not finished yet: scores." in page.text
    assert "reason failed" in page.text


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
    rows_of_table = re.findall(r'<th scope="row">(\w+)</th>.*?class="state (\w+)"', html, re.DOTALL)
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
    assert b"297,000 characters left out" in html


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores/results.json", "{", "results.json is not JSON"),
        ("scores/results.json", "[]", "results.json: need a JSON object with the keys models"),
        ("scores/results.json", '{"models": [{"n": 1}], "pairs": []}', r"models\[0\] has no name"),
        ("traces/funnel.json", '{"in": 3}', "funnel.json: need a JSON object with the keys in"),
        ("cold/metrics.jsonl", "{\n{}\n", "metrics.jsonl.*\n.*line 1"),
        ("cold/manifest.json", '{"recipe": "sft"}', "manifest.json is not a manifest"),
        ("chain.json", "[]", "chain.json: need an object with a list `stages`"),
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
