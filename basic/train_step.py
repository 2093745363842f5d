"""One optimizer step as the training loop takes it: compiled, recorded and replayed where the device has that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from basic import distributed, kernels
from basic.data import to_device
from basic.distributed import ALONE, World, is_sharded, local_part
from basic.model import TransformerLM
from basic.optimizer import AdamW, clipping_factor
from basic.runs import TrainConfig, reduce_dtype

# Steps before the recording: compiling, tuning and the optimizer's first state happen in them.
_WARM_UP_STEPS = 3


class TrainStep:
    """Gradients of a batch's mean loss, clipped, then the optimizer; nothing in it waits for the device.

    Args:
        model, optimizer: changed by every call.
        config: of the run.
        device: of the model.
        world: the processes that compute the step together, each with rows of its own.
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: AdamW,
        config: TrainConfig,
        device: torch.device,
        world: World = ALONE,
    ):
        self.optimizer, self.config, self.device, self.world = optimizer, config, device, world
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sharded = is_sharded(model)
        kernels.warn_of_plain_attention(model.config.d_head, device, model.compute_dtype)
        with_kernels = kernels.available_on(device)
        compiles = config.compile and (device.type != "cuda" or with_kernels)
        self.loss_of = _compiled_loss(model, in_pieces=world.size > 1) if compiles else model.loss
        # Without its kernel AdamW asks the device for numbers, which cannot be recorded. Nor can a sharded model: what
        # FSDP2 gathers is in memory that it takes and gives back while the step runs.
        can_record = with_kernels and config.gradient_accumulation == 1 and not self.sharded
        self.warm_up_steps = _WARM_UP_STEPS + (distributed.WARM_UP_STEPS if world.size > 1 else 0)
        self.rate = torch.zeros((), device=device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # One for all warm-up steps: each stream keeps the memory that was freed in it for itself. And for the
        # recording, as DDP's gradients belong to the stream in which it was made.
        self.stream = torch.cuda.Stream(device) if can_record and config.cuda_graph else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.reduced_loss_of = world.reduced(model, self.loss_of, reduce_dtype(config, model.compute_dtype))

    def __call__(self, batch: tuple[Tensor, Tensor], learning_rate: float) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            batch: this process's rows, ids and the ids after them, int64 (batch, seq) each, on the CPU or already on
                the device.

        Returns:
            The mean loss in nats a token and the gradients' norm before clipping, both over all processes, on the
            device; the next call may overwrite them.
        """
        self.rate.fill_(learning_rate)
        if self.stream is None:
            return self._step(batch)
        self.calls += 1
        if self.calls <= self.warm_up_steps:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self._step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.static = to_device(batch[0], self.device).clone(), to_device(batch[1], self.device).clone()
            self.graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            # Only this thread may do nothing else meanwhile: the one that sends batches goes on.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self._step(self.static)
        for ids, new in zip(self.static, batch, strict=True):
            ids.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result

    def _step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.gradient_accumulation
        loss = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(zip(*(ids.chunk(parts) for ids in batch), strict=True), 1):
            inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
            part = self.reduced_loss_of(inputs, targets, number == parts) / parts
            self.world.arrive()  # the backward pass waits for the others
            part.backward()
            loss += part.detach()
        loss = self.world.mean(loss)
        gradients = [local_part(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        with torch.no_grad():
            add_up = self.world.sum if self.sharded else None
            norm, factor = clipping_factor(gradients, self.config.max_gradient_norm, add_up)
            # One number that is not finite anywhere makes the norm so; then nothing is changed, in any process.
            factor = torch.where(torch.isfinite(loss + norm), factor, torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("rate_factor", 1.0)
        self.optimizer.step(gradient_factor=factor)
        return loss, norm


def _compiled_loss(model: TransformerLM, *, in_pieces: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's loss, compiled.

    Args:
        in_pieces: compile each block by itself, once for all of them: its gradients are ready when its part of the
            backward pass is, and travel while the blocks before it are computed. Compiled as a whole, all would be
            ready at the end.
    """
    if not in_pieces:
        return torch.compile(model.loss)
    for piece in (model.token_embeddings, *model.layers, model.ln_final):
        piece.forward = torch.compile(piece.forward)
    return model.loss
