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
from chainforge.core.errors import InputError
from chainforge.generate.local import Line, RolloutSampler, generate
from chainforge.generate.settings import SamplingArgs
from chainforge.train.health import RLArgs
from chainforge.train.heldout import rollout_engine
from chainforge.train.scoring import OwnRollouts
from chainforge.train.trl_internals import SCORES

ASKED = [[{"role": "user", "content": f"{n} + 1 ="}] for n in (1, 22, 333)]


def policy_scores(model, prompt, completion):
    """The log-probability of each token of a completion, by one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    place = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logits.log_softmax(-1)[place, torch.tensor(completion)]


def micro_batch(rows=32):
    """What TRL trains on: prompts and completions of all lengths, padded, two of them masked."""
    draw = torch.Generator().manual_seed(1)
    prompts, lengths = (torch.randint(1, most, (rows, 1), generator=draw) for most in (10, 9))
    places = torch.arange(9)
    made = {
        "prompt_mask": (places >= 9 - prompts).long(),
        "completion_mask": (places[:8] < lengths).long(),
        "num_items_in_batch": torch.tensor(64.0),
        "advantages": torch.randn(rows, generator=draw).round(),  # a third of them are 0
    }
    made["completion_mask"][:2] = 0
    for name in ("prompt", "completion"):
        mask = made[f"{name}_mask"]
        made[f"{name}_ids"] = mask * torch.randint(3, 90, mask.shape, generator=draw)
    shape = made["completion_ids"].shape
    return made | {f"{who}_per_token_logps": -4 - torch.rand(shape) for who in ("old", "ref")}


def loss_and_gradients(trainer, inputs):
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = {name: one.grad for name, one in trainer.model.named_parameters() if one.requires_grad}
    return loss.detach(), found, {k: v[-1] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_are_trls(tiny_model, tmp_path, method, beta):
    done = stages.stage_of("grpo", tiny_model, tmp_path / "stage", *stages.METHODS[method])
    trainer, inputs = done.trainer, micro_batch()
    trainer.beta = trainer.args.beta = beta
    theirs = loss_and_gradients(trainer, inputs)
    no_row = loss_and_gradients(trainer, inputs | {"advantages": torch.zeros(32)})
    sampler = OwnRollouts()
    sampler(ASKED, trainer)
    trainer.args.max_completion_length = 128  # so that 32 rows are computed in 8 parts
    assert sampler._rows_of_a_part(32, "cpu") == 4
    torch.testing.assert_close(loss_and_gradients(trainer, inputs), theirs)
    given = inputs | {"advantages": torch.zeros(32)}
    torch.testing.assert_close(loss_and_gradients(trainer, given), no_row)


@pytest.mark.parametrize(
    "flags",
    [[], stages.METHODS["lora"], ["--gradient_checkpointing", "true"]],
    ids=["full", "lora", "checkpointing"],
)
def test_log_probabilities_are_the_live_policys(tiny_model, tmp_path, flags):
    trainer = stages.stage_of("grpo", tiny_model, tmp_path / "stage", *flags).trainer
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


@pytest.mark.parametrize(("updates", "known"), [(1, False), (2, True)])
def test_scores_of_sampling_stand_for_the_old_policys(tiny_model, tmp_path, updates, known):
    flags = ["--steps_per_generation", str(updates), *stages.METHODS["lora"]]
    trainer = stages.stage_of("grpo", tiny_model, tmp_path / "stage", *flags).trainer
    made = OwnRollouts()([prompt for prompt in ASKED for _ in range(3)], trainer)
    mask, ids = torch.zeros(2, 9, 60, dtype=torch.long)
    for row, (prompt, done) in enumerate(zip(made["prompt_ids"], made["completion_ids"])):
        place = slice(52 - len(prompt), 52 + len(done))
        mask[row, place], ids[row, place] = 1, torch.tensor(prompt + done)
    sampled = torch.tensor([row + [0.0] * (8 - len(row)) for row in made["logprobs"]])
    with torch.no_grad():
        asked = [getattr(trainer, SCORES)(trainer.model, ids, mask, 8)[0] for _ in range(2)]
    assert torch.equal(asked[0], sampled) == known
    for scores in asked:
        torch.testing.assert_close(scores, sampled, atol=1e-4, rtol=0)


def test_the_stage_samples_with_the_engine_that_can(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "chainforge")

    def asked(*flags):
        argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *flags]
        with mock.patch.object(sys, "argv", ["grpo.py", *argv]):
            return parse(RLArgs, GRPOConfig)

    def engine(*flags, **changes):
        rl, training = asked(*flags)
        for key, value in changes.items():
            setattr(training, key, value)
        return rollout_engine(rl, training)

    assert isinstance(engine()["rollout_func"], OwnRollouts)
    assert engine("--rollout_engine", "trl") == {}
    own = ("--rollout_engine", "chainforge")
    assert isinstance(engine(*own)["rollout_func"], OwnRollouts)
    for key, value in (("use_vllm", True), ("min_p", 0.1), ("repetition_penalty", 1.1)):
        caplog.clear()
        assert engine(**{key: value}) == {}
        assert caplog.messages == [f"TRL samples the completions, because {key} is set"]
        with pytest.raises(InputError, match=f"because {key} is set; use `trl`"):
            engine(*own, **{key: value})
    settings = asked()
    for name, value in (("WORLD_SIZE", 2), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", 2)):
        monkeypatch.setenv(name, str(value))
    assert rollout_engine(*settings) == {}
    assert caplog.messages[-1].endswith("each process holds only a part of the weights")


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
