"""A file or a folder appears complete or not at all, whatever fails."""

import os
import subprocess
import sys
import time

import pytest

from basic.common.errors import DamagedFileError
from basic.common.files import (
    atomic_folder,
    atomic_paths,
    atomic_write,
    is_unfinished,
    load_json,
    read_text_file,
    remove_remains,
    write_json,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
        assert not (tmp_path / "a.bin").exists()
    assert contents(tmp_path) == {"a.bin": b"new"}


def test_a_path_may_be_a_string_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("a.bin") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_only_the_old_file(tmp_path, error):
    def write_half_and_fail():
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise error

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error):
        write_half_and_fail()
    assert contents(tmp_path) == {"a.bin": b"old"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_leaves_only_the_old_file(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("No space left on device")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"a.bin": b"old"}


def test_the_contents_are_synchronized_before_the_rename(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    expected = [(tmp_path / "a.bin").stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert events == expected


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*absent.* does not exist; create it first"):
        atomic_write(tmp_path / "absent" / "a.bin").__enter__()
    assert contents(tmp_path) == {}


def test_no_file_is_replaced_if_the_block_did_not_create_all(tmp_path):
    (tmp_path / "data").write_bytes(b"old data")
    with pytest.raises(FileNotFoundError), atomic_paths(tmp_path / "data", tmp_path / "sidecar") as (data, _):
        data.write_bytes(b"new data")
    assert contents(tmp_path) == {"data": b"old data"}


@pytest.mark.parametrize("failing_rename", [0, 1, 2])
def test_data_never_has_the_sidecar_of_other_data(tmp_path, monkeypatch, failing_rename):
    """A failure at any rename never leaves an old file with a new one, nor data that nobody knows."""
    for name in ("data", "sidecar"):
        (tmp_path / name).write_bytes(b"old " + name.encode())
    renames = []
    replace = os.replace

    def fail(*paths):
        if len(renames) == failing_rename:
            raise OSError("power failure")
        renames.append(replace(*paths))

    def write_both():
        with atomic_paths(tmp_path / "data", tmp_path / "sidecar") as (data, sidecar):
            data.write_bytes(b"new data")
            sidecar.write_bytes(b"new sidecar")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power"):
        write_both()
    left = contents(tmp_path)
    assert left.keys() == {"data", "sidecar"}
    assert left["data"] == [b"old data", b"old data", b"new data"][failing_rename]
    assert is_unfinished(tmp_path / "sidecar") == (failing_rename > 0)
    assert left["sidecar"] == b"old sidecar" or failing_rename > 0


# --- Folders --------------------------------------------------------------------------------------------------


def test_of_two_processes_that_make_a_folder_the_second_is_refused(tmp_path):
    made_meanwhile = pytest.raises(FileExistsError, match="new' was made by another process meanwhile")
    with made_meanwhile, atomic_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").touch()
    assert contents(tmp_path / "new") == {"theirs": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_appears_only_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.bin").write_bytes(b"a")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert contents(tmp_path / "new" / "inner") == {"a.bin": b"a"}


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_failing_disk_leaves_no_folder(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "new") as folder:
        (folder / "a.bin").write_bytes(b"a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=rf"{name}' already exists; choose another name"):
            atomic_folder(tmp_path / name).__enter__()
    with pytest.raises(FileNotFoundError, match="create it first"):
        atomic_folder(tmp_path / "absent" / "new").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# --- Links, other kinds of files, and what killed processes leave --------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path, exists):
    (tmp_path / "there").mkdir()
    if exists:
        (tmp_path / "there" / "a.bin").write_bytes(b"old")
    (tmp_path / "link").symlink_to("there/a.bin")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "there") == {"a.bin": b"new"}


def test_a_link_to_a_new_folder_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to("new")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").write_bytes(b"a")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "new") == {"a": b"a"}


def test_a_folder_or_a_device_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(os.devnull)
    with pytest.raises(IsADirectoryError, match="folder' is a folder, but a file is to be written"):
        atomic_write(tmp_path / "folder").__enter__()
    with pytest.raises(FileExistsError, match="link' is not a regular file"):
        atomic_write(tmp_path / "link").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot ask whether a process lives")
def test_the_remains_of_killed_processes_are_removed_by_the_next(tmp_path):
    program = (
        "import os, sys; from basic.common.files import is_unfinished, atomic_folder, atomic_write\n"
        "with atomic_write(sys.argv[1] + '/a.bin') as file, atomic_folder(sys.argv[1] + '/b') as folder:\n"
        "    file.write(b'half'); (folder / 'c').touch(); print(flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    remains = {path.name for path in tmp_path.iterdir()}
    assert len(remains) == 2
    (tmp_path / ".a.bin.notes.tmp").touch()  # somebody's
    write_json(tmp_path / "a.bin", 1)
    remove_remains(tmp_path, ["b"])
    assert {path.name for path in tmp_path.iterdir()} == remains | {"a.bin", ".a.bin.notes.tmp"}, "the process lives"
    process.kill()
    process.wait()
    write_json(tmp_path / "other", 1)
    assert remains < {path.name for path in tmp_path.iterdir()}, "other targets"
    write_json(tmp_path / "a.bin", 1)
    with atomic_folder(tmp_path / "b"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "other", "b", ".a.bin.notes.tmp"}


@pytest.mark.parametrize("name", [".a.bin.0a1b2c3d.tmp", ".a.bin.fedcba-1-0a1b2c3d.tmp"])
def test_the_remains_of_other_machines_are_removed_when_they_are_old(tmp_path, name):
    (tmp_path / name).touch()
    write_json(tmp_path / "a.bin", 1)
    assert (tmp_path / name).exists()
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / name, (yesterday, yesterday))
    write_json(tmp_path / "a.bin", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


# --- JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), [(b'{"a": 1,\n', "line 2"), (b'"\xff"', "utf-8"), (b"", "line 1")])
def test_a_file_that_is_not_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"a\.json' is not JSON: .*{message}"):
        load_json(tmp_path / "a.json")


def test_json_that_is_nested_too_deeply_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(DamagedFileError, match=r"a\.json' .*nested too deeply"):
        load_json(tmp_path / "a.json")


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf[1]\r\n")
    assert load_json(tmp_path / "a") == [1]
    assert read_text_file(tmp_path / "a") == "[1]\r\n"
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(DamagedFileError, match=r"a' is not valid UTF-8 at byte offset 2"):
        read_text_file(tmp_path / "a")
