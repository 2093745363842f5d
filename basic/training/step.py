"""One optimizer step: forward, backward, clipping, update; compiled or replayed as a CUDA graph where possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph
from torch.nn import Module, Parameter
from torch.utils.checkpoint import CheckpointPolicy

from basic.model import TransformerLM
from basic.training.batches import BatchSampler, to_device
from basic.training.parallel.devices import reduce_dtype
from basic.training.parallel.world import SINGLE_PROCESS, World, is_sharded
from basic.training.settings import MuonConfig, TrainConfig
from basic.transformer.kernels import dispatch
from basic.transformer.layers import Embedding, Linear, SwiGLU
from basic.transformer.muon import Muon
from basic.transformer.optimizer import AdamW, clipping_factor

# Steps before the CUDA graph is captured. They compile, tune kernels and create the optimizer's state.
_WARMUP_STEPS = 3
# Of one code: blocks may differ in window and value embeddings, and all are compiled with and without gradients. Where
# more are needed, compiling fails; torch.compile by itself would leave the ninth uncompiled.
_MAX_VERSIONS = 64
# The settings of Muon that are not scheduled.
_MUON_SETTINGS = [field.name for field in fields(MuonConfig) if "momentum" not in field.name]


def make_optimizer(model: TransformerLM, config: TrainConfig) -> AdamW:
    """Create AdamW or Muon for a model.

    The groups hold parameters of equal settings: the matrices and gains of the blocks, then the embeddings and the
    output matrix. A group's learning rate is that of the run times its `rate_factor`.
    """
    # Dictionaries remove the duplicate if two matrices are tied. Sets would too, but their order changes.
    embeddings = dict.fromkeys(module.weight for module in model.modules() if isinstance(module, Embedding))
    ends = embeddings | {model.lm_head.weight: None}
    is_muon, embedding_factor = config.optimizer == "muon", config.embedding_rate_factor
    head_factor = embedding_factor if config.head_rate_factor is None else config.head_rate_factor
    other_decay = config.other_weight_decay
    if other_decay is None:
        other_decay = 0.0 if is_muon else config.weight_decay
    head_decay = other_decay if config.head_weight_decay is None else config.head_weight_decay

    def group_settings(parameter: Tensor) -> tuple[tuple[str, Any], ...]:
        if parameter in ends:
            is_embedding = parameter in embeddings
            factor, decay = (embedding_factor, other_decay) if is_embedding else (head_factor, head_decay)
            return ("rule", "adamw"), ("rate_factor", factor), ("weight_decay", decay)
        if parameter.ndim < 2:
            return ("rule", "adamw"), ("rate_factor", config.gain_rate_factor), ("weight_decay", other_decay)
        return ("rule", config.optimizer), ("rate_factor", 1.0), ("weight_decay", config.weight_decay)

    groups: list[dict[str, Any]] = []
    for parameters in ([p for p in model.parameters() if p not in ends], list(ends)):
        for settings in dict.fromkeys(map(group_settings, parameters)):
            group = dict(settings) | {"params": [p for p in parameters if group_settings(p) == settings]}
            groups.append(group | {"base_weight_decay": group["weight_decay"]})
    common: dict[str, Any] = {"lr": config.max_learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if not is_muon:
        return AdamW(groups, **common)
    muon = {name: getattr(config.muon, name) for name in _MUON_SETTINGS}
    return Muon(groups, **common, **muon)


class TrainStep:
    """Compute the gradients of a batch's mean loss, clip them, and update the weights, without waiting for the device.

    Args:
        model, optimizer: changed by every call. Load weights before: the step may compute with copies of them. The
            optimizer is that of `make_optimizer`, or any other of torch's kind.
        config: of the run.
        device: of the model.
        world: the ranks that compute the step together, each with its own sequences of the batch.
    """

    def __init__(
        self,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        device: torch.device,
        world: World = SINGLE_PROCESS,
    ):
        self.optimizer, self.config, self.device, self.world = optimizer, config, device, world
        self.sharded = is_sharded(model)
        if isinstance(optimizer, Muon) and world.size > 1:
            optimizer.share_work(world.rank, world.size, world.all_gather_tensors)
        dispatch.warn_about_plain_attention(model.config.d_head, device, model.compute_dtype)
        with_kernels, is_ours = dispatch.available_on(device), isinstance(optimizer, AdamW)
        # Until the kernels of its first step are compiled.
        self.new_model = model if is_ours and with_kernels and not self.sharded else None
        self.weight_copies: dict[Tensor, Tensor] = {}
        reduce_precision = reduce_dtype(config)
        if not self.sharded:
            world.broadcast_weights(model)
            in_float32 = (
                not is_ours
                or config.gradient_accumulation > 1
                or (world.size > 1 and reduce_precision == torch.float32)
            )
            gradient_dtype = torch.float32 if in_float32 else model.compute_dtype
            model, self.weight_copies = _with_weight_copies(model, gradient_dtype)
        self.fp8: Any = None
        if config.precision == "fp8":
            num_tokens = config.batch_size * model.config.context_length
            self.fp8 = multiply_in_fp8(model, num_tokens, world.all_reduce_largest)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.compiles = compiles = config.compile and (device.type != "cuda" or with_kernels)
        if compiles:
            compile_segments(model)
        self.loss_fn = model.loss
        self.backward = world.make_backward(model, model_segments(model), reduce_precision)
        # Without its kernel, AdamW reads numbers from the device, which a CUDA graph cannot capture. FSDP2 allocates
        # and frees the weights it gathers during the step, which cannot be captured either.
        can_capture = is_ours and with_kernels and config.gradient_accumulation == 1 and not self.sharded
        # Checkpointing looks at the state of the random numbers, which cannot be captured.
        can_capture &= not (config.dropout and config.activation_checkpointing)
        # On the device, so that a captured graph reads the numbers of the step.
        self.learning_rate, self.momentum, self.weight_decay_factor = (torch.zeros((), device=device) for _ in range(3))
        self.num_calls, self.is_calibrated = 0, False
        self.graph: torch.cuda.CUDAGraph | None = None
        # One side stream for the warm-up steps and the capture: a stream does not reuse memory freed in another one.
        self.stream = torch.cuda.Stream(device) if can_capture and config.cuda_graph else None

    def __call__(
        self, batch: tuple[Tensor, ...], learning_rate: float, momentum: float = 0.95, weight_decay_factor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            batch: of this rank, on the CPU or on the device (see `BatchSampler.batch`).
            learning_rate: of the groups with `rate_factor` 1.
            momentum: of Muon.
            weight_decay_factor: for the weight decay of all groups.

        Returns:
            The mean loss in nats per token, and the L2 norm of the gradients before clipping. Both are over all ranks
            and on the device. The next call may overwrite them.
        """
        if self.new_model is not None:
            _compile_kernels_ahead(self.new_model, self.config, batch, self.device)
            self.new_model = None
        if self.fp8 is not None and not self.is_calibrated:
            self.is_calibrated = True
            self.fp8.calibrate(lambda: list(self._compute_gradients(batch)[1]))
        self.learning_rate.fill_(learning_rate)
        self.momentum.fill_(momentum)
        self.weight_decay_factor.fill_(weight_decay_factor)
        if self.stream is None:
            return self._step(batch)
        self.num_calls += 1
        if self.num_calls <= _WARMUP_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self._step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.static_batch = tuple(to_device(tensor, self.device).clone() for tensor in batch)
            self.graph = torch.cuda.CUDAGraph()
            self._clear_gradients()
            # "thread_local": the thread that reads batches ahead keeps using CUDA during the capture.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.static_result = self._step(self.static_batch)
        for static, new in zip(self.static_batch, batch, strict=True):
            static.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.static_result

    def take_unusual(self) -> list[str]:
        """In fp8, what was too large or not finite since the last call; see `Fp8Matrices.take_unusual`."""
        return [] if self.fp8 is None else self.fp8.take_unusual()

    @property
    def fp8_scales(self) -> dict[str, list[float]] | None:
        """In fp8, the scales for the next step, which a resumed run begins with; else None."""
        return None if self.fp8 is None else self.fp8.scales

    @fp8_scales.setter
    def fp8_scales(self, scales: dict[str, list[float]] | None) -> None:
        if self.fp8 is not None and scales is not None and scales.keys() == self.fp8.matrices.keys():
            self.fp8.scales, self.is_calibrated = scales, True

    def _step(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        total_loss, gradients = self._compute_gradients(batch)
        with torch.no_grad():
            all_reduce = self.world.all_reduce_sum if self.sharded else None
            norm, factor = clipping_factor(gradients, self.config.max_gradient_norm, all_reduce)
            if self.fp8 is not None:
                total_loss += self.fp8.end_measuring()
            total_loss = self.world.all_reduce_mean(total_loss)  # after the gradients, which are sent first
            # A non-finite number on any rank makes the norm non-finite. Then no rank changes a weight.
            factor = torch.where(torch.isfinite(total_loss + norm), factor, torch.nan)
        if isinstance(self.optimizer, AdamW):
            self._update(self.optimizer, factor)
        else:
            self._update_with(self.optimizer, factor)
        if self.fp8 is not None:
            with torch.no_grad():
                self.fp8.update()
        return total_loss, norm

    def _compute_gradients(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Iterable[list[Tensor]]]:
        """The loss of a batch, and the gradients, in the buckets of `World.make_backward`."""
        self._clear_gradients()
        if self.fp8 is not None:
            self.fp8.begin_measuring()
        num_micro_batches = self.config.gradient_accumulation
        total_loss, gradients = torch.zeros((), device=self.device), []
        # The number of targets, the only scalar, is that of all micro-batches together.
        chunks = ([ids] * num_micro_batches if ids.ndim == 0 else ids.chunk(num_micro_batches) for ids in batch)
        for number, micro_batch in enumerate(zip(*chunks, strict=True), 1):
            loss = self.loss_fn(*(to_device(tensor, self.device) for tensor in micro_batch))
            if len(batch) == 2:
                loss = loss / num_micro_batches
            self.world.count_barrier()  # the backward pass waits for the other ranks
            gradients = self.backward(loss, number == num_micro_batches)
            total_loss += loss.detach()
        return total_loss, gradients

    def _update(self, optimizer: AdamW, factor: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("rate_factor", 1.0)
            if group.get("rule") == "muon":
                group["momentum"] = self.momentum
            if self.config.weight_decay_schedule != "constant":
                base = group.setdefault("base_weight_decay", group["weight_decay"])
                group["weight_decay"] = self.weight_decay_factor * base
        optimizer.step(gradient_factor=factor, copies=self.weight_copies)

    def _update_with(self, optimizer: torch.optim.Optimizer, factor: Tensor) -> None:
        """Update with an optimizer of the user, which knows neither factors nor numbers on the device."""
        if not factor.isfinite():
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad *= factor
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate.item() * group.get("rate_factor", 1.0)
        optimizer.step()

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@torch.no_grad()  # not inference mode: weights that FSDP2 gathers there cannot be used for training afterwards
def mean_loss(
    loss_fn: Callable[..., Tensor],
    sampler: BatchSampler,
    num_batches: int,
    device: torch.device,
    world: World = SINGLE_PROCESS,
) -> float:
    """Compute the mean loss over the sampler's first batches, in nats per token; every call uses the same batches.

    Args:
        loss_fn: maps a batch to its mean loss, like `TransformerLM.loss`.
        sampler: of the sequences that this rank computes.
        world: the ranks that compute the batches together.
    """
    total = torch.zeros((), device=device)
    weights = 0.0
    for step in range(num_batches):
        batch = sampler.batch(step)
        weight = 1.0 if len(batch) == 2 else batch[2].item()  # batches with more targets count more
        total += loss_fn(*(to_device(tensor, device) for tensor in batch)) * weight
        weights += weight
    return world.all_reduce_mean(total).item() / weights


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers of a step's dropout, other ones for each rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _with_weight_copies(
    model: TransformerLM, gradient_dtype: torch.dtype
) -> tuple[TransformerLM, dict[Tensor, Tensor]]:
    """Copy a model so that its matrices are stored in the activation dtype, if gradients may have that dtype too.

    Otherwise every matrix multiplication casts its float32 matrix, and the gradient back: 12 bytes of memory traffic a
    parameter and step. The results are the same. The copy shares all other tensors with the model, and compiling it
    leaves the original model as it is.

    Returns:
        The copied model, and its low-precision matrices by the float32 parameter that each one follows.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        # Not the embedding: its gradient is a sum over many tokens, for which half precision is too coarse.
        if isinstance(module, Linear) and module.weight is not model.token_embeddings.weight:
            weight = module.weight
            if weight.requires_grad and weight.dtype != gradient_dtype == model.compute_dtype:
                shared[id(weight)] = copies[weight] = Parameter(weight.detach().to(gradient_dtype))
    return copy.deepcopy(model, shared), copies


def _compile_kernels_ahead(
    model: TransformerLM, config: TrainConfig, batch: tuple[Tensor, ...], device: torch.device
) -> None:
    """Begin to compile the kernels of a step in threads: one like it is taken on the meta device."""
    from basic.transformer.kernels.ahead import compile_ahead  # imported late: it needs Triton

    def take_step() -> None:
        parameters = {id(p): Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        twin = copy.deepcopy(model, parameters | {id(buffer): buffer.to("meta") for buffer in model.buffers()})
        count = config.gradient_accumulation
        few = min(2, count)  # micro-batches, which are like many
        size = config.batch_size // count * few
        settings = replace(config, compile=False, cuda_graph=False, gradient_accumulation=few, batch_size=size)
        step = TrainStep(twin, make_optimizer(twin, settings), settings, torch.device("meta"))
        micro_batches = (ids[: len(ids) * few // count] if ids.ndim else ids for ids in batch)
        step(tuple(ids.to("meta") for ids in micro_batches), 0.0)

    compile_ahead(take_step, device)


def multiply_in_fp8(model: TransformerLM, num_tokens: int, all_reduce_largest: Callable[[Tensor], Tensor]) -> Any:
    """Let the blocks of a model multiply their matrices in 8 bits; returns these as `Fp8Matrices`.

    Args:
        num_tokens, all_reduce_largest: as for `Fp8Matrices`.
    """
    from basic.transformer.fp8 import Fp8Matrices, Fp8SwiGLU  # imported late: it needs Triton

    joined: dict[str, list[Linear]] = {}
    blocks: list[Any] = list(model.layers)
    for i, block in enumerate(blocks):
        attn, ffn = block.attn, block.ffn
        joined[f"layers.{i}.attn.qkv"] = [attn.q_proj, attn.k_proj, attn.v_proj]
        joined[f"layers.{i}.attn.output_proj"] = [attn.output_proj]
        joined[f"layers.{i}.ffn.in"] = [ffn.w1, ffn.w3] if isinstance(ffn, SwiGLU) else [ffn.w1]
        joined[f"layers.{i}.ffn.w2"] = [ffn.w2]
    weights: dict[str, list[Tensor]] = {name: [linear.weight for linear in linears] for name, linears in joined.items()}
    result = Fp8Matrices(weights, num_tokens, all_reduce_largest)
    for i, block in enumerate(blocks):
        qkv, output, first, second = (result.matrices[name] for name in list(joined)[4 * i : 4 * i + 4])
        block.attn.fp8, block.attn.output_proj.multiply = qkv, output.linear
        if isinstance(block.ffn, SwiGLU):
            block.ffn.compute = Fp8SwiGLU(first, second)
        else:
            block.ffn.w1.multiply, block.ffn.w2.multiply = first.linear, second.linear
    return result


def model_segments(model: TransformerLM) -> list[Module]:
    """List the modules whose gradients are sent to other ranks together, in the order of the forward pass.

    The last one is the model itself, for the parameters that no earlier segment has.
    """
    return [model.token_embeddings, *model.layers, model]


class KeepSums:
    """A pass of torch.compile: the sums of the residual stream are kept for the backward pass.

    torch.compile would keep an addend instead, as large, and read it and the other one wherever the sum is needed.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            value = node.meta.get("val")
            if str(node.target) == "aten.add.Tensor" and value.ndim == 3 and value.dtype.itemsize == 2:
                node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)

    def uuid(self) -> str:
        """What a cached graph was changed by."""
        return "basic: residual sums are kept"


_GPU_OPTIONS: dict[str, Any] = {
    "joint_custom_post_pass": KeepSums(),
    # For a short first step: one version of each pointwise kernel instead of two to six, and no processes that compile,
    # which are ready only when all is compiled.
    "triton.autotune_pointwise": False,
    "compile_threads": 1,
}


def compile_segments(model: TransformerLM) -> None:
    """Compile a model in place: what comes before the blocks, each block, and what comes after them.

    Equal blocks are compiled once, so a deep model takes as long as a shallow one. And the gradients of a block are
    sent to other ranks while the backward pass computes the blocks before it.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass  # imported late: it takes a second

    CustomGraphPass.register(KeepSums)
    options = _GPU_OPTIONS if next(model.parameters()).is_cuda else None
    torch._dynamo.config.recompile_limit = max(_MAX_VERSIONS, torch._dynamo.config.recompile_limit)  # ty: ignore[invalid-assignment]
    functions: dict[Any, FunctionType] = {}  # the same copy for all segments
    parts: list[tuple[Module, str]] = [(model, "_embed"), *((layer, "forward") for layer in model.layers)]
    for owner, name in (*parts, (model, "_loss_after_blocks")):
        function = getattr(owner, name).__func__
        own = functions.setdefault(function, _with_own_code(function))
        setattr(owner, name, torch.compile(MethodType(own, owner), fullgraph=True, options=options))


def _with_own_code(function: Any) -> FunctionType:
    """A copy of a function. torch.compile counts the versions of a code, those of other models included."""
    parts = function.__globals__, function.__name__, function.__defaults__, function.__closure__
    return FunctionType(function.__code__.replace(), *parts)
