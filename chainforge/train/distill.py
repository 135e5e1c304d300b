"""Distil between models of one tokenizer whose embeddings are padded to different sizes.

Qwen2.5-7B has 152064 rows of embeddings and Qwen2.5-1.5B has 151936, but their tokenizers agree on
151665 tokens; the rows above mean nothing. TRL compares the padded sizes and refuses.

The loss compares two distributions over the same ids, so the teacher is given the student's size,
in memory and never on disk:

* A larger teacher loses the rows that the student does not have. Its probabilities are those of the
  shared ids, normalised again. From there on the loss is TRL's own, as for two models of one size.
* A smaller teacher gets rows that can have no probability, and the student's ids beyond the
  teacher's are masked in the same way, in the loss and when it writes, as long as it trains: they
  would otherwise cost the student an infinite divergence. Both are normalised over the shared ids.

No row of the student is added, removed or changed by this, and neither model is written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.weights import check_weights
from chainforge.generate.settings import ends_of
from chainforge.train.distributed import Layout, layout_here
from chainforge.train.model_source import Source
from chainforge.train.policy import check_options
from chainforge.train.templates import load_tokenizer

logger = logging.getLogger(__name__)

# Added to a logit, this leaves it a probability of exactly 0 in float32, and the divergence finite.
_MASKED = -1.0e4
# Text that tokenizers of one vocabulary but other rules cut differently.
_PROBE = "12345 + 6.78 = 12351.78\n\tdef f(x):  # naïve café\r\n\n  I'LL 第三 \u0301e don't"
_BY_TRACES = (
    "distil by traces instead (recipes/reject.py on the teacher, recipes/sft.py on the student)"
)


@dataclass(frozen=True)
class Sizes:
    """How many rows each model's embeddings have, and how many of them are tokens."""

    tokens: int
    student: int
    teacher: int

    def check(self, layout: Layout | None = None) -> None:
        """Raise `InputError` when a token has no row, or the layout cannot mask ids."""
        for name, rows in (("student", self.student), ("teacher", self.teacher)):
            if rows < self.tokens:
                raise InputError(
                    f"the {name} has embeddings for {rows} ids, but the tokenizer knows "
                    f"{self.tokens}; give it the tokenizer that it was trained with"
                )
        layout = layout or layout_here()
        if self.student > self.teacher and layout.shards_weights:
            raise InputError(
                f"the student has {self.student} rows of embeddings and the teacher "
                f"{self.teacher}: a student that is padded further than its teacher cannot be "
                f"distilled by logits with its head sharded ({layout.kind}); launch with ddp or "
                f"zero2, or {_BY_TRACES}"
            )


def differences(student: Any, teacher: Any, teacher_ends: Collection[int] = ()) -> Iterator[str]:
    """Return what keeps two tokenizers from meaning the same, and what to do; nothing when they do.

    `teacher_ends` are the ids at which the teacher's generation config ends, beside its
    tokenizer's own.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        apart = sorted({token for token, _ in mine.items() ^ theirs.items()})
        shown = ", ".join([*map(repr, apart[:3]), *(["..."] if len(apart) > 3 else [])])
        yield (
            f"teacher and student differ in {len(apart)} tokens ({shown}): distillation by "
            "logits needs one tokenizer. Take a student or a teacher of the same family and "
            f"version, or {_BY_TRACES}"
        )
        return
    if student.tokenize(_PROBE) != teacher.tokenize(_PROBE):
        yield (
            "teacher and student know the same tokens but cut text into different ones: the "
            "teacher would score sequences that it never meets. Give both the same "
            f"tokenizer.json, or {_BY_TRACES}"
        )
    if student.eos_token_id not in {teacher.eos_token_id, *teacher_ends}:
        yield (
            f"the student ends with {student.eos_token!r} and the teacher with "
            f"{teacher.eos_token!r}: it would teach the student never to end. Set the same "
            "eos_token in both tokenizers, the one that the chat template ends a turn with"
        )


def check_teacher(
    tokenizer: Any, student: Source, training: Any, transcript: str, template: str | None = None
) -> Sizes:
    """Return how both models are padded; only tokenizers and configurations are read.

    Raises `InputError` unless the teacher has the student's `tokenizer`, and sizes that can be
    brought together.
    """
    teacher, options = training.teacher_model_name_or_path, _teacher_options(training)
    theirs = load_tokenizer(teacher, transcript, template=template, **options)
    ends = ends_of(teacher, revision=options["revision"])
    for difference in differences(tokenizer, theirs, ends):
        raise InputError(difference)
    trust = options["trust_remote_code"]
    sizes = Sizes(
        tokens=tokens_of(tokenizer),
        student=rows_of(student.model, revision=student.revision, trust_remote_code=trust),
        teacher=rows_of(teacher, **options),
    )
    sizes.check()
    return sizes


def tokens_of(tokenizer: Any) -> int:
    """Return how many ids a tokenizer can write."""
    return 1 + max(int(number) for number in tokenizer.get_vocab().values())


def rows_of(reference: str, **options: Any) -> int:
    """Return how many rows a model's embeddings have, by its config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(reference, **options)
    return int(config.get_text_config().vocab_size)


def open_teacher(training: Any, model_args: Any, sizes: Sizes) -> Any:
    """Return the teacher as a `DistillationTrainer` takes it: a path, or a model brought to size.

    The teacher keeps the precision that it was saved in, unless `teacher_model_init_kwargs` has a
    `dtype`; it is never trained.
    """
    from transformers import AutoModelForCausalLM

    reference = training.teacher_model_name_or_path
    check_options("teacher_model_init_kwargs", training.teacher_model_init_kwargs)
    check_weights(reference, training.teacher_model_revision)
    options = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": "auto",
        "use_safetensors": True,
        **_teacher_options(training),
        **(training.teacher_model_init_kwargs or {}),
    }
    if sizes.student == sizes.teacher:
        training.teacher_model_init_kwargs = options
        return reference
    training.teacher_model_init_kwargs = None  # TRL wants none beside a model
    teacher = AutoModelForCausalLM.from_pretrained(reference, **options)
    # The rows that a smaller teacher gets are masked below: their values are never looked at.
    teacher.resize_token_embeddings(sizes.student, mean_resizing=False)
    logger.info(
        "teacher: %d rows of embeddings in memory instead of %d, as the student has them; %d are "
        "tokens", sizes.student, sizes.teacher, sizes.tokens)  # fmt: skip
    return teacher


def mask_unshared_ids(trainer: Any, sizes: Sizes) -> None:
    """Take all probability from the ids that only the student has, in both models of a trainer.

    Each head gets a bias for it that is never saved.
    """
    import torch

    if sizes.student <= sizes.teacher:
        return
    for model in (trainer.model, trainer.teacher_model):
        head = trainer.accelerator.unwrap_model(model).get_output_embeddings()
        if head.bias is not None:
            raise InputError(
                "a student that is padded further than its teacher cannot be distilled by logits "
                f"when a head has a bias of its own; {_BY_TRACES}"
            )
        bias = torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
        bias[sizes.teacher :] = _MASKED
        del head._parameters["bias"]
        head.register_buffer("bias", bias, persistent=False)


def _teacher_options(training: Any) -> dict[str, Any]:
    """Return the options with which everything of the teacher is opened."""
    return {
        "revision": training.teacher_model_revision or "main",
        "trust_remote_code": bool(training.trust_remote_code),
    }
