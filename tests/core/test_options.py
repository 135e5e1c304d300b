import re

import pytest

from chainforge.core.config import parse
from chainforge.core.options import recipes, tables


@pytest.fixture(scope="module")
def kinds():
    return recipes()


def shown(kinds, capsys, option):
    with pytest.raises(SystemExit) as end:
        parse(*kinds, argv=["--config", "no/such.yaml", option])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "own", "theirs"), [
    ("grpo", ["tasks", "rewards", "rollout_engine"], ["model_name_or_path", "num_generations", "output_dir"]),
    ("sft", ["data", "transcript", "save"], ["learning_rate", "max_length"]),
    ("reject", ["output_dir", "num_samples", "select"], []),
])  # fmt: skip
def test_help_shows_our_settings_and_then_the_most_used_of_trl(recipe, own, theirs, kinds, capsys):
    text = shown(kinds[recipe], capsys, "--help")
    names = re.findall(r"^  --(\w+)", text, re.M)
    assert [name for name in names if name in own + theirs] == own + theirs
    assert len(text.splitlines()) < 200
    assert len(set(names)) == len(names)
    everything = shown(kinds[recipe], capsys, "--help-all")
    all_names = set(re.findall(r"^  --(\w+)", everything, re.M))
    assert set(names) <= all_names
    assert "hub_token" not in all_names
    assert (f"... all {len(all_names)} with --help-all" in text) == bool(theirs)
    assert "transformers.TrainingArguments: all others" in everything or not theirs


def test_help_says_type_choices_and_default(kinds, capsys):
    text = shown(kinds["grpo"], capsys, "--help")
    assert (
        "  --health  warn | stop | off\n      Action when a health rule fires. (default: warn)"
        in text
    )
    assert "  --dtype  auto | bfloat16 | float16 | float32\n" in text
    assert re.search(r"--num_generations  int\n(      .*\n)*?      .*\(default: 8\)", text)


def test_the_documentation_has_the_same_table(kinds):
    text = tables(kinds["grpo"])
    assert (
        "| `health` | `warn \\| stop \\| off` | `warn` | Action when a health rule fires. |" in text
    )
    assert text.index("### How a completion is scored") < text.index("### TRL: model")
    assert "`num_generations`" in text
    assert "`adam_beta1`" not in text
