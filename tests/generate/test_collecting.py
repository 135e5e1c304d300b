"""Long collections with faults, kills, signals and budgets, against a server on the loopback."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from server import FAULTS, REASONING, Answer, Server, chat

from chainforge.core.errors import Stopped
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.data.sources import example
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect

QUICK = {"teacher": "deepseek", "timeout": 5.0}

# A collection as a process of its own, which can be killed.
DRIVER = """
import json, logging, sys
from chainforge.core import process
from chainforge.generate import api
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect

api.RETRY_SECONDS = 0.02
rows = [json.loads(line) for line in open("examples.jsonl")]
process.run(lambda: collect(TeacherArgs(**json.loads(sys.argv[1])), rows, "out"))
"""


def examples(number):
    return [
        example([{"role": "user", "content": f"What is {n} and two?"}], "4", task="sums")
        for n in range(number)
    ]


class Faulty:
    """Answer a share of the requests with some fault, never the same way twice for a prompt."""

    def __init__(self, share, names=tuple(FAULTS)):
        self.share, self.names, self.faults = share, names, 0

    def __call__(self, request):
        text = f"{request.prompt}/{request.tries}/{request.number}"
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        name = draw.choice(self.names)
        if draw.random() >= self.share:
            return None
        self.faults += name != "drip"  # which only takes its time
        return FAULTS[name]


@pytest.fixture
def folder(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(server, count, **settings):
    write_rows("examples.jsonl", examples(count))
    Path("driver.py").write_text(DRIVER)
    args = json.dumps(QUICK | {"base_url": server.url} | settings)
    return subprocess.Popen([sys.executable, "driver.py", args], stderr=subprocess.PIPE, text=True)


def wait_for_rows(number, process):
    path = Path("out/samples.jsonl")
    while not path.is_file() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def kill_after(server, counts, count, **settings):
    """Start a collection several times, and kill it once it has so many rows."""
    for rows in counts:
        process = start(server, count, **settings)
        wait_for_rows(rows, process)
        process.kill()
        process.wait()


def unheard():
    """Count the requests of which a killed run never heard again."""
    lines = read_rows("out/requests.jsonl", torn_tail=True)
    ended = {line["request"] for line in lines if "outcome" in line}
    return sum(line["request"] not in ended for line in lines if "sent" in line)


def test_killed_three_times_a_thousand_rows_come_through_faults_of_every_kind(folder):
    """And the last run asks only for what is missing."""
    faulty, settings = Faulty(0.15), {"num_samples": 2, "max_concurrency": 32}
    with Server(faulty, seconds=0.02, drip=0.005) as server:
        kill_after(server, (150, 400, 800), 500, **settings)
        cut = unheard()
        process = start(server, 500, **settings)
        assert process.wait(60) == 0, process.stderr.read()
    rows = read_rows("out/samples.jsonl")
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 1000
    assert {row["completion"].count(REASONING) for row in rows} == {1}
    assert not Path("out/failures.jsonl").exists()
    assert faulty.faults > 100
    assert 0 < cut <= 3 * 32
    assert len(server.asked) <= faulty.faults + 1000 + cut


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_under_way_finish(folder, number):
    with Server(seconds=0.3) as server:
        process = start(server, 200)
        wait_for_rows(8, process)
        process.send_signal(number)
        words = process.communicate(timeout=20)[1]
        assert process.returncode == 128 + number
        assert f"stopped: by {number.name}; every answer so far is kept" in words
        # Every request that was sent has its row: nothing that was paid for is lost.
        assert len(read_rows("out/samples.jsonl")) == len(server.asked) < 200
        assert unheard() == 0


def test_a_second_signal_does_not_wait(folder):
    with Server(lambda request: FAULTS["hang"] if request.number else None) as server:
        process = start(server, 30, timeout=50.0)
        wait_for_rows(1, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    outcomes = {row.get("outcome") for row in read_rows("out/requests.jsonl") if "told" in row}
    assert outcomes == {"answered", "interrupted"}


def told(request):
    """Return a usage of as many tokens as were allowed, and as many of prompt as its bytes."""
    prompt = sum(len(turn["content"]) for turn in request.body["messages"]) + 64
    return {"prompt_tokens": prompt, "completion_tokens": request.body["max_tokens"]}


def as_long_as_allowed(request):
    return Answer(chat(reasoning_content=REASONING, usage=told(request)), seconds=0.005)


RATES = {"cache_hit": 0.01, "cache_miss": 0.30, "output": 1.20}
PRICES = {"api.deepseek.com": {"date": "2026-11-01", "models": {"deepseek-flash": RATES}}}
PAID = {"max_new_tokens": 500, "prices": "prices.yaml"}


@pytest.fixture
def prices(folder):
    (folder / "prices.yaml").write_text(json.dumps(PRICES))


def bill(server):
    """Return what all that was asked costs, answered or not."""
    usages = [told(request) for request in server.asked]
    return sum(0.3 * u["prompt_tokens"] + 1.2 * u["completion_tokens"] for u in usages) / 1e6


@pytest.mark.parametrize("concurrency", [1, 20, 200])
@pytest.mark.parametrize("faults", [False, True])
def test_max_usd_is_never_exceeded(prices, concurrency, faults):
    budget = 0.05
    silent = Faulty(0.3, ("hang", "cut body", "reset", "500", "cut JSON"))  # bills unseen

    def script(request):
        return (silent(request) if faults else None) or as_long_as_allowed(request)

    with Server(script) as server:
        settings = QUICK | PAID | {"timeout": 0.5 if faults else 20.0, "base_url": server.url}
        args = TeacherArgs(**settings, max_usd=budget, max_concurrency=concurrency)
        for _ in range(2):  # a second run begins with what the first one spent
            with pytest.raises(Stopped, match=r"by max_usd \(0.05\): .*raise max_usd") as stopped:
                collect(args, examples(300), "out")
            assert stopped.value.code == 3
            assert bill(server) <= budget
        rows = read_rows("out/samples.jsonl")
        assert len(rows) > (20 if faults else 60)
        assert sum(row["cost"] for row in rows) <= budget


def test_max_usd_counts_the_requests_of_a_killed_run(prices):
    settings = PAID | {"max_usd": 0.04, "max_concurrency": 8}
    with Server(as_long_as_allowed) as server:
        kill_after(server, (5, 15, 25), 300, **settings)
        process = start(server, 300, **settings)
        words = process.communicate(timeout=30)[1]
        assert (process.returncode, "stopped: by max_usd" in words) == (3, True)
        assert bill(server) <= 0.04


def test_the_limit_of_a_server_is_found_and_kept_to(folder):
    with Server(limit=10, seconds=0.05) as server:
        args = TeacherArgs(**QUICK, base_url=server.url)
        assert len(collect(args, examples(400), "out").rows) == 400
        assert server.most == 10
        assert len(server.asked) < 450


def run_chain(server, **settings):
    """Collect 40 rows, of which 10 have another answer, as the stage of a chain."""
    answers = ["4" if n % 4 else "5" for n in range(40)]
    rows = [
        {"question": f"What is {n} and two?", "answer": answer, "verifier": "numeric"}
        for n, answer in enumerate(answers)
    ]
    write_rows("rows.jsonl", rows)
    tasks = [{"fn": "jsonl", "params": {"path": "rows.jsonl"}, "split": "all"}]
    config = QUICK | {"tasks": tasks, "base_url": server.url} | settings
    Path("collect.yaml").write_text(yaml.safe_dump(config))
    stages = [{"name": "traces", "recipe": "collect", "config": "collect.yaml"}]
    Path("chain.yaml").write_text(yaml.safe_dump({"name": "c", "stages": stages}))
    command = [sys.executable, "-m", "chainforge.cli", "run", "chain.yaml"]
    env = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_chain_collects_stops_at_its_budget_and_continues(folder, key):
    stage = folder / "runs/c/traces"
    fourth = "What is 3 and two?"
    with Server(lambda request: FAULTS["500"] if request.prompt == fourth else None) as server:
        settings = {"fallback": "none", "max_retries": 1, "max_concurrency": 4}
        code, text = run_chain(server, max_requests=12, **settings)
        assert code == 3, text
        assert "stopped: stage traces by max_requests (12): 12 spent" in text
        assert not (stage / "manifest.json").exists()
        assert len(server.asked) == 12
        code, text = run_chain(server, **settings)  # the same stage: what is paid stays
        assert code == 0, text
        # The failing prompt is asked twice a run, in the first run as far as its budget went.
        assert 39 + 2 <= len(server.asked) <= 39 + 4
    funnel = json.loads((stage / "funnel.json").read_text())
    assert (funnel["in"], funnel["kept"]) == (40, 29)
    assert funnel["dropped"] == {"status_500": 1, "wrong": 10}
    card = (stage / "dataset/README.md").read_text()
    assert "| `wrong` | 10 |" in card
    assert "distillation" in card
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["metrics"]["sources"] == {"deepseek-flash": 39}
    assert manifest["metrics"]["spending"]["requests"] == len(server.asked)
    for path in folder.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
