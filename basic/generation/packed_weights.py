"""A model's weights as decoding reads them: in the dtype of the activations, those of all layers stacked."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from basic.model import RotaryPositionalEmbedding, TransformerLM


class PackedWeights:
    """Copies of the weights; a tensor's first dimension is the layer, but for those of no layer.

    Args:
        model: pre-norm and RoPE. Its weights are copied by `update` only.
        dtype: of the copied matrices.
    """

    def __init__(self, model: TransformerLM, dtype: torch.dtype):
        config, weights = model.config, model.state_dict()
        device, layers = model.token_embeddings.weight.device, range(config.num_layers)
        self._targets: list[tuple[str, Tensor]] = []

        def stack(*names: str, dtype: torch.dtype | None = dtype, more_rows: int = 0) -> Tensor:
            firsts = [weights[f"layers.0.{name}"] for name in names]
            sizes = [*map(len, firsts), more_rows]
            shape = config.num_layers, sum(sizes), *firsts[0].shape[1:]
            stacked = torch.empty(shape, dtype=dtype or firsts[0].dtype, device=device)
            for layer in layers:
                *targets, rest = stacked[layer].split(sizes)
                self._targets += zip((f"layers.{layer}.{name}" for name in names), targets, strict=True)
                rest.zero_()
            return stacked

        def copy(name: str, dtype: torch.dtype = dtype) -> Tensor:
            target = torch.empty(weights[name].shape, dtype=dtype, device=device)
            self._targets.append((name, target))
            return target

        self.embedding = copy("token_embeddings.weight")
        self.head = self.embedding if config.tied_embeddings else copy("lm_head.weight")
        self.final_gain = copy("ln_final.weight", weights["ln_final.weight"].dtype)
        have_values = [f"layers.{layer}.attn.value_gate.weight" in weights for layer in layers]
        num_gates = config.kv_heads if any(have_values) else 0
        # The gates of value embeddings are more outputs of the same matrix, without biases.
        projections = [f"attn.{name}_proj" for name in "qkv"]
        self.qkv = stack(*(f"{name}.weight" for name in projections), more_rows=num_gates)
        self.biases = stack(*(f"{name}.bias" for name in projections), more_rows=num_gates) if config.qkv_bias else None
        self.output = stack("attn.output_proj.weight")
        self.w13 = stack(*(f"ffn.{name}.weight" for name in (("w1", "w3") if config.ffn == "swiglu" else ("w1",))))
        self.w2 = stack("ffn.w2.weight")
        self.gains1, self.gains2 = stack("ln1.weight", dtype=None), stack("ln2.weight", dtype=None)
        self.qk_gains = [stack(f"attn.{name}_norm.weight", dtype=None) for name in "qk"] if config.qk_norm else None
        # Only some layers have them: `value_indices` has for each its index into the stacked embeddings, or -1.
        shape = sum(have_values), config.vocab_size, config.kv_heads * config.d_head
        self.value_embeddings = torch.empty(shape, dtype=dtype, device=device)
        self.value_indices = [sum(have_values[:layer]) if have_values[layer] else -1 for layer in layers]
        for layer, index in enumerate(self.value_indices):
            if index >= 0:
                gate = f"layers.{layer}.attn.value_gate.weight"
                self._targets.append((f"layers.{layer}.attn.value_embeddings.weight", self.value_embeddings[index]))
                self._targets.append((gate, self.qkv[layer, -num_gates:, : weights[gate].shape[1]]))
        rope = next(module for module in model.modules() if isinstance(module, RotaryPositionalEmbedding))
        self.cos, self.sin = rope.cos, rope.sin

    def update(self, model: TransformerLM) -> None:
        """Copy the weights of this or an equal model."""
        weights = model.state_dict()
        groups: dict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, target in self._targets:
            source = weights[name]
            targets, sources = groups[target.dtype, source.dtype, target.stride() == source.stride()]
            targets.append(target)
            sources.append(source)
        for targets, sources in groups.values():  # those of a group are copied by few kernel launches together
            torch._foreach_copy_(targets, sources)
