"""Writing a file or a folder so that it is either there, whole, or not there at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike) -> Generator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    If the block raises, `path` is as it was and nothing is left behind.

    Args:
        path: where the file shall stand; its folder must exist.

    Yields:
        A binary file object opened for writing.
    """
    with atomic_paths(path) as (temporary,), open(temporary, "xb") as file:
        yield file


@contextmanager
def atomic_paths(*paths: str | os.PathLike) -> Generator[tuple[Path, ...]]:
    """Yield paths to write new contents to, which take the places of `paths` when the block has ended well.

    The temporary files lie in the same folder (a rename is atomic only within a file system). On leaving the
    block they are forced to the disk before the rename, and the rename itself after it, so that a power cut
    leaves the old file or the new one. If the block raises, `paths` are as they were and nothing is left behind.

    Of several files, the later ones describe the first (a sidecar its data). No two renames are one step, so the
    old descriptions are removed before the first file is replaced: whoever dies halfway leaves a file without
    its description, which a reader notices, never one beside the description of another.

    Args:
        paths: where the files shall stand; their folders must exist.

    Yields:
        As many paths of files that do not exist yet; the block must create each.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    targets = [Path(path) for path in paths]
    for folder in {target.parent for target in targets}:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to write into; create it first")
    mark = secrets.token_hex(4)
    temporaries = tuple(target.with_name(f".{target.name}.{mark}.tmp") for target in targets)
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
    for folder in {target.parent for target in targets}:
        sync_folder(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a new folder to fill, which appears under its name when the block has ended well.

    If the block raises, nothing is left behind.

    Args:
        path: where the folder shall stand; nothing may stand there yet, and the folder around it must exist.

    Raises:
        FileExistsError: something has this name already.
        FileNotFoundError: there is no folder around it.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} is there already; choose another name, or remove it first")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write into; create it first")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
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


def sync_folder(folder: Path) -> None:
    """Force a rename inside the folder to the disk, where the platform can open folders (Windows cannot)."""
    with suppress(PermissionError):
        sync_file(folder, os.O_RDONLY)


def sync_file(path: Path, flags: int = os.O_RDWR) -> None:
    """Force what was written to a file to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_json(path: str | os.PathLike, **options: Any) -> Any:
    """Read a JSON file; the options are those of `json.load`.

    Raises:
        ValueError: the file is not JSON; the message names it and the line.
    """
    with open(path, "rb") as file:
        try:
            return json.load(file, **options)
        except ValueError as error:  # JSON's, which names the line, or that of UTF-8
            raise ValueError(f"{os.fspath(path)!r} is not JSON: {error}") from None
