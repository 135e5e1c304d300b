"""Chat templates and tokenizers that leave transcripts, rows and special tokens as they are.

A tokenizer reads the text that a chat template wrote, and cannot tell the template's `<|im_end|>`
from one that a user or a teacher wrote. A shielded tokenizer gets the latter in two pieces.
"""

from __future__ import annotations

import functools
import heapq
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import DEFAULT, PRESETS, read, special_ids, tags_of, write

_LONGEST = 16  # rows that are tokenised before a model is loaded
_SHAPES = 32  # prompts of different roles that are tried
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
# Unicode's noncharacters: no text has them, and templates leave them as they are.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def load_tokenizer(
    reference: str,
    transcript: str = DEFAULT,
    *,
    template: str | None = None,
    rows: Iterable[Row] = (),
    template_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Load a tokenizer and check that transcripts survive its chat template.

    `template` (`chat_template_path`) names a template to use instead of the tokenizer's own, `rows`
    have the prompts that will be sent, `template_options` are further arguments of the template,
    and `options` those of `from_pretrained`. The tokenizer is shielded. Raises `InputError` when
    there is no template, or one that changes transcripts or refuses the prompts.
    """
    tokenizer = _open(reference, f"{reference}: no tokenizer could be loaded", **options)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # made of nothing
        raise InputError(f"{reference}: its tokenizer knows no text; is tokenizer.json missing?")
    set_template(tokenizer, template)
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)  # TRL would take completions apart before rewards
    own = Path(reference) / "chat_template.jinja"
    name = template or (str(own) if own.is_file() else reference)
    prompts = (prompt for batch in _batches(rows, "prompt") for prompt in batch["prompt"])
    check_template(tokenizer, transcript, name, prompts, **(template_options or {}))
    return shield(tokenizer)


def _open(reference: str, failure: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    options = {key: value for key, value in options.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(reference, **{"trust_remote_code": False} | options)
    except (OSError, ValueError) as error:
        raise InputError(f"{failure}: {first_line(error)}") from None


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
    other = _open(path, f"chat_template_path: {path} is neither a .jinja file nor a tokenizer")
    marks = [mark for mark in special_ids(other).values() if mark in str(other.chat_template)]
    if lacking := [mark for mark in marks if mark not in tokenizer.get_vocab()]:
        raise InputError(
            f"chat_template_path: {path} writes {', '.join(lacking)}, which the tokenizer does not "
            "have; give a .jinja file that writes the tokenizer's own tokens"
        )
    tokenizer.chat_template = other.chat_template


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
    is tried. `options` are further arguments of the template. The message names the setting to
    change.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{name}: the tokenizer has no chat template; set chat_template_path to a .jinja file "
            "(the model of the cold start keeps it for the later stages)"
        )
    readable = [preset for preset in PRESETS if _survives(tokenizer, preset)]
    if transcript not in readable:
        tags = ", ".join(tags_of(transcript).all)
        raise InputError(
            f"{name}: the tags are lost in decoding ({tags}); add them as ordinary tokens, not as "
            "special ones"
        )
    shapes: dict[tuple[str, ...], list[Message]] = {}
    for turns in prompts:
        shapes.setdefault(tuple(turn["role"] for turn in turns), turns)
    tried = list(shapes.values())[:_SHAPES] or [_QUESTION]
    presets = [transcript, *(preset for preset in readable if preset != transcript)]
    if flaw := _bounded(tokenizer, lambda: _advice(tokenizer, presets, tried, options), name):
        raise InputError(f"{name}: the chat template {flaw}")


def _survives(tokenizer: Any, preset: str) -> bool:
    """Return whether a transcript is the same one after tokenising and decoding it."""
    text = write("1 + 1 = 2", "2", preset)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read(tokenizer.decode(ids, skip_special_tokens=True), preset) == read(text, preset)


def _advice(
    tokenizer: Any, presets: list[str], prompts: list[list[Message]], options: dict[str, Any]
) -> str | None:
    """Return what the template does to transcripts of the first preset, and which setting helps."""

    def flaw(preset: str, system: bool) -> str | None:
        text = write(_REASONING, "2", preset)
        for turns in prompts:
            shown = turns if system or turns[0]["role"] != "system" else turns[1:]
            if found := _flaw(tokenizer, shown, text, options):
                return found
        return None

    if (found := flaw(presets[0], True)) is None:
        return None
    choices = [(presets[0], False)]
    choices += [(preset, system) for system in (True, False) for preset in presets[1:]]
    for preset, system in choices:
        if flaw(preset, system) is None:
            settings = [] if preset == presets[0] else [f"`transcript: {preset}`"]
            settings += (
                [] if system else ['`system_prompt: ""` (of an SFT, where its rows are made)']
            )
            return f"{found}; set {' and '.join(settings)}"
    return f"{found}, and no other preset of the transcript fits it; {_BY_FILE}"


def _flaw(tokenizer: Any, prompt: list[Message], text: str, options: dict[str, Any]) -> str | None:
    """Return how a chat template changes an assistant's text; None when it does not.

    The text must follow exactly what a completion is sampled after, and be followed only by what
    ends the turn.
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
        pairs = enumerate(zip(before, written))
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
    if tokenizer.chat_template in _trusted_templates():
        return work()
    # What rendering imports is not on the template's account.
    tokenizer.apply_chat_template(_QUESTION, chat_template="", tokenize=False)
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


@functools.cache
def _trusted_templates() -> frozenset[str]:
    """Return the chat templates that TRL ships: they need no limits, and no process."""
    import trl

    files = (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    return frozenset(file.read_text(encoding="utf-8") for file in files)


def _limited(work: Callable[[], str | None], sender: Any) -> None:
    """Send what `work` returns, within limits that a template cannot lift."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sender.send(work())


def check_rows(rows: Any, tokenizer: Any, max_length: int | None = None) -> None:
    """Raise `InputError` for rows of SFT that the chat template changes, or that do not fit.

    `rows` has conversational `prompt` and `completion` columns; `max_length` is in tokens, and TRL
    cuts or drops longer rows in silence. Rows of the same roles and marks are checked by one of
    them, and only the longest texts are tokenised; `check_uncut` sees the others.
    """
    checked, sizes = set(), []
    for number, turns in enumerate(_conversations(rows)):
        sizes.append(sum(len(turn["content"]) for turn in turns))
        kind = tuple((turn["role"], *sorted(set(_MARK.findall(turn["content"])))) for turn in turns)
        if kind in checked:
            continue
        checked.add(kind)
        if flaw := _flaw(tokenizer, turns[:-1], turns[-1]["content"], {}):
            raise InputError(
                f"row {number} of the data: the chat template {flaw}; leave the row out, or "
                f"{_BY_FILE}"
            )
    if max_length is not None:
        longest = heapq.nlargest(_LONGEST, range(len(sizes)), key=sizes.__getitem__)
        if max(lengths_of(rows.select(longest), tokenizer), default=0) > max_length:
            _refuse_long(rows, tokenizer, max_length)


def check_uncut(trainer: Any, rows: Any) -> None:
    """Raise `InputError` when TRL has cut or dropped rows, by the tokens that it made.

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
    """Return how many tokens each row has; `rows` as for `check_rows`."""
    whole = list(_conversations(rows))
    made = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"] if whole else []
    return [len(ids) for ids in made]


def _conversations(rows: Any) -> Iterator[list[Message]]:
    for batch in _batches(rows, "prompt", "completion"):
        for prompt, done in zip(batch["prompt"], batch["completion"], strict=True):
            yield [*prompt, *done]


def _batches(rows: Any, *columns: str) -> Iterator[Mapping[str, Any]]:
    """Yield columns of a data set in batches, which is much faster than row by row."""
    if hasattr(rows, "iter"):
        yield from rows.select_columns(list(columns)).iter(1000)
    elif isinstance(rows, Mapping):
        yield rows
    else:
        yield from ({column: [row[column]] for column in columns} for row in rows)


def shield(tokenizer: Any) -> Any:
    """Make a tokenizer's `apply_chat_template` read special tokens within messages as text.

    The tokens still spell the same text. A template that fails on a conversation raises
    `InputError`. Returns the tokenizer itself.
    """
    if not isinstance(tokenizer.apply_chat_template, functools.partial):
        longest = sorted(special_ids(tokenizer).values(), key=len, reverse=True)
        marks = re.compile("|".join(re.escape(mark) for mark in longest) or "(?!)")
        tokenizer.apply_chat_template = functools.partial(_apply, tokenizer, marks)
    return tokenizer


def _apply(
    tokenizer: Any, marks: re.Pattern[str], conversation: Any, *args: Any, **options: Any
) -> Any:
    """Do what `apply_chat_template` does, with a cut in every special token within a message."""
    plain = functools.partial(_plain, tokenizer)
    many = bool(conversation) and isinstance(conversation[0], list)
    each = conversation if many else [conversation]
    if not options.get("tokenize", True) or not any(_found(turns, marks) for turns in each):
        return plain(conversation, *args, **options)
    if args or options.get("padding") or options.get("return_assistant_tokens_mask"):
        mark = next(found for turns in each if (found := _found(turns, marks)))
        raise InputError(
            f"a message contains {mark}, which is a special token of the tokenizer: leave the row "
            "out (assistant_only_loss and padded batches cannot take it for text)"
        )
    made = [_encode(tokenizer, plain, marks, turns, options) for turns in each]
    ids = made if many else made[0]
    if not options.get("return_dict", True):
        return ids
    masks = [[1] * len(one) for one in made]
    return {"input_ids": ids, "attention_mask": masks if many else masks[0]}


def _plain(tokenizer: Any, *args: Any, **options: Any) -> Any:
    """Do what `apply_chat_template` does; raise `InputError` where the template fails."""
    try:
        return type(tokenizer).apply_chat_template(tokenizer, *args, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the chat template fails: {first_line(error)}") from error


def _encode(
    tokenizer: Any, plain: Any, marks: Any, turns: Any, options: dict[str, Any]
) -> list[int]:
    """Return the tokens of one conversation, none of them special that a message spells."""
    whole = str(turns)
    cut = next(character for character in _CUTS if character not in whole)
    # The first character of each, also of one that begins within another.
    begins = re.compile(f"(?s)(?=(?:{marks.pattern})).")

    def divided(text: Any) -> Any:
        return begins.sub(lambda found: found[0] + cut, text) if isinstance(text, str) else text

    shown = [{key: divided(value) for key, value in turn.items()} for turn in turns]
    rendering = {"tokenize", "return_dict", "return_tensors", "tokenizer_kwargs"}
    asked = {key: value for key, value in options.items() if key not in rendering}
    first, *others = plain(shown, tokenize=False, **asked).split(cut)
    ids = _ids(tokenizer, first)
    # SentencePiece would put a blank before what continues a text.
    before = _ids(tokenizer, "\n")
    for piece in others:
        longer = _ids(tokenizer, f"\n{piece}")
        continued = longer[: len(before)] == before
        ids += longer[len(before) :] if continued else _ids(tokenizer, piece)
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _found(turns: Any, marks: re.Pattern[str]) -> str | None:
    """Return the first special token within a conversation's messages."""
    texts = (text for turn in turns for text in turn.values() if isinstance(text, str))
    return next((found[0] for text in texts if (found := marks.search(text))), None)
