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
        ("math:pi", "'pi' is not a function of math"),
        ("no.such.module:fn", "cannot be imported: ModuleNotFoundError"),
        ("missing.py:fn", "no such file"),
        ("late.py:f", "late.py cannot be imported: line 2: ModuleNotFoundError"),
        ("torn.py:f", "torn.py cannot be imported: line 1: SyntaxError"),
        ("", "named by a string"),
        (3, "named by a string"),
    ],
)
def test_what_leads_nowhere_is_explained(tmp_path, monkeypatch, reference, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "late.py").write_text("x = 1\nimport nothing_like_this\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=words):
        resolve(reference, BUILTINS)


def test_all_unknown_keys_are_named_at_once():
    refuse_unknown({"fn": 1}, ("fn", "params"), "tasks[0]: ")
    with pytest.raises(InputError) as error:
        refuse_unknown({"fm": 1, "fn": 2, "parms": 3, 4: 5}, ("fn", "params"), "tasks[0]: ")
    assert str(error.value).splitlines() == [
        "tasks[0]: unknown key 'fm'; there are: fn, params",
        "  tasks[0]: unknown key 'parms'; did you mean 'params'?",
        "  tasks[0]: unknown key 4; there are: fn, params",
    ]
