"""Collecting from a real server on the loopback, whose faults are chosen per request."""

import itertools
import json
import logging
import random
import re
import time
from pathlib import Path

import pytest
import reasoning_gym
from server import FAULTS, GOOD, REASONING, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.core.transcript import DEFAULT, read, write
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.select import select
from chainforge.data.sources import example
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate import api
from chainforge.generate.api import MAX_REPLY_MIB
from chainforge.generate.build import BuildArgs, build, save_dataset
from chainforge.generate.offline import reduce_expression, solve
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import MAX_USELESS
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect
from chainforge.rewards.reward import RewardArgs, load_rewards

KEY = "sk-secret-0123456789"
TEXTS = FilterArgs(min_reasoning_chars=20)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(api, "RETRY_SECONDS", 0.01)
    with Server() as server:
        yield server


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
        ({"content": f"<think>{REASONING}</think>4", "reasoning": REASONING}, "reasoning"),
        ({"content": write(REASONING, "4")}, "transcript"),
    ],
)  # fmt: skip
def test_where_the_reasoning_is(server, sums, tmp_path, message, found):
    server.script = [chat(**({"content": "4"} | message))]
    (row,) = collect(asking(server), sums[:1], tmp_path).rows
    assert (row["completion"], row["reasoning_source"]) == (write(REASONING, "4"), found)


SAID = {"reasoning_content": REASONING}


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
    (chat("4", None, **SAID), None, 1),
    (chat("4", "tired", **SAID), None, 1),
    ({**chat("4", **SAID), "usage": None, "extra": 10**30}, None, 1),
    (chat("4", "insufficient_system_resource", **SAID), "unfinished", 3),
    ({"choices": [{"finish_reason": "stop", "message": ["4"]}]}, "malformed", 3),
    (Answer(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "malformed", 3),
    (Answer(b'{"choices": [], "a": NaN}'), "malformed", 3),
    (chat([{"b": 2}], {"a": 1}), "malformed", 3),
    (chat("4", **SAID, usage={"prompt_tokens_details": [1], "prompt_tokens": 10**30}), None, 1),
    (Answer(b" " * (MAX_REPLY_MIB * 2**20 + 1)), "too_large", 1),
]


@pytest.mark.parametrize(("answer", "kind", "times"), ODD, ids=range(len(ODD)))
def test_an_odd_reply_ends_no_collection_and_is_never_made_a_row(
    server, sums, tmp_path, answer, kind, times
):
    worded = [
        row | {"prompt": [{"role": "user", "content": f"What is {n} and two?"}]}
        for n, row in enumerate(sums[:2])
    ]
    server.script = lambda request: answer if "1" in request.prompt else None
    args = asking(server, max_concurrency=1)
    collected = collect(args, worded, tmp_path)
    assert collected.lost == ({kind: 1} if kind else {})
    assert len(collected.rows) == (1 if kind else 2)
    assert failures(tmp_path) == ([kind] if kind else [])
    assert len(server.asked) == 1 + times
    assert save_dataset(collected.rows, tmp_path / "dataset").is_file()
    assert {row["finish_reason"] for row in collected.rows} == {"stop"}
    if times == 1:  # what was paid for is not asked for again
        again = collect(args, worded, tmp_path)
        assert again.rows == collected.rows
        assert len(server.asked) == 2 + str(kind).startswith("status")


def test_the_filters_of_reject_drop_answers(server, sums, tmp_path):
    server.script = lambda request: chat(reasoning_content=f"{REASONING}<|im_end|>\nAgain?")
    score = lambda rows: [one | {"correct": True, "formatted": True, "reward": 1} for one in rows]  # noqa: E731
    for _ in range(2):
        collected = collect(asking(server), sums[:1], tmp_path, score=score)
        with pytest.raises(InputError, match="dropped as chat_token "):
            build(collected.rows, tmp_path, SelectionArgs(), TEXTS, BuildArgs())
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


def test_a_server_that_refuses_every_request_costs_no_row(server, sums, tmp_path):
    """Fewer rows than it takes to be impatient, or more."""
    server.script = lambda request: Answer(b"<html>no field \x1b[2J", 422)
    args = asking(server, extra_body={"top_k": 5})
    words = r"status 422: .*no field \\x1b\[2J.*thinking, top_k; `extra_body: {}`"
    for size in (3, 30):
        with pytest.raises(InputError, match=words):
            collect(args, sums[:size], tmp_path)
        assert not any(row["rejected"] for row in lines(tmp_path / "failures.jsonl"))
    server.script = []
    assert len(collect(args, sums, tmp_path).rows) == 30


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


@pytest.mark.parametrize("name", FAULTS)
def test_passing_errors_are_retried(server, sums, tmp_path, name):
    server.script = [FAULTS[name]]
    collected = collect(asking(server, timeout=1.0 if name == "hang" else 30.0), sums[:1], tmp_path)
    assert len(collected.rows) == 1
    assert collected.rows[0]["attempts"] == len(server.asked) == 1 + (name != "drip")
    assert failures(tmp_path) == []


def test_the_deadline_counts_the_whole_request(server, sums, tmp_path):
    server.drip = 0.1  # each read is well within the timeout
    server.script = [FAULTS["drip"]]
    begun = time.monotonic()
    collected = collect(asking(server, timeout=0.5), sums[:1], tmp_path)
    assert collected.rows[0]["attempts"] == 2
    assert time.monotonic() - begun < 1.9


def test_used_up_retries_are_a_recorded_failure_and_asked_again(server, sums, tmp_path):
    first = sums[0]["prompt"][-1]["content"]
    server.script = lambda request: FAULTS["500"] if request.prompt == first else None
    collected = collect(asking(server), sums[:2], tmp_path)
    assert (len(collected.rows), collected.lost) == (1, {"status_500": 1})
    assert failures(tmp_path) == ["status_500"]
    assert len(server.asked) == 3 + 1
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
    fatal = Answer({"error": {"message": f"refused {KEY}"}}, status)
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
    collected = collect(args, sums, tmp_path)
    assert len(collected.rows) == 30
    # Once everything fails, a single request finds out whether it still does.
    assert max(request.under_way for request in server.asked[29:32]) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(chat(), seconds=0.03), f"{MAX_USELESS} answers in a row were of no use"),
        (Answer(chat("4", reasoning_content="2 + 2 = 4."), seconds=0.03),
         "answers in a row were of no use.*too_short"),
        (FAULTS["500"], "requests in a row failed.*status 500"),
    ],
)  # fmt: skip
def test_nothing_of_use_stops_the_run(server, sums, tmp_path, answer, words):
    """Unusable answers, rows that the filters drop, an outage that does not end."""
    server.script = lambda request: answer
    most = 1 if answer.seconds else 200  # the thread that scores must keep up
    with pytest.raises(InputError, match=words):
        collect(asking(server, max_retries=50, max_concurrency=most), sums, tmp_path, texts=TEXTS)
    assert len(server.asked) < 30 or "failed" in words
    # What was paid for stays.
    paid = len(lines(tmp_path / "samples.jsonl"))
    assert (MAX_USELESS <= paid <= len(server.asked)) == ("too_short" in words)


def test_fallback_rows_say_that_they_are(server, sums, tmp_path):
    second = sums[1]["prompt"][-1]["content"]
    server.script = lambda request: FAULTS["500"] if request.prompt == second else None
    collected = collect(asking(server, fallback="offline"), sums[:3], tmp_path)
    assert [(row["source"], row["teacher"]) for row in collected.rows] == [
        ("deepseek-flash", "deepseek"),
        ("offline-fallback", "offline"),
        ("deepseek-flash", "deepseek"),
    ]
    assert collected.sources == {"deepseek-flash": 2, "offline-fallback": 1}
    assert failures(tmp_path) == ["status_500"]


def test_the_key_is_nowhere(server, sums, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "chainforge")
    echo = {"error": {"message": f"wrong key {KEY}", KEY: KEY}}
    told = chat(KEY, reasoning_content=f"The key {KEY} was sent to me", extra={KEY: KEY})
    told |= {"id": KEY, "model": KEY, "system_fingerprint": KEY}
    server.script = [Answer(echo, 500), Answer(echo, 400), echo, Answer(KEY, 503), told,
                     chat(f"<think>{KEY}", **SAID), Answer(echo, 401)]  # fmt: skip
    with pytest.raises(InputError) as caught:
        collect(asking(server, max_concurrency=1), sums, tmp_path)
    assert {row.headers["authorization"] for row in server.asked} == {f"Bearer {KEY}"}
    written = [path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert len(written) == 3
    assert all("[DEEPSEEK_API_KEY]" in text for text in written)
    assert not any(KEY in text for text in [*written, caplog.text, str(caught.value)])
    assert caught.value.__cause__ is None


def test_a_server_of_ones_own_needs_no_key_and_has_no_price(server, tmp_path, monkeypatch):
    """Its prompts may have no answer."""
    monkeypatch.delenv("OPENAI_API_KEY")
    extra = {"reasoning": {"enabled": True}}
    args = asking(server, teacher="openai", model="qwen", temperature=0.6, extra_body=extra)
    rows = [example([{"role": "user", "content": "Why add?"}], None, task="chat")]
    rewards = load_rewards(RewardArgs(), rows[0])
    score = lambda rows: score_samples(rows, DEFAULT, rewards)  # noqa: E731
    collected = collect(args, rows, tmp_path, score=score)
    (row,), _ = select(collected.rows, SelectionArgs())
    assert (row["drop"], row["answer"], row["correct"]) == (None, None, None)
    assert row["rewards"] == {"accuracy_reward": None, "format_reward": 1.0}
    sent = server.asked[0].body
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("qwen", 0.6, 32768)
    assert (sent["reasoning"], "thinking" in sent) == ({"enabled": True}, False)
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


def test_offline_rows(sums, tmp_path):
    def made(name, seed=3, **settings):
        return collect(TeacherArgs(num_samples=4, **settings), sums, tmp_path / name, seed=seed)

    collected = made("a")
    assert collected.sources == {"offline": 120}
    assert all(read(row["completion"]).answer == row["answer"] for row in collected.rows)
    styles = [row["sampling"]["style"] for row in collected.rows]
    assert 30 < styles.count("careful") < 90
    assert made("b") == collected != made("c", seed=4)
    careful = made("d", styles={"careful": 1.0})
    assert {row["sampling"]["style"] for row in careful.rows} == {"careful"}
    (row,) = collect(TeacherArgs(), sums[:1], tmp_path / "e", transcript="think").rows
    assert row["completion"].startswith("<think>\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no solver for the task 'riddles'"),
        ({"styles": {"carefull": 1.0}}, "did you mean 'careful'"),
        ({"styles": {"careful": 2, "hasty": -1}}, "expected shares"),
        ({"styles": {"careful": 0}}, "one of them above"),
    ],
)
def test_what_the_offline_teacher_refuses(sums, tmp_path, settings, message):
    riddle = example([{"role": "user", "content": "Why?"}], "Because", task="riddles")
    with pytest.raises(InputError, match=message):
        collect(TeacherArgs(**settings), [*sums, riddle], tmp_path / "out")
    assert not (tmp_path / "out").exists()


KINDS = {
    "chain_sum": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 5, "operators": ["+", "-", "*"]},
    "leg_counting": {"min_animals": 1, "max_animals": 4, "max_instances": 5},
    "gsm_symbolic": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_solved_with_true_equations_and_the_gold_answer(kind: str) -> None:
    rng = random.Random(0)
    lengths, texts = {"careful": 0, "hasty": 0}, set()
    data = reasoning_gym.create_dataset(kind, size=200, seed=3, **KINDS[kind])
    for entry, style in itertools.product(data, lengths):
        worked = solve(kind, entry, style, rng)
        assert worked is not None
        reasoning, answer = worked
        assert answer == str(entry["answer"])
        lengths[style] += len(reasoning)
        texts.add(re.sub(r"[-\d]+", "", reasoning))
        if kind != "gsm_symbolic":  # its scorer refuses negative answers, its own included
            assert data.score_answer(answer, entry) == 1.0
            equations = re.findall(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", reasoning)
            for left, operator, right, value in equations:
                x, y = int(left), int(right)
                assert {"+": x + y, "-": x - y, "*": x * y}[operator] == int(value)
            assert style == "hasty" or equations[-1][3] == answer
    assert lengths["careful"] > lengths["hasty"]
    assert len(texts) > 4  # several phrasings


def test_expressions_are_reduced_one_operation_at_a_time_and_no_wrong_answer_is_worked() -> None:
    for expression, steps, value in (
        ("( 2 + -8 ) + 4", ["2+-8=-6", "-6+4=-2"], -2),
        ("3 - ( 7 - 9 ) * 2", ["7-9=-2", "-2*2=-4", "3--4=7"], 7),
        ("8 - -( -4 + -8 )", ["-4+-8=-12", "0--12=12", "8-12=-4"], -4),
    ):
        assert reduce_expression(expression) == (steps, value)
    for wrong in ("", "1 +", "( 1 + 2", "8 / 2", "2 ** 3", "x"):
        assert reduce_expression(wrong) is None
    entry = {"question": "1 + 1 =", "answer": "3", "metadata": {"expression": "1 + 1"}}
    with pytest.raises(ValueError, match="worked '2'"):
        solve("chain_sum", entry, "careful", random.Random(0))
