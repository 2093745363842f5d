"""Saving checkpoints while training goes on: the state is copied once, and a thread writes the copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from basic.training.checkpoints.file import take_snapshot, write_snapshot
from basic.training.checkpoints.sharded import take_parts, write_parts
from basic.training.parallel.world import ALONE, World, is_sharded


class BackgroundSaver:
    """Writes one checkpoint at a time, in a thread; a context manager, which waits for the last at its end.

    The copy lies in memory that is used again for the next one, on a GPU's host pinned, so that the device copies into
    it beside the computation. It is the only copy: the next state is taken when the one before has been written.

    Args:
        world: the processes that each have a part of a sharded model. All of them start the same saves; their threads
            agree through a group of their own.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._buffers: list[Tensor] = []

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    @property
    def busy(self) -> bool:
        """Whether the one before is still being written."""
        return self._writing is not None and not self._writing.done()

    def start(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        iteration: int,
        path: str | os.PathLike,
        *,
        extra: dict,
        then: Callable[[], None],
    ) -> None:
        """Copy the state and have it written; returns when the model may be changed again.

        Args:
            model, optimizer, iteration, path, extra: as for `save_checkpoint`; of a sharded model, `path` is a folder.
            then: called by the thread once the file is on the disk.
        """
        assert not self.busy, "one at a time"
        device = next(model.parameters()).device
        unused = iter(self._buffers)
        buffers = []

        def to_host(tensor: Tensor) -> Tensor:
            buffer = next(unused, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
            buffers.append(buffer)
            return buffer.copy_(tensor, non_blocking=True)

        if is_sharded(model):
            parts = take_parts(model, optimizer, iteration, extra=extra, to_host=to_host)
            write = partial(write_parts, parts, path, self.world)
        else:
            snapshot = take_snapshot(model, optimizer, iteration, extra=extra, to_host=to_host)
            write = partial(write_snapshot, snapshot, path)
        self._buffers = buffers
        copied = torch.cuda.Event() if device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._writing = self._thread.submit(_write, write, copied, then)

    def finish(self, *, wait: bool) -> None:
        """Raise what went wrong in the thread, if something did; once.

        Args:
            wait: until the file is on the disk; otherwise only say what is known now.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()


def _write(write: Callable[[], None], copied: torch.cuda.Event | None, then: Callable[[], None]) -> None:
    if copied is not None:
        copied.synchronize()  # of the copies alone; the steps enqueued after them are not waited for
    write()
    then()
