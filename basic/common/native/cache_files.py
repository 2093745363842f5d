"""Files that keep compiled kernels, patterns and merges for later processes. A damaged one is made again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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


def kept_arrays(path: Path | None, make: Callable[[], Mapping[str, npt.ArrayLike]]) -> dict[str, np.ndarray]:
    """The arrays of a file, by name; if there is none, they are made and kept there.

    Args:
        path: None keeps nothing.
    """
    data = None if path is None else read_checked(path)
    if data is None:
        file = io.BytesIO()
        arrays: Any = make()
        np.savez(file, **arrays)
        data = file.getvalue()
        if path is not None:
            write_checked(path, data)
    with np.load(io.BytesIO(data)) as kept:
        return dict(kept)
