"""Run a recipe as a process that ends in good order, and explains its failure."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.jsonl import writing
from chainforge.core.secrets import read_secret, redact_output

# Of the stage that is open, for what keeps files beside its own, such as an LLM judge.
stage_directory: ContextVar[Path | None] = ContextVar("stage_directory", default=None)
CHAIN_VARIABLE = "CHAINFORGE_CHAIN"  # set for the stages that `chainforge run` starts
_cleaners: list[subprocess.Popen[bytes]] = []  # their pipes stay open
LAUNCHERS = (CHAIN_VARIABLE, "ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")


def run(main: Callable[[], None]) -> None:
    """Run a recipe's `main`; end as `ending` describes, and stop when the launcher ends."""
    redact_output()
    _watch_launcher()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # TRL's own default is the option that transformers warns of, several times a run.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    with ending():
        read_secret("HF_TOKEN")  # whatever asks the Hub sends it
        main()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """End this process with one message, and an exit code, when the block fails.

    That is 2 for wrong input, also a model that a library could not load; its own code for what
    stopped early; 1 for any other failure, with a traceback where the reason is not known.
    """
    try:
        with writing(Path.cwd()):
            yield
    except InputError as error:
        _end("error", error, 2)
    except Stopped as error:
        _end("stopped", error, error.code)
    except KeyboardInterrupt:
        _end("stopped", "by SIGINT", 128 + signal.SIGINT)
    except Failed as error:
        _end("failed", error, 1)
    except Exception as error:
        if fault := loading_fault(error):
            _end("error", fault, 2)
        traceback.print_exc()
        _end("failed", f"{type(error).__name__}: {error}", 1)


def _end(kind: str, message: object, code: int) -> None:
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def loading_fault(error: BaseException) -> InputError | None:
    """Return what to report about an error from within `from_pretrained` or PEFT, else None.

    The model is the user's, so the fault is in the input: a damaged file, a model that this
    transformers does not know, an adapter of another vocabulary. Lack of memory is not.
    """
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if isinstance(error, MemoryError) or "out of memory" in words:
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called, values = frame.f_code.co_name, frame.f_locals
        if called == "get_peft_model":
            return InputError(
                f"lora_target_modules: this model cannot get such an adapter ({words}); give "
                "all-linear, or a list of names of its layers"
            )
        if called == "from_pretrained":
            name = values.get("pretrained_model_name_or_path") or values.get("model_id")
            return InputError(f"{name}: cannot be loaded ({words}); is a file damaged or missing?")
    return None


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Make a directory the open stage's."""
    token = stage_directory.set(directory)
    try:
        yield
    finally:
        stage_directory.reset(token)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask for an orderly stop; SIGHUP unless `nohup` ignores it."""
    found = [signal.SIGINT, signal.SIGTERM]
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return found if ignored else [*found, signal.SIGHUP]


@contextlib.contextmanager
def noting_stops(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with each signal that asks for an orderly stop, instead of ending at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        leave_terminal()
        note(number)

    before = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal() -> None:
    """Redirect output to the null device if the terminal is gone: printing would fail."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if device and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _watch_launcher() -> None:
    """Stop when `chainforge run`, accelerate or torchrun ends.

    A launcher that is killed alone leaves its processes running, where nobody looks for them.
    """
    if any(key in os.environ for key in LAUNCHERS):  # a shell may well be closed
        end_with(os.getppid())


def end_with(parent: int) -> None:
    """Stop this process as on SIGTERM when its parent ends, even if that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def scratch(parent: Path) -> Path:
    """Return a folder for files of this process, removed when it ends, also by SIGKILL.

    It is within `parent`, or else in the system's place for temporary files.
    """
    with contextlib.suppress(OSError):
        parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp("", "chainforge-", parent if os.access(parent, os.W_OK) else None)
    # Reads from a pipe whose other end only this process and its forks hold.
    words = ["sh", "-c", 'exec > /dev/null 2>&1; read -r _; rm -rf -- "$1"', "cleaner", folder]
    _cleaners.append(subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True))
    owner = os.getpid()

    def remove() -> None:  # at a normal end, which may end the shell with it, as in a container
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)
