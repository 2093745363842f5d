"""A worker that dies in the middle of its work; a module of its own, which a worker imports in no time."""

import os
import signal
from pathlib import Path

from basic.corpus.counting import count_shard


def die_once(flag: str, function, *arguments):
    """Call the function whose last argument is a path to write to, but for the first time: then be killed instead."""
    if not os.path.exists(flag):
        Path(flag).touch()
        Path(arguments[-1] + ".half.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)


def die(path: str) -> dict:
    os._exit(1)


def dying_count_shard(*arguments):
    return die_once(str(Path(arguments[-1]).parent / "died"), count_shard, *arguments)
