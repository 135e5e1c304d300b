"""Scores, the rollouts of GRPO, pools of samples, and pass rates that choose prompts."""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.data.select import read_pool
from chainforge.data.sources import example
from chainforge.generate.rollouts import GateArgs, Recorder, gate, score_samples
from chainforge.generate.sampling import sample
from chainforge.rewards.reward import RewardArgs, load_rewards

END = 2
FORM = "<reasoning_process>so</reasoning_process>\n<summary>{}</summary>"
TRAINING = SimpleNamespace(
    num_generations=2, temperature=1.0, top_p=1.0, top_k=0, max_completion_length=8
)


def prompts(count=2):
    turns = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(count)]
    return [example(turn, str(n + 1), task="t", verifier="exact") for n, turn in enumerate(turns)]


def recorder(directory, **settings):
    return Recorder(directory, load_rewards(RewardArgs(**settings), set(prompts()[0])), TRAINING,
                    model="m", transcript="r1-cold-start", end=END)  # fmt: skip


def roll(recorder, step, rows, texts, log_metric=lambda name, value: None):
    """Call the rewards as TRL does: one after the other, every row's columns beside them."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return [
        reward(
            prompts=[row["prompt"] for row in rows],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[[5, END] if text else [5, 5, 5] for text in texts],
            trainer_state=SimpleNamespace(global_step=step),
            log_metric=log_metric,
            log_extra=lambda name, values: None,
            **columns,
        )
        for reward in recorder.rewards
    ]


@pytest.mark.parametrize(
    ("completion", "verdicts", "reward"),
    [
        (FORM.format(4), (True, True, True, "4"), 1.2),
        (FORM.format(5), (False, False, True, "5"), 0.2),
        ("3 + 1 = 4, so the answer is 4", (False, True, False, "4"), 0.0),
    ],
)
def test_verdicts_strict_and_lenient(completion, verdicts, reward):
    row = prompts(4)[3] | {"completion": completion}
    (scored,) = score_samples([row], "r1-cold-start", load_rewards(RewardArgs(), set(row)))
    names = ("correct", "lenient_correct", "formatted", "extracted")
    assert tuple(scored[name] for name in names) == verdicts
    assert scored["reward"] == pytest.approx(reward)


def test_a_completion_with_a_special_token_is_marked(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["[END]"], special_tokens=True)
    for end, mark in (("", None), ("[END]", "[END]"), ("</s>", "</s>")):
        row = prompts(1)[0] | {"completion": FORM.format(1) + end}
        (verdict,) = score_samples([row], "r1-cold-start", tokenizer=made)
        assert verdict.get("chat_token") == mark


@pytest.mark.parametrize("settings", [{}, {"random_rewards": True}])
def test_an_evaluation_logs_its_strict_accuracy_and_no_rollouts(tmp_path, settings):
    log = recorder(tmp_path, **settings)
    log.held_out = True
    told = []
    texts = [FORM.format(1), FORM.format(7)]
    roll(log, 0, prompts(), texts, lambda name, value: told.append((name, value)))
    assert [pair for pair in told if pair[0] == "accuracy"] == [("accuracy", 1), ("accuracy", 0)]
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_every_rollout_is_kept_with_its_rewards_step_and_policy(tmp_path):
    (stage := tmp_path / "reason").mkdir()
    log = recorder(stage)
    first, second = prompts()
    rows = [first, first, second, second]
    texts = [FORM.format(1), FORM.format(7), "", FORM.format(2)]
    told = defaultdict(list)
    values = roll(log, 0, rows, texts, lambda name, value: told[name].append(value))
    # In float32 TRL's own share of groups that score alike stays at 0.
    assert (told["frac_zero_advantage"], told["frac_mixed_correctness"]) == ([0, 0], [1, 1])
    assert (told["accuracy"], told["formatted"]) == ([1, 0, 0, 1], [1, 1, 0, 1])
    assert values == [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]]
    told.clear()
    texts[1] = texts[0]
    roll(log, 1, rows, texts, lambda name, value: told[name].append(value))
    assert (told["frac_zero_advantage"], told["frac_mixed_correctness"]) == ([1, 0], [0, 1])
    assert log.close() == 8
    logged = read_rows(stage / "rollouts.jsonl")
    assert [row["step"] for row in logged] == [1] * 4 + [2] * 4
    one = logged[0]
    assert {key: one[key] for key in first} == first
    assert one["rewards"] == {"accuracy_reward": 1.0, "format_reward": 1.0}
    assert one["reward"] == pytest.approx(1.2)
    columns = ("correct", "formatted", "finish_reason", "tokens", "sample")
    assert [tuple(row[name] for name in columns) for row in logged[:4]] == [
        (True, True, "stop", 2, 0),
        (False, True, "stop", 2, 1),
        (False, False, "length", 3, 0),
        (True, True, "stop", 2, 1),
    ]
    assert (one["policy"], logged[4]["policy"], one["stage"]) == ("reason@0", "reason@1", "reason")


@pytest.mark.parametrize(
    "settings",
    [
        {"rewards": [{"fn": "format_reward"}]},
        {"rewards": [{"fn": "accuracy_reward", "params": {"lenient": True}}]},
        {"random_rewards": True},
    ],
)
def test_shaped_or_random_rewards_are_no_verdict(tmp_path, settings):
    log = recorder(tmp_path, **settings)
    roll(log, 0, prompts(), [FORM.format(1)] * 2)
    log.close()
    assert [row["correct"] for row in read_rows(tmp_path / "rollouts.jsonl")] == [None, None]


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path):
    log = recorder(tmp_path)
    for step in range(4):
        roll(log, step, prompts(), [FORM.format(1)] * 2)
    path = tmp_path / "rollouts.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"torn')
    again = recorder(tmp_path)
    again.resume(2)
    assert [row["step"] for row in read_rows(path)] == [1, 1, 2, 2]
    roll(again, 2, prompts(), [FORM.format(1)] * 2)
    assert again.close() == 6
    fresh = recorder(tmp_path)
    fresh.resume(0)
    assert read_rows(path) == []


def test_processes_write_apart_and_are_merged_by_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    logs = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        logs.append(recorder(tmp_path))
        logs[-1].resume(0)
        for step in range(2):
            roll(logs[-1], step, [prompts()[rank]] * 2, [FORM.format(1)] * 2)
    monkeypatch.setenv("RANK", "0")
    assert logs[0].close() == 8
    rows = read_rows(tmp_path / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.jsonl"]


def test_a_pool_renumbers_samples_and_says_where_they_are_from(tmp_path):
    log = recorder(tmp_path / "reason")
    for step in range(3):
        roll(log, step, prompts(), [FORM.format(1)] * 2)
    log.close()
    others = [row | {"completion": "x", "sample": 0, "drop": "wrong"} for row in prompts(1)]
    (tmp_path / "picks").mkdir()
    write_rows(tmp_path / "picks/samples.jsonl", others)
    pool = read_pool([str(tmp_path / "reason"), str(tmp_path / "picks")])
    keys = [(row["id"], row["sample"]) for row in pool]
    assert len(keys) == len(set(keys)) == 7
    assert not any("drop" in row for row in pool)
    assert {row["pooled_from"] for row in pool} == {"reason", "picks"}


RATES = {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}


@pytest.fixture
def pool(tmp_path):
    """Four samples of five prompts, right as often as `RATES` says; rewards say something else."""
    rows = [
        sample(row, f"{n}", n, source="policy", correct=n < RATES[place] * 4, reward=n * 0.1)
        for place, row in enumerate(prompts(5))
        for n in range(4)
    ]
    write_rows(tmp_path / "samples.jsonl", rows)
    return str(tmp_path)


def test_prompts_are_chosen_by_how_often_they_were_solved(pool):
    rows, counts = gate(prompts(6), GateArgs(gate_pool=pool))
    assert [row["pass_rate"] for row in rows] == [0.25, 0.5, 0.75]
    assert counts == {"in": 6, "kept": 3, "too_hard": 1, "too_easy": 1, "unmeasured": 1}
    rows, _ = gate(prompts(5), GateArgs(gate_pool=pool, min_pass_rate=0.5, max_pass_rate=1.0))
    assert [row["pass_rate"] for row in rows] == [0.5, 0.75, 1.0]
    assert gate(prompts(6), GateArgs()) == (prompts(6), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "0 <= least <= largest"),
        ({"min_pass_rate": 0.6, "max_pass_rate": 0.7}, "no prompt has a pass rate"),
        ({"gate_pool": "nowhere"}, "nowhere: no samples"),
    ],
)
def test_bad_gates(pool, changes, message):
    with pytest.raises(InputError, match=message):
        gate(prompts(5), GateArgs(**{"gate_pool": pool} | changes))
