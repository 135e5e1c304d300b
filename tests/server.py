"""A chat server on the loopback whose faults are chosen per request.

`Server(script)` answers by a function of the request (`Request`: its number, body and how often
its prompt was asked before), or with the next of a list, then with good answers. It remembers all
that was asked and how many requests were under way at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

USAGE = {"prompt_tokens": 40, "completion_tokens": 60, "total_tokens": 100}
REASONING = "Two and two make four, so the sum is four."


def chat(content: Any = "4", finish: Any = "stop", usage: Any = USAGE, **message: Any) -> dict:
    """A chat completion; the reasoning where the test puts it."""
    whole = {"role": "assistant", "content": content, **message}
    return {
        "id": "r-1",
        "object": "chat.completion",
        "model": "served-model",
        "system_fingerprint": "fp-1",
        "choices": [{"index": 0, "finish_reason": finish, "message": whole}],
        "usage": usage,
    }


GOOD = chat(reasoning_content=REASONING)


@dataclass
class Answer:
    """What to send: a status, a body, and how."""

    body: Any = None  # a dict is sent as JSON, bytes and text as they are
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    how: str = ""  # "", hang, drip, reset, cut
    seconds: float = 0.0  # before the answer


@dataclass
class Request:
    """What was asked."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    tries: int  # how often the same messages came before
    under_way: int  # with this one

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


# Faults after which the same request deserves another try, by name.
FAULTS: dict[str, Answer] = {
    "429": Answer({"error": {"message": "slow down"}}, 429),
    "429 with Retry-After": Answer({}, 429, {"retry-after": "1"}),
    "429 with a date": Answer({}, 429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "500": Answer({"error": "oops"}, 500),
    "503": Answer(b"<html>busy</html>", 503),
    "408": Answer({}, 408),
    "hang": Answer(how="hang"),
    "drip": Answer(GOOD, how="drip"),
    "reset": Answer(GOOD, how="reset"),
    "cut body": Answer(GOOD, how="cut"),
    "cut JSON": Answer(b'{"choices": ['),
    "empty body": Answer(b""),
    "HTML": Answer("<html>proxy</html>", headers={"content-type": "text/html"}),
    "error body": Answer({"error": {"message": "late"}}),
    "choices: null": Answer({"id": "x", "choices": None}),
    "interrupted": Answer(chat(finish="insufficient_system_resource", reasoning_content="Hm")),
}

Script = Callable[[Request], Answer | dict | None]


class Server:
    """Serve in a thread until closed; `limit` requests at a time, 429 above."""

    def __init__(
        self,
        script: Script | list | None = None,
        *,
        limit: int | None = None,
        seconds: float = 0.0,
        drip: float = 0.05,
    ) -> None:
        self.script, self.limit, self.seconds, self.drip = script or [], limit, seconds, drip
        self.asked: list[Request] = []
        self.most = self.under_way = 0
        self._tries: Counter[str] = Counter()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, EOFError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        key = json.dumps(body["messages"])
        self.under_way += 1
        request = Request(len(self.asked), body, headers, self._tries[key], self.under_way)
        self._tries[key] += 1
        self.asked.append(request)
        try:
            answer = self._answer(request)
            if answer.status != 429:
                self.most = max(self.most, self.under_way)
            # Without a limit to the time, a client that left would count as under way for ever.
            await asyncio.sleep(60 if answer.how == "hang" else answer.seconds)
        finally:
            self.under_way -= 1  # before the answer: the client may ask again at once
        return await self._send(writer, answer)

    def _answer(self, request: Request) -> Answer:
        if self.limit is not None and request.under_way > self.limit:
            return FAULTS["429"]
        if callable(self.script):
            chosen = self.script(request)
        else:
            chosen = self.script.pop(0) if self.script else None
        if isinstance(chosen, Answer):
            return chosen
        return Answer(GOOD if chosen is None else chosen, seconds=self.seconds)

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> bool:
        body = answer.body
        data = body if isinstance(body, bytes) else str(body).encode()
        if isinstance(body, dict):
            data = json.dumps(body).encode()
        if answer.how == "drip":  # blank lines while a request is queued, as DeepSeek sends them
            data = b"\n" * 20 + data
        headers = {"content-type": "application/json", "content-length": str(len(data))}
        lines = [f"{name}: {value}" for name, value in (headers | answer.headers).items()]
        writer.write("\r\n".join([f"HTTP/1.1 {answer.status} X", *lines, "", ""]).encode())
        if answer.how == "drip":
            for piece in data.splitlines(keepends=True):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.drip)
            return True
        if answer.how in ("reset", "cut"):
            writer.write(data[: len(data) // 2])
            await writer.drain()
            if answer.how == "reset":
                writer.transport.abort()
            return False
        writer.write(data)
        await writer.drain()
        return True
