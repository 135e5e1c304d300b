"""What the project shows users how to write: their own reward, their own task."""

from pathlib import Path

import pytest

from chainforge.data.sources import split_of
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.reward import RewardArgs, load_rewards, score

ROOT = Path(__file__).parents[2]


def test_the_reward_of_the_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = {"fn": "recipes/custom/reward.py:concise", "weight": 0.1, "params": {"max_words": 4}}
    rewards = load_rewards(RewardArgs(rewards=[spec]), {"id", "answer"})
    texts = ["one two", "a b c d e f", "a b c d e f g h i"]
    totals = [points.total for points in score(rewards, [{}] * 3, texts)]
    assert totals == [pytest.approx(0.1), pytest.approx(0.05), 0]


def test_the_task_of_the_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    fn = "recipes/custom/task.py:ages"
    split = {
        name: load_examples(TaskArgs([{"fn": fn, "size": 50, "split": name}]))
        for name in ("train", "test")
    }
    for name, rows in split.items():
        questions = [row["prompt"][-1]["content"] for row in rows]
        assert {split_of(question) for question in questions} == {name}
        assert {row["verifier"] for row in rows} == {"exact"}
    assert not {row["id"] for row in split["train"]} & {row["id"] for row in split["test"]}
