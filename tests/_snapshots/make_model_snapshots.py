"""Make llama_logits.json: the logits of transformers' Llama for a few token ids, with reproducible weights.

    uv run python -m tests._snapshots.make_model_snapshots

The independent program is `LlamaForCausalLM` of the transformers package (eager attention, float32); the file has the
versions. The weights are drawn from numpy's `RandomState`, whose numbers never change, so the file has only logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SNAPSHOT = Path(__file__).with_name("llama_logits.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 13,
    "context_length": 12,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 3,
    "d_ff": 40,
    "rope_theta": 100.0,
}


def random_weights(shape: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights of a language model, by their names in its state dict, of about the size of trained ones."""
    generator = np.random.RandomState(seed)
    d_model, d_ff, vocab_size = shape["d_model"], shape["d_ff"], shape["vocab_size"]

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.tensor(generator.standard_normal((rows, columns)) * columns**-0.5, dtype=torch.float32)

    def gains() -> Tensor:
        return torch.tensor(1 + generator.standard_normal(d_model) / 4, dtype=torch.float32)

    weights = {"token_embeddings.weight": matrix(vocab_size, d_model)}
    for layer in range(shape["num_layers"]):
        weights[f"layers.{layer}.ln1.weight"] = gains()
        for name in ("q", "k", "v", "output"):
            weights[f"layers.{layer}.attn.{name}_proj.weight"] = matrix(d_model, d_model)
        weights[f"layers.{layer}.ln2.weight"] = gains()
        weights[f"layers.{layer}.ffn.w1.weight"] = matrix(d_ff, d_model)
        weights[f"layers.{layer}.ffn.w2.weight"] = matrix(d_model, d_ff)
        weights[f"layers.{layer}.ffn.w3.weight"] = matrix(d_ff, d_model)
    return weights | {"ln_final.weight": gains(), "lm_head.weight": matrix(vocab_size, d_model)}


def llama(shape: dict[str, Any], weights: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' Llama with these weights, under its own names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["context_length"],
        hidden_size=shape["d_model"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        intermediate_size=shape["d_ff"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.load_state_dict({llama_name(name): llama_rows(name, w, shape) for name, w in weights.items()}, strict=True)
    return model.eval()


def llama_name(name: str) -> str:
    """Llama's name for one of our weights."""
    if name == "lm_head.weight":
        return name
    for ours, theirs in (
        ("token_embeddings", "embed_tokens"),
        ("ln_final", "norm"),
        ("ln1", "input_layernorm"),
        ("ln2", "post_attention_layernorm"),
        ("attn.output_proj", "self_attn.o_proj"),
        ("attn", "self_attn"),
        ("ffn.w1", "mlp.gate_proj"),
        ("ffn.w2", "mlp.down_proj"),
        ("ffn.w3", "mlp.up_proj"),
    ):
        if ours in name:
            return "model." + name.replace(ours, theirs)
    raise KeyError(name)


def llama_rows(name: str, weight: Tensor, shape: dict[str, Any]) -> Tensor:
    """The weight with its rows in Llama's order: Llama rotates features i and i + half together, we 2i and 2i + 1."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = weight.unflatten(0, (shape["num_heads"], -1))
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


def main() -> None:
    import transformers

    token_ids = np.random.RandomState(1).randint(0, SHAPE["vocab_size"], size=(2, SHAPE["context_length"]))
    with torch.no_grad():
        logits = llama(SHAPE, random_weights(SHAPE, seed=0))(torch.tensor(token_ids)).logits
    snapshot = {
        "made_by": f"LlamaForCausalLM of transformers {transformers.__version__} with torch {torch.__version__}, "
        "see make_model_snapshots.py; weights: random_weights(shape, seed)",
        "shape": SHAPE,
        "seed": 0,
        "token_ids": token_ids.tolist(),
        "logits": [[[round(logit, 6) for logit in row] for row in rows] for rows in logits.tolist()],
    }
    SNAPSHOT.write_text(json.dumps(snapshot) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
