"""Llama as transformers writes it: what the fields of config.json and the tensors are called there, and mean here.

Besides the names, two things differ. transformers rotates feature i of a query or key together with feature
i + d_head / 2, we rotate neighbours; so the rows of each head stand in another order. And a tied output matrix is not
written a second time.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from basic.common.config_files import from_table
from basic.model import ModelConfig

_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}

_TENSORS = {
    "token_embeddings": "model.embed_tokens",
    "ln_final": "model.norm",
    "lm_head": "lm_head",
}

_TENSORS_OF_A_LAYER = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}

# What a field must say, should it be there: all else would need something that our model lacks.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json for a model of this shape.

    Raises:
        ValueError: it is not a Llama; all settings that are in the way are named.
    """
    llama = {"norm": "pre", "positions": "rope", "ffn": "swiglu"}
    other = [f"{name}={getattr(config, name)!r}" for name, wanted in llama.items() if getattr(config, name) != wanted]
    if other:
        raise ValueError(
            f"a Llama of transformers cannot express {' and '.join(other)}; only models with "
            f"{', '.join(f'{name}={wanted!r}' for name, wanted in llama.items())} can be exported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "tie_word_embeddings": config.tied_embeddings,
        # Version 5 of transformers reads the second, everything older the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """The shape of the model that a config.json describes.

    Fields that transformers' Llama does not read, or that matter for training or for text only, are passed over.

    Raises:
        ValueError: it is not a Llama, or one that needs what our model lacks; the field is named, and its value.
    """
    if fields.get("model_type") != "llama":
        raise ValueError(f"model_type is {fields.get('model_type')!r}; only 'llama' can be read")
    for name, wanted in _REQUIRED.items():
        if fields.get(name) not in (None, wanted):
            raise ValueError(f"{name} is {fields[name]!r}; only {wanted!r} can be read")
    for name in _FIELDS.values():
        if name not in fields:
            raise ValueError(f"the field {name!r} is missing")
    values = {ours: fields[theirs] for ours, theirs in _FIELDS.items()}
    num_kv_heads = fields.get("num_key_value_heads")
    if num_kv_heads not in (None, values["num_heads"]):
        values["num_kv_heads"] = num_kv_heads
    values["rope_theta"] = _rope_theta(fields)
    values["tied_embeddings"] = fields.get("tie_word_embeddings", False)
    try:
        config = from_table(ModelConfig, values)
    except ValueError as error:
        names = ", ".join(f"{theirs} is our {ours}" for ours, theirs in _FIELDS.items() if ours != theirs)
        raise ValueError(f"{error} ({names}, num_key_value_heads our num_kv_heads)") from error
    if fields.get("head_dim") not in (None, config.d_head):
        raise ValueError(
            f"head_dim is {fields['head_dim']}; only hidden_size / num_attention_heads = {config.d_head} can be read"
        )
    return config


def _rope_theta(fields: dict[str, Any]) -> float:
    """The base of RoPE's wavelengths: old files have it as a field, new ones among the parameters of RoPE."""
    theta = fields.get("rope_theta", 10_000.0)
    for name in ("rope_parameters", "rope_scaling"):  # transformers too lets the last one win
        parameters = fields.get(name) or {}
        known = isinstance(parameters, dict) and parameters.keys() <= {"rope_type", "type", "rope_theta"}
        if not known or parameters.get("rope_type", parameters.get("type", "default")) != "default":
            raise ValueError(f"{name} is {parameters!r}; only the default type, with a rope_theta alone, can be read")
        theta = parameters.get("rope_theta", theta)
    return theta


def hf_name(name: str) -> str:
    """Llama's name of a tensor of ours: `layers.3.ffn.w1.weight` is `model.layers.3.mlp.gate_proj.weight`."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{_TENSORS[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{_TENSORS_OF_A_LAYER[part]}.weight"


def to_hf_rows(name: str, weight: Tensor, d_head: int) -> Tensor:
    """The tensor of this name (ours) with its rows in Llama's order, contiguous."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = rearrange(weight, "(head pair two) d_model -> (head two pair) d_model", two=2, pair=d_head // 2)
    return weight.contiguous()


def from_hf_rows(name: str, weight: Tensor, d_head: int) -> Tensor:
    """The inverse of `to_hf_rows`."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = rearrange(weight, "(head two pair) d_model -> (head pair two) d_model", two=2, pair=d_head // 2)
    return weight
