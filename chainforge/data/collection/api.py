"""A teacher behind an OpenAI-compatible API: one request, its outcome, and what it cost.

Retries, pauses and limits are the collector's business; the client's own would hide a 429.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.records import Row
from chainforge.core.sharing import SHORTEST_SECRET
from chainforge.core.transcript import write
from chainforge.data.collection.endpoint import KEYS, Endpoint, key_of, price_of
from chainforge.data.collection.ledger import NOTHING, Amount
from chainforge.data.collection.prices import token_counts
from chainforge.data.collection.replies import Failure, Fatal, Rejected, Transient, read_reply
from chainforge.data.collection.validation import validate

if TYPE_CHECKING:
    from chainforge.data.collection.settings import TeacherArgs

# No other request would fare better: the run stops. What to do stands beside it.
FATAL = {
    401: "the key is not accepted: check {variable}",
    402: "the account has no balance left: top it up",
    403: "the account may not do this: check its rights and region",
    404: "no such model or address: check `model` and `base_url`",
}
PASSING = (408, 409, 429)
# Sure not to have been billed: refused before any work. Of other errors one cannot know.
REFUSED = (400, 401, 402, 403, 404, 409, 422, 429, 503)
_NO_MODEL = re.compile(r"model\W.{0,40}not (exist|found|available)|(no such|unknown) model", re.I)


class ApiTeacher:
    """Ask a server, read the reasoning wherever it puts it, and write the transcript ourselves."""

    metered = True

    def __init__(self, args: TeacherArgs, transcript: str) -> None:
        self.args, self.transcript, self.kind = args, transcript, args.teacher
        self.variable = KEYS[args.teacher]
        self.key = key_of(args)
        self.endpoint = Endpoint.of(args)
        self.price = price_of(args, self.endpoint)
        import openai

        self.version = f"openai {openai.__version__}"
        for name in ("httpx", "httpx2", "httpcore", "httpcore2"):  # a line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        # The client's timeout is per read, not in all; `ask` sets the deadline.
        self.client = openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.endpoint.address,
            max_retries=0,
            timeout=self.args.timeout,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    def request_key(self, row: Row, index: int) -> str:
        """Return the hash of the request and of the answer's number."""
        return self.endpoint.request_key(row, index)

    def worst(self, row: Row, *, longer: bool) -> Amount:
        """Return the most that a request can cost."""
        prompt, limit = self.endpoint.most_tokens(row, longer)
        return Amount(self.price.worst(prompt, limit) if self.price else None, prompt + limit)

    async def ask(self, row: Row, index: int, *, longer: bool = False) -> tuple[Row, Amount | None]:
        """Send one request; return the Sample's columns and what it cost, None when unknown.

        Raises `Transient`, `Rejected` or `Fatal`, each with what it cost.
        """
        sent, started = datetime.now(UTC), time.monotonic()
        try:
            reply = read_reply(await self._request(row, longer), self.transcript)
            validate(reply, row, self.args)
            try:
                completion = write(reply.reasoning, reply.answer, self.transcript)
            except InputError as error:
                raise Rejected("tags", str(error), usage=reply.usage) from None
        except Failure as error:
            if error.paid is None:
                error.paid = self._paid(error.usage, sent)
            error.args = (self._clean(str(error)),)
            if isinstance(error, Rejected):
                error.said = self._scrub((error.said or {}) | {"usage": error.usage})
            raise
        cost = self.price.cost(reply.usage, sent, datetime.now(UTC)) if self.price else None
        columns = {
            "completion": completion,
            "source": self.endpoint.model,
            "teacher": self.kind,
            "model": reply.model,
            "system_fingerprint": reply.fingerprint,
            "response_id": reply.response,
            "host": self.endpoint.host,
            "sampling": self.endpoint.parameters(longer),
            "prompt_hash": self.endpoint.prompt_hash(row),
            "finish_reason": reply.finish_reason,
            "tokens": (reply.usage or {}).get("completion_tokens"),
            "usage": reply.usage,
            "cost": cost,
            "price_date": self.price.date if self.price else None,
            "latency": round(time.monotonic() - started, 3),
            "time": sent.isoformat(timespec="seconds"),
            "client": self.version,
            "reasoning_source": reply.found,
        }
        return self._scrub(columns), self._paid(reply.usage, sent)

    def _paid(self, usage: Row | None, sent: datetime) -> Amount | None:
        counts = token_counts(usage)
        if counts is None:
            return None
        usd = self.price.cost(usage, sent, datetime.now(UTC)) if self.price else None
        return Amount(usd, sum(counts))

    async def _request(self, row: Row, longer: bool) -> Any:
        """Send one request; raise a `Failure` for what goes wrong on the way."""
        import openai

        body = self.endpoint.parameters(longer)
        named = {name: body.pop(name) for name in list(body) if name in ("model", "temperature")}
        try:
            async with asyncio.timeout(self.args.timeout):
                return await self.client.chat.completions.create(
                    messages=self.endpoint.messages(row),  # type: ignore[arg-type]
                    extra_body=body,
                    **named,
                )
        except TimeoutError:
            raise Transient("timeout", f"no answer within {self.args.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._judged(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            kind = "timeout" if isinstance(error, openai.APITimeoutError) else "connection"
            said = f"{self.endpoint.address}: {type(cause).__name__}: {cause}"
            lost = Transient(kind, said)
            # Nothing was sent, so nothing can be billed.
            lost.paid = NOTHING if "Connect" in type(cause).__name__ else None
            raise lost from None
        except UnicodeEncodeError as error:
            failure = Rejected("unsendable", f"the prompt is no text: {error.reason}")
            failure.paid = NOTHING
            raise failure from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            said = f"a reply that cannot be read: {type(error).__name__}: {error}"
            raise Transient("malformed", said) from None

    def _judged(self, error: Any) -> Failure:
        """Say by the status whether the run, this row, or only this try is lost."""
        status = int(error.status_code)
        said = f"status {status}: {error.message}"
        kind = f"status_{status}"
        fatal = 404 if status == 400 and _NO_MODEL.search(str(error.message)) else status
        failure: Failure
        if fatal in FATAL:
            advice = FATAL[fatal].format(variable=self.variable)
            failure = Fatal(kind, f"{self.endpoint.address}: {self._clean(said)}. {advice}")
        elif status in PASSING or status >= 500:
            wait = _retry_after(error.response)
            failure = Transient(kind, said, wait=wait, refused=status == 429)
        else:
            failure = Rejected(kind, said)
        failure.paid = NOTHING if status in REFUSED else None
        return failure

    def _clean(self, text: str) -> str:
        """Return a foreign message on one line, cut, and without the key."""
        return " ".join(self._without_key(text).split())[:400]

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if len(self.key) >= SHORTEST_SECRET else text

    def _scrub(self, value: Any) -> Any:
        """Take the key out of whatever a server sent back; some echo it."""
        if isinstance(value, str):
            return self._without_key(value)
        if isinstance(value, dict):
            return {self._without_key(str(key)): self._scrub(item) for key, item in value.items()}
        return [self._scrub(item) for item in value] if isinstance(value, list) else value


def _retry_after(response: Any) -> float | None:
    """Return the seconds that a server asks to wait for, where it says so in seconds."""
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None
