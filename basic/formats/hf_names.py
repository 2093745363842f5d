"""Models in Hugging Face format: the names of their config.json fields and tensors, and their meaning in our model.

The families are Llama (also TinyLlama, SmolLM2), Mistral, Qwen 2, Qwen 3 and OLMo 2. Two things differ from our model
besides the names. RoPE in transformers rotates feature i of a head together with feature i + d_head / 2, while ours
rotates adjacent features, so the rows of queries and keys are in another order. And a tied output matrix is stored only
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from basic.common.config_files import from_table
from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.transformer.configuration import ModelConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}

_TENSORS = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "lm_head": "lm_head"}

_LAYER_TENSORS = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}

_NORMS_AFTER_SUBLAYERS = {"ln1": "post_attention_layernorm", "ln2": "post_feedforward_layernorm"}

# The only supported value of fields that may be present; other values need features that our model does not have.
_SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

# What else the parameters of RoPE may have: the numbers of each kind, in the order of ModelConfig.rope_scaling.
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Kinds that are supported only with the factor 1.0, which changes nothing.
_OTHER_ROPES = {"dynamic": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}


def check_llama(config: ModelConfig, program: str) -> None:
    """Raise an InvalidInputError that names the settings of a model which are not those of any Llama-like family."""
    found = config.not_in_llama
    if config.norm == "sublayer" and program == "llama.cpp":
        found = ["norm='sublayer'", *found]
    if found:
        raise InvalidInputError(
            f"a Llama of {program} cannot express {' and '.join(found)}; only models with norm='pre', "
            "positions='rope', ffn='swiglu' and no embedding_norm, value_embeddings or window_pattern can be exported "
            "(transformers also has OLMo 2, with norm='sublayer' and qk_norm='all_heads'); to train a Llama, give "
            "`basic train` the option --recipe handout"
        )
    if config.qk_norm and config.qkv_bias:
        raise InvalidInputError(
            f"no family of {program} has both qk_norm=True and qkv_bias=True; only one of them can be exported"
        )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model.

    Raises:
        InvalidInputError: no family has the model's architecture; the message names all settings that differ.
    """
    check_llama(config, "transformers")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    family = "olmo2" if config.norm == "sublayer" else family
    if family == "llama" and (config.sliding_window is not None or config.d_model % config.num_heads):
        family = "mistral"  # as a Llama, but for the window, and any size of a head
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | rope_fields(config)
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        **{hf_field: getattr(config, field) for field, hf_field in _FIELDS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "tie_word_embeddings": config.tied_embeddings,
        # transformers 5 reads rope_parameters, older versions read rope_theta and rope_scaling.
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if config.rope_scaling else None,
        **_window_fields(config, family),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """The kind and the numbers of RoPE's scaling, if there is one."""
    for kind, names in _ROPE_NUMBERS.items():
        if names and len(names) == len(config.rope_scaling):
            numbers = dict(zip(names, config.rope_scaling, strict=True))
            if "original_max_position_embeddings" in numbers:
                numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
            return {"rope_type": kind, **numbers}
    return {}


def _window_fields(config: ModelConfig, family: str) -> dict[str, Any]:
    if family in ("llama", "olmo2"):
        return {}
    window: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family != "mistral":
        window |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return window


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """Return the configuration of our model for the fields of a config.json.

    Fields that do not affect the forward pass are ignored.

    Raises:
        InvalidInputError: the model is of another family, or needs a feature that our model does not have; the message
            names the field and its value.
    """
    family = fields.get("model_type")
    if family not in _CLASSES:
        raise InvalidInputError(f"model_type is {family!r}; only {', '.join(map(repr, _CLASSES))} can be read")
    for name, supported in _SUPPORTED_VALUES.items():
        if fields.get(name) not in (None, supported):
            raise InvalidInputError(f"{name} is {fields[name]!r}; only {supported!r} can be read")
    # Llama's class counts as many heads of keys as of queries where the field is missing; the others differ.
    for name in (*_FIELDS.values(), *(["num_key_value_heads"] if family not in ("llama", "olmo2") else [])):
        if name not in fields:
            raise InvalidInputError(f"the field {name!r} is missing")
    values = {field: fields[hf_field] for field, hf_field in _FIELDS.items()}
    num_kv_heads = fields.get("num_key_value_heads")
    if num_kv_heads not in (None, values["num_heads"]):
        values["num_kv_heads"] = num_kv_heads
    head_dim = fields.get("head_dim", 128 if family == "qwen3" else None)
    if not (head_dim is None or _is_usual(head_dim, values["d_model"], values["num_heads"])):
        values["head_dim"] = head_dim
    values["rope_theta"], values["rope_scaling"] = _rope(fields)
    values["sliding_window"] = _sliding_window(fields)
    values["qkv_bias"], values["qk_norm"] = family == "qwen2", family == "qwen3"
    if family == "olmo2":
        values["norm"], values["qk_norm"] = "sublayer", "all_heads"
    values["tied_embeddings"] = fields.get("tie_word_embeddings", False)
    return checked_config(values, {**_FIELDS, "num_kv_heads": "num_key_value_heads"})


def _is_usual(head_dim: object, d_model: object, num_heads: object) -> bool:
    """Whether a head has d_model / num_heads features, so that the field says nothing new."""
    sizes = (head_dim, d_model, num_heads)
    return all(type(size) is int for size in sizes) and head_dim * num_heads == d_model  # ty: ignore


def checked_config(values: dict[str, Any], names: dict[str, str]) -> ModelConfig:
    """Build a configuration from values of a file of another program.

    Args:
        values: by our names; None is the default.
        names: our names to those in the file, for messages.

    Raises:
        InvalidInputError: a value has the wrong type or is out of its range; the message has the names of both.
    """
    try:
        return from_table(ModelConfig, {name: value for name, value in values.items() if value is not None})
    except InvalidConfigError as error:
        pairs = [f"{theirs} is our {ours}" for ours, theirs in names.items() if ours != theirs]
        raise InvalidInputError(f"{error} ({', '.join(pairs)})") from error


def _rope(fields: dict[str, Any]) -> tuple[Any, list[float]]:
    """Return the base of RoPE and its scaling, which old and new files have in different fields."""
    theta = fields.get("rope_theta", 10_000.0)
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"  # the first wins, as in transformers
    parameters = fields.get(name) or {}
    if not isinstance(parameters, dict):
        raise InvalidInputError(f"{name} is {parameters!r}; only a table can be read")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", theta)
    numbers = {key: value for key, value in parameters.items() if key not in ("rope_type", "type", "rope_theta")}
    if numbers.get("partial_rotary_factor") == 1.0:
        del numbers["partial_rotary_factor"]
    allowed = _ROPE_NUMBERS | _OTHER_ROPES
    changes_nothing = kind == "default" or (kind in allowed and numbers.get("factor") == 1.0)
    if not changes_nothing and kind not in _ROPE_NUMBERS:
        kinds = ", ".join(map(repr, _ROPE_NUMBERS))
        raise InvalidInputError(f"{name} is {parameters!r}; only the rope_type {kinds} can be read")
    if not numbers.keys() <= {*allowed[kind]}:
        raise InvalidInputError(f"{name} is {parameters!r}; with {kind!r} only {allowed[kind]} can be read")
    if changes_nothing:
        return theta, []
    if lacking := [key for key in _ROPE_NUMBERS[kind] if key not in numbers]:
        raise InvalidInputError(f"{name} is {parameters!r}, which lacks {', '.join(lacking)}")
    return theta, [numbers[key] for key in _ROPE_NUMBERS[kind]]


def _sliding_window(fields: dict[str, Any]) -> Any:
    """Return the window of all layers; None for none."""
    family = fields["model_type"]
    if family in ("llama", "olmo2"):
        if fields.get("sliding_window") is not None:
            raise InvalidInputError(f"sliding_window is {fields['sliding_window']!r}; a {family!r} has none")
        return None
    window = fields.get("sliding_window", 4096)  # what the classes of transformers take where the field is missing
    if family == "mistral":
        return window
    if not fields.get("use_sliding_window", False) or window is None:
        return None
    num_layers, first = fields["num_hidden_layers"], fields.get("max_window_layers", 28)
    name, kinds = "layer_types", fields.get("layer_types")
    if kinds is None:
        kinds = [] if first >= num_layers else ["sliding_attention"] + ["full_attention"] * (first > 0)
        name = "max_window_layers"
    if not {*kinds} <= {"sliding_attention"} and not {*kinds} <= {"full_attention"}:
        raise InvalidInputError(
            f"{name} is {fields.get(name, 28)!r} of {num_layers} layers with use_sliding_window; only models whose "
            "layers all have the window, or none, can be read"
        )
    return window if "sliding_attention" in kinds else None


def hf_name(name: str, norm: str = "pre") -> str:
    """Translate a parameter name: `layers.3.ffn.w1.weight` becomes `model.layers.3.mlp.gate_proj.weight`."""
    layer_tensors = _LAYER_TENSORS | (_NORMS_AFTER_SUBLAYERS if norm == "sublayer" else {})
    return translated(name, _TENSORS, "model.layers", layer_tensors)


def translated(name: str, tensors: Mapping[str, str], layers: str, layer_tensors: Mapping[str, str]) -> str:
    """A parameter name with the words of another program: of a module, of the list of layers, and inside a layer."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{tensors[module]}.{kind}"
    _, layer, submodule = module.split(".", 2)
    return f"{layers}.{layer}.{layer_tensors[submodule]}.{kind}"


def to_hf_row_order(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Reorder the rows of a weight (by our name) for transformers; the result is contiguous."""
    if _is_rotated(name):
        weight = rearrange(weight, "(head pair two) ... -> (head two pair) ...", two=2, pair=d_head // 2)
    return weight.contiguous()


def from_hf_row_order(name: str, weight: Tensor, d_head: int) -> Tensor:
    """The inverse of `to_hf_row_order`."""
    if _is_rotated(name):
        weight = rearrange(weight, "(head two pair) ... -> (head pair two) ...", two=2, pair=d_head // 2)
    return weight


def _is_rotated(name: str) -> bool:
    """Whether the rows of a weight are features of queries or keys, which RoPE rotates in pairs."""
    return name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
