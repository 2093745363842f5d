"""How scripts end: with one line for errors of the user, and with a traceback for bugs."""

import subprocess
import sys

import pytest

from basic.common import command_line
from basic.common.errors import BasicError, DamagedFileError, InvalidConfigError, NotARunError, WrongTokenizerError


def run_and_raise(error: BaseException) -> None:
    def script() -> None:
        raise error

    command_line.run(script)


@pytest.mark.parametrize(
    "error",
    [
        *(InvalidConfigError("no\ngood"), DamagedFileError("no\ngood"), WrongTokenizerError("no\ngood")),
        *(NotARunError("no\ngood"), BasicError("no\ngood"), OSError("no\ngood")),
        *(FloatingPointError("no\ngood"), MemoryError("no\ngood")),
    ],
    ids=repr,
)
def test_an_error_of_the_user_is_one_line(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as caught:
        run_and_raise(error)
    assert caught.value.code == "error: no good"  # Python prints it and exits with status 1


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_is_not_caught(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error), match="a bug"):
        run_and_raise(error)


@pytest.mark.parametrize("error", [BasicError("no good"), OSError("no good"), KeyboardInterrupt("no good")])
def test_with_traceback_errors_are_not_caught(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--traceback", "input"])
    with pytest.raises(type(error), match="no good"):
        run_and_raise(error)
    assert sys.argv == ["script.py", "input"]


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        ("BasicError('no good')", 1, "error: no good\n"),
        ("ValueError('a bug')", 1, "Traceback .*ValueError: a bug\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
        ("KeyboardInterrupt('stopped and saved')", 130, "stopped and saved\n"),
    ],
)
def test_what_a_process_prints(error, status, printed):
    program = f"from basic.common import command_line\nfrom basic.common.errors import *\ndef f(): raise {error}\n"
    done = subprocess.run([sys.executable, "-c", f"{program}command_line.run(f)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    start, _, end = printed.partition(".*")
    assert done.stderr.startswith(start)
    assert done.stderr.endswith(end)
    assert end or done.stderr == start
