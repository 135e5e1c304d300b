import contextlib
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.core.records import example, read_rows
from chainforge.core.transcript import read, write
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.data.teacher import PATIENCE, TeacherArgs, collect

KEY = "sk-secret-0123456789"


def chat(content="4", finish="stop", **message):
    """A chat completion as DeepSeek gives it, unless told otherwise."""
    return {
        "id": "r-1",
        "model": "served-model",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
    }


GOOD = chat(reasoning_content="Two and two.")


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `script`, then with `GOOD`; remembers what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body | {"authorization": self.headers["authorization"]})
        answer = self.server.script.pop(0) if self.server.script else GOOD
        status, headers, answer = answer if isinstance(answer, tuple) else (200, {}, answer)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if answer == "hang":
            time.sleep(1.5)
            return
        if answer == "drip":  # blank lines while the request is queued, as DeepSeek sends them
            data = b"\n" * 20 + json.dumps(GOOD).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json"}.items() | headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data) + (9 if headers.get("cut") else 0)))
        self.end_headers()
        for piece in data.splitlines(keepends=True) if answer == "drip" else [data]:
            with contextlib.suppress(OSError):  # the client may have left
                self.wfile.write(piece)
            time.sleep(0.1 if answer == "drip" else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def sums():
    params = {"dataset": "chain_sum", "max_digits": 1}
    return load_examples(TaskArgs([{"fn": "reasoning_gym", "params": params, "size": 30}]))


def asking(server, **settings):
    return TeacherArgs(
        **{"teacher": "deepseek", "base_url": server.url, "max_retries": 2, "retry_wait": 0.01}
        | settings
    )


def failures(directory):
    return [(row["class"], row["message"]) for row in read_rows(directory / "failures.jsonl")]


def test_a_deepseek_row(server, sums, tmp_path):
    collected = collect(asking(server), sums[:1], tmp_path, stage="traces")
    (row,) = collected.rows
    assert row["completion"] == write("Two and two.", "4")
    assert row["source"] == "deepseek-flash"
    assert row["model"] == "served-model"
    assert row["stage"] == "traces"
    assert row["reasoning_source"] == "reasoning_content"
    assert (row["tokens"], row["finish_reason"], row["sample"]) == (5, "stop", 0)
    assert row["usage"]["prompt_tokens"] == 9
    assert {key: row[key] for key in sums[0]} == sums[0]
    (asked,) = server.asked
    assert asked["model"] == "deepseek-flash"
    assert asked["thinking"] == {"type": "enabled"}
    # Our tags are ours to write: the teacher is not asked for them.
    assert [turn["role"] for turn in asked["messages"]] == ["system", "user"]
    assert "<summary>" not in json.dumps(asked["messages"])
    assert collected.funnel == {"in": 1, "kept": 1, "dropped": {}}
    assert collected.sources == {"deepseek-flash": 1}
    assert read_rows(tmp_path / "samples.jsonl") == collected.rows


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"reasoning_details": [{"text": "Two and "}, {"text": "two."}]}, "reasoning_details"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}],
          "reasoning": "Two and two."}, "reasoning"),
        ({"reasoning": "Two and two."}, "reasoning"),
        ({"reasoning_content": "Two and two.", "reasoning": "No."}, "reasoning_content"),
        ({"content": "<think>\nTwo and two.\n</think>\n\n4"}, "tags"),
        ({"content": "Two and two.</think>4"}, "tags"),
        ({"content": "<think>Two and two.</think>4", "reasoning": "Two and two."}, "reasoning"),
        ({"content": write("Two and two.", "4")}, "transcript"),
    ],
)  # fmt: skip
def test_where_the_reasoning_is(server, sums, tmp_path, message, found):
    server.script = [chat(**({"content": "4"} | message))]
    (row,) = collect(asking(server), sums[:1], tmp_path).rows
    assert (row["completion"], row["reasoning_source"]) == (write("Two and two.", "4"), found)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (chat(), "no_reasoning"),
        (chat(reasoning_content="  "), "no_reasoning"),
        (chat("", reasoning_content="Hm."), "empty"),
        (chat(None, reasoning_content="Hm."), "empty"),
        (chat("<think>Two and"), "truncated"),
        (chat("4", "length", reasoning_content="Hm."), "truncated"),
        (chat("4", "content_filter", reasoning_content="Hm."), "content_filter"),
        (chat("4", "tired", reasoning_content="Hm."), "finish_reason"),
        (chat("<summary>4</summary>", reasoning_content="Hm."), "tags"),
        ((400, {}, {"error": {"message": "bad"}}), "status_400"),
        ((422, {}, {"error": {"message": "bad"}}), "status_422"),
    ],
)
def test_unusable_answers_are_rejected_never_invented(server, sums, tmp_path, answer, kind):
    server.script = [answer]
    collected = collect(asking(server, fallback="offline"), sums[:2], tmp_path)
    assert collected.funnel == {"in": 2, "kept": 1, "dropped": {kind: 1}}
    assert [name for name, _ in failures(tmp_path)] == [kind]
    again = collect(asking(server), sums[:2], tmp_path)
    assert (again, len(server.asked)) == (collected, 2)


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, {"error": "oops"}),
        (503, {}, b"<html>busy</html>"),
        (429, {"retry-after": "0.01"}, {}),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}),
        (408, {}, {}),
        (200, {"content-type": "text/html"}, b"<html>proxy</html>"),
        (200, {}, b'{"choices": ['),
        (200, {}, b""),
        (200, {"cut": "yes"}, b'{"choices"'),
        {"error": {"message": "late"}},
        {"choices": None},
        chat(finish=None, reasoning_content="Hm."),
        chat(finish="insufficient_system_resource", reasoning_content="Hm."),
        "hang",
    ],
)
def test_passing_errors_are_retried(server, sums, tmp_path, fault):
    server.script = [fault]
    collected = collect(asking(server, timeout=0.5), sums[:1], tmp_path)
    assert (collected.funnel["kept"], len(server.asked)) == (1, 2)
    assert collected.rows[0]["attempts"] == 2
    assert failures(tmp_path) == []


def test_the_deadline_counts_the_whole_request(server, sums, tmp_path):
    server.script = ["drip"]  # each read is well within the timeout
    begun = time.monotonic()
    collected = collect(asking(server, timeout=0.4), sums[:1], tmp_path)
    assert collected.rows[0]["attempts"] == 2
    assert time.monotonic() - begun < 1.8


def test_used_up_retries_are_a_recorded_failure_and_asked_again(server, sums, tmp_path):
    server.script = [(500, {}, {"error": "oops"})] * 3
    collected = collect(asking(server), sums[:2], tmp_path)
    assert collected.funnel == {"in": 2, "kept": 1, "dropped": {"status_500": 1}}
    ((kind, message),) = failures(tmp_path)
    assert kind == "status_500"
    assert "asked 3 times" in message
    again = collect(asking(server), sums[:2], tmp_path)
    assert again.funnel == {"in": 2, "kept": 2, "dropped": {}}
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "key is not accepted: check DEEPSEEK_API_KEY"),
        (402, "no balance"),
        (403, "rights"),
        (404, "no such model"),
    ],
)
def test_fatal_statuses_stop_the_run_and_keep_the_rows(server, sums, tmp_path, status, message):
    server.script = [GOOD, (status, {}, {"error": {"message": f"refused {KEY}"}})]
    with pytest.raises(InputError, match=message):
        collect(asking(server, fallback="offline"), sums, tmp_path)
    assert len(server.asked) == 2
    assert len(read_rows(tmp_path / "samples.jsonl")) == 1


def test_an_absent_server_stops_the_run(server, sums, tmp_path):
    args = asking(server, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(InputError, match=f"{PATIENCE} requests in a row .*127.0.0.1:9"):
        collect(args, sums, tmp_path)
    assert {kind for kind, _ in failures(tmp_path)} == {"connection"}


def test_nothing_collected_is_an_error(server, sums, tmp_path):
    server.script = [chat()]
    with pytest.raises(InputError, match="nothing was collected"):
        collect(asking(server), sums[:1], tmp_path)


def test_fallback_rows_say_that_they_are(server, sums, tmp_path):
    server.script = [GOOD, *[(500, {}, {})] * 3]
    collected = collect(asking(server, fallback="offline"), sums[:3], tmp_path)
    assert [row["source"] for row in collected.rows] == [
        "deepseek-flash",
        "offline-fallback",
        "deepseek-flash",
    ]
    assert collected.sources == {"deepseek-flash": 2, "offline-fallback": 1}
    assert collected.funnel == {"in": 3, "kept": 3, "dropped": {}}
    assert len(failures(tmp_path)) == 1


def test_fallback_stops_asking_a_server_that_is_gone(server, sums, tmp_path):
    server.script = [(500, {}, {})] * 1000
    collected = collect(asking(server, fallback="offline", max_retries=0), sums, tmp_path)
    assert collected.sources == {"offline-fallback": 30}
    assert len(server.asked) == PATIENCE


def test_a_cut_run_asks_only_for_what_is_missing(server, sums, tmp_path):
    stop = [GOOD] * 7 + [(401, {}, {})]
    server.script = stop
    args = asking(server, samples_per_prompt=2)
    with pytest.raises(InputError):
        collect(args, sums[:10], tmp_path)
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"id": "torn')
    collected = collect(args, sums[:10], tmp_path)
    assert len(server.asked) == 8 + 13
    assert [(row["id"], row["sample"]) for row in collected.rows] == [
        (row["id"], index) for row in sums[:10] for index in range(2)
    ]
    assert read_rows(tmp_path / "samples.jsonl") == collected.rows


def test_rows_are_scored_as_they_arrive(server, sums, tmp_path):
    seen, told = [], []

    def score(row):
        seen.append(len(read_rows(tmp_path / "samples.jsonl")))
        return row | {"reward": 1.0}

    def progress(done, total):
        told.append((done, total))

    collected = collect(asking(server), sums[:3], tmp_path, score=score, progress=progress)
    assert seen == [0, 1, 2]
    assert [row["reward"] for row in collected.rows] == [1.0] * 3
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_key_is_nowhere(server, sums, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "chainforge")
    echo = {"error": {"message": f"wrong key {KEY}"}}
    server.script = [(500, {}, echo), (400, {}, echo), echo, (503, {}, KEY.encode()), GOOD,
                     (401, {}, echo)]  # fmt: skip
    with pytest.raises(InputError) as caught:
        collect(asking(server), sums, tmp_path)
    assert {row["authorization"] for row in server.asked} == {f"Bearer {KEY}"}
    written = [path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert len(written) == 2
    assert not any(KEY in text for text in [*written, caplog.text, str(caught.value)])
    assert "***" in caplog.text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("teacher", ["deepseek", "openai"])
def test_a_missing_key_is_said_before_any_work(monkeypatch, sums, tmp_path, teacher):
    name = f"{teacher.upper()}_API_KEY"
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=name):
        collect(TeacherArgs(teacher, model="m"), sums, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_of_ones_own_needs_no_key(server, sums, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    extra = {"reasoning": {"enabled": True}}
    args = asking(server, teacher="openai", model="qwen", temperature=0.6, extra_body=extra)
    (row,) = collect(args, sums[:1], tmp_path).rows
    (asked,) = server.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("qwen", 0.6, 32768)
    assert asked["reasoning"] == {"enabled": True}
    assert "thinking" not in asked
    assert row["source"] == "qwen"


def test_openai_needs_a_model(server, sums, tmp_path):
    with pytest.raises(InputError, match="which `model`"):
        collect(asking(server, teacher="openai"), sums, tmp_path)


def test_the_retired_reasoner_is_an_alias(server, sums, tmp_path, caplog):
    (row,) = collect(asking(server, model="deepseek-reasoner"), sums[:1], tmp_path).rows
    assert server.asked[0]["model"] == row["source"] == "deepseek-flash"
    assert "deepseek-reasoner is retired" in caplog.text


def test_offline_rows(sums, tmp_path):
    args = TeacherArgs(samples_per_prompt=4)
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


def test_offline_in_the_think_form(sums, tmp_path):
    (row,) = collect(TeacherArgs(), sums[:1], tmp_path, transcript="think").rows
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
        ({"samples_per_prompt": 0}, "samples_per_prompt: expected 1"),
        ({"max_retries": -1}, "max_retries: expected 0"),
    ],
)
def test_bad_settings(sums, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        collect(TeacherArgs(**settings), sums, tmp_path)
