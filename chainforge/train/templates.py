"""See that a tokenizer leaves transcripts, rows and tokens as they are."""

from __future__ import annotations

import functools
import heapq
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import DEFAULT, PRESETS, read, special_ids, tags_of, write
from chainforge.train.shield import shield

_LONGEST = 64  # rows that are tokenised before TRL does it
_SHAPES = 32  # prompts of different roles that are tried
# A chat template is a program from the Hub: what it may use of this machine to write a few turns.
_CPU_SECONDS, _WALL_SECONDS, _MEMORY = 10, 300, 2 << 30

# What a template may change is found in it: line breaks, HTML, JSON, Jinja, LaTeX, other scripts.
_REASONING = 'Let $x^2 = 4$ & y < 3:\n\n1. "\u03a9" \u2192 x = 2\n\n  2. {{x}} isn\'t \\frac{1}{2}'
_ANSWER = "2"
_QUESTION: list[Message] = [{"role": "user", "content": "1 + 1 ="}]
# After the assistant's text stands what ends the turn: marks, and no words.
_END = re.compile(r"<[^<>\n]{1,60}>|\[/?[A-Z_]+\]|\s")
_TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))


def load_tokenizer(
    reference: str,
    transcript: str = DEFAULT,
    *,
    template: str | None = None,
    rows: Iterable[Row] = (),
    template_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Load a tokenizer and prove that transcripts survive its chat template.

    `template` (`chat_template_path`) names a template to use instead of the tokenizer's own, `rows`
    have the prompts that will be sent, `template_options` are what the template is given beside
    them. Messages cannot become special tokens of the tokenizer (`shield`). Raises `InputError`
    when there is no template, or one that changes transcripts or refuses the prompts.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference, **{"trust_remote_code": False} | options
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{reference}: no tokenizer could be loaded: {first_line(error)}"
        ) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # made of nothing
        raise InputError(f"{reference}: its tokenizer knows no text; is tokenizer.json missing?")
    set_template(tokenizer, template)
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)  # TRL would take completions apart before rewards
    prompts = [row["prompt"] for row in rows]
    name = template or _home(reference)
    check_template(tokenizer, transcript, name, prompts, **(template_options or {}))
    return shield(tokenizer)


def _home(reference: str) -> str:
    """Return the file that holds a tokenizer's chat template, or else the tokenizer's name."""
    file = Path(reference) / "chat_template.jinja"
    return str(file) if file.is_file() else reference


def set_template(tokenizer: Any, path: str | None) -> None:
    """Give a tokenizer the chat template of a .jinja file, or of the tokenizer at a path or id.

    Raises `InputError` for what is neither, and for a template whose special tokens the tokenizer
    lacks.
    """
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path: {path}: {first_line(error)}") from None
        return
    from transformers import AutoTokenizer

    try:
        giver = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template_path: {path} is neither a .jinja file nor a tokenizer: "
            f"{first_line(error)}"
        ) from None
    marks = [mark for mark in special_ids(giver).values() if mark in str(giver.chat_template)]
    if lacking := [mark for mark in marks if mark not in tokenizer.get_vocab()]:
        raise InputError(
            f"chat_template_path: {path} writes {', '.join(lacking)}, which the tokenizer does not "
            "have; give a .jinja file that writes the tokenizer's own tokens"
        )
    tokenizer.chat_template = giver.chat_template


def check_template(
    tokenizer: Any,
    transcript: str,
    name: str,
    prompts: Iterable[list[Message]] = (),
    **options: Any,
) -> None:
    """Raise `InputError` unless a transcript is the same after the chat template, and can be read.

    What SFT trains on is what follows the prompt, up to the end of the turn; what is sampled
    follows the same prompt. `prompts` are those that will be sent: of each order of roles the first
    is tried. `options` are further arguments of the template. The message says what to set instead.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{name}: the tokenizer has no chat template; set chat_template_path to a .jinja file "
            "(the cold start's model carries it on to the later stages)"
        )
    readable = [preset for preset in PRESETS if _survives(tokenizer, preset)]
    if transcript not in readable:
        tags = ", ".join(tags_of(transcript).all)
        raise InputError(
            f"{name}: the tags are lost in decoding ({tags}); add them as ordinary tokens, not as "
            "special ones"
        )
    shapes = {tuple(turn["role"] for turn in turns): turns for turns in reversed(list(prompts))}
    tried = list(shapes.values())[-_SHAPES:] or [_QUESTION]
    others = [preset for preset in readable if preset != transcript]
    flaw = _bounded(tokenizer, lambda: _flaw(tokenizer, transcript, tried, others, options), name)
    if flaw:
        raise InputError(f"{name}: the chat template {flaw}")


def check_bounded(tokenizer: Any, name: str) -> None:
    """Raise `InputError` when the chat template takes too much to write one question."""
    if getattr(tokenizer, "chat_template", None):
        _bounded(tokenizer, lambda: _change(tokenizer, _QUESTION, _ANSWER, {}), name)


def _survives(tokenizer: Any, preset: str) -> bool:
    """Return whether a transcript is the same one after tokenising and decoding it."""
    text = write("1 + 1 = 2", "2", preset)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read(tokenizer.decode(ids, skip_special_tokens=True), preset) == read(text, preset)


def _flaw(
    tokenizer: Any,
    transcript: str,
    prompts: list[list[Message]],
    others: list[str],
    options: dict[str, Any],
) -> str | None:
    """Return what the chat template does wrong, and which setting helps; None when it is right."""

    def of(preset: str, system: bool) -> str | None:
        text = write(_REASONING, _ANSWER, preset)
        for turns in prompts:
            shown = turns if system or turns[0]["role"] != "system" else turns[1:]
            if found := _change(tokenizer, shown, text, options):
                return found
        return None

    found = of(transcript, True)
    if found is None:
        return None
    no_system = '`system_prompt: ""` (of an SFT, where its rows are made)'
    if of(transcript, False) is None:
        return f"{found}; set {no_system}"
    for preset in others:
        if of(preset, True) is None:
            return f"{found}; set `transcript: {preset}`"
    for preset in others:
        if of(preset, False) is None:
            return f"{found}; set `transcript: {preset}` and {no_system}"
    return (
        f"{found}, and no other preset of the transcript fits it; set chat_template_path to a "
        ".jinja file that writes the messages as they are"
    )


def _change(
    tokenizer: Any, prompt: list[Message], text: str, options: dict[str, Any]
) -> str | None:
    """Return what a chat template makes of an assistant's text; None when it leaves it as it is.

    What is before the text must be what a completion is sampled after, and behind it may only be
    what ends the turn.
    """
    whole = [*prompt, {"role": "assistant", "content": text}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **options)
    try:
        before, written = render(prompt, add_generation_prompt=True), render(whole)
    except Exception as error:  # a template is a program, and may raise anything
        roles = " and ".join(turn["role"] for turn in prompt)
        return f"fails after {roles}: {first_line(error.__cause__ or error)}"
    for turn in prompt:
        if turn["role"] in ("system", "user") and turn["content"].strip() not in before:
            return f"changes the {turn['role']} turn, or leaves it out"
    if not written.startswith(before):
        pairs = enumerate(zip(before, written, strict=False))
        shared = next((at for at, (one, other) in pairs if one != other), len(written))
        asked, answered = before[shared:], written[shared:]
        return f"ends the prompt with {asked!r:.60}, and once it is answered with {answered!r:.60}"
    rest, text = written[len(before) :].strip(), text.strip()
    if not rest.startswith(text):
        opened = next((tag for tag in _TAGS if before.rstrip().endswith(tag)), None)
        if opened and text.startswith(opened):
            return f"writes {opened} before the completion, so that no completion has it"
        return f"changes the assistant's text to {rest!r:.80}"
    end = rest[len(text) :]
    words = _END.sub("", end)
    if words:  # a tokenizer's own marks may look like words
        for mark in special_ids(tokenizer).values():
            words = words.replace(_END.sub("", mark), "")
    if words or any(tag in end for tag in _TAGS):
        return f"adds {end!r:.60} to the assistant's text"
    return None if end else "writes nothing that ends the assistant's turn"


def _bounded(tokenizer: Any, work: Callable[[], str | None], name: str) -> str | None:
    """Return what `work` returns, from a child process with limits of time and memory.

    A template may loop without end or ask for all memory, and only a process can be stopped.
    """
    # What rendering imports is not on the template's account.
    tokenizer.apply_chat_template(_QUESTION, chat_template="", tokenize=False)
    if not hasattr(os, "fork"):
        return work()
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
        receiver.close()
    raise InputError(
        f"{name}: the chat template was stopped: it took more than {_CPU_SECONDS} s or "
        f"{_MEMORY >> 30} GiB to write one conversation"
    )


def _limited(work: Callable[[], str | None], sender: Any) -> None:
    """Send what `work` returns, within limits that a template cannot lift."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sender.send(work())


def check_rows(rows: Any, tokenizer: Any, **options: Any) -> None:
    """Raise `InputError` for rows of SFT that the chat template changes, naming the first.

    `rows` as for `check_lengths`, `options` as for `check_template`.
    """
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    for number, (prompt, done) in enumerate(pairs):
        if flaw := _change(tokenizer, prompt, done[0]["content"], options):
            raise InputError(
                f"row {number} of the data: the chat template {flaw}; leave the row out, or set "
                "chat_template_path to a .jinja file that writes the messages as they are"
            )


def check_lengths(rows: Any, tokenizer: Any, max_length: int | None) -> None:
    """Raise `InputError` when rows do not fit: TRL would cut them, or drop them, in silence.

    `rows` has conversational `prompt` and `completion` columns; `max_length` is in tokens. Only the
    longest texts are looked at, before a model is loaded; `check_whole` sees the others.
    """
    if max_length is None:
        return
    sizes = [
        sum(len(turn["content"]) for turn in prompt + done)
        for prompt, done in zip(rows["prompt"], rows["completion"], strict=True)
    ]
    longest = heapq.nlargest(_LONGEST, range(len(sizes)), key=sizes.__getitem__)
    if max(lengths_of(rows.select(longest), tokenizer), default=0) > max_length:
        _refuse_long(rows, tokenizer, max_length)


def check_whole(trainer: Any, rows: Any) -> None:
    """Raise `InputError` when TRL has cut or dropped rows: a second look, at its own tokens.

    `rows` is what an SFTTrainer was given. A row that it cut is exactly `max_length` long.
    """
    import pyarrow.compute as compute

    limit, made = trainer.args.max_length, trainer.train_dataset
    if limit is None:
        return
    if len(made) == len(rows) and not trainer.args.packing:
        longest = compute.max(compute.list_value_length(made.data["input_ids"])).as_py()
        if longest < limit:
            return
    _refuse_long(rows, trainer.processing_class, limit)


def _refuse_long(rows: Any, tokenizer: Any, max_length: int) -> None:
    """Raise `InputError` that counts the rows of more than `max_length` tokens, if there are."""
    lengths = lengths_of(rows, tokenizer)
    if long := [index for index, length in enumerate(lengths) if length > max_length]:
        raise InputError(
            f"max_length: {len(long)} of {len(lengths)} rows have more than {max_length} tokens "
            f"(the first is row {long[0]}, the longest has {max(lengths)}) and would be cut; "
            "raise max_length, or drop them when the rows are made"
        )


def lengths_of(rows: Any, tokenizer: Any) -> list[int]:
    """Return how many tokens each row has; `rows` as for `check_lengths`."""
    conversations = [prompt + done for prompt, done in zip(rows["prompt"], rows["completion"])]
    if not conversations:
        return []
    made = tokenizer.apply_chat_template(conversations, return_dict=True)
    return [len(ids) for ids in made["input_ids"]]


def learnt(
    tokenizer: Any, row: Any, *, assistant_only: bool = False
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row of SFT, and which of them carry loss, as TRL's SFTTrainer has it.

    `row` has `prompt` and `completion` messages. With `assistant_only` (`assistant_only_loss`) TRL
    puts its own training template in the place of those that it knows.
    """
    from trl.chat_template_utils import get_training_chat_template
    from trl.data_utils import common_prefix_length

    template = get_training_chat_template(tokenizer) if assistant_only else None

    def tokens(turns: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=True, return_dict=True, **options
        )

    prompt = tokens(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokens(row["prompt"] + row["completion"], return_assistant_tokens_mask=assistant_only)
    ids = list(whole["input_ids"])
    start = common_prefix_length(prompt, ids)
    mask = whole["assistant_masks"] if assistant_only else [1] * len(ids)
    return ids, [place >= start and bool(bit) for place, bit in enumerate(mask)]
