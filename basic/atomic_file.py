"""Writing a file so that it is either there, whole, or not there at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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
            _sync(temporary, os.O_RDWR)
        for description in targets[1:]:
            description.unlink(missing_ok=True)
            _sync_folder(description.parent)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    for folder in {target.parent for target in targets}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Force a rename inside the folder to the disk, where the platform can open folders (Windows cannot)."""
    with suppress(PermissionError):
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
