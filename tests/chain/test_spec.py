"""Reading a chain: what is right is read, what is wrong is named."""

import pytest
import yaml

from chainforge.chain.plan import override, plan_chain, settings_of
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError

STAGES = [
    {"name": "traces", "recipe": "collect", "config": "any.yaml"},
    {"name": "cold_start", "recipe": "sft", "config": "any.yaml", "model": "base",
     "data": "traces"},
    {"name": "rl", "recipe": "grpo", "config": "any.yaml", "model": "cold_start"},
    {"name": "rejection", "recipe": "reject", "config": "any.yaml", "model": "rl"},
    {"name": "sft2", "recipe": "sft", "config": "any.yaml", "model": "base",
     "data": ["rejection", "traces"]},
    {"name": "student", "recipe": "distill", "model": "small", "teacher_model": "sft2"},
    {"name": "eval", "recipe": "evaluate", "models": ["base", "cold_start", "rl", "sft2"]},
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write a chain whose stages are STAGES, changed by name; return its path."""
    for name in ("base", "small"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "any.yaml").write_text("learning_rate: 1e-4\n")

    def write(order=STAGES, change=None, **keys):
        stages = [stage | (change or {}).get(stage["name"], {}) for stage in order]
        chain = {"name": "toy", "base": "base", "models": {"small": "small"}, "stages": stages}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump(chain | keys, sort_keys=False))
        return path

    return write


def message(path):
    with pytest.raises(InputError) as error:
        plan_chain(load_chain(path), "runs")
    return str(error.value)


def test_a_chain_is_read_whole(write, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    change = {"cold_start": {"data": ["traces", "mine.jsonl"]}}
    for path in (write(change=change, seed=7, transcript="think"), tmp_path):
        chain = load_chain(path)
        assert [stage.name for stage in chain.stages] == [stage["name"] for stage in STAGES]
        assert (chain.name, chain.seed, chain.transcript) == ("toy", 7, "think")
        assert chain.models == {"base": str(tmp_path / "base"), "small": str(tmp_path / "small")}
        assert chain.stage("sft2").data == ("rejection", "traces")
        assert chain.stage("cold_start").data == ("traces", "mine.jsonl")
        assert chain.stage("cold_start").config == str(tmp_path / "any.yaml")
    hub = "Qwen/Qwen2.5-0.5B"
    assert load_chain(write(base=hub)).models["base"] == hub


def test_settings_for_all_stages_of_a_kind(write):
    kinds = {"training": {"use_peft": True, "lora_r": 8}, "grpo": {"lora_r": 32}}
    chain = load_chain(write(set=kinds, change={"sft2": {"set": {"lora_r": 16}}}))
    ranks = {s.name: settings_of(s, chain).get("lora_r") for s in chain.stages}
    trained = {"cold_start": 8, "rl": 32, "sft2": 16, "student": 8}
    assert {name: rank for name, rank in ranks.items() if rank} == trained
    sets = ["training.lora_r=4", "sft2.lora_r=2", "reject.max_per_prompt=2"]
    changed = {stage.name: stage.settings for stage in override(chain, sets).stages}
    assert changed == {
        "traces": {}, "cold_start": {"lora_r": "4"}, "rl": {"lora_r": "4"}, "eval": {},
        "sft2": {"lora_r": "2"}, "student": {"lora_r": "4"}, "rejection": {"max_per_prompt": "2"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rl": {"model": "cold_strat"}}, ["rl", "'model'", "did you mean 'cold_start'"]),
        ({"rl": {"modle": "cold_start"}}, ["rl", "'modle'", "did you mean 'model'"]),
        ({"rl": {"recipe": "gpro"}}, ["rl", "'gpro'", "did you mean 'grpo'"]),
        ({"rl": {"config": "ayn.yaml"}}, ["rl", "ayn.yaml"]),
        ({"rl": {"model": None}}, ["rl", "grpo needs the key 'model'"]),
        ({"rejection": {"model": None}}, ["rejection", "one of the keys model and data"]),
        ({"rejection": {"data": "rl"}}, ["rejection", "one of the keys model and data"]),
        ({"cold_start": {"data": None}}, ["cold_start", "sft needs the key 'data'"]),
        ({"cold_start": {"data": "rl"}}, ["cold_start", "'data'", "produces no data"]),
        ({"cold_start": {"data": "base"}}, ["cold_start", "'data'", "'base'"]),
        ({"cold_start": {"data": "no/such.jsonl"}}, ["cold_start", "no/such.jsonl"]),
        ({"rl": {"model": "traces"}}, ["rl", "'model'", "produces no model"]),
        ({"rl": {"model": "sft2"}}, ["rl", "'model'", "sft2 is not above this one"]),
        ({"rl": {"model": "rl"}}, ["rl", "'model'", "rl is not above this one; it is this one"]),
        ({"rl": {"model": "org/name"}}, ["'model': give 'org/name' a name under `models`"]),
        ({"rl": {"size": "ten"}}, ["key 'size[0]': expected a whole number, found text"]),
        (
            {"rl": {"learning_rate": 1, "max_steps": 2}},
            ["'learning_rate'", "'max_steps'", "go under `set`"],
        ),
        ({"traces": {"data": "rejection"}}, ["traces", "collect takes no 'data'"]),
        ({"rl": {"models": ["base"]}}, ["rl", "grpo takes no 'models'"]),
        ({"student": {"teacher_model": None}}, ["student", "needs the key 'teacher_model'"]),
        ({"cold_start": {"name": "../cold"}}, ["../cold", "cannot name a folder"]),
        ({"cold_start": {"name": "a..b"}}, ["a..b"]),
        ({"cold_start": {"name": "x" * 65}}, ["1 to 64"]),
        ({"cold_start": {"name": "chain.json"}}, ["chain.json"]),
        ({"cold_start": {"name": "rl"}}, ["rl", "another stage"]),
        ({"cold_start": {"name": "base"}}, ["base", "another stage or model"]),
        ({"rl": {"launch": "dpd"}}, ["rl", "did you mean 'ddp'"]),
        ({"traces": {"launch": "ddp"}}, ["traces", "one process"]),
        ({"traces": {"size": "many"}}, ["traces", "'size"]),
        ({"traces": {"size": [1, 2]}}, ["traces", "'size'", "one for each"]),
        ({"rl": {"set": {"output_dir": "x"}}}, ["rl", "output_dir", "decided by the chain"]),
        ({"rl": {"set": {"max steps": 3}}}, ["rl", "max steps"]),
        ({"rl": {"set": ["max_steps"]}}, ["rl", "'set'"]),
        ({"rl": {"model": ["cold_start"]}}, ["rl", "'model'", "found a list"]),
        ({"rl": {"recipe": "mine.py"}}, ["rl", "mine.py"]),
    ],
)
def test_a_wrong_stage_is_named_with_what_to_write(write, change, words):
    text = message(write(change=change))
    for word in ["chain.yaml", *words]:
        assert word in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"nmae": "x"}, ["'nmae'", "did you mean 'name'"]),
        ({"name": None}, ["the key 'name' is missing"]),
        ({"stages": []}, ["'stages'"]),
        ({"stages": [3]}, ["stage 1"]),
        ({"seed": "one"}, ["'seed'", "a whole number"]),
        ({"seed": True}, ["'seed'"]),
        ({"transcript": "thikn"}, ["'transcript'", "did you mean 'think'"]),
        ({"launch": "nowhere.yaml"}, ["launch", "nowhere.yaml"]),
        ({"base": "bsae"}, ["'base'", "'bsae'", "Hub id"]),
        ({"base": "."}, ["'base'", "not a model directory", "config.json"]),
        ({"models": {"small": 3}}, ["'models"]),
        ({"models": ["small"]}, ["'models'"]),
        ({"set": {"lr": 1}}, ["expected a mapping, found a whole number; it holds settings under"]),
        ({"model_name_or_path": "x/y"}, ["did you mean 'base'"]),
        ({"set": {"trainng": {}}}, ["'set'", "did you mean 'training'"]),
        ({"set": {"grpo": {"output_dir": "x"}}}, ["'set'", "'output_dir'"]),
    ],
)
def test_a_wrong_key_is_named_with_what_to_write(write, keys, words):
    text = message(write(**keys))
    for word in ["chain.yaml", *words]:
        assert word in text


def test_a_malformed_configuration_or_an_unknown_chain_is_named(write, tmp_path):
    path = write()
    (tmp_path / "any.yaml").write_text("seed: 1\nseed: 2\n")
    assert "any.yaml" in message(path)
    assert "twice" in message(path)
    assert "chain.yaml" in message(tmp_path / "nowhere")
