"""Data parallelism with replicas: gradients are all-reduced while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from basic.transformer.kernels import dispatch


def start_all_reduce(tensors: list[Tensor]) -> dist.Work:
    """Start to sum tensors over all ranks, in place."""
    options = dist.AllreduceCoalescedOptions()
    options.asyncOp = True
    assert dist.group.WORLD is not None
    return dist.group.WORLD.allreduce_coalesced(tensors, options)


class _PendingBucket(NamedTuple):
    """A bucket whose all-reduce has been started."""

    gradients: list[Tensor]
    sums: list[Tensor]
    """What is all-reduced: the gradients themselves, or copies of them in another precision."""
    work: dist.Work


class GradientReducer:
    """All-reduces the gradients of a replicated model while its backward pass runs, as DDP does.

    Unlike DDP it copies no gradients into flat buckets, lets each gradient have its own precision, and reduces the
    buckets in the same order from the first step on. So a resumed run sums in the same order as an uninterrupted one.

    The all-reduce of a complete bucket is started when the next attention's gradient begins. The attention kernels
    launch many small programs and hardly slow down when NCCL's kernels run beside them. A large matrix multiplication
    fills the GPU with one wave of programs, and takes twice as long if some of them find no free multiprocessor.

    Args:
        segments: the modules of the model in the order of the forward pass. Together they have all its parameters; each
            has a bucket.
        dtype: the precision in which gradients are reduced; None for the gradient's own.
        all_reduce: starts to sum tensors over all ranks, in place.
    """

    def __init__(
        self,
        segments: Sequence[Module],
        dtype: torch.dtype | None,
        world_size: int,
        *,
        all_reduce: Callable[[list[Tensor]], dist.Work] = start_all_reduce,
    ):
        self.dtype, self.world_size, self.all_reduce = dtype, world_size, all_reduce
        self.is_last = False  # whether the backward pass that runs is the last one of its step
        self.complete: list[Tensor] = []  # parameters of the bucket that is complete and not yet reduced
        self.pending: list[_PendingBucket] = []
        buckets: list[list[Tensor]] = [[] for _ in segments]
        self.ready: list[set[Tensor]] = [set() for _ in segments]  # parameters that have their gradient, by bucket
        assigned: set[Tensor] = set()
        for segment, bucket in zip(segments, buckets, strict=True):
            for parameter in segment.parameters():
                # A tied matrix belongs to its first segment, because its gradient is complete only there.
                if parameter.requires_grad and parameter not in assigned:
                    assigned.add(parameter)
                    # All vectors are in the first segment's bucket: they are too small for a share of every bucket.
                    (bucket if parameter.ndim > 1 else buckets[0]).append(parameter)
        for bucket, ready in zip(buckets, self.ready, strict=True):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._mark_ready, bucket, ready))

    def backward(self, loss: Tensor, is_last: bool) -> Iterable[list[Tensor]]:
        """Run a backward pass, as the function that `World.make_backward` returns does."""
        for ready in self.ready:
            ready.clear()  # what a failed pass left, also below
        self.complete, self.pending, self.is_last = [], [], is_last
        try:
            with dispatch.before_attention_gradients(self._flush):
                # Each rank computes its share of the mean, so the all-reduce is a sum.
                (loss / self.world_size).backward()
        finally:
            self.is_last = False  # backward passes of other code reduce nothing
        if any(self.ready):
            raise RuntimeError(
                f"{sum(map(len, self.ready))} gradients were not reduced, because other gradients of their bucket are "
                "missing; every parameter that requires a gradient when training begins must get one in every backward "
                "pass"
            )
        self._flush()
        pending, self.pending = self.pending, []
        return _wait_for_each(pending)

    def _mark_ready(self, bucket: list[Tensor], ready: set[Tensor], parameter: Tensor) -> None:
        """A parameter has its gradient; if it is the last one of its bucket, the bucket is complete."""
        ready.add(parameter)
        if len(ready) < len(bucket):
            return
        ready.clear()
        if self.is_last:
            self._flush()  # no attention has begun since the previous bucket
            self.complete = bucket

    def _flush(self) -> None:
        """Start the all-reduce of the complete bucket, if there is one."""
        gradients, sums = [], []
        for parameter in self.complete:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            sums.append(parameter.grad.to(self.dtype or parameter.grad.dtype))
        self.complete = []
        if gradients:
            self.pending.append(_PendingBucket(gradients, sums, self.all_reduce(sums)))


def _wait_for_each(buckets: list[_PendingBucket]) -> Iterable[list[Tensor]]:
    """The reduced gradients of each bucket, in order; waits for a bucket when it is requested."""
    for gradients, sums, work in buckets:
        work.wait()
        for gradient, total in zip(gradients, sums, strict=True):
            if total is not gradient:
                gradient.copy_(total)
        yield gradients
