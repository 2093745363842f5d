"""Recipes: one number, the depth or the minutes, sets all sizes and rates of a run by stated rules.

`handout` is what the assignment asks for: Llama's architecture, AdamW, a cosine, random windows. `modern` is what
reached the lowest loss in equal time: Muon, a trapezoid, squared ReLU, each window once. docs/modern_recipe.md has its
rules and what they were measured at. A recipe is only the default of settings: a configuration file or an option
overrides any of them, and the run's config.toml has them all.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from basic.common.errors import InvalidConfigError
from basic.training.settings import RunConfig
from basic.transformer.configuration import ModelConfig

RecipeName = Literal["handout", "modern"]

MAX_DEPTH = 64
_WIDTH_PER_BLOCK = 64
"""Features of the modern recipe's model for each block; also of a head, except in deep models."""
_MAX_CONTEXT = 1024
_DEEP = 8
"""Blocks from which on the modern recipe has heads of twice the size, and windows."""
_TOKENS_PER_PARAMETER = 2.0
"""Of the modern recipe: tokens to train on for each parameter of the blocks and the output matrix."""
_UTILIZATION = 0.4
"""Share of the speed of a large matrix multiplication that training reaches."""


def recipe_settings(
    name: RecipeName,
    *,
    vocab_size: int,
    depth: int | None = None,
    minutes: float | None = None,
    matmul_flops_per_s: float | None = None,
    has_gpu: bool = True,
) -> dict[str, dict[str, Any]]:
    """The settings of a recipe, as the tables "model" and "train" of a run's configuration.

    Args:
        name: of the recipe.
        vocab_size: of the tokenizer.
        depth: number of blocks; None for the depth whose training takes these minutes.
        minutes: time that the run takes (`TrainConfig.minutes`); None for as many steps as suit the depth.
        matmul_flops_per_s: speed of the device in large matrix multiplications, from
            `basic.training.parallel.devices.matmul_flops_per_s`; needed without a depth.
        has_gpu: without one, the handout's batches have 32 sequences instead of 256, and rates half as large, as the
            assignment says for other machines.

    Returns:
        All settings that the recipe sets, for `basic.common.config_files.from_table` with the user's own put over them.

    Raises:
        InvalidConfigError: neither depth nor minutes are given, or one is out of its range.
    """
    if name not in ("handout", "modern"):
        raise InvalidConfigError(f"recipe must be handout or modern, got {name!r}")
    if depth is None:
        if minutes is None:
            raise InvalidConfigError(f"the recipe {name} needs a depth (number of blocks) or minutes; give one of them")
        if not minutes > 0:
            raise InvalidConfigError(f"minutes must be above 0, got {minutes}")
        if matmul_flops_per_s is None:
            raise TypeError("without a depth, matmul_flops_per_s is needed")
        depth = depth_for(name, vocab_size, 60 * minutes * matmul_flops_per_s * _UTILIZATION, has_gpu)
    if not 1 <= depth <= MAX_DEPTH:
        raise InvalidConfigError(f"depth must be from 1 to {MAX_DEPTH} blocks, got {depth}")
    tables = _handout(vocab_size, depth, has_gpu) if name == "handout" else _modern(vocab_size, depth)
    if minutes is not None:
        tables["train"] |= {"steps": 0, "minutes": minutes}
    return tables


def depth_for(
    name: RecipeName, vocab_size: int, flops: float, has_gpu: bool = True, most_tokens: float = math.inf
) -> int:
    """The largest depth whose training needs at most so many floating-point operations; at least 1."""
    depth = 1
    while depth < MAX_DEPTH and training_flops(name, vocab_size, depth + 1, has_gpu, most_tokens) <= flops:
        depth += 1
    return depth


def training_flops(
    name: RecipeName, vocab_size: int, depth: int, has_gpu: bool = True, most_tokens: float = math.inf
) -> float:
    """The floating-point operations of all steps that suit a depth, which see at most `most_tokens`."""
    tables = recipe_settings(name, vocab_size=vocab_size, depth=depth, has_gpu=has_gpu)
    config, train = ModelConfig(**tables["model"]), tables["train"]
    tokens = train["steps"] * train["batch_size"] * config.context_length
    return min(tokens, most_tokens) * flops_per_token(config)


def most_parameters(num_tokens: int) -> float:
    """Parameters that are multiplied with every token, of the largest model for a text of so many tokens.

    4 for each token of 0.5 MB of books, 10 of 4.5 MB, 33 of 64 MB (docs/modern_recipe.md).
    """
    return num_tokens**1.5 / 115


def most_epochs(parameters_per_token: float) -> float:
    """How often a model should see a text at most; from there on it learns it by heart."""
    return min(30.0, 36 / math.sqrt(parameters_per_token))


def against_memorizing(config: RunConfig, num_tokens: int, epochs: float) -> dict[str, float]:
    """Settings of the modern recipe's "train" for a text that is seen more than twice (docs/modern_recipe.md)."""
    if epochs >= 4.5 and num_matrix_parameters(config.model) >= 3 * num_tokens:
        decays = {name: 2 * getattr(config.train, name) for name in ("weight_decay", "head_weight_decay")}
        return {"dropout": 0.3, **decays}
    return {"dropout": 0.0 if epochs <= 2 else 0.1 if epochs < 4 else 0.2}


def flops_per_token(config: ModelConfig) -> float:
    """The floating-point operations of a training step for each token: 6 for each parameter, and attention.

    It is what `basic.training.parallel.devices.training_flops_per_token` counts in a model.
    """
    half = config.context_length // 2  # what a token attends to on average
    num_keys = sum(min(half, config.window(layer) or half) for layer in range(config.num_layers))
    return 6 * (num_matrix_parameters(config) + 2 * num_keys * config.num_heads * config.d_head)


def num_matrix_parameters(config: ModelConfig) -> int:
    """Parameters that are multiplied with every token: the matrices of the blocks and the output matrix."""
    assert config.d_ff is not None  # set by ModelConfig
    attention = 2 * config.d_model**2 + 2 * config.d_model * config.kv_heads * config.d_head
    feed_forward = (3 if config.ffn == "swiglu" else 2) * config.d_model * config.d_ff
    return config.num_layers * (attention + feed_forward) + config.vocab_size * config.d_model


def _handout(vocab_size: int, depth: int, has_gpu: bool) -> dict[str, dict[str, Any]]:
    """The assignment's model and steps, for TinyStories at depth 4; other depths keep its proportions."""
    model: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context_length": 256,
        "d_model": 128 * depth,
        "num_layers": depth,
    }
    model |= {"num_heads": 4 * depth, "d_ff": 336 * depth}
    batch_size, rate = (256, 2e-3) if has_gpu else (32, 1e-3)
    train = {"steps": 5000, "batch_size": batch_size, "max_learning_rate": rate, "min_learning_rate": rate / 10}
    return {"model": model, "train": train | {"warmup_share": 0.05}}


def _modern(vocab_size: int, depth: int) -> dict[str, dict[str, Any]]:
    """A width of 64 a block, and everything else from it."""
    context = min(_MAX_CONTEXT, 1 << (128 * depth).bit_length() - 1)
    model: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context_length": context,
        "d_model": _WIDTH_PER_BLOCK * depth,
        "num_layers": depth,
    }
    model |= {"num_heads": depth, "ffn": "relu2", "embedding_norm": True, "zero_outputs": True}
    if depth >= _DEEP:
        model |= {"sliding_window": context // 4, "window_pattern": "SSSL"}
        if depth % 2 == 0:
            model["num_heads"] = depth // 2
    batch_size = max(1, 512 * depth**2 // context)
    tokens = _TOKENS_PER_PARAMETER * num_matrix_parameters(ModelConfig(**model))
    # Factors of Muon's rate, which suits every width: 0.3 for the embedding and 0.004 for the output matrix at depth 8.
    train: dict[str, Any] = {"optimizer": "muon", "max_learning_rate": 0.02, "min_learning_rate": 0.0}
    train |= {"embedding_rate_factor": 15 * depth / 8, "head_rate_factor": 0.2 * 8 / depth, "gain_rate_factor": 0.2}
    train |= {"beta1": 0.8, "schedule": "trapezoid", "warmup_share": 0.0, "decay_share": 0.65, "rows": "shuffled"}
    train |= {"weight_decay": 0.3, "head_weight_decay": depth / 10}  # times its rate: the same at every depth
    train |= {"batch_size": batch_size, "steps": max(1, round(tokens / (batch_size * context)))}
    return {"model": model, "train": train}
