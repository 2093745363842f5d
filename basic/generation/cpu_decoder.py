"""Single steps of generation on a CPU: a token's multiplications, and one kernel between each two of them.

A token reads all weights and computes little, so that Python's own work, most of it out of the caches, would take a
third of the time. Here it is one loop over the blocks, with buffers and calls of kernels prepared for all tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import ModuleList

from basic.common.native.kernel import PreparedCall
from basic.model import KVCache, MultiHeadSelfAttention, TransformerBlock, TransformerLM
from basic.transformer.cpu import kernels
from basic.transformer.kernels import dispatch
from basic.transformer.layers import Embedding, Linear, RMSNorm, RotaryPositionalEmbedding, SwiGLU

_MODULES: tuple[type, ...] = (TransformerLM, TransformerBlock, MultiHeadSelfAttention, RotaryPositionalEmbedding)
_MODULES += ModuleList, Embedding, Linear, RMSNorm, SwiGLU


def make_cpu_decoder(model: TransformerLM, cache: KVCache) -> CpuDecoder | None:
    """The decoder of a float32 model of Llama's architecture, none of whose modules a user has changed; else None."""
    config, tensors = model.config, (cache.keys, *model.parameters(), *model.buffers())
    supported = config.norm == "pre" and not (config.qk_norm or config.qkv_bias or config.embedding_norm)
    for module in model.modules():
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        supported &= type(module) in _MODULES and not hooks
    supported = supported and not config.value_embeddings and dispatch.takes_cpu_operators(*tensors)
    return CpuDecoder(model, cache) if supported and all(tensor.is_contiguous() for tensor in tensors) else None


class CpuDecoder:
    """Computes the logits after one more token of each sequence, and writes its keys and values to the cache.

    Args:
        model: see `make_cpu_decoder`. Its weights may change, but not be replaced.
        cache: of as many sequences; the caller advances it.
    """

    def __init__(self, model: TransformerLM, cache: KVCache):
        config, B = model.config, cache.keys.shape[1]
        assert config.d_ff is not None  # set by __post_init__
        self.embeddings, self.cache, self.position = model.token_embeddings.weight, cache, np.zeros(1, np.int64)
        self.counters = np.zeros((4 * config.num_layers + 1, 1), np.int64)  # one for each call of a kernel
        counters = iter(self.counters)
        sizes = [heads * config.d_head for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.x, self.normed, scales = torch.empty(B, config.d_model), torch.empty(B, config.d_model), torch.empty(B)
        projected, attended = torch.empty(B, sum(sizes)), torch.empty(B, sizes[0])
        hidden, gated = torch.empty(B, 2 * config.d_ff), torch.empty(B, config.d_ff)
        qkv, o = (x.unflatten(1, (-1, config.d_head)) for x in (projected, attended))
        scores, no_angles = torch.empty(cache.keys.shape[1:4]), torch.empty(config.context_length, 0)

        def normalize(norm: RMSNorm) -> PreparedCall:
            weight = norm.weight.detach()
            return PreparedCall(kernels.norm_forward, next(counters), self.x, weight, norm.eps, self.normed, scales)

        self.steps: list[tuple[PreparedCall, list[tuple[Tensor, Tensor]], PreparedCall, Tensor, Tensor]] = []
        layers: Any = model.layers
        for index, block in enumerate(layers):
            attn, ffn = block.attn, block.ffn
            angles = (no_angles, no_angles) if attn.rope is None else (attn.rope.cos, attn.rope.sin)
            how = *angles, math.log2(math.e) * config.d_head**-0.5, attn.sliding_window or 0
            cached = cache.keys[index], cache.values[index]
            attend = PreparedCall(
                kernels.decode_attention, next(counters), self.position, qkv, *how, *cached, scores, o
            )
            gate = PreparedCall(kernels.swiglu_forward, next(counters), hidden, gated)
            first = zip((attn.q_proj, attn.k_proj, attn.v_proj), projected.split(sizes, 1), strict=True)
            second = zip((ffn.w1, ffn.w3), hidden.chunk(2, 1), strict=True)
            for norm, products, call, result, output in (
                (block.ln1, first, attend, attended, attn.output_proj),
                (block.ln2, second, gate, gated, ffn.w2),
            ):
                pairs = [(linear.weight.detach().T, out) for linear, out in products]
                self.steps.append((normalize(norm), pairs, call, result, output.weight.detach().T))
        assert isinstance(model.ln_final, RMSNorm)
        self.normalize, self.head = normalize(model.ln_final), model.lm_head.weight.detach().T

    def logits(self, ids: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab_size"]:
        """Those of the token after these, which are at the position `cache.length`."""
        x, normed = self.x, self.normed
        self.counters[:], self.position[0] = 0, self.cache.length
        torch.index_select(self.embeddings, 0, ids, out=x)
        for normalize, products, call, result, output in self.steps:
            normalize()
            for weight, out in products:
                torch.mm(normed, weight, out=out)
            call()
            x.addmm_(result, output)
        self.normalize()
        return normed @ self.head
