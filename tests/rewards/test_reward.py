"""Rewards by configuration: how they are bound, called, limited, and what is refused up front."""

import json
import math

import pytest

from chainforge.core.errors import InputError
from chainforge.core.transcript import write
from chainforge.data.sources import example
from chainforge.rewards.reward import (
    RewardArgs,
    RewardFailed,
    check_applicable,
    load_rewards,
    score,
)

COLUMNS = {"id", "prompt", "answer", "task", "verifier"}
GOOD = write("Well.", "4")


def make(text, answer="4", task="sum", **extra):
    return example([{"role": "user", "content": text}], answer, task=task, **extra)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a reward file and return a loader of its functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(
        """
import asyncio
import math

together = most = 0

def concise(completion: str, max_words: int) -> float:
    words = len(completion.split())
    return min(1.0, max(0.0, 2 - words / max_words))

def half(text, answer, prompt, weighting=0.5):
    assert prompt[0]["role"] == "user"
    return weighting if answer in text else 0.0

def sometimes(text, answer):
    values = {"nan": math.nan, "inf": -math.inf, "huge": 1e300, "text": "1.0", "list": [1],
              "none": None, "true": True}
    if answer == "raise":
        raise KeyError("broken on purpose")
    return values.get(answer, 1.0)

def declared(completions, answer, prompts, trainer_state):
    return [len(c[0]["content"]) + len(a) for c, a in zip(completions, answer)]

def everything(completions, trainer_state, **kwargs):
    return [float(gold in c[0]["content"]) for c, gold in zip(completions, kwargs["solution"])]

def short(completions, **kwargs):
    return [1.0]

def explodes(completions, **kwargs):
    raise RuntimeError("in a batch")

def needs_ids(completion, completion_ids):
    return len(completion_ids)

async def later(completion, answer):
    global together, most
    together += 1
    most = max(most, together)
    await asyncio.sleep(0.01)
    together -= 1
    if answer == "raise":
        raise KeyError("broken on purpose")
    if answer == "exit":
        raise SystemExit(0)
    return most

async def later_batch(completions, answer, **kwargs):
    await asyncio.sleep(0)
    if "exit" in answer:
        raise SystemExit(0)
    return [float(gold) for gold in answer]

def get_scaled(scale: float):
    def scaled(completion):
        return scale * len(completion)
    return scaled

class Length:
    def __init__(self, power=1):
        self.power = power
    def __call__(self, completion):
        return len(completion) ** self.power
"""
    )

    def load(*names, columns=COLUMNS, **settings):
        specs = [{"fn": f"reward.py:{n}"} if isinstance(n, str) else n for n in names]
        return load_rewards(RewardArgs(rewards=specs, **settings), columns)

    return load


def spec(function, **rest):
    return {"fn": f"reward.py:{function}", **rest}


def test_the_default_is_correctness_and_format_in_trls_form():
    rewards = accuracy, form = load_rewards(RewardArgs(), COLUMNS)
    assert [(r.__name__, r.weight) for r in rewards] == [
        ("accuracy_reward", 1.0),
        ("format_reward", 0.2),
    ]
    rows = [make("a"), make("b"), make("c"), make("d", "")]
    scores = score(rewards, rows, [GOOD, write("Well.", "5"), "4", GOOD])
    assert [s.rewards["accuracy_reward"] for s in scores] == [1.0, 0.0, 0.0, None]
    assert [s.total for s in scores] == pytest.approx([1.2, 0.2, 0.0, 0.2])
    metrics = {}
    texts = [[{"role": "assistant", "content": text}] for text in (GOOD, "4")]
    batch = {
        "prompts": [[{"role": "user", "content": "?"}]] * 3,
        "completions": [*texts, write("Plain text.", "4")],
        "completion_ids": [[1], [2], [3]],
        "trainer_state": object(),
        "log_metric": metrics.__setitem__,
        "log_extra": lambda name, values: None,
        "environments": None,
        "answer": ["4", "4", "5"],
        "verifier": ["math", None, "exact"],
        "task": ["a", "a", "a"],
    }
    assert accuracy(**batch) == [1.0, 0.0, 0.0]
    assert form(**batch) == [1.0, 0.0, 1.0]
    assert metrics == {"rewards/accuracy_reward/failed": 0, "rewards/format_reward/failed": 0}


def test_arguments_come_from_columns_and_params_by_name(own):
    rewards = own(spec("concise", params={"max_words": 2}), "half")
    scores = score(rewards, [make("a"), make("b")], ["one two three", "4"])
    expected = [{"concise": 0.5, "half": 0.0}, {"concise": 1.0, "half": 0.5}]
    assert [s.rewards for s in scores] == expected
    # `params` win over columns, and absent values leave the default.
    (accuracy,) = own({"fn": "accuracy_reward", "params": {"verifier": "arithmetic"}})
    assert score([accuracy], [make("a")], [write("Well.", "2+2")])[0].total == 0.0
    (half,) = own("half", columns=COLUMNS | {"weighting"})
    rows = [make("a", weighting=0.25), make("b", weighting=None), make("c")]
    assert [s.total for s in score([half], rows, ["4"] * 3)] == [0.25, 0.5, 0.5]


def test_a_task_limits_a_reward_to_its_rows(own):
    rewards = own(spec("concise", params={"max_words": 1}, task="chat", weight=2))
    rows = [make("a", "1", task="chat"), make("b"), make("c", "333", task="chat")]
    assert [s.total for s in score(rewards, rows, ["x", "x", "x y"])] == [2.0, None, 0.0]
    batch = own(spec("declared", task="chat"))
    assert [s.total for s in score(batch, rows, ["x", "x", "xx"])] == [2.0, None, 5.0]
    assert score(rewards, [], []) == []
    with pytest.raises(InputError, match="rows have no `task`"):
        own({"fn": "format_reward", "task": "chat"}, columns={"answer", "prompt"})


def test_a_reward_that_needs_an_answer_does_not_apply_without_one(own):
    rewards = load_rewards(RewardArgs(), COLUMNS)
    rewards += own("half", "declared", spec("concise", params={"max_words": 1}))
    rows = [make("a", None), make("b"), make("c", None, task="chat")]
    scores = score(rewards, rows, [GOOD] * 3)
    assert [s.rewards["accuracy_reward"] for s in scores] == [None, 1.0, None]
    assert [s.rewards["half"] for s in scores] == [None, 0.5, None]
    assert [s.rewards["declared"] is None for s in scores] == [True, False, True]
    assert [s.rewards["format_reward"] for s in scores] == [1.0, 1.0, 1.0]
    assert all(s.rewards["concise"] is not None for s in scores)
    assert [reward.failed for reward in rewards] == [0] * 5
    check_applicable(rewards, rows)
    with pytest.raises(InputError, match="none applies to 2 of 3 rows, .* with answer None"):
        check_applicable([rewards[0], rewards[2]], rows)
    (lost,) = own({"fn": "format_reward", "task": "chta"}, columns=COLUMNS | {"task"})
    with pytest.raises(InputError, match="no row is of task 'chta'; did you mean 'chat'?"):
        check_applicable([*rewards, lost], rows)


def test_trls_own_rewards_by_name_with_params():
    overlong = {"params": {"max_completion_len": 100, "soft_punish_cache": 20}}
    specs = [
        {"fn": "soft_overlong"} | overlong,
        {"fn": "repetition_penalty", "params": {"ngram_size": 2}},
        {"fn": "cosine_scaled", "params": {"max_len": 100}},
        {"fn": "think_format_reward"},
        {"fn": "trl.rewards:get_soft_overlong_punishment", "name": "again"} | overlong,
        {"fn": "trl.rewards:accuracy_reward", "name": "trls"},
    ]
    rewards = load_rewards(RewardArgs(specs, transcript="think"), COLUMNS)
    text = write("Well.", "4", "think")
    (got,) = score(rewards, [make("a")], [text], [[5] * 90])
    assert got.rewards["soft_overlong_punishment_reward"] == got.rewards["again"] == -0.5
    assert got.rewards["repetition_penalty_reward"] == pytest.approx(-(1 - 1 / 89))
    expected = 0.5 + 0.25 * (1 + math.cos(0.9 * math.pi))
    assert got.rewards["cosine_scaled_reward"] == pytest.approx(expected)
    assert got.rewards["think_format_reward"] == 1.0
    assert [reward.failed for reward in rewards] == [0] * 6


def test_a_factory_is_called_with_params_and_a_batch_function_gets_all_columns(own):
    square = spec("Length", params={"power": 2}, name="square")
    rewards = own(spec("get_scaled", params={"scale": 3}), square, "everything")
    expected = {"scaled": 6.0, "square": 4.0, "everything": 1.0}
    assert score(rewards, [make("a", "x")], ["xx"])[0].rewards == expected


def test_token_ids_are_asked_for_where_there_are_none(own):
    rewards = own("needs_ids")
    assert score(rewards, [make("a")], ["x"], [[1, 2, 3]])[0].total == 3.0
    assert score(rewards, [make("a", completion_ids=[1, 2])], ["x"])[0].total == 2.0
    with pytest.raises(InputError, match="needs the token ids"):
        score(rewards, [make("a")], ["x"])


ACCURACY = {"fn": "accuracy_reward"}
REFUSED = [
    ({"fn": "acuracy_reward"}, "did you mean 'accuracy_reward'"),
    (ACCURACY | {"wieght": 1}, "unknown key 'wieght'.*did you mean 'weight'"),
    ({"weight": 1}, "rewards: expected `fn`, a function, or `model`"),
    ({"fn": "format_reward", "model": "x"}, "expected `fn`, a function, or `model`"),
    ({"model": "no/such-model"}, "reward no/such-model: no reward model here or on the Hub"),
    ({"fn": "reward_model", "params": {"model": "x", "part": "some"}}, "part: 'some'"),
    (["format_reward"], "rewards: expected a mapping"),
    ({"fn": 3}, "reward 3.fn: expected text, found a whole number"),
    (ACCURACY | {"weight": "much"}, "weight: expected a number"),
    (ACCURACY | {"weight": math.inf}, "weight is inf, it must be finite"),
    (ACCURACY | {"params": [1]}, "params: expected a mapping"),
    (ACCURACY | {"params": {"verifyer": 1}}, "did you mean 'verifier'"),
    (ACCURACY | {"params": {"verifier": "mathe"}}, "did you mean 'math'"),
    ({"fn": "language_consistency_reward", "params": {"language": "zhh"}}, "did you mean 'zh'"),
    ({"fn": "soft_overlong"}, "missing .* 'max_completion_len'"),
    ({"fn": "repetition_penalty", "params": {"max_penalty": 1}}, "not be positive"),
    (spec("concise"), "needs 'max_words' from a column or params"),
    (spec("half", params={"answre": 1}), "unknown key 'answre'; did you mean 'answer'"),
    (spec("concise", params={"max_word": 3}), "unknown key 'max_word'; did you mean 'max_words'"),
    (spec("concize"), "did you mean 'concise'"),
    ({"fn": "absent.py:f"}, "no such file"),
    ({"fn": "absent.module:f"}, "cannot be imported"),
    ({"fn": "bad.py:f"}, r"bad.py cannot be imported: line 3: ZeroDivisionError"),
]


def test_async_functions_run_together_and_fail_alone(own, caplog):
    rows = [
        make(f"q{n}", answer="raise" if n == 3 else "exit" if n == 5 else "4") for n in range(8)
    ]
    scores = [one.total for one in score(own(spec("later")), rows, [GOOD] * 8)]
    assert [n for n, value in enumerate(scores) if value is None] == [3, 5]
    assert max(value or 0 for value in scores) == 8  # all of them were under way at once
    assert (
        "later failed on 2 of 8 rows; the first: reward.py, line 44: KeyError: 'broken on purpose'"
        in caplog.text
    )
    for answers, expected in ((["exit", "1"], [None, None]), (["1", "2.5"], [1.0, 2.5])):
        rows = [make(answer, answer) for answer in answers]
        batch = score(own(spec("later_batch")), rows, [GOOD] * 2)
        assert [one.total for one in batch] == expected


@pytest.mark.parametrize(("entry", "message"), REFUSED)
def test_what_is_wrong_is_said_before_a_model_is_loaded(own, tmp_path, entry, message):
    (tmp_path / "bad.py").write_text("import math\n\nx = 1 / 0\n")
    with pytest.raises(InputError, match=message):
        own(entry)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": []}, "at least one"),
        ({"rewards": [{"fn": "format_reward"}] * 2}, "'format_reward' is there 2 times.*`name:`"),
        ({"transcript": "thinks"}, "no preset 'thinks'"),
        ({"max_reward_failures": 2}, "max_reward_failures"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        load_rewards(RewardArgs(**settings), COLUMNS)


def test_a_failing_row_is_neutral_counted_and_logged(own, caplog):
    for name, why in (("short", "returned 1 rewards for"), ("explodes", "in a batch")):
        (reward,) = own(name)
        assert reward([None] * 3, ["x"] * 3) == [None] * 3
        assert reward.failed == 3
        assert why in caplog.text
    (reward,) = own("sometimes")
    kinds = ["raise", "nan", "inf", "huge", "text", "list", "none", "true", "4"]
    metrics = {}
    rewards = reward([None] * 9, ["x"] * 9, log_metric=metrics.__setitem__, answer=kinds)
    assert rewards == [None, None, None, None, None, None, None, 1.0, 1.0]
    assert (reward.failed, reward.seen) == (6, 9)
    assert reward.nonfinite == "nan for a completion of row number 2"
    assert metrics == {"rewards/sometimes/failed": pytest.approx(6 / 9)}
    assert "broken on purpose" in caplog.text


def test_too_many_failures_stop_the_run(own):
    (reward,) = own("sometimes", max_reward_failures=0.25)
    good, bad = {"answer": ["4"] * 8}, {"answer": ["4"] * 5 + ["raise"] * 3}
    for _ in range(7):
        reward([None] * 8, ["x"] * 8, **bad)
    with pytest.raises(RewardFailed, match="sometimes failed on 38% .*broken on purpose"):
        reward([None] * 8, ["x"] * 8, **bad)
    (reward,) = own("sometimes", max_reward_failures=0.25)
    for columns in [good, bad] * 20:
        reward([None] * 8, ["x"] * 8, **columns)


@pytest.mark.parametrize(
    "ending",
    [
        "SystemExit(0)",
        "GeneratorExit()",
        "type('Abort', (BaseException,), {})('now')",
        "__import__('asyncio').CancelledError()",
    ],
)
def test_what_would_end_the_process_is_a_failure_of_the_reward(own, tmp_path, ending, caplog):
    (tmp_path / "ends.py").write_text(
        f"def row(completion):\n    raise {ending}\n"
        f"def batch(completions, **kwargs):\n    yield 1.0\n    raise {ending}\n"
        f"class Number:\n    def __float__(self):\n        raise {ending}\n"
        "def value(completion):\n    return Number()\n"
        f"def get_f(scale=1):\n    raise {ending}\n"
        f"def checked(c):\n    pass\ndef end(**p):\n    raise {ending}\nchecked.check = end\n"
    )
    for form in ("row", "batch", "value"):
        (reward,) = own({"fn": f"ends.py:{form}"})
        assert reward([None] * 2, ["x"] * 2) == [None] * 2
        assert reward.failed == 2
        assert f"reward {form} failed on 2 of 2 rows" in caplog.text
    (tmp_path / "module.py").write_text(f"raise {ending}\n")
    for name in ("ends.py:get_f", "ends.py:checked", "module.py:f"):
        with pytest.raises(InputError, match=name.partition(":")[0]):
            own({"fn": name})


def test_a_control_c_passes_through_a_reward(own, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "def f(completion):\n    os.kill(os.getpid(), signal.SIGINT)\n    return 1.0\n"
    )
    (reward,) = own({"fn": "slow.py:f"})
    with pytest.raises(KeyboardInterrupt):
        reward([None], ["x"])


def test_random_rewards_are_coin_flips_that_a_resumed_run_repeats():
    rows = [make(str(i)) for i in range(400)]
    texts = [write("Well.", "4" if i % 2 else "5") for i in range(400)]
    rewards = load_rewards(RewardArgs(random_rewards=True), COLUMNS)
    first = [s.rewards for s in score(rewards, rows, texts)]
    assert first == [s.rewards for s in score(rewards, rows, texts)]
    accuracy = [r["accuracy_reward"] for r in first]
    assert set(accuracy) == {0.0, 1.0}
    assert accuracy != [r["format_reward"] for r in first]
    for half in (accuracy[::2], accuracy[1::2]):  # Right and wrong answers earn the same.
        assert 60 < sum(half) < 140


def test_reasoning_gym_rows_from_end_to_end():
    metadata = {"source_dataset": "countdown", "numbers": [3, 8], "target": 24}
    entry = json.dumps({"question": "?", "answer": "8 * 3", "metadata": metadata})
    row = make("24 from 3 and 8", "8 * 3", verifier="reasoning_gym", entry=entry)
    rewards = load_rewards(RewardArgs(), set(row))
    texts = [write("Well.", text) for text in ("8 * 3", "3*8", "3+8")]
    assert [s.total for s in score(rewards, [row] * 3, texts)] == pytest.approx([1.2, 1.2, 0.2])
