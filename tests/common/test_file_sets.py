"""A set of files is replaced at once, whatever fails, and damage is found when it is read."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from basic.common.errors import DamagedFileError
from basic.common.file_sets import CHECKSUMS_NAME, atomic_set, check_checksums, read_set, write_checksums
from tests.helpers.forks import exit_status, run_in_fork

resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")

NAMES = ("vocab", "merges", "pattern")
OLD = {"vocab": b"old vocab", "merges": b"old merges", "pattern": b"old pattern"}
NEW = {"vocab": b"new vocab", "merges": b"new merges"}  # without a pattern


def write(folder: Path, contents: dict[str, bytes]) -> None:
    with atomic_set(folder, NAMES) as paths:
        for name, content in contents.items():
            paths[name].write_bytes(content)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_set_is_read_as_it_was_written(tmp_path):
    for contents in (OLD, NEW, OLD):
        write(tmp_path, contents)
        assert read_set(tmp_path, NAMES) == contents
        assert names_in(tmp_path) == sorted([*contents, CHECKSUMS_NAME])


def test_an_error_leaves_the_old_set(tmp_path):
    def fail():
        with atomic_set(tmp_path, NAMES) as paths:
            paths["vocab"].write_bytes(b"half")
            raise KeyboardInterrupt

    write(tmp_path, OLD)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_set(tmp_path, NAMES) == OLD
    assert names_in(tmp_path) == sorted([*OLD, CHECKSUMS_NAME])


def test_a_full_disk_leaves_the_old_set(tmp_path):
    write(tmp_path, OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path, {"vocab": b"new", "merges": bytes(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_set(tmp_path, NAMES) == OLD
    assert names_in(tmp_path) == sorted([*OLD, CHECKSUMS_NAME])


CALLS = ("unlink", "rename", "replace", "fsync", "open")


@pytest.mark.parametrize("first", [{}, OLD])
def test_a_process_that_dies_at_any_system_call_leaves_one_of_the_two_sets(tmp_path, first):
    """Every call that changes the folder, or makes it durable, is in turn the last one that the process does."""

    def write_and_die(folder: Path, remaining: int) -> None:
        calls = itertools.count()

        def dying(call):
            return lambda *arguments, **options: (
                os._exit(9) if next(calls) == remaining else call(*arguments, **options)
            )

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        write(folder, NEW)

    seen = []
    for count in range(200):
        folder = tmp_path / str(count)
        folder.mkdir()
        if first:
            write(folder, first)
        status = exit_status(run_in_fork(write_and_die, folder, count))
        seen.append(read_set(folder, NAMES))
        assert seen[-1] in (first, NEW), f"killed before call {count}"
        write(folder, OLD)  # the next writer clears what remains
        assert names_in(folder) == sorted([*OLD, CHECKSUMS_NAME])
        if status == 0:
            break
    assert len(seen) > 10
    switch = seen.index(NEW)
    assert seen == [first] * switch + [NEW] * (len(seen) - switch), "it switches once"
    assert switch < len(seen) - 3, "also before the last calls"


def test_a_changed_missing_or_added_file_is_found(tmp_path):
    write(tmp_path, OLD)
    for name, content, problem in [("vocab", b"old vocaB", "changed"), ("merges", None, "missing")]:
        path = tmp_path / name
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(
            DamagedFileError, match=rf"{name} .*{problem} .*if you have edited .* delete .*{CHECKSUMS_NAME}"
        ):
            read_set(tmp_path, NAMES)
        path.write_bytes(OLD[name])
    write(tmp_path, NEW)
    (tmp_path / "pattern").touch()
    with pytest.raises(DamagedFileError, match="pattern has been added"):
        read_set(tmp_path, NAMES)
    (tmp_path / CHECKSUMS_NAME).unlink()
    assert read_set(tmp_path, NAMES) == {**NEW, "pattern": b""}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": 1}', b"\xff"])
def test_damaged_checksums_are_found(tmp_path, content):
    write(tmp_path, OLD)
    (tmp_path / CHECKSUMS_NAME).write_bytes(content)
    with pytest.raises(DamagedFileError, match=CHECKSUMS_NAME):
        read_set(tmp_path, NAMES)


def test_checksums_of_files_that_exist(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    write_checksums(tmp_path, ["a"])
    check_checksums(tmp_path, {"a": b"a"})
    with pytest.raises(DamagedFileError, match=re.escape(f"{tmp_path / 'a'} has changed")):
        check_checksums(tmp_path, {"a": b"b"})


def test_a_reader_beside_a_writer_sees_one_of_the_two_sets(tmp_path):
    program = (
        "import sys; from basic.common.file_sets import atomic_set\n"
        "for number in range(100):\n"
        f"    with atomic_set(sys.argv[1], {NAMES!r}) as paths:\n"
        f"        for name in {NAMES!r}[: 2 + number % 2]: paths[name].write_bytes(b'%d' % number)\n"
    )
    write(tmp_path, dict.fromkeys(NAMES, b"0"))
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    num_read = 0
    while process.poll() is None:
        contents = read_set(tmp_path, NAMES)
        number = int(contents["vocab"])
        assert contents == dict.fromkeys(NAMES[: len(contents)], b"%d" % number)
        num_read += 1
    assert process.returncode == 0
    assert num_read > 10
