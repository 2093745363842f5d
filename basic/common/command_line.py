"""How a script reads its options, prints text, and ends: an error of the user is one line, Ctrl-C is not an error."""

from __future__ import annotations

import ast
import inspect
import io
import os
import re
import select
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, TypeVar, get_type_hints

from basic.common.errors import BasicError

Options = TypeVar("Options")

TRACEBACK_OPTION = "--traceback"
_HOUR_S = 3600.0
# All control characters but newline and tab. A terminal obeys them: they can move the cursor or set the clipboard.
_CONTROL_CHARACTER = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")

_COMMAND = re.compile(r"`basic ([a-z]+(?:-[a-z]+)*)")
# What Python writes before a message of the system: "[Errno 2] No such file or directory".
_ERROR_NUMBER = re.compile(r"^\[(Errno|WinError) -?\d+\] ")


def command(name: str) -> str:
    """What a user types for a command: `basic train`, or local/train.py if the process was started as such a script."""
    started = Path(sys.argv[0])
    by_uv = "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
    if started.parent.name == "local" and started.suffix == ".py":
        return f"{by_uv}local/{name.replace('-', '_')}.py"
    return f"{by_uv}{'python -m ' if sys.argv[0].startswith('python -m') else ''}basic {name}"


def as_started(text: str) -> str:
    """Put what the user types for a command in place of every `` `basic NAME`` that follows a backtick."""
    return _COMMAND.sub(lambda match: "`" + command(match[1]), text)


def run(script: Callable[[], object]) -> None:
    """Call a script's main function, and exit if it fails.

    An error that the user can correct is printed as one line (status 1), and Ctrl-C ends the script with status 130. If
    the reader of the output ends first (`| head`), the script ends silently with status 141, like other programs. If
    `--traceback` is among the arguments, it is removed from them, and errors show their traceback.
    """
    with_traceback = TRACEBACK_OPTION in sys.argv
    if with_traceback:
        sys.argv.remove(TRACEBACK_OPTION)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # not every console has all characters of Unicode
    if not with_traceback:
        warnings.formatwarning = _format_warning  # ty: ignore[invalid-assignment]
    try:
        script()
    except KeyboardInterrupt as interrupt:
        if with_traceback:
            raise
        # The terminal shows ^C, so the message starts on a new line.
        print("\n" * sys.stderr.isatty() + escape(as_started(str(interrupt)) or "interrupted"), file=sys.stderr)
        sys.exit(130)
    except (BasicError, OSError, FloatingPointError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and (_reader_has_ended(sys.stdout) or _reader_has_ended(sys.stderr)):
            sys.exit(128 + 13)  # SIGPIPE, which Windows does not have
        if with_traceback:
            raise
        sys.exit("error: " + escape(as_started(" ".join(_ERROR_NUMBER.sub("", str(error)).splitlines()))))
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # without this, Python would find the closed pipe at exit and print a warning
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(options: type[Options], description: str | None, **settings: object) -> Options:
    """Read a script's options from the command line; an error or --help ends the process.

    Args:
        options: a dataclass; its docstrings are the help texts.
        settings: further arguments of `tyro.cli`, such as `args`, `default` and `prog`.
    """
    import tyro  # imported late: the library itself does not need it

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def integers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not int:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda texts: parse_integer(texts[0]),
            is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def optional_texts(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != str | None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda texts: texts[0],  # also "None", which is a text like any other
            is_instance=lambda value: value is None or isinstance(value, str),
            str_from_instance=lambda value: [str(value)],
        )

    _set_help_texts(options)
    width = min(shutil.get_terminal_size().columns, 120)
    # tyro does not wrap a description, and joins its lines, unless they begin with a space.
    style: Any = {"width": width, "initial_indent": " ", "subsequent_indent": " ", "break_on_hyphens": False}
    paragraphs = as_started(description or "").strip().split("\n\n")
    description = "\n\n".join(textwrap.fill(paragraph, **style) for paragraph in paragraphs)
    return tyro.cli(options, description=description, registry=registry, **settings)  # ty: ignore[no-matching-overload]


def _set_help_texts(options: Any) -> None:
    """Give each field of a dataclass its docstring as one line: tyro would keep the line breaks, and wrap once more."""
    lines = inspect.getsource(options)
    (definition,) = (node for node in ast.walk(ast.parse(textwrap.dedent(lines))) if isinstance(node, ast.ClassDef))
    texts = {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    hints = get_type_hints(options)
    for field in fields(options):
        if text := as_started(" ".join(texts.get(field.name, "").split())):
            field.metadata = MappingProxyType({**field.metadata, "help": text})
        if is_dataclass(hints[field.name]):
            _set_help_texts(hints[field.name])


def parse_integer(text: str) -> int:
    """Convert a text to an integer, also a whole number with an exponent: "1e5" is 100000.

    Raises:
        ValueError: the text is not a whole number.
    """
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        number = float(text)
        if number.is_integer() and abs(number) < 2**53:  # up to here a float is exact
            return int(number)
    raise ValueError(f"{text!r} is not a whole number")


def escape(text: str) -> str:
    """Replace control characters, except newline and tab, by their escapes: ESC becomes \\x1b."""
    return _CONTROL_CHARACTER.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def print_text(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text of a model, a tokenizer or a file at once, at a terminal with its control characters escaped."""
    file = file or sys.stdout
    print(escape(text) if file.isatty() else text, end=end, file=file, flush=True)


def confirm_start(seconds: float) -> None:
    """Ask a person at a terminal whether to start what takes more than an hour; without one, start.

    Raises:
        KeyboardInterrupt: the answer is no.
    """
    if seconds > _HOUR_S and sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"Start it? It takes about {duration(seconds)}. [Y/n] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
            raise KeyboardInterrupt("not started; fewer --steps, --minutes or a smaller model take less time")


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * _HOUR_S else f"{seconds / _HOUR_S:.1f} hours"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning as one line, without its position in the code."""
    text = escape(as_started(" ".join(str(message).splitlines())))
    return f"warning: {text.removeprefix('warning: ')}\n"


def _reader_has_ended(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    if stream is None or not hasattr(select, "poll"):  # Windows
        return stream is not None
    poll = select.poll()
    with suppress(OSError):  # not a real file, in tests
        poll.register(stream.fileno(), 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))
