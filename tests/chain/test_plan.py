"""Planning a chain: the commands are the plain ones, the states are true."""

import json

import pytest
import yaml

from chainforge.chain.plan import as_text, contracts, option_words, override, plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError
from chainforge.core.paths import shipped

STAGES = [
    {"name": "traces", "recipe": "collect", "config": "collect.yaml"},
    {"name": "cold_start", "recipe": "sft", "config": "sft.yaml", "model": "base",
     "data": ["traces"]},
    {"name": "rl", "recipe": "grpo", "config": "grpo.yaml", "model": "cold_start",
     "set": {"max_steps": 3}},
    {"name": "student", "recipe": "distill", "model": "base", "teacher_model": "rl"},
    {"name": "eval", "recipe": "evaluate", "models": ["base", "rl"]},
]  # fmt: skip
REJECTION = {"name": "rejection", "recipe": "reject", "model": "rl"}


@pytest.fixture
def real(workplace):
    """A chain of the recipes that ChainForge ships; nothing of it is run here."""
    for name in ("collect", "sft", "grpo"):
        workplace.configure(name)
    workplace.chain |= {"stages": STAGES, "transcript": "think"}
    del workplace.chain["launch"]
    workplace.save()
    return workplace


def planned(*sets, **changes):
    chain = override(load_chain("chain.yaml"), sets, **changes)
    return {step.stage.name: step for step in plan_chain(chain, "runs")}


def commands(*sets, **changes):
    return {name: step.shell for name, step in planned(*sets, **changes).items()}


def test_commands_are_what_one_would_type(real, monkeypatch):
    lines, recipes = commands(), shipped("recipes")
    assert lines["traces"] == (
        f"python {recipes}/collect.py --config collect.yaml --output_dir runs/fake/traces "
        "--seed 1 --transcript think"
    )
    assert lines["cold_start"] == (
        f"accelerate launch {recipes}/sft.py --config sft.yaml --model_name_or_path base "
        "--data runs/fake/traces --output_dir runs/fake/cold_start --seed 1 --transcript think"
    )
    assert "--model_name_or_path runs/fake/cold_start/model" in lines["rl"]
    assert lines["rl"].endswith("--seed 1 --transcript think --max_steps 3")
    assert "--teacher_model_name_or_path runs/fake/rl/model" in lines["student"]
    assert "--models base=base rl=runs/fake/rl/model " in lines["eval"]
    monkeypatch.chdir(recipes.parent)
    step = plan_chain(load_chain(real.folder / "chain.yaml"), "runs")[1]
    assert step.command[:3] == ["accelerate", "launch", "recipes/sft.py"]


def test_what_rl_leaves_is_a_pool_and_what_is_measured_a_gate(real):
    pool = {"name": "pool", "recipe": "reject", "data": "rl"}
    rl_final = {"name": "rl_final", "recipe": "grpo", "model": "rl", "data": "rejection"}
    real.chain |= {"stages": [*STAGES, pool, REJECTION, rl_final], "launch": "ddp"}
    real.save()
    steps, lines = planned(), commands()
    assert "reject.py --pool runs/fake/rl --output_dir runs/fake/pool" in lines["pool"]
    assert "--gate_pool runs/fake/rejection " in lines["rl_final"]
    assert steps["pool"].inputs["data.0"].fingerprint == steps["rl"].fingerprint
    # What samples is launched only when its own stage says so.
    assert lines["rl"].startswith("accelerate launch --config_file ")
    assert lines["rejection"].startswith("python ")
    assert lines["eval"].startswith("python ")
    real.chain["stages"] = [*STAGES, REJECTION | {"launch": "ddp"}]
    real.save()
    assert "ddp.yaml" in commands()["rejection"]


def test_what_makes_data_excludes_what_the_chain_evaluates(real):
    real.configure("eval")
    (real.folder / "rejection.yaml").write_text("decontaminate: [mine.jsonl, eval.yaml]\n")
    plain = REJECTION | {"name": "plain", "set": {"decontaminate": "x"}}
    stages = [*STAGES[:-1], REJECTION | {"config": "rejection.yaml"}, plain]
    real.chain["stages"] = [*stages, STAGES[-1] | {"config": "eval.yaml"}]
    real.save()
    lines, before = commands(), planned()["traces"].fingerprint
    assert lines["traces"].endswith("--decontaminate eval.yaml")
    assert lines["rejection"].endswith("--decontaminate mine.jsonl eval.yaml")
    assert lines["plain"].endswith("--decontaminate x eval.yaml")
    assert "decontaminate" not in lines["cold_start"] + lines["rl"] + lines["eval"]
    (real.folder / "eval.yaml").write_text("steps: 9\n")
    assert planned()["traces"].fingerprint != before


def test_the_command_line_wins_over_the_stage_and_the_stage_over_the_chain(real):
    lines = commands("rl.max_steps=5", "cold_start.stop=[a, b]", launch="ddp", seed=9)
    configs = shipped("accelerate_configs")
    assert lines["cold_start"].startswith(f"accelerate launch --config_file {configs}/ddp.yaml ")
    assert lines["cold_start"].endswith("--seed 9 --transcript think --stop a b")
    assert lines["rl"].endswith("--seed 9 --transcript think --max_steps 5")
    assert lines["traces"].startswith("python ")
    assert commands(launch="none")["cold_start"].startswith("python ")
    for text in ("rl", "max_steps=3", "lr.max_steps=3", "rl.data=x"):
        with pytest.raises(InputError, match="--set|no stage"):
            planned(text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--key", "true"]),
        ([1, 2], ["--key", "1", "2"]),
        ({"a": 1}, ["--key", '{"a": 1}']),
        ([{"fn": "x"}], ["--key", '[{"fn": "x"}]']),
        ("--x", ["--key=--x"]),
    ],
)
def test_a_setting_becomes_words(value, words):
    assert option_words("key", value) == words


def test_a_chain_gives_its_tasks_once_for_all_stages_that_ask_any(real):
    real.chain["tasks"] = [{"fn": "jsonl", "params": {"path": "a.jsonl"}}, {"fn": "mine:task"}]
    (real.folder / "a.jsonl").write_text("{}\n")
    sizes = {"traces": {"size": [30, 20]}, "eval": {"size": 5}}
    real.configure("grpo", tasks=[{"fn": "own"}])
    real.chain["stages"] = [stage | sizes.get(stage["name"], {}) for stage in STAGES]
    real.save()
    given = {name: step.given for name, step in planned().items()}
    first, second = {"fn": "jsonl", "params": {"path": "a.jsonl"}}, {"fn": "mine:task"}
    assert given["traces"]["tasks"] == [first | {"size": 30}, second | {"size": 20}]
    assert given["rl"]["tasks"] == [{"fn": "own"}]
    assert given["student"]["tasks"] == [first, second]
    tested = [task | {"split": "test", "size": 5} for task in (first, second)]
    assert given["eval"]["tasks"] == given["traces"]["decontaminate"] == tested
    assert "tasks" not in given["cold_start"]


# States -------------------------------------------------------------------------------------------


def test_a_printed_line_does_by_hand_what_run_does(workplace, monkeypatch):
    assert set(workplace.states().values()) == {"pending"}
    text = workplace.chainforge("plan", "chain.yaml")
    assert not (workplace.folder / "runs").exists()  # a plan starts nothing
    for line in [line for line in text.splitlines() if line.startswith("python ")][:2]:
        workplace.shell(line)
    assert workplace.states() == {"traces": "done", "cold_start": "done", "rl": "pending"}
    folder = workplace.folder / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    moved = type(workplace)(folder)
    moved.shell(moved.plan("my runs")["traces"].shell)
    assert (folder / "my runs/fake/traces/manifest.json").is_file()


def test_what_changed_makes_the_stage_and_all_below_it_stale(workplace):
    (workplace.folder / "helper.py").write_text("STEP = 1")
    script = workplace.folder / "count.py"
    script.write_text("import helper\n" + script.read_text())
    workplace.configure("cold_start", steps=3, learning_rate="1e-4")
    elsewhere = workplace.plan(workplace.folder / "elsewhere")
    assert elsewhere["rl"].fingerprint == workplace.plan()["rl"].fingerprint
    workplace.run()
    workplace.configure("cold_start", learning_rate=0.0001, steps=3)  # the same number
    assert set(workplace.states().values()) == {"done"}
    workplace.configure("cold_start", steps=4, learning_rate="1e-4")
    plan = workplace.plan()
    assert workplace.states() == {"traces": "done", "cold_start": "stale", "rl": "stale"}
    assert plan["cold_start"].why == ["steps: 3 -> 4"]
    assert "model: cold_start changed" in plan["rl"].why[0]
    assert "steps: 3 -> 4" in workplace.chainforge("plan", "chain.yaml")
    words = ("plan", "chain.yaml", "--json", "--set", "cold_start.steps=3")
    shown = json.loads(workplace.chainforge(*words))
    assert [stage["state"] for stage in shown["stages"]] == ["done", "done", "done"]
    assert shown["stages"][1]["command"].endswith("--seed 1 --steps 3")
    workplace.configure("cold_start", steps=3, learning_rate="1e-4")
    (workplace.folder / "base/config.json").write_text('{"layers": 3}')
    assert workplace.states()["traces"] == "done"
    assert "model: base changed" in workplace.plan()["cold_start"].why[0]
    (workplace.folder / "helper.py").write_text("STEP = 2")
    step = workplace.plan()["traces"]
    assert (step.state, step.why) == ("stale", ["code or a file that the settings name changed"])


def test_a_place_where_no_stage_can_be_is_named(real):
    place = real.folder / "runs/fake/cold_start"
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with pytest.raises(InputError, match="stage cold_start: .*cold_start is a file where a folder"):
        commands()


# Adapters: the next stage gets the merged model, or the adapter if it asks for that ---------------


@pytest.fixture
def lora(tmp_path, monkeypatch):
    """Write a chain of two training stages and an evaluation; return its plan by stage."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("base", "config.json"), ("lora", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def plan(cold_start=None, rl=None, sets=(), base="base", last=()):
        settings = {"use_peft": True} | (cold_start or {})
        (tmp_path / "cold_start.yaml").write_text(yaml.safe_dump(settings))
        stages = [
            {"name": "cold_start", "recipe": "sft", "config": "cold_start.yaml", "model": "base",
             "data": "./rows.jsonl"},
            {"name": "rl", "recipe": "grpo", "model": "cold_start",
             "set": {"use_peft": True, "beta": 0.04} | (rl or {})},
            *last,
        ]  # fmt: skip
        text = yaml.safe_dump({"name": "c", "base": base, "stages": stages})
        (tmp_path / "chain.yaml").write_text(text)
        return planned(*sets)

    return plan


@pytest.mark.parametrize("adapter", [None, "merge", "continue"])
def test_the_next_stage_gets_what_it_asks_for(lora, adapter):
    steps = lora(rl={"adapter": adapter} if adapter else {})
    path = f"runs/c/cold_start/{'adapter' if adapter == 'continue' else 'model'}"
    assert steps["rl"].inputs["model"].path == path
    assert f"--model_name_or_path {path} " in steps["rl"].shell
    says = contracts(steps["rl"])
    assert says["starts from"] == f"cold_start: {path}"
    copy = "a frozen copy of " if adapter == "continue" else ""
    assert says["KL reference"] == f"the policy it starts from: {copy}{path} (beta 0.04)"
    trained = "the LoRA adapter that it is given" if copy else "a fresh LoRA adapter"
    assert says["trains"] == trained
    text = as_text(load_chain("chain.yaml"), "runs", list(steps.values()))
    assert f"KL reference  the policy it starts from: {copy}{path}" in text


def test_the_command_line_and_the_base_count_too(lora):
    step = lora(sets=["rl.adapter=continue", "rl.load_in_4bit=true", "rl.beta=0"])["rl"]
    assert step.inputs["model"].path == "runs/c/cold_start/adapter"
    assert contracts(step)["trains"] == "the QLoRA adapter that it is given"
    assert "KL reference" not in contracts(step)
    assert step.fingerprint != lora()["rl"].fingerprint
    step = lora(base="lora", cold_start={"adapter": "continue"})["cold_start"]
    assert step.inputs["model"].path == "lora"


EVAL = {"name": "eval", "recipe": "evaluate", "models": ["cold_start"]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cold_start": {"use_peft": False}, "rl": {"adapter": "continue"}},
         "stage rl: adapter: continue: stage cold_start trains all weights"),
        ({"cold_start": {"save": ["model"]}, "rl": {"adapter": "continue"}},
         "stage rl: needs cold_start/adapter, which cold_start does not save; add adapter"),
        ({"cold_start": {"save": ["adapter", "checkpoints"]}}, "rl: needs cold_start/model"),
        ({"cold_start": {"save": "adapter"}, "rl": {"adapter": "continue"}, "last": [EVAL]},
         "eval: needs cold_start/model"),
        ({"cold_start": {"adapter": "continue"}}, "adapter: continue: base is a plain model"),
        ({"base": "lora", "last": [EVAL | {"models": ["base"]}]}, "eval: base is a LoRA adapter"),
    ],
)  # fmt: skip
def test_what_is_not_left_is_refused_before_anything_runs(lora, given, words):
    with pytest.raises(InputError, match=words):
        lora(**given)
