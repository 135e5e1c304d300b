"""What is saved is what was trained, whatever the adapter is, and in the precision of the base."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stages import METHODS, adapted, edit, logits, opened, same, stage_of

from chainforge.core.artifacts import read_json
from chainforge.core.errors import Failed, InputError
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


# Settings of the given adapter, what it can be used for, and what is refused. `kl` is continue
# with a KL reference.
GIVEN = {
    "patterns and rsLoRA": (
        {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 6}, "use_rslora": True},
        "new kl",
        "",
    ),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "new kl", ""),
    "one layer": ({"layers_to_transform": [1]}, "new", ""),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "merge", "continue"),
    "DoRA": ({"use_dora": True}, "merge", "new"),
    "bias": ({"bias": "lora_only"}, "continue", "new kl"),
    "all biases": ({"bias": "all"}, "", "new kl"),
    "bias of B": ({"lora_bias": True}, "kl", "new"),
    "modules to save": ({"modules_to_save": ["embed_tokens"]}, "kl", "new"),
    "tokens": ({"trainable_token_indices": [5, 9]}, "merge", "new continue kl"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "merge continue", "new kl"),
    "OLoRA": ({"init_lora_weights": "olora"}, "", "new kl"),
    "random PiSSA": ({"init_lora_weights": "pissa_niter_2"}, "", "merge new continue kl"),
}
USED = [(case, way) for case, (_, ways, _) in GIVEN.items() for way in ways.split()]
REFUSED = [(case, way) for case, (_, _, ways) in GIVEN.items() for way in ways.split()]
WAYS = {
    "merge": ["--adapter", "merge"],
    "new": ["--adapter", "new"],
    "continue": ["--adapter", "continue", "--beta", "0"],
    "kl": ["--adapter", "continue"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "way"), USED)
def test_a_given_adapter_is_published_as_it_was_trained(
    case, way, somebodys, tmp_path, monkeypatch
):
    given, before = somebodys(**GIVEN[case][0])
    flags = [*LORA, *WAYS[way], "--max_steps", "1"]
    stage = stage_of(monkeypatch, "grpo", given, tmp_path / "rl", *flags)
    same(stage.begun, before)
    assert stage.kl[:1] in ([], [0])
    left = logits(opened(stage.path("model")))
    same(left, stage.ended)
    same(logits(adapted(stage.path("adapter"))), left)


@pytest.mark.parametrize(("case", "way"), REFUSED)
def test_a_given_adapter_that_cannot_be_published_is_refused_before_it_is_loaded(
    case, way, wide_model, tmp_path, monkeypatch
):
    given = tmp_path / "given"
    given.mkdir()
    (given / "adapter_model.safetensors").write_bytes(b"")
    plain = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": wide_model}
    config = plain | {"target_modules": ["q_proj", "v_proj"]} | GIVEN[case][0]
    edit(given / "adapter_config.json", **config)
    with pytest.raises(InputError, match=r"adapter: merge|beta: 0|merge_and_unload"):
        stage_of(monkeypatch, "grpo", given, tmp_path / "rl", *LORA, *WAYS[way])
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


@pytest.mark.parametrize(
    ("name", "places"),
    [("target_modules", ["q_proj", "lm_head"]), ("modules_to_save", ["lm_head"])],
)
def test_an_adapter_on_the_head_is_refused(name, places, wide_model, tmp_path, monkeypatch):
    flags = [*LORA, f"--lora_{name}", *places]
    with pytest.raises(InputError, match=f"lora_{name}: lm_head"):
        stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", *flags)


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
    "a base that is changed again": spoil("adapter_config.json", init_lora_weights="pissa"),
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


@pytest.mark.parametrize(("dtype", "said"), [(torch.float16, True), (torch.bfloat16, False)])
def test_all_weights_are_saved_in_the_precision_of_the_base(
    dtype, said, wide_model, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    base = Path(shutil.copytree(wide_model, tmp_path / "base"))
    opened(wide_model).to(dtype).save_pretrained(base)
    if not said:  # then it is the one of its weights
        edit(base / "config.json", dtype=None)
    stage = stage_of(monkeypatch, "sft", base, tmp_path / "cold")
    weights = load_file(stage.path("model/model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert "lm_head.weight" not in weights
    left = opened(stage.path("model"))
    assert left.dtype == dtype
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
    stage = SimpleNamespace(path=lambda name: tmp_path / name, policy=None)
    saving.save(trainer, stage)
    assert trainer.waited
    assert (tmp_path / "model").exists() == main
    if main:
        assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
        same(logits(opened(tmp_path / "model")), logits(trainer.model))


def test_a_value_that_the_bases_precision_cannot_hold_is_named(tiny_model, tmp_path):
    trainer = Shards(opened(tiny_model), "whole", True)
    trainer.model.model.norm.weight.data[0] = 1e5
    half = SimpleNamespace(source=SimpleNamespace(config={"dtype": "float16"}))
    stage = SimpleNamespace(path=lambda name: tmp_path / name, policy=half)
    with pytest.raises(Failed, match="model.norm.weight .* torch.float16, the precision of the"):
        saving.save(trainer, stage)
    assert not list(tmp_path.iterdir())
