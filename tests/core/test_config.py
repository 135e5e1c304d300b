import dataclasses
import math
from typing import Any, Literal

import pytest

from chainforge.core.config import (
    RANGES,
    WORDS,
    _fields,
    given,
    parse,
    resolved,
    yaml_value,
)
from chainforge.core.errors import InputError
from chainforge.core.options import recipes


@dataclasses.dataclass
class Args:
    output_dir: str | None = None
    learning_rate: float = 1e-3
    max_steps: int = -1
    use_cpu: bool = False
    shuffle: bool = True
    weights: list[float] | None = None
    names: list[str] | None = None
    seed: int = 0
    tasks: list[dict[str, Any]] = dataclasses.field(
        default_factory=list, metadata={"help": "Each like fn. And more."}
    )
    styles: dict[str, float] = dataclasses.field(default_factory=lambda: {"careful": 1.0})
    kind: Literal["a", "b", "off"] = "a"
    hub_token: str | None = None
    label: str | None = None


@dataclasses.dataclass
class Other:
    batch: int = 8
    groups: int = 4

    def __post_init__(self):
        if self.batch % self.groups:
            raise ValueError(f"batch ({self.batch}) must be divisible by num_generations")


def run(tmp_path, yaml="", *argv):
    (tmp_path / "x.yaml").write_text(yaml)
    return parse(Args, Other, argv=["--config", str(tmp_path / "x.yaml"), *argv])


YAML = [
    ("1e-5", 1e-5), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-2.5e-04", -2.5e-4), ("010", 10),
    ("0o10", 8), ("0xff", 255), ("-7", -7), (".inf", math.inf), ("{min_lr: 1e-5}", {"min_lr": 1e-5}),
    ("'1e-5'", "1e-5"), ("1_000", "1_000"), ("1:30", "1:30"), ("2024-02-30", "2024-02-30"), ("1e", "1e"),
    ("no", "no"), ("On", "On"), ("True", True), ("~", None), ("", None),
    ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), YAML)
def test_values_are_those_of_yaml_1_2(text, value):
    assert yaml_value(text) == value
    assert type(yaml_value(text)) is type(value)


@pytest.mark.parametrize(
    ("yaml", "argv", "wanted"),
    [
        ("max_steps: 3\nlearning_rate: 1e-4", "--max_steps 5", {"max_steps": 5, "learning_rate": 1e-4}),
        ("styles: {careful: 1e-3}\nlearning_rate: 1E-3", "", {"styles": {"careful": 1e-3}, "learning_rate": 1e-3}),
        ("\ufeffseed: 3", "", {"seed": 3}),
        ("use_cpu: yes\nshuffle: off", "", {"use_cpu": True, "shuffle": False}),
        ("kind: off\nlabel: no", "", {"kind": "off", "label": "no"}),
        ("", "--use_cpu --shuffle=false", {"use_cpu": True, "shuffle": False}),
        ("names: all-linear", "", {"names": ["all-linear"]}),
        ("names: [a]", "--names []", {"names": []}),
        ("", "--names a b --weights 1 2.5", {"names": ["a", "b"], "weights": [1.0, 2.5]}),
        ("max_steps: -1\nlearning_rate: 0", "", {"max_steps": -1, "learning_rate": 0.0}),
        ("seed: 4294967295\ntasks: [{fn: a}]", "", {"seed": 4294967295, "tasks": [{"fn": "a"}]}),
        ("", '--styles {"careful":1e-05} --tasks [{"fn":2}]', {"styles": {"careful": 1e-5}, "tasks": [{"fn": 2}]}),
    ],
)  # fmt: skip
def test_values_are_what_they_say(tmp_path, yaml, argv, wanted):
    args, _ = run(tmp_path, yaml, *argv.split())
    assert {key: getattr(args, key) for key in wanted} == wanted


# A YAML, the words after it, and what the message says.
WRONG = [
    ("learning_rat: 1", "", "x.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ("", "--learning_rat 1", "unknown option --learning_rat; did you mean 'learning_rate'"),
    (
        "lr: 1\nfoo: 2\nmax_steps: x",
        "--bar --steps=1",
        r"(?s)'lr'; did you mean 'learning_rate'.*'foo'; see --help-all\n.*x.yaml: max_steps: expected int.*--bar; see.*--steps; did",
    ),
    ("learning_rate: .nan", "", "x.yaml: learning_rate: expected a finite number .*found nan"),
    ("learning_rate: .inf", "", "learning_rate: expected a finite number of at least 0"),
    ("", "--learning_rate -1", "--learning_rate: expected a finite number of at least 0, found -1"),
    ("seed: 10000000000000000000", "", "seed: .* at most 4294967295"),
    ("max_steps:", "", "max_steps: expected int, found None"),
    ("weights: [1, x]", "", r"weights: expected list\[float\] | None, found \[1, 'x'\]"),
    ("tasks: {fn: a}", "", "tasks: expected list"),
    ("tasks: [a]", "", r"tasks: expected list\[dict\[str, Any\]\], found \['a'\]"),
    ("output_dir: false", "", "output_dir: expected str .*found False"),
    ("", "--max_steps x", "--max_steps: expected int, found 'x'"),
    ("a: 1\nmax_steps: 1\nmax_steps: 2", "", "x.yaml: line 3: the key 'max_steps' is given twice"),
    ("", "--hub_token abc", "command line: hub_token: a secret must not be"),
    (
        "optim: {lr: 1, foo: {bar: 1}}",
        "",
        "(?s)'optim.lr'; did you mean 'learning_rate'.*'optim.foo'; see",
    ),
    ("- a", "", "expected `key: value` lines"),
    ("a: [", "", "x.yaml: not YAML"),
    (
        "seed: 1\n\tuse_cpu: true",
        "",
        "x.yaml: not YAML: line 2, 'use_cpu: true': a tab cannot indent",
    ),
    ("seed: 1\nlearning_rate = 1", "", "not YAML: line 2, 'learning_rate = 1': could not find"),
    ("tasks:\n  - {fn: a}\n   - {fn: b}", "", "line 3, '- .fn: b.': .* indented as line 2?"),
    ("tasks:\n  - {fn: a\n  - {fn: b}", "", "line 3, .*; is the bracket of line 2 closed?"),
    ("system_prompt: Answer: yes", "", "line 1, .*: this colon starts no value; quote"),
    ("tasks: gsm8k", "", r"tasks: expected list\[dict.*found 'gsm8k' \(str\): Each like fn"),
    ("seed: true", "", r"seed: expected int, found True \(bool\)"),
    ("kind: c", "", "kind: expected one of a, b, off, found 'c'"),
    ("kind: [a]", "", r"kind: expected one of a, b, off, found \['a'\]"),
    ("preset: gone.yaml", "", "preset: .*gone.yaml: no such file"),
    ("a: " + "[" * 10_000, "", "x.yaml: not YAML"),
    ("a: 1\nb: " + "9" * 5000, "", "x.yaml: not YAML"),
    ("a: !!python/name:os.system", "", "x.yaml: not YAML"),
    ("batch: 6", "", "x.yaml: .*divisible by num_generations.*make that a multiple of num_gen"),
    ("", "--config no/such.yaml", "no/such.yaml: no such file"),
    ("", "--config", "--config takes one YAML file"),
]


@pytest.mark.parametrize(("yaml", "argv", "words"), WRONG)
def test_wrong_input_is_one_clear_message(tmp_path, yaml, argv, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path, yaml, *argv.split())


def test_given_merges_as_parse_does(tmp_path):
    (tmp_path / "x.yaml").write_text("max_steps: 3\nrate: 1e-4\n")
    words = ["--max_steps", "5", "--data", "a", "b", "--flag"]
    wanted = {"max_steps": 5, "rate": 1e-4, "data": ["a", "b"], "flag": True}
    assert given([f"--config={tmp_path}/x.yaml", *words]) == wanted


def test_resolved_holds_what_differs_and_no_secret():
    assert resolved(Args(max_steps=4, hub_token="s3cret"), Other()) == {"max_steps": 4}


def test_a_preset_is_below_the_yaml_and_the_yaml_below_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("max_steps: 1\nlearning_rate: 1\nbatch: 16\n")
    (tmp_path / "x.yaml").write_text("preset: mine.yaml\nmax_steps: 2\nlearning_rate: 2\n")
    argv = ["--config", str(tmp_path / "x.yaml"), "--max_steps", "3"]
    args, other = parse(Args, Other, argv=argv)
    assert (args.max_steps, args.learning_rate, other.batch) == (3, 2, 16)
    # What it says is what the stage is made from, whatever it is called.
    assert given(argv) == {"max_steps": 3, "learning_rate": 2, "batch": 16}
    (tmp_path / "other.yaml").write_text("batch: 64\n")
    assert given([*argv, "--preset", str(tmp_path / "other.yaml")])["batch"] == 64


@pytest.mark.parametrize(
    ("preset", "text", "words"),
    [
        ("modren", "", "preset: no 'modren' .*did you mean 'modern'"),
        ("[modern]", "", "preset: no .*modern.* did you mean 'modern'"),
        ("mine.yaml", "batch: 8\nbath: 8\n", "mine.yaml: unknown key 'bath'; did you mean 'batch'"),
        ("mine.yaml", "preset: modern\n", "mine.yaml: unknown key 'preset'"),
        ("gspo", "", "gspo.yaml: unknown key 'importance_sampling_level'"),
    ],
)
def test_a_preset_is_read_as_strictly_as_the_rest(tmp_path, preset, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        run(tmp_path, f"preset: {preset}\n")


def test_the_tables_name_options_that_some_recipe_has():
    assert set(RANGES) | set(WORDS) <= set(_fields(sum(recipes().values(), ())))


@pytest.mark.parametrize("text", [
    "loss_type: gpro", "scale_rewards: groups", "scale_rewards: off", "vllm_mode: colocated", "repetition_penalty: 0",
    "importance_sampling_level: seq", "temperature: 0", "top_p: 2.0", "accelerator_config: gone.json",
])  # fmt: skip
def test_what_trl_would_find_out_late_is_found_at_once(text, tmp_path):
    from trl import GRPOConfig

    (tmp_path / "x.yaml").write_text(f"output_dir: o\nuse_cpu: true\nbf16: false\n{text}\n")
    with pytest.raises(InputError, match=text.partition(": ")[2]):
        parse(GRPOConfig, argv=["--config", str(tmp_path / "x.yaml")])
