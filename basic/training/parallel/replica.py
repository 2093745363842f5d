"""Data parallelism with replicas: gradients are summed over processes while the backward pass runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from basic.transformer.kernels import dispatch

_Sent: TypeAlias = "tuple[list[Tensor], list[Tensor], dist.Work]"
"""Gradients, what they are added up in (themselves, unless that is in another precision), and how to wait for it."""


class Replica:
    """Adds up the gradients of a model with those of the other processes, while its backward pass still runs.

    It is what DDP does, but gradients travel from where they were written, without copies, each in a precision of its
    own, and from the first step on in one order, so that a resumed run adds up as the one before it did.

    A group that is complete waits until the next gradient of an attention begins. Those kernels are many small
    programs, which hardly notice that others run beside them; a large matrix product fills the GPU with one wave of
    programs, and takes twice its time if a few of them find no place.
    """

    def __init__(self, pieces: Sequence[Module], dtype: torch.dtype | None, size: int):
        self.dtype, self.size, self.last = dtype, size, False
        self.waiting: list[Tensor] = []  # parameters whose gradients are all there and are to be sent
        self.sent: list[_Sent] = []
        groups: list[list[Tensor]] = [[] for _ in pieces]
        self.arrived: list[set[Tensor]] = [set() for _ in pieces]
        seen: set[Tensor] = set()
        for piece, group in zip(pieces, groups, strict=True):
            for parameter in piece.parameters():
                # A tied matrix belongs to the first piece that has it, whose gradients come last.
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    # Vectors are too small to be worth an operation for each piece.
                    (group if parameter.ndim > 1 else groups[0]).append(parameter)
        for group, arrived in zip(groups, self.arrived, strict=True):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, group, arrived))

    def backward(self, loss: Tensor, last: bool) -> Iterable[list[Tensor]]:
        for arrived in self.arrived:
            arrived.clear()  # of a pass that failed, as what follows
        self.waiting, self.sent, self.last = [], [], last
        try:
            with dispatch.before_attention_gradients(self._send):
                # Each computes its share of the mean, so what travels need only be added up.
                (loss / self.size).backward()
        finally:
            self.last = False  # backward passes of others send nothing
        if any(self.arrived):
            raise RuntimeError(
                f"{sum(map(len, self.arrived))} gradients were not sent, because others that travel with them are "
                "missing; whatever requires a gradient when training begins must get one in every backward pass"
            )
        self._send()
        sent, self.sent = self.sent, []
        return _added_up(sent)

    def _arrive(self, group: list[Tensor], arrived: set[Tensor], parameter: Tensor) -> None:
        """Take note that a parameter has its gradient, and so perhaps its group all of them."""
        arrived.add(parameter)
        if len(arrived) < len(group):
            return
        arrived.clear()
        if self.last:
            self._send()  # no attention has begun since the group before
            self.waiting = group

    def _send(self) -> None:
        """Send the gradients that wait, if there are any."""
        gradients, sums = [], []
        for parameter in self.waiting:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            sums.append(parameter.grad.to(self.dtype or parameter.grad.dtype))
        self.waiting = []
        if gradients:
            options = dist.AllreduceCoalescedOptions()
            options.asyncOp = True
            assert dist.group.WORLD is not None
            self.sent.append((gradients, sums, dist.group.WORLD.allreduce_coalesced(sums, options)))


def _added_up(sent: list[_Sent]) -> Iterable[list[Tensor]]:
    """The gradients that were sent, in that order, each group waited for when it is its turn."""
    for gradients, sums, work in sent:
        work.wait()
        for gradient, total in zip(gradients, sums, strict=True):
            if total is not gradient:
                gradient.copy_(total)
        yield gradients
