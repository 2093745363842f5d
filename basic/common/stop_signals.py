"""Ctrl-C and SIGTERM as a request that a loop looks at when it suits, so that nothing is left half done."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While the block runs, the first signal is noted in `received`; a second one ends the process at once.

    Outside of the main thread, where Python handles no signals, nothing is noted.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # no cleaning up, no waiting for threads: at once
        self.received = signal.Signals(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.received.name}: finishing this step and saving; once more to exit at once\n".encode())
