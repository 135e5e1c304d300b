import re
from types import SimpleNamespace

import pytest
import torch
from stages import changed, opened

from chainforge.core.errors import InputError
from chainforge.train.distill import Sizes, check_teacher, differences, open_teacher
from chainforge.train.model_source import find_source

SMALL, LARGE = 320, 384  # as in `padded_models`


def trainer_of(student, teacher, tokenizer, folder):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    training = DistillationConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_completion_length=8,
        teacher_model_name_or_path=teacher,
    )
    sizes = check_teacher(tokenizer, find_source(student), training)
    assert (sizes.student, sizes.teacher) == (SMALL, LARGE)
    prompt = [{"role": "user", "content": "1 + 2 ="}]
    return DistillationTrainer(
        model=student,
        teacher_model=open_teacher(training, SimpleNamespace(attn_implementation=None), sizes),
        args=training,
        train_dataset=Dataset.from_dict({"prompt": [prompt] * 8}),
        processing_class=tokenizer,
    )


def by_hand(student, teacher, ids, beta):
    """Return the divergence on the ids that both models have, and its gradient, without TRL."""
    mine, theirs = opened(student).float(), opened(teacher).float()
    with torch.no_grad():
        p_t = theirs(ids).logits[:, 3:-1, :SMALL].log_softmax(-1)
    p_s = mine(ids).logits[:, 3:-1, :SMALL].log_softmax(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    loss = (kl(p_s, p_t) if beta else kl(p_t, p_s)).mean()
    loss.backward()
    return loss, mine.get_output_embeddings().weight.grad


def test_the_loss_is_the_divergence_on_the_shared_ids(padded_models, tokenizer, tmp_path):
    pair = padded_models["student", SMALL], padded_models["teacher", LARGE]
    trainer = trainer_of(*pair, tokenizer, tmp_path)
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
        expected, gradient = by_hand(*pair, ids, beta)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_tokenizers_that_mean_the_same_and_real_mismatches(tokenizer):
    from tokenizers import pre_tokenizers

    ended = changed(tokenizer, eos_token="<|endoftext|>")
    assert differences(tokenizer, changed(tokenizer)) is None
    assert differences(tokenizer, ended, {tokenizer.eos_token_id}) is None
    more, cutting = changed(tokenizer), changed(tokenizer)
    more.add_tokens(["<extra>"])
    cutting.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for teacher, words in (
        (
            more,
            r"differ in 1 tokens \(such as '<extra>'\).*distil by traces instead.*recipes/sft.py on the student",
        ),
        (cutting, "cut text into different ones"),
        (ended, "the student ends with"),
    ):
        assert re.search(words, differences(tokenizer, teacher))


def test_sizes_that_cannot_be():
    Sizes(310, 320, 384).check()
    with pytest.raises(InputError, match="the teacher has embeddings for 300 ids"):
        Sizes(310, 320, 300).check()
    with pytest.raises(InputError, match="384 rows of embeddings and the teacher only 320"):
        Sizes(310, 384, 320).check()
