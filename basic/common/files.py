"""Atomic writing: a file or a folder appears under its name only when it is complete. And reading of small files.

A temporary file or folder is named `.NAME.MACHINE-PROCESS-RANDOM.tmp`, beside its target. A process that is killed
leaves it there; the next one that writes the same target removes it.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from basic.common.errors import DamagedFileError, InvalidInputError

_UNFINISHED = {"unfinished": "a process ended while it wrote this file and the one that it describes: write both again"}
_REMAINS_S = 24 * 3600.0
"""Temporary files of other machines are removed when they have not changed for so long."""
_MAX_NAME_BYTES = 255
"""Of a file or folder; Windows counts characters instead."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Generator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an error.

    If the block raises, `path` is unchanged and no temporary file remains. A symbolic link is written through.

    Args:
        path: the file to create or replace; its folder must exist.

    Yields:
        A binary file object opened for writing.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: `path` is a folder, or not a regular file.
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
    renames are not one atomic step, so each description is first replaced by a note that the files are unfinished. A
    process that dies between the renames leaves this note, which readers do not take for a description and
    `is_unfinished` recognizes, and never data with the description of other data.

    Symbolic links are written through: their targets are replaced, also those that do not exist yet.

    Yields:
        One path for each of `paths`; no file exists there yet, and the block must create it.

    Raises:
        FileNotFoundError: a folder does not exist.
        OSError: one of `paths` is a folder, or not a regular file.
    """
    targets = [_resolve(path) for path in paths]
    folders = {target.parent for target in targets}
    for path, target in zip(paths, targets, strict=True):
        _require_folder(target.parent)
        check_file_target(path)
    for folder in folders:
        remove_remains(folder, [target.name for target in targets if target.parent == folder])
    temporaries = tuple(_temporary_path(target) for target in targets)
    try:
        yield temporaries
        for temporary in temporaries:
            sync_file(temporary)
        for description in targets[1:]:
            write_json(description, _UNFINISHED)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    for folder in folders:
        sync_folder(folder)


def is_unfinished(description: str | os.PathLike) -> bool:
    """Whether a process died while `atomic_paths` replaced this description and the file that it describes."""
    try:
        return load_json(description) == _UNFINISHED
    except (OSError, DamagedFileError):
        return False


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a new temporary folder, and rename it to `path` when the block ends without an error.

    If the block raises, no folder remains.

    Args:
        path: the folder to create; it must not exist, and its parent must. A symbolic link to a folder that does not
            exist is written through.

    Raises:
        FileExistsError: `path` exists.
        FileNotFoundError: its parent does not exist.
    """
    target = _resolve(path)
    if target.exists():
        raise FileExistsError(f"{os.fspath(path)!r} already exists; choose another name, or remove it first")
    _require_folder(target.parent)
    with temporary_folder(target) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            sync_folder(file) if file.is_dir() else sync_file(file)
        sync_folder(temporary)
        try:
            os.rename(temporary, target)
        except OSError:
            if target.exists():  # "Directory not empty"
                message = f"{os.fspath(path)!r} was made by another process meanwhile; start this one again"
                raise FileExistsError(message) from None
            raise
    sync_folder(target.parent)


@contextmanager
def temporary_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a new folder beside a file or a folder that is to be written, and remove it when the block ends.

    The block may rename it. If the process is killed, the next one that writes `path` removes the folder.
    """
    target = _resolve(path)
    remove_remains(target.parent, [target.name])
    folder = _temporary_path(target)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_file_target(path: str | os.PathLike) -> None:
    """Raise an OSError if something other than a regular file exists at `path`, as renaming would replace a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder, but a file is to be written; give a file's name")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"{os.fspath(path)!r} is not a regular file (a device or a pipe?); give another name")


def remove_remains(folder: Path, names: list[str]) -> None:
    """Remove the temporary files and folders that dead processes have left for targets with these names."""
    targets = "|".join(map(re.escape, names))
    pattern = re.compile(rf"\.({targets})\.(?:(\w+)-(\d+)-)?[0-9a-f]{{8}}\.tmp")
    for entry in os.scandir(folder):
        if (match := pattern.fullmatch(entry.name)) is not None and _is_dead(entry, match[2], match[3]):
            with suppress(OSError):  # another process may remove it at the same time
                os.unlink(entry.path) if not entry.is_dir(follow_symlinks=False) else shutil.rmtree(entry.path)


def _is_dead(entry: os.DirEntry, machine: str | None, process_id: str | None) -> bool:
    """Whether the process that made a temporary file has ended, as far as one can know."""
    if machine == _machine() and process_id is not None:
        try:
            os.kill(int(process_id), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # of another user, and so alive
            pass
        return False
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _REMAINS_S
    except OSError:
        return False


@cache
def _machine() -> str:
    """Identify what process ids belong to: the machine, and on Linux the container."""
    if os.name == "nt":  # os.kill would end the process
        return "windows"
    container = ""
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {container}".encode()).hexdigest()[:6]


def _resolve(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(path))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {str(folder)!r} does not exist; create it first")


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


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


def check_path(path: str | os.PathLike) -> None:
    """Raise InvalidInputError if a path cannot be one on this system: with NUL or lone surrogates in it, or too long.

    Raises:
        InvalidInputError: it cannot.
    """
    name = f"{os.fspath(path)!r:.80}"  # a text that is given instead of a path can be long
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise InvalidInputError(f"{name} cannot be a path: it has a NUL or half of a surrogate pair")
    names = Path(os.fsdecode(path)).parts
    longest = max((len(name if os.name == "nt" else os.fsencode(name)) for name in names), default=0)
    if longest > _MAX_NAME_BYTES:
        raise InvalidInputError(
            f"{name}... is too long for a path: a name in it has {longest:,} bytes, at most {_MAX_NAME_BYTES} are "
            "allowed; save a text to a file and give its name, or, where an iterator of texts is taken, iter([text])"
        )


def check_regular_file(path: str | os.PathLike) -> None:
    """Check that a file can be read from its beginning to its end; opening a pipe that nobody writes would wait.

    Raises:
        FileNotFoundError: it does not exist.
        IsADirectoryError: it is a folder.
        InvalidInputError: it cannot be a path.
        OSError: it is something else, such as a pipe, a socket or a device.
    """
    check_path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}: check its path") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: give the path of one file")
    if not stat.S_ISREG(mode):
        raise OSError(
            f"{os.fspath(path)!r} is not a regular file (a pipe or a device?): save its content to a file first"
        )


def open_file(path: str | os.PathLike) -> io.BufferedReader:
    """Open a file for reading; every file of a user is opened by this.

    Raises:
        OSError: it cannot be opened, or is not a regular file (`check_regular_file`).
    """
    check_regular_file(path)
    return open(path, "rb")


def read_file(path: str | os.PathLike) -> bytes:
    """Read a small file, which `open_file` opens."""
    with open_file(path) as file:
        return file.read()


def make_folder(path: str | os.PathLike) -> None:
    """Create a folder and its parents if they do not exist; a link to a folder that does not exist is followed."""
    check_path(path)
    try:
        _resolve(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(
            f"{os.fspath(path)!r} is a file, but a folder is needed; choose another name"
        ) from None


def read_text_file(path: str | os.PathLike, content: bytes | None = None) -> str:
    """Read a small text file in UTF-8, or its content, without the byte order mark that some editors write first.

    Newlines are not translated. (Text to train on or to encode is read by `basic.corpus.sources`.)

    Args:
        content: the file's content, if it has been read already.

    Raises:
        DamagedFileError: the file is not UTF-8; the message names the file and the byte offset.
    """
    try:
        return decode_utf8(read_file(path) if content is None else content)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{os.fspath(path)!r} is not valid UTF-8 at byte offset {error.start}") from None


def decode_utf8(content: bytes) -> str:
    """Decode UTF-8 without the byte order mark at its beginning, if there is one."""
    return content.removeprefix(codecs.BOM_UTF8).decode()


def load_json(path: str | os.PathLike, content: bytes | None = None, **options: Any) -> Any:
    """Read a JSON file, or parse its content if that has been read already; options are those of `json.loads`.

    Args:
        content: the file's content, if it has been read already.

    Raises:
        DamagedFileError: the file is not JSON; the message names the file and the line.
    """
    try:
        # Of bytes, json.loads skips a byte order mark itself.
        return json.loads(read_file(path) if content is None else content, **options)
    except ValueError as error:  # a JSONDecodeError, which names the line, or a UnicodeDecodeError
        raise DamagedFileError(f"{os.fspath(path)!r} is not JSON: {error}") from None
    except RecursionError:
        raise DamagedFileError(f"{os.fspath(path)!r} is not JSON of ours: it is nested too deeply") from None


def load_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds one object; a DamagedFileError says that it does not."""
    if not isinstance(content := load_json(path), dict):
        raise DamagedFileError(f"{os.fspath(path)!r} must hold a JSON object, got {content!r:.40}")
    return content


Types = Mapping[str, type | tuple[type, ...]]


def load_object(path: str | os.PathLike, types: Types) -> dict[str, Any]:
    """Read a JSON file that holds one object with at least these keys.

    If the object has a checksum (`with_checksum`), it is compared with the other keys. Without one it is accepted: by
    removing it, a person accepts a file that was edited by hand.

    Args:
        types: the type of each key's value, or several; `type(None)` allows null.

    Raises:
        DamagedFileError: the file is not such an object, or its checksum is another.
    """
    value, name = load_json(path), os.fspath(path)
    if (problem := difference_from_object(value, types)) is not None:
        raise DamagedFileError(f"{name!r} {problem}")
    if _CHECKSUM in value and value != with_checksum(value):
        raise DamagedFileError(
            f"{name!r} has changed since it was written: its checksum is that of other values; restore it, or remove "
            f"the line {_CHECKSUM!r} if the change is meant"
        )
    return value


def difference_from_object(value: Any, types: Types) -> str | None:
    """Say how a JSON value differs from an object with at least these keys, or None if it does not."""
    if not isinstance(value, dict):
        return f"is not a JSON object, but {value!r:.40}"
    for key, allowed in types.items():
        if key not in value:
            return f"has no {key!r}"
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if type(value[key]) not in allowed:  # not isinstance, because True is an instance of int
            names = " or ".join(_JSON_NAMES[kind] for kind in allowed)
            return f"has {value[key]!r:.40} as {key!r}, which must be {names}"
    return None


_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_CHECKSUM = "checksum"


def with_checksum(content: Mapping[str, Any], name: str = _CHECKSUM) -> dict[str, Any]:
    """Return a JSON object with the SHA-256 of its other keys and values as its last key."""
    others = {key: value for key, value in content.items() if key != name}
    return {**others, name: hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()}


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Write a JSON file and a newline at its end, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=indent).encode() + b"\n")


def sha256_of_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
