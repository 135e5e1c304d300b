import dataclasses
from typing import Any, Literal

import pytest

from chainforge.core.config import given, parse, resolved
from chainforge.core.errors import InputError


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
    tasks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
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
            raise ValueError(
                f"generation_batch_size ({self.batch}) must be divisible by num_generations"
            )


def run(tmp_path, yaml="", *argv):
    (tmp_path / "x.yaml").write_text(yaml)
    return parse(Args, Other, argv=["--config", str(tmp_path / "x.yaml"), *argv])


def test_command_line_over_yaml_over_defaults(tmp_path):
    args, other = run(
        tmp_path, "max_steps: 3\nlearning_rate: 1e-4\n", "--max_steps", "5", "--batch=4"
    )
    assert (args.max_steps, args.learning_rate, args.use_cpu, other.batch) == (5, 1e-4, False, 4)


def test_structures_in_yaml_and_on_the_command_line(tmp_path):
    args, _ = run(tmp_path, "tasks: [{fn: a}]\nweights: [1, 2.5]\n", "--styles", "{hasty: 0.5}")
    assert args.tasks == [{"fn": "a"}]
    assert args.weights == [1.0, 2.5]
    assert args.styles == {"hasty": 0.5}
    args, _ = run(tmp_path, "", "--tasks", '[{"fn": "b", "size": 2}]', "--no_shuffle", "--use_cpu")
    assert args.tasks == [{"fn": "b", "size": 2}]
    assert (args.shuffle, args.use_cpu) == (False, True)


@pytest.mark.parametrize(
    ("yaml", "argv", "wanted"),
    [
        ("styles: {careful: 1e-3}\nlearning_rate: 1E-3", [], {"styles": {"careful": 1e-3}, "learning_rate": 1e-3}),
        ("use_cpu: yes\nshuffle: off", [], {"use_cpu": True, "shuffle": False}),
        ("kind: off\nlabel: no", [], {"kind": "off", "label": "no"}),
        ("use_cpu: true", ["--no_use_cpu"], {"use_cpu": False}),
        ("", ["--no_shuffle"], {"shuffle": False}),
        ("names: all-linear", [], {"names": ["all-linear"]}),
        ("", ["--names", "a", "b"], {"names": ["a", "b"]}),
        ("max_steps: -1\nlearning_rate: 0", [], {"max_steps": -1, "learning_rate": 0.0}),
        ("seed: 4294967295", [], {"seed": 4294967295}),
        ("", ["--styles", '{"careful": 1e-05}'], {"styles": {"careful": 1e-5}}),
    ],
)  # fmt: skip
def test_values_are_what_they_say(tmp_path, yaml, argv, wanted):
    args, _ = run(tmp_path, yaml, *argv)
    assert {key: getattr(args, key) for key in wanted} == wanted


def test_help_is_help(tmp_path, capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as end:
            run(tmp_path, "", flag)
        assert end.value.code == 0
        assert "--learning_rate" in capsys.readouterr().out


# A YAML, the words after it, and what the message says.
WRONG = [
    ("learning_rat: 1", "", "x.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ("", "--learning_rat 1", "unknown option --learning_rat; did you mean 'learning_rate'"),
    ("", "--max 1", "unknown option --max$"),
    (
        "lr: 1\nfoo: 2",
        "--bar --steps=1",
        r"(?s)'lr'; did you mean 'learning_rate'.*'foo'\n.*--bar\n.*--steps; did",
    ),
    ("foo: 1\nmax_steps: x", "", r"(?s)unknown key 'foo'\n.*max_steps: expected int"),
    ("learning_rate: .nan", "", "x.yaml: learning_rate: expected a number, found nan"),
    ("learning_rate: nan", "", "learning_rate: expected a number, found nan"),
    ("learning_rate: .inf", "", "learning_rate: expected a finite number of at least 0"),
    ("", "--learning_rate -1", "--learning_rate: expected a finite number of at least 0, found -1"),
    ("tasks: [{params: {scale: .nan}}]", "", "tasks: expected a number, found nan"),
    ("max_steps: 0", "", "max_steps: expected 1 or more, or -1"),
    ("max_steps: 1e3", "", "max_steps: expected int, found 1000.0"),
    ("batch: 10000000000000000000", "", "batch: a number of 20 digits is too long"),
    ("seed: 10000000000000000000", "", "seed: .* at most 4294967295"),
    ("", "--no_use_cpu x", "--no_use_cpu takes no value; or write --use_cpu true"),
    ("", "--no_max_steps", "unknown option --no_max_steps"),
    ("max_steps: four", "", r"x.yaml: max_steps: expected int, found 'four' \(str\)"),
    ("max_steps: true", "", "max_steps: expected int, found True"),
    ("max_steps:", "", "max_steps: expected int, found None"),
    ("use_cpu: 1", "", "use_cpu: expected bool, found 1"),
    ("weights: [1, x]", "", r"weights\[1\]: expected float"),
    ("tasks: {fn: a}", "", "tasks: expected list"),
    ("tasks: [a]", "", r"tasks\[0\]: expected dict"),
    ("output_dir: false", "", "output_dir: expected str, found False"),
    ("kind: c", "", "kind: expected"),
    ("", "--kind c", "--kind: expected .*found 'c'"),
    ("", "--max_steps x", "--max_steps: expected int, found 'x'"),
    ("a: 1\nmax_steps: 1\nmax_steps: 2", "", "x.yaml: line 3: the key 'max_steps' is given twice"),
    ("- a", "", "expected `key: value` lines"),
    ("a: [", "", "x.yaml: not YAML"),
    ("batch: 6", "", "divisible by num_generations.*make that a multiple of num_generations"),
    ("", "--config no/such.yaml", "--config takes one YAML file, once"),
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


def test_a_preset_lies_below_the_yaml_and_the_yaml_below_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("max_steps: 1\nlearning_rate: 1\nbatch: 16\n")
    (tmp_path / "x.yaml").write_text("preset: mine.yaml\nmax_steps: 2\nlearning_rate: 2\n")
    argv = ["--config", str(tmp_path / "x.yaml"), "--max_steps", "3"]
    args, other = parse(Args, Other, argv=argv)
    assert (args.max_steps, args.learning_rate, other.batch) == (3, 2, 16)
    # What it says is what the stage is made from, whatever it is called.
    assert given(argv) == {"max_steps": 3, "learning_rate": 2, "batch": 16}
    (tmp_path / "mine.yaml").write_text("batch: 32\n")
    assert given(argv) == {"max_steps": 3, "learning_rate": 2, "batch": 32}
    (tmp_path / "other.yaml").write_text("batch: 64\n")
    assert given([*argv, "--preset", str(tmp_path / "other.yaml")])["batch"] == 64


@pytest.mark.parametrize(
    ("preset", "text", "words"),
    [
        ("modren", "", "preset: no 'modren' .*did you mean 'modern'"),
        ("[modern]", "", "preset: expected one name or path"),
        ("mine.yaml", "batch: 8\nbath: 8\n", "mine.yaml: unknown key 'bath'; did you mean 'batch'"),
        ("mine.yaml", "batch: many\n", "mine.yaml: batch: expected int, found 'many'"),
        ("mine.yaml", "preset: modern\n", "mine.yaml: unknown key 'preset'"),
        ("gspo", "", "gspo.yaml: unknown key 'importance_sampling_level'"),
    ],
)
def test_a_preset_is_read_as_strictly_as_the_rest(tmp_path, preset, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        run(tmp_path, f"preset: {preset}\n")


@dataclasses.dataclass
class Trackers:
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (in TRL's order)


@pytest.mark.parametrize(
    ("text", "words", "wanted"),
    [
        ("", ["--report_to", "None"], ["none"]),
        ("", ["--report_to", "null"], ["none"]),
        ("", ["--report_to=none"], ["none"]),
        ("", ["--report_to", "none", "None"], ["none"]),
        ("", ["--report_to", "none", "wandb"], ["wandb"]),
        ("null", [], ["none"]),
        ("[none, None]", [], ["none"]),
        ("[null]", [], ["none"]),
        ("[none, wandb, null]", [], ["wandb"]),
        ("[wandb]", [], ["wandb"]),
    ],
)
def test_no_tracker_is_a_word(tmp_path, text, words, wanted):
    (tmp_path / "x.yaml").write_text(f"report_to: {text}\n" if text else "")
    found = parse(Trackers, argv=["--config", str(tmp_path / "x.yaml"), *words])[0].report_to
    assert (found if isinstance(found, list) else [found]) == wanted
