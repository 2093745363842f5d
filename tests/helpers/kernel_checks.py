"""Every kernel against its oracle in float64.

The interpreter's tests call these checks with small shapes, the GPU's tests with large ones. Output buffers are filled
with NaN before a kernel writes them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from basic.generation.gpu_decoder import GpuDecoder
from basic.generation.sampling import NO_TOKEN
from basic.model import KVCache, ModelConfig, TransformerLM
from basic.transformer import functional
from basic.transformer import muon as plain_muon
from basic.transformer.kernels import dispatch, muon, operators
from basic.transformer.kernels.adamw import step_parameters
from basic.transformer.kernels.attention import flash_attention, rope
from basic.transformer.kernels.interpreter import INTERPRETED

# The interpreter truncates to bfloat16 where a GPU rounds: twice the error.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}


@contextmanager
def poisoned() -> Generator[None]:
    """Fill all uninitialized tensors with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = relative_error(actual, expected)
    assert error < TOLERANCES[dtype], f"relative error {error}"  # false for NaN


def check_attention(
    seq: int, head_size: int, dtype: torch.dtype, device: str, *, batch: int = 2, heads: int = 2, group: int = 1,
    window: int = 0, documents: int = 0
) -> None:  # fmt: skip
    """RoPE and attention, output and gradients, with a strided output gradient and an identity projection.

    Also without a projection, which gives the same.

    Args:
        documents: packed into each row; 0 for one without bounds.
    """
    torch.manual_seed(seq + head_size)
    kv_heads = heads // group
    packed = heads + 2 * kv_heads
    qkv = torch.randn(batch, seq, packed, head_size, device=device).to(dtype).requires_grad_()
    d_output = torch.randn(batch, heads, seq, head_size, device=device).to(dtype).transpose(1, 2)
    cos, sin = functional.rope_tables(1e4, head_size, seq + 3, dtype=torch.float32, device=device)
    weight = torch.eye(packed * head_size, device=device, dtype=dtype).requires_grad_()
    starts = None
    if documents:
        first = torch.stack([torch.randperm(seq - 1)[: documents - 1].sort().values + 1 for _ in range(batch)])
        first = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), first], 1).to(device)
        document = torch.searchsorted(
            first, torch.arange(seq, device=device).expand(batch, seq).contiguous(), right=True
        )
        starts = first.gather(1, document - 1).int()
    with poisoned():
        output = operators.rotary_attention(qkv.flatten(2), weight, cos, sin, heads, kv_heads, window, starts)[0]
        output.backward(d_output)
        projected = qkv.detach().flatten(2).requires_grad_()
        same = operators.rotary_attention(projected, None, cos, sin, heads, kv_heads, window, starts)[0]
        same.backward(d_output)
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    q, k = (functional.rotate_pairs(x, cos[:seq].double(), sin[:seq].double()) for x in (q, k))
    mask = functional.causal_mask(seq, seq, window or None, device=device)
    if starts is not None:
        mask = mask & (torch.arange(seq, device=device) >= starts.unsqueeze(-1)).unsqueeze(1)
    expected = functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    expected.backward(d_output.double())
    assert qkv.grad is not None
    assert wide.grad is not None
    assert_close(output, expected, dtype)
    assert_close(same, expected, dtype)
    assert projected.grad is not None
    assert (projected.grad.view(qkv.shape) - qkv.grad).abs().max() < 0.05
    if seq == 1:
        # The only attention weight is 1: the gradients of queries and keys are zero up to rounding.
        assert qkv.grad[:, :, :-kv_heads].abs().max() < 0.05
        assert_close(qkv.grad[:, :, -kv_heads:], wide.grad[:, :, -kv_heads:], dtype)
        return
    for ours, also_ours, expected in zip(
        *(operators.split_heads(x.view(qkv.shape), heads) for x in (qkv.grad, projected.grad, wide.grad)), strict=True
    ):
        assert_close(ours, expected, dtype)
        assert_close(also_ours, expected, dtype)
    assert weight.grad is not None
    assert_close(weight.grad, wide.grad.flatten(2).flatten(0, 1).T @ wide.detach().flatten(2).flatten(0, 1), dtype)


def check_attention_finds_nan(head_size: int, dtype: torch.dtype, device: str) -> None:
    for i in range(3):
        qkv = torch.randn(1, 40, 3, 1, head_size, device=device).to(dtype)
        qkv[0, 20, i, 0, 3] = math.nan
        q, k, v = qkv.unbind(2)
        output, _ = flash_attention.forward(q, k, v)
        assert output[0, 20].isnan().any()


def check_rotation(seq: int, head_size: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, seq, 5, head_size, device=device).to(dtype)
    cos, sin = functional.rope_tables(1e4, head_size, seq, dtype=torch.float32, device=device)
    expected = functional.rotate_pairs(x.double().transpose(1, 2), cos.double(), sin.double()).transpose(1, 2)
    y, out = x.clone(), torch.full_like(x, math.nan)
    rope.rotate_packed(x, cos, sin, 3, out)
    rope.rotate_packed(y, cos, sin, 3, y)
    for result in (y, out):
        assert_close(result[:, :, :3], expected[:, :, :3], dtype)
        assert torch.equal(result[:, :, 3:], x[:, :, 3:])


def check_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight = torch.randn(24, shape[-1] // 2, device=device).to(dtype).requires_grad_()
    with poisoned():
        output = operators.swiglu_linear(x, weight)
        d_output = torch.randn(output.shape, device=device).to(dtype)
        output.backward(d_output)
    wide = x.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    gate, value = wide.chunk(2, -1)
    expected = functional.linear(functional.silu(gate) * value, wide_weight)
    expected.backward(d_output.double())
    assert x.grad is not None
    assert wide.grad is not None
    assert weight.grad is not None
    assert wide_weight.grad is not None
    assert_close(output, expected, dtype)
    assert_close(x.grad, wide.grad, dtype)
    assert_close(weight.grad, wide_weight.grad, dtype)
    x.detach()[..., 0] = math.nan
    assert operators.swiglu_linear(x.detach(), weight.detach()).isnan().all()


def check_cross_entropy(rows: int, vocab_size: int, chunk_rows: int, dtype: torch.dtype, device: str) -> None:
    """The oracle's logits are rounded like the kernel's; everything else is in float64."""
    torch.manual_seed(rows)
    x = torch.randn(rows, 32, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, 32, device=device) / 3).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), device=device)
    targets[0], targets[-1] = 0, vocab_size - 1
    with poisoned():
        loss = operators.linear_cross_entropy(x, weight, targets, chunk_rows, True)[0]
        (3 * loss).backward()
    logits = (x.detach() @ weight.detach().T).double().requires_grad_()
    expected = functional.cross_entropy(logits, targets)
    (3 * expected).backward()
    assert logits.grad is not None
    assert x.grad is not None
    assert weight.grad is not None
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    assert_close(x.grad, logits.grad @ weight.detach().double(), dtype)
    assert_close(weight.grad, logits.grad.T @ x.detach().double(), dtype)
    without, dx, dweight = operators.linear_cross_entropy(x.detach(), weight.detach(), targets, chunk_rows, False)
    assert abs(without.item() - loss.item()) < 1e-6 * expected.item()
    assert dx.numel() == dweight.numel() == 0
    for bad_target in (-100, -1, vocab_size, 2**40):  # not ignored: the ignored one is another
        wrong = targets.clone()
        wrong[rows // 2] = bad_target
        arguments = x.detach(), weight.detach(), wrong, chunk_rows, False, -101
        assert operators.linear_cross_entropy(*arguments)[0].isnan()
    x.detach()[rows // 2, 0] = math.nan
    assert operators.linear_cross_entropy(x.detach(), weight.detach(), targets, chunk_rows, False)[0].isnan()


def check_ignored_targets(
    rows: int, vocab_size: int, chunk_rows: int, ignore_index: int, dtype: torch.dtype, device: str
) -> None:
    """Rows that are ignored, against the oracle on the other rows; of several chunks the last has only ignored ones."""
    torch.manual_seed(rows)
    x = torch.randn(rows, 32, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, 32, device=device) / 3).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), device=device)
    targets[targets == ignore_index] += 1
    targets[::3] = ignore_index
    if chunk_rows < rows:
        targets[(rows - 1) // chunk_rows * chunk_rows :] = ignore_index
    with poisoned():
        loss = operators.linear_cross_entropy(x, weight, targets, chunk_rows, True, ignore_index)[0]
        (3 * loss).backward()
    logits = (x.detach() @ weight.detach().T).double().requires_grad_()
    counted = targets != ignore_index
    expected = functional.cross_entropy(logits[counted], targets[counted])
    (3 * expected).backward()
    assert logits.grad is not None
    assert x.grad is not None
    assert weight.grad is not None
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    assert_close(x.grad, logits.grad @ weight.detach().double(), dtype)
    assert (x.grad[~counted] == 0).all()
    assert_close(weight.grad, logits.grad.T @ x.detach().double(), dtype)
    # A given number of targets divides the sum instead of their own.
    x.grad = weight.grad = None
    num_targets = torch.tensor(2.5 * rows, device=device)
    scaled = operators.linear_cross_entropy(x, weight, targets, chunk_rows, True, ignore_index, num_targets)[0]
    scaled.backward()
    assert x.grad is not None
    share = counted.sum().item() / num_targets.item()
    assert abs(scaled.item() - expected.item() * share) < 1e-5 * expected.item()
    assert_close(x.grad, logits.grad @ weight.detach().double() * share / 3, dtype)
    none = torch.full_like(targets, ignore_index)
    assert operators.linear_cross_entropy(x.detach(), weight.detach(), none, chunk_rows, True, ignore_index)[0].isnan()


def check_adamw(sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
    """Against PyTorch's AdamW, over some steps with a clipping factor; a NaN factor changes nothing.

    Gradients in half precision are those of half-precision copies, which the kernel updates too.
    """
    torch.manual_seed(0)
    parameters = [torch.randn(size, device=device) for size in sizes]
    theirs = [torch.nn.Parameter(parameter.clone()) for parameter in parameters]
    rates = [0.01 * (i + 1) for i in range(len(sizes))]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(theirs, rates, strict=True)]
    peer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    firsts, seconds = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    copies = [] if dtype == torch.float32 else [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters]
    for step in range(1, 6):
        gradients = [torch.randn(size, device=device).to(dtype) for size in sizes]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.float() * 0.5
        peer.step()
        corrections = 1 - 0.9**step, 1 - 0.95**step
        scalars = torch.tensor([[rate, 0.5, *corrections, rate * 0.1] for rate in rates], device=device)
        step_parameters(parameters, gradients, firsts, seconds, copies, scalars, 0.9, 0.95, 1e-8)
        for half, parameter in zip(copies, parameters, strict=False):
            assert_close(half, parameter, dtype)
            assert INTERPRETED or torch.equal(half, parameter.to(dtype))
        for ours, parameter in zip(parameters, theirs, strict=True):
            # A few rounding errors of numbers up to 5.
            assert (ours - parameter).abs().max() < 3e-6
    everything = (*parameters, *firsts, *seconds, *copies)
    before = [tensor.clone() for tensor in everything]
    scalars[:, 1] = math.nan
    step_parameters(parameters, gradients, firsts, seconds, copies, scalars, 0.9, 0.95, 1e-8)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


def check_symmetric_product(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Also of the transposed matrices, which are not contiguous, and the polynomial; the results are symmetric."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype)
    # Numpy's product of a tile and its transpose is not symmetric on every processor; below the tile is a mirror image.
    mirrored = (..., slice(muon._TILE, None), slice(muon._TILE)) if INTERPRETED else ...
    for matrices in (x, x.mT):
        wide = matrices.double()
        with poisoned():
            products = muon.symmetric_product(matrices)
            polynomial = muon.symmetric_product(products, (3.0, -2.0, 0.5))
            scales = torch.rand(len(x), device=device) / 4
            scaled = muon.symmetric_product(products, (3.0, -2.0, 0.5), scales)
        assert_close(products, wide @ wide.mT, dtype)
        for result in (products, scaled):
            assert torch.equal(result[mirrored], result.mT[mirrored])
        with dispatch.use_operators(None):
            assert_close(polynomial, dispatch.symmetric_product(products.double(), (3.0, -2.0, 0.5)), dtype)
            expected = dispatch.symmetric_product(products.double(), (3.0, -2.0, 0.5), scales)
        assert_close(scaled, expected, dtype)


def check_muon(shape: tuple[int, int], count: int, dtype: torch.dtype, device: str) -> None:
    """Both passes against their plain forms, also with all scales, and after a gradient that is not finite."""
    torch.manual_seed(0)
    gradients, momenta, weights = ([torch.randn(shape, device=device) for _ in range(count)] for _ in range(3))
    gradients = [gradient.to(dtype) for gradient in gradients]
    copies = [] if dtype == torch.float32 else [torch.zeros(shape, device=device, dtype=dtype) for _ in range(count)]
    for weight, keep in ((0.3, 0.9), (0.0, 1.0)):
        if weight == 0:
            gradients[0][0, 0] = math.nan
        arguments = torch.tensor(weight, device=device), torch.tensor(keep, device=device), torch.float32
        expected_momenta = [momentum.clone() for momentum in momenta]
        expected = plain_muon.step_momenta(gradients, expected_momenta, *arguments)
        with poisoned():
            directions = muon.step_momenta(gradients, momenta, *arguments)
        torch.testing.assert_close(directions, expected)
        torch.testing.assert_close(momenta, expected_momenta)
    rates = torch.tensor(0.1, device=device), torch.tensor(0.03, device=device)
    for axis, cautious in ((None, True), (0, True), (1, False)):
        scales = None if axis is None else torch.rand(count, shape[axis], device=device)
        expected_weights = [weight.clone() for weight in weights]
        arguments = directions.to(dtype), scales, axis or 0, *rates
        plain_muon.step_weights(expected_weights, [], *arguments, cautious=cautious)
        muon.step_weights(weights, copies, *arguments, cautious=cautious)
        torch.testing.assert_close(weights, expected_weights)
        for weight, low in zip(weights, copies, strict=False):
            assert_close(low, weight, dtype)
            assert INTERPRETED or torch.equal(low, weight.to(dtype))


def check_registrations(dtype: torch.dtype, device: str) -> None:
    """Fake versions, autograd and schemas, which torch.compile relies on."""
    cos, sin = functional.rope_tables(1e4, 16, 20, dtype=torch.float32, device=device)
    features = torch.randn(2, 17, 24, device=device).to(dtype).requires_grad_()
    weight_qkv = torch.randn(96, 24, device=device).to(dtype).requires_grad_()
    x = torch.randn(6, 32, device=device).to(dtype).requires_grad_()
    weight = torch.randn(11, 32, device=device).to(dtype).requires_grad_()
    weight2 = torch.randn(11, 16, device=device).to(dtype).requires_grad_()
    targets = torch.randint(11, (6,), device=device)
    attention = features, weight_qkv, cos, sin, 2, 2
    output, log_sums, qkv = (tensor.detach() for tensor in operators.rotary_attention(*attention))
    saved = features.detach(), weight_qkv.detach(), qkv, cos, sin, output, log_sums
    cases = [
        (operators.rotary_attention, attention),
        (operators.rotary_attention, (qkv.flatten(2).requires_grad_(), None, *attention[2:], 5)),
        (operators.rotary_attention_backward, (*saved, output)),
        (operators.rotary_attention_backward, (None, None, *saved[2:], output, 5)),
        (operators.swiglu_linear, (x, weight2)),
        (operators.swiglu_linear_backward, (x.detach(), weight2.detach(), x.detach()[:, :11])),
        (operators.linear_cross_entropy, (x, weight, targets, 4, True)),
    ]
    for operator, arguments in cases:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@torch.no_grad()
def check_decoder_finds_nan(dtype: torch.dtype, device: str, **options: Any) -> None:
    """The second sequence gets a NaN logit among those that are chosen from: it must not become a token."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=37, context_length=12, d_model=48, num_layers=1, num_heads=3, d_ff=60)
    model = TransformerLM(config).to(device)
    model.activation_dtype = dtype
    model.token_embeddings.weight.data[7] = math.nan
    tokens = torch.tensor([[1], [7]], device=device)
    cache = KVCache(config, 2, dtype=dtype, device=device)
    decoder = GpuDecoder(model, cache, torch.ones(2, dtype=torch.int64, device=device), 6, **options)
    decoder.start(tokens)
    for _ in range(3):
        decoder.step()
    assert (decoder.tokens[0, 1:4] >= 0).all()
    assert decoder.tokens[1, 1] == NO_TOKEN


@torch.no_grad()
def check_decoder(
    config: ModelConfig, prompt_lengths: list[int], steps: int, dtype: torch.dtype, device: str, **options: Any
) -> None:
    """The logits of a prompt and of steps against those of full forward passes, and the chosen ids."""
    torch.manual_seed(0)
    model = TransformerLM(config).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight", "value_gate.weight")):
            parameter.add_(torch.randn_like(parameter) / 2)
    model.activation_dtype = dtype
    batch_size, shortest, longest = len(prompt_lengths), min(prompt_lengths), max(prompt_lengths)
    tokens = torch.randint(config.vocab_size, (batch_size, longest), device=device)
    cache = KVCache(config, batch_size, dtype=dtype, device=device)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    num_choices = config.vocab_size - 5
    decoder = GpuDecoder(model, cache, torch.tensor(prompt_lengths, device=device), num_choices, **options)
    if shortest > 1:
        logits = decoder.read_prompt(tokens[:, : shortest - 1])
        error = relative_error(logits, model(tokens[:, : shortest - 1])[:, -1])
        assert error < 2 * TOLERANCES[dtype], f"relative error {error} of the prompt"
    decoder.start(tokens)
    for length in range(shortest, shortest + steps):
        decoder.step()
        expected = model(decoder.tokens[:, :length])[:, -1]
        error = relative_error(decoder.logits, expected)
        assert error < 2 * TOLERANCES[dtype], f"relative error {error} after {length} tokens"
        for row, prompt_length in enumerate(prompt_lengths):
            chosen = decoder.logits[row, :num_choices].argmax()
            assert decoder.tokens[row, length] == (tokens[row, length] if length < prompt_length else chosen)
    assert cache.length == shortest - 1 + steps
    assert (decoder.num_finished == 0).all()


@torch.no_grad()
def check_restarted_decoder(config: ModelConfig, dtype: torch.dtype, device: str, **options: Any) -> None:
    """Prompts and steps after them, each time with other weights; on a GPU, later prompts replay graphs."""
    torch.manual_seed(0)
    model = TransformerLM(config).to(device)
    model.activation_dtype = dtype
    cache = KVCache(config, 2, dtype=dtype, device=device)
    decoder = GpuDecoder(model, cache, torch.tensor([9, 9], device=device), **options)
    tolerance = 2 * TOLERANCES[dtype]
    for length in (7, 5, 8, 6):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() / 2)
        assert decoder.restart(model, KVCache(config, 2, dtype=dtype, device=device), torch.tensor([length] * 2), None)
        tokens = torch.randint(config.vocab_size, (2, length), device=device)
        assert relative_error(decoder.read_prompt(tokens[:, :-1]), model(tokens[:, :-1])[:, -1]) < tolerance
        decoder.start(tokens)
        decoder.step()
        assert relative_error(decoder.logits, model(tokens)[:, -1]) < tolerance
    assert not decoder.restart(model, KVCache(config, 1, dtype=dtype, device=device), torch.tensor([3]), None)
    assert not decoder.restart(model, cache, torch.tensor([3, 3]), config.vocab_size - 1)
