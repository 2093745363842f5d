"""Locks for folders and files that are written, so that two processes do not write one at the same time.

Readers need none. The file `.basic.lock` in a folder, or `.NAME.basic.lock` beside a file, is locked by the system,
which releases it when the process ends, however it ends. Its content names the holder. On Windows, and on file systems
that cannot lock, there is no lock and no file: nothing there would release the lock of a process that was killed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".basic.lock"
_held_locks: set[int] = set()  # file descriptors


class _Lock:
    """A lock, held until it is closed (`with` closes it) or the process ends.

    Args:
        path: of the file that is locked; its folder must exist.
        what: is written, for the message.

    Raises:
        BlockingIOError: another process, or this one, holds the lock; the message names it.
    """

    def __init__(self, path: Path, what: str | os.PathLike) -> None:
        self._path = path
        self._descriptor: int | None = None
        if fcntl is None:
            return
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held_locks.add(descriptor)  # before it is locked, as another thread may fork at any time
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 4096, 0)
                _release(descriptor)
                if isinstance(error, BlockingIOError):
                    raise BlockingIOError(
                        f"{os.fspath(what)} is being written by {_describe(holder)}: wait until it has ended, or give "
                        "another name"
                    ) from None
                with suppress(OSError):
                    self._path.unlink()
                return  # some network file systems have no locks
            # The last holder may have removed the file between opening and locking.
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:
                _release(descriptor)
        os.ftruncate(self._descriptor, 0)
        with suppress(OSError):  # on a full disk the lock has no name, but locks
            os.pwrite(self._descriptor, _this_process(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and remove its file."""
        if self._descriptor in _held_locks:  # not in a forked process, which does not hold it
            if self._is_current(self._descriptor):
                with suppress(OSError):
                    self._path.unlink()
            _release(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


class FolderLock(_Lock):
    """The lock of a folder, which must exist.

    Raises:
        BlockingIOError: another process, or this one, holds the lock; the message names it.
        OSError: the folder cannot be written.

    Examples:
        >>> with FolderLock("runs/my"):
        ...     write_into("runs/my")
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(Path(os.path.realpath(folder)) / LOCK_NAME, folder)


class OutputLock(_Lock):
    """The lock of a file or folder that need not exist; the folder that it is in must.

    It is another lock than the `FolderLock` of the same folder.

    Raises:
        BlockingIOError, OSError: as for `FolderLock`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        target = Path(os.path.realpath(path))
        super().__init__(target.with_name(f".{target.name}{LOCK_NAME}"), path)


def remove_abandoned_lock(path: str | os.PathLike) -> None:
    """Remove the lock file of an output, such as a killed process leaves, unless a process holds it."""
    target = Path(os.path.realpath(path))
    if target.with_name(f".{target.name}{LOCK_NAME}").exists():
        with suppress(OSError):
            OutputLock(path).close()


def _this_process() -> bytes:
    holder = {
        "host": platform.node(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    return json.dumps(holder).encode()


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return (
            f"process {holder['process']} on {holder['host']} since {holder['since']} ({holder['command'] or 'python'})"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"


def _release(descriptor: int) -> None:
    assert fcntl is not None
    _held_locks.remove(descriptor)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child process that was forked meanwhile
    os.close(descriptor)


def _close_inherited_locks() -> None:
    """In a forked process: do not hold the lock of the parent, which may end before its children."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)
