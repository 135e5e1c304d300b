"""Sampling from servers on the loopback, good ones and bad ones."""

import os
import random

import pytest
from server import FAULTS, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.data.sources import example
from chainforge.generate.api import Limiter
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import open_engine, roll_out
from chainforge.generate.settings import Draw, SamplingArgs, seed_of

FORM = "<reasoning_process>so</reasoning_process>\n<summary>{}</summary>"
SYSTEM = {"role": "system", "content": "Reason, then answer."}


def prompts(count=8):
    turns = [[SYSTEM, {"role": "user", "content": f"{n} + 1 ="}] for n in range(count)]
    return [
        example(turn, str(n + 1), task="sums", verifier="exact") for n, turn in enumerate(turns)
    ]


def right(request):
    """Answer a sum in the transcript's form."""
    return chat(FORM.format(int(request.prompt.split()[0]) + 1))


def run(path, *servers, rows=None, **settings):
    urls = [server.url for server in servers]
    args = SamplingArgs(**{"engine": "api", "num_samples": 3, "base_url": urls} | settings)
    return roll_out(
        lambda: open_engine(args, "policy", None, directory=path),
        rows or prompts(),
        args,
        path=path / "samples.jsonl",
        seed=4,
        provenance={"model": "policy", "stage": "picks"},
        score=lambda rows: score_samples(rows, "r1-cold-start"),
    ).samples


def test_every_sample_is_asked_for_once_with_its_seed_and_nothing_left_to_the_server(
    server, key, tmp_path
):
    server.script = right
    off = {"enable_thinking": False}
    settings = {"temperature": 0.7, "top_k": 5, "max_new_tokens": 99, "chat_template_kwargs": off}
    rows = run(tmp_path, server, **settings)
    assert len(rows) == len(server.asked) == 24
    assert all(row["correct"] and row["finish_reason"] == "stop" for row in rows)
    assert {(row["tokens"], row["served"]) for row in rows} == {(60, "served-model")}
    seeds = {seed_of(4, row["id"], row["sample"]) for row in rows}
    assert {request.body["seed"] for request in server.asked} == seeds
    asked = server.asked[0]
    assert asked.body["messages"][0] == SYSTEM
    assert {key: asked.body[key] for key in asked.body if key not in ("messages", "seed")} == {
        "model": "policy", "temperature": 0.7, "top_p": 1.0, "top_k": 5, "max_tokens": 99,
        "min_p": 0.0, "repetition_penalty": 1.0, "n": 1, "chat_template_kwargs": off,
    }  # fmt: skip
    assert asked.headers.pop("authorization") == f"Bearer {key}"
    assert set(asked.headers) == {"host", "content-type", "content-length", "accept-encoding"}


def test_several_servers_share_the_work_and_one_that_fails_is_passed_over(server, tmp_path):
    server.script, server.seconds = right, 0.01
    with Server(right, seconds=0.01) as other, Server([FAULTS["503"]] * 100) as bad:
        assert len(run(tmp_path / "a", server, other)) == 24
        assert len(server.asked) + len(other.asked) == 24
        assert min(len(server.asked), len(other.asked)) >= 8
        assert len(run(tmp_path / "b", other, bad)) == 24
        assert len(bad.asked) < 24


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (FAULTS["500"], "status 500: .*oops"),
        (chat(None, "tool_calls", tool_calls=[{"id": "1"}]), "no answer .*'tool_calls'"),
        (Answer({"detail": "Unexpected keys: {'min_p'}"}, 422),
         "status 422: .*Unexpected keys.*min_p, .*`extra_body: {}`"),
    ],
)  # fmt: skip
def test_a_row_without_an_answer_ends_the_run_and_the_next_asks_for_it_alone(
    server, tmp_path, answer, words
):
    server.script = lambda one: answer if one.prompt.startswith("0") else right(one)
    with pytest.raises(InputError, match=f"(?s)3 of 9 completions are missing.*{words}"):
        run(tmp_path, server, rows=prompts(3), max_retries=1)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 6
    asked = len(server.asked)
    server.script = right
    assert len(run(tmp_path, server, rows=prompts(3))) == 9
    assert len(server.asked) == asked + 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (chat("4", reasoning_content="two and two"), "without a reasoning parser"),
        (Answer({"error": "who are you?"}, 403), "status 403: .*who are you"),
    ],
)
def test_a_server_that_cannot_serve_ends_the_run(server, tmp_path, answer, words):
    server.script = lambda request: answer
    with pytest.raises(InputError, match=words):
        run(tmp_path, server)
    assert len(server.asked) <= 10
    assert not (tmp_path / "samples.jsonl").exists()


def test_how_a_completion_ended(server, tmp_path):
    """What was cut off is a sample, and an unknown end is a stop."""
    server.script = [chat("4", "tired"), chat("4", None), chat("4", "MAX_TOKENS"), chat("", "stop"),
                     chat("<reasoning_process>so", "length")]  # fmt: skip
    rows = run(tmp_path, server, rows=prompts(1), num_samples=5, max_concurrency=1)
    ends = [row["finish_reason"] for row in rows]
    assert ends == ["stop", "stop", "length", "stop", "length"]
    assert not any(row["correct"] for row in rows)


def sample(tmp_path, server, policy="a", fails=False, **settings):
    """Sample once; where judging fails, the answers stay in the account only."""
    taken = []

    def take(batch):
        if fails:
            raise RuntimeError("killed")
        taken.extend(batch)

    args = SamplingArgs(engine="api", base_url=server.url, **settings)
    draws = [Draw(row, 0, seed_of(4, row["id"], 0)) for row in prompts(3)]
    open_engine(args, policy, None, directory=tmp_path).sample(draws, take)
    return [answer["completion"] for _, answer in taken]


@pytest.mark.parametrize(
    ("other", "asked"),
    [({}, 0), ({"policy": "b"}, 3), ({"temperature": 0.5}, 3), ({"extra_body": {}}, 3)],
)
def test_an_answer_that_came_before_a_kill_is_used_for_the_same_request_alone(
    server, tmp_path, other, asked
):
    server.script = right
    with pytest.raises(RuntimeError):
        sample(tmp_path, server, fails=True)
    assert sorted(sample(tmp_path, server, **other)) == [FORM.format(n) for n in (1, 2, 3)]
    assert len(server.asked) == 3 + asked
    with Server(right) as second:  # another address
        sample(tmp_path, second, **other)
    assert len(second.asked) == 3


def test_no_answer_is_forgotten_before_its_sample_is_on_disk(server, tmp_path, monkeypatch):
    samples, on_disk = tmp_path / "samples.jsonl", []
    force, replace = os.fsync, os.replace

    def fsync(descriptor):
        force(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(samples):
            on_disk[:] = read_rows(samples)

    def forget(source, target):
        assert target.name != "requests.rank-0.jsonl" or len(on_disk) == 24
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", forget)
    server.script = right
    run(tmp_path, server)
    assert len(on_disk) == 24


class World:
    """A server that grants `limit` requests of one second each, and a client that is eager."""

    def __init__(self, limit, ceiling=500):
        self.limit, self.limiter = limit, Limiter(ceiling)
        self.now, self.under_way, self.answered, self.refused = 0.0, [], 0, 0

    def run(self, seconds, failing=0.0):
        draw, end = random.Random(0), self.now + seconds
        while self.now < end:
            while not self.limiter.wait(self.now):
                self.limiter.send()
                if len(self.under_way) >= self.limit:
                    self.limiter.refused(self.now, self.now, None)
                    self.refused += 1
                    break
                self.under_way.append(self.now)
            self.now += 0.05
            while self.under_way and self.under_way[0] + 1 <= self.now:
                sent = self.under_way.pop(0)
                if draw.random() < failing:
                    self.limiter.failed(self.now)
                else:
                    self.limiter.answered(sent)
                    self.answered += 1
        return self


@pytest.mark.parametrize("limit", [1, 3, 20, 100])
def test_the_limit_is_found_used_and_followed(limit):
    world = World(limit).run(10)
    before = world.answered
    world.run(60)
    assert (world.answered - before) / (60 * limit) > 0.9
    assert world.refused < 45
    world.limit = 60
    world.run(400)
    assert world.limiter.level > 40
    world.limit, refused = 5, world.refused
    world.run(40)
    assert world.limiter.level <= 8
    assert world.refused - refused < 60


def test_the_level_doubles_until_the_first_refusal():
    world = World(limit=400).run(3.5)
    assert (world.limiter.level >= 80, world.refused) == (True, 0)
    assert World(1000, ceiling=30).run(20).limiter.level == 30
    assert World(400).run(5, failing=0.1).limiter.level > 50  # other failures cut nothing
