"""The end of a log says how the last attempt ended, and leaves noise out."""

from chainforge.core.run_dir import LOG_LINES as LINES
from chainforge.core.run_dir import LogEnd as Ending
from chainforge.core.run_dir import changes
from chainforge.core.run_dir import read_log as ending


def read(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    return ending(tmp_path / "log.txt")


def test_the_message_is_found_before_the_launcher_s_own_traceback(tmp_path):
    found = read(tmp_path, "one\nerror: steps: no\n  line 3\nTraceback\n  File x\n" + "more\n" * 20)
    assert found == Ending(["one", "error: steps: no", "  line 3"], "failed", "steps: no\n  line 3")
    assert read(tmp_path, "stopped: at $1\n").outcome == "resumable"


def test_only_the_last_attempt_counts(tmp_path):
    assert read(tmp_path, "$ python x\nfailed: then\n$ python x\nworking\n") == Ending(["working"])


def test_numbers_and_bars_are_left_out(tmp_path):
    text = (
        "{'loss': '0.1', 'completions/mean_length': '3'}\n"
        " 10%|#  | 1/10\r 20%|## | 2/10\n"
        "/lib/args.py:15: FutureWarning: `old` is deprecated\n  warnings.warn(\n"
        "kept\r\n{'a': 1} is odd\n"
    )
    assert read(tmp_path, text).lines == ["kept", "{'a': 1} is odd"]


def test_a_long_log_is_cut_and_a_missing_one_is_empty(tmp_path):
    lines = read(tmp_path, "".join(f"line {i}\n" for i in range(100_000))).lines
    assert len(lines) == LINES
    assert lines[-1] == "line 99999"
    assert ending(tmp_path / "none.txt") == Ending()


def test_changes_are_said_in_words():
    assert changes({"a": 1, "b": 1e-4}, {"b": 2e-4, "c": 1}) == [
        "a: 1 -> not set",
        "b: 0.0001 -> 0.0002",
        "c: not set -> 1",
    ]
