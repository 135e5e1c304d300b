"""Load tokenizers, and make their chat templates write transcripts unchanged.

Chat templates strip, move and insert reasoning. So the last assistant turn is written without them:
the prompt as it is sampled from, the text itself, and the template's end of a turn. A template that
opens `<think>` in the prompt is wrapped, so that completions are whole; the wrapped one is saved
with the model, and servers write the same prompts.

A tokenizer cannot tell the template's `<|im_end|>` from one that a user or a teacher wrote. A
shielded tokenizer gets the latter in two pieces.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import ALL_TAGS, DEFAULT, PRESETS, read, special_ids, tags_of, write

_OVERHEAD = 256  # bytes that a template may add to a short conversation
# A chat template is a program from the Hub: what it may use of this machine to write a few turns.
_CPU_SECONDS, _WALL_SECONDS, _MEMORY = 10, 300, 2 << 30

_QUESTION: list[Message] = [{"role": "user", "content": "1 + 1 ="}]
_ANSWER = "qxjzvw"  # no template has this word
# The assistant's text is followed by what ends the turn: marks, and no words.
_END = re.compile(r"<[^<>\n]{1,60}>|\[/?[A-Z_]+\]|\s")
_OPENS = "|".join(re.escape(preset.reasoning_open) for preset in PRESETS.values())
_GIVE = "chatml, a .jinja file, or the folder or Hub id of a tokenizer"
_SET = ("messages", "tools", "documents", "add_generation_prompt", "tokenize")  # by each call
_BY_FILE = "set `chat_template_path: chatml`, or to a .jinja file of your own"
# For models without a chat template: it needs no token but the tokenizer's own.
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Texts that a template may treat in a way of their own: tags, and what turns thinking on or off.
_MARK = re.compile(r"<[^<>\s]{1,40}>|/(?:no_)?think")
_CUT = "\ufdd0"  # a noncharacter of Unicode: no text has it, and templates leave it as it is


class Turn(NamedTuple):
    """How an assistant's turn is written: `lead`, text and `end`, after a prompt of `template`."""

    template: str
    lead: str
    end: str


def load_tokenizer(
    reference: str,
    transcript: str = DEFAULT,
    *,
    template: str | None = None,
    rows: Iterable[Row] = (),
    template_options: dict[str, Any] | None = None,
    served: bool = False,
    **options: Any,
) -> Any:
    """Load a tokenizer, shielded, that writes the assistant's turns unchanged.

    `template` (`chat_template_path`) is `chatml`, a .jinja file, or a tokenizer whose template to
    use; `rows` have the prompts that will be sent, `template_options` are further arguments of the
    template, and `options` those of `from_pretrained`. A server applies its own template: with
    `served` it must be one that needs no wrapper. Raises `InputError` when there is no template, or
    one that changes or refuses the prompts.
    """
    tokenizer = open_tokenizer(reference, **options)
    if template == "chatml":
        tokenizer.chat_template = CHATML
    elif template and template.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fault = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"chat_template_path: {template}: {fault}; give {_GIVE}") from None
    elif template:
        try:
            tokenizer.chat_template = open_tokenizer(template).chat_template
        except InputError as error:
            raise InputError(f"chat_template_path: {error}; give {_GIVE}") from None
    if isinstance(tokenizer.chat_template, dict):  # others are for tools and documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)  # TRL would take completions apart before rewards
    name = template or reference
    if template_options and tokenizer.chat_template:
        tokenizer.chat_template = _with_defaults(tokenizer.chat_template, template_options, name)
    turn = fit_template(tokenizer, transcript, name, _column(rows, "prompt"))
    if served and turn.template != tokenizer.chat_template:
        raise InputError(
            f"{name}: the chat template begins the completion itself, and so would the server; use "
            "`engine: transformers`, or serve the model of a stage, which has a wrapped template"
        )
    tokenizer.chat_template = turn.template
    return shield(tokenizer, turn)


def open_tokenizer(reference: str, **options: Any) -> Any:
    """Load a tokenizer as it is; raise `InputError` when there is none that knows any text."""
    from transformers import AutoTokenizer

    options = {key: value for key, value in options.items() if value is not None}
    try:
        made = AutoTokenizer.from_pretrained(reference, **{"trust_remote_code": False} | options)
    except (OSError, ValueError) as error:
        raise InputError(f"{reference}: no tokenizer found: {first_line(error)}") from None
    if not made("a", add_special_tokens=False)["input_ids"]:
        raise InputError(f"{reference}: its tokenizer encodes no text; is tokenizer.json missing?")
    return made


def fit_template(
    tokenizer: Any, transcript: str, name: str, prompts: Iterable[list[Message]] = ()
) -> Turn:
    """Return how transcripts are written with a tokenizer's chat template.

    Of `prompts` the first of each order of roles is tried. Raises `InputError`, with the setting to
    change, for a template that changes the prompts, fails, or does not end a turn.
    """
    template = tokenizer.chat_template
    if not template:
        raise InputError(f"{name}: the tokenizer has no chat template; {_BY_FILE}")
    readable = [preset for preset in PRESETS if _survives(tokenizer, preset)]
    if transcript not in readable:
        tags = ", ".join(tags_of(transcript).all)
        advice = "".join(f", or set `transcript: {preset}`" for preset in readable[:1])
        raise InputError(
            f"{name}: the tags are lost in decoding ({tags}); add them as ordinary tokens{advice}"
        )
    shapes: dict[tuple[str, ...], list[Message]] = {}
    for turns in prompts:
        shapes.setdefault(tuple(turn["role"] for turn in turns), turns)
    tried = list(shapes.values()) or [_QUESTION]
    render = functools.partial(type(tokenizer).apply_chat_template, tokenizer, tokenize=False)

    def flaw(prompts: list[list[Message]]) -> str | None:
        each = (_flaw(render, turns) for turns in prompts)
        return next((found for found in each if found), None)

    def fit() -> Turn | str:
        if found := flaw(tried):
            alone = [[turn for turn in turns if turn["role"] != "system"] for turns in tried]
            if flaw(alone) is None:
                return f'{found}; set `system_prompt: ""` (of an SFT, where its rows are made)'
            return f"{found}; {_BY_FILE}"
        turn = _turn(render, template, tried, tags_of(transcript).all[:2], tokenizer.eos_token)
        return f"{turn}; {_BY_FILE}" if isinstance(turn, str) else turn

    turn = _bounded(fit, name)
    if isinstance(turn, str):
        raise InputError(f"{name}: the chat template {turn}")
    return turn


def _with_defaults(template: str, options: dict[str, Any], name: str) -> str:
    """Return a template whose variables have the values of `options`, unless they are given."""
    if not isinstance(options, dict):
        example = "a mapping such as {enable_thinking: false}"
        raise InputError(f"chat_template_kwargs: expected {example}, found {options!r:.80}")
    for key, value in options.items():
        if key in _SET:
            raise InputError(f"chat_template_kwargs: {key} is set for each prompt; leave it out")
        if not re.search(rf"\b{re.escape(key)}\b", template):
            raise InputError(f"chat_template_kwargs: {name} has no {key!r} in its chat template")
        if not key.isidentifier() or not isinstance(value, str | int | float):
            raise InputError(f"chat_template_kwargs: {key}: expected text, a number or true/false")
        said = (
            f"{{% if {key} is not defined %}}{{% set {key} = {json.dumps(value)} %}}{{% endif %}}"
        )
        template = template if template.startswith(said) else _after(said, template)
    return template


def _after(head: str, template: str) -> str:
    """Join a tag and a template; a template's first line break would be taken for the tag's."""
    return head + "\n" * template.startswith("\n") + template


def _survives(tokenizer: Any, preset: str) -> bool:
    """Return whether a transcript is the same one after tokenising and decoding it."""
    text = write("1 + 1 = 2", "2", preset)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read(tokenizer.decode(ids, skip_special_tokens=True), preset) == read(text, preset)


def _flaw(render: Callable[..., str], prompt: list[Message]) -> str | None:
    """Return how a chat template changes a prompt; None when it does not."""
    try:
        before = render(prompt, add_generation_prompt=True)
        render([*prompt, {"role": "assistant", "content": _ANSWER}])
    except Exception as error:  # a template is a program, and may raise anything
        roles = " and ".join(turn["role"] for turn in prompt)
        return f"fails after {roles}: {first_line(error.__cause__ or error).rstrip('.')}"
    for turn in prompt:
        if turn["role"] in ("system", "user") and turn["content"].strip() not in before:
            return f"changes the {turn['role']} turn, or leaves it out"
    return None


def _turn(
    render: Callable[..., str],
    template: str,
    prompts: list[list[Message]],
    reasoning: tuple[str, ...],
    eos_token: str | None,
) -> Turn | str:
    """Return how an assistant's turn is written, or what the template lacks.

    Reasoning that a prompt opens is cut off it, as is an empty one in the transcript's tags. What a
    template writes between a prompt and the text belongs to the prompt (gpt-oss names a channel),
    unless it is reasoning again.
    """
    old = functools.partial(render, chat_template=template)
    before = old(prompts[0], add_generation_prompt=True)
    written = old([*prompts[0], {"role": "assistant", "content": _ANSWER}])
    head, found, end = written.rpartition(_ANSWER)
    if not found:
        return "leaves the assistant's text out"
    if _END.sub("", end) or any(tag in end for tag in ALL_TAGS):
        return f"adds {end!r:.60} to the assistant's text"
    end = end if end.strip() else eos_token or ""
    if not end:
        return "writes nothing that ends the assistant's turn"
    one, two = map(re.escape, reasoning)
    opened = re.search(rf"(?:{one}\s*{two}|{_OPENS})\s*\Z", before)
    cut = opened[0] if opened else ""
    lead = head.removeprefix(before.removesuffix(cut))
    lead = "" if lead == head else lead
    header = lead if re.sub(rf"{'|'.join(map(re.escape, ALL_TAGS))}|\s", "", lead) else ""
    new = _wrapped(template, cut, header) if cut or header else template
    for prompt in prompts:
        before = old(prompt, add_generation_prompt=True)
        after = render(prompt, chat_template=new, add_generation_prompt=True)
        if not before.endswith(cut) or after != before.removesuffix(cut) + header:
            return f"writes {before[-40:]!r} before the completion, in a way of its own"
    return Turn(new, "" if lead.strip() else lead, end)


def _wrapped(template: str, cut: str, header: str) -> str:
    """Return a template whose prompts end with `header` where the given one's end with `cut`."""
    cut_off = f"written[:(written | length) - {len(cut)}] + {json.dumps(header)}"
    return (
        _after("{% set written %}", template.removesuffix("\n")) + "{% endset %}"
        f"{{% if add_generation_prompt and written.endswith({json.dumps(cut)}) %}}"
        f"{{{{ {cut_off} }}}}{{% else %}}{{{{ written }}}}{{% endif %}}"
    )


def _bounded(work: Callable[[], Turn | str], name: str) -> Turn | str:
    """Return what `work` returns, from a child process with limits of time and memory.

    A template may loop without end or ask for all memory, and only a process can be stopped.
    """
    import transformers.utils.chat_template_utils  # noqa: F401  # its cost is not the template's

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(work, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if receiver.poll(_WALL_SECONDS):
            return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        pass
    finally:
        child.kill()
        child.join()
    raise InputError(
        f"{name}: the chat template was stopped: it took more than {_CPU_SECONDS} s or "
        f"{_MEMORY >> 30} GiB to write one conversation"
    )


def _limited(work: Callable[[], Turn | str], sender: Any) -> None:
    """Send what `work` returns, within limits that a template cannot lift."""
    import resource

    import psutil

    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    most = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sender.send(work())


def check_end(tokenizer: Any, row: Row, model: str, eos_token: str | None = None) -> None:
    """Raise `InputError` unless the end of a turn, as SFT trains it, is where generation stops."""
    from chainforge.generate.settings import ends_of

    folder = Path(tokenizer.name_or_path)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{folder} has no tokenizer_config.json: transformers would guess it")
    turns = [*row["prompt"], *row["completion"]]
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    last = next(one for one in reversed(ids) if tokenizer.decode([one]).strip())
    stops = {tokenizer.convert_tokens_to_ids(eos_token or tokenizer.eos_token)}
    stops |= ends_of(model, local_files_only=True)
    if last in stops:
        said = turns[-1]["content"]
        end = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)[2]
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        if left := tokenizer.decode(ids, skip_special_tokens=True).strip():
            raise InputError(
                f"a turn ends with {end!r}, and {left!r} is text to this tokenizer: completions "
                f"would end with it; {_BY_FILE}"
            )
        return
    word, shown = tokenizer.decode([last]), ", ".join(repr(tokenizer.decode([i])) for i in stops)
    advice = f"use a chat template that writes {tokenizer.eos_token} after the assistant's text"
    if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder:
        advice = f"set `eos_token: {word}` in the SFT stage"
    raise InputError(
        f"a turn ends with {word!r}, and generation stops at {shown}: no completion would end; "
        f"{advice}"
    )


def check_rows(
    rows: Any, tokenizer: Any, max_length: int | None = None, column: str = "completion"
) -> None:
    """Raise `InputError` for rows of SFT whose prompts the template changes, or that do not fit.

    `rows` has conversational columns, `prompt` and `column`; `max_length` is in tokens, and TRL
    cuts or drops longer rows in silence. Rows of the same roles and marks are checked by one of
    them. No token is shorter than a byte, so only rows of more bytes are tokenised.
    """
    checked, limit = set(), max_length or sys.maxsize
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    long: dict[int, int] = {}  # tokens by row
    pairs = zip(_column(rows, "prompt"), _column(rows, column), strict=True)
    for number, (prompt, done) in enumerate(pairs):
        kind = tuple(
            (turn["role"], *sorted(set(_MARK.findall(turn["content"])))) for turn in prompt
        )
        if kind not in checked and (flaw := _flaw(render, prompt)):
            raise InputError(
                f"row {number} of the data: the chat template {flaw}; leave the row out, or "
                f"{_BY_FILE}"
            )
        checked.add(kind)
        size = sum(len(turn["content"].encode("utf-8", "replace")) for turn in [*prompt, *done])
        if size + _OVERHEAD > limit:
            ids = tokenizer.apply_chat_template([*prompt, *done], return_dict=True)["input_ids"]
            long |= {number: len(ids)} if len(ids) > limit else {}
    if long:
        raise InputError(
            f"max_length: {len(long)} of {len(rows)} rows have more than {max_length} tokens "
            f"(the first is row {min(long)}, the longest has {max(long.values())}) and would be "
            "cut; raise max_length, or drop them when the rows are made"
        )


def _column(rows: Any, name: str) -> Iterator[Any]:
    """Yield a column of rows; of a data set in batches, which is much faster than row by row."""
    if hasattr(rows, "iter"):
        for batch in rows.select_columns(name).iter(1000):
            yield from batch[name]
    else:
        yield from (row[name] for row in rows)


def shield(tokenizer: Any, turn: Turn | None = None) -> Any:
    """Make a tokenizer's `apply_chat_template` read special tokens within messages as text.

    The tokens still spell the same text. With `turn` an assistant's turn at the end of a
    conversation is written by it. A template that fails on a conversation raises `InputError`.
    Returns the tokenizer itself.
    """
    longest = sorted(special_ids(tokenizer).values(), key=len, reverse=True)
    marks = "|".join(re.escape(mark) for mark in longest) or "(?!)"
    # The first character of each, also of one that begins within another.
    begins = re.compile(f"(?s)(?=(?:{marks})).")
    tokenizer.apply_chat_template = functools.partial(_apply, tokenizer, begins, turn)
    return tokenizer


def _apply(
    tokenizer: Any, begins: re.Pattern[str], turn: Turn | None, conversation: Any, **options: Any
) -> Any:
    """Do what `apply_chat_template` does, with a cut in every special token within a message."""

    def cut(value: Any) -> Any:
        return begins.sub(lambda found: found[0] + _CUT, value) if isinstance(value, str) else value

    many = bool(conversation) and isinstance(conversation[0], list)
    each = conversation if many else [conversation]
    shown = [[{key: cut(value) for key, value in one.items()} for one in turns] for turns in each]
    as_text = not options.get("tokenize", True)
    if options.get("add_generation_prompt") or options.get("continue_final_message"):
        turn = None
    ends = [turn is not None and _is_answered(turns) for turns in each]
    if not any(ends) and (as_text or shown == each):
        return _plain(tokenizer, conversation, **options)
    masked = options.get("return_assistant_tokens_mask")
    if options.get("padding") or (masked and not all(ends)):
        raise InputError(
            "a message contains a special token of the tokenizer; leave the row out "
            "(assistant_only_loss and padded batches cannot treat it as text)"
        )
    written = [_written(tokenizer, turn, turns, options) for turns in (each if as_text else shown)]
    if as_text:
        texts = ["".join(parts) for parts in written]
        return texts if many else texts[0]
    made = [_encoded(tokenizer, *parts) for parts in written]
    columns = {"input_ids": [ids for ids, _ in made]}
    if not options.get("return_dict", True):
        return columns["input_ids"] if many else made[0][0]
    columns["attention_mask"] = [[1] * len(ids) for ids, _ in made]
    if masked:
        columns["assistant_masks"] = [[0] * n + [1] * (len(ids) - n) for ids, n in made]
    return columns if many else {name: values[0] for name, values in columns.items()}


def _is_answered(turns: list[Message]) -> bool:
    return len(turns) > 1 and turns[-1]["role"] == "assistant"


def _written(
    tokenizer: Any, turn: Turn | None, turns: list[Message], options: dict[str, Any]
) -> tuple[str, str]:
    """Return a conversation as two texts: all before the answer, and the answer with its end."""
    options = options | {"tokenize": False, "return_assistant_tokens_mask": False}
    if turn is None or not _is_answered(turns):
        return _plain(tokenizer, turns, **options), ""
    prompt = _plain(tokenizer, turns[:-1], **options | {"add_generation_prompt": True})
    return prompt, turn.lead + turns[-1]["content"] + turn.end


def _encoded(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the tokens of two texts, and how many are the first one's, as it has them alone."""

    def encode(text: str) -> list[int]:  # two texts in one call would take twice as long
        pieces = tokenizer(text.split(_CUT), add_special_tokens=False)["input_ids"]
        return [one for piece in pieces for one in piece]

    start, ids = encode(prompt), encode(prompt + answer)
    if ids[: len(start)] != start:  # a token across the boundary is none that can be sampled
        ids = start + encode(answer)
    return ids, len(start)


def _plain(tokenizer: Any, conversation: Any, **options: Any) -> Any:
    """Do what `apply_chat_template` does; raise `InputError` where the template fails."""
    try:
        return type(tokenizer).apply_chat_template(tokenizer, conversation, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the chat template fails: {first_line(error)}") from error
