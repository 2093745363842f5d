"""Save checkpoints while training continues: the state is copied to CPU memory, and a thread writes the copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from basic.training.checkpoints.file import stage_checkpoint, write_staged_checkpoint
from basic.training.checkpoints.sharded import stage_shards, write_shards
from basic.training.parallel.world import SINGLE_PROCESS, World, is_sharded


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread; a context manager, which waits for the last one when it exits.

    There is one copy of the state in CPU memory. Its buffers are reused for every checkpoint, so the next state is
    copied after the previous one has been written. For a GPU the buffers are pinned, so the copy runs beside the
    computation.

    Args:
        world: the ranks that each write shards of a sharded model. All of them start the same saves; their threads
            communicate through `World.checkpoint_group`.
    """

    def __init__(self, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._buffers: list[Tensor] = []

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def start(
        self,
        model: Module,
        optimizer: Optimizer,
        iteration: int,
        path: str | os.PathLike,
        *,
        extra: dict,
        on_saved: Callable[[], None],
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state and start to write it; afterwards the model may change.

        Args:
            model, optimizer, iteration, path, extra: as for `save_checkpoint`; for a sharded model, `path` is a folder.
            on_saved: called by the thread when the checkpoint is on the disk.
        """
        assert not self.is_busy, "a checkpoint is still being written"
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
            shards = stage_shards(model, optimizer, iteration, extra=extra, to_host=to_host)
            write = partial(write_shards, shards, path, self.world)
        else:
            staged = stage_checkpoint(model, optimizer, iteration, extra=extra, to_host=to_host)
            write = partial(write_staged_checkpoint, staged, path)
        self._buffers = buffers
        copied = torch.cuda.Event() if device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._writing = self._thread.submit(_write, copied, before_write, write, on_saved)

    def finish(self, *, wait: bool) -> None:
        """Raise the error of the thread, if it has failed and the error was not raised before.

        Args:
            wait: wait until the checkpoint is on the disk; otherwise a save that is still running is left alone.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()


def _write(copied: torch.cuda.Event | None, *calls: Callable[[], None]) -> None:
    if copied is not None:
        copied.synchronize()  # waits for the copies only, not for steps that were enqueued after them
    for call in calls:
        call()
