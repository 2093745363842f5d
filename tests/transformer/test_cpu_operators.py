"""The operators for a CPU against the plain functions in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from basic.model import KVCache, ModelConfig, MultiHeadSelfAttention, RotaryPositionalEmbedding, TransformerLM
from basic.transformer import functional
from basic.transformer.cpu import kernels
from basic.transformer.cpu import operators as cpu_operators
from basic.transformer.kernels import dispatch

SHAPE: dict[str, Any] = {"vocab_size": 50, "context_length": 150, "d_model": 32, "num_layers": 2, "num_heads": 4}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def results(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output and the gradients of inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(gradient.expand(output.shape).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, tolerance: float = 2e-6) -> None:
    expected = results(function, [x.double() for x in inputs], gradient)  # in float64 by the plain functions
    for actual, exact in zip(results(function, inputs, gradient), expected, strict=True):
        assert actual.dtype == torch.float32
        assert actual.shape == exact.shape
        assert relative_error(actual, exact) < tolerance


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (32,)])
def test_norm_and_feed_forward(shape: tuple[int, ...]):
    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    check(lambda x, gain: dispatch.rms_norm(x, gain, 1e-5), [x, torch.rand(32) + 0.5], dy)
    w1, w3, w2 = torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)
    check(dispatch.swiglu, [x, w1, w2, w3], dy)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e20, -3e38])
def test_norm_of_large_numbers_is_that_of_the_plain_function(value: float):
    x, weight = torch.ones(2, 40), torch.rand(40)
    x[0, 3] = value
    expected = functional.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(dispatch.rms_norm(x, weight, 1e-5), expected, equal_nan=True)


@pytest.mark.parametrize("num_targets", [None, 17.0])
def test_loss(num_targets: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_operators, "_LOGITS_BYTES", 1)  # chunks of 128 rows
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3, 100, 32), torch.randn(50, 32), torch.randint(50, (3, 100))
    targets[0, :7] = -100
    number = None if num_targets is None else torch.tensor(num_targets)
    check(
        lambda x, weight: dispatch.linear_cross_entropy(x, weight, targets, num_targets=number),
        [x, weight],
        torch.tensor(0.5),
    )
    assert dispatch.linear_cross_entropy(x, weight, torch.full((3, 100), -100)).isnan()
    large = dispatch.linear_cross_entropy(x * 1e4, weight, targets)  # would overflow without the maximum
    torch.testing.assert_close(large, functional.linear_cross_entropy(x * 1e4, weight, targets))
    count = torch.tensor(17.0, dtype=torch.float64)
    loss = dispatch.linear_cross_entropy(x, weight, targets, num_targets=count)
    torch.testing.assert_close(loss, functional.linear_cross_entropy(x, weight, targets, num_targets=count))
    with pytest.raises(IndexError, match="target 50 at position"):
        dispatch.linear_cross_entropy(x, weight, torch.full((3, 100), 50))
    with pytest.raises(ValueError, match="one target for each row"):
        dispatch.linear_cross_entropy(x, weight, targets[:2])


def test_what_the_operators_do_not_have_is_refused_or_taken_from_the_plain_functions():
    """`torch.autograd.grad` would leave out terms of a second derivative silently."""
    torch.manual_seed(0)
    model, ids = TransformerLM(ModelConfig(**SHAPE)), torch.randint(50, (2, 20))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    gradients = torch.autograd.grad(model.loss(ids, ids), list(parameters.values()))
    with pytest.raises(RuntimeError, match=r"no second derivative .* `with basic.*use_operators\(None\):`"):
        torch.autograd.grad(model.features(ids).sum(), list(parameters.values()), create_graph=True, allow_unused=True)
    with dispatch.use_operators(None):
        torch.autograd.grad(model.loss(ids, ids), list(parameters.values()), create_graph=True)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (ids,)), ids)

    transformed = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(tuple(transformed.values()), gradients)
    assert model(ids[:0]).shape == (0, 20, 50)
    assert dispatch.linear_cross_entropy(torch.zeros(0, 32), torch.zeros(50, 32), ids[:0, 0]).isnan()


def test_what_looks_for_functions_of_torch_finds_them():
    """A kernel writes to addresses: tensors without memory ended the process, and a traced graph had no result."""
    x, gain = torch.randn(3, 32), torch.rand(32)
    with FakeTensorMode():
        assert dispatch.rms_norm(torch.empty(3, 32), torch.empty(32), 1e-5).shape == (3, 32)
    traced = make_fx(lambda x, gain: dispatch.rms_norm(x, gain, 1e-5))(torch.ones(3, 32), gain)
    torch.testing.assert_close(traced(x, gain), dispatch.rms_norm(x, gain, 1e-5))
    with forward_ad.dual_level(), torch.no_grad():
        y = dispatch.rms_norm(forward_ad.make_dual(x, torch.ones_like(x)), gain, 1e-5)
        assert forward_ad.unpack_dual(y).tangent is not None
    model, ids = TransformerLM(ModelConfig(**SHAPE)), torch.randint(50, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, ids)
        loss.backward()
    torch.testing.assert_close(loss, model.loss(ids, ids), rtol=1e-2, atol=1e-2)


def test_angles_starts_and_weights_of_other_dtypes():
    attention = MultiHeadSelfAttention(32, 4, RotaryPositionalEmbedding(1e4, 8, 20).double())
    x, starts = torch.randn(2, 20, 32), torch.arange(20).div(7, rounding_mode="floor") * 7
    y = attention(x, document_starts=starts.int())
    assert attention.rope is not None
    attention.rope.float()
    torch.testing.assert_close(y, attention(x, document_starts=starts.int()))
    torch.testing.assert_close(y, attention(x, document_starts=starts))
    half = copy.deepcopy(attention).bfloat16()
    torch.testing.assert_close(half(x, document_starts=starts), y, rtol=1e-2, atol=1e-2)


def test_the_loss_of_an_evaluation_computes_no_gradient():
    x, weight, targets = torch.randn(3, 32), torch.randn(50, 32).requires_grad_(), torch.arange(3)
    with torch.profiler.profile() as evaluation, torch.no_grad():
        dispatch.linear_cross_entropy(x, weight, targets)
    with torch.profiler.profile() as training:
        dispatch.linear_cross_entropy(x, weight, targets)
    counts = [sum("mm" in event.name for event in each.events()) for each in (evaluation, training)]
    assert 0 < counts[0] < counts[1]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_heads": 2, "num_kv_heads": 1, "sliding_window": 70},
    {"qk_norm": True, "qkv_bias": True, "num_kv_heads": 2},
    {"positions": "none", "num_kv_heads": 2},
    {"value_embeddings": True, "sliding_window": 5},
    {"d_model": 80, "num_heads": 2},
    {"d_model": 35, "num_heads": 5, "positions": "none"},
]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_model(variant: dict[str, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch):
    """Loss and gradients of a model, with several chunks and tiles and documents that begin anywhere."""
    monkeypatch.setattr(cpu_operators, "_LOGITS_BYTES", 1 << 17)
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**(SHAPE | variant)))
    exact = TransformerLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    ids, targets = torch.randint(50, (2, batch_size, 150))
    starts = (torch.rand(batch_size, 150) < 0.03) * torch.arange(150)
    for document_starts in (None, starts.cummax(-1).values):
        losses = [each.loss(ids, targets, document_starts=document_starts) for each in (model, exact)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for loss in losses:
            loss.backward()
        for (name, actual), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert actual.grad is not None
            assert expected.grad is not None
            assert relative_error(actual.grad, expected.grad) < 2e-5, name


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
@torch.no_grad()
def test_prompt_fills_the_cache(variant: dict[str, Any]):
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**(SHAPE | variant)))
    ids = torch.randint(50, (2, 100))
    caches = [KVCache(model.config, 2) for _ in range(2)]
    logits = model(ids, caches[0])
    with dispatch.use_operators(None):
        expected = model(ids, caches[1])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(caches[0].keys[:, :, :, :100], caches[1].keys[:, :, :, :100])
    torch.testing.assert_close(caches[0].values[:, :, :, :100], caches[1].values[:, :, :, :100])


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_operators, "_MIN_NUMBERS", 0)
    torch.manual_seed(0)
    x, gain, weight, targets = torch.randn(700, 32), torch.rand(32), torch.randn(50, 32), torch.randint(50, (700,))
    qkv, starts = torch.randn(3, 70, 96), (torch.arange(70) // 30 * 30).repeat(3, 1)
    cos, sin = functional.rope_tables(1e4, 8, 70, dtype=torch.float32)
    how = cpu_operators._Heads(8, 2, cos, sin, 40, starts)
    made: list[list[Tensor]] = []
    for num_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        gates = torch.cat((x, x.flip(0)), 1)
        normed = results(lambda x, gain: dispatch.rms_norm(x, gain, 1e-5), [x, gain], x)
        gated = results(lambda gates: dispatch.swiglu(gates, *torch.eye(64).repeat(3, 1, 1)), [gates], gates)
        attended = results(lambda qkv: cpu_operators._Attention.apply(qkv, None, how), [qkv], qkv[:, :, :64])
        losses, logits = torch.empty(700), x @ weight.T
        cpu_operators._run(kernels.cross_entropy, logits, targets, torch.ones(700), losses, 50, True)
        made.append([*normed, *gated, *attended, losses, logits])
    for alone, together in zip(*made, strict=True):
        assert torch.equal(alone, together)


def test_what_memory_held_before_is_not_read():
    """torch fills new memory with NaN if results must be reproducible."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SHAPE | {"num_kv_heads": 2, "sliding_window": 70}
    model, ids = TransformerLM(ModelConfig(**sizes)), torch.randint(50, (2, 2, 150))
    gradients = torch.autograd.grad(model.loss(*ids), list(model.parameters()))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        again = torch.autograd.grad(model.loss(*ids), list(model.parameters()))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(gradients, again, strict=True):
        assert torch.equal(first, second)


def test_attention_does_not_hold_all_scores():
    """What is saved for the backward pass is less than the scores would be."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SHAPE | {"context_length": 1024, "num_layers": 1}
    config = ModelConfig(**sizes)
    model, ids = TransformerLM(config), torch.randint(50, (1, 1024))
    all_scores = 4 * config.num_heads * 1024**2
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model.loss(ids, ids).backward()
    assert 0 < sum(saved) < all_scores
