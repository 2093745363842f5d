"""A file or a folder appears whole or not at all, whatever fails on the way."""

import os

import pytest

from basic.common.files import atomic_folder, atomic_paths, atomic_write


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_file_appears_only_when_the_block_has_ended(tmp_path):
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
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def write_half_and_fail():
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise error

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error):
        write_half_and_fail()
    assert contents(tmp_path) == {"a.bin": b"old"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("No space left on device")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"a.bin": b"old"}


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder that holds the name."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    expected = [(tmp_path / "a.bin").stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert events == expected


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent.* create it first"):
        atomic_write(tmp_path / "absent" / "a.bin").__enter__()
    assert contents(tmp_path) == {}


def test_a_file_that_the_block_forgot_leaves_all_as_it_was(tmp_path):
    (tmp_path / "data").write_bytes(b"old data")
    with (
        pytest.raises(FileNotFoundError),
        atomic_paths(tmp_path / "data", tmp_path / "sidecar") as (data, _),
    ):
        data.write_bytes(b"new data")
    assert contents(tmp_path) == {"data": b"old data"}


@pytest.mark.parametrize("dies_at_rename", [0, 1])
def test_no_data_beside_the_description_of_another(tmp_path, monkeypatch, dies_at_rename):
    """Stop at either rename: what is left is never a mixture of an old and a new file."""
    for name in ("data", "sidecar"):
        (tmp_path / name).write_bytes(b"old " + name.encode())
    renames = []
    replace = os.replace

    def die(*paths):
        if len(renames) == dies_at_rename:
            raise OSError("the power is gone")
        renames.append(replace(*paths))

    def write_both():
        with atomic_paths(tmp_path / "data", tmp_path / "sidecar") as (data, sidecar):
            data.write_bytes(b"new data")
            sidecar.write_bytes(b"new sidecar")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="power"):
        write_both()
    assert contents(tmp_path) == {"data": [b"old data", b"new data"][dies_at_rename]}


# --- Folders --------------------------------------------------------------------------------------------------


def test_a_folder_appears_only_when_the_block_has_ended(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.bin").write_bytes(b"a")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert contents(tmp_path / "new" / "inner") == {"a.bin": b"a"}


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_folder_that_fails_leaves_nothing(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "new") as folder:
        (folder / "a.bin").write_bytes(b"a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_no_other_things_place(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=rf"{name}' is there already; choose another name"):
            atomic_folder(tmp_path / name).__enter__()
    with pytest.raises(FileNotFoundError, match="create it first"):
        atomic_folder(tmp_path / "absent" / "new").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
