"""The ranks that train one model together, one GPU each; no other module calls torch.distributed for training.

`torchrun --nproc-per-node N -m basic train ...` starts N processes and sets environment variables. `join_world` reads
them and returns a `World`, whose methods are all that the rest of the library calls. Without torchrun it is a world of
one process, in which every collective returns its input.

Each rank computes its own sequences of every batch. A replicated model is complete on every rank, and gradients are
averaged while the backward pass runs. Of a sharded model, each rank stores a slice of every matrix, of its gradient
and of its moments; the slices of a block are gathered just before the block computes (FSDP2).
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Module

from basic.common.errors import InvalidConfigError
from basic.training.parallel.replica import GradientReducer
from basic.training.parallel.watch import Watchdog
from basic.transformer.optimizer import local_shard

T = TypeVar("T")
Backward = Callable[[Tensor, bool], Iterable[list[Tensor]]]

# Collectives never time out: the watchdog decides which rank is lost, and which one is only busy.
_NO_TIMEOUT = timedelta(days=7)


class World:
    """The ranks that train one model together, and this one among them.

    Attributes:
        local_rank: the number of this process on its machine, which is also the number of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._calls_on_rank_0 = 0

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes logs, samples and unsharded checkpoints."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device of this process where the configuration has `name`; with several ranks, each has its own GPU.

        Raises:
            InvalidConfigError: there is no GPU for it, or several ranks would share one device.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise InvalidConfigError(
                f"device = {name!r} cannot be that of {self.size} processes; use auto, cuda or cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise InvalidConfigError(
                f"process {self.local_rank} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start as many with --nproc-per-node, or set device = cpu"
            )
        return f"cuda:{self.local_rank}"

    def local_sequences(self, batch_size: int, micro_batches: int = 1) -> np.ndarray | None:
        """Which sequences of a batch this rank computes, the same number of each micro-batch; None for all.

        Args:
            batch_size: of all ranks together.
            micro_batches: the batch is cut into this many micro-batches of consecutive sequences.

        Raises:
            InvalidConfigError: the batch cannot be divided evenly.
        """
        divisor = micro_batches * self.size
        if batch_size % divisor:
            factors = f"{self.size} processes" + (f" x gradient_accumulation={micro_batches}" * (micro_batches > 1))
            raise InvalidConfigError(
                f"batch_size={batch_size}, which is that of all processes together, must be divisible by {factors}; "
                f"the nearest is {max(1, round(batch_size / divisor)) * divisor}"
            )
        if self.size == 1:
            return None
        return np.arange(batch_size).reshape(micro_batches, self.size, -1)[:, self.rank].ravel()

    # --- Collectives

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, in place."""
        return self.all_reduce_sum(tensor).div_(self.size) if self.size > 1 else tensor

    def all_reduce_largest(self, tensor: Tensor) -> Tensor:
        """The largest of each number over all ranks, in place; of float32 numbers >= 0, and NaN is the largest."""
        if self.size > 1:  # as integers these have the same order, and what is the larger of NaN and 1 is known
            dist.all_reduce(tensor.view(torch.int32), dist.ReduceOp.MAX)
        return tensor

    def all_gather_tensors(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shapes, joined along their first dimension by rank."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor)
        return torch.cat(tensors)

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """The maximum of each number over all ranks; waits for all of them."""
        if self.size == 1:
            return numbers
        self.count_barrier()
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._cpu_group)
        return tuple(tensor.tolist())

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; only for the thread that saves checkpoints."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.checkpoint_group)
        return values

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on all ranks; it may take any time.

        Args:
            work: returns a value that JSON can represent.

        Raises:
            RuntimeError: on the other ranks, if it fails on rank 0, where its own error is raised.
        """
        if self.size == 1:
            return work()
        self._calls_on_rank_0 += 1
        key = f"on_rank_0/{self._calls_on_rank_0}"
        with self.pause_hang_detection():
            if self.is_rank_0:
                try:
                    value = work()
                except BaseException as error:
                    self._store.set(key, json.dumps({"error": _describe(error)}))
                    raise
                self._store.set(key, json.dumps({"value": value}))
                return value
            self._store.wait([key], _NO_TIMEOUT)
            outcome = json.loads(self._store.get(key))
        if "error" in outcome:
            raise RuntimeError(f"rank 0 failed: {outcome['error']}")
        return outcome["value"]

    # --- Detection of ranks that hang

    def detect_hangs(self) -> AbstractContextManager[None]:
        """While the block runs, this rank counts as hung if the others wait for it at a barrier for long."""
        return nullcontext() if self.size == 1 else self._watchdog.hang_detection(True)

    def pause_hang_detection(self) -> AbstractContextManager[None]:
        """While the block runs, this rank may take any time."""
        return nullcontext() if self.size == 1 else self._watchdog.hang_detection(False)

    def count_barrier(self) -> None:
        """Record that this rank has reached the next point where all ranks wait for each other."""
        if self.size > 1:
            self._watchdog.barriers += 1

    # --- Models

    def broadcast_weights(self, model: Module) -> None:
        """Copy the weights of rank 0 to all ranks: different CPUs may draw different weights from the same seed."""
        if self.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), 0)

    def shard(self, model: Module, device: torch.device, dtype: torch.dtype, reduce_dtype: torch.dtype | None) -> None:
        """Shard a model over all ranks (FSDP2); create the optimizer afterwards.

        Args:
            model: has its blocks in `layers`, and a method `loss`.
            dtype: of the gathered parameters, with which the model computes.
            reduce_dtype: in which gradients are reduced; None for `dtype`.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
        layers: Any = model.layers
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "loss")

    def full_state_dict(self, model: Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The complete weights of a sharded model on rank 0; empty on the other ranks, which must call it too."""
        weights = {}
        for name, shard in model.state_dict().items():
            weight = shard.to(dtype).full_tensor()
            if self.is_rank_0:
                weights[name] = weight
        return weights

    def make_backward(self, model: Module, segments: Sequence[Module], reduce_dtype: torch.dtype | None) -> Backward:
        """A function that runs the backward pass of this rank's loss, and averages the gradients over all ranks.

        Args:
            segments: its modules in the order of the forward pass, which together have all its parameters. The
                gradients of a segment are reduced together, while those of earlier segments are computed.
            reduce_dtype: in which gradients are reduced; None for each gradient's own dtype. A sharded model has its
                own, given to `shard`.

        Returns:
            A function of the loss and of whether this is the last backward pass of the step. Before the last one,
            gradients only accumulate on each rank, and the result is empty. The last one returns the gradients in
            buckets, in the order in which they are reduced. Iterate over all of them: each bucket is waited for when it
            is requested, and may not be read before. What is done with one runs while the next ones are reduced.

        Raises:
            RuntimeError: by that function, if some of the gradients of a bucket are missing.
        """
        if self.size > 1 and not is_sharded(model):
            return GradientReducer(segments, reduce_dtype, self.size).backward
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        set_sync: Any = model.set_requires_gradient_sync if is_sharded(model) else lambda is_last: None

        def backward(loss: Tensor, is_last: bool) -> Iterable[list[Tensor]]:
            set_sync(is_last)
            loss.backward()
            return [[local_shard(p.grad) for p in trainable if p.grad is not None]] if is_last else []

        return backward

    # --- Start and end

    def _init_process_groups(self, environment: Mapping[str, str]) -> None:
        has_gpu = torch.cuda.is_available() and self.local_rank < torch.cuda.device_count()
        if has_gpu:
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_NO_TIMEOUT)
        # Not the group of the gradients, because that one's work may be far behind in the device's queue.
        self._cpu_group = _new_cpu_group()
        # For the thread that saves checkpoints.
        self.checkpoint_group = _new_cpu_group()
        self.cpu_mesh = init_device_mesh("cpu", (self.size,))
        # Each thread has its own connection, because a connection that waits blocks all other requests.
        self._store, watchdog_store = (_connect_store(environment) for _ in range(2))
        self._watchdog = Watchdog(watchdog_store, self.rank, self.size)
        self.all_reduce_max(0)  # every rank has published a heartbeat before any rank reads them
        self._watchdog.start()

    def _leave(self, error: BaseException | None) -> None:
        """Leave together with the other ranks, or report why not.

        torchrun stops the others as soon as one process has left.
        """
        if error is None or isinstance(error, KeyboardInterrupt):
            self.on_rank_0(lambda: None)
            self.all_reduce_max(0)
            self._watchdog.stop()
            gc.collect()  # a recorded CUDA graph must be freed before the communicator that it uses
            dist.destroy_process_group()
            if error is not None and not self.is_rank_0:
                raise SystemExit(130) from error  # rank 0 prints the message
            return
        # The error of a collective that another rank has left does not say why.
        connection_lost = isinstance(error, RuntimeError) and "onnection" in str(error)
        cause = self._watchdog.report_failure(_describe(error), connection_lost=connection_lost)
        if connection_lost:
            print(f"rank {self.rank} ends, because {cause or 'another process has ended'}", file=sys.stderr)
            raise SystemExit(1) from error
        if cause and not self.is_rank_0:  # rank 0 prints the message for all ranks with the same failure
            raise SystemExit(1) from error


SINGLE_PROCESS = World()
"""The world of a process that trains alone."""


@contextmanager
def join_world(environment: Mapping[str, str]) -> Generator[World]:
    """Join the processes that torchrun has started, until the end of the block; without torchrun, `SINGLE_PROCESS`.

    If the block ends normally, or by a KeyboardInterrupt that all ranks received, all leave together. If it fails on
    one rank, the others end within seconds.

    Args:
        environment: such as `os.environ`, with the variables of torchrun (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR,
            MASTER_PORT) or without.
    """
    size = int(environment.get("WORLD_SIZE", 1))
    if size == 1:
        yield SINGLE_PROCESS
        return
    world = World(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
    world._init_process_groups(environment)
    try:
        yield world
    except BaseException as error:
        world._leave(error)
        raise
    world._leave(None)


def is_sharded(model: Module) -> bool:
    """Whether `World.shard` has been applied to a model."""
    return hasattr(model, "set_requires_gradient_sync")


def _new_cpu_group() -> dist.ProcessGroup:
    """A process group of all ranks that communicates through the CPU."""
    group = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _connect_store(environment: Mapping[str, str]) -> dist.Store:
    """A connection to the key-value store of torchrun, or of rank 0, which all ranks can reach."""
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), wait_for_workers=False)
    return dist.PrefixStore(f"basic/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
