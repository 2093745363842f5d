"""Kernels are compiled before their first launch, in threads, while torch.compile works in the main thread.

Triton compiles a kernel when it is launched first, and a C compiler builds its launcher: half a second or more for
each, one after the other, in the middle of the first step. So a step is taken before on the meta device, whose tensors
have no memory (a dry run). The same lines launch, so the same versions are compiled. A kernel's real launch waits for
its threads.

An exception in a dry run or a thread becomes a warning, since the real call will raise it too. In Triton's interpreter,
and without a GPU, nothing is compiled ahead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from basic.transformer.kernels.interpreter import INTERPRETED

_DEVICE_TYPE = "cuda"


class _ThreadState(threading.local):
    launches: dict[int, tuple[JITFunction, list]] | None = None
    """In a dry run: by the id of a kernel, itself and the arguments of its launches."""
    compiles = False


_state = _ThreadState()
_with_launcher: set[Any] = set()


def compile_ahead(function: Callable[[], object], device: torch.device) -> None:
    """Begin to compile the kernels that a function launches.

    Args:
        function: works on the meta device. It is called in another thread, without the modes of this one.
        device: of the real launches, which use the current one of its type.
    """
    if not INTERPRETED and device.type == _DEVICE_TYPE:
        index = triton.runtime.driver.active.get_current_device()  # creates the driver too, before several threads do
        dry_run = threading.Thread(target=_run_dry, args=(function, index))
        dry_run.start()
        dry_run.join()


def in_dry_run() -> bool:
    """Whether this thread takes a step on the meta device."""
    return _state.launches is not None


def _run_dry(function: Callable[[], object], device: int) -> None:
    torch.cuda.set_device(device)
    _state.launches = {}
    launch = JITFunction.run
    JITFunction.run = lambda kernel, *args, **options: (_note if in_dry_run() else launch)(kernel, *args, **options)
    try:
        function()
    except Exception as error:
        _warn("all kernels", error)
    finally:
        JITFunction.run = launch
    first = None  # for its first kernel, Triton reads all of its own files: only one thread does so
    for kernel, launches in _state.launches.values():
        thread = threading.Thread(target=_compile, args=(kernel, launches, device, first), name="compiles kernels")
        thread.start()
        kernel.add_pre_run_hook(_waits_for([thread]))
        first = first or thread


def _note(kernel: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
    assert _state.launches is not None
    _state.launches.setdefault(id(kernel), (kernel, []))[1].append((args, options))


def _waits_for(threads: list[threading.Thread]) -> Callable[..., None]:
    def wait(*args: Any, **options: Any) -> None:
        while threads and not _state.compiles:
            threads.pop().join()

    return wait


def _compile(kernel: JITFunction, launches: list, device: int, first: threading.Thread | None) -> None:
    """Compile all versions that are launched, after the first thread has ended."""
    torch.cuda.set_device(device)
    _state.compiles = True
    if first is not None:
        first.join()
    for args, options in launches:
        if not threading.main_thread().is_alive():
            return  # the process ends
        try:
            compiled = kernel.warmup(*args, **options)
            if compiled not in _with_launcher:
                _with_launcher.add(compiled)
                # Builds the launcher, which Triton then finds in its cache on the disk.
                triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
        except Exception as error:
            _warn(kernel.__name__, error)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what} could not be compiled ahead, which costs only time: {error!r:.300}", stacklevel=2)


def operator(name: str) -> Callable[[Callable], Any]:
    """Like `torch.library.custom_op`, of a function that launches kernels. A dry run calls it; it needs no fake."""

    def define(function: Callable) -> Any:
        defined: Any = torch.library.custom_op(name, function, mutates_args=())
        register_fake = defined.register_fake

        def register(fake: Callable) -> Callable:
            register_fake(lambda *args: (function if in_dry_run() else fake)(*args))
            return fake

        defined.register_fake = register
        return defined

    return define
