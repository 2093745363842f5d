"""What the blocks of the Transformer are built of: matrices, embeddings, norms, RoPE, feed-forward layers, a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.init import trunc_normal_

from basic.common.arguments import check_number, check_size
from basic.common.errors import InvalidInputError
from basic.transformer.configuration import ModelConfig, check_rope_scaling
from basic.transformer.functional import linear, rope_tables, rotate_pairs, silu, take_rows
from basic.transformer.kernels import dispatch


class Linear(Module):
    """x W^T, and on request plus a bias, which starts at zero.

    Args:
        d_in: features of the input.
        d_out: features of the output; the weight is (d_out, d_in).
        bias: whether there is one.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False):
        super().__init__()
        d_in, d_out = check_size("d_in", d_in), check_size("d_out", d_out)
        self.weight = Parameter(torch.empty(d_out, d_in))
        std = (2 / (d_in + d_out)) ** 0.5
        trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        self.bias = Parameter(torch.zeros(d_out)) if bias else None
        self.multiply: Callable[..., Tensor] = linear  # or training's own, in fp8

    def forward(self, x: Float[Tensor, " ... d_in"]) -> Float[Tensor, " ... d_out"]:
        y = self.multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(Module):
    """A vector of features for each token id.

    An id outside the vocabulary is an IndexError on the CPU. On a GPU, and in compiled code, its features are NaN.

    Args:
        vocab_size: number of ids.
        d_model: features of a token.
        std: standard deviation of the initial features.
    """

    def __init__(self, vocab_size: int, d_model: int, *, std: float = 1.0):
        super().__init__()
        self.weight = Parameter(torch.empty(check_size("vocab_size", vocab_size), check_size("d_model", d_model)))
        trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, token_ids: Int[Tensor, " ..."]) -> Float[Tensor, " ... d_model"]:
        (features,) = take_rows(token_ids, self.weight, name="token id", limit_name="vocab_size")
        return features


class RMSNorm(Module):
    """Root-mean-square normalization with a gain for each feature.

    Args:
        d_model: features of a token.
        eps: added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = check_number("eps", eps)
        self.weight = Parameter(torch.ones(check_size("d_model", d_model)))

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return dispatch.rms_norm(x, self.weight, self.eps)


def norm_heads(norm: RMSNorm, x: Float[Tensor, " ... heads d"]) -> Float[Tensor, " ... heads d"]:
    """Normalize each head, or all heads together if there is a gain for each of their features."""
    return norm(x) if norm.weight.numel() == x.shape[-1] else norm(x.flatten(-2)).view(x.shape)


class Identity(Module):
    """Returns its input; replaces a norm in the ablation without norms."""

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return x


class RotaryPositionalEmbedding(Module):
    """RoPE: rotate the pairs of features of a query or key by angles proportional to its position.

    Args:
        theta: base of the wavelengths.
        d_k: features of a query or key, even.
        max_seq_len: positions are 0 .. max_seq_len - 1.
        scaling: as `ModelConfig.rope_scaling`.

    Raises:
        TypeError: a size is not an integer.
        InvalidInputError: `d_k` is odd, or an argument is out of its range.
    """

    def __init__(self, theta: float, d_k: int, max_seq_len: int, scaling: tuple[float, ...] = ()):
        super().__init__()
        d_k, max_seq_len = check_size("d_k", d_k), check_size("max_seq_len", max_seq_len)
        if not check_number("theta", theta) > 0:
            raise InvalidInputError(f"theta must be a number > 0, got {theta}")
        if d_k % 2:
            raise InvalidInputError(f"RoPE rotates pairs of features, so d_k must be even, got {d_k}")
        check_rope_scaling(scaling)
        self.theta, self.d_k, self.max_seq_len, self.scaling = theta, d_k, max_seq_len, scaling
        # The default device, as for parameters.
        cos, sin = rope_tables(theta, d_k, max_seq_len, scaling, dtype=torch.float32, device=torch.get_default_device())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPositionalEmbedding:
        # `.to(...)`, `.bfloat16()` and the like call this. Rotations by angles rounded to bfloat16 would be wrong, and
        # tables cast to float64 would keep the error of float32: compute the tables again.
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.cos.dtype, torch.float32)
        sizes = self.theta, self.d_k, self.max_seq_len, self.scaling
        self.cos, self.sin = rope_tables(*sizes, dtype=dtype, device=self.cos.device)
        return self

    def tables(
        self,
        x: Float[Tensor, " ... seq features"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        *,
        first_position: int = 0,
    ) -> tuple[Float[Tensor, "... seq half"], Float[Tensor, "... seq half"]]:
        """Cosines and sines of the angles of each token of x.

        Args:
            x: features.
            token_positions: by default counted from `first_position`; they broadcast against the leading dimensions
                of x.
            first_position: position of the first token of x if `token_positions` is None.

        Returns:
            The two tables; on a GPU, and in compiled code, NaN for a position outside 0 .. max_seq_len - 1.

        Raises:
            InvalidInputError: x is longer than max_seq_len and `token_positions` is None.
            IndexError: a position is outside 0 .. max_seq_len - 1 (on the CPU).
        """
        if token_positions is None:
            end = first_position + x.shape[-2]
            if end > self.max_seq_len:
                raise InvalidInputError(f"{end} tokens do not fit into max_seq_len={self.max_seq_len}")
            return self.cos[first_position:end], self.sin[first_position:end]
        while token_positions.ndim >= x.ndim and token_positions.shape[0] == 1:
            token_positions = token_positions.squeeze(0)  # else the result would have one dimension more than x
        cos, sin = take_rows(token_positions, self.cos, self.sin, name="position", limit_name="max_seq_len")
        return cos, sin

    def forward(
        self, x: Float[Tensor, " ... seq d_k"], token_positions: Int[Tensor, "... seq"] | None = None
    ) -> Float[Tensor, " ... seq d_k"]:
        """Rotate each token of x by its position.

        Args:
            x: queries or keys.
            token_positions: by default 0 .. seq - 1. Their leading dimensions are aligned with the first ones of x
                where the sizes allow it, so that (batch, seq) fits (batch, heads, seq, d_k), else with the last ones.

        Raises:
            InvalidInputError, IndexError: as for `tables`.
        """
        if token_positions is not None:
            token_positions = _align_leading(token_positions, x.shape[:-1])
        return rotate_pairs(x, *self.tables(x, token_positions))


class SwiGLU(Module):
    """The gated feed-forward layer W2 (SiLU(W1 x) * W3 x).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)
        self.compute: Callable[..., Tensor] = dispatch.swiglu  # or training's own, in fp8

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return self.compute(x, self.w1.weight, self.w2.weight, self.w3.weight)


class SiLUFeedForward(Module):
    """The feed-forward layer without a gate, W2 SiLU(W1 x): the assignment's ablation."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return self.w2(silu(self.w1(x)))


class SquaredReLUFeedForward(SiLUFeedForward):
    """The feed-forward layer W2 ReLU(W1 x)^2.

    Source: So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling", section 4.
    """

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return self.w2(self.w1(x).clamp(min=0).square())


FEED_FORWARD = {"swiglu": SwiGLU, "silu": SiLUFeedForward, "relu2": SquaredReLUFeedForward}


class LayerCache(NamedTuple):
    """What a `KVCache` has of one layer."""

    keys: Float[Tensor, " batch kv_heads context d_head"]
    values: Float[Tensor, " batch kv_heads context d_head"]
    length: int

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, (batch, kv_heads, new, d_head); return those of all tokens so far."""
        end = self.length + keys.shape[-2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of earlier tokens, for every layer, in buffers of fixed size.

    A forward pass writes the keys and values of its tokens behind the first `length` positions. The caller then calls
    `advance`, once a pass, because no layer knows that it is the last.

    Args:
        config: of the model.
        batch_size: number of sequences.
        dtype, device: of the activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        shape = (config.num_layers, batch_size, config.kv_heads, config.context_length, config.d_head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def of_layer(self, layer: int) -> LayerCache:
        """Views of the keys and values of a layer."""
        return LayerCache(self.keys[layer], self.values[layer], self.length)

    def advance(self, num_tokens: int) -> None:
        """Keep the keys and values that the last forward pass has written."""
        self.length += num_tokens


def make_norm(config: ModelConfig) -> Module:
    """RMSNorm, or the identity in the ablation without norms."""
    return Identity() if config.norm == "none" else RMSNorm(config.d_model, config.norm_eps)


def _align_leading(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Insert dimensions of size 1 before the last, so that the leading ones align with the first ones of `shape`."""
    missing = len(shape) - positions.ndim
    fits = all(size in (1, wanted) for size, wanted in zip(positions.shape[:-1], shape, strict=False))
    if missing <= 0 or positions.ndim == 1 or not fits:
        return positions
    return positions.reshape(*positions.shape[:-1], *([1] * missing), positions.shape[-1])
