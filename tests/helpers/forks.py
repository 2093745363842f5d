"""Forks of the test's process, which die as a killed process does, and in which everything is imported already."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any


def run_in_fork(function: Callable[..., object], *arguments: Any) -> int:
    """Call a function in a fork of this process; return the fork's id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def exit_status(pid: int) -> int:
    """Wait for a fork and return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_killed(function: Callable[..., object], *arguments: Any) -> bool:
    """Call a function in a fork, and wait; return whether it ended by SIGKILL, such as `kill_this_process` sends."""
    return exit_status(run_in_fork(function, *arguments)) == -signal.SIGKILL


def kill_this_process(*arguments: Any) -> None:
    """Stands in for a system call at which the process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
