"""Sampling from servers on the loopback, good ones and bad ones."""

import json
from collections import Counter

import pytest
from server import FAULTS, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.records import example, read_rows
from chainforge.data.sampling.engine import SamplingArgs, open_engine, seed_of
from chainforge.data.sampling.rollouts import roll_out

FORM = "<reasoning_process>so</reasoning_process>\n<summary>{}</summary>"
SYSTEM = {"role": "system", "content": "Reason, then answer."}


def prompts(count=8):
    return [
        example([SYSTEM, {"role": "user", "content": f"{n} + 1 ="}], str(n + 1), task="sums",
                verifier="exact")
        for n in range(count)
    ]  # fmt: skip


def right(request):
    """Answer a sum in the transcript's form."""
    return chat(FORM.format(int(request.prompt.split()[0]) + 1))


def run(tmp_path, *urls, rows=None, **settings):
    args = SamplingArgs(
        **{"engine": "api", "num_samples": 3, "base_url": list(urls), "retry_wait": 0.01} | settings
    )
    return roll_out(
        lambda: open_engine(args, "policy", None, directory=tmp_path),
        rows or prompts(),
        args,
        path=tmp_path / "samples.jsonl",
        transcript="r1-cold-start",
        seed=4,
        provenance={"model": "policy", "stage": "picks"},
    ).samples


def test_every_sample_is_asked_for_once_with_its_seed_and_nothing_left_to_the_server(tmp_path):
    with Server(right) as server:
        rows = run(tmp_path, server.url, temperature=0.7, top_k=5, max_new_tokens=99)
    assert len(rows) == len(server.asked) == 24
    assert all(row["correct"] and row["finish_reason"] == "stop" for row in rows)
    assert {row["tokens"] for row in rows} == {60}
    assert {row["served"] for row in rows} == {"served-model"}
    seeds = {seed_of(4, row["id"], row["sample"]) for row in rows}
    assert {request.body["seed"] for request in server.asked} == seeds
    body = server.asked[0].body
    assert body["messages"][0] == SYSTEM
    assert {key: body[key] for key in body if key not in ("messages", "seed")} == {
        "model": "policy", "temperature": 0.7, "top_p": 1.0, "top_k": 5, "max_tokens": 99,
        "min_p": 0.0, "repetition_penalty": 1.0, "n": 1,
    }  # fmt: skip


def test_a_server_that_knows_no_more_than_openais_fields_gets_no_more(tmp_path):
    with Server(right) as server:
        run(tmp_path, server.url, extra_body={}, rows=prompts(1), served_model="mine")
    assert set(server.asked[0].body) == {
        "messages", "model", "temperature", "top_p", "n", "max_tokens", "seed"
    }  # fmt: skip
    assert server.asked[0].body["model"] == "mine"


def test_several_servers_share_the_work_and_one_that_fails_is_passed_over(tmp_path):
    with Server(right, seconds=0.01) as one, Server(right, seconds=0.01) as two:
        rows = run(tmp_path / "a", one.url, two.url)
        counts = len(one.asked), len(two.asked)
        assert sum(counts) == len(rows) == 24
        assert min(counts) >= 8
    broken = [FAULTS["503"]] * 100
    with Server(right, seconds=0.01) as good, Server(list(broken)) as bad:
        rows = run(tmp_path / "b", good.url, bad.url)
        assert len(rows) == 24
        assert len(bad.asked) < 24


@pytest.mark.parametrize("fault", ["429", "500", "reset", "cut JSON", "HTML", "choices: null"])
def test_what_fails_in_passing_is_asked_again(tmp_path, fault):
    with Server(lambda request: FAULTS[fault] if request.number % 3 == 0 else right(request)) as s:
        rows = run(tmp_path, s.url, rows=prompts(3))
    assert len({(row["id"], row["sample"]) for row in rows}) == 9
    assert all(row["correct"] for row in rows)


def test_a_completion_that_was_cut_off_is_a_sample(tmp_path):
    with Server(lambda request: chat("<reasoning_process>so", "length")) as server:
        rows = run(tmp_path, server.url, rows=prompts(2))
    assert len(server.asked) == 6
    assert {(row["finish_reason"], row["correct"]) for row in rows} == {("length", False)}


def test_a_prompt_that_is_refused_for_good_is_counted_and_not_lost(tmp_path):
    def script(request):
        too_long = Answer({"error": {"message": "the prompt is too long"}}, 422)
        return too_long if request.prompt.startswith("0") else right(request)

    with Server(script) as server:
        rows = run(tmp_path, server.url, rows=prompts(3))
        asked = len(server.asked)
        assert run(tmp_path, server.url, rows=prompts(3)) == rows
        assert len(server.asked) == asked
    assert Counter(row["finish_reason"] for row in rows) == {"stop": 6, "status_422": 3}


def test_what_cannot_be_had_ends_the_run_and_the_next_asks_for_it_alone(tmp_path):
    def script(request):
        return FAULTS["500"] if request.prompt.startswith("0") else right(request)

    lost = pytest.raises(InputError, match="3 of 9 completions could not be had")
    with Server(script) as server, lost:
        run(tmp_path, server.url, rows=prompts(3), max_retries=1)
    with Server(right) as server:
        rows = run(tmp_path, server.url, rows=prompts(3))
    assert len(rows) == 9
    assert len(server.asked) == 3


def test_an_answer_that_came_before_a_kill_is_not_asked_for_again(tmp_path):
    with Server(right) as server:
        rows = run(tmp_path, server.url, rows=prompts(3))
        # The answers are in the account, and not yet among the samples.
        account = tmp_path / "requests.rank-0/requests.jsonl"
        lines = read_rows(account)
        by_key = {f"{row['id']}/{row['sample']}/{row['sampling']['seed']}": row for row in rows}
        for line in lines:
            if "outcome" in line:
                row = by_key[line["key"]]
                names = ("completion", "tokens", "finish_reason", "served")
                line["answer"] = {name: row[name] for name in names}
                line["answer"] |= {"request": line["key"], "source": "policy"}
        account.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "samples.jsonl").unlink()
        assert run(tmp_path, server.url, rows=prompts(3)) == rows
        assert len(server.asked) == 9


def test_a_server_that_takes_the_reasoning_out_is_refused(tmp_path):
    refused = pytest.raises(InputError, match="without a reasoning parser")
    with Server(lambda request: chat("4", reasoning_content="two and two")) as server, refused:
        run(tmp_path, server.url)


def test_prompts_are_asked_in_rounds_until_they_have_enough(tmp_path):
    with Server(lambda request: right(request) if request.tries else chat("no")) as server:
        rows = run(tmp_path, server.url, max_samples=8, round_size=1)
    assert len(rows) == len(server.asked) == 16
    assert [row["correct"] for row in rows] == [False, True] * 8
