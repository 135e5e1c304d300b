"""Load tokenizers, and check what their chat templates make of transcripts, prompts and rows.

A tokenizer reads the text that a chat template wrote, and cannot tell the template's `<|im_end|>`
from one that a user or a teacher wrote. A shielded tokenizer gets the latter in two pieces.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import DEFAULT, PRESETS, read, special_ids, tags_of, write

logger = logging.getLogger(__name__)

_OVERHEAD = 256  # bytes that a template may add to a short conversation
# A chat template is a program from the Hub: what it may use of this machine to write a few turns.
_CPU_SECONDS, _WALL_SECONDS, _MEMORY = 10, 300, 2 << 30

# What a template may change is found in it: line breaks, HTML, JSON, Jinja, LaTeX, other scripts.
_REASONING = 'Let $x^2 = 4$ & y < 3:\n\n1. "\u03a9" \u2192 x = 2\n\n  2. {{x}} isn\'t \\frac{1}{2}'
_QUESTION: list[Message] = [{"role": "user", "content": "1 + 1 ="}]
# The assistant's text is followed by what ends the turn: marks, and no words.
_END = re.compile(r"<[^<>\n]{1,60}>|\[/?[A-Z_]+\]|\s")
_TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))
_BY_FILE = "set chat_template_path to a .jinja file that writes the messages as they are"
# Texts that a template may treat in a way of their own: tags, and what turns thinking on or off.
_MARK = re.compile(r"<[^<>\s]{1,40}>|/(?:no_)?think")
_CUT = "\ufdd0"  # a noncharacter of Unicode: no text has it, and templates leave it as it is


def load_tokenizer(
    reference: str,
    transcript: str = DEFAULT,
    *,
    template: str | None = None,
    rows: Iterable[Row] = (),
    template_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Load a tokenizer, shielded, and check that transcripts survive its chat template.

    `template` (`chat_template_path`) is a .jinja file, or a tokenizer whose template to use; `rows`
    have the prompts that will be sent, `template_options` are further arguments of the template,
    and `options` those of `from_pretrained`. Raises `InputError` when there is no template, or one
    that changes transcripts or refuses the prompts.
    """
    tokenizer = _open(reference, **options)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise InputError(f"{reference}: its tokenizer knows no text; is tokenizer.json missing?")
    if template and template.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path: {template}: {first_line(error)}") from None
    elif template:
        tokenizer.chat_template = _open(template).chat_template
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)  # TRL would take completions apart before rewards
    check_template(
        tokenizer, transcript, template or reference, _column(rows, "prompt"), template_options
    )
    return shield(tokenizer)


def _open(reference: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    options = {key: value for key, value in options.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(reference, **{"trust_remote_code": False} | options)
    except (OSError, ValueError) as error:
        raise InputError(f"{reference}: no tokenizer found: {first_line(error)}") from None


def check_template(
    tokenizer: Any,
    transcript: str,
    name: str,
    prompts: Iterable[list[Message]] = (),
    options: dict[str, Any] | None = None,
) -> None:
    """Raise `InputError` unless a transcript is the same after the chat template, and can be read.

    What SFT trains on is what follows the prompt, up to the end of the turn; what is sampled
    follows the same prompt. Of `prompts` the first of each order of roles is tried. `options` are
    further arguments of the template. The message names the setting to change.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; {_BY_FILE}")
    readable = [preset for preset in PRESETS if _survives(tokenizer, preset)]
    if transcript not in readable:
        tags = ", ".join(tags_of(transcript).all)
        raise InputError(
            f"{name}: the tags are lost in decoding ({tags}); add them as ordinary tokens"
        )
    shapes: dict[tuple[str, ...], list[Message]] = {}
    for turns in prompts:
        shapes.setdefault(tuple(turn["role"] for turn in turns), turns)
    tried = list(shapes.values()) or [_QUESTION]

    def flaw(preset: str, prompts: list[list[Message]] = tried) -> str | None:
        text = write(_REASONING, "2", preset)
        flaws = (_flaw(tokenizer, turns, text, options or {}) for turns in prompts)
        return next((found for found in flaws if found), None)

    def advice() -> str | None:
        if (found := flaw(transcript)) is None:
            return None
        alone = [[turn for turn in turns if turn["role"] != "system"] for turns in tried]
        if flaw(transcript, alone) is None:
            return f'{found}; set `system_prompt: ""` (of an SFT, where its rows are made)'
        fitting = (
            f"{found}; set `transcript: {preset}`" for preset in readable if not flaw(preset)
        )
        return next(fitting, f"{found}; no other preset of the transcript fits it; {_BY_FILE}")

    if found := _bounded(advice, name):
        raise InputError(f"{name}: the chat template {found}")


def _survives(tokenizer: Any, preset: str) -> bool:
    """Return whether a transcript is the same one after tokenising and decoding it."""
    text = write("1 + 1 = 2", "2", preset)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read(tokenizer.decode(ids, skip_special_tokens=True), preset) == read(text, preset)


def _flaw(tokenizer: Any, prompt: list[Message], text: str, options: dict[str, Any]) -> str | None:
    """Return how a chat template changes an assistant's text; None when it does not.

    The text must follow exactly what a completion is sampled after, and be followed only by what
    ends the turn.
    """
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **options)
    try:
        before = render(prompt, add_generation_prompt=True)
        written = render([*prompt, {"role": "assistant", "content": text}])
    except Exception as error:  # a template is a program, and may raise anything
        roles = " and ".join(turn["role"] for turn in prompt)
        return f"fails after {roles}: {first_line(error.__cause__ or error)}"
    for turn in prompt:
        if turn["role"] in ("system", "user") and turn["content"].strip() not in before:
            return f"changes the {turn['role']} turn, or leaves it out"
    if not written.startswith(before):
        return "writes the prompt in another way once it is answered"
    rest, text = written[len(before) :].strip(), text.strip()
    if not rest.startswith(text):
        opened = next((tag for tag in _TAGS if before.rstrip().endswith(tag)), None)
        if opened and text.startswith(opened):
            return f"writes {opened} before the completion, so that no completion has it"
        return f"changes the assistant's text to {rest!r:.80}"
    end = rest[len(text) :]
    if _END.sub("", end) or any(tag in end for tag in _TAGS):
        return f"adds {end!r:.60} to the assistant's text"
    return None if end else "writes nothing that ends the assistant's turn"


def _bounded(work: Callable[[], str | None], name: str) -> str | None:
    """Return what `work` returns, from a child process with limits of time and memory.

    A template may loop without end or ask for all memory, and only a process can be stopped.
    """
    import transformers.utils.chat_template_utils  # noqa: F401  # not on the template's account

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


def _limited(work: Callable[[], str | None], sender: Any) -> None:
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
        return
    word, shown = tokenizer.decode([last]), ", ".join(repr(tokenizer.decode([i])) for i in stops)
    advice = f"use a chat template that writes {tokenizer.eos_token} after the assistant's text"
    if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder:
        advice = f"set `eos_token: {word}` in the SFT stage"
    raise InputError(
        f"a turn ends with {word!r}, and generation stops at {shown}: no completion would end; "
        f"{advice}"
    )


def check_rows(rows: Any, tokenizer: Any, max_length: int | None = None) -> None:
    """Raise `InputError` for rows of SFT that the chat template changes, or that do not fit.

    `rows` has conversational `prompt` and `completion` columns; `max_length` is in tokens, and TRL
    cuts or drops longer rows in silence. Rows of the same roles and marks are checked by one of
    them. No token is shorter than a byte, so only rows of more bytes are tokenised.
    """
    checked, limit = set(), max_length or sys.maxsize
    long: dict[int, int] = {}  # tokens by row
    for number, turns in enumerate(_conversations(rows)):
        kind = tuple((turn["role"], *sorted(set(_MARK.findall(turn["content"])))) for turn in turns)
        if kind not in checked and (flaw := _flaw(tokenizer, turns[:-1], turns[-1]["content"], {})):
            raise InputError(
                f"row {number} of the data: the chat template {flaw}; leave the row out, or "
                f"{_BY_FILE}"
            )
        checked.add(kind)
        if _size(turns) + _OVERHEAD > limit:
            ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
            long |= {number: len(ids)} if len(ids) > limit else {}
    if long:
        raise InputError(
            f"max_length: {len(long)} of {len(rows)} rows have more than {max_length} tokens "
            f"(the first is row {min(long)}, the longest has {max(long.values())}) and would be "
            "cut; raise max_length, or drop them when the rows are made"
        )


def _size(turns: list[Message]) -> int:
    return sum(len(turn["content"].encode("utf-8", "replace")) for turn in turns)


def _conversations(rows: Any) -> Iterator[list[Message]]:
    for prompt, done in zip(_column(rows, "prompt"), _column(rows, "completion"), strict=True):
        yield [*prompt, *done]


def _column(rows: Any, name: str) -> Iterator[Any]:
    """Yield a column of rows; of a data set in batches, which is much faster than row by row."""
    if hasattr(rows, "iter"):
        for batch in rows.select_columns(name).iter(1000):
            yield from batch[name]
    else:
        yield from (row[name] for row in rows)


def shield(tokenizer: Any) -> Any:
    """Make a tokenizer's `apply_chat_template` read special tokens within messages as text.

    The tokens still spell the same text. A template that fails on a conversation raises
    `InputError`. Returns the tokenizer itself.
    """
    longest = sorted(special_ids(tokenizer).values(), key=len, reverse=True)
    marks = "|".join(re.escape(mark) for mark in longest) or "(?!)"
    # The first character of each, also of one that begins within another.
    begins = re.compile(f"(?s)(?=(?:{marks})).")
    tokenizer.apply_chat_template = functools.partial(_apply, tokenizer, begins)
    return tokenizer


def _apply(tokenizer: Any, begins: re.Pattern[str], conversation: Any, **options: Any) -> Any:
    """Do what `apply_chat_template` does, with a cut in every special token within a message."""

    def cut(value: Any) -> Any:
        return begins.sub(lambda found: found[0] + _CUT, value) if isinstance(value, str) else value

    many = bool(conversation) and isinstance(conversation[0], list)
    each = conversation if many else [conversation]
    shown = [[{key: cut(value) for key, value in turn.items()} for turn in turns] for turns in each]
    if shown == each or not options.get("tokenize", True):
        return _plain(tokenizer, conversation, **options)
    if options.get("padding") or options.get("return_assistant_tokens_mask"):
        raise InputError(
            "a message contains a special token of the tokenizer; leave the row out "
            "(assistant_only_loss and padded batches cannot take it for text)"
        )
    ids = []
    for turns in shown:
        pieces = _plain(tokenizer, turns, **options | {"tokenize": False}).split(_CUT)
        made = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        ids.append([one for part in made for one in part])
    masks = [[1] * len(one) for one in ids]
    if not options.get("return_dict", True):
        return ids if many else ids[0]
    return {"input_ids": ids if many else ids[0], "attention_mask": masks if many else masks[0]}


def _plain(tokenizer: Any, conversation: Any, **options: Any) -> Any:
    """Do what `apply_chat_template` does; raise `InputError` where the template fails."""
    try:
        return type(tokenizer).apply_chat_template(tokenizer, conversation, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the chat template fails: {first_line(error)}") from error
