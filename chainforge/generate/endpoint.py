"""Which server is asked, for which model, and with what: everything that makes up a request."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row
from chainforge.core.secrets import read_secret
from chainforge.generate.prices import Price, find_price

if TYPE_CHECKING:
    from chainforge.generate.settings import TeacherArgs

logger = logging.getLogger(__name__)

DEEPSEEK_URL = "https://api.deepseek.com"
OPENAI_URL = "https://api.openai.com/v1"
DEEPSEEK_MODEL = "deepseek-flash"
RETIRED = "deepseek-reasoner"
KEYS = {"deepseek": "DEEPSEEK_API_KEY", "openai": "OPENAI_API_KEY"}
BILLED_BY = {"deepseek": "api.deepseek.com", "openai": "api.openai.com"}
LONGER = 2  # an answer that was cut off is asked for once more, with so many times the tokens
# A tokenizer makes at most one token of a byte; a chat template adds its own around each turn.
TURN_TOKENS, TEMPLATE_TOKENS = 16, 256
STANDARD = ("temperature", "top_p", "n", "seed")  # fields that every server knows
# Settings of the teacher by the field of a request that they set; other names of these fields, and
# fields with which a request costs more than is counted.
TEACHERS = {"model": "model", "max_tokens": "max_tokens", "n": "samples_per_prompt",
            "temperature": "temperature"}  # fmt: skip
_SYNONYMS = {
    "max_tokens": "max_completion_tokens max_output_tokens max_new_tokens max_length num_predict "
    "n_predict",
    "n": "best_of num_return_sequences num_generations",
    "model": "models route",
    "": "messages prompt input contents system stream stream_options tools tool_choice functions "
    "function_call plugins web_search web_search_options search_parameters enable_search "
    "service_tier prediction modalities audio",
}
_NESTED = ("extra_body", "options", "parameters", "sampling_params", "generation_config")


@dataclass(frozen=True)
class Endpoint:
    """A server, a model, and what is sent with every prompt."""

    address: str
    host: str
    model: str
    billed_by: str  # the host under which the price table has the model
    instruction: str
    limit: str  # what this server calls the limit of tokens
    max_tokens: int
    further: Row

    @classmethod
    def of(cls, args: TeacherArgs) -> Endpoint:
        """Read it from the settings; raise `InputError` for what can be no server."""
        address = address_of(args)
        host = urlsplit(address).netloc
        own = args.teacher == "openai" and args.base_url is None
        further: Row = {} if args.temperature is None else {"temperature": args.temperature}
        if args.teacher == "deepseek":
            further["thinking"] = {"type": "enabled"}
        return cls(
            address=address,
            host=host,
            model=_model(args),
            # DeepSeek bills what is asked for through a proxy, too.
            billed_by=BILLED_BY[args.teacher] if own or args.teacher == "deepseek" else host,
            instruction=args.instruction,
            # OpenAI's own models refuse max_tokens; other servers do not all know the new name.
            limit="max_completion_tokens" if own else "max_tokens",
            max_tokens=args.max_tokens,
            further=further | (args.extra_body or {}),
        )

    def messages(self, row: Row) -> list[Message]:
        """Return the turns to send: the prompt's, under the teacher's own instruction."""
        turns = [turn for turn in row["prompt"] if turn["role"] != "system"]
        return (
            [{"role": "system", "content": self.instruction}, *turns] if self.instruction else turns
        )

    def parameters(self, longer: bool = False) -> Row:
        """Return everything of a request but its messages."""
        limit = self.max_tokens * (LONGER if longer else 1)
        return self.further | {"model": self.model, self.limit: limit}

    def most_tokens(self, row: Row, longer: bool = False) -> tuple[int, int]:
        """Return the most tokens that a prompt and its answer can have."""
        turns = self.messages(row)
        size = sum(len(turn["content"].encode("utf-8", "replace")) for turn in turns)
        prompt = size + TURN_TOKENS * len(turns) + TEMPLATE_TOKENS
        return prompt, self.max_tokens * (LONGER if longer else 1)

    def request_key(self, row: Row, index: int) -> str:
        """Return the hash of the request and of the answer's number: what makes it the same one."""
        request = [self.address, self.messages(row), self.parameters()]
        return _hash([row["id"], request, index])[:24]

    def prompt_hash(self, row: Row) -> str:
        """Return the hash of the messages as they are sent."""
        return _hash(self.messages(row))[:16]


def address_of(args: TeacherArgs) -> str:
    """Return the server's address; raise `InputError` for what can be none."""
    if args.base_url is None:
        return DEEPSEEK_URL if args.teacher == "deepseek" else OPENAI_URL
    return read_address(args.base_url, KEYS[args.teacher])


def read_address(text: str, variable: str = KEYS["openai"]) -> str:
    """Return a `base_url` as requests need it; `variable` is where its key is read from.

    Raise `InputError` for what is no address, and for one with a password in it.
    """
    import httpx2

    address = text.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        url = httpx2.URL(address)
        good = url.scheme in ("http", "https") and url.host and urlsplit(address).port != 0
        good, private, why = good and address == "".join(address.split()), bool(url.userinfo), ""
    except (httpx2.InvalidURL, ValueError) as error:
        good, private, why = False, False, f" ({error})"
    if private or "?" in address or "#" in address or ("@" in address and not good):
        raise InputError(
            "base_url: leave user, password and parameters out of the address; a key is read from "
            f"{variable}"
        )
    if not good:
        raise InputError(
            "base_url: expected an address such as http://localhost:8000/v1, "
            f"found {address!r}{why}"
        )
    return address


def check_extra_body(extra: Any, settings: Mapping[str, str] = TEACHERS) -> None:
    """Raise `InputError` for what `extra_body` may not hold.

    That is what JSON cannot hold, and the fields that are set already, or with which a request
    costs more than is counted. `settings` has the names of the settings by their fields.
    """
    try:
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"extra_body: cannot be sent as JSON: {error}") from None
    ours = {name: field for field, names in _SYNONYMS.items() for name in names.split()}
    ours |= {field: field for field in settings}
    for name, value in (extra or {}).items():
        plain = str(name).strip().lower()
        if plain in ours:
            setting = settings.get(ours[plain])
            advice = f"set `{setting}` instead" if setting else "leave it out"
            raise InputError(
                f"extra_body: {name!r} changes what is asked for or what it may cost; {advice}"
            )
        if plain in _NESTED and isinstance(value, dict):
            check_extra_body(value, settings)


def key_of(args: TeacherArgs) -> str:
    """Return the teacher's key, from the environment; empty where a server of one's own needs none.

    Raises `InputError` where it is missing or no key.
    """
    variable = KEYS[args.teacher]
    key = read_secret(variable)
    own_server = args.teacher == "openai" and args.base_url is not None
    if not key and not own_server:
        raise InputError(
            f"teacher {args.teacher}: the environment variable {variable} is not set; "
            f"export {variable}=... (a key never goes into a file)"
        )
    return key


def price_of(args: TeacherArgs, endpoint: Endpoint) -> Price | None:
    """Return the model's price; raise `InputError` where a limit needs it and it is unknown."""
    price = find_price(endpoint.billed_by, endpoint.model, args.prices)
    if price is None and args.max_usd is not None:
        raise InputError(
            f"max_usd: the price of {endpoint.model!r} at {endpoint.billed_by} is not known; name "
            "a file with it as `prices`, or use max_tokens_total or max_requests"
        )
    return price


def _model(args: TeacherArgs) -> str:
    if args.teacher != "deepseek":
        if not args.model:
            raise InputError(f"teacher {args.teacher}: say which `model` to ask for")
        return args.model
    if args.temperature is not None:
        logger.warning("temperature: DeepSeek ignores it while thinking")
    if args.model == RETIRED:
        logger.warning("model: %s is retired; asking %s with thinking on, which replaced it",
                       RETIRED, DEEPSEEK_MODEL)  # fmt: skip
        return DEEPSEEK_MODEL
    return args.model or DEEPSEEK_MODEL


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
