"""Parameters, FLOPs and memory of a Transformer and of AdamW, as formulas, and their values for GPT-2.

Each formula is a string of factors ("3 L d F"), so that it can be printed and evaluated. The letters are

    B sequences in a batch    L layers      F features in the feed-forward layer (d_ff)
    T tokens in a sequence    h heads       V token ids (vocab_size)
    d features (d_model)      k = d / h

The formulas hold for the architecture of the assignment: pre-norm, SwiGLU, untied embeddings, no grouped queries, and
none of the additions of other models (biases, QK-norm, a sliding window).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from basic.common.errors import InvalidInputError
from basic.model import ModelConfig, TransformerLM

TableRows = list[dict[str, str | int | float]]

GPT2_SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "XL": (48, 1600, 25)}
"""(num_layers, d_model, num_heads) of the four GPT-2 models."""

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
    "elementwise product": "L B T F",
    "W2": "L B T d",
    "final norm": "B T d",
    "output embedding": "B T V",
    "cross-entropy": "B T V",
}
"""Elements of the activations that a forward pass keeps for the backward pass, one tensor per operation. The
cross-entropy returns a scalar, but its gradient needs the probability of every token."""

ADAMW_FLOPS_PER_PARAMETER = {
    "weight decay: p *= 1 - lr * decay": 1,
    "first moment: m = beta1 * m + (1 - beta1) * g": 3,
    "second moment: v = beta2 * v + (1 - beta2) * g * g": 4,
    "denominator: sqrt(v) / correction + eps": 3,
    "step: p -= rate * m / denominator": 3,
}
"""Operations per parameter. The few scalar operations of a step are negligible."""


class MatrixMultiplication(NamedTuple):
    """A GEMM of (rows x inner) and (inner x columns) that runs `count` times per sequence; all fields are formulas."""

    count: str
    rows: str
    inner: str
    columns: str

    @property
    def flops(self) -> str:
        """FLOPs for a batch: a multiplication and an addition for each (row, inner, column)."""
        return f"2 B {self.count} {self.rows} {self.inner} {self.columns}"


MATRIX_MULTIPLICATIONS = {
    "Q, K, V projections": MatrixMultiplication("3 L", "T", "d", "d"),
    "Q K^T": MatrixMultiplication("h L", "T", "k", "T"),
    "weighted sum of V": MatrixMultiplication("h L", "T", "T", "k"),
    "output projection": MatrixMultiplication("L", "T", "d", "d"),
    "W1 and W3": MatrixMultiplication("2 L", "T", "d", "F"),
    "W2": MatrixMultiplication("L", "T", "F", "d"),
    "output embedding": MatrixMultiplication("1", "T", "d", "V"),
}
"""All matrix multiplications of a forward pass."""


def gpt2_config(size: str, context_length: int = 1024) -> ModelConfig:
    """Configure one of the `GPT2_SIZES` in the assignment's architecture, with ModelConfig's default d_ff."""
    num_layers, d_model, num_heads = GPT2_SIZES[size]
    return ModelConfig(
        vocab_size=50_257, context_length=context_length, num_layers=num_layers, d_model=d_model, num_heads=num_heads
    )


def count_parameters(config: ModelConfig) -> int:
    """Count the trainable parameters of a model of any architecture."""
    with torch.device("meta"):  # shapes without memory
        return TransformerLM(config).num_parameters


def evaluate_formula(formula: str, config: ModelConfig, batch_size: int = 1) -> int:
    """Evaluate a formula such as "2 L d" for sequences of context_length tokens.

    Args:
        formula: integers and the letters above, separated by spaces; their product is the value.

    Raises:
        InvalidInputError: the formulas do not hold for the configuration's architecture.
    """
    supported = {"norm": "pre", "ffn": "swiglu", "kv_heads": config.num_heads, "head_dim": None, "sliding_window": None}
    supported |= dict.fromkeys(("tied_embeddings", "qkv_bias", "qk_norm", "value_embeddings"), False)
    for name, required in supported.items():
        if getattr(config, name) != required:
            raise InvalidInputError(
                f"the formulas hold for a model with {name}={required!r}, got {getattr(config, name)!r}; "
                "use TransformerLM.num_parameters and matmul_flops_per_token instead"
            )
    assert config.d_ff is not None  # ModelConfig sets it
    sizes = {"B": batch_size, "T": config.context_length, "L": config.num_layers, "V": config.vocab_size}
    sizes |= {"d": config.d_model, "F": config.d_ff, "h": config.num_heads, "k": config.d_head}
    return prod(sizes[factor] if factor in sizes else int(factor) for factor in formula.split())


def evaluate_formulas(formulas: Mapping[str, str], config: ModelConfig, batch_size: int = 1) -> dict[str, int]:
    """Evaluate each formula of a table such as PARAMETERS or ACTIVATIONS."""
    return {item: evaluate_formula(formula, config, batch_size) for item, formula in formulas.items()}


def num_parameters(config: ModelConfig) -> int:
    """Count the trainable parameters."""
    return sum(evaluate_formulas(PARAMETERS, config).values())


def forward_flops(config: ModelConfig, batch_size: int = 1) -> dict[str, int]:
    """Compute the FLOPs of each matrix multiplication in a forward pass over sequences of context_length tokens."""
    return evaluate_formulas(
        {item: multiplication.flops for item, multiplication in MATRIX_MULTIPLICATIONS.items()}, config, batch_size
    )


def training_memory_bytes(config: ModelConfig, batch_size: int) -> dict[str, int]:
    """Estimate the peak memory of training with AdamW when everything is float32 (4 bytes).

    The peak is at the end of a forward pass, when all activations and the optimizer state are allocated. Gradients
    are included, because the backward pass allocates them before it frees all activations.
    """
    parameters = num_parameters(config)
    activations = sum(evaluate_formulas(ACTIVATIONS, config, batch_size).values())
    num_elements = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": 2 * parameters,
        "activations": activations,
    }
    return {item: 4 * elements for item, elements in num_elements.items()}


def adamw_flops(num_parameters: int) -> int:
    """Compute the FLOPs of one AdamW step; a square root counts as one operation."""
    return sum(ADAMW_FLOPS_PER_PARAMETER.values()) * num_parameters


def training_flops(config: ModelConfig, batch_size: int) -> int:
    """Compute the FLOPs of a training step: forward, backward (twice the forward) and AdamW."""
    return 3 * sum(forward_flops(config, batch_size).values()) + adamw_flops(num_parameters(config))


# --- Tables for GPT-2 -----------------------------------------------------------------------------------------


def formula_rows(formulas: Mapping[str, str], config: ModelConfig) -> TableRows:
    """List items, formulas and their values for one sequence."""
    values = evaluate_formulas(formulas, config)
    return [{"": item, "formula": formulas[item], "numbers": value} for item, value in values.items()]


def matrix_multiplication_rows(config: ModelConfig) -> TableRows:
    """List the matrix multiplications of a forward pass over one sequence."""
    table: TableRows = []
    for item, multiplication in MATRIX_MULTIPLICATIONS.items():
        count, rows, inner, columns = (evaluate_formula(size, config) for size in multiplication)
        table.append(
            {
                "matrix multiplication": item,
                "count": count,
                "matrices": f"({rows} x {inner}) ({inner} x {columns})",
                "FLOPs": evaluate_formula(multiplication.flops, config),
            }
        )
    return table


def gpt2_forward() -> dict[str, int | float | TableRows]:
    """Compute GPT-2 XL's parameters and memory, and the forward FLOPs of all sizes and of XL with a long context."""
    configs = {size: gpt2_config(size) for size in GPT2_SIZES}
    xl, long = configs["XL"], "XL, 16,384"
    configs[long] = gpt2_config("XL", context_length=16_384)
    parameters = count_parameters(xl)
    flops = {name: forward_flops(config) for name, config in configs.items()}
    totals = {name: sum(of_model.values()) for name, of_model in flops.items()}
    return {
        "parameters of XL": parameters,
        "in fp32, GB": 4 * parameters / 1e9,
        "FLOPs of a forward pass of XL": totals["XL"],
        "ratio of FLOPs, context 16,384 to 1,024": totals[long] / totals["XL"],
        "parameters of XL by layer type": formula_rows(PARAMETERS, xl),
        "matrix multiplications of XL, context 1,024": matrix_multiplication_rows(xl),
        "models": [
            {"model": name, "d_ff": evaluate_formula("F", config), "TFLOPs per forward pass": totals[name] / 1e12}
            for name, config in configs.items()
        ],
        "share of the FLOPs, %": [
            {"matrix multiplication": item} | {name: 100 * flops[name][item] / totals[name] for name in configs}
            for item in MATRIX_MULTIPLICATIONS
        ],
    }


def gpt2_training() -> dict[str, str | int | float | TableRows]:
    """Compute memory and time of training GPT-2 XL: AdamW, 400,000 steps of 1,024 sequences, one H100 at 50% MFU."""
    xl = gpt2_config("XL")
    memory_bytes = training_memory_bytes(xl, batch_size=1)
    per_sequence_bytes = memory_bytes.pop("activations")
    fixed_bytes = sum(memory_bytes.values())
    hours = 400_000 * training_flops(xl, batch_size=1024) / (0.5 * 495e12) / 3600
    formulas = {"parameters": "P", "gradients": "P", "optimizer state": "2 P"}
    return {
        "P": " + ".join(PARAMETERS.values()),
        "XL, GB": f"{per_sequence_bytes / 1e9:.2f} * batch + {fixed_bytes / 1e9:.2f}",
        "largest batch in 80 GB": int((80e9 - fixed_bytes) // per_sequence_bytes),
        "FLOPs of one AdamW step, XL": adamw_flops(num_parameters(xl)),
        "400,000 steps of 1,024, hours": hours,
        "the same in days": hours / 24,
        "memory independent of the batch, in 4-byte numbers": [
            {"": item, "formula": formulas[item], "numbers": size_bytes // 4}
            for item, size_bytes in memory_bytes.items()
        ],
        "activations, in 4-byte numbers (B = 1)": formula_rows(ACTIVATIONS, xl),
        "AdamW, FLOPs per parameter": [
            {"operation": operation, "FLOPs": flops} for operation, flops in ADAMW_FLOPS_PER_PARAMETER.items()
        ],
    }
