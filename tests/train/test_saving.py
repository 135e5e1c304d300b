"""What is saved is what was trained, whatever the adapter is, and in the precision of the base."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stages import METHODS, adapted, edit, logits, opened, same, stage_of

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


WAYS = {
    "merge": ["--adapter", "merge"],
    "continue": ["--adapter", "continue", "--beta", "0"],
    "kl": ["--adapter", "continue"],
}
# Settings of the given adapter, and a way to use it; `kl` is continue with a KL reference.
USED = {
    "patterns and rsLoRA": (
        {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 6}, "use_rslora": True},
        "kl",
    ),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "kl"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "merge"),
    "DoRA": ({"use_dora": True}, "merge"),
    "modules to save": ({"modules_to_save": ["embed_tokens"]}, "kl"),
}
REFUSED = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "adapter: merge"),
    "tokens": ({"trainable_token_indices": [5, 9]}, "merge_and_unload"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_2"}, "merge_and_unload"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", USED)
def test_a_given_adapter_is_published_as_it_was_trained(case, somebodys, tmp_path, monkeypatch):
    settings, way = USED[case]
    given, before = somebodys(**settings)
    flags = [*LORA, *WAYS[way], "--max_steps", "1"]
    stage = stage_of(monkeypatch, "grpo", given, tmp_path / "rl", *flags)
    same(stage.begun, before)
    assert stage.kl[:1] in ([], [0])
    left = logits(opened(stage.path("model")))
    same(left, stage.ended)
    same(logits(adapted(stage.path("adapter"))), left)


@pytest.mark.parametrize("case", REFUSED)
def test_a_given_adapter_that_cannot_be_published_is_refused_before_it_is_loaded(
    case, wide_model, tmp_path, monkeypatch
):
    settings, words = REFUSED[case]
    given = tmp_path / "given"
    given.mkdir()
    (given / "adapter_model.safetensors").write_bytes(b"")
    plain = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": wide_model}
    config = plain | {"target_modules": ["q_proj", "v_proj"]} | settings
    edit(given / "adapter_config.json", **config)
    with pytest.raises(InputError, match=words):
        stage_of(monkeypatch, "grpo", given, tmp_path / "rl", *LORA, *WAYS["continue"])
    assert not (tmp_path / "rl").exists()


FRESH = {
    "embeddings of a tied model": ["--lora_target_modules", "q_proj", "embed_tokens"],
    "trained embeddings of a tied model": ["--lora_modules_to_save", "embed_tokens"],
    "DoRA and rsLoRA": ["--use_dora", "true", "--use_rslora", "true"],
    "everything linear": ["--lora_target_modules", "all-linear"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FRESH)
def test_a_fresh_adapter_is_published_as_it_was_trained(case, wide_model, tmp_path, monkeypatch):
    stage = stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", *LORA, *FRESH[case])
    left = logits(opened(stage.path("model")))
    assert (left - logits(opened(wide_model))).abs().max() > 0.1
    same(left, stage.ended)
    same(logits(adapted(stage.path("adapter"))), left)
    tied = read_json(stage.path("model/config.json"))["tie_word_embeddings"]
    assert tied == ("tied" not in case)


def spoil(part, **changes):
    """A `save_pretrained` that says other things than it saved, as a fault of a library would."""

    def plant(patch):
        from peft import PeftModel
        from transformers import PreTrainedModel

        kind = PeftModel if part == "adapter_config.json" else PreTrainedModel
        whole = kind.save_pretrained

        def save(self, directory, **options):
            whole(self, directory, **options)
            edit(Path(directory) / part, **changes)

        patch.setattr(kind, "save_pretrained", save)

    return plant


FAULTS = {
    "another scale of one matrix": spoil("adapter_config.json", alpha_pattern={"q_proj": 999}),
    "another norm": spoil("config.json", rms_norm_eps=9.0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_what_was_trained_is_not_signed(fault, wide_model, tmp_path, monkeypatch):
    FAULTS[fault](monkeypatch)
    flags = [*LORA, "--lora_target_modules", "q_proj", "embed_tokens"]
    with pytest.raises(NotWhatWasTrained, match="logits differ by"):
        stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", *flags)
    assert not {"model", "adapter", "manifest.json"} & {
        p.name for p in (tmp_path / "cold").iterdir()
    }


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_end_token_of_training_is_the_one_of_the_saved_model(
    method, wide_model, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer, GenerationConfig

    base = Path(shutil.copytree(wide_model, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        edit(base / name, eos_token_id=tokenizer.eos_token_id)
    flags = [*METHODS[method], "--eos_token", "<|im_end|>"]
    stage = stage_of(monkeypatch, "sft", base, tmp_path / "cold", *flags)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = stage.path("model")
    assert GenerationConfig.from_pretrained(model).eos_token_id == [end, tokenizer.eos_token_id]
    config = read_json(model / "config.json")
    assert config["eos_token_id"] == end
    assert "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(model).eos_token_id == end


def test_all_weights_are_saved_in_the_precision_of_the_base(wide_model, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    base = Path(shutil.copytree(wide_model, tmp_path / "base"))
    opened(wide_model).bfloat16().save_pretrained(base)
    stage = stage_of(monkeypatch, "sft", base, tmp_path / "cold")
    weights = load_file(stage.path("model/model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    left = opened(stage.path("model"))
    assert left.dtype == torch.bfloat16
    left = logits(left.float())
    assert (left - stage.ended).norm() / stage.ended.norm() < 0.03


class Shards:
    """What stands around a model: split over processes by ZeRO-3 or FSDP 2, or whole."""

    def __init__(self, model, kind, main):
        self.is_deepspeed_enabled, self.is_fsdp_enabled = kind == "zero", kind == "fsdp"
        self.model = self.deepspeed = model
        self.main, self.accelerator = main, self

    def get_state_dict(self, model):
        copies = {name: weight.clone() for name, weight in model.state_dict().items()}
        return copies if self.main else None  # only the first process gets them

    def unwrap_model(self, model, keep_torch_compile):
        return model

    def wait_for_everyone(self):
        self.waited = True


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_split_weights_are_saved_by_the_first_process_alone(
    kind, main, tiny_model, tokenizer, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    monkeypatch.setenv("RANK", "0" if main else "1")
    trainer = Shards(opened(tiny_model), kind, main)
    trainer.processing_class = tokenizer
    policy = SimpleNamespace(source=SimpleNamespace(config={}))
    stage = SimpleNamespace(path=lambda name: tmp_path / name, policy=policy)
    saving.save(trainer, stage)
    assert trainer.waited
    assert (tmp_path / "model").exists() == main
    if main:
        assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
        same(logits(opened(tmp_path / "model")), logits(trainer.model))
