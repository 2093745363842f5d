"""The decoder for a CPU against the model itself in float64, and its weights of 16 bits against those of 32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from basic.generation import cpu_decoder
from basic.generation.continuation import generate
from basic.generation.cpu_decoder import CpuDecoder, make_cpu_decoder
from basic.model import ModelConfig, TransformerLM
from basic.transformer.cpu import decode_kernels
from basic.transformer.kernels import dispatch
from basic.transformer.layers import Linear, SwiGLU

SHAPE: dict[str, Any] = {"vocab_size": 50, "context_length": 40, "d_model": 32, "num_layers": 2, "num_heads": 4}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "tied_embeddings": True},
    {"num_kv_heads": 1, "sliding_window": 7, "head_dim": 20},
    {"positions": "none", "norm": "none", "ffn": "silu"},
    {"norm": "post", "qkv_bias": True, "num_kv_heads": 2},
    {"norm": "sublayer", "qk_norm": "all_heads"},
    {"qk_norm": True, "num_kv_heads": 2, "ffn": "relu2", "embedding_norm": True, "value_embeddings": True},
]


def changed_model(variant: dict[str, Any]) -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**(SHAPE | variant)))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gates are 0 at the start
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.inference_mode()
def decoded(model: TransformerLM, ids: Tensor, first: int) -> tuple[Tensor, CpuDecoder]:
    """The logits after the first ids, read in one pass, and after each of the others."""
    decoder = make_cpu_decoder(model, len(ids))
    assert decoder is not None
    logits = []
    for stop in range(first, ids.shape[1] + 1):
        logits.append(decoder.read(ids[:, :stop]).clone())
    return torch.stack(logits, 1), decoder


@pytest.mark.parametrize(("batch_size", "first"), [(1, 1), (3, 5), (1, 30), (20, 5)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_of_each_token(variant: dict[str, Any], batch_size: int, first: int):
    model = changed_model(variant)
    ids = torch.randint(50, (batch_size, 40))
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(ids)
    logits, _ = decoded(model, ids, first)
    torch.testing.assert_close(logits.double(), expected[:, first - 1 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 20])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_model_with_bfloat16_activations_is_decoded_in_float32(variant: dict[str, Any], batch_size: int):
    model, ids = changed_model(variant), torch.randint(50, (batch_size, 12))
    expected, _ = decoded(model, ids, 2)
    model.activation_dtype = torch.bfloat16
    assert torch.equal(decoded(model, ids, 2)[0], expected)
    assert model.activation_dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weights_of_16_bits_change_nothing(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = changed_model(variant).bfloat16().float()
    ids = torch.randint(50, (2, 20))
    _, short = decoded(model, ids[:, :4], 1)  # too few passes for a copy
    assert not short._matrices
    narrow, decoder = decoded(model, ids, 1)
    assert len(decoder._matrices) == 9  # four for each block, and the output layer
    monkeypatch.setattr(cpu_decoder, "_PASSES_BEFORE_COPY", 1000)
    wide, _ = decoded(model, ids, 1)
    assert torch.equal(narrow, wide)
    assert torch.equal(narrow, decoded(model.bfloat16(), ids, 1)[0])  # its own weights are as many bits


def test_a_matrix_that_needs_32_bits_keeps_them():
    model = changed_model({}).bfloat16().float()
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.w3.weight")[-1, -1] = 1 + 2**-12
    ids = torch.randint(50, (1, 12))
    logits, decoder = decoded(model, ids, 1)
    assert len(decoder._matrices) == 8
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-5)


def test_a_layer_of_two_blocks_is_copied_with_the_other_layers_of_each():
    model = changed_model({}).bfloat16().float()
    blocks: Any = model.layers
    blocks[1].attn.q_proj, blocks[1].ffn.w1 = blocks[0].attn.q_proj, blocks[0].ffn.w1
    ids = torch.randint(50, (1, 12))
    logits, decoder = decoded(model, ids, 1)
    assert len(decoder._matrices) == 9
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-5)


def test_a_second_call_uses_the_weights_of_then():
    model = changed_model({"tied_embeddings": True}).bfloat16().float()
    first = generate(model, [[1, 2, 3]], 20, temperature=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    second = generate(model, [[1, 2, 3]], 20, temperature=0.0)
    assert second == generate(model, [[1, 2, 3]], 20, temperature=0.0, use_cache=False) != first


def test_a_bfloat16_model_is_closer_to_its_weights_than_its_own_activations():
    model = changed_model({"qkv_bias": True, "num_kv_heads": 2}).bfloat16()
    ids = torch.randint(50, (3, 40))
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(ids)
        own_error = (model(ids) - expected)[:, 29:].abs().max()
    for first in (1, 30):  # so many tokens of a prompt are read by the modules
        logits, decoder = decoded(model, ids, first)
        assert logits.dtype == decoder.cache.keys.dtype == torch.float32
        assert (logits - expected[:, first - 1 :]).abs().max() < own_error / 100


def test_a_bfloat16_model_continues_as_its_weights_in_float32():
    model = changed_model({"num_kv_heads": 2}).bfloat16()
    for prompts in ([[1, 2, 3], list(range(30))], [list(range(i, i + 30)) for i in range(3)]):
        made = generate(model, prompts, 60, temperature=0.0)
        assert made == generate(copy.deepcopy(model).float(), prompts, 60, temperature=0.0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_default_dtype_of_torch_changes_nothing(variant: dict[str, Any]):
    model = changed_model(variant)
    expected = generate(model, [[1, 2], [3]], 8, temperature=0.0, log_probabilities=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert generate(model, [[1, 2], [3]], 8, temperature=0.0, log_probabilities=True) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_many_sequences_of_a_bfloat16_model_are_multiplied_by_the_blas():
    """From weights that are widened in parts, here of 600 rows; the same weights in 32 bits give the same sums but for
    their order."""
    model = changed_model({"vocab_size": 600, "tied_embeddings": True}).bfloat16()
    ids = torch.randint(50, (30, 12))
    narrow, wide = (decoded(each, ids, 5)[0] for each in (model, copy.deepcopy(model).float()))
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, (5,)), (3, 31, (40, 3)), (6, 100, (17, 1, 64))])
def test_multiply(rows: int, width: int, outputs: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    weights = tuple(torch.randn(count, width).to(dtype) for count in outputs)
    x, start = torch.randn(rows, width), torch.randn(rows, sum(outputs))
    product = x.double() @ torch.cat(weights).double().T
    for num_threads in (1, 2):
        for add in (0, 1):
            y = start.clone()
            decode_kernels.multiply(np.zeros(1, np.int64), x, weights, 16, add, y, num_threads=num_threads)
            torch.testing.assert_close(y.double(), product + add * start, rtol=1e-5, atol=1e-5)


def test_other_models_have_no_decoder():
    def has_decoder(model: TransformerLM) -> bool:
        return make_cpu_decoder(model, 1) is not None

    model = TransformerLM(ModelConfig(**SHAPE))
    assert not has_decoder(model.half())
    assert not has_decoder(model.double())
    assert has_decoder(model.bfloat16())
    assert has_decoder(model.float())
    model.activation_dtype = torch.float16
    assert not has_decoder(model)
    model.activation_dtype = None
    model.ln_final.bfloat16()
    assert not has_decoder(model)
    model.float()
    with dispatch.use_operators(None):
        assert not has_decoder(model)
    handle = model.ln_final.register_forward_hook(lambda module, inputs, output: None)
    assert not has_decoder(model)
    handle.remove()
    model.lm_head = torch.nn.Linear(32, 50, bias=False)  # ty: ignore[invalid-assignment]
    assert not has_decoder(model)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ffn", SwiGLU(32, 200)),
        ("ffn.w1", Linear(32, 64, bias=True)),
        ("ffn.compute", lambda x, *weights: x),
        ("attn.output_proj.multiply", lambda x, weight: x),
        ("norm", "post"),
    ],
)
def test_a_model_with_a_changed_block_has_no_decoder(name: str, changed: Any):
    model = changed_model({})
    owner, _, attribute = f"layers.1.{name}".rpartition(".")
    setattr(model.get_submodule(owner), attribute, changed)
    assert make_cpu_decoder(model, 1) is None
