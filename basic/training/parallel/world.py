"""Several processes that train one model, a GPU each: the one file that knows of ranks.

`torchrun --nproc-per-node N local/train.py ...` starts N processes that are told their places by environment
variables. `join` reads them and gives a `World`, whose methods are all that the rest of the library calls. A process
that nobody told of others is a world of one: there every method gives back what it was given.

Each process computes its own rows of every batch. Replicated, each has the whole model, and the gradients are averaged
while the backward pass still runs. Sharded, each keeps a part of every matrix, its gradient and moments, and the
parts of a block are gathered just before it is computed (FSDP2).
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

from basic.training.parallel.replica import Replica
from basic.training.parallel.watch import Watch
from basic.transformer.optimizer import local_part

T = TypeVar("T")

# Collectives themselves wait as long as it takes, because the watch above knows better who is lost and who is busy.
_NO_LIMIT = timedelta(days=7)


class World:
    """The processes that train one model together, and this one's place among them.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
        local_rank: its number among those on the same machine, which is that of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._turns = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes logs, samples and plain checkpoints."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device of this process, where the configuration says `name`: with others, the GPU of its own.

        Raises:
            ValueError: there is none for it, or all were to share one.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device = {name!r} cannot be that of {self.size} processes; use auto, cuda or cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local_rank} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start as many with --nproc-per-node, or set device = cpu"
            )
        return f"cuda:{self.local_rank}"

    def own_rows(self, batch_size: int, parts: int = 1) -> np.ndarray | None:
        """Which rows of a batch this process computes: its share of each of the parts; None for all.

        Raises:
            ValueError: the parts cannot be shared evenly.
        """
        if batch_size % (parts * self.size):
            pieces = f"{self.size} processes" + (f" x gradient_accumulation={parts}" if parts > 1 else "")
            raise ValueError(
                f"batch_size={batch_size}, which is that of all processes together, must be divisible by {pieces}; the "
                f"nearest is {max(1, round(batch_size / (parts * self.size))) * parts * self.size}"
            )
        if self.size == 1:
            return None
        return np.arange(batch_size).reshape(parts, self.size, -1)[:, self.rank].ravel()

    # --- Numbers of all processes

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, in its place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over all processes, which so agree on something; waits for all of them."""
        if self.size == 1:
            return numbers
        self.arrive()
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tuple(tensor.tolist())

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process alone do something, however long it takes, and give what it returns to all.

        Args:
            work: returns what JSON has words for.

        Raises:
            RuntimeError: in the others, if it failed in the first, where its own error is raised.
        """
        if self.size == 1:
            return work()
        self._turns += 1
        key = f"first/{self._turns}"
        with self.unhurried():
            if self.is_first:
                try:
                    value = work()
                except BaseException as error:
                    self._store.set(key, json.dumps({"error": _described(error)}))
                    raise
                self._store.set(key, json.dumps({"value": value}))
                return value
            self._store.wait([key], _NO_LIMIT)
            outcome = json.loads(self._store.get(key))
        if "error" in outcome:
            raise RuntimeError(f"rank 0 failed: {outcome['error']}")
        return outcome["value"]

    def told_by_all(self, value: Any) -> list[Any]:
        """What each process gives here, in the order of ranks; for the thread that saves checkpoints."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value, group=self.saving_group)
        return told

    # --- Who keeps step

    def in_step(self) -> AbstractContextManager[None]:
        """While the block runs, a process that stays behind the others for long is one that hangs."""
        return nullcontext() if self.size == 1 else self._watch.hurried(True)

    def unhurried(self) -> AbstractContextManager[None]:
        """While the block runs, this process may take as long as it needs."""
        return nullcontext() if self.size == 1 else self._watch.hurried(False)

    def arrive(self) -> None:
        """Be at the next place of the program where all wait for each other."""
        if self.size > 1:
            self._watch.arrivals += 1

    # --- Models

    def equalize(self, model: Module) -> None:
        """Give all processes the first one's weights: CPUs of different kinds may draw others from the same seed."""
        if self.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), 0)

    def shard(self, model: Module, device: torch.device, dtype: torch.dtype, reduce_dtype: torch.dtype | None) -> None:
        """Leave of every parameter only this process's part, on the device; the optimizer is to be made after it.

        Args:
            model: with its blocks in `layers`, and a `loss`.
            dtype: what is gathered for computing.
            reduce_dtype: what gradients are added up in; None for `dtype`.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
        layers: Any = model.layers
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "loss")

    def gathered(self, model: Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights of a sharded model, whole, in the first process; empty in the others, which must call it too."""
        whole = {}
        for name, part in model.state_dict().items():
            weight = part.to(dtype).full_tensor()
            if self.is_first:
                whole[name] = weight
        return whole

    def backward(
        self, model: Module, pieces: Sequence[Module], reduce_dtype: torch.dtype | None
    ) -> Callable[[Tensor, bool], Iterable[list[Tensor]]]:
        """The backward pass of the loss of this process's rows, which leaves the gradients of the mean over all.

        Args:
            model: whose parameters are learned.
            pieces: its parts in the order of the forward pass, together all of it; the gradients of one are sent
                together, while those of the pieces before it are computed.
            reduce_dtype: what gradients are added up in; None for what each is computed in. For a sharded model
                `shard` was told.

        Returns:
            A function of the loss and whether this backward pass is the step's last one; until then gradients are
            only added up in each process. From the last one it returns the gradients in groups, in the order in which
            they were sent. Go through all of them: each group is waited for when it is asked for, and what is done
            with it runs while the next ones travel; before that it may not be read.

        Raises:
            RuntimeError: by that function, where a replica has gradients of only a part of what travels together.
        """
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.size > 1 and not is_sharded(model):
            return Replica(pieces, reduce_dtype, self.size).backward
        reduce_when: Any = model.set_requires_gradient_sync if is_sharded(model) else lambda last: None

        def backward(loss: Tensor, last: bool) -> Iterable[list[Tensor]]:
            reduce_when(last)
            loss.backward()
            return [[local_part(each.grad) for each in learned if each.grad is not None]] if last else []

        return backward

    # --- Coming and going

    def _open(self, environment: Mapping[str, str]) -> None:
        has_gpu = torch.cuda.is_available() and self.local_rank < torch.cuda.device_count()
        if has_gpu:
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_NO_LIMIT)
        # Apart from the group of the gradients, which may be far behind in the device's queue.
        self._control = _new_group()
        # For the thread that saves checkpoints.
        self.saving_group = _new_group()
        self.host_mesh = init_device_mesh("cpu", (self.size,))
        # One connection for each thread, because one that waits keeps the others from asking.
        self._store, watched = (_connect(environment) for _ in range(2))
        self._watch = Watch(watched, self.rank, self.size)
        self.largest(0)  # all have said that they live before anybody listens
        self._watch.start()

    def _close(self, error: BaseException | None) -> None:
        """Leave together with the others, or say why not; whoever leaves first has the others stopped by torchrun."""
        if error is None or isinstance(error, KeyboardInterrupt):
            self.on_first(lambda: None)
            self.largest(0)
            self._watch.stop()
            gc.collect()  # a recorded graph must go before the communicator that it uses
            dist.destroy_process_group()
            if error is not None and not self.is_first:
                raise SystemExit(130) from error  # the first one says it
            return
        # A collective that others have left fails with an error that says nothing.
        abandoned = isinstance(error, RuntimeError) and "onnection" in str(error)
        culprit = self._watch.fail(_described(error), abandoned=abandoned)
        if abandoned:
            print(f"rank {self.rank} ends, because {culprit or 'another process has ended'}", file=sys.stderr)
            raise SystemExit(1) from error
        if culprit and not self.is_first:  # the first one says it, for all that failed with it
            raise SystemExit(1) from error


ALONE = World()


@contextmanager
def join(environment: Mapping[str, str]) -> Generator[World]:
    """The world of the processes that torchrun has started, or a world of one, until the end of the block.

    When the block ends well, or by a KeyboardInterrupt that came to all, all leave together. When it fails in one
    process, the others are ended within seconds.

    Args:
        environment: such as `os.environ`, with what torchrun puts there (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR,
            MASTER_PORT), or without.
    """
    size = int(environment.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    world = World(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
    world._open(environment)
    try:
        yield world
    except BaseException as error:
        world._close(error)
        raise
    world._close(None)


def is_sharded(model: Module) -> bool:
    """Whether `World.shard` has left only a part of the model here."""
    return hasattr(model, "set_requires_gradient_sync")


def _new_group() -> dist.ProcessGroup:
    """All processes again, talking through their CPUs, apart from what else they say to each other."""
    group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _connect(environment: Mapping[str, str]) -> dist.Store:
    """A connection to the store of torchrun, or of the first process, which all can reach."""
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), wait_for_workers=False)
    return dist.PrefixStore(f"basic/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
