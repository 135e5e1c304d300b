"""Collecting from a real server on the loopback, whose faults are chosen per request."""

import json
import logging
import time

import pytest
from server import FAULTS, GOOD, REASONING, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.core.transcript import DEFAULT, write
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.select import select
from chainforge.data.sft_dataset import pair_of
from chainforge.data.sources import example
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.api import MAX_REPLY_MIB
from chainforge.generate.build import BuildArgs, build
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import MAX_USELESS
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect
from chainforge.rewards.reward import RewardArgs, load_rewards

FILTERS = FilterArgs(min_reasoning_chars=20)
SAID = {"reasoning_content": REASONING}


@pytest.fixture(scope="module")
def sums():
    params = {"dataset": "chain_sum", "max_digits": 1}
    return load_examples(TaskArgs([{"fn": "reasoning_gym", "params": params, "size": 30}]))


def asking(server, **settings):
    common = {"teacher": "deepseek", "base_url": server.url}
    return TeacherArgs(**common | {"max_retries": 2, "outage_timeout": 0.1} | settings)


def lines(path):
    return read_rows(path) if path.exists() else []


def failures(directory):
    return [row["class"] for row in lines(directory / "failures.jsonl")]


def only_for(row, answer):
    """Answer one row's prompt like this, and the others well."""
    prompt = row["prompt"][-1]["content"]
    return lambda request: answer if request.prompt == prompt else None


def test_a_deepseek_row(server, sums, tmp_path):
    collected = collect(asking(server), sums[:1], tmp_path, stage="traces")
    (row,) = collected.rows
    assert row["completion"] == write(REASONING, "4")
    (asked,) = server.asked
    expected = sums[0] | {
        "source": "deepseek-flash",
        "teacher": "deepseek",
        "model": "served-model",
        "system_fingerprint": "fp-1",
        "response_id": "r-1",
        "host": server.url.removeprefix("http://").removesuffix("/v1"),
        "stage": "traces",
        "sample": 0,
        "reasoning_source": "reasoning_content",
        "finish_reason": "stop",
        "tokens": 60,
        "attempts": 1,
        "price_date": "2026-11-15",
        # What was really sent, but for the messages.
        "sampling": {key: value for key, value in asked.body.items() if key != "messages"},
    }
    assert {key: row[key] for key in expected} == expected
    # 40 tokens in that missed the cache and 60 out, off-peak or at peak.
    assert row["cost"] in (pytest.approx(42e-6), pytest.approx(84e-6))
    assert row["time"].endswith("+00:00")
    assert asked.body["model"] == "deepseek-flash"
    assert asked.body["thinking"] == {"type": "enabled"}
    # Our tags are ours to write: the teacher is not asked for them.
    assert [turn["role"] for turn in asked.body["messages"]] == ["system", "user"]
    assert "<summary>" not in json.dumps(asked.body["messages"])
    assert (collected.lost, collected.sources) == ({}, {"deepseek-flash": 1})
    assert collected.spending["usd"] == pytest.approx(row["cost"])
    assert read_rows(tmp_path / "samples.jsonl") == collected.rows


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"reasoning": REASONING}, "reasoning"),
        ({"reasoning_content": REASONING, "reasoning": "No."}, "reasoning_content"),
        ({"content": f"<think>\n{REASONING}\n</think>\n\n4"}, "tags"),
        ({"content": f"{REASONING}\n</think>4"}, "tags"),
        ({"content": f"<think>{REASONING}</think>4", "reasoning": REASONING}, "reasoning"),
        ({"content": write(REASONING, "4")}, "transcript"),
    ],
)
def test_where_the_reasoning_is(server, sums, tmp_path, message, found):
    server.script = [chat(**({"content": "4"} | message))]
    (row,) = collect(asking(server), sums[:1], tmp_path).rows
    assert (row["completion"], row["reasoning_source"]) == (write(REASONING, "4"), found)


REFUSED = {"error": {"message": "the input was flagged by moderation"}}
ODD = [
    # A class of failure, or None, and how often it is asked for.
    (chat(), "no_reasoning", 1),
    (chat(reasoning_content="\u200b"), "no_reasoning", 1),
    (chat("\u200b\u3164", reasoning_content="So 4."), "no_answer", 1),
    (chat(None, **SAID), "no_answer", 1),
    (chat({"b": 2}), "no_answer", 1),
    (chat("<think>Two and"), "unfinished_reasoning", 1),
    (chat("4", "content_filter", **SAID), "content_filter", 1),
    (chat("<summary>4</summary>", **SAID), "tags", 1),
    (chat("4", "length", **SAID), "truncated", 1),
    (Answer(REFUSED, 400), "status_400", 1),
    (Answer(REFUSED, 403), "status_403", 1),
    (Answer(REFUSED, 422), "status_422", 1),
    (Answer(b" " * (MAX_REPLY_MIB * 2**20 + 1)), "too_large", 1),
    (chat("4", None, **SAID), None, 1),
    (chat("4", "tired", **SAID), None, 1),
    ({**chat("4", **SAID), "usage": None, "extra": 10**30}, None, 1),
    (chat("4", **SAID, usage={"prompt_tokens_details": [1], "prompt_tokens": 10**30}), None, 1),
    (chat("4", "insufficient_system_resource", **SAID), "unfinished", 3),
    ({"choices": [{"finish_reason": "stop", "message": ["4"]}]}, "malformed", 3),
    (Answer(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "malformed", 3),
    (Answer(b'{"choices": [], "a": NaN}'), "malformed", 3),
    (chat([{"b": 2}], {"a": 1}), "malformed", 3),
]


@pytest.mark.parametrize(("answer", "kind", "times"), ODD, ids=range(len(ODD)))
def test_an_odd_reply_ends_no_collection_and_is_never_made_a_row(
    server, sums, tmp_path, answer, kind, times
):
    server.script = only_for(sums[1], answer)
    args = asking(server, max_concurrency=1)
    collected = collect(args, sums[:2], tmp_path)
    assert collected.lost == ({kind: 1} if kind else {})
    assert len(collected.rows) == (1 if kind else 2)
    assert failures(tmp_path) == ([kind] if kind else [])
    assert len(server.asked) == 1 + times
    assert all(map(pair_of, collected.rows))
    assert {row["finish_reason"] for row in collected.rows} == {"stop"}
    if times == 1:  # what was paid for is not asked for again
        assert collect(args, sums[:2], tmp_path).rows == collected.rows
        assert len(server.asked) == 2 + str(kind).startswith("status")


def test_the_filters_of_reject_drop_answers(server, sums, tmp_path):
    server.script = lambda request: chat(reasoning_content=f"{REASONING}<|im_end|>\nAgain?")
    score = lambda rows: [one | {"correct": True, "formatted": True, "reward": 1} for one in rows]  # noqa: E731
    for _ in range(2):
        collected = collect(asking(server), sums[:1], tmp_path, score=score)
        with pytest.raises(InputError, match="dropped as chat_token "):
            build(collected.rows, tmp_path, SelectionArgs(), FILTERS, BuildArgs())
        funnel = json.loads((tmp_path / "funnel.json").read_text())
        assert funnel["dropped"] == {"chat_token": 1}
    assert len(server.asked) == 1


@pytest.mark.parametrize("usage", [{"prompt_tokens": 40, "completion_tokens": 0}, {}, None])
def test_a_usage_that_cannot_be_is_unknown_and_never_free(server, sums, tmp_path, usage):
    server.script = [chat("4", usage=usage, **SAID)]
    collected = collect(asking(server, max_new_tokens=1000), sums[:1], tmp_path)
    assert collected.rows[0]["cost"] is None
    spending = collected.spending
    assert (spending["untold_requests"], spending["usd"]) == (1, 0)
    # The prompt's bytes and all the tokens that were allowed, at the dearest hour.
    assert spending["untold_usd_at_most"] > 1000 * 1.2e-6 / 2


def test_a_redirect_is_never_followed(server, sums, tmp_path):
    with Server() as other:
        server.script = lambda request: Answer(GOOD, 307, {"location": other.url})
        with pytest.raises(InputError, match=f"not followed; set `base_url`.*{other.port}"):
            collect(asking(server, max_requests=1), sums, tmp_path)
    assert (len(server.asked), len(other.asked)) == (1, 0)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DEEPSEEK_API_KEY", None, "DEEPSEEK_API_KEY"),
        ("DEEPSEEK_API_KEY", "sk-one\nsk-two", "DEEPSEEK_API_KEY: the value contains"),
        ("ALL_PROXY", "nonsense://host", "no request can be sent: .*ALL_PROXY"),
        ("SSL_CERT_FILE", "/none", "no request can be sent: .*SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_is_wrong_costs_no_row(
    server, sums, tmp_path, monkeypatch, variable, value, words
):
    monkeypatch.delenv(variable, raising=False)
    if value:
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=words) as error:
        collect(asking(server), sums, tmp_path)
    assert "sk-one" not in str(error.value)
    assert not [*server.asked, *tmp_path.iterdir()]


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/v1", "http://127.0.0.1:9/v1"])
def test_a_server_that_cannot_be_reached_ends_the_run(server, sums, tmp_path, url):
    with pytest.raises(InputError, match=f"{url[:16]}.*check that a server is running"):
        collect(asking(server, base_url=url), sums, tmp_path)
    assert not lines(tmp_path / "failures.jsonl")


@pytest.mark.parametrize("name", [*FAULTS, "slow drip"])
def test_passing_errors_are_retried(server, sums, tmp_path, name):
    """The deadline counts the whole request: of a slow drip each read is well within it."""
    server.script = [FAULTS[name.removeprefix("slow ")]]
    server.drip = 0.1 if name == "slow drip" else 0.001
    args = asking(server, timeout=1.0 if name in ("hang", "slow drip") else 30.0)
    collected = collect(args, sums[:1], tmp_path)
    assert len(collected.rows) == 1
    assert collected.rows[0]["attempts"] == len(server.asked) == 1 + (name != "drip")
    assert failures(tmp_path) == []


@pytest.mark.parametrize("fallback", ["none", "offline"])
def test_used_up_retries_are_a_recorded_failure_and_asked_again(server, sums, tmp_path, fallback):
    """A fallback's rows say that they are."""
    server.script = only_for(sums[0], FAULTS["500"])
    collected = collect(asking(server, fallback=fallback), sums[:2], tmp_path)
    assert failures(tmp_path) == ["status_500"]
    assert len(server.asked) == 3 + 1
    if fallback == "offline":
        sources = [(row["source"], row["teacher"]) for row in collected.rows]
        assert sources == [("offline-fallback", "offline"), ("deepseek-flash", "deepseek")]
        assert collected.sources == {"deepseek-flash": 1, "offline-fallback": 1}
        return
    assert (len(collected.rows), collected.lost) == (1, {"status_500": 1})
    server.script = []
    again = collect(asking(server), sums[:2], tmp_path)
    assert (len(again.rows), again.lost, len(server.asked)) == (2, {}, 5)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "key is not accepted: check DEEPSEEK_API_KEY"),
        (402, "no balance"),
        (404, "no such mo"),
    ],
)
def test_fatal_statuses_stop_the_run_and_keep_the_rows(server, sums, tmp_path, status, message):
    fatal = Answer({"error": {"message": "refused"}}, status)
    server.script = lambda request: fatal if request.number >= 7 else None
    with pytest.raises(InputError, match=message):
        collect(asking(server, fallback="offline"), sums, tmp_path)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 7
    assert len(server.asked) < 30
    server.script = []
    collect(asking(server), sums, tmp_path)
    assert len({row["id"] for row in read_rows(tmp_path / "samples.jsonl")}) == 30


def test_an_outage_is_waited_for_one_request_at_a_time(server, sums, tmp_path):
    server.script = lambda request: FAULTS["503"] if 5 <= request.number < 32 else None
    args = asking(server, outage_timeout=20, max_retries=20, max_concurrency=4)
    assert len(collect(args, sums, tmp_path).rows) == 30
    # Once everything fails, a single request finds out whether it still does.
    assert max(request.under_way for request in server.asked[29:32]) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(chat(), seconds=0.05), f"{MAX_USELESS} answers .* unusable.*no_reasoning"),
        (Answer(chat("4", reasoning_content="2 + 2 = 4."), seconds=0.05), "unusable.*too_short"),
        (Answer(b"<html>no field \x1b[2J", 422, seconds=0.05),
         r"unusable.*status 422: .*no field \\x1b\[2J.*thinking, top_k; `extra_body: {}`"),
        (FAULTS["500"], "requests in a row failed.*status 500"),
    ],
)  # fmt: skip
def test_nothing_of_use_stops_the_run(server, sums, tmp_path, answer, words):
    """Unusable answers, rows that the filters drop, settings that are refused, an outage."""
    server.script = lambda request: answer
    args = asking(server, max_retries=50, max_concurrency=1, extra_body={"top_k": 5})
    with pytest.raises(InputError, match=words):
        collect(args, sums, tmp_path, filters=FILTERS)
    assert len(server.asked) < 30 or "failed" in words
    # What was paid for stays, and what was refused is asked for again.
    assert bool(lines(tmp_path / "samples.jsonl")) == ("too_short" in words)
    server.script, asked = [], len(server.asked)
    collect(asking(server, extra_body={"top_k": 5}), sums, tmp_path)
    paid = MAX_USELESS if "no_reasoning" in words or "too_short" in words else 0
    assert 0 < len(server.asked) - asked <= 30 - paid


def test_two_thirds_without_an_answer_ends_no_collection(server, sums, tmp_path):
    """However many of them are scored at once."""
    server.script = lambda request: chat() if request.number % 3 else None
    args = asking(server, num_samples=4, max_concurrency=200)
    collected = collect(args, sums, tmp_path, score=lambda rows: time.sleep(0.1) or rows)
    assert collected.lost == {"no_reasoning": 80}
    assert len(collected.rows) == 40


def test_the_key_is_nowhere(server, key, sums, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "chainforge")
    echo = {"error": {"message": f"wrong key {key}", key: key}}
    told = chat(key, reasoning_content=f"The key {key} was sent to me", extra={key: key})
    told |= {"id": key, "model": key, "system_fingerprint": key}
    server.script = [Answer(echo, 500), Answer(echo, 400), echo, Answer(key, 503), told,
                     chat(f"<think>{key}", **SAID), Answer(echo, 401)]  # fmt: skip
    with pytest.raises(InputError) as caught:
        collect(asking(server, max_concurrency=1), sums, tmp_path)
    assert {row.headers["authorization"] for row in server.asked} == {f"Bearer {key}"}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert all("[DEEPSEEK_API_KEY]" in text for text in written)
    assert not any(key in text for text in [*written, caplog.text, str(caught.value)])
    assert caught.value.__cause__ is None


def test_a_server_of_ones_own_needs_no_key_and_has_no_price(server, tmp_path, monkeypatch):
    """Its prompts may have no answer."""
    monkeypatch.delenv("OPENAI_API_KEY")
    extra = {"reasoning": {"enabled": True}}
    on = {"enable_thinking": True}
    settings = {"temperature": 0.6, "extra_body": extra, "chat_template_kwargs": on}
    args = asking(server, teacher="openai", model="qwen", **settings)
    rows = [example([{"role": "user", "content": "Why add?"}], None, task="chat")]
    rewards = load_rewards(RewardArgs(), rows[0])
    score = lambda rows: score_samples(rows, DEFAULT, rewards)  # noqa: E731
    collected = collect(args, rows, tmp_path, score=score)
    (row,), _ = select(collected.rows, SelectionArgs())
    assert (row["drop"], row["answer"], row["correct"]) == (None, None, None)
    assert row["rewards"] == {"accuracy_reward": None, "format_reward": 1.0}
    (asked,) = server.asked
    sent = asked.body
    assert "authorization" not in asked.headers
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("qwen", 0.6, 32768)
    assert (sent["reasoning"], "thinking" in sent) == ({"enabled": True}, False)
    assert sent["chat_template_kwargs"] == on
    # Unknown is not nothing.
    costs = (row["cost"], row["price_date"], collected.spending["usd"])
    assert (row["source"], costs) == ("qwen", (None, None, None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "openai"}, "set `model`"),
        ({"base_url": "http://me:secret@host/v1"}, "leave user, password"),
        ({"base_url": "localhost:8000"}, "expected an address such as"),
        ({"base_url": "me:secret@host/v1"}, "leave user, password"),
        ({"teacher": "openai", "model": "m", "max_usd": 1.0}, "price of 'm' .* is not known"),
        ({"max_usd": 0.0}, "max_usd: expected"),
        ({"timeout": float("nan")}, "timeout: expected"),
    ],
)
def test_bad_settings_of_an_api_teacher(server, sums, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        collect(asking(server, **settings), sums, tmp_path)
    assert "secret" not in str(caught.value)
    assert not server.asked
