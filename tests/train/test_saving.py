"""What is saved is what was trained, whatever the adapter is, and in the precision of the base."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stages import METHODS, adapted, distance, edit, logits, opened, same

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError
from chainforge.train import saving
from chainforge.train.saving import NotWhatWasTrained

LORA = METHODS["lora"]


@pytest.fixture
def somebodys(wide_model, tmp_path):
    """An adapter as PEFT's users make them, with weights of some size: `somebodys(r=4, ...)`."""
    from peft import LoraConfig, get_peft_model

    def make(**settings):
        torch.manual_seed(1)
        given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
        model = get_peft_model(opened(wide_model), LoraConfig(task_type="CAUSAL_LM", **given))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn_like(weight)
        model.eval().save_pretrained(tmp_path / "given")
        return tmp_path / "given", logits(model)

    return make


# Settings of the given adapter, and a way to use it.
PATTERNS = {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 6}, "use_rslora": True}
USED = [
    (PATTERNS, "continue"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "continue"),
    ({"target_modules": ["q_proj", "lm_head"]}, "merge"),
    ({"use_dora": True}, "merge"),
    ({"modules_to_save": ["embed_tokens"]}, "continue"),
]
REFUSED = [
    ({"target_modules": ["q_proj", "lm_head"]}, "adapter: merge"),
    ({"trainable_token_indices": [5, 9]}, "merge_and_unload"),
    ({"init_lora_weights": "pissa_niter_2"}, "merge_and_unload"),
]


def published(stage):
    """Return the logits of what a stage left, which are those of what it trained."""
    left = logits(opened(stage.path("model")))
    same(left, stage.ended)
    same(logits(adapted(stage.path("adapter"))), left)
    return left


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "how"), USED)
def test_a_given_adapter_is_published_as_it_was_trained(settings, how, somebodys, train):
    given, before = somebodys(**settings)
    stage = train("grpo", given, *LORA, "--adapter", how, "--max_steps", "1")
    same(stage.begun, before)
    assert stage.kl == [0]
    published(stage)


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_a_given_adapter_that_cannot_be_published_is_refused_before_it_is_loaded(
    settings, words, wide_model, train, tmp_path
):
    given = tmp_path / "given"
    given.mkdir()
    (given / "adapter_model.safetensors").write_bytes(b"")
    plain = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": wide_model}
    config = plain | {"target_modules": ["q_proj", "v_proj"]} | settings
    edit(given / "adapter_config.json", **config)
    with pytest.raises(InputError, match=words):
        train("grpo", given, *LORA, "--adapter", "continue", "--beta", "0")
    assert not (tmp_path / "out").exists()


TIED = ["--lora_target_modules", "q_proj", "embed_tokens"]
FRESH = {
    "embeddings of a tied model": TIED,
    "trained embeddings of a tied model": ["--lora_modules_to_save", "embed_tokens"],
    "DoRA and rsLoRA": ["--use_dora", "true", "--use_rslora", "true"],
    "everything linear": ["--lora_target_modules", "all-linear"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FRESH)
def test_a_fresh_adapter_is_published_as_it_was_trained(case, wide_model, train):
    stage = train("sft", wide_model, *LORA, *FRESH[case])
    assert (published(stage) - logits(opened(wide_model))).abs().max() > 0.1
    tied = read_json(stage.path("model/config.json"))["tie_word_embeddings"]
    assert tied == ("tied" not in case)


FAULTS = [
    ("PeftModel", "adapter_config.json", {"alpha_pattern": {"q_proj": 999}}),
    ("PreTrainedModel", "config.json", {"rms_norm_eps": 9.0}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "part", "changes"), FAULTS)
def test_what_is_not_what_was_trained_is_not_signed(
    kind, part, changes, wide_model, train, tmp_path, monkeypatch
):
    """A library's `save_pretrained` that says other things than it saved."""
    import peft
    import transformers

    cls = getattr(peft, kind, None) or getattr(transformers, kind)
    whole = cls.save_pretrained

    def save(self, directory, **options):
        whole(self, directory, **options)
        edit(Path(directory) / part, **changes)

    monkeypatch.setattr(cls, "save_pretrained", save)
    with pytest.raises(NotWhatWasTrained, match="logits differ by"):
        train("sft", wide_model, *LORA, *TIED)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"model", "adapter", "manifest.json"} & left


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_model_has_its_bases_own_precision_and_the_end_token_of_training(
    method, half, train
):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(half)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(half)
    for name in ("config.json", "generation_config.json"):
        edit(half / name, eos_token_id=tokenizer.eos_token_id)
    stage = train("sft", half, *METHODS[method], "--eos_token", "<|im_end|>")
    model, end = stage.path("model"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(model).eos_token_id == [end, tokenizer.eos_token_id]
    config = read_json(model / "config.json")
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(model).eos_token_id == end
    assert "quantization_config" not in config
    weights = load_file(model / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights  # it is the embeddings'
    left = opened(model)
    assert left.dtype == torch.bfloat16
    if method != "qlora":
        assert distance(logits(left.float()), stage.ended) < 0.03


class Shards:
    """A trainer and its accelerator, with a model that ZeRO-3 or FSDP 2 split over processes."""

    def __init__(self, model, kind, tokenizer):
        self.is_deepspeed_enabled, self.is_fsdp_enabled = kind == "zero", kind == "fsdp"
        self.model = self.deepspeed = model
        self.accelerator, self.processing_class = self, tokenizer
        self.unwrap_model = lambda model, keep_torch_compile: model

    def get_state_dict(self, model):
        copies = {name: weight.clone() for name, weight in model.state_dict().items()}
        return copies if os.environ["RANK"] == "0" else None  # only the first gets them

    def wait_for_everyone(self):
        self.waited = True


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_split_weights_are_saved_by_the_first_process_alone(
    kind, main, tiny_model, tokenizer, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    monkeypatch.setenv("RANK", "0" if main else "1")
    trainer = Shards(opened(tiny_model), kind, tokenizer)
    policy = SimpleNamespace(source=SimpleNamespace(config={}))
    saving.save(trainer, SimpleNamespace(path=lambda name: tmp_path / name, policy=policy))
    assert trainer.waited
    assert (tmp_path / "model").exists() == main
    if main:
        assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
        same(logits(opened(tmp_path / "model")), logits(trainer.model))
