"""One optimizer step as the training loop takes it: compiled, recorded and replayed where the device has that."""

from __future__ import annotations

import torch
from torch import Tensor

from basic import kernels
from basic.data import to_device
from basic.model import TransformerLM
from basic.optimizer import AdamW, clipping_factor
from basic.runs import TrainConfig

# Steps before the recording: compiling, tuning and the optimizer's first state happen in them.
_WARM_UP_STEPS = 3


class TrainStep:
    """Gradients of a batch's mean loss, clipped, then the optimizer; nothing in it waits for the device.

    Args:
        model, optimizer: changed by every call.
        config: of the run.
        device: of the model.
    """

    def __init__(self, model: TransformerLM, optimizer: AdamW, config: TrainConfig, device: torch.device):
        self.optimizer, self.config, self.device = optimizer, config, device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kernels.warn_of_plain_attention(model.config.d_head, device, model.compute_dtype)
        with_kernels = kernels.available_on(device)
        compiles = config.compile and (device.type != "cuda" or with_kernels)
        self.loss_of = torch.compile(model.loss) if compiles else model.loss
        # Without its kernel AdamW asks the device for numbers, which cannot be recorded.
        self.use_graph = with_kernels and config.cuda_graph and config.gradient_accumulation == 1
        self.rate = torch.zeros((), device=device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # One for all warm-up steps: each stream keeps the memory that was freed in it for itself.
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, batch: tuple[Tensor, Tensor], learning_rate: float) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            batch: ids and the ids after them, int64 (batch, seq) each, on the CPU or already on the device.

        Returns:
            The mean loss in nats a token and the gradients' norm before clipping, on the device; the next call
            may overwrite them.
        """
        self.rate.fill_(learning_rate)
        if not self.use_graph:
            return self._step(batch)
        self.calls += 1
        if self.calls <= _WARM_UP_STEPS:
            self.stream = self.stream or torch.cuda.Stream(self.device)
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
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self._step(self.static)
        for ids, new in zip(self.static, batch, strict=True):
            ids.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result

    def _step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.gradient_accumulation
        loss = torch.zeros((), device=self.device)
        for inputs, targets in zip(*(ids.chunk(parts) for ids in batch), strict=True):
            part = self.loss_of(to_device(inputs, self.device), to_device(targets, self.device)) / parts
            part.backward()
            loss += part.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        with torch.no_grad():
            norm, factor = clipping_factor(gradients, self.config.max_gradient_norm)
            # One number that is not finite anywhere makes the norm so; then nothing is changed.
            factor = torch.where(torch.isfinite(loss + norm), factor, torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("rate_factor", 1.0)
        self.optimizer.step(gradient_factor=factor)
        return loss, norm
