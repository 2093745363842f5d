"""Detect lost and hung ranks: a thread of each rank publishes a heartbeat and ends the process if another is lost."""

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

HEARTBEAT_TIMEOUT_S = 20.0
"""A rank without a heartbeat for this long is lost: stopped, killed, or its machine is gone."""
HANG_TIMEOUT_S = 40.0
"""A rank for which the others have waited this long at a barrier hangs. It ends itself, which ends the job.

With either timeout a job ends within a minute, although torchrun waits 30 s before it kills a stopped process."""
_HEARTBEAT_INTERVAL_S = 1.0
# At the first barriers ranks may wait for a compilation, which can take much longer on one rank than on another.
_STARTUP_BARRIERS = 8
# How long a rank waits for a failed or hung rank to end itself first, because that rank knows the reason.
_GRACE_S = 5.0


class Watchdog:
    """A thread that publishes the heartbeat of this rank, and ends the process if another rank is lost.

    Ranks that wait for each other in a collective cannot tell which one is missing; on a GPU they do not even know that
    they wait. So every second each rank writes its heartbeat into the store that all ranks share (torchrun's), and
    reads those of the others. Each rank counts the barriers that it has reached, that is, the points where all ranks
    wait for each other. A rank whose count stays behind hangs, unless it has disabled the detection of hangs because it
    is busy with work that the others do not do.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank = store, rank
        self.other_ranks = [other for other in range(world_size) if other != rank]
        self.barriers = 0
        self.detects_hangs = False
        self._heartbeat = 0
        self._failure: str | None = None
        self._last_sign: dict[int, tuple[str, float]] = {}  # heartbeat and failure of each rank, and since when
        self._behind: dict[int, tuple[int, float]] = {}  # the barrier at which this or that rank is, and since when
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.store.set_timeout(timedelta(seconds=HEARTBEAT_TIMEOUT_S))
        self._publish()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def hang_detection(self, enabled: bool) -> Generator[None]:
        """Enable or disable the detection of hangs of this rank while the block runs."""
        before, self.detects_hangs = self.detects_hangs, enabled
        try:
            yield
        finally:
            self.detects_hangs = before

    def report_failure(self, reason: str, *, connection_lost: bool) -> str:
        """Publish that this rank fails, and wait some seconds to find out which other ranks fail.

        Returns:
            With `connection_lost`, what happened to the other rank. Otherwise the failure of rank 0, if it is the same
            as this one. An empty string if unknown.
        """
        self.stop()
        try:
            if connection_lost:
                before = self._read_others()
                for _ in range(5):
                    time.sleep(_HEARTBEAT_INTERVAL_S / 2)
                    now = self._read_others()
                    for rank, status in now.items():
                        if status["failure"]:
                            return f"{_process_name(rank, status)} failed: {status['failure']}"
                gone = [
                    _process_name(rank, status)
                    for rank, status in now.items()
                    if status["heartbeat"] == before[rank]["heartbeat"]
                ]
                return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone" if gone else ""
            self._failure = reason
            self._publish()
            for _ in range(20 if self.rank else 0):
                failure = self._read_others()[0]["failure"]
                if failure:
                    return failure if failure in reason else ""
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and so is the process that served it
            pass
        return ""

    def _publish(self) -> None:
        self._heartbeat += 1
        status = {
            "heartbeat": self._heartbeat,
            "barriers": self.barriers,
            "detects_hangs": self.detects_hangs,
            "failure": self._failure,
            "process": os.getpid(),
            "machine": platform.node(),
        }
        self.store.set(f"status/{self.rank}", json.dumps(status))

    def _read_others(self) -> dict[int, dict[str, Any]]:
        statuses = self.store.multi_get([f"status/{other}" for other in self.other_ranks])
        return {other: json.loads(status) for other, status in zip(self.other_ranks, statuses, strict=True)}

    def _run(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_INTERVAL_S):
            try:
                self._publish()
                statuses = self._read_others()
            except RuntimeError as error:
                self._terminate(f"the store that all ranks share does not answer ({str(error).splitlines()[0]})")
            now_s = time.monotonic()
            for other, status in statuses.items():
                self._check_heartbeat(other, status, now_s)
                self._check_barriers(other, status, now_s)

    def _check_heartbeat(self, other: int, status: dict[str, Any], now_s: float) -> None:
        sign = f"{status['heartbeat']} {status['failure']}"
        if self._last_sign.get(other, ("", 0.0))[0] != sign:
            self._last_sign[other] = sign, now_s
        silent_s = now_s - self._last_sign[other][1]
        name = _process_name(other, status)
        if status["failure"] and silent_s > _GRACE_S:
            self._terminate(f"{name} failed: {status['failure']}")
        if not status["failure"] and silent_s > HEARTBEAT_TIMEOUT_S:
            self._terminate(f"{name} has sent no heartbeat for {silent_s:.0f} s: it was stopped or killed")

    def _check_barriers(self, other: int, status: dict[str, Any], now_s: float) -> None:
        """End the process if this rank or the other one hangs; the one that hangs prints where."""
        lead = status["barriers"] - self.barriers
        if lead > 0:
            detect, barrier = self.detects_hangs, self.barriers
        else:
            detect, barrier = status["detects_hangs"], status["barriers"]
        detect = detect and barrier > _STARTUP_BARRIERS
        if lead == 0 or not detect or self._behind.get(other, (-1, 0.0))[0] != barrier:
            self._behind[other] = barrier, now_s
        behind_s = now_s - self._behind[other][1]
        name = _process_name(other, status)
        if lead > 0 and behind_s > HANG_TIMEOUT_S:
            self._terminate(
                f"this process hangs: {name} has waited for it for {behind_s:.0f} s; its stack is:", dump_stack=True
            )
        if lead < 0 and behind_s > HANG_TIMEOUT_S + _GRACE_S:
            self._terminate(f"{name} hangs: this process has waited for it for {behind_s:.0f} s")

    def _terminate(self, reason: str, *, dump_stack: bool = False) -> None:
        """End this process at once: its main thread may wait where no exception reaches it."""
        os.write(2, f"\nrank {self.rank} (process {os.getpid()}) ends: {reason}\n".encode())
        if dump_stack:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        else:
            os.write(2, b"resume from the last checkpoint with --resume\n")
        os._exit(1)


def _process_name(rank: int, status: dict[str, Any]) -> str:
    return f"rank {rank} (process {status['process']} on {status['machine']})"
