"""Atomic writing: a file or a folder appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from basic.common.errors import DamagedFileError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Generator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an error.

    If the block raises, `path` is unchanged and no temporary file remains.

    Args:
        path: the file to create or replace; its folder must exist.

    Yields:
        A binary file object opened for writing.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    with atomic_paths(path) as (temporary,), open(temporary, "xb") as file:
        yield file


@contextmanager
def atomic_paths(*paths: str | os.PathLike) -> Generator[tuple[Path, ...]]:
    """Yield temporary paths, and rename them to `paths` when the block ends without an error.

    The temporary files are in the same folder, because a rename is atomic only within a file system. The files are
    synchronized to the disk before the rename and their folders after it, so a power failure leaves the old file or
    the new one. If the block raises, `paths` are unchanged and no temporary file remains.

    If there are several paths, the later files describe the first one, as a sidecar describes its data. Several
    renames are not one atomic step, so the old descriptions are removed before the first file is replaced. A process
    that dies between them leaves data without a description, which readers detect, and never data with the
    description of other data.

    Args:
        paths: the files to create or replace; their folders must exist.

    Yields:
        One path for each of `paths`; no file exists there yet, and the block must create it.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    targets = [Path(path) for path in paths]
    folders = {target.parent for target in targets}
    for folder in folders:
        _require_folder(folder)
    temporaries = tuple(_temporary_path(target) for target in targets)
    try:
        yield temporaries
        for temporary in temporaries:
            sync_file(temporary)
        for description in targets[1:]:
            description.unlink(missing_ok=True)
            sync_folder(description.parent)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    for folder in folders:
        sync_folder(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a new temporary folder, and rename it to `path` when the block ends without an error.

    If the block raises, no folder remains.

    Args:
        path: the folder to create; it must not exist, and its parent must.

    Raises:
        FileExistsError: `path` exists.
        FileNotFoundError: its parent does not exist.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} already exists; choose another name, or remove it first")
    _require_folder(target.parent)
    temporary = _temporary_path(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_folder(file) if file.is_dir() else sync_file(file)
        sync_folder(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {str(folder)!r} does not exist; create it first")


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def sync_folder(folder: Path) -> None:
    """Synchronize a folder's entries, such as a rename, to the disk; does nothing on Windows."""
    with suppress(PermissionError):  # Windows cannot open folders
        sync_file(folder, os.O_RDONLY)


def sync_file(path: Path, flags: int = os.O_RDWR) -> None:
    """Synchronize a file's contents to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_json(path: str | os.PathLike, **options: Any) -> Any:
    """Read a JSON file.

    Args:
        options: the keyword arguments of `json.load`.

    Raises:
        DamagedFileError: the file is not JSON; the message names the file and the line.
    """
    with open(path, "rb") as file:
        try:
            return json.load(file, **options)
        except ValueError as error:  # a JSONDecodeError, which names the line, or a UnicodeDecodeError
            raise DamagedFileError(f"{os.fspath(path)!r} is not JSON: {error}") from None


def sha256_of_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
