"""Kernels that are compiled before their first launch, in threads, while torch.compile works in the main thread.

Triton compiles a kernel when it is launched first, and a C compiler then builds a launcher: with both, half a second or
more each, one after the other, in the middle of the first step. But the shapes are known some seconds earlier: of an
operator when torch.compile calls its fake version, of the optimizer's kernels from the start. So the function that
launches the kernels is called then, in a thread and with tensors on the meta device, which have no memory: the same
lines, so that the same versions are compiled. The function's first real call waits for these threads.

An exception in such a thread becomes a warning, since the real call will raise it again. In Triton's interpreter, and
without a GPU, nothing is compiled ahead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from basic.transformer.kernels.interpreter import INTERPRETED

_DEVICE_TYPE = "cuda"
_slots = threading.Semaphore(4)  # threads that compile at a time; most of their work is done without Python's lock
_threads: dict[Callable, list[threading.Thread]] = {}
"""By function; a list is emptied when the function has waited for its threads."""
_started: set[tuple] = set()
"""Functions with the shapes of their arguments."""


class _State(threading.local):
    only_compiles = False


_state = _State()


class Kernel:
    """A kernel of Triton or Gluon; in a thread that compiles ahead, a launch compiles it and does nothing else."""

    def __init__(self, function: Any):
        self.function = function
        self.with_launcher: set[Any] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.compile, grid) if _state.only_compiles else self.function[grid]

    def compile(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        compiled = self.function.warmup(*args, grid=grid, **constants)
        if compiled not in self.with_launcher:
            self.with_launcher.add(compiled)
            # Builds the launcher, which Triton then finds in its cache on the disk.
            triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


class _DynamicShapeError(Exception):
    """torch.compile traces a function for many sizes."""


class _Shape(NamedTuple):
    """What a version of a kernel depends on of a tensor. Addresses are taken to be multiples of 16."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: Any) -> Any:
        """The shape of a tensor, those of a list of tensors, any other value as it is."""
        if isinstance(value, Tensor):
            return _Shape(_Shape.of(value.shape), _Shape.of(value.stride()), value.dtype)
        if isinstance(value, torch.SymInt):
            raise _DynamicShapeError
        return tuple(map(_Shape.of, value)) if isinstance(value, list | tuple) else value

    @staticmethod
    def on_meta(value: Any) -> Any:
        """The inverse, with tensors on the meta device."""
        if isinstance(value, _Shape):
            return torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device="meta")
        return tuple(map(_Shape.on_meta, value)) if isinstance(value, tuple) else value


def waits(function: Callable) -> Callable:
    """Let a function wait for the threads that compile its kernels."""

    @wraps(function)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        while threads := _threads.get(waiting):
            threads.pop().join()
        return function(*args, **kwargs)

    return waiting


def operator(name: str) -> Callable[[Callable], Any]:
    """Like `torch.library.custom_op`, of a function whose kernels are compiled when its fake version is called."""

    def define(function: Callable) -> Any:
        function = waits(function)
        defined: Any = torch.library.custom_op(name, function, mutates_args=())
        register_fake = defined.register_fake

        def register_starting(fake: Callable) -> Callable:
            @register_fake
            def starting(*args: Any) -> Any:
                start(function, *args, device=next(value.device for value in args if isinstance(value, Tensor)))
                return fake(*args)

            return fake

        defined.register_fake = register_starting
        return defined

    return define


def start(function: Callable, *args: Any, device: torch.device) -> None:
    """Compile the kernels that a function launches, in a thread.

    Args:
        function: decorated with `waits`.
        args: as for the real call; of tensors, only the shape counts.
        device: of the real call.
    """
    if INTERPRETED or device.type != _DEVICE_TYPE:
        return
    try:
        shapes = _Shape.of(args)
    except _DynamicShapeError:
        return
    if (function, shapes) in _started:
        return
    _started.add((function, shapes))
    triton.runtime.driver.active.get_current_device()  # creates the driver, which threads would do several times
    thread = threading.Thread(target=_compile, args=(function, shapes, device), name="compiles kernels")
    thread.start()
    _threads.setdefault(function, []).append(thread)


def _compile(function: Any, shapes: tuple, device: torch.device) -> None:
    with _slots:
        if not threading.main_thread().is_alive():
            return  # the process ends
        _state.only_compiles = True
        try:
            torch.cuda.set_device(device)
            with torch.no_grad():
                function.__wrapped__(*_Shape.on_meta(shapes))
        except Exception as error:
            name = getattr(function, "__name__", function)
            warnings.warn(f"{name} could not be compiled ahead, which costs only time: {error!r:.300}", stacklevel=1)
