"""Sets of files in one folder that belong together: all are replaced at once, and their checksums are kept with them.

The set's `checksums.json` holds the SHA-256 of each file. It is checked whenever the set is read. To accept files that
were edited by hand, delete it. (Sets of earlier versions have none, and are accepted.)

A new set is written apart, `vocab.json` as `.vocab.json.next`. It becomes the valid one in a single step: when
`.checksums.json.next` appears, complete. After that the files are renamed. A reader that finds `.checksums.json.next`
reads the new set, wherever its files are, and the next writer ends the renaming that a killed process has begun.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from basic.common.errors import DamagedFileError
from basic.common.files import load_json, read_file, sha256_of_file, sync_file, sync_folder, write_json
from basic.common.folder_lock import FolderLock

CHECKSUMS_NAME = "checksums.json"
_ATTEMPTS, _WAIT_S = 5, 0.05  # to read a set while it is replaced


@contextmanager
def atomic_set(folder: str | os.PathLike, names: Iterable[str]) -> Generator[dict[str, Path]]:
    """Replace a set of files, all at once, when the block ends without an error.

    If the block raises, the disk is full, or the process is killed, the old set stays whole.

    Args:
        folder: must exist; it is locked during the block.

    Yields:
        The path at which the block writes the file of each name. A file that it does not write is not in the new set.

    Raises:
        BlockingIOError: another process writes the set.
        OSError: a file cannot be written.
    """
    folder, names = Path(os.path.realpath(folder)), list(names)
    with FolderLock(folder):
        _finish_switch(folder, names)
        paths = {name: _next_path(folder, name) for name in names}
        for path in paths.values():
            path.unlink(missing_ok=True)
        try:
            yield paths
            written = [name for name in names if paths[name].exists()]
            for name in written:
                sync_file(paths[name])
            checksums = {name: sha256_of_file(paths[name]) for name in written}
            write_json(_next_path(folder, CHECKSUMS_NAME), {"sha256": checksums})
        except BaseException:
            if not _next_path(folder, CHECKSUMS_NAME).exists():
                for path in paths.values():
                    path.unlink(missing_ok=True)
            raise
        _finish_switch(folder, names)


def read_set(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, bytes]:
    """Read a set of files, and check it.

    Returns:
        The content of each file that exists.

    Raises:
        DamagedFileError: the files are not those that were written; the message says how to accept them.
        OSError: a file cannot be read.
    """
    folder, names = Path(folder), list(names)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _read_set(folder, names)
        except DamagedFileError:
            time.sleep(_WAIT_S)  # the set may have been replaced meanwhile
    return _read_set(folder, names)


def remove_set(folder: str | os.PathLike) -> None:
    """Remove the files of a set that `atomic_set` wrote, as its checksums list them; other files stay."""
    folder = Path(folder)
    for path in (_next_path(folder, CHECKSUMS_NAME), folder / CHECKSUMS_NAME):
        if (content := _content(path)) is not None:
            for name in _parse(path, content):
                if Path(name).name == name:
                    (folder / name).unlink(missing_ok=True)
                    _next_path(folder, name).unlink(missing_ok=True)
            path.unlink()


def write_checksums(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Write `checksums.json` for files that exist already, and are complete."""
    folder = Path(folder)
    write_json(folder / CHECKSUMS_NAME, {"sha256": {name: sha256_of_file(folder / name) for name in names}})


def check_checksums(folder: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
    """Compare the contents of files with the `checksums.json` of their folder; without one, every content is right.

    Args:
        contents: file name to content, of all files of the set that exist.

    Raises:
        DamagedFileError: a file has changed, is missing, or is not in the set.
    """
    path = Path(folder) / CHECKSUMS_NAME
    if (checksums := _content(path)) is not None:
        _compare(path, _parse(path, checksums), contents)


def check_files(folder: str | os.PathLike) -> None:
    """Compare the files of a folder with its `checksums.json`, if it has one; a file may be as large as weights are.

    Raises:
        DamagedFileError: a file has changed or is missing.
    """
    path = Path(folder) / CHECKSUMS_NAME
    if (content := _content(path)) is not None:
        expected = {name: digest for name, digest in _parse(path, content).items() if Path(name).name == name}
        existing = {name: Path(folder) / name for name in expected if (Path(folder) / name).is_file()}
        _compare_digests(path, expected, {name: sha256_of_file(file) for name, file in existing.items()})


def _read_set(folder: Path, names: list[str]) -> dict[str, bytes]:
    journal = _next_path(folder, CHECKSUMS_NAME)
    switching = _content(journal)
    contents: dict[str, bytes] = {}
    for name in names if switching is None else _parse(journal, switching).keys() & set(names):
        content = None if switching is None else _content(_next_path(folder, name))
        if (content := _content(folder / name) if content is None else content) is not None:
            contents[name] = content
    # Read after the files: if the set was replaced meanwhile, they differ, and are read again.
    for path in (journal, folder / CHECKSUMS_NAME):
        if (checksums := _content(path)) is not None:
            _compare(path, _parse(path, checksums), contents)
            break
    return contents


def _compare(path: Path, expected: dict[str, str], contents: Mapping[str, bytes]) -> None:
    """Raise DamagedFileError if contents differ from the checksums, which were read from a path in their folder."""
    _compare_digests(path, expected, {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})


def _compare_digests(path: Path, expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            problem = "has changed" if name in actual else "is missing"
            if name not in expected:
                problem = "has been added"
            raise DamagedFileError(
                f"{path.parent / name} {problem} since its folder was written (the SHA-256 of each file is in "
                f"{path.name}). Restore it or write the folder again; if you have edited it on purpose, delete {path}"
            )


def _parse(path: Path, content: bytes) -> dict[str, str]:
    """File name to SHA-256."""
    checksums = load_json(path, content)
    checksums = checksums.get("sha256") if isinstance(checksums, dict) else None
    if not isinstance(checksums, dict):
        raise DamagedFileError(f"{path} does not hold checksums; delete it to read the files beside it unchecked")
    return checksums


def _content(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except FileNotFoundError:
        return None


def _finish_switch(folder: Path, names: list[str]) -> None:
    """Give the files of a complete new set their names; does nothing if there is none."""
    journal = _next_path(folder, CHECKSUMS_NAME)
    if (content := _content(journal)) is None:
        return
    new = _parse(journal, content)
    for name in names:
        if name not in new:
            (folder / name).unlink(missing_ok=True)
        elif (path := _next_path(folder, name)).exists():
            os.replace(path, folder / name)
    sync_folder(folder)
    os.replace(journal, folder / CHECKSUMS_NAME)
    sync_folder(folder)


def _next_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.next"
