"""What a chain needs of others: a teacher's key, servers that answer, the Hub's token, trackers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.errors import InputError, first_line
from chainforge.core.weights import hub_failures
from chainforge.doctor import material
from chainforge.doctor.engines import ask
from chainforge.doctor.findings import Context, Finding, NotHere
from chainforge.generate.build import BuildArgs
from chainforge.generate.settings import KEYS, SamplingArgs, TeacherArgs
from chainforge.generate.teacher import endpoints_of, key_of, price_of
from chainforge.hub.export import check_push
from chainforge.hub.upload import token
from chainforge.train.settings import TRAINED
from chainforge.train.trackers import asked_for, check_trackers


def fetch_models(context: Context) -> Iterator[Finding]:
    """Fetch configs and tokenizers, where the Hub may be asked: the checks after it read them."""
    if context.online:
        yield from (Finding("warning", "Hub", text) for text in material.fetch(context))


def check_accounts(context: Context) -> Iterator[Finding]:
    """Check keys, servers, the Hub's token and trackers; no key or token is ever shown."""
    for step in context.steps:
        try:
            found = material.settings(context, step)
        except (InputError, NotHere):
            continue  # the check of settings says so
        for args in found.values():
            if isinstance(args, TeacherArgs) and args.teacher != "offline":
                yield from _teacher(context, step, args)
            elif isinstance(args, SamplingArgs) and args.engine == "api":
                urls = [args.base_url] if isinstance(args.base_url, str) else args.base_url
                for url in urls:
                    yield _server(step, "server", url)
            elif isinstance(args, BuildArgs):
                yield from _refusal(step, "Hub", lambda args=args: check_push(args))
        if step.stage.recipe in TRAINED:
            training = material.training_of(context, step)
            yield from _push(context, step, training)
            if trackers := asked_for(training["report_to"]):
                yield from _refusal(step, "tracker", lambda: check_trackers(trackers), trackers)


def _teacher(context: Context, step: Step, args: TeacherArgs) -> Iterator[Finding]:
    name = step.stage.name
    try:
        endpoint = endpoints_of(args)[0]
        price_of(args, endpoint)
        key = key_of(args)
    except InputError as error:
        yield Finding("error", "teacher", str(error), name)
        return
    words = (
        f"{endpoint.model} at {endpoint.host}, {KEYS[args.teacher]} {'is' if key else 'not'} set"
    )
    yield Finding("ok", "teacher", words, name)
    if args.base_url or context.online:
        yield _server(step, "teacher", endpoint.address)


def _server(step: Step, check: str, address: str) -> Finding:
    """Ask a server whether it is there: any answer will do, also that a key is missing."""
    address = address.rstrip("/")
    code, _ = ask(f"{address}/models")
    if code == 0 or code >= 500:
        said = f"answers {code}" if code else "does not answer"
        text = f"the server at {address} {said}: start it, or put `base_url` right"
        return Finding("error", check, text, step.stage.name)
    return Finding("ok", check, f"the server at {address} answers", step.stage.name)


def _push(context: Context, step: Step, training: dict[str, Any]) -> Iterator[Finding]:
    """See that what a training stage is to send to the Hub can go there."""
    if not training["push_to_hub"] and training["hub_token"] is None:
        return
    settings = SimpleNamespace(**training)
    problems = list(_refusal(step, "Hub", lambda: check_push(settings)))
    yield from problems
    if problems:
        return
    try:
        who = f" of {_owner()}" if context.online else ""
    except hub_failures() as error:
        text = f"the Hub was asked whose the token is, and did not say: {first_line(error)}"
        yield Finding("warning", "Hub", text, step.stage.name)
        return
    text = f"a token{who} is there, to send {training['hub_model_id']}"
    yield Finding("ok", "Hub", text, step.stage.name)


def _owner() -> str:
    """Ask the Hub whose the token is."""
    from huggingface_hub import HfApi

    return str(HfApi(token=token()).whoami()["name"])


def _refusal(step: Step, check: str, act: Any, fine: list[str] | None = None) -> Iterator[Finding]:
    try:
        act()
    except InputError as error:
        yield Finding("error", check, str(error), step.stage.name)
        return
    if fine:
        yield Finding("ok", check, f"{', '.join(fine)}: installed", step.stage.name)
