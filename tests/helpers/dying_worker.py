"""Tasks whose worker process dies; a module of its own with few imports, as each worker imports it."""

import os
import signal
from pathlib import Path


def die_once(flag: str, function, *arguments):
    """Call the function, whose last argument is a path to write to; the first call is killed instead.

    Args:
        flag: path of a file that is created by the first call.
    """
    if not os.path.exists(flag):
        Path(flag).touch()
        Path(arguments[-1] + ".0a1b2c3d.tmp").write_bytes(b"half")
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, SIGTERM kills
    return function(*arguments)


def die(path: str) -> dict:
    os._exit(1)
