"""The operations of the Transformer as plain PyTorch: the reference that every kernel is tested against.

The functions have no parameters and no state. They take float32, float64, float16 or bfloat16 and return the dtype of
their input. Sums over many terms (softmax, norms, losses) are computed in at least float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from basic.transformer.attention import AttentionOptions


def at_least_float32(x: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; return float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Float[Tensor, " ... d_in"], *weights: Float[Tensor, "_ d_in"]) -> Float[Tensor, " ... d_out"]:
    """x W^T, computed in the dtype of x.

    Args:
        x: input features.
        weights: one matrix, or several, whose results are then side by side in the last dimension.
    """
    if len(weights) > 1 and math.prod(x.shape[:-1]) < x.shape[-1]:
        # Few tokens, as in decoding: to join the matrices would take longer than to multiply by them.
        return torch.cat([linear(x, weight) for weight in weights], -1)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    # Not einsum: with a weight of shape (out, in) it would copy every weight gradient on a GPU.
    return x @ weight.to(x.dtype).T


def softmax(x: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
    """exp(x) / sum(exp(x)) along one dimension.

    The maximum is subtracted first. It cancels in the quotient, and without it large scores would overflow.

    Args:
        x: scores of any scale.
        dim: the dimension whose entries sum to one.

    Source: assignment, "Scaled Dot-Product Attention", eq. for softmax.
    """
    if x.ndim and x.shape[dim] == 0:  # of no scores, which have no maximum either
        return x
    wide = at_least_float32(x)
    # Detached: the maximum cancels in the gradient too.
    exponentials = (wide - wide.detach().amax(dim, keepdim=True)).exp()
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def silu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x * sigmoid(x), elementwise.

    Source: Elfwing et al. 2017, "Sigmoid-Weighted Linear Units", eq. 1.
    """
    return x * torch.sigmoid(x)


def dropout(x: Float[Tensor, " ..."], probability: float) -> Float[Tensor, " ..."]:
    """Set each number to zero with a probability, and divide the others by 1 - probability, so that the mean stays.

    The random numbers come from torch's global generator of the device.

    Source: Srivastava et al. 2014, "Dropout"; scaled in training instead of afterwards.
    """
    is_kept = torch.rand(x.shape, device=x.device) >= probability
    return torch.where(is_kept, x / (1 - probability), 0)


def rms_norm(
    x: Float[Tensor, " ... d_model"], weight: Float[Tensor, " d_model"], eps: float
) -> Float[Tensor, " ... d_model"]:
    """x / sqrt(mean(x^2) + eps) * weight, with the mean over the last dimension.

    Args:
        x: features; cast to at least float32 first, because squares overflow in float16.
        weight: a gain for each feature.
        eps: added to the mean square, so that a zero vector stays zero.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    wide = at_least_float32(x)
    inverse_rms = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse_rms * weight).to(x.dtype)


def swiglu(
    x: Float[Tensor, " ... d_model"],
    w1: Float[Tensor, " d_ff d_model"],
    w2: Float[Tensor, " d_model d_ff"],
    w3: Float[Tensor, " d_ff d_model"],
) -> Float[Tensor, " ... d_model"]:
    """W2 (SiLU(W1 x) * W3 x).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """
    gate, value = linear(x, w1, w3).chunk(2, -1)
    return linear(silu(gate) * value, w2)


IGNORE_INDEX = -100
"""Target of a position that takes no part in a loss, as in PyTorch."""


def check_ids(ids: Any, name: str) -> None:
    """Check the type of ids that are used as indices.

    Raises:
        TypeError: they are not a tensor of a signed integer dtype. PyTorch takes uint8 and bool as a mask.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(ids).__name__}; convert with torch.tensor")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"{name} must have the dtype int64 or int32, got {ids.dtype}; convert with .long()")


def check_range(ids: Tensor, limit: int, name: str, limit_name: str, *, ignore_index: int | None = None) -> bool:
    """Check that ids are in 0 .. limit - 1, where this can be known at once.

    On a GPU this would wait for the device, and a compiled graph cannot branch on values. There, a caller makes its
    result NaN for a wrong id, so that it is found when the result is read.

    Returns:
        Whether the ids were checked.

    Raises:
        IndexError: an id is outside the range and not `ignore_index`; the message has the id and its position.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if ids.numel() == 0 or (ids.amin() >= 0 and ids.amax() < limit):
        return True
    wrong = ~is_inside(ids, limit)
    if ignore_index is not None:
        wrong &= ids != ignore_index
    for position in wrong.nonzero()[:1].tolist():
        at = f" at position {position[0] if len(position) == 1 else tuple(position)}" if position else ""
        or_ignored = "" if ignore_index is None else f", and not {ignore_index} either"
        wrong_id = ids[tuple(position)].item()
        raise IndexError(f"{name} {wrong_id}{at} is outside 0 .. {limit - 1} ({limit_name}={limit}){or_ignored}")
    return True


def is_inside(ids: Int[Tensor, " ..."], limit: int) -> Bool[Tensor, " ..."]:
    """Whether each id is in 0 .. limit - 1."""
    return (ids >= 0) & (ids < limit)


def take_rows(
    ids: Int[Tensor, " ..."], *tables: Float[Tensor, "rows _"], name: str, limit_name: str
) -> tuple[Float[Tensor, "... _"], ...]:
    """The rows of each table that ids select.

    Args:
        ids: in 0 .. rows - 1 of a signed integer dtype (PyTorch alone would count a negative one from the end).
        tables: with equally many rows.
        name, limit_name: of an id and of the number of rows, for messages.

    Returns:
        For each table its rows. Where an id is out of range on a GPU, or in compiled code, NaN.

    Raises:
        TypeError, IndexError: as for `check_ids` and `check_range`.
    """
    check_ids(ids, f"{name}s")
    rows = tables[0].shape[0]
    ids = ids.long()
    if check_range(ids, rows, name, limit_name):
        return tuple(table[ids] for table in tables)
    return tuple(rows_or_nan(table, ids) for table in tables)


def rows_or_nan(table: Float[Tensor, "rows features"], ids: Int[Tensor, " ..."]) -> Float[Tensor, "... features"]:
    """The rows that ids select; NaN for an id that is out of range."""
    inside = is_inside(ids, table.shape[0])
    return torch.where(inside.unsqueeze(-1), table[torch.where(inside, ids, 0)], torch.nan)


def cross_entropy(
    logits: Float[Tensor, " ... vocab_size"], targets: Int[Tensor, " ..."], *, ignore_index: int = IGNORE_INDEX
) -> Float[Tensor, ""]:
    """The mean of -log softmax(logits)[target] over all leading dimensions, in nats.

    Args:
        logits: unnormalized scores of any scale.
        targets: ids in 0 .. vocab_size - 1, or `ignore_index`.
        ignore_index: a position with this target takes no part; the mean is over the others.

    Returns:
        The mean; NaN if all positions are ignored, and for a target out of range on a GPU or in compiled code.

    Raises:
        TypeError, ValueError, IndexError: as for `token_losses`.

    Source: assignment, "Cross-entropy loss".
    """
    losses = token_losses(logits, targets, ignore_index=ignore_index)
    return (losses.mean() * mean_correction(targets, ignore_index, losses.dtype)).to(logits.dtype)


def mean_correction(targets: Int[Tensor, " ..."], ignore_index: int, dtype: torch.dtype) -> Float[Tensor, ""]:
    """Number of all targets / number of those that are not ignored: what a mean with zeros for the ignored ones lacks.

    It is exactly 1 if no target is ignored. It is infinite if all are, so that the mean becomes 0 * inf = NaN.
    """
    num_ignored = (targets == ignore_index).sum().to(dtype)
    return 1 + num_ignored / (targets.numel() - num_ignored)


def token_losses(
    logits: Float[Tensor, " ... vocab_size"], targets: Int[Tensor, " ..."], *, ignore_index: int | None = None
) -> Float[Tensor, " ..."]:
    """-log softmax(logits)[target] of each position, in nats, in at least float32.

    The logarithm cancels the exponential of the target's score, so no probability is computed that could round to
    zero.

    Args:
        targets: ids in 0 .. vocab_size - 1, or `ignore_index`.
        ignore_index: the loss of a position with this target is 0; None for no such target.

    Returns:
        The losses; NaN for a target out of range on a GPU or in compiled code.

    Raises:
        TypeError: the targets are not a tensor of a signed integer dtype.
        ValueError: the shape of `targets` is not that of `logits` without the last dimension.
        IndexError: a target is out of range (on the CPU).
    """
    vocab_size = logits.shape[-1]
    check_targets(targets, logits.shape[:-1], vocab_size, ignore_index)
    wide = at_least_float32(logits)
    shifted = wide - wide.detach().amax(-1, keepdim=True)
    inside = is_inside(targets, vocab_size)
    target_scores = shifted.gather(-1, torch.where(inside, targets, 0).long().unsqueeze(-1)).squeeze(-1)
    losses = (shifted.exp().sum(-1).log() - target_scores).masked_fill(~inside, torch.nan)
    return losses if ignore_index is None else losses.masked_fill(targets == ignore_index, 0)


def check_targets(targets: Tensor, shape: tuple[int, ...], vocab_size: int, ignore_index: int | None) -> None:
    """Check the targets of logits (*shape, vocab_size); raises what `token_losses` does."""
    check_ids(targets, "targets")
    if targets.shape != shape:  # broadcasting would hide the mistake
        raise ValueError(
            f"there must be one target for each row of logits, got targets of shape {tuple(targets.shape)} "
            f"for logits of shape {(*shape, vocab_size)}"
        )
    check_range(targets, vocab_size, "target", "vocab_size", ignore_index=ignore_index)


def linear_cross_entropy(
    x: Float[Tensor, " ... d_model"],
    weight: Float[Tensor, " vocab_size d_model"],
    targets: Int[Tensor, " ..."],
    *,
    ignore_index: int = IGNORE_INDEX,
    num_targets: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the logits x W^T, in nats, in at least float32.

    Args:
        targets, ignore_index: as for `cross_entropy`.
        num_targets: the number that the sum is divided by; None for that of the targets that are not ignored.
    """
    logits = at_least_float32(linear(x, weight))
    if num_targets is None:
        return cross_entropy(logits, targets, ignore_index=ignore_index)
    return token_losses(logits, targets, ignore_index=ignore_index).sum() / num_targets


def rope_tables(
    theta: float,
    d_k: int,
    max_seq_len: int,
    scaling: tuple[float, ...] = (),
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, " max_seq_len half"], Float[Tensor, " max_seq_len half"]]:
    """Cosines and sines of the angles position * theta ** (-2i / d_k), for every position and pair i.

    The angles are computed in float64, because in float32 they are off by a thousandth at position 16,384 already;
    and on the CPU, because not every device has float64.

    Args:
        scaling: (factor,) divides all angles; (factor, low, high, context) divides those that turn less than `low`
            times in `context` tokens, keeps those that turn more than `high` times, and goes from one to the other
            linearly in the number of turns between them.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via Position Interpolation", eq. 4
    (one number); Llama Team 2024, "The Llama 3 Herd of Models", and Meta's `apply_scaling` (four numbers).
    """
    frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64, device="cpu") / d_k)
    if scaling:
        factor, *bounds = scaling
        kept: Tensor | float = 0.0  # the share of the unscaled angle
        if bounds:
            low, high, context = bounds
            turns = frequencies * context / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * kept + frequencies * (1 - kept) / factor
    positions = torch.arange(max_seq_len, dtype=torch.float64, device="cpu")
    angles = einsum(positions, frequencies, "position, pair -> position pair")
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate_pairs(
    x: Float[Tensor, " ... d_k"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]
) -> Float[Tensor, " ... d_k"]:
    """Rotate each pair of neighboring features (x[2i], x[2i+1]) by its angle.

    Args:
        x: queries or keys.
        cos, sin: of the angles; they broadcast against the pairs of x, shape (..., d_k / 2).

    Source: Su et al. 2021, "RoFormer", eq. 34.
    """
    even, odd = rearrange(x, "... (pair two) -> two ... pair", two=2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rearrange(rotated, "... pair two -> ... (pair two)").to(x.dtype)


def causal_mask(
    queries: int, keys: int, window: int | None = None, *, device: torch.device | str | None = None
) -> Bool[Tensor, " queries keys"]:
    """True where a query may attend to a key: to its own position and those before, `window` together.

    The queries are at the last of the keys' positions.
    """
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal if window is None else causal.triu(keys - queries - window + 1)


def scaled_dot_product_attention(
    queries: Float[Tensor, " ... queries d_k"],
    keys: Float[Tensor, " ... keys d_k"],
    values: Float[Tensor, " ... keys d_v"],
    mask: Bool[Tensor, " ... #queries #keys"] | None = None,
) -> Float[Tensor, " ... queries d_v"]:
    """softmax(Q K^T / sqrt(d_k)) V.

    Args:
        queries, keys, values: with the same leading dimensions (batch, heads).
        mask: True where the query may attend to the key; broadcasts against the leading dimensions. A query that may
            attend to no key gets zeros.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    # Scaling the queries costs less than scaling the scores, which are keys / d_k times as many numbers.
    scaled = queries / math.sqrt(queries.shape[-1])
    scores = einsum(scaled, keys, "... queries d_k, ... keys d_k -> ... queries keys")
    if mask is None:
        return einsum(softmax(scores, -1), values, "... queries keys, ... keys d_v -> ... queries d_v")
    # The lowest finite number, not -inf: a query without keys would get inf - inf = NaN, in the gradient too. It gets
    # equal weights instead, and its output is set to zero, since the output is smaller than the weights.
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
    attended = einsum(weights, values, "... queries keys, ... keys d_v -> ... queries d_v")
    return attended.masked_fill(~mask.any(-1, keepdim=True), 0)


def project_heads(
    x: Float[Tensor, " ... d_model"],
    w_q: Float[Tensor, " q_features d_model"],
    w_k: Float[Tensor, " kv_features d_model"],
    w_v: Float[Tensor, " kv_features d_model"],
    options: AttentionOptions,
) -> Float[Tensor, " ... head d"]:
    """The heads of the queries, then of the keys, then of the values, before RoPE: one matrix multiplication."""
    multiply = linear if options.fp8 is None else options.fp8.linear
    heads = rearrange(multiply(x, w_q, w_k, w_v), "... (head d) -> ... head d", d=len(w_q) // options.num_heads)
    return heads if options.change_heads is None else options.change_heads(heads)


def causal_self_attention(
    x: Float[Tensor, " ... seq d_model"],
    w_q: Float[Tensor, " q_features d_model"],
    w_k: Float[Tensor, " kv_features d_model"],
    w_v: Float[Tensor, " kv_features d_model"],
    options: AttentionOptions,
) -> Float[Tensor, " ... seq q_features"]:
    """Causal attention with several heads, without the output projection.

    Args:
        x: input features.
        w_q, w_k, w_v: projections of all heads, stacked along their rows. Keys and values may have fewer heads than
            queries; neighboring query heads then share one (grouped-query attention).
        options: heads, positions and what a query may attend to.

    Source: Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023, "GQA".
    """
    num_heads, window = options.num_heads, options.window
    qkv = rearrange(project_heads(x, w_q, w_k, w_v, options), "... seq head d -> ... head seq d")
    num_kv_heads = w_k.shape[0] // qkv.shape[-1]
    qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=-3)
    if options.rope is not None:
        cos, sin = (table.unsqueeze(-3) for table in options.rope)  # the same for every head
        qk = rotate_pairs(qk, cos, sin)
    q, k = qk.split((num_heads, num_kv_heads), dim=-3)
    if options.extend_cache is not None:
        k, v = options.extend_cache(k, v)
    attended = _attend(q, k, v, window, options.document_starts)
    return rearrange(attended, "... head seq d -> ... seq (head d)")


def _attend(
    q: Float[Tensor, " ... heads queries d"],
    k: Float[Tensor, " ... kv_heads keys d"],
    v: Float[Tensor, " ... kv_heads keys d"],
    window: int | None,
    document_starts: Int[Tensor, "... queries"] | None,
) -> Float[Tensor, " ... heads queries d"]:
    """Attention of queries at the last of the keys' positions."""
    # A single query, as in decoding, may attend to all keys that no window hides.
    is_masked = q.shape[-2] > 1 or (window is not None and window < k.shape[-2])
    mask = causal_mask(q.shape[-2], k.shape[-2], window, device=q.device) if is_masked else None
    if document_starts is not None:
        in_document = torch.arange(k.shape[-2], device=k.device) >= document_starts.unsqueeze(-1)
        in_document = in_document.unsqueeze(-3)  # the same for every head
        mask = in_document if mask is None else mask & in_document
    group = q.shape[-3] // k.shape[-3]
    if group == 1:
        return scaled_dot_product_attention(q, k, v, mask)
    # The queries of a group become more queries of their one head of keys, which are not copied.
    q = rearrange(q, "... (kv_head group) seq d -> ... kv_head (group seq) d", group=group)
    mask = None if mask is None else torch.cat([mask] * group, -2)
    attended = scaled_dot_product_attention(q, k, v, mask)
    return rearrange(attended, "... kv_head (group seq) d -> ... (kv_head group) seq d", group=group)
