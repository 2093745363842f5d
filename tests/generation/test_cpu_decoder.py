"""The decoder for a CPU against the model itself in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from basic.generation.cpu_decoder import make_cpu_decoder
from basic.model import KVCache, ModelConfig, TransformerLM
from basic.transformer.kernels import dispatch

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


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.inference_mode()
def test_logits_of_each_token(variant: dict[str, Any], batch_size: int):
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**(SHAPE | variant)))
    for parameter in model.parameters():  # biases and gates are 0 at the start
        parameter += 0.1 * torch.randn_like(parameter)
    exact = TransformerLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    ids, cache = torch.randint(50, (batch_size, 40)), KVCache(model.config, batch_size)
    decoder = make_cpu_decoder(model, cache)
    assert decoder is not None
    model(ids[:, :5], cache)
    cache.advance(5)
    expected = exact(ids)
    for position in range(5, 40):
        logits = decoder.logits(ids[:, position])
        cache.advance(1)
        torch.testing.assert_close(logits.double(), expected[:, position], rtol=1e-4, atol=1e-5)


def test_other_models_have_no_decoder():
    def has_decoder(model: TransformerLM) -> bool:
        return make_cpu_decoder(model, KVCache(model.config, 1, dtype=model.compute_dtype)) is not None

    model = TransformerLM(ModelConfig(**SHAPE))
    assert not has_decoder(model.bfloat16())
    assert has_decoder(model.float())
    with dispatch.use_operators(None):
        assert not has_decoder(model)
    handle = model.ln_final.register_forward_hook(lambda module, inputs, output: None)
    assert not has_decoder(model)
    handle.remove()
    model.lm_head = torch.nn.Linear(32, 50, bias=False)  # ty: ignore[invalid-assignment]
    assert not has_decoder(model)
