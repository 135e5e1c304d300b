"""Collecting from a real server on the loopback, whose faults are chosen per request."""

import gzip
import json
import logging
import socketserver
import threading
import time
from datetime import date
from pathlib import Path

import pytest
from planted import selected
from server import FAULTS, GOOD, REASONING, Answer, Server, chat

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example, read_rows
from chainforge.core.transcript import DEFAULT, read, write
from chainforge.data.datasets import save_dataset
from chainforge.data.filters import SelectionArgs
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.api import LARGEST_BODY, choice_of
from chainforge.generate.build import BuildArgs, Rows, build
from chainforge.generate.dispatch import MAX_USELESS
from chainforge.generate.rollouts import score_samples
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import TeacherFilterArgs, card_sections, collect
from chainforge.rewards.reward import RewardArgs, load_rewards

KEY = "sk-secret-0123456789"
TEXTS = TeacherFilterArgs().fitting("openai")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def sums():
    params = {"dataset": "chain_sum", "max_digits": 1}
    return load_examples(TaskArgs([{"fn": "reasoning_gym", "params": params, "size": 30}]))


def asking(server, **settings):
    quick = {"max_retries": 2, "retry_wait": 0.01, "outage_timeout": 0.1, "max_retry_after": 0.05}
    common = {"teacher": "deepseek", "base_url": server.url, "shutdown_timeout": 5}
    return TeacherArgs(**common | quick | settings)


def test_prompts_without_an_answer_are_collected_and_kept(server, tmp_path):
    rows = [example([{"role": "user", "content": "Why add?"}], None, task="chat")]
    rewards = load_rewards(RewardArgs(), rows[0])
    collected = collect(
        asking(server), rows, tmp_path, score=lambda rows: score_samples(rows, DEFAULT, rewards)
    )
    kept, _ = selected(collected.rows, SelectionArgs())
    (row,) = kept
    assert row["drop"] is None
    assert (row["answer"], row["correct"], row["reward"]) == (None, None, 0.2)
    assert row["rewards"] == {"accuracy_reward": None, "format_reward": 1.0}
    assert len(save_dataset(kept, tmp_path / "dataset").read_bytes()) > 0


def lines(path):
    return read_rows(path) if path.exists() else []


def failures(directory):
    return [(row["class"], row["message"]) for row in lines(directory / "failures.jsonl")]


def funnel(collected):
    kept, lost = len(collected.rows), dict(collected.lost)
    return {"in": kept + sum(lost.values()), "kept": kept, "dropped": lost}


def test_a_deepseek_row(server, sums, tmp_path):
    collected = collect(asking(server), sums[:1], tmp_path, stage="traces")
    (row,) = collected.rows
    assert row["completion"] == write(REASONING, "4")
    (asked,) = server.asked
    expected = {
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
    assert row["usage"]["prompt_tokens"] == 40
    # 40 tokens in that missed the cache and 60 out, off-peak or at peak.
    assert row["cost"] in (pytest.approx(42e-6), pytest.approx(84e-6))
    assert row["latency"] >= 0
    assert row["time"].endswith("+00:00")
    assert row["client"].startswith("openai ")
    assert len(row["prompt_hash"]) == 16
    assert {key: row[key] for key in sums[0]} == sums[0]
    assert asked.body["model"] == "deepseek-flash"
    assert asked.body["thinking"] == {"type": "enabled"}
    # Our tags are ours to write: the teacher is not asked for them.
    assert [turn["role"] for turn in asked.body["messages"]] == ["system", "user"]
    assert "<summary>" not in json.dumps(asked.body["messages"])
    assert funnel(collected) == {"in": 1, "kept": 1, "dropped": {}}
    assert collected.sources == {"deepseek-flash": 1}
    assert collected.spending["usd"] == pytest.approx(row["cost"])
    assert read_rows(tmp_path / "samples.jsonl") == collected.rows


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"reasoning_details": [{"text": REASONING[:9]}, {"text": REASONING[9:]}]},
         "reasoning_details"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}],
          "reasoning": REASONING}, "reasoning"),
        ({"reasoning": REASONING}, "reasoning"),
        ({"reasoning_content": REASONING, "reasoning": "No."}, "reasoning_content"),
        ({"content": f"<think>\n{REASONING}\n</think>\n\n4"}, "tags"),
        ({"content": f"{REASONING}</think>4"}, "tags"),
        ({"content": f"<think>{REASONING}</think>4", "reasoning": REASONING}, "reasoning"),
        ({"content": write(REASONING, "4")}, "transcript"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": REASONING}]},
                      {"type": "text", "text": "4"}]}, "content"),
        ({"content": [{"type": "thinking", "thinking": REASONING, "signature": "x"},
                      {"type": "text", "text": "4"}]}, "content"),
        ({"content": [{"type": "reasoning", "text": REASONING}, {"type": "output_text", "text": "4"}]},
         "content"),
        ({"content": [{"type": "text", "text": f"<think>{REASONING}</think>"},
                      {"type": "text", "text": "4"}]}, "tags"),
        ({"content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "4"}],
          "reasoning": REASONING}, "reasoning"),
    ],
)  # fmt: skip
def test_where_the_reasoning_is(server, sums, tmp_path, message, found):
    server.script = [chat(**({"content": "4"} | message))]
    (row,) = collect(asking(server), sums[:1], tmp_path).rows
    assert (row["completion"], row["reasoning_source"]) == (write(REASONING, "4"), found)


def test_a_prompt_that_is_no_text_costs_its_row_only(server, sums, tmp_path):
    broken = sums[0] | {"prompt": [{"role": "user", "content": "Half \ud800"}]}
    collected = collect(asking(server), [broken, *sums[1:3]], tmp_path)
    assert collected.lost == {"unsendable": 1}
    assert len(server.asked) == 2


SAID = {"reasoning_content": REASONING}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (chat(), "no_reasoning"),
        (chat(reasoning_content="  "), "no_reasoning"),
        (chat(reasoning_content="\u200b"), "no_reasoning"),
        (chat("\u200b\u3164", reasoning_content="So 4."), "no_answer"),
        (chat("", **SAID), "no_answer"),
        (chat(None, **SAID), "no_answer"),
        (chat("<think>Two and"), "unfinished_reasoning"),
        (chat("4", "content_filter", **SAID), "content_filter"),
        (chat("<summary>4</summary>", **SAID), "tags"),
        (chat("4</think>", **SAID), "tags"),
        (Answer({"error": {"message": "bad"}}, 400), "status_400"),
        (Answer({"error": {"message": "bad"}}, 422), "status_422"),
        (Answer({"error": {"message": "the input was flagged by moderation"}}, 403), "status_403"),
    ],
)  # fmt: skip
def test_unusable_answers_are_rejected_never_invented(server, sums, tmp_path, answer, kind):
    worded = [row | {"prompt": [{"role": "user", "content": "What is two and two?"}]}
              for row in sums[:2]]  # fmt: skip
    server.script = [answer]
    args = asking(server, fallback="offline", max_concurrency=1)
    collected = collect(args, worded, tmp_path)
    assert funnel(collected) == {"in": 2, "kept": 1, "dropped": {kind: 1}}
    assert [name for name, _ in failures(tmp_path)] == [kind]
    again = collect(args, worded, tmp_path)
    assert (again, len(server.asked)) == (collected, 2)


@pytest.mark.parametrize(
    ("reasoning", "kind", "setting"),
    [
        ("2 + 2 = 4.", "too_short", "min_reasoning_chars"),
        ("二加二等于四，所以答案是四。" * 3, "language", "min_language"),
        ("So I add two and two and I get four once more. " * 30, "repetition", "max_repetition"),
        (f"{REASONING}<|im_end|>\n<|im_start|>user\nAgain?", "chat_token", ""),
    ],
)
def test_the_filters_of_reject_drop_answers(server, sums, tmp_path, reasoning, kind, setting):
    row = sums[0] | {"prompt": [{"role": "user", "content": "What is two and two?"}]}
    server.script = lambda request: chat(reasoning_content=reasoning)
    score = lambda rows: [one | {"correct": True, "formatted": True, "reward": 1} for one in rows]  # noqa: E731
    for _ in range(2):
        collected = collect(asking(server), [row], tmp_path, score=score)
        with pytest.raises(InputError, match=f"dropped as {kind} .*{setting}"):
            build(Rows(collected.rows), tmp_path, SelectionArgs(), TEXTS, BuildArgs())
        assert json.loads((tmp_path / "funnel.json").read_text())["dropped"] == {kind: 1}
    assert len(server.asked) == 1


def ended(word, content="4", **message):
    return chat(content, word, **(SAID | message))


NO_WORD = chat("4", **SAID)
NO_WORD["choices"][0].pop("finish_reason")


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("eos eos_token end_turn STOP stop_sequence FINISH_REASON_STOP COMPLETE", "stop"),
        ("max_tokens MAX_TOKENS model_length max_output_tokens", "length"),
        ("SAFETY refusal content_filtered RECITATION", "content_filter"),
    ],
)
def test_an_end_in_any_dialect_is_known(words, end):
    assert {choice_of(ended(word)).end for word in words.split()} == {end}


@pytest.mark.parametrize("word", ["tired", "tool_calls", "OTHER", "", None, "null", 7, "absent"])
def test_a_whole_answer_with_an_unknown_end_is_kept_and_noted(server, sums, tmp_path, word, caplog):
    answer, last = NO_WORD if word == "absent" else ended(word), sums[2]["prompt"][-1]["content"]
    server.script = lambda request: None if request.prompt == last else answer
    rows = collect(asking(server), sums[:3], tmp_path).rows
    assert save_dataset(rows, tmp_path / "dataset").is_file()
    assert rows.pop()["finish_reason"] == "stop"
    assert len(server.asked) == 3
    raw = str(word) if word not in ("", None, "null", "absent") else None
    assert {(row["finish_reason"], row["finish_reason_raw"]) for row in rows} == {("stop", raw)}
    assert caplog.text.count(f"unknown finish_reason ({raw!r})" if raw else "(none)") == 1


@pytest.mark.parametrize("word", ["tired", "tool_calls", "", None, "stop"])
def test_a_missing_answer_is_asked_for_once_and_says_how_it_ended(server, sums, tmp_path, word):
    first = sums[0]["prompt"][-1]["content"]
    server.script = lambda request: ended(word, None) if request.prompt == first else None
    for _ in range(2):
        collect(asking(server), sums[:2], tmp_path)
    assert len(server.asked) == 2
    (row,) = read_rows(tmp_path / "failures.jsonl")
    assert (row["class"], row["finish_reason"]) == ("no_answer", word or None)
    assert row["message"].startswith("the reply contains no answer")
    assert row["reply"]["reasoning_content"] == REASONING
    assert word in (None, "", "stop") or repr(word) in row["message"]


@pytest.mark.parametrize("word", ["insufficient_system_resource", "abort", "error"])
def test_a_reply_that_the_server_breaks_off_is_paid_for_three_times_at_most(
    server, sums, tmp_path, word
):
    first = sums[0]["prompt"][-1]["content"]
    server.script = lambda request: ended(word) if request.prompt == first else None
    args = asking(server, max_retries=8)
    assert collect(args, sums[:2], tmp_path).lost == {"unfinished": 1}
    assert len(server.asked) == 3 + 1
    server.script = []
    assert len(collect(args, sums[:2], tmp_path).rows) == 2


def odd(**fields):
    return Answer({**chat("4", **SAID), **fields})


ODD = [
    (ended("stop", float("nan")), "no_answer"),
    (ended("stop", reasoning_content=float("inf")), "no_reasoning"),
    (odd(usage={"prompt_tokens": float("nan"), "completion_tokens": 60}), None),
    (odd(usage={"prompt_tokens": 40, "completion_tokens": 10**40}), None),
    (odd(usage={"prompt_tokens": "40", "completion_tokens": [60]}), None),
    (odd(usage=[1, 2]), None),
    (odd(model={"a": 1}, id=float("nan"), system_fingerprint=[]), None),
    (odd(extra=10**30, more=[float("-inf"), {"a": float("nan")}]), None),
    (ended("stop", "4 \ud800"), None),
    (ended("stop", tool_calls=float("nan"), logprobs={"a": [10**25]}), None),
    (odd(choices=[{"finish_reason": "stop", "message": ["4"]}]), "no_answer"),
    (odd(choices=[{"finish_reason": {"a": 1}, "message": {"content": {"b": 2}}}]), "no_answer"),
    (Answer(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "malformed"),
    (Answer(b'{"choices":' + b'{"a":' * 300 + b"1" + b"}" * 301), "malformed"),
    (Answer(gzip.compress(b"[" + b" " * LARGEST_BODY + b"]"), headers={"content-encoding": "gzip"}),
     "too_large"),
    (Answer(b"\0" * (LARGEST_BODY + 9)), "too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "kind"), ODD, ids=range(len(ODD)))
def test_one_odd_reply_ends_no_collection(server, sums, tmp_path, answer, kind):
    first = sums[0]["prompt"][-1]["content"]
    server.script = lambda request: answer if request.prompt == first else None
    collected = collect(asking(server), sums[:2], tmp_path)
    assert collected.lost == ({kind: 1} if kind else {})
    assert len(server.asked) == 2
    assert save_dataset(collected.rows, tmp_path / "dataset").is_file()


@pytest.mark.parametrize(
    "answer", [b"[1, 2]", b'"text"', b"null", b'{"choices": [1]}', b'{"n": ' + b"9" * 9999 + b"}"]
)
def test_what_is_no_reply_is_asked_for_again(server, sums, tmp_path, answer):
    server.script = [Answer(answer)]
    assert collect(asking(server), sums[:1], tmp_path).rows[0]["attempts"] == 2


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 40, "completion_tokens": 0},
        {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41},
        {"prompt_tokens": 0, "completion_tokens": 60},
        {"prompt_tokens": -1, "completion_tokens": 60},
        {"prompt_tokens": 40.0, "completion_tokens": True},
        {},
        None,
    ],
)
def test_a_usage_that_cannot_be_is_unknown_and_never_free(server, sums, tmp_path, usage):
    server.script = [chat("4", usage=usage, **SAID)]
    collected = collect(asking(server, max_new_tokens=1000), sums[:1], tmp_path)
    assert collected.rows[0]["cost"] is None
    spending = collected.spending
    assert (spending["untold_requests"], spending["usd"]) == (1, 0)
    # The prompt's bytes and all the tokens that were allowed, at the dearest hour.
    assert spending["untold_usd_at_most"] > 1000 * 1.2e-6 / 2


def test_reasoning_that_is_counted_in_the_total_only_is_paid_for(server, sums, tmp_path):
    usage = {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 150}
    server.script = [chat("4", usage=usage, **SAID)]
    spending = collect(asking(server), sums[:1], tmp_path).spending
    assert (spending["tokens"], spending["untold_requests"]) == (150, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(server, sums, tmp_path, status):
    with Server() as other:
        server.script = lambda request: Answer(GOOD, status, {"location": other.url})
        with pytest.raises(InputError, match=f"Set `base_url`.*{other.port}.*not followed"):
            collect(asking(server, max_requests=1), sums, tmp_path)
    assert (len(server.asked), len(other.asked)) == (1, 0)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "no field top_k", "code": 7}}, "status 422: no field top_k"),
        ({"error": "no field"}, "status 422: no field"),
        ({"detail": [{"loc": ["body", "top_k"], "msg": "extra"}]}, "top_k.*not know: top_k;"),
        ({"message": "unexpected keys"}, "unexpected keys.*`extra_body: {}`"),
        (b"<html>no \x1b[2J", r"<html>no \\x1b\[2J"),
    ],
)
def test_a_server_that_refuses_every_request_costs_no_row(server, sums, tmp_path, body, words):
    """Fewer rows than it takes to be impatient, or more."""
    for size in (3, 30):
        server.script = lambda request: Answer(body, 422)
        with pytest.raises(InputError, match=f"refused every request: .*{words}"):
            collect(asking(server, extra_body={"top_k": 5}), sums[:size], tmp_path)
        assert not any(row["rejected"] for row in lines(tmp_path / "failures.jsonl"))
    server.script = []
    again = collect(asking(server, extra_body={"top_k": 5}), sums, tmp_path)
    assert len(again.rows) == 30


@pytest.mark.parametrize(
    "key", ["sk-\u201ccurly\u201d", "sk-one\nsk-two", "'sk-quoted'", "sk-\u043a\u043b\u044e\u0447"]
)
def test_a_key_that_cannot_be_sent_costs_no_row(server, sums, tmp_path, monkeypatch, key):
    monkeypatch.setenv("DEEPSEEK_API_KEY", key)
    with pytest.raises(InputError, match="DEEPSEEK_API_KEY: the value contains") as error:
        collect(asking(server), sums, tmp_path)
    assert key not in str(error.value)
    assert not [*server.asked, *tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "nonsense://host"), ("HTTP_PROXY", "http://[::1"), ("SSL_CERT_FILE", "/none")],
)
def test_a_setting_of_the_network_that_is_wrong_costs_no_row(
    server, sums, tmp_path, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"no request can be sent: .*{variable}"):
        collect(asking(server), sums, tmp_path)
    assert not [*server.asked, *tmp_path.iterdir()]


@pytest.fixture
def plain():
    """A server that answers a TLS greeting in plain text, as a web server on its port does."""

    class Plain(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_name_that_is_not_known_ends_the_run(server, sums, tmp_path):
    with pytest.raises(InputError, match="No such host|nothing was|in a row"):
        collect(asking(server, base_url="http://no-such-host.invalid/v1"), sums, tmp_path)
    assert not any(row["rejected"] for row in lines(tmp_path / "failures.jsonl"))


def test_https_to_a_server_without_it_ends_the_run(server, sums, tmp_path, plain):
    with pytest.raises(InputError, match="http or https"):
        collect(asking(server, base_url=f"https://127.0.0.1:{plain}/v1"), sums, tmp_path)
    assert not lines(tmp_path / "failures.jsonl")


def test_where_no_row_passes_an_answer_is_shown_and_what_would_accept_it(server, sums, tmp_path):
    cases = [
        (chat("So \x1b[31m4"), "no_reasoning: .*`instruction: .*<think>.*'So \\\\x1b"),
        (chat("x" * 999, "length", **SAID), "raise `max_new_tokens`.*x'\\.\\.\\."),
    ]
    for number, (answer, words) in enumerate(cases):
        for size in (2, 30):
            server.script = lambda request, answer=answer: answer
            with pytest.raises(InputError, match=words) as error:
                collect(asking(server), sums[:size], tmp_path / f"{number}-{size}")
            assert len(str(error.value)) < 1000


def test_a_rejected_answer_keeps_what_was_paid_for(server, sums, tmp_path):
    server.script = [chat("<think>4", **SAID)]
    collect(asking(server, max_concurrency=1), sums[:2], tmp_path)
    (row,) = read_rows(tmp_path / "failures.jsonl")
    assert (row["reasoning"], row["answer"]) == (REASONING, "<think>4")
    assert row["usage"]["completion_tokens"] == 60


def test_a_cut_off_answer_is_asked_for_once_more_with_a_larger_limit(server, sums, tmp_path):
    server.script = [chat("", "length", reasoning_content="Two")]
    (row,) = collect(asking(server), sums[:1], tmp_path / "a").rows
    assert [asked.body["max_tokens"] for asked in server.asked] == [32768, 65536]
    assert (row["sampling"]["max_tokens"], row["attempts"]) == (65536, 2)
    for second in (chat("", "length"), Answer({"error": {"message": "too large"}}, 400)):
        server.asked.clear()
        server.script = [chat("", "length", reasoning_content="Two"), second]
        folder = tmp_path / f"b{second!r:.5}"
        with pytest.raises(InputError, match="nothing was collected .*'truncated': 1"):
            collect(asking(server), sums[:1], folder)
        assert len(server.asked) == 2


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
    assert funnel(collected) == {"in": 2, "kept": 1, "dropped": {"status_500": 1}}
    assert [kind for kind, _ in failures(tmp_path)] == ["status_500"]
    assert len(server.asked) == 3 + 1
    server.script = []
    again = collect(asking(server), sums[:2], tmp_path)
    assert funnel(again) == {"in": 2, "kept": 2, "dropped": {}}
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "key is not accepted: check DEEPSEEK_API_KEY"),
        (402, "no balance"),
        (403, "rights"),
        (404, "no such model"),
        (400, "no such model"),
    ],
)
def test_fatal_statuses_stop_the_run_and_keep_the_rows(server, sums, tmp_path, status, message):
    said = "Model Not Exist" if status == 400 else f"refused {KEY}"
    fatal = Answer({"error": {"message": said}}, status)
    server.script = lambda request: fatal if request.number >= 7 else None
    with pytest.raises(InputError, match=message):
        collect(asking(server, fallback="offline"), sums, tmp_path)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 7
    assert len(server.asked) < 30
    server.script = []
    collect(asking(server), sums, tmp_path)
    assert len({row["id"] for row in read_rows(tmp_path / "samples.jsonl")}) == 30


def test_an_absent_server_stops_the_run(server, sums, tmp_path):
    args = asking(server, base_url="http://127.0.0.1:9/v1", max_retries=50)
    with pytest.raises(InputError, match="requests in a row failed.*127.0.0.1:9"):
        collect(args, sums, tmp_path)
    assert not (tmp_path / "samples.jsonl").exists()


def test_an_outage_is_waited_for_one_request_at_a_time(server, sums, tmp_path):
    server.script = lambda request: FAULTS["503"] if 5 <= request.number < 32 else None
    args = asking(server, retry_wait=0.005, outage_timeout=20, max_retries=20, max_concurrency=4)
    collected = collect(args, sums, tmp_path)
    assert len(collected.rows) == 30
    # Once everything fails, a single request finds out whether it still does.
    assert max(request.under_way for request in server.asked[29:32]) == 1


def test_nothing_but_useless_answers_stops_the_run(server, sums, tmp_path):
    server.script = lambda request: chat()
    with pytest.raises(InputError, match=f"{MAX_USELESS} answers in a row were of no use"):
        collect(asking(server), sums, tmp_path)
    assert len(server.asked) < 30


def test_nothing_but_answers_that_the_filters_drop_stops_the_run(server, sums, tmp_path):
    server.script = lambda request: chat("4", reasoning_content="2 + 2 = 4.")
    wanted = f"{MAX_USELESS} answers in a row were of no use.*too_short"
    with pytest.raises(InputError, match=wanted):
        collect(asking(server, max_concurrency=1), sums, tmp_path, texts=TEXTS)
    assert MAX_USELESS <= len(server.asked) < 30
    rows = read_rows(tmp_path / "samples.jsonl")
    assert MAX_USELESS <= len(rows) <= len(server.asked)  # what was paid for stays
    server.script = None
    assert len(collect(asking(server), sums, tmp_path, texts=TEXTS).rows) == 30


def test_nothing_collected_is_an_error(server, sums, tmp_path):
    server.script = [chat()]
    with pytest.raises(InputError, match="nothing was collected"):
        collect(asking(server), sums[:1], tmp_path)


def test_fallback_rows_say_that_they_are(server, sums, tmp_path):
    second = sums[1]["prompt"][-1]["content"]
    server.script = lambda request: FAULTS["500"] if request.prompt == second else None
    collected = collect(asking(server, fallback="offline"), sums[:3], tmp_path)
    assert [row["source"] for row in collected.rows] == [
        "deepseek-flash",
        "offline-fallback",
        "deepseek-flash",
    ]
    assert collected.sources == {"deepseek-flash": 2, "offline-fallback": 1}
    assert [row["teacher"] for row in collected.rows] == ["deepseek", "offline", "deepseek"]
    told = card_sections(TeacherArgs(teacher="deepseek"), collected.rows, collected.spending)
    assert "1 rows: `offline-fallback`. Worked solutions" in told["Teacher"]
    assert funnel(collected) == {"in": 3, "kept": 3, "dropped": {}}
    assert [kind for kind, _ in failures(tmp_path)] == ["status_500"]


def test_fallback_stops_asking_a_server_that_is_gone(server, sums, tmp_path):
    server.script = lambda request: FAULTS["500"]
    collected = collect(asking(server, fallback="offline", max_retries=0), sums, tmp_path)
    assert collected.sources == {"offline-fallback": 30}
    assert MAX_USELESS <= len(server.asked) < 30


def test_a_cut_run_asks_only_for_what_is_missing(server, sums, tmp_path):
    server.script = lambda request: Answer({}, 401) if request.number == 7 else None
    args = asking(server, num_samples=2, max_concurrency=1)
    with pytest.raises(InputError):
        collect(args, sums[:10], tmp_path)
    for name in ("samples.jsonl", "failures.jsonl", "requests.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"id": "torn')
    collected = collect(args, sums[:10], tmp_path)
    assert len(server.asked) == 8 + 13
    assert [(row["id"], row["sample"]) for row in collected.rows] == [
        (row["id"], index) for row in sums[:10] for index in range(2)
    ]
    written = read_rows(tmp_path / "samples.jsonl")
    assert len(written) == 20
    assert {row["request"]: row for row in written} == {r["request"]: r for r in collected.rows}


def test_another_request_is_another_row(server, sums, tmp_path):
    collect(asking(server), sums[:2], tmp_path)
    collected = collect(asking(server, max_new_tokens=99), sums[:2], tmp_path)
    assert {row["sampling"]["max_tokens"] for row in collected.rows} == {99}
    assert len(server.asked) == 4


def test_rows_are_scored_as_they_arrive(server, sums, tmp_path):
    seen, told = [], []
    judged = threading.Semaphore(1)

    def answer(request):
        """Answer once the row before is judged, which must not wait for the others."""
        assert judged.acquire(timeout=30)

    def score(rows):
        judged.release()
        seen.append(len(lines(tmp_path / "samples.jsonl")))
        return [row | {"reward": 1.0, "correct": True} for row in rows]

    def progress(done, total, unit, note):
        told.append((done, total, note))

    server.script = answer
    args = asking(server, max_concurrency=1)
    collected = collect(args, sums[:3], tmp_path, score=score, progress=progress)
    assert seen == [0, 1, 2]
    assert [row["reward"] for row in collected.rows] == [1.0] * 3
    assert told[0][:2] == (0, 3)
    assert told[-1][:2] == (3, 3)
    assert "100% right" in told[-1][2]


def test_rounds_stop_asking_for_a_prompt_that_has_enough(server, sums, tmp_path):
    easy = {row["prompt"][-1]["content"] for row in sums[:5]}

    def answer(request):
        said = f"{REASONING} ({request.number})"
        return chat("4" if request.prompt in easy else "5", reasoning_content=said)

    def score(rows):
        return [row | {"correct": read(row["completion"]).answer == "4"} for row in rows]

    server.script = answer
    args = asking(server, max_samples=4, round_size=2)
    collected = collect(args, sums[:10], tmp_path, score=score, keep=2)
    counts = [sum(row["id"] == example["id"] for row in collected.rows) for example in sums[:10]]
    assert counts == [2] * 5 + [4] * 5
    assert len(server.asked) == 30
    assert collect(args, sums[:10], tmp_path, score=score, keep=2).rows == collected.rows
    assert len(server.asked) == 30


def test_an_answer_that_was_not_yet_judged_is_not_asked_for_again(server, sums, tmp_path):
    def fails(rows):
        raise RuntimeError("the judge is gone")

    with pytest.raises(RuntimeError, match="judge is gone"):
        collect(asking(server), sums[:3], tmp_path, score=fails)
    asked = len(server.asked)
    assert not (tmp_path / "samples.jsonl").exists()
    assert len(collect(asking(server), sums[:3], tmp_path).rows) == 3
    assert len(server.asked) == 3
    assert asked == 3


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
    assert all("***" in text for text in written)
    assert not any(KEY in text for text in [*written, caplog.text, str(caught.value)])
    assert "***" in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("key", [KEY, None])
def test_a_server_gets_no_header_from_the_environment(server, sums, tmp_path, monkeypatch, key):
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY")
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "another's")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    custom = "authorization: another's\nX-Token: another's\nAuthorization: another's\nbad\n"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
    collect(asking(server, teacher="openai", model="m"), sums[:1], tmp_path)
    headers = server.asked[0].headers
    assert headers.get("authorization") == (key and f"Bearer {key}")
    assert "another's" not in str(headers)


@pytest.mark.parametrize("teacher", ["deepseek", "openai"])
def test_a_missing_key_is_said_before_any_work(monkeypatch, sums, tmp_path, teacher):
    name = f"{teacher.upper()}_API_KEY"
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=name):
        collect(TeacherArgs(teacher=teacher, model="m"), sums, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_of_ones_own_needs_no_key_and_has_no_price(server, sums, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    extra = {"reasoning": {"enabled": True}}
    args = asking(server, teacher="openai", model="qwen", temperature=0.6, extra_body=extra)
    collected = collect(args, sums[:1], tmp_path)
    (row,) = collected.rows
    (asked,) = server.asked
    sent = asked.body
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("qwen", 0.6, 32768)
    assert sent["reasoning"] == {"enabled": True}
    assert "thinking" not in sent
    assert row["source"] == "qwen"
    # Unknown is not nothing.
    assert (row["cost"], row["price_date"], collected.spending["usd"]) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "openai"}, "set `model`"),
        ({"base_url": "http://me:secret@host/v1"}, "leave user, password"),
        ({"base_url": "localhost:8000"}, "expected an address such as"),
        ({"base_url": "http://[::1/v1"}, "expected an address such as"),
        ({"base_url": "http://a b/v1"}, "expected an address such as"),
        ({"base_url": "http://h/v1?key=secret"}, "leave user, password"),
        ({"base_url": "me:secret@host/v1"}, "leave user, password"),
        ({"base_url": "http://me:sec/secret@host/v1"}, "leave user, password"),
        ({"base_url": "http://me:secret#@host/v1"}, "leave user, password"),
        ({"extra_body": {"max_tokens": 100_000}}, "'max_tokens' .*set `max_new_tokens`"),
        ({"extra_body": {"max_completion_tokens": 9}}, "set `max_new_tokens`"),
        ({"extra_body": {"n": 8}}, "set `num_samples`"),
        ({"extra_body": {"messages": []}}, "leave it out"),
        ({"extra_body": {"model": "dearer"}}, "set `model`"),
        ({"extra_body": {"stream": True}}, "leave it out"),
        ({"extra_body": {"models": ["dearer"]}}, "set `model`"),
        ({"extra_body": {"options": {"num_predict": 9}}}, "set `max_new_tokens`"),
        ({"extra_body": {"min_p": float("nan")}}, "extra_body: cannot be sent as JSON"),
        ({"extra_body": {"since": date(2026, 1, 1)}}, "extra_body: cannot be sent as JSON"),
        ({"teacher": "openai", "model": "m", "max_usd": 1.0}, "price of 'm' .* is not known"),
        ({"max_usd": 0.0}, "max_usd: expected more than 0"),
        ({"timeout": 0.0}, "timeout: expected more"),
        ({"timeout": float("nan")}, "timeout: expected more"),
        ({"retry_wait": float("nan")}, "retry_wait: expected 0 or more"),
        ({"instruction": "Think \ud800"}, "instruction: not valid text"),
    ],
)
def test_bad_settings_of_an_api_teacher(server, sums, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        collect(asking(server, **settings), sums, tmp_path)
    assert "secret" not in str(caught.value)
    assert not server.asked


def test_the_retired_reasoner_is_an_alias(server, sums, tmp_path, caplog):
    (row,) = collect(asking(server, model="deepseek-reasoner"), sums[:1], tmp_path).rows
    assert server.asked[0].body["model"] == row["source"] == "deepseek-flash"
    assert "deepseek-reasoner is retired" in caplog.text


def test_offline_rows(sums, tmp_path):
    args = TeacherArgs(num_samples=4)
    collected = collect(args, sums, tmp_path / "a", seed=3)
    assert collected.sources == {"offline": 120}
    for row in collected.rows:
        assert read(row["completion"]).answer == row["answer"]
    styles = [row["sampling"]["style"] for row in collected.rows]
    assert 30 < styles.count("careful") < 90
    again = collect(args, sums, tmp_path / "b", seed=3)
    assert again == collected
    assert collect(args, sums, tmp_path / "c", seed=4) != collected
    careful = collect(TeacherArgs(styles={"careful": 1.0}), sums, tmp_path / "d")
    assert {row["sampling"]["style"] for row in careful.rows} == {"careful"}
    (row,) = collect(TeacherArgs(), sums[:1], tmp_path / "e", transcript="think").rows
    assert row["completion"].startswith("<think>\n")


def test_offline_names_the_task_that_it_cannot_solve(sums, tmp_path):
    riddle = example([{"role": "user", "content": "Why?"}], "Because", task="riddles")
    with pytest.raises(InputError, match="no solver for the task 'riddles'"):
        collect(TeacherArgs(), [*sums, riddle], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"styles": {"carefull": 1.0}}, "did you mean 'careful'"),
        ({"styles": {"careful": -1}}, "expected a share"),
        ({"styles": {"careful": "much"}}, "expected a share"),
        ({"styles": {"careful": 0}}, "at least one"),
        ({"num_samples": 0}, "num_samples: expected 1"),
        ({"max_retries": -1}, "max_retries: expected 0"),
    ],
)
def test_bad_settings(sums, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        collect(TeacherArgs(**settings), sums, tmp_path)
