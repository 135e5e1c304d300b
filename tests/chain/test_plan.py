"""Planning a chain: the commands are the plain ones, the states are true."""

import json

import pytest

from chainforge.chain.plan import Overrides, contracts, option_words, plan_chain, read_sets
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError
from chainforge.core.paths import shipped

STAGES = [
    {"name": "traces", "recipe": "collect", "config": "collect.yaml"},
    {"name": "cold", "recipe": "sft", "config": "sft.yaml", "model": "base", "data": ["traces"]},
    {
        "name": "reason",
        "recipe": "grpo",
        "config": "grpo.yaml",
        "model": "cold",
        "set": {"max_steps": 3},
    },
    {"name": "pupil", "recipe": "distill", "model": "base", "teacher_model": "reason"},
    {"name": "scores", "recipe": "evaluate", "models": ["base", "reason"]},
]


@pytest.fixture
def real(workplace):
    """A chain of the recipes that ChainForge ships; nothing of it is run here."""
    for name in ("collect", "sft", "grpo"):
        workplace.configure(name)
    workplace.chain |= {"stages": STAGES, "transcript": "think"}
    del workplace.chain["launch"]
    workplace.save()
    return workplace


def command_lines(overrides=None):
    chain = load_chain("chain.yaml")
    return {step.stage.name: step.shell for step in plan_chain(chain, "runs", overrides)}


def test_commands_are_what_one_would_type(real):
    lines = command_lines()
    recipes = shipped("recipes")
    assert lines["traces"] == (
        f"python {recipes}/collect.py --config collect.yaml --output_dir runs/fake/traces "
        "--seed 1 --transcript think"
    )
    assert lines["cold"] == (
        f"accelerate launch {recipes}/sft.py --config sft.yaml --model_name_or_path base "
        "--data runs/fake/traces --output_dir runs/fake/cold --seed 1 --transcript think"
    )
    assert "--model_name_or_path runs/fake/cold/model" in lines["reason"]
    assert lines["reason"].endswith("--seed 1 --transcript think --max_steps 3")
    assert "--teacher_model_name_or_path runs/fake/reason/model" in lines["pupil"]
    assert "--models base=base reason=runs/fake/reason/model " in lines["scores"]


def test_what_rl_leaves_is_a_pool_and_what_is_measured_a_gate(real):
    more = [
        {"name": "harvest", "recipe": "reject", "data": "reason"},
        {"name": "picks", "recipe": "reject", "model": "reason"},
        {"name": "final", "recipe": "grpo", "model": "reason", "data": "picks"},
    ]
    real.chain["stages"] = STAGES + more
    real.save()
    lines = command_lines()
    assert "reject.py --pool runs/fake/reason --output_dir runs/fake/harvest" in lines["harvest"]
    assert (
        "grpo.py --model_name_or_path runs/fake/reason/model --gate_pool runs/fake/picks "
        in (lines["final"])
    )
    steps = {step.stage.name: step for step in plan_chain(load_chain("chain.yaml"), "runs")}
    assert steps["harvest"].inputs["data.0"].fingerprint == steps["reason"].fingerprint
    assert steps["final"].inputs["data.0"].fingerprint == steps["picks"].fingerprint


def test_what_samples_is_launched_only_when_its_own_stage_says_so(real):
    picks = {"name": "picks", "recipe": "reject", "model": "reason"}
    real.chain |= {"stages": [*STAGES, picks], "launch": "ddp"}
    real.save()
    lines = command_lines()
    assert lines["reason"].startswith("accelerate launch --config_file ")
    assert lines["picks"].startswith("python ")
    assert lines["scores"].startswith("python ")
    picks["launch"] = "ddp"
    real.chain["stages"] = [*STAGES, picks]
    real.save()
    assert "ddp.yaml" in command_lines()["picks"]


def test_what_makes_data_looks_out_for_what_the_chain_evaluates(real):
    real.configure("scores")
    (real.folder / "picks.yaml").write_text("decontaminate: [mine.jsonl, scores.yaml]\n")
    scores = {"name": "scores", "recipe": "evaluate", "config": "scores.yaml", "models": ["base"]}
    picks = {"name": "picks", "recipe": "reject", "config": "picks.yaml", "model": "reason"}
    plain = {"name": "plain", "recipe": "reject", "model": "reason", "set": {"decontaminate": "x"}}
    real.chain["stages"] = [*STAGES[:-1], picks, plain, scores]
    real.save()
    lines = command_lines()
    assert lines["traces"].endswith("--decontaminate scores.yaml")
    assert lines["picks"].endswith("--decontaminate mine.jsonl scores.yaml")
    assert lines["plain"].endswith("--decontaminate x scores.yaml")
    assert "decontaminate" not in lines["cold"] + lines["reason"] + lines["scores"]
    before = {
        step.stage.name: step.fingerprint for step in plan_chain(load_chain("chain.yaml"), "runs")
    }
    (real.folder / "scores.yaml").write_text("steps: 9\n")
    after = {
        step.stage.name: step.fingerprint for step in plan_chain(load_chain("chain.yaml"), "runs")
    }
    assert before["traces"] != after["traces"]


def test_paths_are_short_in_a_checkout(real, monkeypatch):
    monkeypatch.chdir(shipped("recipes").parent)
    step = plan_chain(load_chain(real.folder / "chain.yaml"), "runs")[1]
    assert step.command[:3] == ["accelerate", "launch", "recipes/sft.py"]


def test_the_command_line_wins_over_the_stage_and_the_stage_over_the_chain(real):
    chain = load_chain("chain.yaml")
    sets = read_sets(chain, ["reason.max_steps=5", "cold.stop=[a, b]"])
    lines = command_lines(Overrides(launch="ddp", sets=sets, seed=9))
    configs = shipped("accelerate_configs")
    assert lines["cold"].startswith(f"accelerate launch --config_file {configs}/ddp.yaml ")
    assert lines["cold"].endswith("--seed 9 --transcript think --stop a b")
    assert lines["reason"].endswith("--seed 9 --transcript think --max_steps 5")
    assert lines["traces"].startswith("python ")
    assert command_lines(Overrides(launch="none"))["cold"].startswith("python ")


@pytest.mark.parametrize("text", ["reason", "max_steps=3", "raeson.max_steps=3", "reason.data=x"])
def test_a_wrong_set_is_refused(real, text):
    with pytest.raises(InputError):
        read_sets(load_chain("chain.yaml"), [text])


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


def test_the_kl_reference_is_named_where_there_is_one(real):
    real.configure("grpo", beta="1e-2")
    steps = {step.stage.name: step for step in plan_chain(load_chain("chain.yaml"), "runs")}
    reference = dict(contracts(steps["reason"]))["KL reference"]
    assert "runs/fake/cold/model" in reference
    assert "0.01" in reference
    assert dict(contracts(steps["cold"]))["starts from"] == "base: base"
    real.configure("grpo", beta=0)
    steps = {step.stage.name: step for step in plan_chain(load_chain("chain.yaml"), "runs")}
    assert "KL reference" not in dict(contracts(steps["reason"]))


def test_a_plan_starts_nothing(workplace):
    assert set(workplace.states().values()) == {"pending"}
    assert not (workplace.folder / "runs").exists()


def test_a_printed_line_does_by_hand_what_run_does(workplace):
    text = workplace.chainforge("plan", "chain.yaml")
    for line in [line for line in text.splitlines() if line.startswith("python ")][:2]:
        workplace.shell(line)
    assert workplace.states() == {"traces": "done", "cold": "done", "reason": "pending"}


def test_paths_with_spaces_are_quoted(workplace, monkeypatch):
    folder = workplace.folder / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    moved = type(workplace)(folder)
    moved.shell(moved.plan("my runs")["traces"].shell)
    assert (folder / "my runs/fake/traces/manifest.json").is_file()


def test_a_changed_setting_makes_the_stage_and_all_below_it_stale(workplace):
    workplace.run()
    assert set(workplace.states().values()) == {"done"}
    workplace.configure("cold", steps=4)
    plan = workplace.plan()
    assert workplace.states() == {"traces": "done", "cold": "stale", "reason": "stale"}
    assert plan["cold"].why == ["steps: 3 -> 4"]
    assert "model: cold changed" in plan["reason"].why[0]
    assert "steps: 3 -> 4" in workplace.chainforge("plan", "chain.yaml")
    shown = json.loads(
        workplace.chainforge("plan", "chain.yaml", "--json", "--set", "cold.steps=3")
    )
    assert [stage["state"] for stage in shown["stages"]] == ["done", "done", "done"]
    assert shown["stages"][1]["command"].endswith("--seed 1 --steps 3")


def test_writing_a_number_otherwise_changes_nothing(workplace):
    workplace.configure("cold", steps=3, learning_rate="1e-4")
    workplace.run(until="cold")
    workplace.configure("cold", learning_rate=0.0001, steps=3)
    assert workplace.states()["cold"] == "done"


def test_a_changed_base_model_is_noticed(workplace):
    workplace.run()
    (workplace.folder / "base/config.json").write_text('{"layers": 3}')
    assert workplace.states()["traces"] == "done"
    assert "model: base changed" in workplace.plan()["cold"].why[0]


def test_a_result_that_lost_a_file_is_stale(workplace):
    workplace.run()
    (workplace.folder / "runs/fake/cold/model/config.json").unlink()
    assert workplace.states()["cold"] == "stale"
    assert "model/config.json is missing" in workplace.plan()["cold"].why[0]


def test_where_the_runs_lie_changes_no_fingerprint(workplace):
    here, there = workplace.plan(), workplace.plan(workplace.folder / "elsewhere")
    for name, step in here.items():
        assert there[name].fingerprint == step.fingerprint


def test_a_recipe_of_ones_own_that_changed_makes_its_stages_stale(workplace):
    (workplace.folder / "helper.py").write_text("STEP = 1")
    script = workplace.folder / "count.py"
    script.write_text("import helper\n" + script.read_text())
    workplace.run(until="traces")
    assert workplace.states()["traces"] == "done"
    (workplace.folder / "helper.py").write_text("STEP = 2")
    step = workplace.plan()["traces"]
    assert (step.state, step.why) == ("stale", ["code or a file that the settings name changed"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: place.write_text("mine"), "cold is a file where a folder belongs"),
        (lambda place: place.symlink_to(place.parent / "file"), "fake/file is a file where"),
        (lambda place: place.symlink_to(place.parent / "file/x"), "fake/file is a file where"),
        (lambda place: place.symlink_to(place), "a link that leads to itself"),
    ],
)
def test_a_place_where_no_stage_can_be_is_named(real, make, words):
    place = real.folder / "runs/fake/cold"
    place.parent.mkdir(parents=True)
    (place.parent / "file").touch()
    place.symlink_to(place.parent / "to/be/made")
    assert command_lines()["cold"]
    place.unlink()
    make(place)
    with pytest.raises(InputError, match=f"stage cold: .*{words}"):
        command_lines()


def test_a_chain_gives_its_tasks_once_for_all_stages_that_ask_any(real):
    real.chain["tasks"] = [{"fn": "jsonl", "params": {"path": "a.jsonl"}}, {"fn": "mine:task"}]
    (real.folder / "a.jsonl").write_text("{}\n")
    stages = {stage["name"]: dict(stage) for stage in STAGES}
    stages["traces"]["size"], stages["scores"]["size"] = [30, 20], 5
    real.configure("grpo", tasks=[{"fn": "own"}])
    real.chain["stages"] = list(stages.values())
    real.save()
    given = {s.stage.name: s.given for s in plan_chain(load_chain("chain.yaml"), "runs")}
    first, second = {"fn": "jsonl", "params": {"path": "a.jsonl"}}, {"fn": "mine:task"}
    assert given["traces"]["tasks"] == [first | {"size": 30}, second | {"size": 20}]
    assert given["reason"]["tasks"] == [{"fn": "own"}]
    assert given["pupil"]["tasks"] == [first, second]
    tested = [task | {"split": "test", "size": 5} for task in (first, second)]
    assert given["scores"]["tasks"] == given["traces"]["decontaminate"] == tested
    assert "tasks" not in given["cold"]
    (real.folder / "t.yaml").write_text("tasks: [{fn: mine:task}]\n")
    real.chain["tasks"] = "t.yaml"
    real.save()
    with pytest.raises(InputError, match="stage traces: key 'size': give one number"):
        load_chain("chain.yaml")
    stages["traces"]["size"] = "many"
    real.save()
    with pytest.raises(InputError, match="stage traces: key 'size' must be a number of rows"):
        load_chain("chain.yaml")
