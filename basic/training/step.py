"""One optimizer step as the training loop takes it: compiled, recorded and replayed where the device has that."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from basic.model import Linear, TransformerLM
from basic.training.batches import BatchSampler, to_device
from basic.training.devices import reduce_dtype
from basic.training.parallel.world import ALONE, World, is_sharded
from basic.training.settings import TrainConfig
from basic.transformer.kernels import dispatch
from basic.transformer.optimizer import AdamW, clipping_factor


@torch.no_grad()  # not inference mode: what FSDP2 gathers in that is of no use for training afterwards
def mean_loss(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    sampler: BatchSampler,
    num_batches: int,
    device: torch.device,
    world: World = ALONE,
) -> float:
    """The mean loss over the sampler's first batches, in nats a token; the same batches at every call.

    Args:
        loss_of: from ids and the ids after them to their mean loss, such as `TransformerLM.loss`.
        sampler: of the rows that this process computes.
        world: the processes that compute all rows together.
    """
    total = torch.zeros((), device=device)
    for step in range(num_batches):
        inputs, targets = (to_device(part, device) for part in sampler.batch(step))
        total += loss_of(inputs, targets)
    return world.mean(total).item() / num_batches


# Steps before the recording: compiling, tuning and the optimizer's first state happen in them.
_WARM_UP_STEPS = 3
# Compiled together where gradients travel. Between two pieces their activations are read and written once more; and
# the more blocks a piece has, the more is left to send when the backward pass is over.
_BLOCKS_A_PIECE = 2


class TrainStep:
    """Gradients of a batch's mean loss, clipped, then the optimizer; nothing in it waits for the device.

    Args:
        model, optimizer: changed by every call. Load weights before, because the step may compute with copies of them.
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
        self.sharded = is_sharded(model)
        dispatch.warn_of_plain_attention(model.config.d_head, device, model.compute_dtype)
        with_kernels = dispatch.available_on(device)
        # What changes in each step: of the model itself, or of one that shares with it all but the copies.
        self.copies: dict[Tensor, Tensor] = {}
        reduced_in = reduce_dtype(config)
        if not self.sharded:
            world.equalize(model)
            in_float32 = config.gradient_accumulation > 1 or (world.size > 1 and reduced_in == torch.float32)
            model, self.copies = _with_copies(model, torch.float32 if in_float32 else model.compute_dtype)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        compiles = config.compile and (device.type != "cuda" or with_kernels)
        self.loss_of = model.loss
        if compiles and world.size == 1:
            self.loss_of = torch.compile(model.loss)
        elif compiles:
            compile_in_pieces(model)
        self.backward = world.backward(model, pieces_of(model), reduced_in)
        # Without its kernel AdamW asks the device for numbers, which cannot be recorded. Nor can a sharded model: what
        # FSDP2 gathers is in memory that it takes and gives back while the step runs.
        can_record = with_kernels and config.gradient_accumulation == 1 and not self.sharded
        self.rate = torch.zeros((), device=device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # One for all warm-up steps: each stream keeps the memory that was freed in it for itself.
        self.stream = torch.cuda.Stream(device) if can_record and config.cuda_graph else None

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
        if self.calls <= _WARM_UP_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self._step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.static = to_device(batch[0], self.device).clone(), to_device(batch[1], self.device).clone()
            self.graph = torch.cuda.CUDAGraph()
            self._forget_gradients()
            # Only this thread may do nothing else meanwhile: the one that sends batches goes on.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self._step(self.static)
        for ids, new in zip(self.static, batch, strict=True):
            ids.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result

    def _step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self._forget_gradients()
        parts = self.config.gradient_accumulation
        loss, gradients = torch.zeros((), device=self.device), ()
        for number, (inputs, targets) in enumerate(zip(*(ids.chunk(parts) for ids in batch), strict=True), 1):
            inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
            part = self.loss_of(inputs, targets) / parts
            self.world.arrive()  # the backward pass waits for the others
            gradients = self.backward(part, number == parts)
            loss += part.detach()
        with torch.no_grad():
            add_up = self.world.sum if self.sharded else None
            norm, factor = clipping_factor(gradients, self.config.max_gradient_norm, add_up)
            loss = self.world.mean(loss)  # behind the gradients, for which it would have to wait
            # One number that is not finite anywhere makes the norm so; then nothing is changed, in any process.
            factor = torch.where(torch.isfinite(loss + norm), factor, torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("rate_factor", 1.0)
        self.optimizer.step(gradient_factor=factor, copies=self.copies)
        return loss, norm

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _with_copies(model: TransformerLM, dtype: torch.dtype) -> tuple[TransformerLM, dict[Tensor, Tensor]]:
    """The same model with copies of its matrices in the precision of its activations, if that is `dtype`.

    Otherwise every product would cast its matrix, and then its gradient back: 12 bytes a parameter and step of reading
    and writing. The numbers are the same. All else is shared, so that what is compiled here leaves the model alone.

    Args:
        dtype: that gradients are wanted in.

    Returns:
        The model, and the copies by their parameters.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        # The gradient of an embedding is added up from many rows, for which half precision does not suffice.
        if isinstance(module, Linear) and module.weight is not model.token_embeddings.weight:
            weight = module.weight
            if weight.requires_grad and weight.dtype != dtype == model.compute_dtype:
                shared[id(weight)] = copies[weight] = Parameter(weight.detach().to(dtype))
    return copy.deepcopy(model, shared), copies


class _Blocks(Module):
    """Neighbouring blocks of a model."""

    def __init__(self, blocks: list[Module]):
        super().__init__()
        self.blocks = ModuleList(blocks)

    def forward(self, x: Tensor, cache: None, layer: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def pieces_of(model: TransformerLM) -> list[Module]:
    """The parts of a model in the order of the forward pass; the last is all of it, for what is behind the blocks."""
    return [model.token_embeddings, *model.layers, model]


def compile_in_pieces(model: TransformerLM) -> None:
    """Compile some blocks of a model at a time, in the model itself, once for all of them.

    The gradients of a piece are ready when its part of the backward pass is, and travel while those before it are
    computed. Compiled as a whole, all would be ready at the end.
    """
    if not is_sharded(model):  # there each block is gathered by itself
        groups = [model.layers[i : i + _BLOCKS_A_PIECE] for i in range(0, len(model.layers), _BLOCKS_A_PIECE)]
        model.layers = ModuleList(_Blocks(list(blocks)) for blocks in groups)
    for piece in (model.token_embeddings, *model.layers, model.ln_final):
        piece.forward = torch.compile(piece.forward)
