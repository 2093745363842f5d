"""Arguments of Python with a wrong type are named; they neither pass nor show Python's own text."""

import math
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.encoding import encode_files
from basic.generation.sampling import Sampling
from basic.model import (
    Embedding,
    Linear,
    ModelConfig,
    MultiHeadSelfAttention,
    RMSNorm,
    RotaryPositionalEmbedding,
    SwiGLU,
    TransformerLM,
)
from basic.tokens.flat_file import TokenFileWriter
from basic.train_bpe import train_bpe
from basic.training.batches import BatchSampler
from basic.training.loop import train
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from basic.transformer.optimizer import AdamW, clip_gradients

SIZES: dict[str, Any] = {"vocab_size": 11, "context_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 2}
WEIGHT = torch.nn.Parameter(torch.ones(2))
IDS = np.arange(20)

STEPS = {"steps": 5}
WRONG: list[tuple[Any, list[Any], dict[str, Any], type[Exception], str]] = [
    (TrainConfig, [], {"steps": "5"}, TypeError, "steps must be an integer, got str: '5'"),
    (TrainConfig, [], {"steps": 5.0}, TypeError, "steps must be an integer, got float: 5.0"),
    (TrainConfig, [], {**STEPS, "max_learning_rate": math.inf}, InvalidConfigError, "must be a finite number, got inf"),
    (TrainConfig, [], {**STEPS, "max_learning_rate": math.nan}, InvalidConfigError, "must be a finite number, got nan"),
    (TrainConfig, [], {**STEPS, "eps": "1"}, TypeError, "eps must be a number, got str: '1'"),
    (TrainConfig, [], {**STEPS, "compile": 1}, TypeError, "compile must be true or false, got int: 1"),
    (
        TrainConfig,
        [],
        {**STEPS, "rows": ["windows"]},
        InvalidConfigError,
        "rows must be one of windows, .*documents, .*got",
    ),
    (TrainConfig, [], {**STEPS, "trackers": "wandb"}, TypeError, "trackers must be a list, each item one of 'tensor"),
    (RunConfig, [], {"model": {}, "train": TrainConfig(steps=5)}, TypeError, "model must be a table .* got dict"),
    (DataConfig, [], {"train_tokens": 5}, TypeError, "train_tokens must be a string in quotes, got int: 5"),
    (ModelConfig, [], {**SIZES, "rope_theta": math.inf}, InvalidConfigError, "rope_theta must be a finite number"),
    (ModelConfig, [], {**SIZES, "tied_embeddings": "no"}, TypeError, "tied_embeddings must be true or false, got str"),
    (Sampling, [], {"temperature": "1"}, TypeError, "temperature must be a number, got str: '1'"),
    (Sampling, [], {"top_k": 1.0}, TypeError, "top_k must be an integer, got float: 1.0"),
    (train, [{}, IDS, IDS, "x"], {}, TypeError, "config must be a RunConfig, got dict"),
    (TransformerLM, [SIZES], {}, TypeError, "config must be a ModelConfig, got dict"),
    (Linear, ["3", 4], {}, TypeError, "d_in must be an integer, got str: '3'"),
    (Embedding, [3.0, 4], {}, TypeError, "vocab_size must be an integer, got float: 3.0"),
    (RMSNorm, [0], {}, InvalidInputError, "d_model must be at least 1, got 0"),
    (RMSNorm, [2, "1e-5"], {}, TypeError, "eps must be a number, got str: '1e-5'"),
    (SwiGLU, [4, None], {}, TypeError, "d_out must be an integer, got NoneType"),
    (RotaryPositionalEmbedding, ["1e4", 4, 8], {}, TypeError, "theta must be a number, got str: '1e4'"),
    (RotaryPositionalEmbedding, [1e4, 4, 8.5], {}, TypeError, "max_seq_len must be an integer, got float"),
    (MultiHeadSelfAttention, [8, "2"], {}, TypeError, "num_heads must be an integer, got str: '2'"),
    (train_bpe, [None, 300, []], {}, TypeError, "inputs must be a path, or a list of paths, got NoneType"),
    (train_bpe, [[5], 300, []], {}, TypeError, "an input must be a path, a URL or a TextSource, got int: 5"),
    (train_bpe, ["x", 300, []], {"min_count": "2"}, TypeError, "min_count must be an integer, got str: '2'"),
    (train_bpe, ["x", 300, []], {"fan_in": 1}, InvalidInputError, "fan_in must be at least 2, got 1"),
    (TokenFileWriter, ["x.bin", "300"], {}, TypeError, "vocab_size must be an integer, got str: '300'"),
    (encode_files, [None, "x", "y"], {"shard_bytes": "9"}, TypeError, "shard_bytes must be an integer, got str: '9'"),
    (BatchSampler, [IDS, 1, 2], {"seed": "0"}, TypeError, "seed must be an integer, got str: '0'"),
    (clip_gradients, [{"w": WEIGHT}, 1.0], {}, TypeError, "parameters must be tensors, got 'w'; of a dict"),
    (clip_gradients, [[WEIGHT], "1"], {}, ValueError, "max_l2_norm must be a number >= 0, got '1'"),
    (AdamW, [[WEIGHT]], {"lr": "1"}, ValueError, "lr must be a number >= 0, got '1'"),
    (AdamW, [[WEIGHT]], {"betas": 0.9}, ValueError, "betas must be two numbers in"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "error", "message"), WRONG)
def test_a_wrong_argument_is_named(
    function: Any,
    arguments: list[Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_other_types_that_mean_the_same_are_converted() -> None:
    given: dict[str, Any] = {"steps": np.int64(5), "beta1": np.float32(0.5), "eps": 0, "trackers": ["wandb"]}
    config = TrainConfig(**given, max_gradient_norm=math.inf)
    kinds = {name: type(getattr(config, name)) for name in given}
    assert kinds == {"steps": int, "beta1": float, "eps": float, "trackers": tuple}
    assert DataConfig(train_tokens=Path("a") / "b").train_tokens == str(Path("a/b"))  # ty: ignore[invalid-argument-type]
