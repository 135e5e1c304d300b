"""GRPO's completions come from the live policy, whichever engine samples them."""

import sys
from collections import Counter
from unittest import mock

import pytest
import stages
import torch
from scipy.stats import chisquare
from trl import GRPOConfig

from chainforge.core.config import parse
from chainforge.generate.local import Line, RolloutSampler, generate
from chainforge.generate.settings import SamplingArgs
from chainforge.train.health import RLArgs
from chainforge.train.heldout import rollout_engine

ASKED = [[{"role": "user", "content": f"{n} + 1 ="}] for n in (1, 22, 333)]


def policy_scores(model, prompt, completion):
    """The log-probability of each token of a completion, by one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    place = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logits.log_softmax(-1)[place, torch.tensor(completion)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_log_probabilities_are_the_live_policys(tiny_model, tmp_path, method):
    done = stages.stage_of("grpo", tiny_model, tmp_path / "stage", *stages.METHODS[method])
    trainer = done.trainer
    training = trainer.model.training
    made = RolloutSampler()([prompt for prompt in ASKED for _ in range(3)], trainer)
    assert trainer.model.training == training
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert len(made["completion_ids"]) == 9
    assert len({tuple(ids) for ids in made["completion_ids"][:3]}) == 3  # seeds of their own
    for prompt, ids, scores in zip(
        *(made[key] for key in ("prompt_ids", "completion_ids", "logprobs"))
    ):
        assert 1 <= len(ids) <= 8
        torch.testing.assert_close(
            torch.tensor(scores), policy_scores(model, prompt, ids), atol=1e-4, rtol=0
        )


def test_the_stage_samples_with_the_engine_that_is_asked_for(tiny_model, tmp_path):
    def engine(*flags, **changes):
        argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *flags]
        with mock.patch.object(sys, "argv", ["grpo.py", *argv]):
            rl, training = parse(RLArgs, GRPOConfig)
        for key, value in changes.items():
            setattr(training, key, value)
        return rollout_engine(rl, training)

    own = ("--rollout_engine", "chainforge")
    assert isinstance(engine(*own)["rollout_func"], RolloutSampler)
    assert engine() == {}
    assert engine(*own, use_vllm=True) == {}
    assert engine(*own, "--min_p", "0.1") == {}
    assert engine(*own, "--repetition_penalty", "1.1") == {}


def test_first_tokens_follow_the_policys_distribution(tiny_model, tokenizer):
    model = stages.opened(tiny_model).eval()
    prompt = tokenizer.apply_chat_template(ASKED[0], add_generation_prompt=True, return_dict=True)
    ids, count = list(prompt["input_ids"]), 20_000
    lines = [Line(n, ids, seed=n) for n in range(count)]
    args = SamplingArgs(max_new_tokens=1, generation_batch_size=5000)
    assert sum(map(len, generate(model, lines, args, [], 512, scored=True))) == count
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0, -1].float().softmax(-1)
    seen, expected = Counter(line.ids[0] for line in lines), (chances * count).double()
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    found, wanted = [seen[token] for token in common], expected[common].tolist()
    rest = count - sum(found), count - sum(wanted)
    assert chisquare([*found, rest[0]], [*wanted, rest[1]]).pvalue > 0.001
    first = lines[0]
    assert first.scores[0] == pytest.approx(chances[first.ids[0]].log().item(), abs=1e-4)
