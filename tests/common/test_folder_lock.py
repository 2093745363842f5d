"""One writer for a folder: a second is refused in one line that names the first."""

import os
import platform
import re
import subprocess
import sys

import pytest

from basic.common.folder_lock import LOCK_NAME, FolderLock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")

HOLD = (
    "import sys; from basic.common.folder_lock import FolderLock\nlock = FolderLock(sys.argv[1]); print(flush=True); "
)


def hold_elsewhere(folder, then: str = "sys.stdin.read(); lock.close()") -> subprocess.Popen:
    """Another process that holds the lock until its input ends, or it is killed."""
    command = [sys.executable, "-c", HOLD + then, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_holder_is_named(tmp_path):
    process = hold_elsewhere(tmp_path)
    expected = (
        rf"{re.escape(str(tmp_path))} is being written by process {process.pid} on {re.escape(platform.node())} since "
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(-c {re.escape(str(tmp_path))}\): wait until it has ended"
    )
    with pytest.raises(BlockingIOError, match=expected):
        FolderLock(tmp_path)
    process.communicate()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = hold_elsewhere(tmp_path)
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    with FolderLock(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with FolderLock(tmp_path / "a"), pytest.raises(BlockingIOError):
        FolderLock(tmp_path / "b")


def test_many_processes_never_hold_one_lock_together(tmp_path):
    """A lock file that its holder removes must not be locked by one process while another makes a new one."""
    inside = tmp_path / "inside"
    program = (
        "import os, sys; from pathlib import Path; from basic.common.folder_lock import FolderLock\n"
        "folder, count = Path(sys.argv[1]), 0\n"
        "while count < 200:\n"
        "    try:\n"
        "        with FolderLock(folder):\n"
        "            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL)); os.unlink(folder / 'inside')\n"
        "        count += 1\n"
        "    except BlockingIOError:\n"
        "        pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not inside.exists()


def test_a_file_system_without_locks_is_written_without_one(tmp_path, monkeypatch):
    def not_supported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", not_supported)
    with FolderLock(tmp_path), FolderLock(tmp_path):
        assert list(tmp_path.iterdir()) == []
