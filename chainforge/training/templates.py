"""See that a tokenizer leaves transcripts, rows and tokens as they are."""

from __future__ import annotations

import heapq
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.transcript import DEFAULT, read, tags_of, write

_LONGEST = 64  # rows that are tokenised before TRL does it


def load_tokenizer(reference: str, transcript: str = DEFAULT, **options: Any) -> Any:
    """Load a tokenizer and prove that transcripts survive its chat template.

    Raises `InputError` when the template is missing, eats, doubles or pre-fills the tags.
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
    check_template(tokenizer, transcript, reference)
    return tokenizer


def check_template(tokenizer: Any, transcript: str, name: str) -> None:
    """Send a transcript through the chat template and back; raise `InputError` if it changed."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{name}: the tokenizer has no chat template; set chat_template_path")
    prompt = [{"role": "user", "content": "1 + 1 ="}]
    text = write("1 + 1 = 2", "2", transcript)
    turn = {"role": "assistant", "content": text}
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, turn], tokenize=False)
    for tag in tags_of(transcript).all:
        if before.count(tag):
            raise InputError(f"{name}: the chat template itself writes {tag} before the completion")
        if whole.count(tag) != 1:
            raise InputError(
                f"{name}: the chat template keeps {tag} {whole.count(tag)} times, not once; "
                "use a template that leaves the assistant's text as it is"
            )
    if not whole.startswith(before):
        raise InputError(
            f"{name}: the chat template renders a prompt otherwise once it is answered"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if read(decoded, transcript) != read(text, transcript):
        raise InputError(
            f"{name}: the tags are lost in decoding ({decoded!r}); "
            "add them as ordinary tokens, not as special ones"
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
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [len(one) for one in ids]


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
