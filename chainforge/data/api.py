"""A teacher behind an OpenAI-compatible API: one request at a time, with retries and a deadline."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.records import Row
from chainforge.core.transcript import write
from chainforge.data.replies import Rejected, Reply, Transient, read_reply

if TYPE_CHECKING:
    from chainforge.data.teacher import TeacherArgs

logger = logging.getLogger(__name__)

DEEPSEEK_URL = "https://api.deepseek.com"
DEEPSEEK_MODEL = "deepseek-flash"
KEYS = {"deepseek": "DEEPSEEK_API_KEY", "openai": "OPENAI_API_KEY"}

# No other request would fare better: the run stops. What to do stands beside it.
FATAL = {
    401: "the key is not accepted: check {variable}",
    402: "the account has no balance left: top it up",
    403: "the account may not do this: check its rights and region",
    404: "no such model or address: check `model` and `base_url`",
}
LONGEST_WAIT = 60.0


class ApiTeacher:
    """Ask a server, read the reasoning wherever it puts it, and write the transcript ourselves."""

    def __init__(self, args: TeacherArgs, transcript: str) -> None:
        self.args, self.transcript = args, transcript
        self.variable = KEYS[args.teacher]
        self.key = os.environ.get(self.variable, "").strip()
        own_server = args.teacher == "openai" and args.base_url is not None
        if not self.key and not own_server:
            raise InputError(
                f"teacher {args.teacher}: the environment variable {self.variable} is not set; "
                f"export {self.variable}=... (a key never goes into a file)"
            )
        self.model = self._model()
        import openai

        # The client's own retries would hide a 429, and its timeout is per read, not in all.
        self.client = openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=args.base_url or (DEEPSEEK_URL if args.teacher == "deepseek" else None),
            max_retries=0,
            timeout=args.timeout,
        )
        self.address = str(self.client.base_url).rpartition("@")[2]  # without user and password

    def _model(self) -> str:
        args = self.args
        if args.teacher == "deepseek":
            if args.temperature is not None:
                logger.warning("temperature: DeepSeek ignores it while thinking")
            if args.model == "deepseek-reasoner":
                logger.warning("model: deepseek-reasoner is retired; asking %s with thinking on, "
                               "which replaced it", DEEPSEEK_MODEL)  # fmt: skip
                return DEEPSEEK_MODEL
            return args.model or DEEPSEEK_MODEL
        if not args.model:
            raise InputError("teacher openai: say which `model` to ask for")
        return args.model

    async def ask(self, row: Row, index: int) -> Row:
        """Ask until there is an answer, the answer is useless, or the retries are used up."""
        started = time.monotonic()
        for attempt in range(self.args.max_retries + 1):
            try:
                reply = self._read(await self._request(row))
                break
            except Transient as error:
                if attempt == self.args.max_retries:
                    raise Transient(error.kind, f"{error} (asked {attempt + 1} times)") from None
                pause = min(LONGEST_WAIT, self.args.retry_wait * 2**attempt)
                wait = pause * random.uniform(0.75, 1.0) if error.wait is None else error.wait
                logger.info("%s; again in %.1f s", error, wait)
                await asyncio.sleep(wait)
        return self._columns(reply, attempt + 1, time.monotonic() - started)

    def _read(self, body: Any) -> Reply:
        try:
            return read_reply(body, self.transcript)
        except (Transient, Rejected) as error:
            raise type(error)(error.kind, self._clean(str(error))) from None

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    def _columns(self, reply: Reply, attempts: int, seconds: float) -> Row:
        try:
            completion = write(reply.reasoning, reply.answer, self.transcript)
        except InputError as error:  # the teacher wrote our tags into its text
            raise Rejected("tags", str(error)) from None
        return {
            "completion": completion,
            "source": self.model,
            "model": reply.model,
            "sampling": {key: value for key, value in self._parameters().items() if key != "model"},
            "finish_reason": reply.finish_reason,
            "tokens": (reply.usage or {}).get("completion_tokens"),
            "usage": reply.usage,
            "reasoning_source": reply.found,
            "response_id": reply.response,
            "system_fingerprint": reply.fingerprint,
            "attempts": attempts,
            "seconds": round(seconds, 3),
        }

    def _parameters(self) -> dict[str, Any]:
        """Return everything of a request but its messages."""
        args = self.args
        # OpenAI's own models refuse max_tokens; other servers do not all know the new name.
        own = args.teacher == "openai" and args.base_url is None
        given: dict[str, Any] = {"model": self.model}
        given["max_completion_tokens" if own else "max_tokens"] = args.max_tokens
        if args.temperature is not None:
            given["temperature"] = args.temperature
        thinking = {"thinking": {"type": "enabled"}} if args.teacher == "deepseek" else {}
        if extra := thinking | (args.extra_body or {}):
            given["extra_body"] = extra
        return given

    def _messages(self, row: Row) -> list[dict[str, str]]:
        turns = [turn for turn in row["prompt"] if turn["role"] != "system"]
        asked = self.args.instruction
        return [{"role": "system", "content": asked}, *turns] if asked else turns

    async def _request(self, row: Row) -> Any:
        """Send one request; raise `Transient`, `Rejected` or `InputError` for what goes wrong."""
        import openai

        try:
            async with asyncio.timeout(self.args.timeout):
                return await self.client.chat.completions.create(
                    messages=self._messages(row),  # type: ignore[arg-type]
                    **self._parameters(),
                )
        except TimeoutError:
            raise Transient("timeout", f"no answer within {self.args.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._judged(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            said = self._clean(f"{type(cause).__name__}: {cause}")
            kind = "timeout" if isinstance(error, openai.APITimeoutError) else "connection"
            raise Transient(kind, f"{self.address}: {said}") from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            said = self._clean(f"{type(error).__name__}: {error}")
            raise Transient("malformed", f"a reply that cannot be read: {said}") from None

    def _judged(self, error: Any) -> Exception:
        """Say by the status whether the run, this row, or only this try is lost."""
        status = int(error.status_code)
        said = f"status {status}: {self._clean(error.message)}"
        if status in FATAL:
            advice = FATAL[status].format(variable=self.variable)
            return InputError(f"{self.address}: {said}. {advice}. Rows so far are kept")
        if status in (408, 409, 429) or status >= 500:
            return Transient(f"status_{status}", said, _retry_after(error.response))
        return Rejected(f"status_{status}", said)

    def _clean(self, text: str) -> str:
        """Return a foreign message on one line, cut, and without the key."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join(text.split())[:300]


def _retry_after(response: Any) -> float | None:
    """Return the seconds that a server asks to wait for, where it says so in seconds."""
    try:
        return min(600.0, max(0.0, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None
