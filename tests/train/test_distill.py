import re
from types import SimpleNamespace

import pytest
import torch
from stages import changed

from chainforge.core import artifacts
from chainforge.core.errors import InputError
from chainforge.core.transcript import DEFAULT
from chainforge.train.distill import (
    Sizes,
    check_teacher,
    differences,
    open_teacher,
)
from chainforge.train.model_source import find_source

SMALL, LARGE = 320, 384  # as in `padded_models`


def trainer_of(padded_models, tokenizer, student, teacher, folder):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    prompt = [{"role": "user", "content": "1 + 2 ="}]
    values = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "max_steps": 1, "per_device_train_batch_size": 4,
        "max_completion_length": 8, "beta": 1.0,
        "teacher_model_name_or_path": padded_models["teacher", teacher],
    }  # fmt: skip
    training = DistillationConfig(**values)
    source = find_source(padded_models["student", student])
    sizes = check_teacher(tokenizer, source, training, DEFAULT)
    assert (sizes.student, sizes.teacher) == (student, teacher)
    return DistillationTrainer(
        model=padded_models["student", student],
        teacher_model=open_teacher(training, SimpleNamespace(attn_implementation=None), sizes),
        args=training,
        train_dataset=Dataset.from_dict({"prompt": [prompt] * 8}),
        processing_class=tokenizer,
    )


def by_hand(padded_models, student, teacher, ids, beta):
    """Return the divergence on the ids that both models have, and its gradient, without TRL."""
    from transformers import AutoModelForCausalLM

    shared = min(student, teacher)
    mine = AutoModelForCausalLM.from_pretrained(
        padded_models["student", student], dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        padded_models["teacher", teacher], dtype=torch.float32
    )
    with torch.no_grad():
        p_t = theirs(ids).logits[:, 3:-1, :shared].log_softmax(-1)
    p_s = mine(ids).logits[:, 3:-1, :shared].log_softmax(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    loss = kl(p_s, p_t) if beta else kl(p_t, p_s)
    loss.mean().backward()
    return loss.mean(), mine.get_output_embeddings().weight.grad


def test_the_loss_is_the_divergence_on_the_shared_ids(padded_models, tokenizer, tmp_path):
    before = {path: artifacts.sha256(path) for path in padded_models.values()}
    trainer = trainer_of(padded_models, tokenizer, SMALL, LARGE, tmp_path)
    ids = torch.randint(0, len(tokenizer), (2, 12))
    inputs = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:]}
    inputs |= {key.replace("ids", "mask"): torch.ones_like(value) for key, value in inputs.items()}
    head = trainer.model.get_output_embeddings()
    for beta in (0.0, 1.0):
        trainer.beta = beta
        trainer.model.zero_grad()
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        expected, gradient = by_hand(padded_models, SMALL, LARGE, ids, beta)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.weight.grad, gradient, atol=1e-5, rtol=1e-4)
    assert {path: artifacts.sha256(path) for path in padded_models.values()} == before


def test_models_of_one_size_go_to_trl_as_they_are(padded_models, tokenizer, tmp_path):
    trainer = trainer_of(padded_models, tokenizer, SMALL, SMALL, tmp_path)
    assert trainer.teacher_model.config.vocab_size == SMALL
    assert trainer.args.teacher_model_init_kwargs["dtype"] == "auto"


def test_tokenizers_that_mean_the_same(tokenizer):
    assert differences(tokenizer, changed(tokenizer)) is None
    ended = changed(tokenizer, eos_token="<|endoftext|>")
    assert differences(tokenizer, ended, {tokenizer.eos_token_id}) is None


def test_real_mismatches_are_named_with_what_to_do(tokenizer):
    from tokenizers import pre_tokenizers

    more, cutting = changed(tokenizer), changed(tokenizer)
    more.add_tokens(["<extra>"])
    cutting.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for teacher, words in (
        (more, r"differ in 1 tokens \(such as '<extra>'\).*distil by traces instead"),
        (cutting, "cut text into different ones"),
        (changed(tokenizer, eos_token="<|endoftext|>"), "the student ends with"),
    ):
        assert re.search(words, differences(tokenizer, teacher))


def test_sizes_that_cannot_be():
    Sizes(310, 320, 384).check()
    with pytest.raises(InputError, match="the teacher has embeddings for 300 ids"):
        Sizes(310, 320, 300).check()
    with pytest.raises(InputError, match="384 rows of embeddings and the teacher only 320"):
        Sizes(310, 384, 320).check()
