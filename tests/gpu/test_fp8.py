"""Training in fp8 on a GPU that multiplies in 8 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("needs a GPU that multiplies in 8 bits", allow_module_level=True)

from basic.model import ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from tests.helpers import fp8_checks

CUDA = torch.device("cuda")
SIZES: dict[str, Any] = {"vocab_size": 512, "context_length": 256, "d_model": 256, "num_layers": 3, "num_heads": 4}


@pytest.mark.parametrize("shape", [(3, 7), (2048, 768), (4100, 520)])
def test_quantizing(shape):
    fp8_checks.check_quantizing(shape, "cuda")


@pytest.mark.parametrize(("tokens", "d_in", "d_outs"), [(32, 16, (16,)), (4096, 768, (768, 256, 256))])
def test_linear(tokens, d_in, d_outs):
    fp8_checks.check_linear(tokens, d_in, d_outs, "cuda")


def test_swiglu():
    fp8_checks.check_swiglu(2048, 256, 688, "cuda")


def test_unusual_tensors_are_named():
    fp8_checks.check_unusual_tensors_are_named("cuda")


def losses(precision: Any, steps: int = 30, changes: dict[str, Any] | None = None, **settings: Any) -> list[float]:
    """Of training on one sequence of repeated words, which is learned within some steps."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES | (changes or {}))).to(CUDA)
    model.activation_dtype = torch.bfloat16
    config = TrainConfig(steps=steps, batch_size=8, precision=precision, **settings)
    model.configure_training(config.dropout, config.activation_checkpointing)
    starts = (torch.arange(256, device=CUDA) // 100 * 100).expand(8, 256).contiguous()
    of_documents = (torch.full((), 8 * 256.0, device=CUDA), starts) if config.rows == "packed" else ()
    step = TrainStep(model, make_optimizer(model, config), config, CUDA)
    ids = torch.randint(512, (steps, 8, 32), device=CUDA).repeat(1, 1, 9)[:, :, :257]
    result = [
        step((batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), *of_documents), 1e-3)[0].item() for batch in ids
    ]
    assert (step.graph is not None) == (config.gradient_accumulation == 1)
    return result


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"compile": True}, {}),
        ({"optimizer": "muon"}, {"ffn": "relu2", "qk_norm": True, "num_kv_heads": 2}),
        ({"gradient_accumulation": 2}, {"norm": "post", "ffn": "silu"}),
        ({"activation_checkpointing": True}, {"tied_embeddings": True, "value_embeddings": True}),
        ({"rows": "packed"}, {"sliding_window": 64, "qkv_bias": True, "qk_norm": "all_heads"}),
        ({}, {"norm": "sublayer", "positions": "none", "head_dim": 32, "embedding_norm": True}),
        ({"dropout": 0.1}, {"zero_outputs": True}),
    ],
)
def test_losses_are_near_those_of_bfloat16(settings, changes):
    low, usual = losses("fp8", changes=changes, **settings), losses("bfloat16", changes=changes, **settings)
    print(low[-1], usual[-1])
    assert low != usual
    assert low == pytest.approx(usual, rel=2e-2)
    assert all(map(math.isfinite, low))
