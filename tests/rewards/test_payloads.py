"""Programs as answers, to every data set of reasoning-gym and to math-verify: none of them runs."""

import json
import socket
import subprocess
import sys

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from chainforge.rewards.verifier_pool import VerifierPool
from chainforge.rewards.verify import Claim, verify_all

# {path} is a file that must not be made, {port} a port that nobody must connect to.
PAYLOADS = [
    "open('{path}', 'w')",
    "__import__('os').system('touch {path}')",
    "_＿import＿＿('os').system('touch {path}')",
    "_＿ｉmport__('os').mkdir('{path}')",
    "ｏｐｅｎ('{path}', 'w')",
    "ｅxec(\"open('{path}', 'w')\")",
    "eval('_' + '_imp' + 'ort_' + '_' + '(\"os\")').mkdir('{path}')",
    "(lambda: open('{path}', 'w'))()",
    "[open('{path}', 'w') for _ in (1,)]",
    "{{1: open('{path}', 'w')}}",
    "f\"{{open('{path}', 'w')}}\"",
    "(x := open('{path}', 'w'))",
    "1 if open('{path}', 'w') else 2",
    "24 and open('{path}', 'w')",
    "max(1, 2, key=lambda _: id(open('{path}', 'w')))",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]"
    ".__init__.__globals__['system']('touch {path}')",
    "getattr(__import__('builtins'), 'op' + 'en')('{path}', 'w')",
    "__import__('sys').modules.pop('chainforge.rewards.verifier_pool', 0) or open('{path}', 'w')",
    "__import__('signal').setitimer(0, 0) and open('{path}', 'w')",
    "__import__('subprocess').run(['touch', '{path}'])",
    "__import__('socket').create_connection(('127.0.0.1', {port})) and open('{path}', 'w')",
    "S(\"open('{path}', 'w')\")",
    "sympify('op' + \"en('{path}', 'w')\")",
    "sin(S(\"__import__('os').mkdir('{path}')\"))",
    "Symbol('x').subs('x', \"open('{path}', 'w')\")",
    "sympify.__globals__['__builtins__']['open']('{path}', 'w')",
]
LATEX = [r"%s", r"\text{%s}", r"\operatorname{%s}(x)", r"x_{%s}", r"\{%s, 1\}", r"x = %s",
         r"4 \text{ %s}", r"\begin{pmatrix} %s \\ 1 \end{pmatrix}", r"\frac{%s}{x}"]  # fmt: skip
SMALL = {"futoshiki": {"max_board_size": 4}, "zebra_puzzles": {"num_people": 2}}


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(workers=2, limit=5.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def entries():
    """Return an entry as JSON of each data set, by its name."""
    found = {}
    for name in sorted(set(DATASETS) - {"composite"}):
        item = reasoning_gym.create_dataset(name, seed=1, size=1, **SMALL.get(name, {}))[0]
        metadata = item["metadata"] | {"source_dataset": name}
        found[name] = json.dumps({**item, "metadata": metadata}, default=str)
    return found


@pytest.fixture
def canary(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        path = tmp_path / "made"
        yield path, [text.format(path=path, port=server.getsockname()[1]) for text in PAYLOADS]
        assert not path.exists()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_payloads_would_run_if_they_were_evaluated(tmp_path):
    path = tmp_path / "made"
    with socket.create_server(("127.0.0.1", 0)) as server:
        texts = [text.format(path=path, port=server.getsockname()[1]) for text in PAYLOADS]
        code = """if True:
            import json, os, shutil, sys
            from contextlib import suppress
            for text in json.load(sys.stdin):
                names = {}
                exec("from sympy import *", names)
                with suppress(Exception):
                    eval(text, names)
                if not os.path.exists(sys.argv[1]):
                    print(text)
                shutil.rmtree(sys.argv[1]) if os.path.isdir(sys.argv[1]) else os.remove(sys.argv[1])
        """
        command = [sys.executable, "-c", code, str(path)]
        run = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, check=True
        )
    assert run.stdout == ""


def test_no_data_set_runs_an_answer(entries, pool, canary):
    _, payloads = canary
    assert len(entries) >= 100
    texts = [form % payload for payload in payloads for form in ("%s", "24 + %s")]
    claims = [Claim("reasoning_gym", text, None, own) for text in texts for own in entries.values()]
    assert not any(verify_all(claims, pool))
    # Past the filters of the trainer's side, straight to the scorers.
    jobs = [("reasoning_gym", text, own) for text in payloads for own in entries.values()]
    assert True not in pool.score(jobs)


def test_no_formula_is_run(pool, canary):
    _, payloads = canary
    golds = {"math": "x+1", "numeric": "4.5", "arithmetic": "4", "choice": "B", "exact": "no"}
    texts = [form.replace("%s", payload) for payload in payloads for form in LATEX]
    claims = [Claim(name, text, gold) for text in texts for name, gold in golds.items()]
    assert not any(verify_all(claims, pool))
    assert True not in pool.score([("math", text, "x+1") for text in texts])


def test_gold_answers_are_right_to_the_scorers_themselves(entries, pool):
    claims, jobs = [], []
    for own in entries.values():
        entry = json.loads(own)
        examples = ("answer", "example_answer", "example_correct_answer", "possible_answer")
        gold = next(
            (str(found) for name in examples if (found := (entry | entry["metadata"]).get(name))),
            "",
        )
        claims.append(Claim("reasoning_gym", gold, None, own))
        jobs.append(("reasoning_gym", gold, own))
    assert verify_all(claims, pool).count(True) >= 100
    verdicts = dict(zip(entries, pool.score(jobs), strict=True))
    wrong = {name for name, verdict in verdicts.items() if verdict is not True}
    assert wrong <= {"arc_agi", "rearc", "boxnet", "rush_hour", "graph_color"}
