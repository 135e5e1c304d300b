import math

import pytest

from chainforge.core.errors import InputError
from chainforge.train.dynamic import HOOKS, check_hooks
from chainforge.train.refill import is_mixed, prompts_to_ask


@pytest.mark.parametrize(
    ("verdicts", "mixed"),
    [([1, 0, 1], True), ([1, 1], False), ([0, 0], False), ([1, math.nan], False), ([1, 0, math.nan], True), ([], False)],
)  # fmt: skip
def test_mixed_is_right_and_wrong(verdicts, mixed):
    assert is_mixed(verdicts) is mixed


def test_as_many_prompts_are_asked_as_are_likely_to_do():
    assert prompts_to_ask(4, 8, 16, 16, 1) == 8
    assert prompts_to_ask(1, 15, 16, 16, 1) == 2
    assert prompts_to_ask(16, 0, 16, 16, 1) == 16  # no more at once than a batch
    for lacking in range(1, 9):
        for unit in (1, 2, 4):
            asked = prompts_to_ask(lacking, 8 - lacking, 8, 8, unit)
            assert lacking <= asked <= 8
            assert asked % unit == 0


def test_the_installed_trainer_has_the_hooks():
    from trl import GRPOTrainer

    check_hooks(GRPOTrainer)


@pytest.mark.parametrize(
    ("name", "words"), [("_generate", "is missing"), ("_calculate_rewards", "takes rows;")]
)
def test_a_trainer_of_another_version_is_refused(name, words):
    """As if TRL had renamed a method, or changed its arguments."""
    methods = {}
    for hook, arguments in HOOKS.items():
        scope = {}
        exec(f"def {hook}(self, {', '.join(arguments)}): pass", scope)
        methods[hook] = scope[hook]
    check_hooks(type("Trainer", (), methods))
    del methods[name]
    if "takes" in words:
        methods[name] = lambda self, rows: None
    with pytest.raises(InputError, match=rf"Trainer.{name} {words}.*tested with 1.16"):
        check_hooks(type("Trainer", (), methods))
