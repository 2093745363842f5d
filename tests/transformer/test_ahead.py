"""The kernels that are compiled before their first launch are those that a training step launches."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

import triton

from basic.model import ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.kernels import ahead, dispatch, operators

CPU = torch.device("cpu")


def specialization(value: Any) -> Any:
    """What Triton compiles a version of a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple | list):
        return tuple(map(specialization, value))
    return (value == 1, value % 16 == 0) if type(value) is int else type(value)


class Recorder:
    """Takes the place of all kernels, and notes what they would be compiled for."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.compiled: set[tuple] = set()
        self.launched: set[tuple] = set()
        patch.setattr(ahead.Kernel, "__getitem__", lambda kernel, grid: partial(self.note, kernel.function))
        patch.setattr(ahead, "_DEVICE_TYPE", "cpu")
        patch.setattr(ahead, "_started", set())
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))

    def note(self, function: Any, *args: Any, **constants: Any) -> None:
        tensors = {name: specialization(value) for name, value in constants.items() if isinstance(value, Tensor)}
        key = function.__module__, function.__name__, specialization(args), tuple((constants | tensors).items())
        (self.compiled if ahead._state.only_compiles else self.launched).add(key)


@pytest.mark.parametrize(
    ("changes", "settings", "packed"),
    [
        ({}, {}, False),
        ({"num_kv_heads": 1, "window_pattern": "SL", "sliding_window": 8, "qk_norm": True}, {}, True),
        ({"tied_embeddings": True, "positions": "none", "ffn": "relu2"}, {"gradient_accumulation": 2}, False),
        ({}, {"precision": "fp8"}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::UserWarning:basic.transformer.kernels.ahead")
def test_what_is_compiled_ahead_is_what_a_step_launches(monkeypatch, changes, settings, packed):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile cannot trace checks of shapes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    recorder = Recorder(monkeypatch)
    config = {"vocab_size": 304, "context_length": 32, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48}
    model = TransformerLM(ModelConfig(**(config | changes)))
    model.activation_dtype = torch.bfloat16
    train = TrainConfig(steps=1, batch_size=4, cuda_graph=False, compile=True, **settings)
    ids = torch.randint(304, (4, 33))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if packed:
        batch = *batch, torch.tensor(128.0), torch.zeros_like(batch[0])
    with dispatch.use_operators(operators):
        step = TrainStep(model, make_optimizer(model, train), train, CPU)
        step(batch, 1e-3)
    names = {key[1] for key in recorder.launched}
    assert {"_rotate", "_forward", "_query_gradients", "_key_gradients", "_overwrite", "_step"} <= names
    later = recorder.launched - recorder.compiled
    # The matrices themselves are quantized by no operator of the graph.
    assert {key[1] for key in later} <= ({"_quantize"} if step.fp8 is not None else set())
    assert recorder.compiled <= recorder.launched


def test_an_error_while_kernels_are_compiled_ahead_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    waiting = ahead.waits(lambda x: 1 / x)
    with pytest.warns(UserWarning, match=r"could not be compiled ahead.*ZeroDivisionError"):
        ahead._compile(waiting, (0,), CPU)
    monkeypatch.setattr(ahead._state, "only_compiles", False)
    with pytest.raises(ZeroDivisionError):
        waiting(0)


def test_a_call_waits_for_its_threads():
    may_end, results = threading.Event(), []
    function = ahead.waits(lambda: results.append("called"))
    thread = threading.Thread(target=lambda: (may_end.wait(), results.append("compiled")))
    ahead._threads[function] = [thread]
    thread.start()
    threading.Timer(0.05, may_end.set).start()
    function()
    function()
    assert results == ["compiled", "called", "called"]
    assert not ahead._threads[function]


def test_nothing_is_compiled_ahead_without_a_gpu(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    ahead.start(ahead.waits(print), torch.zeros(2), device=CPU)
