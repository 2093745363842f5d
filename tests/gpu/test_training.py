"""The whole model with kernels beside the plain one."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from basic.model import AdamW, ModelConfig, TransformerLM, cross_entropy
from basic.training.batches import BatchSampler, prefetch
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep
from basic.transformer.kernels import dispatch

CUDA = torch.device("cuda")
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinystories_2MiB.txt"


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


def random_batch(vocab_size: int = 1000, rows: int = 8, seq: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocab_size, (rows, seq + 1), device=CUDA)
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
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_plain_model_in_float32(changes, compiled):
    if compiled and changes and "d_ff" not in changes:
        pytest.skip("compiling takes time: the two usual shapes stand for all")
    model = make_model(**changes)
    inputs, targets = random_batch(model.config.vocab_size)
    cross_entropy(model(inputs), targets).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    model.activation_dtype = torch.bfloat16
    assert dispatch.triton_ops is not None
    (torch.compile(model.loss) if compiled else model.loss)(inputs, targets).backward()
    errors = [
        ((gradient - wanted).norm() / wanted.norm()).item()
        for gradient, wanted in zip(gradients(model), expected, strict=True)
    ]
    print("median relative error", np.median(errors), "largest", max(errors))
    assert np.median(errors) < 0.02


def last_losses(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    tokens = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.uint16)
    model = make_model(vocab_size=256)
    model.activation_dtype = torch.bfloat16
    if not with_kernels:
        monkeypatch.setattr(dispatch, "triton_ops", None)
    step = make_step(model, compile=with_kernels, cuda_graph=with_kernels)
    sampler = BatchSampler(tokens, 32, 256, seed=1)
    losses = torch.zeros(300, device=CUDA)
    with prefetch(sampler, range(300), CUDA) as batches:
        for i, batch in enumerate(batches):
            losses[i] = step(batch, 1e-3 * min(1, (i + 1) / 50))[0]
    assert (step.graph is not None) == with_kernels
    return losses[-50:].mean().item()


def test_training_on_real_text_comes_to_the_same_loss_with_and_without_kernels(monkeypatch):
    if not TEXT.is_file():
        pytest.skip(f"needs ../shared/data/{TEXT.name}, which is not here")
    with_kernels, without = last_losses(True, monkeypatch), last_losses(False, monkeypatch)
    print("mean of the last 50 losses with kernels", with_kernels, "without", without)
    assert without < 2  # it did learn
    assert abs(with_kernels - without) < 0.01


def test_the_recorded_step_is_the_step():
    batches = [random_batch() for _ in range(8)]
    results = []
    for cuda_graph in (True, False):
        model = make_model()
        model.activation_dtype = torch.bfloat16
        step = make_step(model, cuda_graph=cuda_graph)
        results.append([tuple(x.item() for x in step(batch, 1e-3 * i)) for i, batch in enumerate(batches, 1)])
        assert (step.graph is not None) == cuda_graph
    np.testing.assert_allclose(results[0], results[1], rtol=2e-3)


def test_a_thread_that_sends_batches_does_not_disturb_the_recording():
    step, done = make_step(make_model()), threading.Event()

    def send() -> None:
        pinned = []  # kept, so that each asks the driver for memory of its own
        while not done.is_set() and len(pinned) < 20_000:
            pinned.append(torch.empty(1 << 14).pin_memory())

    thread = threading.Thread(target=send)
    thread.start()
    try:
        for _ in range(5):
            step(random_batch(), 1e-3)
    finally:
        done.set()
        thread.join()
    assert step.graph is not None


@pytest.mark.parametrize("place", ["token_embeddings.weight", "layers.1.attn.k_proj.weight", "lm_head.weight"])
def test_a_nan_is_found_and_changes_nothing(place):
    model = make_model()
    model.activation_dtype = torch.bfloat16
    step = make_step(model)
    for _ in range(5):
        step(random_batch(), 1e-3)
    weight = model.get_parameter(place)
    with torch.no_grad():
        step.copies.get(weight, weight)[3, 4] = torch.nan
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs, targets = random_batch()
    inputs[0, 0] = 3
    loss, norm = step((inputs, targets), 1e-3)
    assert not torch.isfinite(loss + norm)
    pairs = zip(before, model.parameters(), strict=True)
    assert all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in pairs)


@pytest.mark.parametrize("reason", ["head size", "no Triton"])
def test_what_no_kernel_covers_runs_plainly_with_one_warning(reason, monkeypatch):
    dispatch._warn_once.cache_clear()
    if reason == "no Triton":
        monkeypatch.setattr(dispatch, "triton_ops", None)
    model = make_model(num_heads=4, d_model=96 if reason == "head size" else 64)  # heads of 24 or 16
    model.activation_dtype = torch.bfloat16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step = make_step(model, cuda_graph=reason == "head size")
            losses = [step(random_batch(), 1e-3)[0].item() for _ in range(5)]
    assert np.isfinite(losses).all()
    assert len([one for one in caught if "plain operations" in str(one.message)]) == 1
