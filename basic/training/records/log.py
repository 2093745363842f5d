"""The log of a training run: JSON lines in metrics.jsonl, a progress line in the terminal, and trackers."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from basic.common.command_line import escape
from basic.common.config_files import to_table
from basic.common.files import sync_folder
from basic.common.native.object_files import has_objects
from basic.training.parallel.devices import PEAK_BF16_FLOPS
from basic.training.records.metrics import encode_record, read_all_records
from basic.training.records.trackers import Tracker, open_trackers
from basic.training.settings import RunConfig

_LINE_INTERVAL_S, _LINES_PER_RUN_TIME = 10.0, 50
"""Time between two progress lines outside a terminal: at least so many seconds, and at least the time since the start
divided by this number, so that the output of a long run stays readable."""


class RunLog:
    """The log of a run, as a context manager that is open during training.

    No failure of the log ends the training: lines that cannot be written because the disk is full are kept and written
    later, and a tracker that fails is closed. Both print a warning.

    Attributes:
        last_step: the last step that has a record.

    Args:
        run_dir: records are appended to its `metrics.jsonl`.
        flops_per_token: floating-point operations of training per token; with 0, no MFU is shown.
        device_name: name of the device of each rank, from `basic.training.parallel.devices.device_name`.
        progress: show progress on stderr: a live line in a terminal, else a line every few seconds.

    Raises:
        InvalidConfigError: a tracker is unknown or not installed (when the log is opened).
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        first_step: int,
        flops_per_token: float,
        device_name: str,
        num_processes: int = 1,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path = run_dir / "metrics.jsonl"
        self._config, self._first_step, self._total_steps = config, first_step, config.train.steps
        self._flops_per_token = flops_per_token
        self._peak_flops = PEAK_BF16_FLOPS.get(device_name, 0.0) * num_processes
        self._device_name, self._num_processes = device_name, num_processes
        self._progress, self._clock = progress, clock
        self._stderr = sys.stderr
        self._live = progress and _is_terminal(sys.stderr)
        self._redirected = ExitStack()
        self._lock = threading.Lock()  # checkpoints are logged from their own thread
        self._unwritten: deque[bytes] = deque()
        self._warned = False
        self.last_step, self._shown_step, self._num_averaged = 0, first_step, 1
        self._latest: dict[str, Any] = {}  # the newest value of every metric

    def __enter__(self) -> RunLog:
        run_dir, settings = self._path.parent, self._config.train
        self._trackers = open_trackers(
            settings.trackers, run_dir, first_step=self._first_step, config_table=to_table(self._config)
        )
        if self._path.exists():
            self.last_step = max((record["step"] for record in read_all_records(self._path)), default=0)
        # Unbuffered: a buffer would keep the bytes of a failed write and write them again later.
        self._file = open(self._path, "ab", buffering=0)
        sync_folder(run_dir)
        self._started_s = self._clock()
        self._pace = self._first_step, self._started_s
        self._last_line_s = -math.inf
        self._bar = tqdm(
            total=self._total_steps or None,
            initial=self._first_step,
            desc="training",
            dynamic_ncols=True,
            smoothing=0.1,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}",
            disable=not self._live,
        )
        if self._live:  # warnings of other packages go above the live line
            above: Any = DummyTqdmFile(self._stderr)
            self._redirected.enter_context(redirect_stderr(above))
        if self._progress:
            tokens_per_step = settings.batch_size * self._config.model.context_length
            steps = f"steps {self._first_step + 1:,} to {self._total_steps:,}"
            steps = steps if self._total_steps else f"as many steps as fit into {settings.minutes:g} min"
            steps += f", {tokens_per_step:,} tokens each"
            times = f"{self._num_processes} x " if self._num_processes > 1 else ""
            # A hidden folder is a temporary one, which its command will rename.
            where = "" if Path(run_dir).name.startswith(".") else f" in {run_dir}"
            self.print_message(f"training{where}: {steps}, on {times}{self._device_name}")
            if not settings.compile and self._device_name not in ("cpu", "mps"):  # a compiled model has its own line
                self.print_message("the first steps compile and tune kernels, which no speed includes")
            elif not settings.compile and self._device_name == "cpu" and not has_objects("kernels"):
                self.print_message("the first step compiles kernels, once on this machine, which no speed includes")
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._write_lines()
        self._file.close()
        self._redirected.close()
        self._bar.close()
        if self._unwritten:
            self.print_message(f"warning: the last {len(self._unwritten)} lines of {self._path} could not be written")
        for tracker in list(self._trackers):
            self._call(tracker, tracker.close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl, send it to the trackers, and show its metrics.

        Args:
            record: has a "step", and a "kind" unless it is a training record. Non-finite numbers are written as null,
                because JSON has no NaN.
        """
        step = record["step"]
        record = {key: None if _is_nonfinite(value) else value for key, value in record.items()}
        with self._lock:
            self.last_step = max(self.last_step, step)
            self._unwritten.append(encode_record(record))
            self._write_lines()
            for tracker in list(self._trackers):
                self._call(tracker, tracker.log, record)
        if self._progress and "kind" not in record:
            self._show(record)

    def sync(self) -> None:
        """Write all records to the disk itself, so that a power failure does not remove them."""
        with self._lock:
            self._write_lines()
            with suppress(OSError):  # a failing disk is reported when the checkpoint is written
                os.fsync(self._file.fileno())

    def print_message(self, text: str) -> None:
        """Print a line to stderr, above the live line if there is one."""
        with suppress(OSError):  # stderr may be a file on the full disk
            tqdm.write(escape(text), file=self._stderr)  # it may quote another program's error

    def set_total_steps(self, steps: int) -> None:
        """Set the number of steps of a run that began without one."""
        self._total_steps = self._bar.total = steps
        if self._progress:
            self.print_message(f"the run takes {steps:,} steps")

    def update_progress(self, steps_done: int, loss: float | None = None) -> None:
        """Show the number of steps and the newest loss that is known; this does not wait for the device."""
        if steps_done == self._first_step + 1:  # the first step compiles: the time left is that of the others
            self._pace = steps_done, self._clock()
        if self._live:
            if loss is not None and "tokens_per_s" not in self._latest:
                self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update(steps_done - self._bar.n)
        elif self._progress and loss is not None and self._is_time_for_a_line():
            self._print_line({"step": steps_done, "train_loss": loss})

    def _write_lines(self) -> None:
        """Write the unwritten lines to the file, as many complete ones as the disk has space for."""
        try:
            while self._unwritten:
                self._append(self._unwritten[0])
                self._unwritten.popleft()
            self._warned = False
        except OSError as error:
            if not self._warned:
                self.print_message(
                    f"warning: {self._path} cannot be written ({error}); its lines are kept and will be tried again"
                )
            self._warned = True

    def _append(self, line: bytes) -> None:
        """Append a complete line, or nothing: a full disk may take the first bytes of a line and refuse the rest."""
        size_bytes = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(size_bytes)
            raise

    def _call(self, tracker: Tracker, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of a tracker; drop the tracker if it fails, so that training continues."""
        try:
            method(*arguments)
        except Exception as error:  # trackers are other people's packages, which may raise anything
            self._trackers.remove(tracker)
            name = type(tracker).__name__.strip("_")
            self.print_message(f"warning: the tracker {name} failed and gets no more records: {error}")

    def _show(self, record: Mapping[str, Any]) -> None:
        self._num_averaged, self._shown_step = record["step"] - self._shown_step, record["step"]
        self._latest |= record
        if self._live:
            self._bar.set_postfix_str(", ".join(self._format_metrics(self._latest)))
            return
        if self._is_time_for_a_line() or record["step"] == self._total_steps:
            self._print_line(record)

    def _is_time_for_a_line(self) -> bool:
        now_s = self._clock()
        interval_s = max(_LINE_INTERVAL_S, (now_s - self._started_s) / _LINES_PER_RUN_TIME)
        return now_s - self._last_line_s >= interval_s

    def _print_line(self, record: Mapping[str, Any]) -> None:
        now_s, steps_done = self._clock(), record["step"]
        self._last_line_s = now_s
        metrics, total = self._format_metrics(record), ""
        # Between two records, a line has the loss of one step.
        if record.get("train_loss") and "tokens_per_s" in record and self._num_averaged > 1:
            metrics[0] = f"mean {metrics[0]}"
        if self._total_steps:
            step, since_s = self._pace
            if steps_done > max(step, self._first_step + 1):  # the time of the first step says nothing of the others
                step_s = (now_s - since_s) / (steps_done - step)
                metrics.append(f"{tqdm.format_interval((self._total_steps - steps_done) * step_s)} left")
            total = f"/{self._total_steps:,}"
        self.print_message(f"step {steps_done:,}{total}: {', '.join(metrics)}")

    def _format_metrics(self, record: Mapping[str, Any]) -> list[str]:
        metrics = []
        for name, key in (("loss", "train_loss"), ("validation", "valid_loss")):
            if record.get(key) is not None:
                metrics.append(f"{name} {record[key]:.3f}")
        if rate := record.get("tokens_per_s"):
            metrics.append(f"{tqdm.format_sizeof(rate)} tokens/s")
            if self._peak_flops and self._flops_per_token:
                metrics.append(f"{rate * self._flops_per_token / self._peak_flops:.1%} MFU")
        return metrics


class NullLog:
    """A log that writes nothing, for all ranks but rank 0."""

    last_step = 0

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def set_total_steps(self, steps: int) -> None:
        pass

    def update_progress(self, steps_done: int, loss: float | None = None) -> None:
        pass

    def print_message(self, text: str) -> None:
        pass


def _is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal of known size. Without a size, as in some containers, tqdm shows nothing."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
