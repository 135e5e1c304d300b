import math

import pytest

from chainforge.core.errors import InputError
from chainforge.core.yaml12 import read_yaml, yaml_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1e3", 1000.0), ("1E-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("+1e5", 1e5),
        ("-2.5e-04", -2.5e-4), ("010", 10), ("0o10", 8), ("0xff", 255), ("-7", -7), (".inf", math.inf),
        ("{min_lr: 1e-5}", {"min_lr": 1e-5}), ("[{a: {b: 3E4}}]", [{"a": {"b": 3e4}}]),
        ("'1e-5'", "1e-5"), ("1_000", "1_000"), ("1:30", "1:30"), ("2024-02-30", "2024-02-30"),
        ("2024-02-28", "2024-02-28"), ("e5", "e5"), ("1e", "1e"), ("no", "no"), ("On", "On"), ("y", "y"),
        ("true", True), ("False", False), ("~", None), ("", None), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    assert yaml_value(text) == value
    assert type(yaml_value(text)) is type(value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int abc", "line 1: abc is not a whole number"),
        ("a: !!float abc", "is not a number"),
        ("a: !!bool abc", "does not fit its tag"),
        ("a: !!timestamp 2024-02-30", "does not fit its tag"),
        ("a: 1\nb: " + "9" * 5000, "line 2: a number of 5000 digits"),
        ("a: &a [*a]", "an alias .* inside what it names"),
        ("a: &a {b: [*a]}", "an alias .* inside what it names"),
        (BOMB, "aliases .* stand for over"),
        ("a: " + "[" * 100_000, "levels of nesting"),
        ("- " * 5_000 + "a", "levels of nesting"),
        ("? [1, 2]\n: 3", "not YAML"),
        ("a: *b", "not YAML"),
        ("a\n---\nb", "not YAML"),
        ("a: !!python/name:os.system", "not YAML"),
        ("a: 1\na: 2", "line 2: the key 'a' is given twice"),
    ],
)
def test_hostile_and_mistaken_yaml_is_one_message_with_the_file(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"(?s)x.yaml: .*{words}"):
        read_yaml(tmp_path / "x.yaml")
