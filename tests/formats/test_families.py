"""Random small models of every supported family of transformers: logits, greedy text, both round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from basic.common.errors import InvalidInputError
from basic.formats.export_model import export_hf
from basic.formats.hf_names import model_config
from basic.formats.import_model import load_model
from basic.generation.continuation import generate
from basic.model import ModelConfig, TransformerLM
from tests.helpers.model_tools import transformers

LENGTH = 1000  # tokens; beyond the original context of the scaled models, which is a quarter of it
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH // 4,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}

# Name to the model_type, changes of the sizes, and what our configuration must have.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama 2": ("llama", {"num_key_value_heads": 4}, {}),
    "TinyLlama": ("llama", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "Llama 3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3}, {"rope_scaling": (4.0, 1.0, 4.0, 250.0)}),
    "Llama 3.2": (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16},
        {"rope_scaling": (32.0, 1.0, 4.0, 250.0), "tied_embeddings": True, "head_dim": 16},
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_scaling": (4.0,)},
    ),
    "SmolLM2": ("llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}, {"num_heads": 9}),
    "Mistral": ("mistral", {"sliding_window": 7, "head_dim": 10}, {"sliding_window": 7, "head_dim": 10}),
    "Mistral 0.3": ("mistral", {"sliding_window": None}, {"sliding_window": None}),
    "Qwen 2.5": ("qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "qk_norm": False}),
    "Qwen 2 with a window": ("qwen2", QWEN_WINDOW, {"sliding_window": 7}),
    "Qwen 3": ("qwen3", {"head_dim": 16}, {"qk_norm": True, "qkv_bias": False, "head_dim": 16}),
    "OLMo 2": ("olmo2", {}, {"norm": "sublayer", "qk_norm": "all_heads"}),
    "Qwen 3 with a window": ("qwen3", QWEN_WINDOW | {"head_dim": 8}, {"sliding_window": 7, "head_dim": None}),
}


def their_model(name: str) -> Any:
    """A model of transformers, whose vectors too (gains, biases) are random."""
    kind, changes, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers().AutoModelForCausalLM.from_config(
        transformers().AutoConfig.for_model(kind, **(SIZES | changes))
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


@torch.no_grad()
def logit_difference(ours: TransformerLM, theirs: Any, length: int = LENGTH) -> float:
    torch.manual_seed(1)
    ids = torch.randint(ours.config.vocab_size, (1, length))
    logits = theirs(ids).logits
    assert logits.std() > 0.5  # otherwise all logits would be close
    return (ours(ids) - logits).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_text_and_round_trip(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB" if name == "Mistral" else "1GB")
    ours = load_model(tmp_path / "theirs")
    for setting, value in FAMILIES[name][2].items():
        assert getattr(ours.config, setting) == value
    assert ours.num_parameters == theirs.num_parameters()
    difference = logit_difference(ours, theirs)
    print(f"{name}: largest difference of a logit {difference:.1e}")
    assert difference < 1e-4
    prompt = torch.randint(64, (1, 12))
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 12:].tolist()
    assert generate(ours, prompt.tolist(), 20, temperature=0) == expected

    export_hf(ours, tmp_path / "back")
    reread = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.randint(64, (2, 300))
    assert torch.equal(reread(ids).logits, theirs(ids).logits)
    files = [safetensors.torch.load_file(path) for path in sorted((tmp_path / "theirs").glob("*.safetensors"))]
    before = {name: tensor for file in files for name, tensor in file.items()}
    after = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load_model(tmp_path / "back")
    assert again.config == ours.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_folder_of_an_older_transformers_opens(tmp_path: Path) -> None:
    """Before version 5, rope_scaling had the kind and rope_theta was beside it."""
    theirs = their_model("Llama 3.1")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(fields))
    assert logit_difference(load_model(tmp_path), theirs) < 1e-4


def test_weights_in_bfloat16_on_request(tmp_path: Path) -> None:
    model = load_hf_of("Qwen 2.5", tmp_path)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    export_hf(model, tmp_path / "half", dtype="bfloat16")
    weights = safetensors.torch.load_file(tmp_path / "half/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path / "half").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def load_hf_of(name: str, folder: Path) -> TransformerLM:
    their_model(name).save_pretrained(folder / "theirs")
    return load_model(folder / "theirs")


# --- Fields -------------------------------------------------------------------------------------------------------

BASE = {**SIZES, "rms_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "mistral"}, {"sliding_window": 4096}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "qwen3"}, {"head_dim": 128}),
        ({"model_type": "qwen2", "sliding_window": 5}, {"sliding_window": None}),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, {"sliding_window": None}),
        (
            {"model_type": "qwen3", **QWEN_WINDOW, "max_window_layers": 9, "layer_types": ["sliding_attention"] * 2},
            {"sliding_window": 7},
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": ()}),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 1.0}}, {"rope_scaling": ()}),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 1}}, {"rope_scaling": ()}),
        ({"model_type": "llama", "partial_rotary_factor": 1.0, "attention_bias": False}, {}),
    ],
    ids=str,
)
def test_missing_fields_are_those_of_the_classes_and_defaults_change_nothing(fields: dict, expected: dict) -> None:
    config = model_config(BASE | fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2", **QWEN_WINDOW, "max_window_layers": 1}, "max_window_layers is 1 of 2 layers"),
        (
            {"model_type": "qwen3", **QWEN_WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is .*; only models whose layers all have the window, or none",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True; only False"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"model_type": "olmo3"}, "model_type is 'olmo3'"),
    ],
    ids=str,
)
def test_what_is_not_covered_is_refused_by_name_and_value(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model_config(BASE | fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "both qk_norm=True and qkv_bias=True"),
        ({"qk_norm": "all_heads"}, "cannot express qk_norm='all_heads'; only models with norm='pre'"),
        ({"norm": "sublayer", "qk_norm": "all_heads", "sliding_window": 2}, "cannot express sliding_window=2"),
    ],
    ids=str,
)
def test_a_model_of_no_family_is_not_exported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 9, "context_length": 4, "d_model": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(InvalidInputError, match=message):
        export_hf(TransformerLM(ModelConfig(**sizes, **changes)), tmp_path / "hf")
