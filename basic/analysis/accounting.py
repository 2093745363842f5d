"""What a Transformer costs: formulas for parameters, matrix products, activations and AdamW, and GPT-2's numbers.

Each formula is written once, as a product of sizes ("3 L d F"), and serves both ways: a page can print it, and
`amounts` computes it. The letters are

    B sequences in a batch    L layers      F features in the feed-forward layer (d_ff)
    T tokens in a sequence    h heads       V token ids (vocab_size)
    d features (d_model)      k = d / h

They describe the architecture of the handout: norms before the sublayers, SwiGLU, no tied embeddings.

What training costs a token, and what a GPU can do at most, is for any architecture: `training_flops_a_token`,
`peak_bf16_flops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from basic.model import ModelConfig, TransformerLM

Rows = list[dict[str, str | int | float]]

GPT2_SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "XL": (48, 1600, 25)}
"""Layers, d_model and heads of the four models called GPT-2."""

PARAMETERS = {
    "token embeddings": "V d",
    "attention: Q, K, V, output": "4 L d d",
    "feed-forward: W1, W2, W3": "3 L d F",
    "norms of the blocks": "2 L d",
    "final norm": "d",
    "output embedding": "V d",
}

ACTIVATIONS = {
    "norms of the blocks": "2 L B T d",
    "Q, K, V projections": "3 L B T d",
    "Q K^T": "L B h T T",
    "softmax": "L B h T T",
    "weighted sum of V": "L B T d",
    "output projection": "L B T d",
    "W1": "L B T F",
    "SiLU": "L B T F",
    "W3": "L B T F",
    "product of the two": "L B T F",
    "W2": "L B T d",
    "final norm": "B T d",
    "output embedding": "B T V",
    "cross-entropy": "B T V",
}
"""Numbers that a forward pass leaves for the backward pass, one tensor an operation. The cross-entropy's result is
one number, but its gradient needs the probability of every token."""

ADAMW_FLOPS_PER_PARAMETER = {
    "weight decay: p *= 1 - lr * decay": 1,
    "first moment: m = beta1 * m + (1 - beta1) * g": 3,
    "second moment: v = beta2 * v + (1 - beta2) * g * g": 4,
    "denominator: sqrt(v) / correction + eps": 3,
    "step: p -= rate * m / denominator": 3,
}
"""Operations on each parameter; those on the few numbers that a whole step shares are nothing beside them."""


class Product(NamedTuple):
    """A product of matrices (rows x inner) and (inner x columns) that a sequence needs `times` over."""

    times: str
    rows: str
    inner: str
    columns: str

    @property
    def flops(self) -> str:
        """A multiplication and an addition for each row, column and inner element, for a batch."""
        return f"2 B {self.times} {self.rows} {self.inner} {self.columns}"


PRODUCTS = {
    "Q, K, V projections": Product("3 L", "T", "d", "d"),
    "Q K^T": Product("h L", "T", "k", "T"),
    "weighted sum of V": Product("h L", "T", "T", "k"),
    "output projection": Product("L", "T", "d", "d"),
    "W1 and W3": Product("2 L", "T", "d", "F"),
    "W2": Product("L", "T", "F", "d"),
    "output embedding": Product("1", "T", "d", "V"),
}
"""Every product of matrices in a forward pass."""


def gpt2_config(size: str, context_length: int = 1024) -> ModelConfig:
    """One of the `GPT2_SIZES` in the handout's architecture: its d_ff is ModelConfig's default."""
    num_layers, d_model, num_heads = GPT2_SIZES[size]
    return ModelConfig(
        vocab_size=50_257,
        context_length=context_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
    )


def amount(formula: str, config: ModelConfig, batch_size: int = 1) -> int:
    """The value of a product of sizes for sequences as long as the context: `amount("2 L d", config)`.

    Args:
        formula: numbers and the letters above, with spaces between.
        config: an architecture that the formulas describe.
        batch_size: B.

    Raises:
        ValueError: the configuration is another architecture.
    """
    described = {"norm": "pre", "ffn": "swiglu", "tied_embeddings": False, "kv_heads": config.num_heads}
    for name, wanted in described.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"the formulas describe a model with {name}={wanted!r}, got {getattr(config, name)!r}; "
                "count that of TransformerLM itself instead"
            )
    assert config.d_ff is not None  # ModelConfig fills it in
    sizes = {
        "B": batch_size,
        "T": config.context_length,
        "L": config.num_layers,
        "d": config.d_model,
        "h": config.num_heads,
        "k": config.d_head,
        "F": config.d_ff,
        "V": config.vocab_size,
    }
    return prod(sizes[factor] if factor in sizes else int(factor) for factor in formula.split())


def amounts(formulas: Mapping[str, str], config: ModelConfig, batch_size: int = 1) -> dict[str, int]:
    """The value of each formula of a table: numbers for PARAMETERS and ACTIVATIONS."""
    return {item: amount(formula, config, batch_size) for item, formula in formulas.items()}


def num_parameters(config: ModelConfig) -> int:
    """Numbers that training changes."""
    return sum(amounts(PARAMETERS, config).values())


def forward_flops(config: ModelConfig, batch_size: int = 1) -> dict[str, int]:
    """Floating-point operations of each matrix product in a forward pass over whole contexts."""
    return amounts({item: product.flops for item, product in PRODUCTS.items()}, config, batch_size)


def training_memory_bytes(config: ModelConfig, batch_size: int) -> dict[str, int]:
    """Peak memory of training with AdamW, everything in float32 (4 bytes).

    The peak is at the end of a forward pass whose activations are all alive while the optimizer's state is there;
    the gradients count too, since the backward pass makes them before the activations are gone.
    """
    parameters = num_parameters(config)
    activations = sum(amounts(ACTIVATIONS, config, batch_size).values())
    numbers = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": 2 * parameters,
        "activations": activations,
    }
    return {item: 4 * number for item, number in numbers.items()}


def adamw_flops(num_parameters: int) -> int:
    """Floating-point operations of one AdamW step; a square root counts as one."""
    return sum(ADAMW_FLOPS_PER_PARAMETER.values()) * num_parameters


def training_flops(config: ModelConfig, batch_size: int) -> int:
    """Floating-point operations of a training step: forward, backward (twice the forward) and AdamW."""
    return 3 * sum(forward_flops(config, batch_size).values()) + adamw_flops(num_parameters(config))


# --- GPT-2's numbers, as tables to print ---------------------------------------------------------------------


def formula_rows(formulas: Mapping[str, str], config: ModelConfig) -> Rows:
    """Items, formulas and their values for one sequence."""
    return [
        {"": item, "formula": formulas[item], "numbers": number} for item, number in amounts(formulas, config).items()
    ]


def product_rows(config: ModelConfig) -> Rows:
    """The matrix products of a forward pass over one sequence."""
    rows: Rows = []
    for item, product in PRODUCTS.items():
        height, inner, width = (amount(size, config) for size in (product.rows, product.inner, product.columns))
        rows.append(
            {
                "product": item,
                "times": amount(product.times, config),
                "matrices": f"({height} x {inner}) ({inner} x {width})",
                "FLOPs": amount(product.flops, config),
            }
        )
    return rows


def gpt2_forward() -> dict[str, int | float | Rows]:
    """Parameters and memory of GPT-2 XL, and the FLOPs of a forward pass of each size and of XL with a long context."""
    models = {size: gpt2_config(size) for size in GPT2_SIZES}
    xl, long = models["XL"], "XL, 16,384"
    models[long] = gpt2_config("XL", context_length=16_384)
    with torch.device("meta"):  # shapes without numbers
        parameters = TransformerLM(xl).num_parameters
    flops = {name: forward_flops(config) for name, config in models.items()}
    totals = {name: sum(products.values()) for name, products in flops.items()}
    return {
        "parameters of XL": parameters,
        "in fp32, GB": 4 * parameters / 1e9,
        "FLOPs of a forward pass of XL": totals["XL"],
        "context 16,384: times as many": totals[long] / totals["XL"],
        "parameters of XL by part": formula_rows(PARAMETERS, xl),
        "matrix products of XL, context 1,024": product_rows(xl),
        "models": [
            {"model": name, "d_ff": amount("F", config), "TFLOPs a forward pass": totals[name] / 1e12}
            for name, config in models.items()
        ],
        "share of each product, %": [
            {"product": item} | {name: 100 * flops[name][item] / totals[name] for name in models} for item in PRODUCTS
        ],
    }


def gpt2_training() -> dict[str, str | int | float | Rows]:
    """Memory and time of training GPT-2 XL with AdamW: 400,000 steps of 1,024 sequences on an H100 at half speed."""
    xl = gpt2_config("XL")
    memory = training_memory_bytes(xl, batch_size=1)
    a = memory.pop("activations")
    b = sum(memory.values())
    hours = 400_000 * training_flops(xl, batch_size=1024) / (0.5 * 495e12) / 3600
    formulas = {"parameters": "P", "gradients": "P", "optimizer state": "2 P"}
    return {
        "P": " + ".join(PARAMETERS.values()),
        "XL, GB": f"{a / 1e9:.2f} * batch + {b / 1e9:.2f}",
        "largest batch in 80 GB": int((80e9 - b) // a),
        "FLOPs of one AdamW step, XL": adamw_flops(num_parameters(xl)),
        "400,000 steps of 1,024, hours": hours,
        "the same in days": hours / 24,
        "what stays, in numbers of 4 bytes": [
            {"": item, "formula": formulas[item], "numbers": size_bytes // 4} for item, size_bytes in memory.items()
        ],
        "activations, in numbers of 4 bytes (B = 1)": formula_rows(ACTIVATIONS, xl),
        "AdamW, FLOPs a parameter": [
            {"part": part, "FLOPs": flops} for part, flops in ADAMW_FLOPS_PER_PARAMETER.items()
        ],
    }
