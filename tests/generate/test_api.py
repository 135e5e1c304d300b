"""Sampling from servers on the loopback, good ones and bad ones."""

import os

import pytest
from server import FAULTS, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example, read_rows
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import open_engine, roll_out
from chainforge.generate.settings import Draw, SamplingArgs, seed_of

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
        seed=4,
        provenance={"model": "policy", "stage": "picks"},
        score=lambda rows: score_samples(rows, "r1-cold-start"),
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


TOO_LONG = Answer({"error": {"message": "the prompt is too long"}}, 422)
NO_MIN_P = Answer({"detail": "Unexpected keys in the request: {'min_p'}"}, 422)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (FAULTS["500"], "status 500: oops"),
        (TOO_LONG, "status 422: the prompt is too long"),
        (chat(None, "tool_calls", tool_calls=[{"id": "1"}]), "no answer .*'tool_calls'"),
        (chat(None), "no answer .*'stop'"),
        (chat("", "content_filter"), "no answer .*'content_filter'"),
        ({"choices": [{"finish_reason": "stop"}]}, "no answer"),
    ],
)
def test_a_row_without_an_answer_ends_the_run_and_the_next_asks_for_it_alone(
    tmp_path, answer, words
):
    def script(request):
        return answer if request.prompt.startswith("0") else right(request)

    lost = pytest.raises(InputError, match=f"(?s)3 of 9 completions are missing.*{words}")
    with Server(script) as server, lost:
        run(tmp_path, server.url, rows=prompts(3), max_retries=1)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 6
    with Server(right) as server:
        rows = run(tmp_path, server.url, rows=prompts(3))
    assert len(rows) == 9
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (NO_MIN_P, "every request: status 422: Unexpected keys .*not know: min_p; .*extra_body: {}"),
        (Answer({"detail": [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]},
                422), "top_k.*not know: top_k; "),
        (Answer({"object": "error", "message": "unknown field"}, 400),
         "status 400: unknown field.*not know: min_p, repetition_penalty, top_k; "),
        (Answer(b"no such route", 405), "every request: status 405: no such route"),
        (Answer({"error": "who are you?"}, 403), "status 403: who are you"),
        (Answer({}, 308, {"location": "/v1/"}), "status 308.*redirects are not followed"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_every_request_ends_the_run_with_its_words(tmp_path, answer, words):
    with Server(lambda request: answer) as server, pytest.raises(InputError, match=words):
        run(tmp_path, server.url, rows=prompts(2))
    assert len(server.asked) <= 6
    assert not (tmp_path / "samples.jsonl").exists()


def test_an_unknown_end_and_an_odd_number_spoil_no_completion(tmp_path, caplog):
    usage = {"prompt_tokens": 9, "completion_tokens": float("nan")}
    script = [chat("4", "tired"), chat("4", None, usage), chat("4", "MAX_TOKENS"), chat("", "eos")]
    with Server(script) as server:
        rows = run(tmp_path, server.url, rows=prompts(1), num_samples=4, max_concurrency=1)
    ends = [(row["finish_reason"], row.get("finish_reason_raw"), row["tokens"]) for row in rows]
    assert ends == [("stop", "tired", 60), ("stop", None, None), ("length", "MAX_TOKENS", 60),
                    ("stop", "eos", 60)]  # fmt: skip
    assert "unknown finish_reason ('tired')" in caplog.text


@pytest.mark.parametrize(
    ("field", "advice"),
    [
        ({"max_tokens": 100_000}, "max_new_tokens"),
        ({"max_completion_tokens": 9}, "max_new_tokens"),
        ({"n": 8}, "num_samples"),
        ({"model": "dearer"}, "served_model"),
        ({"seed": 1}, "seed"),
        ({"messages": []}, "leave it out"),
    ],
)
def test_fields_that_are_set_already_are_refused(tmp_path, field, advice):
    with Server(right) as server, pytest.raises(InputError, match=f"extra_body: .*{advice}"):
        run(tmp_path, server.url, extra_body=field)
    assert not server.asked


def draws():
    return [Draw(row, 0, seed_of(4, row["id"], 0)) for row in prompts(3)]


def sample(tmp_path, url, policy="a", fails=False, **settings):
    """Sample once; where judging fails, the answers stay in the account only."""
    taken = []

    def take(batch):
        if fails:
            raise RuntimeError("killed")
        taken.extend(batch)

    args = SamplingArgs(engine="api", base_url=url, retry_wait=0.01, **settings)
    open_engine(args, policy, None, directory=tmp_path).sample(draws(), take)
    return taken


def test_an_answer_that_came_before_a_kill_is_not_asked_for_again(tmp_path):
    with Server(right) as server:
        with pytest.raises(RuntimeError):
            sample(tmp_path, server.url, fails=True)
        assert len(server.asked) == 3
        answers = [answer["completion"] for _, answer in sample(tmp_path, server.url)]
        assert len(server.asked) == 3
    assert sorted(answers) == [FORM.format(n) for n in (1, 2, 3)]


def test_no_answer_is_forgotten_before_its_sample_is_on_disk(tmp_path, monkeypatch):
    samples, on_disk = tmp_path / "samples.jsonl", []
    force, replace = os.fsync, os.replace

    def fsync(descriptor):
        force(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(samples):
            on_disk[:] = read_rows(samples)

    def forget(source, target):
        if target.name == "requests.rank-0.jsonl":
            assert len(on_disk) == 24
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", forget)
    with Server(right) as server:
        run(tmp_path, server.url)
    assert len(on_disk) == 24


@pytest.mark.parametrize(
    "other", [{"policy": "b"}, {"served_model": "b"}, {"temperature": 0.5}, {"extra_body": {}}]
)
def test_no_model_and_no_settings_get_the_answers_of_others(tmp_path, other):
    with Server(right) as server:
        with pytest.raises(RuntimeError):
            sample(tmp_path, server.url, fails=True)
        sample(tmp_path, server.url, **other)
        assert len(server.asked) == 6
        with Server(right) as second:
            sample(tmp_path, second.url, **other)
        assert len(second.asked) == 3


def test_a_server_that_takes_the_reasoning_out_is_refused(tmp_path):
    refused = pytest.raises(InputError, match="without a reasoning parser")
    with Server(lambda request: chat("4", reasoning_content="two and two")) as server, refused:
        run(tmp_path, server.url)


def test_prompts_are_asked_in_rounds_until_they_have_enough(tmp_path):
    with Server(lambda request: right(request) if request.tries else chat("no")) as server:
        rows = run(tmp_path, server.url, max_samples=8, round_size=1)
    assert len(rows) == len(server.asked) == 16
    assert [row["correct"] for row in rows] == [False, True] * 8
