"""The errors that a user can correct.

A script prints such an error as one line. Any other ValueError is a bug of this library and shows its traceback. Each
type is also a built-in error, so `except ValueError` and `except OSError` still catch it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager


class BasicError(Exception):
    """Base class. The message says what was wrong, what was got, what is allowed, and what to do."""


class InvalidInputError(BasicError, ValueError):
    """An argument, an option or a text that cannot be used."""


class InvalidConfigError(InvalidInputError):
    """A setting that is unknown, of the wrong type or out of its range, or settings that contradict each other."""


class DamagedFileError(BasicError, ValueError):
    """A file that is incomplete, was changed after it was written, or does not have the expected format."""


class WrongTokenizerError(BasicError, ValueError):
    """Token ids and a tokenizer, or a tokenizer and a model, that do not belong together."""


class NotARunError(BasicError, FileNotFoundError):
    """A folder without a run, or without a checkpoint."""


class DependencyError(BasicError, RuntimeError):
    """A program or a package of others failed or is not installed: a compiler, a tracker, a cluster."""


def utf8_error(name: str | os.PathLike, offset: int, byte: int, reason: str) -> InvalidInputError:
    """The error for a byte that is not UTF-8, at a byte offset of the text with this name."""
    return InvalidInputError(
        f"{os.fspath(name)!r} is not valid UTF-8 at byte offset {offset} (byte 0x{byte:02x}: {reason}); "
        "convert the file to UTF-8"
    )


@contextmanager
def failures_of(program: str, remedy: str) -> Generator[None]:
    """Turn any failure of other people's code in this block into one line with a remedy.

    Raises:
        DependencyError: the block raised an exception that is none of ours.
    """
    try:
        yield
    except (BasicError, MemoryError):
        raise
    except Exception as error:  # other people's code may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DependencyError(f"{program} failed ({reason}); {remedy}") from error


def how_to_install(extra: str, packages: str) -> str:
    """Say how to install the packages of an extra, in an environment of one's own and in that of uv."""
    return f"use `pip install {packages}`, or in a clone with uv's environment `uv run --extra {extra} ...`"
