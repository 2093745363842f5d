"""Single steps of generation on a CPU: a token's multiplications, and one kernel between each two of them.

A token reads all weights and computes little, so that Python's own work, most of it out of the caches, would take a
third of the time. Here it is one loop over the blocks, with buffers and calls of kernels prepared for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList

from basic.common.native.kernel import PreparedCall
from basic.model import KVCache, MultiHeadSelfAttention, TransformerBlock, TransformerLM
from basic.transformer.cpu import attention_kernels, kernels
from basic.transformer.kernels import dispatch
from basic.transformer.layers import FEED_FORWARD, Embedding, Identity, Linear, RMSNorm, RotaryPositionalEmbedding

_MODULES: tuple[type, ...] = (TransformerLM, TransformerBlock, MultiHeadSelfAttention, RotaryPositionalEmbedding)
_MODULES += ModuleList, Embedding, Linear, RMSNorm, Identity, *FEED_FORWARD.values()


def make_cpu_decoder(model: TransformerLM, cache: KVCache) -> CpuDecoder | None:
    """The decoder of a float32 model, none of whose modules a user has changed; else None."""
    tensors = cache.keys, *model.parameters(), *model.buffers()
    if not (dispatch.takes_cpu_operators(*tensors) and all(tensor.is_contiguous() for tensor in tensors)):
        return None
    for module in model.modules():
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if hooks or type(module) not in _MODULES:
            return None
    return CpuDecoder(model, cache)


class CpuDecoder:
    """Computes the logits after one more token of each sequence, and writes its keys and values to the cache.

    Args:
        model: see `make_cpu_decoder`. Its weights may change, but not be replaced.
        cache: of as many sequences; the caller advances it.
    """

    def __init__(self, model: TransformerLM, cache: KVCache):
        config, B = model.config, cache.keys.shape[1]
        assert config.d_ff is not None  # set by __post_init__
        self.cache, self.position, self.ids = cache, np.zeros(1, np.int64), torch.empty(B, dtype=torch.int64)
        # One for each call of a kernel: norms, norms of heads, attention and SwiGLU.
        self.counters = np.zeros(((2 * B + 4) * config.num_layers + 2, 1), np.int64)
        self._unused_counters = iter(self.counters)
        self.sizes = [heads * config.d_head for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.x, self.normed = torch.empty(B, config.d_model), torch.empty(B, config.d_model)
        self.scales = torch.empty(max(B, config.num_heads))
        self.projected, self.attended = torch.empty(B, sum(self.sizes)), torch.empty(B, self.sizes[0])
        self.hidden, self.gated = torch.empty(B, 2 * config.d_ff), torch.empty(B, config.d_ff)
        self.scores = torch.empty(cache.keys.shape[1:4])
        self.calls: list[Callable[[], object]] = [
            partial(torch.index_select, model.token_embeddings.weight.detach(), 0, self.ids, out=self.x)
        ]
        if config.embedding_norm:
            self._normalize(torch.ones(config.d_model), config.norm_eps, self.x, self.x)
        layers: Any = model.layers
        for index, block in enumerate(layers):
            self._add_sublayer(config.norm, block.ln1, partial(self._add_attention, block.attn, index))
            self._add_sublayer(config.norm, block.ln2, partial(self._add_feed_forward, block.ffn))
        self.head, self.last = model.lm_head.weight.detach().T, self._norm(model.ln_final, self.x, self.normed)

    def logits(self, ids: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab_size"]:
        """Those of the token after these, which are at the position `cache.length`."""
        self.counters[:], self.position[0] = 0, self.cache.length
        self.ids.copy_(ids)
        for call in self.calls:
            call()
        return self.last @ self.head

    def _add_sublayer(self, norm: str, ln: Module, add: Callable[[Tensor], tuple[Tensor, Linear]]) -> None:
        """Attention or feed-forward layer: `add` adds the calls for its input, and returns what is still multiplied."""
        x, normed = self.x, self.normed
        result, output = add(self._norm(ln, x, normed) if norm == "pre" else x)
        weight = output.weight.detach().T
        if norm == "sublayer":
            self.calls.append(partial(torch.mm, result, weight, out=normed))
            self.calls.append(partial(x.add_, self._norm(ln, normed, normed)))
        else:
            self.calls.append(partial(x.addmm_, result, weight))
            if norm == "post":
                self._norm(ln, x, x)

    def _norm(self, norm: Module, x: Tensor, y: Tensor) -> Tensor:
        """Where the normalised x is: in y, if it is normalised at all."""
        if not isinstance(norm, RMSNorm):
            return x
        self._normalize(norm.weight.detach(), norm.eps, x, y)
        return y

    def _normalize(self, weight: Tensor, eps: float, x: Tensor, y: Tensor) -> None:
        arguments = next(self._unused_counters), x, weight, eps, y, self.scales[: len(x)]
        self.calls.append(PreparedCall(kernels.norm_forward, *arguments))

    def _add_attention(self, attn: MultiHeadSelfAttention, index: int, x: Tensor) -> tuple[Tensor, Linear]:
        parts = self.projected.split(self.sizes, 1)
        for linear, out in zip((attn.q_proj, attn.k_proj, attn.v_proj), parts, strict=True):
            weight = linear.weight.detach().T
            product = (
                partial(torch.mm, x, weight)
                if linear.bias is None
                else partial(torch.addmm, linear.bias.detach(), x, weight)
            )
            self.calls.append(partial(product, out=out))
        if attn.value_embeddings is not None:
            self.calls += _value_embeddings(attn, x, self.ids, parts[2])
        for norm, part in ((attn.q_norm, parts[0]), (attn.k_norm, parts[1])):
            if norm is not None:
                for row in part:  # the heads of a sequence are side by side, those of several are not
                    heads = row.view(-1, norm.weight.numel())
                    self._normalize(norm.weight.detach(), norm.eps, heads, heads)
        keys, values = self.cache.keys[index], self.cache.values[index]
        qkv, o = (tensor.unflatten(1, (-1, keys.shape[-1])) for tensor in (self.projected, self.attended))
        no_angles = torch.empty(keys.shape[-2], 0)
        angles = (no_angles, no_angles) if attn.rope is None else (attn.rope.cos, attn.rope.sin)
        how = *angles, math.log2(math.e) * keys.shape[-1] ** -0.5, attn.sliding_window or 0, keys, values
        counter = next(self._unused_counters)
        self.calls.append(
            PreparedCall(attention_kernels.decode_attention, counter, self.position, qkv, *how, self.scores, o)
        )
        return self.attended, attn.output_proj

    def _add_feed_forward(self, ffn: Any, x: Tensor) -> tuple[Tensor, Linear]:
        hidden, values = self.hidden.chunk(2, 1)
        self.calls.append(partial(torch.mm, x, ffn.w1.weight.detach().T, out=hidden))
        if isinstance(ffn, FEED_FORWARD["swiglu"]):
            self.calls.append(partial(torch.mm, x, ffn.w3.weight.detach().T, out=values))
            counter = next(self._unused_counters)
            self.calls.append(PreparedCall(kernels.swiglu_forward, counter, self.hidden, self.gated))
        elif isinstance(ffn, FEED_FORWARD["relu2"]):
            self.calls.append(partial(torch.clamp, hidden, min=0, out=hidden))
            self.calls.append(partial(torch.mul, hidden, hidden, out=self.gated))
        else:
            self.calls.append(partial(torch.sigmoid, hidden, out=self.gated))
            self.calls.append(partial(self.gated.mul_, hidden))
        return self.gated, ffn.w2


def _value_embeddings(
    attn: MultiHeadSelfAttention, x: Tensor, ids: Tensor, values: Tensor
) -> Iterator[Callable[[], object]]:
    """Calls that add the gated embeddings of the ids to the values; see `MultiHeadSelfAttention.forward`."""
    assert attn.value_embeddings is not None
    gate, table = attn.value_gate.weight.detach(), attn.value_embeddings.weight.detach()
    gates, added = torch.empty(len(x), len(gate)), torch.empty(values.shape)
    yield partial(torch.mm, x[:, : gate.shape[1]], gate.T, out=gates)
    yield gates.sigmoid_
    yield partial(torch.index_select, table, 0, ids, out=added)
    heads = (tensor.unflatten(1, (len(gate), -1)) for tensor in (values, added))
    by_head, added_by_head = heads
    yield partial(by_head.addcmul_, added_by_head, gates.unsqueeze(-1), value=2)
