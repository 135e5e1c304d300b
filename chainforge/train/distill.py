"""Distil between models of one tokenizer whose embeddings are padded to different sizes.

Qwen2.5-7B has 152064 rows of embeddings and Qwen2.5-1.5B has 151936, but their tokenizers agree on
151665 tokens; the rows above mean nothing. TRL compares the padded sizes and refuses.

The loss compares two distributions over the same ids, so a larger teacher loses the rows that the
student does not have, in memory and never on disk. Its probabilities are those of the shared ids,
normalised again; from there on the loss is TRL's own. No row of the student changes by this.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.weights import check_weights
from chainforge.generate.settings import ends_of
from chainforge.train.model_source import Source
from chainforge.train.policy import check_options
from chainforge.train.templates import open_tokenizer

logger = logging.getLogger(__name__)

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

    def check(self) -> None:
        """Raise `InputError` when a token has no row, or the student is padded further."""
        for name, rows in (("student", self.student), ("teacher", self.teacher)):
            if rows < self.tokens:
                raise InputError(
                    f"the {name} has embeddings for {rows} ids, but the tokenizer knows "
                    f"{self.tokens}; give it the tokenizer that it was trained with"
                )
        if self.student > self.teacher:
            raise InputError(
                f"the student has {self.student} rows of embeddings and the teacher only "
                f"{self.teacher}: {_BY_TRACES}"
            )


def differences(student: Any, teacher: Any, teacher_ends: Collection[int] = ()) -> str | None:
    """Return why two tokenizers are not equivalent; None when they are.

    `teacher_ends` are the ids at which the teacher's generation config ends, beside its
    tokenizer's own.
    """
    apart = {token for token, _ in student.get_vocab().items() ^ teacher.get_vocab().items()}
    if apart:
        return (
            f"teacher and student differ in {len(apart)} tokens (such as {min(apart)!r}); take "
            f"models of the same family and version, or {_BY_TRACES}"
        )
    if student.tokenize(_PROBE) != teacher.tokenize(_PROBE):
        return (
            "teacher and student know the same tokens but cut text into different ones; give both "
            f"the same tokenizer.json, or {_BY_TRACES}"
        )
    if student.eos_token_id not in {teacher.eos_token_id, *teacher_ends}:
        return (
            f"the student ends with {student.eos_token!r} and the teacher with "
            f"{teacher.eos_token!r}: set the eos_token that the chat template writes in both"
        )
    return None


def check_teacher(tokenizer: Any, student: Source, training: Any) -> Sizes:
    """Return how both models are padded; only tokenizers and configurations are read.

    Raises `InputError` unless the teacher has the student's `tokenizer`, and sizes that can be
    brought together. Its chat template does not matter: it reads what the student writes.
    """
    from transformers import AutoConfig

    teacher, options = training.teacher_model_name_or_path, _teacher_options(training)
    theirs = open_tokenizer(teacher, **options)
    ends = ends_of(teacher, revision=options["revision"])
    if difference := differences(tokenizer, theirs, ends):
        raise InputError(difference)
    config = AutoConfig.from_pretrained(teacher, **options).get_text_config()
    own = student.config.get("text_config", student.config)["vocab_size"]
    sizes = Sizes(1 + max(tokenizer.get_vocab().values()), own, config.vocab_size)
    sizes.check()
    return sizes


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
    teacher.resize_token_embeddings(sizes.student, mean_resizing=False)
    logger.info("teacher: %d rows of embeddings in memory instead of %d, as the student has them",
                sizes.student, sizes.teacher)  # fmt: skip
    return teacher


def _teacher_options(training: Any) -> dict[str, Any]:
    """Return the options with which everything of the teacher is opened."""
    return {
        "revision": training.teacher_model_revision or "main",
        "trust_remote_code": bool(training.trust_remote_code),
    }
