"""Losses and gradient norms of a run's steps, copied from the device in the background so that steps do not wait."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from basic.common.progress import peak_memory_bytes

_STEPS_PER_COPY = 4
"""Steps whose numbers are copied together. A step's numbers are known after at most twice as many steps."""


class StepMetrics(NamedTuple):
    """The numbers of a step, which is counted from 1."""

    step: int
    learning_rate: float
    loss: float
    gradient_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Meter:
    """Compute the mean loss and the speed of an interval of steps, and find steps whose numbers are not finite.

    Args:
        device: that the losses and norms are on.
    """

    def __init__(self, step: int, tokens_before: int, wall_before_s: float, tokens_per_step: int, device: torch.device):
        self.step, self.tokens, self.tokens_per_step, self.device = step, tokens_before, tokens_per_step, device
        self.started_s = time.perf_counter() - wall_before_s
        self._pending: list[tuple[int, float, Tensor]] = []
        self._in_flight: tuple[list[tuple[int, float, Tensor]], Tensor, torch.cuda.Event | None] | None = None
        self.latest: StepMetrics | None = None
        self.start_interval()

    def add(self, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> list[StepMetrics]:
        """Add a step; return the non-finite steps that are known by now and were not returned before."""
        self.step += 1
        self.tokens += self.tokens_per_step
        self.interval_steps += 1
        self._pending.append((self.step, learning_rate, torch.stack((loss, gradient_norm))))
        if len(self._pending) < _STEPS_PER_COPY:
            return []
        nonfinite = self._finish_copy()
        self._start_copy()
        is_asynchronous = self._in_flight is not None and self._in_flight[2] is not None
        return nonfinite if is_asynchronous else nonfinite + self._finish_copy()

    def synchronize(self) -> list[StepMetrics]:
        """Wait for the numbers of all steps; return the non-finite steps that were not returned before."""
        nonfinite = self._finish_copy()
        self._start_copy()
        return nonfinite + self._finish_copy()

    def _start_copy(self) -> None:
        """Enqueue the copy of all pending numbers from the device."""
        if not self._pending:
            return
        numbers = torch.stack([pair for _, _, pair in self._pending])
        if self.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._in_flight = self._pending, host, copied
        else:
            self._in_flight = self._pending, numbers, None
        self._pending = []

    def _finish_copy(self) -> list[StepMetrics]:
        """Wait for the copy in flight, if there is one, and return its non-finite steps."""
        if self._in_flight is None:
            return []
        steps, numbers, copied = self._in_flight
        self._in_flight = None
        if copied is not None:
            copied.synchronize()
        nonfinite = []
        for (step, rate, _), (loss, norm) in zip(steps, numbers.tolist(), strict=True):
            metrics = StepMetrics(step, rate, loss, norm)
            if metrics.finite:
                self.latest = metrics
                self.losses.append(loss)
            else:
                nonfinite.append(metrics)
        return nonfinite

    def wall_s(self) -> float:
        """Return the run's training time in seconds, earlier processes included."""
        return time.perf_counter() - self.started_s

    def record(self) -> dict[str, float]:
        """Return the numbers of the interval, without non-finite steps; call `synchronize` before."""
        assert self.latest is not None
        interval_s = time.perf_counter() - self.interval_started_s
        return {
            "step": self.step,
            "tokens": self.tokens,
            "wall_s": round(self.wall_s(), 3),
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else math.nan,
            "learning_rate": self.latest.learning_rate,
            "gradient_norm": self.latest.gradient_norm,
            "tokens_per_s": round(self.interval_steps * self.tokens_per_step / interval_s, 1),
            **memory_use(self.device),
        }

    def start_interval(self) -> None:
        """Start a new interval. Time between `record` and this call, such as an evaluation, is in no interval."""
        self.losses: list[float] = []
        self.interval_started_s = time.perf_counter()
        self.interval_steps = 0


def memory_use(device: torch.device) -> dict[str, int]:
    """The most memory that was in use so far: of this process, and of tensors on its GPU."""
    use = {"cpu_memory_bytes": peak_memory_bytes()[0]}
    if device.type == "cuda":
        use["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return use


_UNTIMED_STEPS, _TIMED_STEPS = 8, 8
"""Steps that compile and tune, and the smallest number of steps to time after them."""
_TIMED_SHARE = 0.01
"""Share of the time that is measured at least."""


class TimeBudget:
    """Plans how many steps a run takes, from the time of the first ones.

    Args:
        overhead: seconds of other work for each second of steps, such as evaluations.
    """

    def __init__(self, seconds: float, meter: Meter, overhead: float = 0.0):
        self.seconds, self.meter, self.overhead = seconds, meter, overhead
        self._first_step = meter.step + _UNTIMED_STEPS
        self._first_s = 0.0

    def plan(self) -> int:
        """The number of steps of the run, at least one more than it has done; 0 while it cannot be known."""
        step = self.meter.step
        if step == self._first_step:
            self._first_s = self._wall_s()
        timed_steps, remaining_s = step - self._first_step, self.seconds - self.meter.wall_s()
        if remaining_s <= 0:  # too short a time
            return step + 1
        if timed_steps < _TIMED_STEPS or self.meter.wall_s() - self._first_s < _TIMED_SHARE * self.seconds:
            return 0
        now_s = self._wall_s()
        step_s = (now_s - self._first_s) / timed_steps * (1 + self.overhead)
        return step + max(1, round((self.seconds - now_s) / step_s))

    def _wall_s(self) -> float:
        if self.meter.device.type == "cuda":  # the CPU runs ahead of it
            torch.cuda.synchronize(self.meter.device)
        return self.meter.wall_s()
