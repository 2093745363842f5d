"""Files that keep compiled kernels and patterns for later processes. A damaged one is not used, but made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_CHECKSUM_BYTES = hashlib.sha256().digest_size


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None if there is no such file, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return data if hashlib.sha256(data).digest() == checksum else None


def write_checked(path: Path, data: bytes) -> None:
    """Keep data with their SHA-256, if the folder is writable; several processes may write one file at once."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.chmod(temporary, 0o644)  # other users may share the folder
            os.replace(temporary, path)
        except OSError:  # the disk is full
            os.unlink(temporary)
