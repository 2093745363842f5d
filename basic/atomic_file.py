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

    The bytes go to a temporary file in the same folder (a rename is atomic only within a file system). On
    leaving the block they are forced to the disk before the rename, and the rename itself after it, so that a
    power cut leaves the old file or the new one. If the block raises, `path` is as it was and nothing is left
    behind.

    Args:
        path: where the file shall stand; its folder must exist.

    Yields:
        A binary file object opened for writing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force a rename inside the folder to the disk, where the platform can open folders (Windows cannot)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
