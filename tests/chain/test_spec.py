"""Reading a chain: what is right is read, what is wrong is named."""

import pytest
import yaml

from chainforge.chain.plan import Overrides, read_sets, settings_of
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError

STAGES = [
    {"name": "traces", "recipe": "collect", "config": "any.yaml"},
    {"name": "cold", "recipe": "sft", "config": "any.yaml", "model": "base", "data": "traces"},
    {"name": "reason", "recipe": "grpo", "config": "any.yaml", "model": "cold"},
    {"name": "picks", "recipe": "reject", "config": "any.yaml", "model": "reason"},
    {
        "name": "mixed",
        "recipe": "sft",
        "config": "any.yaml",
        "model": "base",
        "data": ["picks", "traces"],
    },
    {"name": "pupil", "recipe": "distill", "model": "small", "teacher_model": "mixed"},
    {"name": "scores", "recipe": "evaluate", "models": ["base", "cold", "reason", "mixed"]},
]


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
        chain |= keys
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump(chain, sort_keys=False))
        return path

    return write


def message(path):
    with pytest.raises(InputError) as error:
        load_chain(path)
    return str(error.value)


def test_a_chain_is_read_whole(write, tmp_path):
    chain = load_chain(write(seed=7, transcript="think"))
    assert [stage.name for stage in chain.stages] == [stage["name"] for stage in STAGES]
    assert (chain.name, chain.common) == ("toy", {"seed": 7, "transcript": "think"})
    assert chain.models == {"base": str(tmp_path / "base"), "small": str(tmp_path / "small")}
    assert chain.stage("mixed").data == ("picks", "traces")
    assert chain.stage("cold").config == tmp_path / "any.yaml"


def test_settings_for_all_stages_of_a_kind(write):
    kinds = {"training": {"use_peft": True, "lora_r": 8}, "grpo": {"lora_r": 32}}
    chain = load_chain(write(set=kinds, change={"mixed": {"set": {"lora_r": 16}}}))
    ranks = {
        stage.name: settings_of(stage, chain, Overrides(sets={"reason": {"beta": "0.1"}})).get(
            "lora_r"
        )
        for stage in chain.stages
    }
    assert ranks == {
        "traces": None, "cold": 8, "reason": 32, "picks": None, "mixed": 16, "pupil": 8, "scores": None
    }  # fmt: skip
    given = read_sets(chain, ["training.lora_r=4", "mixed.lora_r=2", "reject.max_per_prompt=2"])
    assert {name: dict(values) for name, values in given.items()} == {
        "cold": {"lora_r": "4"}, "reason": {"lora_r": "4"}, "mixed": {"lora_r": "2"},
        "pupil": {"lora_r": "4"}, "picks": {"max_per_prompt": "2"},
    }  # fmt: skip
    assert "did you mean 'training'" in message(write(set={"trainng": {}}))
    assert "no stage is of 'count.py'" in message(write(set={"count.py": {}}))
    assert "key 'set', grpo: key 'set': 'output_dir'" in message(
        write(set={"grpo": {"output_dir": "x"}})
    )
    assert "key 'set' must map recipes" in message(write(set=["use_peft"]))


def test_a_folder_with_a_chain_may_stand_for_it(write):
    assert load_chain(write().parent).name == "toy"


def test_stages_may_stand_in_any_order(write):
    names = [stage.name for stage in load_chain(write(STAGES[::-1])).stages]
    for earlier, later in [
        ("traces", "cold"),
        ("cold", "reason"),
        ("picks", "mixed"),
        ("mixed", "pupil"),
    ]:
        assert names.index(earlier) < names.index(later)


def test_a_cycle_names_its_members_and_nobody_else(write):
    text = message(write(change={"cold": {"model": "mixed"}}))
    for name in ("cold", "reason", "picks", "mixed"):
        assert name in text
    assert "->" in text
    assert "scores" not in text
    assert "chain.yaml" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reason": {"model": "clod"}}, ["reason", "'model'", "did you mean 'cold'"]),
        ({"reason": {"modle": "cold"}}, ["reason", "'modle'", "did you mean 'model'"]),
        ({"reason": {"recipe": "gpro"}}, ["reason", "'gpro'", "did you mean 'grpo'"]),
        ({"reason": {"config": "ayn.yaml"}}, ["reason", "ayn.yaml", "did you mean 'any.yaml'"]),
        ({"reason": {"model": None}}, ["reason", "grpo needs the key 'model'"]),
        ({"picks": {"model": None}}, ["picks", "reject needs the key 'model' or 'data'"]),
        ({"picks": {"data": "reason"}}, ["picks", "'model' or 'data', and not both"]),
        ({"cold": {"data": None}}, ["cold", "sft needs the key 'data'"]),
        ({"cold": {"data": "reason"}}, ["cold", "'data'", "leaves no data"]),
        ({"cold": {"data": "base"}}, ["cold", "'data'", "'base'"]),
        ({"cold": {"data": "no/such.jsonl"}}, ["cold", "no/such.jsonl"]),
        ({"reason": {"model": "traces"}}, ["reason", "'model'", "leaves no model"]),
        ({"reason": {"models": ["base"]}}, ["reason", "grpo takes no 'models'"]),
        ({"reason": {"data": "cold"}}, ["reason", "'data'", "leaves no data"]),
        ({"scores": {"models": []}}, ["scores", "evaluate needs the key 'models'"]),
        ({"scores": {"models": ["base", "base"]}}, ["scores", "twice"]),
        ({"pupil": {"teacher_model": None}}, ["pupil", "distill needs the key 'teacher_model'"]),
        ({"cold": {"name": "../cold"}}, ["../cold", "'name'"]),
        ({"cold": {"name": "a..b"}}, ["a..b"]),
        ({"cold": {"name": "x" * 65}}, ["1 to 64"]),
        ({"cold": {"name": "chain.json"}}, ["chain.json"]),
        ({"cold": {"name": "reason"}}, ["reason", "two stages"]),
        ({"cold": {"name": "base"}}, ["base", "same name"]),
        ({"reason": {"launch": "dpd"}}, ["reason", "did you mean 'ddp'"]),
        ({"traces": {"launch": "ddp"}}, ["traces", "one process"]),
        (
            {"reason": {"set": {"output_dir": "x"}}},
            ["reason", "output_dir", "decided by the chain"],
        ),
        ({"reason": {"set": {"max steps": 3}}}, ["reason", "max steps"]),
        ({"reason": {"set": ["max_steps"]}}, ["reason", "'set'"]),
        ({"reason": {"model": ["cold"]}}, ["reason", "'model'", "text"]),
        ({"reason": {"recipe": "mine.py"}}, ["reason", "mine.py"]),
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
        ({"name": None}, ["'name'", "missing"]),
        ({"stages": []}, ["'stages'"]),
        ({"stages": [3]}, ["stage 1"]),
        ({"seed": "one"}, ["'seed'", "one"]),
        ({"seed": True}, ["'seed'"]),
        ({"transcript": "thikn"}, ["'transcript'", "did you mean 'think'"]),
        ({"launch": "nowhere.yaml"}, ["'launch'", "nowhere.yaml"]),
        ({"base": "bsae"}, ["'base'", "'bsae'", "Hub id"]),
        ({"base": "."}, ["'base'", "not a model directory", "config.json"]),
        ({"models": {"small": 3}}, ["'models.small'"]),
        ({"models": ["small"]}, ["'models'"]),
    ],
)
def test_a_wrong_key_is_named_with_what_to_write(write, keys, words):
    text = message(write(**keys))
    for word in ["chain.yaml", *words]:
        assert word in text


def test_a_hub_id_is_a_model(write):
    assert load_chain(write(base="Qwen/Qwen2.5-0.5B")).models["base"] == "Qwen/Qwen2.5-0.5B"


def test_a_malformed_stage_configuration_is_found_before_anything_runs(write, tmp_path):
    path = write()
    (tmp_path / "any.yaml").write_text("seed: 1\nseed: 2\n")
    assert "any.yaml" in message(path)
    assert "twice" in message(path)


def test_data_of_ones_own_is_a_path(write, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    chain = load_chain(write(change={"cold": {"data": ["traces", "mine.jsonl"]}}))
    assert chain.stage("cold").data == ("traces", "mine.jsonl")


def test_an_unknown_chain_says_how_to_name_one(tmp_path):
    assert "chain.yaml" in message(tmp_path / "nowhere")
