"""The arithmetic of the Transformer as plain tensor operations: what every kernel is tested against.

Nothing here holds parameters or state. All functions take float32, float64 or bfloat16 and return the dtype of
their input; sums over many terms (softmax, norms, losses) are computed in at least float32.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers with at least 24 bits of mantissa: half precisions are widened, the rest is left alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Float[Tensor, " ... d_in"], *weights: Float[Tensor, "_ d_in"]) -> Float[Tensor, " ... d_out"]:
    """x W^T, with the weights in the precision of x; of several weights the results side by side, as one product."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    # Not an einsum: with the weight as (out, in) it would copy every weight gradient on a GPU.
    return x @ weight.to(x.dtype).T


def softmax(x: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
    """Exponentiate and normalise along one dimension.

    The maximum is subtracted first: it cancels in the quotient, and no exponent is above zero, so nothing
    overflows.

    Args:
        x: scores, any scale.
        dim: the dimension whose entries shall sum to one.

    Source: handout, "Scaled Dot-Product Attention", eq. for softmax.
    """
    wide = at_least_float32(x)
    # Detached, because what cancels in the value cancels in the gradient too.
    exponentials = (wide - wide.detach().amax(dim, keepdim=True)).exp()
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def silu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x * sigmoid(x), elementwise.

    Source: Elfwing et al. 2017, "Sigmoid-Weighted Linear Units", eq. 1.
    """
    return x * torch.sigmoid(x)


def rms_norm(
    x: Float[Tensor, " ... d_model"], weight: Float[Tensor, " d_model"], eps: float
) -> Float[Tensor, " ... d_model"]:
    """Divide by the root mean square over the last dimension, then scale by a gain for each feature.

    Args:
        x: features; squares of half-precision numbers would overflow, so they are widened first.
        weight: the gains.
        eps: added to the mean square, so that a zero vector stays zero.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    wide = at_least_float32(x)
    inverse_rms = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse_rms * weight).to(x.dtype)


def cross_entropy(logits: Float[Tensor, " ... vocab_size"], targets: Int[Tensor, " ..."]) -> Float[Tensor, ""]:
    """The mean of -log softmax(logits)[target] over all leading dimensions, in nats.

    Args:
        logits: unnormalised scores, any scale.
        targets: ids in 0 .. vocab_size - 1.

    Source: handout, "Cross-entropy loss".
    """
    return token_nats(logits, targets).mean().to(logits.dtype)


def token_nats(logits: Float[Tensor, " ... vocab_size"], targets: Int[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """-log softmax(logits)[target] of each position, in nats, in at least float32.

    The logarithm and the exponential of the softmax cancel for the target itself, so no probability is ever
    formed that could round to zero.

    Raises:
        ValueError: not one target for each row of logits (broadcasting would hide a mistake).
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"there must be one target for each row of logits, got targets of shape {tuple(targets.shape)} "
            f"for logits of shape {tuple(logits.shape)}"
        )
    wide = at_least_float32(logits)
    shifted = wide - wide.detach().amax(-1, keepdim=True)
    target_scores = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return shifted.exp().sum(-1).log() - target_scores


def rope_tables(
    theta: float, d_k: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " max_seq_len half"], Float[Tensor, " max_seq_len half"]]:
    """Cosines and sines of the angles position * theta ** (-2i / d_k), for every position and pair i.

    The angles are formed in float64 (on the CPU, as not every device has it): at position 16,384 a float32
    angle is already off by a thousandth.
    """
    frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64, device="cpu") / d_k)
    positions = torch.arange(max_seq_len, dtype=torch.float64, device="cpu")
    angles = einsum(positions, frequencies, "position, pair -> position pair")
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate_pairs(
    x: Float[Tensor, " ... d_k"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]
) -> Float[Tensor, " ... d_k"]:
    """Rotate each neighbouring pair (x[2i], x[2i+1]) by its angle.

    Args:
        x: queries or keys.
        cos, sin: of the angles; they broadcast against the pairs of x, whose last dimension is d_k / 2.

    Source: Su et al. 2021, "RoFormer", eq. 34.
    """
    even, odd = rearrange(x, "... (pair two) -> two ... pair", two=2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rearrange(rotated, "... pair two -> ... (pair two)").to(x.dtype)


def causal_mask(queries: int, keys: int, *, device: torch.device | str | None = None) -> Bool[Tensor, " queries keys"]:
    """True where a query may look at a key: the queries are the last ones of the keys' positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def scaled_dot_product_attention(
    queries: Float[Tensor, " ... queries d_k"],
    keys: Float[Tensor, " ... keys d_k"],
    values: Float[Tensor, " ... keys d_v"],
    mask: Bool[Tensor, " ... #queries #keys"] | None = None,
) -> Float[Tensor, " ... queries d_v"]:
    """softmax(Q K^T / sqrt(d_k)) V.

    Args:
        queries, keys, values: their leading dimensions are the same (batch, heads).
        mask: True where the query may look at the key; broadcasts against the leading dimensions. A query that
            may look at no key at all gets zeros.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    # Scaling the queries costs less than scaling the scores, of which there are keys / d_k times as many.
    scaled = queries / math.sqrt(queries.shape[-1])
    scores = einsum(scaled, keys, "... queries d_k, ... keys d_k -> ... queries keys")
    if mask is None:
        return einsum(softmax(scores, -1), values, "... queries keys, ... keys d_v -> ... queries d_v")
    # The lowest finite number rather than -inf: a query without keys would get inf - inf = NaN, in the gradient
    # too. This way it looks at all keys alike, and the result is put to zero, which is smaller than the weights.
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
    attended = einsum(weights, values, "... queries keys, ... keys d_v -> ... queries d_v")
    return attended.masked_fill(~mask.any(-1, keepdim=True), 0)
