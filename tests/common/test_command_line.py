"""How scripts end: with one line for errors of the user, and with a traceback for bugs; what they read and print."""

import io
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass

import pytest

from basic.common import command_line
from basic.common.errors import (
    BasicError,
    DamagedFileError,
    DependencyError,
    InvalidConfigError,
    NotARunError,
    WrongTokenizerError,
    failures_of,
    how_to_install,
)


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


@dataclass
class Wide:
    """Options."""

    name: str = "x"
    """A long text that has a line break of its own in the source, where the line is full, and then goes on for some
    more words, as `basic encode` does."""


def test_help_is_wrapped_once_at_the_width_of_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "argv", ["python -m basic"])
    description = "A description that is longer than a line of the terminal, which has sixty columns.\n\nMore."
    with pytest.raises(SystemExit):
        command_line.parse(Wide, description, args=["--help"], prog="wide")
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 60
    assert " A description that is longer than a line of the terminal," in lines
    stripped = [line.strip("│| ") for line in lines]
    assert "in the source, where the line is full, and" in stripped
    assert "for some more words, as `python -m basic encode` does. (default: x)" in " ".join(stripped)


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


def start(program: str, **options) -> subprocess.Popen:
    """Start a process whose main function is `program`, one statement a line."""
    lines = "".join(f"    {line}\n" for line in program.splitlines())
    code = f"from basic.common import command_line\ndef f():\n{lines}command_line.run(f)"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, **options)


def test_a_console_without_unicode_gets_replacement_characters():
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    process = start(r"print('a\ufffd\u4e00\xe9', flush=True)", stdout=subprocess.PIPE, env=environment)
    assert process.communicate(timeout=60) == (b"a??\xe9" + os.linesep.encode(), b"")
    assert process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: print('x' * 1000)", 141),
        ("while True: print('x', flush=True)", 141),
        ("raise OSError('no good')", 1),
        ("import tyro\nwhile True: tyro.cli(int, args=['--help'])", None),
    ],
)
def test_a_script_whose_output_is_no_longer_read_ends_silently(program, status, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    process = start(program, stdout=write, env=environment)
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert errors.decode() == ("error: no good\n" if status == 1 else "")
    assert process.returncode == status if status else process.returncode in (0, 141)


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as caught:
        run_and_raise(BrokenPipeError(32, "a worker has ended"))
    assert caught.value.code == "error: a worker has ended"


def test_control_characters_in_an_error_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as caught:
        run_and_raise(BasicError("the token \x1b]52;c;\x07 of tokenizer.json"))
    assert caught.value.code == "error: the token \\x1b]52;c;\\x07 of tokenizer.json"


@pytest.mark.parametrize("prefix", ["", "warning: "])
def test_a_warning_is_one_line_without_control_characters(prefix):
    process = start(f"import warnings; warnings.warn('{prefix}step_5 is\\n damaged: \\x1b]52;')")
    assert process.communicate(timeout=60)[1].decode() == "warning: step_5 is  damaged: \\x1b]52;" + os.linesep


@pytest.mark.parametrize("is_terminal", [True, False])
def test_text_of_others_is_escaped_in_a_terminal_only(is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    text = "".join(map(chr, range(0xA1))) + "\u4e00\U0001f600"
    command_line.print_text(text, end="", file=stream)
    shown = stream.getvalue()
    if not is_terminal:
        assert shown == text
        return
    assert [character for character in shown if ord(character) < 32 or 126 < ord(character) < 160] == ["\t", "\n"]
    assert shown.startswith("\\x00\\x01")
    assert shown.endswith(
        "~\\x7f\\x80" + "".join(f"\\x{code:02x}" for code in range(0x81, 0xA0)) + "\xa0\u4e00\U0001f600"
    )


# --- Options --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Options with a text that may be missing."""

    prompt: str | None = None


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [([], None), (["--prompt=None"], "None"), (["--prompt", "none"], "none"), (["--prompt", ""], "")],
)
def test_none_is_a_text_like_any_other(arguments, prompt):
    assert command_line.parse(Texts, None, args=arguments).prompt == prompt


@dataclass(frozen=True)
class Numbers:
    steps: int
    top_k: int | None = None
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize("text", ["100000", "1e5", "1E5", "1.0e5", "100_000", "100000.0"])
def test_a_whole_number_with_an_exponent_is_an_integer(text):
    arguments = ["--steps", text, "--top-k", text, "--sizes", text, "3"]
    options = command_line.parse(Numbers, None, args=arguments)
    assert options == Numbers(100_000, 100_000, (100_000, 3))
    assert type(options.steps) is int


@pytest.mark.parametrize("text", ["1.5", "1e-1", "1e400", "1e30", "nan", "inf", "x", "", "true"])
def test_other_numbers_are_not_integers(text, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.parse(Numbers, None, args=["--steps", text])
    assert caught.value.code == 2
    assert "is not a whole number" in capsys.readouterr().err


# --- Programs and packages of others --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no key\nconfigured"), KeyError("no key"), Exception()])
def test_a_failure_of_others_is_one_line_with_a_remedy(error):
    reason = {RuntimeError: "no key", KeyError: "'no key'", Exception: "Exception"}[type(error)]
    with pytest.raises(DependencyError) as caught, failures_of("the tracker", "log in"):
        raise error
    assert str(caught.value) == f"the tracker failed ({reason}); log in"


@pytest.mark.parametrize("error", [InvalidConfigError("ours"), MemoryError("full"), KeyboardInterrupt()])
def test_errors_of_our_own_are_not_failures_of_others(error):
    with pytest.raises(type(error)), failures_of("the tracker", "log in"):
        raise error


def test_how_to_install_names_a_way_with_and_without_uvs_environment():
    assert how_to_install("dist", "distributed fsspec") == (
        "use `pip install distributed fsspec`, or in a clone with uv's environment `uv run --extra dist ...`"
    )


def test_a_person_is_asked_before_more_than_an_hour(monkeypatch):
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for answer, starts in (("\n", True), ("y\n", True), ("n\n", False), ("", True)):
        monkeypatch.setattr(sys.stdin, "readline", lambda answer=answer: asked.append(answer) or answer, raising=False)
        if starts:
            command_line.confirm_start(7200)
        else:
            with pytest.raises(KeyboardInterrupt, match="not started"):
                command_line.confirm_start(7200)
    command_line.confirm_start(3600)
    assert len(asked) == 4
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    command_line.confirm_start(7200)
    assert len(asked) == 4


def test_a_no_at_a_real_terminal_ends_the_command():
    pty = pytest.importorskip("pty", reason="needs Unix terminals")
    program = "from basic.common.command_line import confirm_start, run\nrun(lambda: confirm_start(7200))"
    controller, user = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", program], stdin=user, stdout=user, stderr=user) as process:
        os.close(user)
        shown = b""
        while b"[Y/n]" not in shown:
            shown += os.read(controller, 1024)
        os.write(controller, b"n\n")
        with suppress(OSError):  # Linux: the other end is closed
            while more := os.read(controller, 1024):
                shown += more
    os.close(controller)
    assert process.returncode == 130
    assert b"Start it? It takes about 2.0 hours. [Y/n] n\r\n" in shown
    assert b"not started; fewer --steps, --minutes or a smaller model take less time" in shown
