"""A tiny model, and the comparison with the same computation in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from basic.model import ModelConfig, TransformerLM
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe

Module = TypeVar("Module", bound=torch.nn.Module)

# Every result is compared with the same computation in float64 on the same inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_leading = pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)], ids=str)


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal in shape, of this dtype, and within its tolerance of the float64 result."""
    assert actual.dtype == dtype
    assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def float64(dtype: torch.dtype, *shapes: tuple[int, ...], scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """For each shape, normally distributed numbers of this dtype, and the same numbers in float64."""
    tensors = [(scale * torch.randn(shape)).to(dtype) for shape in shapes]
    return [(tensor, tensor.double()) for tensor in tensors]


def tiny(**changes: Any) -> ModelConfig:
    """A small model; keyword arguments change its configuration."""
    sizes: dict[str, Any] = dict(vocab_size=11, context_length=10, d_model=16, num_layers=2, num_heads=2, d_ff=24)
    return ModelConfig(**{**sizes, **changes})


def with_random_weights(module: Module) -> Module:
    """Draw every parameter anew, large enough for every layer to affect the output; vectors around 0.5."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    return module


def set_gradients(*lists: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    """Set the same random gradients in each list of parameters."""
    for same in zip(*lists, strict=True):
        gradient = scale * torch.randn_like(same[0])
        for parameter in same:
            parameter.grad = gradient.clone()


def decided_model(seed: int, **changes: Any) -> TransformerLM:
    """A tiny model whose output layer is larger than at the start of training, so that the likeliest id changes."""
    torch.manual_seed(seed)
    model = TransformerLM(tiny(**changes)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def small_tokenizer(folder: Path, special_tokens: list[str]) -> Tokenizer:
    """A tokenizer of at most 300 tokens, trained on a file in this folder."""
    path = folder / "text.txt"
    path.write_text("the cat sees the dog. the dog sees a café, 12 cats and nobody's hat.\n\n" * 5)
    return Tokenizer(*train_bpe(path, 300, special_tokens), special_tokens)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as multiplication by complex numbers, in float64."""
    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angles = positions[..., None].double() * frequencies
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def self_attention(x: Tensor, projections: list[Tensor], num_heads: int, rotate: Any = lambda q: q) -> Tensor:
    """Causal self-attention of torch's functions; `rotate` is applied to queries and keys (..., head, seq, d)."""
    q, k, v = (F.linear(x, w).unflatten(-1, (num_heads, -1)).transpose(-2, -3) for w in projections[:3])
    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return F.linear(out.transpose(-2, -3).flatten(-2), projections[3])


@cache
def transformers() -> Any:
    """Imported by the first test that compares with it: every process collects all tests, and it takes seconds."""
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    return transformers
