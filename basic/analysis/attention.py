"""Where the heads of a model attend to, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from basic.common.errors import InvalidInputError
from basic.model import MultiHeadSelfAttention, TransformerLM
from basic.transformer.functional import causal_mask, scaled_dot_product_attention
from basic.transformer.layers import norm_heads


@torch.no_grad()
def attention_maps(model: TransformerLM, token_ids: Sequence[int] | Tensor) -> Float[Tensor, "layers heads seq seq"]:
    """The weights with which each head of each layer averages the values, as float32 on the CPU.

    Args:
        token_ids: of one text, at most context_length.

    Returns:
        `maps[layer, head, query, key]`, the weight of a key's token for a query's token; each row sums to 1.

    Raises:
        InvalidInputError: there is no token, or there are too many.
    """
    ids = torch.as_tensor(token_ids, device=model.token_embeddings.weight.device).reshape(1, -1)
    if ids.numel() == 0:
        raise InvalidInputError("there is no token to attend to; give the ids of a text")
    maps: list[Tensor] = []

    def record(attention: Any, inputs: tuple[Any, ...]) -> None:
        maps.append(_weights(attention, inputs[0])[0].float().cpu())

    handles = [block.attn.register_forward_pre_hook(record) for block in model.layers]  # ty: ignore
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(maps)


def _weights(attention: MultiHeadSelfAttention, x: Float[Tensor, "1 seq d_model"]) -> Float[Tensor, "1 heads seq seq"]:
    """The weights of a layer: its attention with the identity matrix for values."""
    queries = rearrange(attention.q_proj(x), "batch seq (head d) -> batch head seq d", head=attention.num_heads)
    keys = rearrange(attention.k_proj(x), "batch seq (head d) -> batch head seq d", head=attention.num_kv_heads)
    if attention.q_norm is not None and attention.k_norm is not None:
        pairs = (attention.q_norm, queries), (attention.k_norm, keys)
        queries, keys = (norm_heads(norm, x.transpose(1, 2)).transpose(1, 2) for norm, x in pairs)
    length = x.shape[-2]
    if attention.rope is not None:
        positions = torch.arange(length, device=x.device)
        queries, keys = attention.rope(queries, positions), attention.rope(keys, positions)
    group = attention.num_heads // attention.num_kv_heads
    keys = repeat(keys, "batch head seq d -> batch (head group) seq d", group=group)
    identity = torch.eye(length, dtype=x.dtype, device=x.device).expand(*keys.shape[:2], -1, -1)
    mask = causal_mask(length, length, attention.sliding_window, device=x.device)
    return scaled_dot_product_attention(queries, keys, identity, mask)
