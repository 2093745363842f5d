"""Ctrl-C and SIGTERM as a request that a loop checks between its steps, so that it can finish and save."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST_S = 1.0
"""The same signal again within this time is the same request: a scheduler signals all processes of a job, and `uv run`
or torchrun, which is one of them, sends it on."""


class StopSignals:
    """Context manager: the first signal is stored in `received`, a second request ends the process at once.

    It does nothing outside of the main thread, where Python cannot handle signals.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == self.received and time.monotonic() - self._received_s < _SAME_REQUEST_S:
                return
            os._exit(128 + number)  # at once: no clean-up, no waiting for threads
        self.received, self._received_s = signal.Signals(number), time.monotonic()
        # os.write, because the signal may have interrupted a print.
        os.write(2, f"\n{self.received.name}: finishing this step and saving; once more to exit at once\n".encode())
