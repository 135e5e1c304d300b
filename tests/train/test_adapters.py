"""From one stage to the next, with every method and every `adapter:`, on the tiny model.

A stage's KL is measured against the policy that it starts from, so it is 0 at the first step; the
weights move; and what is left on disk computes what the policy computed at the end.
"""

import shutil
from pathlib import Path

import pytest
import torch
from stages import METHODS, adapted, edit, logits, opened, same, stage_of

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError
from chainforge.train.loop import NothingTrained

COMBINATIONS = [("full", "merge")]
COMBINATIONS += [(method, how) for method in ("lora", "qlora") for how in ("merge", "continue")]


@pytest.fixture(scope="module")
def made(wide_model, tmp_path_factory):
    """Return the stage that others start from, trained once: `made("sft", "lora")`."""
    folder, stages = tmp_path_factory.mktemp("runs"), {}

    def make(kind, method):
        if (kind, method) not in stages:
            directory = folder / f"{kind}-{method}"
            with pytest.MonkeyPatch.context() as patch:
                stages[kind, method] = stage_of(
                    patch, kind, wide_model, directory, *METHODS[method]
                )
        return stages[kind, method]

    return make


@pytest.fixture
def bare(made, tmp_path):
    """An adapter alone, away from the stage that left it."""
    return Path(shutil.copytree(made("sft", "lora").path("adapter"), tmp_path / "bare"))


def distance(one, two):
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize(("method", "how"), COMBINATIONS)
@pytest.mark.parametrize("giver", ["sft", "grpo"])
def test_every_way_from_one_stage_to_the_next(
    giver, method, how, made, wide_model, tmp_path, monkeypatch
):
    before = made(giver, method)
    part = "model" if how == "merge" else "adapter"
    flags = [*METHODS[method], "--adapter", how]
    stage = stage_of(monkeypatch, "grpo", before.path(part), tmp_path / "rl", *flags)
    start = before.path("adapter" if how == "continue" else "model")
    assert stage.notes["starts_from"] == str(start)
    assert stage.kl[0] == 0
    assert stage.kl[1] > 0.01
    assert distance(stage.ended, stage.begun) > 0.01
    if method != "qlora" or how == "continue":  # else it starts from 4-bit weights of the merged
        same(stage.begun, before.ended)
    left = logits(opened(stage.path("model")))
    if method == "qlora":
        assert distance(left, stage.ended) < 0.6  # 0.42 to 0.46; the next test says why
    else:
        same(left, stage.ended)
    if method == "full":
        assert not stage.path("adapter").exists()
        return
    same(logits(adapted(stage.path("adapter"))), left)
    assert not stage.path("adapter/ref").exists()
    config = read_json(stage.path("adapter/adapter_config.json"))
    base = before.path("model").resolve() if how == "merge" else wide_model
    assert config["base_model_name_or_path"] == str(base)
    assert not stage.path("start").exists()


def test_after_qlora_only_the_bases_rounding_is_missing(made, wide_model):
    """`model/` holds the base as it was, and the policy was trained on the base in 4 bits.

    With the rounded weights in their places the two agree; so the difference is that of the base
    from itself in 4 bits, and no adapter's.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    stage = made("sft", "qlora")
    base, rounded = opened(wide_model), opened(wide_model)
    errors = []
    for name, module in stage.trainer.model.get_base_model().named_modules():
        if isinstance(module, Linear4bit):
            target = rounded.get_submodule(name.removesuffix(".base_layer")).weight
            exact, weight = target.data, module.weight
            target.data = dequantize_4bit(weight.data, weight.quant_state).float()
            errors.append(distance(target.data, exact))
    assert len(errors) == 14
    # 16 levels for a normal distribution, in blocks of 64: 9.2 % of the norm for every matrix.
    assert 0.08 < min(errors) < max(errors) < 0.1
    apart = distance(logits(base), logits(rounded))
    left = distance(logits(opened(stage.path("model"))), stage.ended)
    assert left < 1.2 * apart  # 0.45 and 0.46 here, on a network of random weights
    same(logits(PeftModel.from_pretrained(rounded, stage.path("adapter"))), stage.ended)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_merged_model_has_its_bases_own_precision(method, wide_model, tmp_path, monkeypatch):
    base = Path(shutil.copytree(wide_model, tmp_path / "base"))
    opened(wide_model).bfloat16().save_pretrained(base)
    stage = stage_of(monkeypatch, "sft", base, tmp_path / "cold", *METHODS[method])
    left = opened(stage.path("model"))
    assert {weight.dtype for weight in left.parameters()} == {torch.bfloat16}
    if method == "lora":
        assert distance(logits(left), stage.ended) < 0.03


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stage_from_an_adapter_that_no_stage_left(method, bare, made, tmp_path, monkeypatch):
    """It is merged on disk: merged in memory, TRL's reference would be the base below it."""
    stage = stage_of(monkeypatch, "grpo", bare, tmp_path / "rl", *METHODS[method])
    assert stage.kl[0] == 0
    assert stage.notes["starts_from"] == str(tmp_path / "rl/start")
    same(stage.begun, made("sft", "lora").ended)
    same(logits(opened(stage.path("model"))), stage.ended)
    needed = method == "lora"  # as the base of adapter/
    assert stage.path("start/model.safetensors").exists() == needed
    if method == "lora":
        monkeypatch.chdir(tmp_path)
        same(logits(adapted(stage.path("adapter"))), stage.ended)


def test_an_adapter_is_opened_from_the_hubs_cache(bare, made, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/models--me--cold/snapshots" / ("0" * 40)
    shutil.copytree(bare, snapshot)
    (tmp_path / "hub/models--me--cold/refs").mkdir()
    (tmp_path / "hub/models--me--cold/refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    flags = [*METHODS["lora"], "--adapter", "continue"]
    stage = stage_of(monkeypatch, "grpo", "me/cold", tmp_path / "rl", *flags)
    assert stage.kl[0] == 0
    same(stage.begun, made("sft", "lora").ended)


def test_dropout_is_off_where_there_is_a_reference(bare, made, tmp_path, monkeypatch):
    edit(bare / "adapter_config.json", lora_dropout=0.3)
    flags = [*METHODS["lora"], "--adapter", "continue"]
    stage = stage_of(monkeypatch, "grpo", bare, tmp_path / "rl", *flags)
    assert stage.kl[0] == 0
    on = [*flags, "--disable_dropout", "false"]
    with pytest.raises(InputError, match="disable_dropout: false with beta"):
        stage_of(monkeypatch, "grpo", bare, tmp_path / "other", *on)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_another_model_is_refused(bare, tmp_path, monkeypatch):
    """PEFT warns, and trains a fresh adapter under the given one's name."""
    from safetensors.torch import load_file, save_file

    weights = load_file(bare / "adapter_model.safetensors")
    other = {name.replace("q_proj", "query"): value for name, value in weights.items()}
    save_file(other, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = [*METHODS["lora"], "--adapter", "continue"]
    with pytest.raises(InputError, match="was made for another model"):
        stage_of(monkeypatch, "grpo", bare, tmp_path / "rl", *flags)


REFUSED = {
    "no adapter to continue": ("model", "lora --adapter continue", "is a plain model; give its"),
    "all weights of an adapter": ("adapter", "full --adapter continue", "set use_peft: true"),
    "4 bits without LoRA": ("model", "full --load_in_4bit true", "cannot be trained"),
    "another rank": ("adapter", "lora --adapter continue --lora_r 8", "lora_r: .* has 4"),
    "LoRA's settings without LoRA": ("model", "full --lora_alpha 8", "but not use_peft"),
    "an adapter on the head": (
        "model",
        "lora --lora_target_modules q_proj lm_head",
        "lora_target_modules: lm_head",
    ),
    "other weights": (
        "model",
        'full --model_init_kwargs {"gguf_file":"x.gguf"}',
        "model_init_kwargs: gguf_file",
    ),
    "an unknown part": ("model", "full --save model optimizer", "'optimizer' is not one of"),
    "nothing kept": ("model", "full --save adapter checkpoints", "save model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_opened(
    case, made, tmp_path, monkeypatch
):
    part, words, message = REFUSED[case]
    method, *flags = words.split()
    given = made("sft", "lora").path(part)
    with pytest.raises(InputError, match=message):
        stage_of(monkeypatch, "grpo", given, tmp_path / "rl", *METHODS[method], *flags)
    assert not (tmp_path / "rl").exists()


def test_a_quantised_checkpoint_is_refused(wide_model, tmp_path, monkeypatch):
    model = Path(shutil.copytree(wide_model, tmp_path / "model"))
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="quantised already"):
        stage_of(monkeypatch, "grpo", model, tmp_path / "rl")


@pytest.mark.parametrize(
    ("method", "keep", "left"),
    [
        ("lora", ["adapter"], {"adapter"}),
        ("lora", ["model", "checkpoints"], {"model", "checkpoints"}),
        ("full", ["model"], {"model"}),
    ],
)
def test_only_what_is_kept_stays(method, keep, left, wide_model, tmp_path, monkeypatch):
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    flags = [*METHODS[method], *saving, "--save", *keep]
    stage = stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", *flags)
    assert {path.name for path in stage.path("").iterdir() if path.is_dir()} == left
    signed = {Path(name).parts[0] for name in read_json(stage.path("manifest.json"))["outputs"]}
    assert signed & {"model", "adapter"} == left - {"checkpoints"}


def test_training_that_changes_nothing_is_an_error(wide_model, tmp_path, monkeypatch):
    with pytest.raises(NothingTrained, match="no weight changed in 2 steps"):
        stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", "--learning_rate", "0")
    assert not (tmp_path / "cold/model").exists()


def test_a_policy_that_cannot_train_is_an_error(bare, tmp_path, monkeypatch):
    def open_frozen(start, stage):
        stage.policy = start
        return adapted(bare)

    monkeypatch.setattr("stages.open_policy", open_frozen)
    flags = [*METHODS["lora"], "--adapter", "continue", "--beta", "0"]
    with pytest.raises(NothingTrained, match="no parameter of the model requires a gradient"):
        stage_of(monkeypatch, "grpo", bare, tmp_path / "rl", *flags)


def test_a_qlora_run_that_was_cut_ends_the_same(made, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    flags = [*METHODS["qlora"], "--adapter", "continue", "--max_steps", "3"]
    flags += ["--save_strategy", "steps", "--save_steps", "1"]
    given = made("sft", "qlora").path("adapter")
    whole = stage_of(monkeypatch, "grpo", given, tmp_path / "whole", *flags)
    cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    (cut / "manifest.json").unlink()
    for step in (2, 3):
        shutil.rmtree(cut / f"checkpoints/checkpoint-{step}")
    again = stage_of(monkeypatch, "grpo", given, cut, *flags)
    one, two = (load_file(s.path("adapter/adapter_model.safetensors")) for s in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
