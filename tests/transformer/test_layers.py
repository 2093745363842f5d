"""The layers, RoPE and attention against torch.nn.functional."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close

from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.model import Embedding, MultiHeadSelfAttention, RotaryPositionalEmbedding
from basic.transformer.functional import rope_tables, rotate_pairs
from basic.transformer.kernels import dispatch
from tests.adapters import (
    run_embedding,
    run_linear,
    run_multihead_self_attention,
    run_multihead_self_attention_with_rope,
    run_rmsnorm,
    run_rope,
    run_scaled_dot_product_attention,
    run_silu,
    run_swiglu,
)
from tests.helpers.model_tools import (
    TOLERANCE,
    assert_same,
    every_dtype,
    every_leading,
    float64,
    rotated,
    self_attention,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the layers -----------------------------------------------------------------------------------------------


@every_dtype
@every_leading
def test_linear_is_torchs(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    (x, x64), (w, w64) = float64(dtype, (*leading, 6), (5, 6))
    assert_same(run_linear(6, 5, w, x), F.linear(x64, w64), dtype)


@every_dtype
@every_leading
def test_embedding_is_torchs(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    [(w, w64)] = float64(dtype, (7, 4))
    ids = torch.randint(7, leading)
    assert_same(run_embedding(7, 4, w, ids), F.embedding(ids, w64), dtype)


def test_repeated_ids_add_their_gradients() -> None:
    ids, layer = torch.tensor([[2, 0, 2], [2, 5, 0]]), Embedding(7, 4)
    upstream = torch.randn(2, 3, 4)
    (layer(ids) * upstream).sum().backward()
    expected = torch.zeros(7, 4).index_add(0, ids.flatten(), upstream.flatten(0, 1))
    assert layer.weight.grad is not None
    assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("bad_id", [-1, 7])
def test_ids_outside_the_vocabulary_are_named(bad_id: int) -> None:
    with pytest.raises(IndexError, match=rf"token id {bad_id} at position 1 is outside 0 \.\. 6 \(vocab_size=7\)"):
        run_embedding(7, 4, torch.randn(7, 4), torch.tensor([0, bad_id, 6]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_ids_of_every_signed_dtype(dtype: torch.dtype) -> None:
    layer = Embedding(4, 3)
    assert torch.equal(layer(torch.tensor([2, 2, 0], dtype=dtype)), layer.weight[[2, 2, 0]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_what_is_no_id_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """PyTorch itself takes four bytes or bools for a mask."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(TypeError, match=rf"token ids must have the dtype int64 or int32, got {dtype}; .*\.long\(\)"):
        Embedding(4, 3)(torch.ones(4, dtype=dtype))


def test_without_a_check_a_bad_id_gives_nan() -> None:
    """As on a GPU, where a check would wait for the device; PyTorch alone would take -1 for the last row."""
    layer, ids = Embedding(7, 4), torch.tensor([0, -1, 6, 7, -100])
    compiled = torch.compile(layer, backend="eager")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        features = compiled(ids)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert torch.equal(features[[0, 2]], layer.weight[[0, 6]])
    assert features[[1, 3, 4]].isnan().all()
    features[[0, 2]].sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad.sum(1), torch.tensor([4.0, 0, 0, 0, 0, 0, 4]))


@every_dtype
@every_leading
def test_silu_is_torchs(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    [(x, x64)] = float64(dtype, leading, scale=5)
    assert_same(run_silu(x), F.silu(x64), dtype)


def test_silu_of_large_numbers() -> None:
    x = torch.tensor([-1e30, -1000.0, 1000.0, 1e30])
    assert_close(run_silu(x), torch.tensor([0.0, 0.0, 1000.0, 1e30]))


@every_dtype
@every_leading
def test_swiglu_is_torchs(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    tensors = float64(dtype, (*leading, 6), (8, 6), (6, 8), (8, 6), scale=0.5)
    (x, w1, w2, w3), (x64, w1_64, w2_64, w3_64) = zip(*tensors, strict=True)
    expected = F.linear(F.silu(F.linear(x64, w1_64)) * F.linear(x64, w3_64), w2_64)
    assert_same(run_swiglu(6, 8, w1, w2, w3, x), expected, dtype)


@every_dtype
@every_leading
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e15])
def test_rmsnorm_is_torchs(dtype: torch.dtype, leading: tuple[int, ...], scale: float) -> None:
    [(x, x64)] = float64(dtype, (*leading, 9), scale=scale)
    [(gains, gains64)] = float64(dtype, (9,))
    actual = run_rmsnorm(9, 1e-5, gains, x)
    expected = F.rms_norm(x64, (9,), gains64, eps=1e-5)
    tolerance = min(TOLERANCE[dtype], 2**-8)  # in bfloat16 only the result is rounded
    assert actual.dtype == dtype
    assert_close(actual.double(), expected, rtol=tolerance, atol=0)


def test_rmsnorm_of_a_zero_vector_is_zero_with_a_gradient() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    out = run_rmsnorm(5, 1e-5, torch.ones(5), x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert_close(out, torch.zeros(2, 5))
    assert_close(gradient, torch.full((2, 5), 1e-5**-0.5))


@pytest.mark.parametrize(
    "function",
    [
        run_silu,
        lambda x: run_rmsnorm(4, 1e-5, torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=x.dtype), x),
        lambda x: run_rope(4, 100.0, 5, x, torch.tensor([0, 3, 4])),
        lambda x: run_scaled_dot_product_attention(x, 2 * x + 1, x.square()),
        lambda x: run_scaled_dot_product_attention(x, x, x.sin(), torch.eye(3, dtype=torch.bool).roll(1, 0).tril()),
    ],
    ids=["silu", "rmsnorm", "rope", "attention", "masked attention"],
)
def test_gradients_are_those_of_finite_differences(function: Any) -> None:
    assert torch.autograd.gradcheck(function, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))


# --- RoPE -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    ("leading", "positions_shape"),
    [((), (5,)), ((), (1, 5)), ((3,), (5,)), ((3,), (1, 5)), ((3,), (3, 5)), ((3, 2), (3, 5)), ((3, 2), (3, 2, 5))],
    ids=str,
)
def test_rope_is_multiplication_by_complex_numbers(
    dtype: torch.dtype, leading: tuple[int, ...], positions_shape: tuple[int, ...]
) -> None:
    [(x, x64)] = float64(dtype, (*leading, 5, 6))
    positions = torch.randint(40, positions_shape)
    # (3, 5) positions for features of (3, 2, 5) align with the first axis; everything else broadcasts.
    aligned = positions.unsqueeze(1) if (leading, positions_shape) == ((3, 2), (3, 5)) else positions
    expected = rotated(x64, aligned, 1e4).reshape(x.shape)
    assert_same(run_rope(6, 1e4, 40, x, positions), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rope_is_accurate_at_large_positions(dtype: torch.dtype) -> None:
    [(x, x64)] = float64(dtype, (4, 8))
    positions = torch.tensor([0, 16_383, 131_071, 131_070])
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    actual = run_rope(8, 1e4, 131_072, x, positions).double()
    assert_close(actual, rotated(x64, positions, 1e4), rtol=tolerance, atol=tolerance)


def test_rope_counts_from_zero_by_default() -> None:
    rope, x = RotaryPositionalEmbedding(1e4, 6, 8), torch.randn(2, 5, 6)
    assert_close(rope(x), rope(x, torch.arange(5)), rtol=0, atol=0)


def test_casting_a_model_leaves_the_rope_tables_exact() -> None:
    rope = RotaryPositionalEmbedding(1e4, 6, 300)
    cos, sin = rope_tables(1e4, 6, 300, dtype=torch.float64)
    assert_close(rope.bfloat16().cos, cos.float(), rtol=0, atol=0)
    assert_close(rope.double().sin, sin, rtol=0, atol=0)


def test_to_empty_computes_the_rope_tables_of_a_meta_model() -> None:
    with torch.device("meta"):
        rope = RotaryPositionalEmbedding(1e4, 6, 30)
    assert rope.cos.is_meta
    assert_close(rope.to_empty(device="cpu").sin, rope_tables(1e4, 6, 30, dtype=torch.float32)[1], rtol=0, atol=0)


@pytest.mark.parametrize("position", [-1, 8])
def test_positions_outside_the_tables_are_named(position: int) -> None:
    with pytest.raises(IndexError, match=rf"position {position} at position 1 is outside 0 \.\. 7"):
        run_rope(4, 1e4, 8, torch.randn(2, 4), torch.tensor([0, position]))


def test_more_tokens_than_positions_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="5 tokens do not fit into max_seq_len=1"):
        RotaryPositionalEmbedding(1e4, 4, 1)(torch.randn(5, 4))


def test_rope_needs_an_even_size() -> None:
    with pytest.raises(InvalidInputError, match="even, got 5"):
        run_rope(5, 1e4, 8, torch.randn(2, 5), torch.arange(2))


# --- attention ------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    ("leading", "mask_shape"),
    [((), None), ((), (4, 5)), ((2,), None), ((2,), (4, 5)), ((2,), (1, 4, 5)), ((2,), (2, 4, 5)), ((2,), (4, 1))]
    + [((3, 2), shape) for shape in (None, (4, 5), (2, 4, 5), (3, 1, 4, 5), (3, 2, 4, 5))],
    ids=str,
)
def test_attention_is_torchs(dtype: torch.dtype, leading: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
    (q, q64), (k, k64), (v, v64) = float64(dtype, (*leading, 4, 8), (*leading, 5, 8), (*leading, 5, 3))
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.6
    expected = F.scaled_dot_product_attention(q64, k64, v64, mask)
    if mask is not None:  # by contract, for a query that may attend to no key
        expected = expected.where(mask.any(-1, keepdim=True), 0.0)
    assert_same(run_scaled_dot_product_attention(q, k, v, mask), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_without_keys_gets_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 6).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    out = run_scaled_dot_product_attention(q, k, v, mask)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[:, 2] == 0).all()
    assert (out[:, [0, 1, 3]] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, 2] == 0).all()


def test_attention_survives_large_scores() -> None:
    (q, q64), (k, k64), (v, v64) = float64(torch.float32, (2, 4, 8), (2, 5, 8), (2, 5, 3), scale=1000)
    mask = torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q64, k64, v64, mask)
    assert_close(run_scaled_dot_product_attention(q, k, v, mask).double(), expected, rtol=1e-5, atol=1e-5)


@every_dtype
@every_leading
@pytest.mark.parametrize("positions_shape", ["no rope", None, (5,), (1, 5), "as x", "last axis"], ids=str)
def test_multihead_attention_is_torchs(dtype: torch.dtype, leading: tuple[int, ...], positions_shape: Any) -> None:
    if positions_shape == "last axis":
        leading = (2, 2)  # two equal axes: positions of (2, 5) align with the second
    (x, x64), *weights = float64(dtype, (*leading, 5, 12), *[(12, 12)] * 4, scale=0.6)
    weights, weights64 = map(list, zip(*weights, strict=True))
    if positions_shape == "no rope":
        actual = run_multihead_self_attention(12, 3, *weights, x)
        assert_same(actual, self_attention(x64, weights64, 3), dtype)
        return
    shape = {"as x": (*leading, 5), "last axis": (2, 5)}.get(positions_shape, positions_shape)
    positions = None if shape is None else torch.randint(9, shape)
    actual = run_multihead_self_attention_with_rope(12, 3, 9, 1e3, *weights, x, positions)
    own = torch.arange(5) if positions is None else positions
    rotate = lambda q: rotated(q, own.expand(*leading, 5).unsqueeze(-2) if leading else own.reshape(5), 1e3)  # noqa: E731
    assert_same(actual, self_attention(x64, weights64, 3, rotate), dtype)


@every_dtype
@every_leading
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_shared_keys_and_values_are_repeated(dtype: torch.dtype, leading: Any, num_kv_heads: int) -> None:
    """Grouped-query attention equals multi-head attention whose groups of heads have equal weights."""
    attention = MultiHeadSelfAttention(12, 4, num_kv_heads=num_kv_heads).to(dtype)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (3 * num_kv_heads, 12)
    [(x, x64)] = float64(dtype, (*leading, 5, 12))
    weights64 = [parameter.detach().double() for parameter in attention.parameters()]
    for k_or_v in (1, 2):
        weights64[k_or_v] = torch.cat([weights64[k_or_v][3 * (head * num_kv_heads // 4) :][:3] for head in range(4)])
    assert_same(attention(x), self_attention(x64, weights64, 4), dtype)


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_kernels_get_the_heads_of_queries_and_of_keys(num_kv_heads: int, positions: str) -> None:
    rope = RotaryPositionalEmbedding(1e2, 16, 9) if positions == "rope" else None
    attention = MultiHeadSelfAttention(64, 4, rope, num_kv_heads).half()
    x = torch.randn(2, 5, 64).half()
    calls = []

    def rotary_attention(
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        window: int,
        starts: None,
    ) -> tuple[Tensor, None, None]:
        calls.append(weight.shape)
        heads = F.linear(x, weight).unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2), None, None

    expected = attention(x)
    with dispatch.use_operators(SimpleNamespace(rotary_attention=rotary_attention)):
        actual = attention(x)
    assert calls == [(64 + 2 * 16 * num_kv_heads, 64)]
    assert_close(actual, expected, rtol=1e-2, atol=2e-3)


def test_gradients_of_shared_keys_and_values_are_those_of_finite_differences() -> None:
    attention = MultiHeadSelfAttention(8, 4, RotaryPositionalEmbedding(1e2, 2, 3), num_kv_heads=2).double()
    names, weights = zip(*attention.named_parameters(), strict=True)

    def attend(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(attention, dict(zip(names, weights, strict=True)), (x,))

    assert gradcheck(attend, (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), *weights))


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(InvalidConfigError, match=r"d_model=10 .* num_heads=3"):
        run_multihead_self_attention(10, 3, *[torch.randn(10, 10)] * 4, torch.randn(2, 10))
