"""What a command will write is checked before any work starts.

Each output is new, or was written by this library and is to be replaced on request, or the command is refused. Whether
this library wrote it is recognized by its content, not by its name. While a command works, its outputs are reserved:
another process that is to write one of them is refused before it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import atomic_write, check_file_target, check_path, make_folder
from basic.common.folder_lock import OutputLock, remove_abandoned_lock


@dataclass(frozen=True)
class Output:
    """A file or a folder that a command will write.

    Attributes:
        path: a symbolic link stands for its target.
        what: its name in messages, with the article: "a token file".
        is_ours: whether the existing file or folder is what this library writes, by its content; a DamagedFileError
            means that it is not. None: nothing that exists is replaced.
        is_folder: whether it is a folder, which counts as new if it is empty (unless `is_ours` is None). To write into
            a folder beside other files, list the files instead.
    """

    path: str | os.PathLike
    what: str
    is_ours: Callable[[Path], bool] | None = None
    is_folder: bool = False


def check_outputs(
    outputs: Iterable[Output], *, inputs: Iterable[str | os.PathLike] = (), overwrite: bool = False
) -> None:
    """Check everything that a command will write; at most, locks are removed that killed processes left.

    Args:
        inputs: files and folders that the command reads; those that do not exist, such as URLs, are skipped.
        overwrite: whether outputs that exist and are ours may be replaced.

    Raises:
        InvalidInputError: an output is also an input, or cannot be a path.
        FileExistsError: an output exists, and is not ours or not to be replaced.
        OSError: a folder exists where a file is to be written, or the reverse.
    """
    read, outputs = {_identity(path) for path in inputs} - {None}, list(outputs)
    for output in outputs:
        check_path(output.path)
    try:
        for output in outputs:
            _check_output(output, read, overwrite)
    except OSError:
        # A process that is killed between its last rename and its end leaves locks beside an output that is complete.
        for output in outputs:
            remove_abandoned_lock(output.path)
        raise


def _check_output(output: Output, read: set, overwrite: bool) -> None:
    path = os.fspath(output.path)
    _check_parents(Path(os.path.realpath(path)))
    if (identity := _identity(path)) is None:
        return
    if output.is_folder and not os.path.isdir(path):
        raise NotADirectoryError(f"{path!r} is a file, but a folder is to be written; choose another name")
    if not output.is_folder:
        check_file_target(path)
    if identity in read:
        raise InvalidInputError(f"{path!r}, {output.what} to be written, is also an input; give another output")
    if output.is_ours is None:
        raise FileExistsError(f"{path!r} already exists; choose another name, or remove it first")
    if output.is_folder and not any(os.scandir(path)):
        return
    if not _is_ours(output):
        raise FileExistsError(
            f"{path!r} exists and is not {output.what} that this library wrote, so it is not replaced; give "
            "another name, or move it away"
        )
    if not overwrite:
        raise FileExistsError(f"{path!r} already exists; choose another name, or replace it with --overwrite")


def _is_ours(output: Output) -> bool:
    assert output.is_ours is not None
    try:
        return output.is_ours(Path(output.path))
    except DamagedFileError:
        return False


@contextmanager
def reserved_outputs(
    outputs: Iterable[Output], *, inputs: Iterable[str | os.PathLike] = (), overwrite: bool = False
) -> Generator[None]:
    """Check what the block will write, and keep it for this process until the block ends.

    The folders that the outputs are in are created, and removed again if the block leaves them empty.

    Raises:
        BlockingIOError: another process, or an outer block, has reserved an output; the message names it.
        InvalidInputError, OSError: as for `check_outputs`, whose arguments these are.
    """
    outputs = list(outputs)
    check = partial(check_outputs, outputs, inputs=list(inputs), overwrite=overwrite)
    check()
    with ExitStack() as locks:
        for path in sorted({os.path.realpath(output.path) for output in outputs}):
            missing = [folder for folder in Path(path).parents if not folder.exists()]
            make_folder(os.path.dirname(path))
            locks.callback(_remove_empty, missing)
            locks.enter_context(OutputLock(path))
        check()  # again: another process may have written it before it was locked
        yield


@contextmanager
def write_output(output: Output, *, overwrite: bool = True) -> Generator[BinaryIO]:
    """Open an output for writing, which appears when the block ends; it replaces a file that is ours, and no other.

    Args:
        overwrite: False: a file that is ours is not replaced either.

    Raises:
        BlockingIOError, FileExistsError: as for `reserved_outputs`.
        OSError: as for `atomic_write`.
    """
    with reserved_outputs([output], overwrite=overwrite), atomic_write(output.path) as file:
        yield file


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:  # the innermost first
            folder.rmdir()


def _identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """Device and inode, equal for two names of one file; None if nothing exists there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # not there, or a URL that is not even a path
        return None
    return status.st_dev, status.st_ino


def _check_parents(path: Path) -> None:
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(f"{str(parent)!r} is a file, so nothing can be written below it")
            return
