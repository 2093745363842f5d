"""Llama in Hugging Face format: the names of its config.json fields and tensors, and their meaning in our model.

Two things differ besides the names. RoPE in transformers rotates feature i of a head together with feature
i + d_head / 2, while ours rotates adjacent features, so the rows of the query and key projections are in another order.
And a tied output matrix is stored only once.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from basic.common.config_files import from_table
from basic.common.errors import InvalidConfigError, InvalidInputError
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

_LAYER_TENSORS = {
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

# The only supported value of fields that may be present; other values need features that our model does not have.
_SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model.

    Raises:
        InvalidInputError: the model is not a Llama; the message names all settings that differ.
    """
    llama = {"norm": "pre", "positions": "rope", "ffn": "swiglu"}
    settings = {name: getattr(config, name) for name in llama}
    unsupported = [f"{name}={value!r}" for name, value in settings.items() if value != llama[name]]
    if unsupported:
        raise InvalidInputError(
            f"a Llama of transformers cannot express {' and '.join(unsupported)}; only models with "
            f"{', '.join(f'{name}={value!r}' for name, value in llama.items())} can be exported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{hf_field: getattr(config, field) for field, hf_field in _FIELDS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "tie_word_embeddings": config.tied_embeddings,
        # transformers 5 reads rope_parameters, older versions read rope_theta.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """Return the configuration of our model for the fields of a config.json.

    Fields that do not affect the forward pass of a Llama are ignored.

    Raises:
        InvalidInputError: the model is not a Llama, or needs a feature that our model does not have; the message names
            the field and its value.
    """
    if fields.get("model_type") != "llama":
        raise InvalidInputError(f"model_type is {fields.get('model_type')!r}; only 'llama' can be read")
    for name, supported in _SUPPORTED_VALUES.items():
        if fields.get(name) not in (None, supported):
            raise InvalidInputError(f"{name} is {fields[name]!r}; only {supported!r} can be read")
    for name in _FIELDS.values():
        if name not in fields:
            raise InvalidInputError(f"the field {name!r} is missing")
    values = {field: fields[hf_field] for field, hf_field in _FIELDS.items()}
    num_kv_heads = fields.get("num_key_value_heads")
    if num_kv_heads not in (None, values["num_heads"]):
        values["num_kv_heads"] = num_kv_heads
    values["rope_theta"] = _rope_theta(fields)
    values["tied_embeddings"] = fields.get("tie_word_embeddings", False)
    try:
        config = from_table(ModelConfig, values)
    except InvalidConfigError as error:
        names = ", ".join(f"{hf_field} is our {field}" for field, hf_field in _FIELDS.items() if field != hf_field)
        raise InvalidInputError(f"{error} ({names}, num_key_value_heads our num_kv_heads)") from error
    if fields.get("head_dim") not in (None, config.d_head):
        raise InvalidInputError(
            f"head_dim is {fields['head_dim']}; only hidden_size / num_attention_heads = {config.d_head} can be read"
        )
    return config


def _rope_theta(fields: dict[str, Any]) -> float:
    """Return the base of RoPE: a field of its own in old files, one of the RoPE parameters in new files."""
    theta = fields.get("rope_theta", 10_000.0)
    for name in ("rope_parameters", "rope_scaling"):  # the last one wins, as in transformers
        parameters = fields.get(name) or {}
        is_supported = isinstance(parameters, dict) and parameters.keys() <= {"rope_type", "type", "rope_theta"}
        if not is_supported or parameters.get("rope_type", parameters.get("type", "default")) != "default":
            raise InvalidInputError(
                f"{name} is {parameters!r}; only the default type with only a rope_theta can be read"
            )
        theta = parameters.get("rope_theta", theta)
    return theta


def hf_name(name: str) -> str:
    """Translate a parameter name: `layers.3.ffn.w1.weight` becomes `model.layers.3.mlp.gate_proj.weight`."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{_TENSORS[module]}.weight"
    _, layer, submodule = module.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_TENSORS[submodule]}.weight"


def to_hf_row_order(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Reorder the rows of a weight (by our name) for transformers; the result is contiguous."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = rearrange(weight, "(head pair two) d_model -> (head two pair) d_model", two=2, pair=d_head // 2)
    return weight.contiguous()


def from_hf_row_order(name: str, weight: Tensor, d_head: int) -> Tensor:
    """The inverse of `to_hf_row_order`."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = rearrange(weight, "(head two pair) d_model -> (head pair two) d_model", two=2, pair=d_head // 2)
    return weight
