"""Who of several processes is still there: a thread in each says how far it is, and ends it when another is lost."""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SILENCE_S = 20.0
"""A process from which nothing was heard for so long is lost: stopped, killed, or its machine is gone."""
HANGING_S = 40.0
"""A process for which the others wait for so long in the middle of training hangs: it ends itself, and so the job.
Both leave room in a minute: torchrun kills a process that was stopped 30 s after the others have ended."""
_BEAT_S = 1.0
# In its first steps a process compiles, which may take one of them much longer than another.
_FIRST_ARRIVALS = 8
_PATIENCE_S = 5.0


class Watch:
    """A thread that says that this process lives and how far it is, and ends it when another one is lost.

    Processes that wait for each other in a collective cannot tell who is missing, and on a GPU not even that they wait.
    So each one writes into the store that all share (torchrun's) a line every second, and reads those of the others. A
    process counts the places where all wait for each other; one that stays behind hangs, unless it has said that it is
    busy with something of its own.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank = store, rank
        self.others = [other for other in range(size) if other != rank]
        self.arrivals = 0
        self.must_hurry = False
        self._beat = 0
        self._failed: str | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._behind: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.store.set_timeout(timedelta(seconds=SILENCE_S))
        self._say()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def hurried(self, must_hurry: bool) -> Generator[None]:
        """Whether this process must keep step with the others while the block runs."""
        before, self.must_hurry = self.must_hurry, must_hurry
        try:
            yield
        finally:
            self.must_hurry = before

    def fail(self, reason: str, *, abandoned: bool) -> str:
        """Say that this process ends, and find out for some seconds who else does.

        Args:
            abandoned: it ends because another one has left.

        Returns:
            If it was abandoned, what became of the other; else what the first process failed with, if it is the same.
        """
        self.stop()
        try:
            if abandoned:
                before = self._listen()
                for _ in range(5):
                    time.sleep(_BEAT_S / 2)
                    now = self._listen()
                    for rank, line in now.items():
                        if line["failed"]:
                            return f"{_name(rank, line)} failed: {line['failed']}"
                gone = [_name(rank, line) for rank, line in now.items() if line["beat"] == before[rank]["beat"]]
                return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone" if gone else ""
            self._failed = reason
            self._say()
            for _ in range(20 if self.rank else 0):
                failed = self._listen()[0]["failed"]
                if failed:
                    return failed if failed in reason else ""
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and with it the process that had it
            pass
        return ""

    def _say(self) -> None:
        self._beat += 1
        line = {"beat": self._beat, "arrivals": self.arrivals, "must_hurry": self.must_hurry, "failed": self._failed}
        who = {"process": os.getpid(), "machine": platform.node()}
        self.store.set(f"alive/{self.rank}", json.dumps({**line, **who}))

    def _listen(self) -> dict[int, dict[str, Any]]:
        keys = [f"alive/{other}" for other in self.others]
        return {other: json.loads(line) for other, line in zip(self.others, self.store.multi_get(keys), strict=True)}

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                self._say()
                lines = self._listen()
            except RuntimeError as error:
                self._end(f"the store that all processes share does not answer ({str(error).splitlines()[0]})")
            now_s = time.monotonic()
            for other, line in lines.items():
                self._judge(other, line, now_s)

    def _judge(self, other: int, line: dict[str, Any], now_s: float) -> None:
        name = _name(other, line)
        said = f"{line['beat']} {line['failed']}"
        if self._heard.get(other, ("", 0.0))[0] != said:
            self._heard[other] = said, now_s
        silent_s = now_s - self._heard[other][1]
        if line["failed"] and silent_s > _PATIENCE_S:
            self._end(f"{name} failed: {line['failed']}")
        if not line["failed"] and silent_s > SILENCE_S:
            self._end(f"{name} has given no sign of life for {silent_s:.0f} s: it was stopped or killed")
        # Who is behind, and since when. The one that hangs says itself where.
        distance = line["arrivals"] - self.arrivals
        late, at = (self.must_hurry, self.arrivals) if distance > 0 else (line["must_hurry"], line["arrivals"])
        late = late and at > _FIRST_ARRIVALS
        if distance == 0 or not late or self._behind.get(other, (-1, 0.0))[0] != at:
            self._behind[other] = at, now_s
        behind_s = now_s - self._behind[other][1]
        if distance > 0 and behind_s > HANGING_S:
            self._end(f"this process hangs: {name} has waited for it for {behind_s:.0f} s; it is here:", dump=True)
        if distance < 0 and behind_s > HANGING_S + _PATIENCE_S:
            self._end(f"{name} hangs: it has been waited for for {behind_s:.0f} s")

    def _end(self, reason: str, *, dump: bool = False) -> None:
        """End this process now: its main thread may wait where no exception reaches it."""
        os.write(2, f"\nrank {self.rank} (process {os.getpid()}) ends: {reason}\n".encode())
        if dump:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if not dump:
            os.write(2, b"go on from the last checkpoint with --resume\n")
        os._exit(1)


def _name(rank: int, line: dict[str, Any]) -> str:
    return f"rank {rank} (process {line['process']} on {line['machine']})"
