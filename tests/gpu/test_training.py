"""Training steps with kernels, compared with plain operations."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import triton

from basic.model import AdamW, ModelConfig, TransformerLM, cross_entropy
from basic.training.batches import BatchSampler, read_ahead
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.kernels import dispatch

CUDA = torch.device("cuda")
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinystories_2MiB.txt"


MODERN: dict[str, Any] = {"ffn": "relu2", "qk_norm": True, "embedding_norm": True, "value_embeddings": True}


def make_model(**changes) -> TransformerLM:
    sizes: dict[str, Any] = {"vocab_size": 1000, "context_length": 256, "d_model": 256, "num_layers": 3, "num_heads": 8}
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(**{**sizes, **changes})).to(CUDA)


def make_step(model: TransformerLM, **settings) -> TrainStep:
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    config: dict[str, Any] = {"steps": 1, "batch_size": 8, **settings}
    return TrainStep(model, optimizer, TrainConfig(**config), CUDA)


def gradients(model: TransformerLM) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def random_batch(vocab_size: int = 1000, batch_size: int = 8, seq: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocab_size, (batch_size, seq + 1), device=CUDA)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 10_000, "d_model": 512, "num_layers": 4, "num_heads": 16, "d_ff": 1344},
        {"positions": "none"},
        {"norm": "post", "num_heads": 4},
        {"ffn": "silu", "norm": "none", "num_heads": 2},
        {"tied_embeddings": True},
        {"num_kv_heads": 2},
        MODERN,
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_plain_model_in_float32(changes, compiled):
    if compiled and changes and "d_ff" not in changes and changes is not MODERN:
        pytest.skip("compiling takes time, so only the two usual shapes are compiled")
    model = make_model(**changes)
    inputs, targets = random_batch(model.config.vocab_size)
    cross_entropy(model(inputs), targets).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    model.activation_dtype = torch.bfloat16
    assert dispatch.available_on(CUDA)
    (torch.compile(model.loss) if compiled else model.loss)(inputs, targets).backward()
    errors = [
        ((gradient - reference).norm() / reference.norm()).item()
        for gradient, reference in zip(gradients(model), expected, strict=True)
    ]
    print("median relative error", np.median(errors), "largest", max(errors))
    assert np.median(errors) < 0.02


def last_losses(with_kernels: bool) -> float:
    tokens = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.uint16)
    model = make_model(vocab_size=256)
    model.activation_dtype = torch.bfloat16
    step = make_step(model, compile=with_kernels, cuda_graph=with_kernels)
    sampler = BatchSampler(tokens, 32, 256, seed=1)
    losses = torch.zeros(300, device=CUDA)
    with read_ahead(sampler, range(300), CUDA) as batches:
        for i, batch in enumerate(batches):
            losses[i] = step(batch, 1e-3 * min(1, (i + 1) / 50))[0]
    assert (step.graph is not None) == with_kernels
    return losses[-50:].mean().item()


def test_training_on_real_text_reaches_the_same_loss_with_and_without_kernels():
    if not TEXT.is_file():
        pytest.skip(f"needs ../shared/data/{TEXT.name}, which is not here")
    with_kernels = last_losses(True)
    with dispatch.use_operators(None):
        without = last_losses(False)
    print("mean of the last 50 losses with kernels", with_kernels, "without", without)
    assert without < 2  # the model has learned
    assert abs(with_kernels - without) < 0.01


def test_a_replayed_cuda_graph_gives_the_result_of_the_step():
    batches = [random_batch() for _ in range(8)]
    results = []
    for cuda_graph in (True, False):
        model = make_model()
        model.activation_dtype = torch.bfloat16
        step = make_step(model, cuda_graph=cuda_graph)
        results.append([tuple(x.item() for x in step(batch, 1e-3 * i)) for i, batch in enumerate(batches, 1)])
        assert (step.graph is not None) == cuda_graph
    np.testing.assert_allclose(results[0], results[1], rtol=2e-3)


def test_a_thread_that_pins_memory_does_not_break_the_capture():
    step, done = make_step(make_model()), threading.Event()

    def pin_memory() -> None:
        pinned = []  # kept, so that each call allocates new memory
        while not done.is_set() and len(pinned) < 20_000:
            pinned.append(torch.empty(1 << 14).pin_memory())

    thread = threading.Thread(target=pin_memory)
    thread.start()
    try:
        for _ in range(5):
            step(random_batch(), 1e-3)
    finally:
        done.set()
        thread.join()
    assert step.graph is not None


@pytest.mark.parametrize("name", ["token_embeddings.weight", "layers.1.attn.k_proj.weight", "lm_head.weight"])
def test_a_nan_is_detected_and_the_weights_stay(name):
    model = make_model()
    model.activation_dtype = torch.bfloat16
    step = make_step(model)
    for _ in range(5):
        step(random_batch(), 1e-3)
    weight = model.get_parameter(name)
    with torch.no_grad():
        step.weight_copies.get(weight, weight)[3, 4] = torch.nan
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs, targets = random_batch()
    inputs[0, 0] = 3
    loss, norm = step((inputs, targets), 1e-3)
    assert not torch.isfinite(loss + norm)
    pairs = zip(before, model.parameters(), strict=True)
    assert all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in pairs)


@pytest.mark.parametrize("reason", ["head size", "no Triton"])
def test_without_a_kernel_plain_operations_are_used_with_one_warning(reason):
    dispatch._warn_once.cache_clear()
    without_kernels = dispatch.use_operators(None) if reason == "no Triton" else nullcontext()
    # The kernels support heads of up to 256 features.
    model = make_model(num_heads=1, d_model=264) if reason == "head size" else make_model(num_heads=4, d_model=64)
    model.activation_dtype = torch.bfloat16
    with without_kernels, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step = make_step(model, cuda_graph=reason == "head size")
            losses = [step(random_batch(), 1e-3)[0].item() for _ in range(5)]
    assert np.isfinite(losses).all()
    assert len([warning for warning in caught if "plain operations" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"compile": True}, ("_forward", "_query_gradients", "_key_gradients")),
        ({"optimizer": "muon"}, ("_step_weights",)),
        ({"precision": "fp8"}, ()),
    ],
    ids=str,
)
def test_no_kernel_is_compiled_when_it_is_launched(settings, names, monkeypatch):
    compiled: list[tuple[str, str]] = []

    def note(*, fn: Any, **_: Any) -> None:
        if fn.module.startswith("basic."):
            compiled.append((fn.name, threading.current_thread().name))

    model = make_model(d_model=240, num_heads=6, d_ff=336)  # no other test has this head size
    model.activation_dtype = torch.bfloat16
    config = TrainConfig(**({"steps": 1, "batch_size": 8, "compile": False} | settings))
    step = TrainStep(model, make_optimizer(model, config), config, CUDA)  # in fp8, launches kernels for the weights
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    step(random_batch(), 1e-3)
    print(compiled)
    assert set(names) <= {name for name, _ in compiled}
    assert {thread for _, thread in compiled} <= {"compiles kernels"}
