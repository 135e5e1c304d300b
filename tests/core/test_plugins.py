import math

import pytest

from chainforge.core.errors import InputError, refuse_unknown
from chainforge.core.plugins import resolve

BUILTINS = {"root": "math:sqrt", "floor": math.floor}


def test_the_three_forms(tmp_path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    assert resolve("root", BUILTINS) is math.sqrt
    assert resolve("floor", BUILTINS) is math.floor
    assert resolve("math:cos", BUILTINS) is math.cos
    double = resolve(f"{tmp_path}/mine.py:double", BUILTINS)
    assert double(2) == 4
    assert resolve(f"{tmp_path}/mine.py:double", BUILTINS) is double


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("rot", "did you mean 'root'"),
        ("zzz", "there are: floor, root"),
        ("math:sqr", "did you mean 'sqrt'"),
        ("math:pi", "is a float, not a function"),
        ("no.such.module:fn", "does not import: ModuleNotFoundError"),
        ("missing.py:fn", "no such file"),
        ("", "named by a string"),
        (3, "named by a string"),
    ],
)
def test_what_leads_nowhere_is_explained(reference, words):
    with pytest.raises(InputError, match=words):
        resolve(reference, BUILTINS)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nimport nothing_like_this\n", "line 2: ModuleNotFoundError"),
        ("def f(:\n", "line 1: SyntaxError"),
    ],
)
def test_a_file_that_does_not_import_names_the_line(tmp_path, code, words):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError, match=f"mine.py does not import: {words}"):
        resolve(f"{tmp_path}/mine.py:f", {})


def test_all_unknown_keys_are_named_at_once():
    refuse_unknown({"fn": 1}, ("fn", "params"), "tasks[0]: ")
    with pytest.raises(InputError) as error:
        refuse_unknown({"fm": 1, "fn": 2, "parms": 3, 4: 5}, ("fn", "params"), "tasks[0]: ")
    assert str(error.value).splitlines() == [
        "tasks[0]: unknown key 'fm'; there are: fn, params",
        "  tasks[0]: unknown key 'parms'; did you mean 'params'?",
        "  tasks[0]: unknown key 4; there are: fn, params",
    ]
