"""The kernels that are compiled before their first launch are those that a training step launches."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

import triton
from triton.runtime.jit import JITFunction

from basic.model import ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.kernels import ahead, dispatch, operators
from basic.transformer.kernels.attention import flash_attention

CPU = torch.device("cpu")


def specialization(value: Any) -> Any:
    """What Triton compiles a version of a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple | list):
        return tuple(map(specialization, value))
    return (value == 1, value % 16 == 0) if type(value) is int else type(value)


class Compiled:
    src, metadata = "source", None


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """Dry runs as for a GPU."""
    monkeypatch.setattr(ahead, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(flash_attention, "_hopper_kernels", lambda device: None)
    driver = SimpleNamespace(get_current_device=lambda: 0, launcher_cls=lambda src, metadata: None)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))


@pytest.fixture
def runs(monkeypatch) -> dict[bool, set[tuple]]:
    """What kernels are compiled (True) and launched (False) for; nothing is compiled or launched."""
    noted: dict[bool, set[tuple]] = {True: set(), False: set()}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Compiled:
        for hook in kernel.pre_run_hooks:
            hook()
        tensors = {name: specialization(value) for name, value in constants.items() if isinstance(value, Tensor)}
        key = kernel.__module__, kernel.__name__, specialization(args), tuple((constants | tensors).items())
        noted[warmup].add(key)
        return Compiled()

    monkeypatch.setattr(JITFunction, "run", run)
    return noted


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("changes", "settings", "packed"),
    [
        ({}, {}, False),
        ({"num_kv_heads": 1, "window_pattern": "SL", "sliding_window": 8, "qk_norm": True}, {}, True),
        (
            {"tied_embeddings": True, "positions": "none", "ffn": "relu2"},
            {"gradient_accumulation": 3, "batch_size": 3},
            False,
        ),
        ({}, {"precision": "fp8"}, False),
        ({}, {"optimizer": "muon"}, False),
        ({}, {"activation_checkpointing": True}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::UserWarning:basic.transformer.kernels.ahead")
def test_what_is_compiled_ahead_is_what_a_step_launches(runs, changes, settings, packed):
    config = {"vocab_size": 304, "context_length": 32, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48}
    model = TransformerLM(ModelConfig(**(config | changes)))
    model.activation_dtype = torch.bfloat16
    train = TrainConfig(**({"steps": 1, "batch_size": 4} | settings), cuda_graph=False)
    model.configure_training(activation_checkpointing=train.activation_checkpointing)
    ids = torch.randint(304, (train.batch_size, 33))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if packed:
        batch = *batch, torch.tensor(128.0), torch.zeros_like(batch[0])
    with dispatch.use_operators(operators):
        step = TrainStep(model, make_optimizer(model, train), train, CPU)
        step(batch, 1e-3)
    names = {key[1] for key in runs[False]}
    assert {"_rotate", "_forward", "_query_gradients", "_key_gradients", "_overwrite", "_step"} <= names
    if train.optimizer == "muon":  # whose dtypes on a CPU are others
        assert {"_symmetric_product", "_step_momenta", "_step_weights"} <= {key[1] for key in runs[True]}
    else:
        assert runs[True] == runs[False]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("in_kernel", [False, True])
def test_an_error_while_kernels_are_compiled_ahead_is_a_warning(in_kernel, monkeypatch):
    @triton.jit
    def kernel(x):
        pass

    def run(kernel: JITFunction, *args: Any, warmup: bool, **options: Any) -> Any:
        for hook in kernel.pre_run_hooks:
            hook()
        return 1 / 0 if warmup else "launched"

    def launch_after_dry_run() -> Any:
        ahead.compile_ahead(lambda: kernel[(1,)](2) if in_kernel else 1 / 0, CPU)
        return kernel[(1,)](2)

    monkeypatch.setattr(JITFunction, "run", run)
    with pytest.warns(UserWarning, match=r"could not be compiled ahead.*ZeroDivisionError"):
        assert launch_after_dry_run() == "launched"
    assert JITFunction.run is run


@pytest.mark.usefixtures("on_a_cpu")
def test_a_launch_waits_for_the_threads_of_its_kernel(monkeypatch):
    @triton.jit
    def kernel(x):
        pass

    may_end, results = threading.Event(), []

    def run(kernel: JITFunction, *args: Any, warmup: bool, **options: Any) -> Any:
        for hook in kernel.pre_run_hooks:
            hook()
        if warmup:
            may_end.wait()
        results.append((warmup, args, options))
        return Compiled()

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver.active, "launcher_cls", lambda *_: results.append("launcher"))
    ahead.compile_ahead(lambda: kernel[(1,)](2, BLOCK=3), CPU)
    threading.Timer(0.05, may_end.set).start()
    kernel[(1,)](2, BLOCK=3)
    call = (2,), {"grid": (1,), "BLOCK": 3}
    assert results == [(True, *call), "launcher", (False, *call)]


def test_nothing_is_compiled_ahead_without_a_gpu():
    ahead.compile_ahead(lambda: pytest.fail("was called"), CPU)
