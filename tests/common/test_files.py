"""A file or a folder appears complete or not at all, whatever fails."""

import os

import pytest

from basic.common.errors import DamagedFileError
from basic.common.files import atomic_folder, atomic_paths, atomic_write, load_json


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
    with (
        pytest.raises(FileNotFoundError),
        atomic_paths(tmp_path / "data", tmp_path / "sidecar") as (data, _),
    ):
        data.write_bytes(b"new data")
    assert contents(tmp_path) == {"data": b"old data"}


@pytest.mark.parametrize("failing_rename", [0, 1])
def test_data_never_has_the_sidecar_of_other_data(tmp_path, monkeypatch, failing_rename):
    """A failure at either rename never leaves an old file with a new one."""
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
    assert contents(tmp_path) == {"data": [b"old data", b"new data"][failing_rename]}


# --- Folders --------------------------------------------------------------------------------------------------


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


# --- JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), [(b'{"a": 1,\n', "line 2"), (b'"\xff"', "utf-8"), (b"", "line 1")])
def test_a_file_that_is_not_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"a\.json' is not JSON: .*{message}"):
        load_json(tmp_path / "a.json")
