"""What a command will write is new, or ours and to be replaced; anything else is refused before work starts."""

import os
import re

import pytest

from basic.common import outputs
from basic.common.errors import InvalidInputError
from basic.common.outputs import Output, check_outputs, reserved_outputs


def is_ours(path):
    return path.read_bytes() == b"ours"


def target(path, **options):
    return Output(path, "a token file", is_ours, **options)


def test_new_outputs_are_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    check_outputs([target(tmp_path / "new"), target(tmp_path / "a" / "b" / "new"), target(tmp_path / "link")])
    check_outputs([target(tmp_path / "empty", is_folder=True)], inputs=["https://x/\0", tmp_path / "none"])


def test_ours_is_replaced_only_on_request(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"ours")
    check_outputs([target(tmp_path / "a.bin")], overwrite=True)
    with pytest.raises(FileExistsError, match=r"a\.bin' already exists; choose another name, or replace it"):
        check_outputs([target(tmp_path / "a.bin")])


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"theirs")
    (tmp_path / "link.bin").symlink_to("a.bin")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    for output in (
        target(tmp_path / "a.bin"),
        target(tmp_path / "link.bin"),
        Output(tmp_path / "folder", "a token file", lambda path: False, is_folder=True),
    ):
        message = f"{re.escape(str(output.path))}' exists and is not a token file that this library wrote"
        with pytest.raises(FileExistsError, match=message):
            check_outputs([output], overwrite=True)


def test_without_a_way_to_recognize_it_nothing_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, is_folder in (("folder", True), ("file", False)):
        with pytest.raises(FileExistsError, match=rf"{name}' already exists; choose another name, or remove it first"):
            check_outputs([Output(tmp_path / name, "an export", is_folder=is_folder)], overwrite=True)


def test_an_input_is_never_an_output(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"ours")
    (tmp_path / "link").symlink_to("text")
    os.link(text, tmp_path / "same")
    for name in ("text", "link", "same"):
        with pytest.raises(InvalidInputError, match=rf"{name}', a token file to be written, is also an input"):
            check_outputs([target(tmp_path / "new"), target(tmp_path / name)], inputs=[text], overwrite=True)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"ours")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder' is a folder, but a file is to be written"):
        check_outputs([target(tmp_path / "folder")])
    with pytest.raises(NotADirectoryError, match="file' is a file, but a folder is to be written"):
        check_outputs([target(tmp_path / "file", is_folder=True)])
    with pytest.raises(NotADirectoryError, match="file' is a file, so nothing can be written below it"):
        check_outputs([target(tmp_path / "file" / "inner" / "a.bin")])
    with pytest.raises(FileExistsError, match="is not a regular file"):
        check_outputs([target(os.devnull)], overwrite=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_reserved_output_is_refused_to_others_and_checked_again(tmp_path, monkeypatch):
    first, second = target(tmp_path / "new" / "a"), target(tmp_path / "new" / "b")
    with reserved_outputs([first, second]):
        (tmp_path / "link").symlink_to("new")
        with (
            pytest.raises(BlockingIOError, match=f"is being written by process {os.getpid()} on"),
            reserved_outputs([target(tmp_path / "link" / "b")]),
        ):
            pass
        with reserved_outputs([target(tmp_path / "new" / "c")]):
            pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    # Another process writes the output between the check and the lock.
    monkeypatch.setattr(outputs, "make_folder", lambda folder: (tmp_path / "new" / "a").write_bytes(b"ours"))
    with pytest.raises(FileExistsError, match="a' already exists"), reserved_outputs([first]):
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_the_lock_of_a_killed_process_beside_a_complete_output_is_removed(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"ours")
    lock = tmp_path / ".a.bin.basic.lock"
    lock.touch()
    with pytest.raises(FileExistsError, match="already exists"):
        check_outputs([target(tmp_path / "a.bin")])
    assert not lock.exists()
    with reserved_outputs([target(tmp_path / "a.bin")], overwrite=True):
        holder = lock.read_bytes()
        with pytest.raises(FileExistsError, match="already exists"), reserved_outputs([target(tmp_path / "a.bin")]):
            pass
        assert lock.read_bytes() == holder, "a lock that is held stays"
    assert not lock.exists()
