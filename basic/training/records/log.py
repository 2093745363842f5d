"""What a training run says while it runs: lines of JSON in metrics.jsonl, a live line in the terminal, trackers."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from basic.training.devices import peak_bf16_flops
from basic.training.records.trackers import Tracker, open_trackers

SECONDS_BETWEEN_LINES = 10.0
"""At least so many where nobody watches: a log file of a day shall still be one that can be read."""


class RunLog:
    """The log of a run, open while it trains; a context manager.

    Nothing that goes wrong here ends the training: lines that a full disk refuses are kept and tried again, and a
    tracker that fails is given up, each with a warning.

    Args:
        run_dir: its `metrics.jsonl` is appended to.
        total_steps: the last step.
        first_step: steps done before this process.
        tokens_a_step: read in one step.
        flops_a_token: floating-point operations of training on one token; 0 for unknown.
        device: what trains, in each of the processes; on GPUs whose peak is known, the share of it that is used (MFU)
            is shown.
        progress: show how it goes, on stderr: a live line in a terminal, elsewhere a line every few seconds.
        trackers: of `basic.training.records.trackers.NAMES`.
        config_table: the configuration, for the trackers.

    Raises:
        ValueError: a tracker is unknown or not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        first_step: int,
        tokens_a_step: int,
        flops_a_token: float,
        device: torch.device,
        progress: bool,
        processes: int = 1,
        trackers: Sequence[str] = (),
        config_table: dict | None = None,
    ):
        self._path = run_dir / "metrics.jsonl"
        self._total_steps, self._first_step, self._tokens_a_step = total_steps, first_step, tokens_a_step
        self._flops_a_token, self._peak_flops = flops_a_token, (peak_bf16_flops(device) or 0) * processes
        self._device, self._processes, self._progress = device, processes, progress
        self._tracker_names, self._config_table = trackers, config_table
        self._live = progress and _can_be_redrawn(sys.stderr)
        self._lock = threading.Lock()  # checkpoints report from a thread of their own
        self._unsaved: deque[bytes] = deque()
        self._warned = False
        self._shown: dict[str, Any] = {}  # the newest of every number

    def __enter__(self) -> RunLog:
        run_dir = self._path.parent
        self._trackers = open_trackers(
            self._tracker_names, run_dir, first_step=self._first_step, config_table=self._config_table
        )
        # Without a buffer of Python's, a failed write leaves nothing behind that a later one would put out.
        self._file = open(self._path, "ab", buffering=0)
        self._started_s = time.monotonic()
        self._last_line_s = -math.inf
        self._bar = tqdm(
            total=self._total_steps,
            initial=self._first_step,
            desc="training",
            dynamic_ncols=True,
            smoothing=0.1,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}",
            disable=not self._live,
        )
        if self._progress:
            steps = f"steps {self._first_step + 1:,} to {self._total_steps:,} of {self._tokens_a_step:,} tokens each"
            times = f"{self._processes} x " if self._processes > 1 else ""
            self.message(f"training in {run_dir}: {steps}, on {times}{_device_name(self._device)}")
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._save_lines()
        self._file.close()
        self._bar.close()
        if self._unsaved:
            self.message(f"warning: the last {len(self._unsaved)} lines of {self._path} could not be written")
        for tracker in list(self._trackers):
            self._try(tracker, tracker.close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and show and pass on what it says.

        Args:
            record: has a "step", and a "kind" unless it is one of training. Numbers that are not finite become null:
                JSON has no word for them.
        """
        record = {key: None if _not_finite(value) else value for key, value in record.items()}
        with self._lock:
            self._unsaved.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._save_lines()
            for tracker in list(self._trackers):
                self._try(tracker, tracker.log, record)
        if self._progress and "kind" not in record:
            self._show(record)

    def message(self, text: str) -> None:
        """Print a line on stderr, above the live line where there is one."""
        with suppress(OSError):  # it may go into a file, on the disk that is full
            tqdm.write(text, file=sys.stderr)

    def step(self, done: int) -> None:
        """Move the live line on to so many steps; cheap, and the device is not waited for."""
        if self._live:
            self._bar.update(done - self._bar.n)

    def _save_lines(self) -> None:
        """Put the waiting lines into the file, as many whole ones as there is room for."""
        try:
            while self._unsaved:
                self._append(self._unsaved[0])
                self._unsaved.popleft()
            self._warned = False
        except OSError as error:
            if not self._warned:
                self.message(f"warning: {self._path} cannot be written ({error}); its lines are kept and tried again")
            self._warned = True

    def _append(self, line: bytes) -> None:
        """Put a line into the file, or nothing of it: a full disk takes what fits of it and fails at the rest."""
        end_bytes = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(end_bytes)
            raise

    def _try(self, tracker: Tracker, call: Any, *arguments: Any) -> None:
        """Call a tracker; no training ends because somebody's server does."""
        try:
            call(*arguments)
        except Exception as error:  # whatever other people's packages raise
            self._trackers.remove(tracker)
            self.message(f"warning: the tracker {type(tracker).__name__.strip('_')} is given up: {error}")

    def _show(self, record: Mapping[str, Any]) -> None:
        self._shown |= record
        if self._live:
            self._bar.set_postfix_str(", ".join(self._facts(self._shown)))
            return
        now_s, done = time.monotonic(), record["step"]
        if now_s - self._last_line_s < SECONDS_BETWEEN_LINES and done < self._total_steps:
            return
        self._last_line_s = now_s
        left_s = (self._total_steps - done) * (now_s - self._started_s) / max(1, done - self._first_step)
        facts = [*self._facts(record), f"{tqdm.format_interval(left_s)} left"]
        self.message(f"step {done:,}/{self._total_steps:,}: " + ", ".join(facts))

    def _facts(self, record: Mapping[str, Any]) -> list[str]:
        """A record's most important numbers, as a person reads them."""
        facts = []
        for name, key in (("loss", "train_loss"), ("validation", "valid_loss")):
            if record.get(key) is not None:
                facts.append(f"{name} {record[key]:.3f}")
        if rate := record.get("tokens_per_s"):
            facts.append(f"{tqdm.format_sizeof(rate)} tokens/s")
            if self._peak_flops and self._flops_a_token:
                facts.append(f"{rate * self._flops_a_token / self._peak_flops:.1%} MFU")
        return facts


class NoLog:
    """The log of a process that leaves all writing to the first one."""

    def __init__(self, run_dir: Path, **settings: Any):
        pass

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def step(self, done: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def _can_be_redrawn(stream: TextIO) -> bool:
    """Whether it is a terminal that knows its size; on others, as in some containers, tqdm shows nothing."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
