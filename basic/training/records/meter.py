"""What the steps of a run measure, read from the device a few steps behind it, so that it is never waited for."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS_TOGETHER = 4
"""Steps whose numbers travel together. A step is known at the latest when twice as many have been enqueued."""


class StepNumbers(NamedTuple):
    """What a step gave; the step is counted from 1."""

    step: int
    learning_rate: float
    loss: float
    gradient_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Meter:
    """The mean loss and the speed between two records, and the steps whose numbers are not finite.

    Args:
        step: steps done before.
        wall_before_s: time that they took.
        tokens_a_step: of all rows.
        device: of the numbers.
    """

    def __init__(self, step: int, wall_before_s: float, tokens_a_step: int, device: torch.device):
        self.step, self.tokens_a_step, self.device = step, tokens_a_step, device
        self.started_s = time.perf_counter() - wall_before_s
        self._collecting: list[tuple[int, float, Tensor]] = []
        self._travelling: tuple[list[tuple[int, float, Tensor]], Tensor, torch.cuda.Event | None] | None = None
        self.latest: StepNumbers | None = None
        self.restart()

    def add(self, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> list[StepNumbers]:
        """Take note of a step; return those known by now whose loss or gradient was not finite."""
        self.step += 1
        self.steps_since += 1
        self._collecting.append((self.step, learning_rate, torch.stack((loss, gradient_norm))))
        if len(self._collecting) < _STEPS_TOGETHER:
            return []
        wrong = self._receive()
        self._send()
        return wrong if self._travelling is not None and self._travelling[2] is not None else wrong + self._receive()

    def catch_up(self) -> list[StepNumbers]:
        """Wait for all steps; return those whose loss or gradient was not finite and that no call has returned."""
        wrong = self._receive()
        self._send()
        return wrong + self._receive()

    def _send(self) -> None:
        """Let the device copy the numbers of some steps once it has them."""
        if not self._collecting:
            return
        numbers = torch.stack([pair for _, _, pair in self._collecting])
        if self.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._travelling = self._collecting, host, copied
        else:
            self._travelling = self._collecting, numbers, None
        self._collecting = []

    def _receive(self) -> list[StepNumbers]:
        if self._travelling is None:
            return []
        steps, numbers, copied = self._travelling
        self._travelling = None
        if copied is not None:
            copied.synchronize()
        wrong = []
        for (step, rate, _), (loss, norm) in zip(steps, numbers.tolist(), strict=True):
            known = StepNumbers(step, rate, loss, norm)
            if known.finite:
                self.latest = known
                self.losses.append(loss)
            else:
                wrong.append(known)
        return wrong

    def wall_s(self) -> float:
        """Seconds that the run has taken, those of earlier processes included."""
        return time.perf_counter() - self.started_s

    def record(self) -> dict[str, float]:
        """The numbers since the last restart, of the steps whose numbers were finite; after `catch_up`."""
        assert self.latest is not None
        since_s = time.perf_counter() - self.restarted_s
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_a_step,
            "wall_s": round(self.wall_s(), 3),
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else math.nan,
            "learning_rate": self.latest.learning_rate,
            "gradient_norm": self.latest.gradient_norm,
            "tokens_per_s": round(self.steps_since * self.tokens_a_step / since_s, 1),
        }

    def restart(self) -> None:
        """Begin the next interval here: its speed is that of training alone, without what was done between."""
        self.losses: list[float] = []
        self.restarted_s = time.perf_counter()
        self.steps_since = 0
