"""What a stage hands on: its merged model, or its adapter where the next stage asks for that."""

import pytest
import yaml

from chainforge.chain.plan import Overrides, as_text, contracts, plan_chain, read_sets
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Write a chain of two training stages and an evaluation; return its plan by stage."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("base", "config.json"), ("lora", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def plan(cold=None, reason=None, sets=(), base="base", last=()):
        (tmp_path / "cold.yaml").write_text(yaml.safe_dump({"use_peft": True} | (cold or {})))
        stages = [
            {"name": "cold", "recipe": "sft", "config": "cold.yaml", "model": "base",
             "data": "./rows.jsonl"},
            {"name": "reason", "recipe": "grpo", "model": "cold",
             "set": {"use_peft": True, "beta": 0.04} | (reason or {})},
            *last,
        ]  # fmt: skip
        text = yaml.safe_dump({"name": "c", "base": base, "stages": stages})
        (tmp_path / "chain.yaml").write_text(text)
        loaded = load_chain("chain.yaml")
        overrides = Overrides(sets=read_sets(loaded, sets))
        steps = plan_chain(loaded, "runs", overrides)
        plan.text = as_text(loaded, "runs", steps)
        return {step.stage.name: step for step in steps}

    return plan


@pytest.mark.parametrize(
    ("adapter", "part"), [(None, "model"), ("merge", "model"), ("continue", "adapter"), ("new", "adapter")]
)  # fmt: skip
def test_the_next_stage_gets_what_it_asks_for(chain, adapter, part):
    step = chain(reason={"adapter": adapter} if adapter else {})["reason"]
    path = f"runs/c/cold/{part}"
    assert step.inputs["model"].path == path
    assert f"--model_name_or_path {path} " in step.shell
    says = dict(contracts(step))
    assert says["starts from"] == f"cold: {path}"
    copy = "a frozen copy of " if adapter == "continue" else ""
    assert says["KL reference"] == f"the policy it starts from: {copy}{path} (beta 0.04)"
    trained = "the LoRA adapter that it is given" if copy else "a fresh LoRA adapter"
    assert says["trains"] == trained
    assert f"KL reference  the policy it starts from: {copy}{path}" in chain.text


def test_the_command_line_counts_too(chain):
    step = chain(sets=["reason.adapter=continue", "reason.load_in_4bit=true"])["reason"]
    assert step.inputs["model"].path == "runs/c/cold/adapter"
    assert dict(contracts(step))["trains"] == "the QLoRA adapter that it is given"


def test_all_weights_and_what_is_kept_are_said(chain):
    steps = chain(cold={"use_peft": False, "save": ["model"]}, reason={"adapter": "new"})
    assert dict(contracts(steps["cold"]))["trains"] == "all weights"
    assert dict(contracts(steps["cold"]))["saves"] == "model"
    assert steps["reason"].inputs["model"].path == "runs/c/cold/model"


def test_a_changed_adapter_key_makes_the_stage_anew(chain):
    prints = {how: chain(reason={"adapter": how})["reason"].fingerprint for how in ("merge", "new")}
    assert len(set(prints.values())) == 2


SCORES = {"name": "scores", "recipe": "evaluate", "models": ["cold"]}
REFUSED = {
    "no adapter was trained": (
        {"cold": {"use_peft": False}, "reason": {"adapter": "continue"}},
        "stage reason: adapter: continue: stage cold trains all weights",
    ),
    "the adapter is not kept": (
        {"cold": {"save": ["model"]}, "reason": {"adapter": "continue"}},
        r"reason needs cold/adapter, which cold does not save .*add adapter",
    ),
    "the model is not kept": (
        {"cold": {"save": ["adapter", "checkpoints"]}},
        "reason needs cold/model, which cold does not save",
    ),
    "the model that is measured is not kept": (
        {"cold": {"save": "adapter"}, "reason": {"adapter": "continue"}, "last": [SCORES]},
        "scores needs cold/model",
    ),
    "a plain base": ({"cold": {"adapter": "continue"}}, "cold: adapter: continue: base is a plain"),
    "an adapter that is measured": (
        {"base": "lora", "last": [SCORES | {"models": ["base"]}]},
        "stage scores: base is a LoRA adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_left_is_refused_before_anything_runs(chain, case):
    given, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        chain(**given)


def test_a_chain_may_start_from_an_adapter(chain):
    steps = chain(base="lora", cold={"adapter": "continue"})
    assert steps["cold"].inputs["model"].path == "lora"
