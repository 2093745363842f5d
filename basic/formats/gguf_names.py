"""Models in GGUF, the format of llama.cpp: the names of its fields and tensors, and their meaning in our model.

Files of the architecture "llama" (also of TinyLlama, SmolLM2 and Mistral) have the rows of queries and keys in our
order; those of "qwen2" and "qwen3" in that of transformers. Llama 3's scaling of RoPE is a tensor of divisors, one for
each pair of features. The numbers that they are made of are not in the file, so those of Meta's models are tried; files
that we write have them in a field of our own.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from basic.common.errors import InvalidInputError
from basic.formats.hf_names import check_llama, checked_config, translated
from basic.transformer.configuration import ModelConfig
from basic.transformer.functional import rope_tables

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_DIVISORS = "rope_freqs.weight"
ROPE_SCALING = "basic.rope_scaling"

_FIELDS = {
    "context_length": "context_length",
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "d_ff": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}

_TENSORS = {"token_embeddings": "token_embd", "ln_final": "output_norm", "lm_head": "output"}

_LAYER_TENSORS = {
    "ln1": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.output_proj": "attn_output",
    "ln2": "ffn_norm",
    "ffn.w1": "ffn_gate",
    "ffn.w2": "ffn_down",
    "ffn.w3": "ffn_up",
}


def gguf_name(name: str) -> str:
    """Translate a parameter name: `layers.3.ffn.w1.weight` becomes `blk.3.ffn_gate.weight`."""
    return translated(name, _TENSORS, "blk", _LAYER_TENSORS)


def gguf_fields(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture of a model, and its fields (without the prefix of the architecture).

    Raises:
        InvalidInputError: llama.cpp has no architecture for the model; the message names the setting.
    """
    check_llama(config, "llama.cpp")
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        raise InvalidInputError(
            f"llama.cpp has no sliding window for a Llama-like model, got sliding_window={config.sliding_window}; "
            "import the model again with --context-length of at most the window"
        )
    architecture = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    fields = {name: getattr(config, field) for field, name in _FIELDS.items() if field != "sliding_window"}
    fields |= {"attention.head_count_kv": config.kv_heads, "vocab_size": config.vocab_size}
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    fields |= dict.fromkeys(sizes, config.d_head)
    if len(config.rope_scaling) == 1:
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling[0]}
    return architecture, fields


def gguf_config(fields: dict[str, Any], embedding_rows: int, rope_divisors: Tensor | None, tied: bool) -> ModelConfig:
    """The configuration of our model for the fields of a file.

    Args:
        embedding_rows: of the embedding, which is the vocabulary's size.
        rope_divisors: the tensor `rope_freqs.weight`.
        tied: whether the file has no output matrix of its own.

    Raises:
        InvalidInputError: the model needs a feature that our model does not have; the message names the field.
    """
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InvalidInputError(
            f"general.architecture is {architecture!r}; only {', '.join(map(repr, ARCHITECTURES))} can be read"
        )
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    for name in ("context_length", "embedding_length", "block_count", "attention.head_count", "feed_forward_length"):
        if name not in own:
            raise InvalidInputError(f"the field '{architecture}.{name}' is missing")
        if not isinstance(own[name], int):
            raise InvalidInputError(f"{architecture}.{name} is {own[name]!r}; only an integer can be read")
    if own.get("expert_count"):
        raise InvalidInputError(f"{architecture}.expert_count is {own['expert_count']}; experts cannot be read")
    values: dict[str, Any] = {field: own.get(name) for field, name in _FIELDS.items()}
    if values["num_kv_heads"] == values["num_heads"]:
        values["num_kv_heads"] = None
    head_dim = values["head_dim"] or values["d_model"] // values["num_heads"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_dim) != head_dim:
            raise InvalidInputError(f"{architecture}.{name} is {own[name]}; only the head size {head_dim} can be read")
    if head_dim * values["num_heads"] == values["d_model"]:
        values["head_dim"] = None
    values |= {"vocab_size": embedding_rows, "tied_embeddings": tied}
    values |= {"qkv_bias": architecture == "qwen2", "qk_norm": architecture == "qwen3"}
    values |= {name: _shortest(values[name]) for name in ("norm_eps", "rope_theta") if values[name] is not None}
    values["rope_scaling"] = _rope_scaling(architecture, own, rope_divisors, head_dim)
    return checked_config(values, _FIELDS)


def _shortest(number: float) -> float:
    """The float64 that a file's float32 stands for: 1e-05 was stored as 9.999999747378752e-06."""
    return float(str(torch.tensor(number, dtype=torch.float32).numpy()))


def _rope_scaling(architecture: str, own: dict[str, Any], divisors: Tensor | None, head_dim: int) -> list[float] | None:
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
    if factor != 1.0 and kind not in ("none", "linear"):
        raise InvalidInputError(f"{architecture}.rope.scaling.type is {kind!r}; only 'none' and 'linear' can be read")
    linear = [_shortest(factor)] if kind == "linear" and factor != 1.0 else None
    if divisors is None or bool((divisors == 1).all()):
        return linear
    saved = own.get(ROPE_SCALING)
    candidate = [_shortest(number) for number in saved] if saved else [divisors.max().item(), 1.0, 4.0, 8192.0]
    theta = own.get("rope.freq_base", 10_000.0)
    if linear or len(divisors) != head_dim // 2 or not torch.allclose(
        rope_divisors(theta, head_dim, tuple(candidate)), divisors.float(), rtol=1e-4
    ):  # fmt: skip
        raise InvalidInputError(
            f"{ROPE_DIVISORS} has divisors up to {divisors.max().item():g} that are not those of Llama 3 (low 1, high "
            "4, context 8192); no others can be read"
        )
    return candidate


def rope_divisors(theta: float, head_dim: int, scaling: tuple[float, ...]) -> Tensor:
    """The numbers by which the angles of each pair are divided, float32 (head_dim / 2,)."""
    one_step = (rope_tables(theta, head_dim, 2, numbers, dtype=torch.float64) for numbers in ((), scaling))
    plain, scaled = (torch.atan2(sin[1], cos[1]) for cos, sin in one_step)
    return (plain / scaled).float()
