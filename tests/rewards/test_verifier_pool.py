"""Hostile answers cost their own row a limit and nothing else, from any thread."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chainforge.rewards.verifier_pool import VerifierPool
from chainforge.rewards.verify import POOL, Claim, decide, start_pool, verify, verify_all


def entry(dataset, answer, **metadata):
    metadata = {"source_dataset": dataset, **metadata}
    return json.dumps({"question": "?", "answer": answer, "metadata": metadata})


# What the filters of the trainer's own process know, and what only the kernel ends.
FILTERED = [
    r"\boxed{9^{9^{9}}}",
    "3^{10^9}",
    "(20!)!",
    "[" * 100_000,
    "\\" * 100_000,
    "(" * 50 + "4" + ")" * 50,
    "\\frac{1}{" * 30 + "2" + "}" * 30,
    "\\boxed{" * 5_000,
    "9" * 100_000,
    "+".join(f"x_{i}" for i in range(3_000)),
    r"\sum_{n=1}^{10^9} n",
    r"\int_0^1 \sin(x^x) dx",
    "answer is " * 10_000,
    "\\boxed{4}" + "\n" * 19_000 + "5",
    "\ud800\x00\u202e" * 1_000,
    "\\(" * 50_000,
    r"9^{9 \cdot 9^{9}}",
    r"\binom{999999}{500000}",
    "(x+y+z+1)^{50}",
]
BOMBS = [rf"({terms})^{{15 \cdot 60}}" for terms in ("x+y+z+1", "a+b+c+2", "x-y+z+7")]


@pytest.fixture(scope="module")
def quick():
    pool = VerifierPool(workers=2, limit=1.0, memory=768 * 1024**2)
    pool.score([("math", "2+2", "4")])
    yield pool
    pool.close()


@pytest.mark.parametrize("answer", FILTERED, ids=lambda answer: answer[:12])
@pytest.mark.parametrize("verifier", ["math", "arithmetic", "numeric", "choice", "exact"])
def test_the_filters_refuse_at_once(verifier, answer):
    before = POOL.scored
    start = time.process_time()
    assert verify(verifier, answer, "A" if verifier == "choice" else "4") is False
    assert time.process_time() - start < 0.5
    assert POOL.scored == before


UNITS = ["\\(", "\\)", "\\[", "\\]", "$", "$ ", "**", " **a", "`", "```\n", "answer is ", "nswer:", "\n",
         "\\boxed{", "\\boxed", "{", "}", "\\", "=", "x = ", ",", "1,", "1,000", "1.", "1 ", "(", ")", "[",
         "\\text{", "\\text{a} ", "\\frac{", "\\frac1", "sqrt(", " ", "\t", "^{", "9^", "!", "(a+", "- ",
         "\\,", "\\left(", "{,}", " or ", " and ", "not ", "\\le ", "<", "1/", "%", "\u200b", "&", "\\\\ ",
         "\\begin{pmatrix}", "A) ", "(A", "e1", "\\times 10^", "#### ", "nan", "0", "lambda ", "'"]  # fmt: skip


@given(
    st.lists(st.sampled_from(UNITS), min_size=1, max_size=3),
    st.sampled_from(["", "answer is ", "x = "]),
    st.sampled_from([280, 10_000]),
)
@example(["\\("], "", 10_000)
@example(["- "], "", 280)
@example(["\t"], "x = ", 10_000)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_text_costs_the_trainer_more_than_its_length(units, start, length):
    unit = "".join(units)
    text = start + unit * (length // len(unit)) + "x\nx"
    own = entry("countdown", "8 * 3", numbers=[3, 8], target=24)
    golds = [("math", "x+1"), ("math", "4"), ("math", "(1,2)"), ("math", "1/2"), ("choice", "A"),
             ("arithmetic", "4"), ("numeric", "4.5"), ("exact", "Paris")]  # fmt: skip
    begin = time.process_time()
    for verifier, gold in golds:
        decide(Claim(verifier, text, gold))
    decide(Claim("reasoning_gym", text[:5000], None, own))
    # Some 20 ms for all; what is not linear takes seconds.
    assert time.process_time() - begin < 1.5


def test_a_bomb_scores_0_and_the_batch_is_unharmed(quick):
    claims = [Claim("math", "4", "4"), Claim("math", r"\sqrt{16.0} + e", "4+e")]
    claims += [Claim("math", bomb, "4") for bomb in BOMBS]
    claims += [Claim("math", "y^2+0.5z", "0.5z+y^2"), Claim("math", "5", "4")]
    assert verify_all(claims, quick) == [True, True, False, False, False, True, False]
    assert quick.score([("math", "2+2", "4")]) == [True]


@pytest.fixture(scope="module")
def invaded():
    """Start a pool among whose data sets is one with a scorer that attacks: `evil/sitecustomize.py`."""
    evil = os.path.join(os.path.dirname(__file__), "evil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", evil + os.pathsep + os.environ.get("PYTHONPATH", ""))
        patch.setenv("HF_TOKEN", "hf_secret")
        pool = VerifierPool(workers=2, limit=0.3, memory=768 * 1024**2)
        pool.score([("reasoning_gym", "nothing", EVIL)])
        yield pool
        pool.close()


EVIL = entry("evil", "?", pid=os.getpid())


@pytest.mark.parametrize(
    ("attack", "verdict"),
    [("nothing", False), ("hang", "timeout"), ("sleep", "timeout"), ("crash", "crash"),
     ("leave", "crash"), ("exit", "crash"), ("fill", "memory"), ("babble", "crash"),
     ("flood", True), ("kill", False), ("spy", False), ("spy()", False)],
)  # fmt: skip
def test_code_in_a_child_costs_its_own_verdict_only(invaded, attack, verdict):
    program = invaded._process.pid
    jobs = [("reasoning_gym", attack, EVIL)] * 2
    neighbours = [("math", "x+4", "4+x"), ("math", "x+5", "4+x")] * 4
    verdicts = invaded.score([*jobs, *neighbours])
    assert verdicts == [verdict, verdict, *[True, False] * 4]
    assert invaded._process.pid == program


def test_the_program_holds_no_token(invaded):
    with open(f"/proc/{invaded._process.pid}/environ", "rb") as file:
        names = {one.partition(b"=")[0] for one in file.read().split(b"\0") if one}
    assert b"PATH" in names
    assert not {b"HF_TOKEN", b"PYTEST_CURRENT_TEST"} & names


def test_a_job_over_which_the_program_dies_loses_no_other(invaded):
    jobs = [("math", f"x+{n}", "4+x") for n in range(6)]
    program = invaded._process
    threading.Timer(0.2, program.kill).start()
    wanted = [n == 4 for n in range(6)]
    assert invaded.score([("reasoning_gym", "sleep", EVIL), *jobs]) == ["timeout", *wanted]


def test_a_gold_answer_that_kills_its_process_is_nobodys_fault(quick):
    verdict = quick.score([("math", "x+4", r"9^{9 \cdot 9^{9}} + \sqrt{(1+x)^{9 \cdot 9^9}}")])
    assert verdict in (["gold"], ["timeout"])
    assert verify_all([Claim("math", "x+4", "{")], quick) == [None]


def test_it_works_from_other_threads_and_from_several(quick):
    def score(number):
        bomb = f"(x+y+z+{number})^{{900}}"
        texts = [f"e+{number}.0", bomb, f"e+{number}.5"]
        return verify_all([Claim("math", text, f"{number}+e") for text in texts], quick)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(score, range(2, 5))) == [[True, False, False]] * 3


def test_an_interrupted_batch_does_not_answer_the_next(quick):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            quick.score([("math", r"5^{5 \cdot 9^{9}}", "4")])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert quick.score([("math", "2+2", "4"), ("math", "2+5", "4")]) == [True, False]


# No `if __name__ == "__main__"`, which spawn and forkserver need; a fork as of a data loader's worker.
TRAIN = """
open("runs", "a").write("x")
import os, sys
from chainforge.rewards.verify import POOL, verify

assert verify("math", "e+2.0", "2+e") is True
assert verify("math", "e+3.0", "2+e") is False
maps = open(f"/proc/{POOL._process.pid}/maps").read()
assert "torch" not in maps and "sympy" not in sys.modules, "only the pool has the parser"
print(POOL._process.pid, flush=True)
child = os.fork()
if child == 0:
    assert verify("math", "e+5.0", "5+e") is True
    print(POOL._process.pid, flush=True)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
assert verify("math", "e+6.0", "6+e") is True
print(POOL._process.pid)
"""


def test_each_process_has_its_own_that_runs_no_script_again_and_ends_with_it(tmp_path):
    """One process ends by itself, its fork is killed."""
    (tmp_path / "train.py").write_text(TRAIN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command, given = [sys.executable, "train.py"], {"env": environment, "cwd": tmp_path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    assert done.returncode == 0, done.stderr
    parents, forks, again = map(int, done.stdout.split())
    assert forks != parents == again
    assert (tmp_path / "runs").read_text() == "x"
    deadline = time.monotonic() + 10
    while (_alive(parents) or _alive(forks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(parents)
    assert not _alive(forks)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_starts_beside_other_work_where_golds_are_more_than_numbers(monkeypatch):
    """Then its verdicts do not depend on how busy the machine is."""
    pool = VerifierPool(workers=1, limit=1.0)
    monkeypatch.setattr("chainforge.rewards.verify.POOL", pool)
    start_pool([{"answer": "4"}, {"answer": "1/2"}, {"answer": "x+1", "verifier": "exact"}])
    assert pool._process is None
    start_pool([{"answer": "4"}, {"answer": "x+1"}])
    program = pool._process.pid
    assert pool.score([("math", "1+x", "x+1")]) == [True]
    assert pool._process.pid == program
    with open(f"/proc/{program}/task/{program}/children") as file:
        [child] = map(int, file.read().split())
    with ThreadPoolExecutor(1) as threads:
        verdicts = threads.submit(pool.score, [("math", "(x+y+z+2)^{9}", "(x+y+z+3)^{9}")])
        time.sleep(0.05)
        os.kill(child, signal.SIGSTOP)
        time.sleep(1.3)
        os.kill(child, signal.SIGCONT)
        assert verdicts.result() == [False]
    pool.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        pool.score([("math", "2+2", "4")])
