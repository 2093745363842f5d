"""The Transformer language model: Llama's architecture (RMSNorm, RoPE, SwiGLU), and what its relatives add to it.

The modules have the parameters; the formulas are in `basic.transformer.functional`, one function each. Attention,
SwiGLU and the loss are called through `dispatch`, which calls a GPU kernel where there is one, else the function of the
same name in `functional`. The loss and the optimizer can be imported from here too:
`from basic.model import TransformerLM, cross_entropy, AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from basic.common.arguments import check_integer, check_number, check_size, check_type
from basic.common.config_files import check_fields
from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.transformer.functional import (
    check_ids,
    dropout,
    linear,
    rms_norm,
    rope_tables,
    rotate_pairs,
    silu,
    take_rows,
)
from basic.transformer.functional import cross_entropy as cross_entropy
from basic.transformer.functional import softmax as softmax
from basic.transformer.kernels import dispatch
from basic.transformer.optimizer import AdamW as AdamW
from basic.transformer.optimizer import clip_gradients as clip_gradients
from basic.transformer.optimizer import cosine_schedule as cosine_schedule
from basic.transformer.summary import Summary, summarize

_GATE_FEATURES = 32
"""Features of a token, the first ones, that set the gates of its value embeddings."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a language model, with the assignment's ablations.

    Raises:
        TypeError: a setting has another type.
        InvalidConfigError: a size is not positive, `num_heads` does not divide `d_model` (without `head_dim`),
            `num_kv_heads` does not divide `num_heads`, the head size is odd with RoPE, or a number is out of its range.
    """

    vocab_size: int
    """Number of token ids."""
    context_length: int
    """Longest sequence in tokens."""
    d_model: int
    """Features of a token between the blocks."""
    num_layers: int
    """Number of Transformer blocks."""
    num_heads: int
    """Number of attention heads."""
    num_kv_heads: int | None = None
    """Number of heads of keys and values, each shared by a group of query heads; None for num_heads."""
    head_dim: int | None = None
    """Features of a head; None for d_model / num_heads."""
    d_ff: int | None = None
    """Features inside the feed-forward layer; None for the multiple of 64 nearest to 8/3 d_model, or for 4 d_model with
    `ffn="silu"` and `ffn="relu2"`, which have two matrices instead of three."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths, in tokens / (2 pi)."""
    rope_scaling: tuple[float, ...] = ()
    """Slower rotations, for a context longer than the model was first trained with. One number, linear: divide all
    angles by it. Four numbers, Llama 3: the divisor of long wavelengths, then those wavelengths and the short ones,
    which are kept, as fractions 1/low and 1/high of the fourth number, the earlier context in tokens."""
    sliding_window: int | None = None
    """Number of tokens that a token attends to, itself and the last ones before it; None for all before it."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised (RMSNorm, with gains that the heads share) before RoPE."""
    norm: Literal["pre", "post", "none"] = "pre"
    """Position of RMSNorm: before each sublayer, after each residual sum, or no norm."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    positions: Literal["rope", "none"] = "rope"
    """Encoding of the token positions."""
    ffn: Literal["swiglu", "silu", "relu2"] = "swiglu"
    """The feed-forward layer: W2 (SiLU(W1 x) * W3 x), or W2 SiLU(W1 x), or W2 ReLU(W1 x)^2."""
    tied_embeddings: bool = False
    """Whether the output layer uses the embedding's matrix."""
    embedding_norm: bool = False
    """Whether the embeddings are normalised (RMSNorm without gains) before the first block."""
    value_embeddings: bool = False
    """Whether every second block, the last one included, has embeddings of its own, which are added to the values of
    its attention, with a gate for each head."""
    zero_outputs: bool = False
    """Whether the last matrix of each attention and feed-forward layer starts at zero, so that the blocks start as the
    identity."""

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = ["vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"]
        sizes += [name for name in ("head_dim", "sliding_window") if getattr(self, name) is not None]
        if self.d_ff is None:
            # Three matrices of 8/3 d_model features have as many parameters as two of 4 d_model.
            d_ff = 4 * self.d_model if self.ffn != "swiglu" else max(64, round(self.d_model * 8 / 3 / 64) * 64)
            object.__setattr__(self, "d_ff", d_ff)
        for name in sizes:
            if not getattr(self, name) >= 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_heads(self.d_model, self.num_heads, self.kv_heads, self.head_dim)
        if self.positions == "rope" and self.d_head % 2:
            raise InvalidConfigError(
                f"RoPE rotates pairs of features, so the head size must be even, got {self.d_head} "
                f"(d_model={self.d_model} / num_heads={self.num_heads}); change one of them or use positions='none'"
                if self.head_dim is None
                else f"RoPE rotates pairs of features, so head_dim must be even, got {self.head_dim}"
            )
        if not self.rope_theta > 0:
            raise InvalidConfigError(f"rope_theta must be a number > 0, got {self.rope_theta}")
        check_rope_scaling(self.rope_scaling)
        if not self.norm_eps >= 0:
            raise InvalidConfigError(f"norm_eps must be a number >= 0, got {self.norm_eps}")

    def __repr__(self) -> str:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return f"ModelConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    @property
    def d_head(self) -> int:
        """Features of one attention head, never None."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values, never None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def not_in_llama(self) -> list[str]:
        """The settings, such as "ffn='relu2'", that neither Llama nor its relatives have."""
        llama = {
            "norm": "pre",
            "positions": "rope",
            "ffn": "swiglu",
            "embedding_norm": False,
            "value_embeddings": False,
        }
        return [f"{name}={getattr(self, name)!r}" for name, value in llama.items() if getattr(self, name) != value]


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

    def forward(self, x: Float[Tensor, " ... d_in"]) -> Float[Tensor, " ... d_out"]:
        y = linear(x, self.weight)
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
    """Root-mean-square normalisation with a gain for each feature.

    Args:
        d_model: features of a token.
        eps: added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = check_number("eps", eps)
        self.weight = Parameter(torch.ones(check_size("d_model", d_model)))

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return rms_norm(x, self.weight, self.eps)


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

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer, (batch, heads, new, d_head); return those of all tokens so far."""
        end = self.length + keys.shape[-2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Keep the keys and values that the last forward pass has written."""
        self.length += num_tokens


class MultiHeadSelfAttention(Module):
    """Causal self-attention with several heads.

    Args:
        d_model: features of a token.
        num_heads: number of heads.
        rope: rotates queries and keys; None for no positions.
        num_kv_heads: number of heads of keys and values, each shared by a group of neighbouring query heads; None for
            num_heads.
        head_dim: features of a head; None for d_model / num_heads.
        bias: whether queries, keys and values have one.
        norm_eps: normalise queries and keys with this number added to their mean square; None for no norm.
        sliding_window: number of tokens that a token attends to, itself included; None for all before it.
        num_value_embeddings: number of token ids whose embeddings are added to the values; 0 for none.

    Raises:
        InvalidConfigError: `num_heads` does not divide `d_model`, or `num_kv_heads` does not divide `num_heads`.

    Source: Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer
    Models" (groups); Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2 (norm);
    Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (window); Zhou et al. 2024, "Value Residual
    Learning", and Karpathy's nanochat (value embeddings).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rope: RotaryPositionalEmbedding | None = None,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        norm_eps: float | None = None,
        sliding_window: int | None = None,
        num_value_embeddings: int = 0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        d_model, num_heads = check_size("d_model", d_model), check_size("num_heads", num_heads)
        num_kv_heads = check_integer("num_kv_heads", num_kv_heads)
        _check_heads(d_model, num_heads, num_kv_heads, head_dim)
        head_dim = d_model // num_heads if head_dim is None else check_size("head_dim", head_dim)
        self.num_heads, self.num_kv_heads, self.rope = num_heads, num_kv_heads, rope
        self.sliding_window = None if sliding_window is None else check_size("sliding_window", sliding_window)
        self.q_proj = Linear(d_model, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.output_proj = Linear(num_heads * head_dim, d_model)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.value_embeddings: Embedding | None = None
        if num_value_embeddings:
            # As large as the values, whose matrix keeps the size of normalised features.
            self.value_embeddings = Embedding(num_value_embeddings, num_kv_heads * head_dim)
            self.value_gate = Linear(min(_GATE_FEATURES, d_model), num_kv_heads)
            self.value_gate.weight.detach().zero_()

    def forward(
        self,
        x: Float[Tensor, " ... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        token_ids: Int[Tensor, " ... seq"] | None = None,
        document_starts: Int[Tensor, "... seq"] | None = None,
    ) -> Float[Tensor, " ... seq d_model"]:
        """Attend from every token to itself and the tokens before it.

        Args:
            x: features.
            token_positions: for RoPE only, by default counted from 0, or from the end of the cache; they broadcast
                against the leading dimensions of x.
            cache: keys and values of earlier tokens; those of x are added.
            layer: index of this layer in the cache.
            token_ids: of x, for value embeddings.
            document_starts: index of the first token of each token's document, before which it does not attend.
        """
        rope = None
        if self.rope is not None:
            rope = self.rope.tables(x, token_positions, first_position=0 if cache is None else cache.length)
        extend_cache, num_cached = (None, 0) if cache is None else (partial(cache.extend, layer), cache.length)
        w_q, w_k, w_v = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        values = None
        if self.value_embeddings is not None:
            assert token_ids is not None
            gates = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.weight.shape[1]]))  # 1 at the start
            values = rearrange(
                self.value_embeddings(token_ids).to(x.dtype), "... (head d) -> ... head d", head=self.num_kv_heads
            )
            values = gates.unsqueeze(-1) * values
        changes_heads = self.q_proj.bias is not None or self.q_norm is not None or values is not None
        attended = dispatch.causal_self_attention(
            x, w_q, w_k, w_v, self.num_heads, rope, extend_cache, num_cached=num_cached,
            change_heads=partial(self._change_heads, values) if changes_heads else None, window=self.sliding_window,
            document_starts=document_starts,
        )  # fmt: skip
        return self.output_proj(attended)

    def _change_heads(
        self, values: Float[Tensor, " ... kv_heads head_dim"] | None, qkv: Float[Tensor, " ... heads head_dim"]
    ) -> Float[Tensor, " ... heads head_dim"]:
        """Add biases, and embeddings to the values, and normalise the heads of queries and keys."""
        biases = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        if biases[0] is not None:
            qkv = qkv + torch.cat(biases).view(qkv.shape[-2:]).to(qkv.dtype)  # ty: ignore[invalid-argument-type]
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), -2)
        if values is not None:
            v = v + values
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return torch.cat((q, k, v), -2)


class SwiGLU(Module):
    """The gated feed-forward layer W2 (SiLU(W1 x) * W3 x).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return dispatch.swiglu(x, self.w1.weight, self.w2.weight, self.w3.weight)


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


_FEED_FORWARD = {"swiglu": SwiGLU, "silu": SiLUFeedForward, "relu2": SquaredReLUFeedForward}


class TransformerBlock(Module):
    """Attention and feed-forward layer, each added to the residual stream.

    Args:
        config: sizes and ablations.
        rope: shared by all blocks of a model; None for no positions.
        layer: index of the block in its model.

    Source: assignment, "The pre-norm Transformer block" and its ablations.
    """

    def __init__(self, config: ModelConfig, rope: RotaryPositionalEmbedding | None, layer: int = 0):
        super().__init__()
        has_values = config.value_embeddings and (config.num_layers - 1 - layer) % 2 == 0
        assert config.d_ff is not None  # set by __post_init__
        self.post_norm = config.norm == "post"
        self.dropout, self.recomputes = 0.0, False  # see TransformerLM.configure_training
        self.ln1 = make_norm(config)
        self.attn = MultiHeadSelfAttention(
            config.d_model,
            config.num_heads,
            rope,
            config.kv_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            norm_eps=config.norm_eps if config.qk_norm else None,
            sliding_window=config.sliding_window,
            num_value_embeddings=config.vocab_size if has_values else 0,
        )
        self.ln2 = make_norm(config)
        self.ffn = _FEED_FORWARD[config.ffn](config.d_model, config.d_ff)
        if config.zero_outputs:
            self.attn.output_proj.weight.detach().zero_()
            self.ffn.w2.weight.detach().zero_()

    def forward(
        self,
        x: Float[Tensor, " ... seq d_model"],
        cache: KVCache | None = None,
        layer: int = 0,
        token_ids: Int[Tensor, " ... seq"] | None = None,
        document_starts: Int[Tensor, "... seq"] | None = None,
    ) -> Float[Tensor, " ... seq d_model"]:
        if self.recomputes and cache is None and torch.is_grad_enabled():
            draws = self.dropout > 0 and self.training
            compute = partial(checkpoint, self._compute, use_reentrant=False, preserve_rng_state=draws)
            return compute(x, None, layer, token_ids, document_starts)
        return self._compute(x, cache, layer, token_ids, document_starts)

    def _compute(
        self, x: Tensor, cache: KVCache | None, layer: int, token_ids: Tensor | None, document_starts: Tensor | None
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._drop(self.attn(x, None, cache, layer, token_ids, document_starts))

        if self.post_norm:
            x = self.ln1(x + attend(x))
            return self.ln2(x + self._drop(self.ffn(x)))
        x = x + attend(self.ln1(x))
        return x + self._drop(self.ffn(self.ln2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        # Without gradients there is no dropout either: a run evaluates and samples between two steps.
        return dropout(x, self.dropout) if self.dropout and self.training and torch.is_grad_enabled() else x


class TransformerLM(Module):
    """A causal language model: from token ids to the logits of each next token.

    Args:
        config: the architecture.

    Source: assignment, "The full Transformer LM".
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_type("config", config, ModelConfig, "such as that of load_run, or ModelConfig(vocab_size=...)")
        self.config = config
        self.dropout = 0.0
        self.activation_dtype: torch.dtype | None = None
        """Dtype of the activations between embedding and loss; None for that of the weights."""
        # A tied matrix is the output layer too, where rows of norm 1 keep the initial logits small.
        embedding_std = config.d_model**-0.5 if config.tied_embeddings else 1.0
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, std=embedding_std)
        rope = None
        if config.positions == "rope":
            rope = RotaryPositionalEmbedding(
                config.rope_theta, config.d_head, config.context_length, config.rope_scaling
            )
        self.layers = ModuleList(TransformerBlock(config, rope, layer) for layer in range(config.num_layers))
        self.ln_final = make_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tied_embeddings:
            self.lm_head.weight = self.token_embeddings.weight

    def __repr__(self) -> str:
        weight = self.token_embeddings.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"TransformerLM({self.config}: {self.num_parameters:,} parameters, {dtype} on {weight.device})"

    def summary(self, context_length: int | None = None) -> Summary:
        """A table of the parameters and of their FLOPs per token (see `matmul_flops_per_token`)."""
        context_length = context_length or self.config.context_length
        return summarize(self, context_length, self.matmul_flops_per_token(context_length))

    def forward(
        self, token_ids: Int[Tensor, " batch seq"], cache: KVCache | None = None
    ) -> Float[Tensor, " batch seq vocab_size"]:
        """The logits of the token after each token.

        Args:
            token_ids: at most context_length of them, those in the cache included.
            cache: keys and values of earlier tokens; this pass writes to it, and the caller advances it.

        Raises:
            TypeError: `token_ids` is not a tensor of integers, or `cache` is not a KVCache.
            InvalidInputError: there are more tokens than context_length.
            IndexError: an id is outside the vocabulary (on the CPU; on a GPU, the logits become NaN).
        """
        check_ids(token_ids, "token_ids")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(
                f"cache must be a KVCache, got {type(cache).__name__}; for the loss of targets call "
                "model.loss(token_ids, targets)"
            )
        length = token_ids.shape[-1] + (0 if cache is None else cache.length)
        if length > self.config.context_length:
            raise InvalidInputError(
                f"{length} tokens do not fit into context_length={self.config.context_length}; pass the last ones only"
            )
        return self.lm_head(self.features(token_ids, cache))

    def configure_training(self, dropout: float = 0.0, activation_checkpointing: bool = False) -> None:
        """Set what training does differently; see the fields of `TrainConfig`."""
        self.dropout = dropout
        for block in self.modules():
            if isinstance(block, TransformerBlock):
                block.dropout, block.recomputes = dropout, activation_checkpointing

    def features(
        self,
        token_ids: Int[Tensor, " batch seq"],
        cache: KVCache | None = None,
        document_starts: Int[Tensor, " batch seq"] | None = None,
    ) -> Float[Tensor, " batch seq d_model"]:
        """The input of the output layer: the features after the last block and norm."""
        x = self.token_embeddings(token_ids).to(self.compute_dtype)
        if self.config.embedding_norm:
            x = rms_norm(x, x.new_ones(x.shape[-1]), self.config.norm_eps)
        if self.dropout and self.training and torch.is_grad_enabled():
            x = dropout(x, self.dropout)
        for layer, block in enumerate(self.layers):
            x = block(x, cache, layer, token_ids, document_starts)
        return self.ln_final(x)

    def loss(
        self,
        token_ids: Int[Tensor, " batch seq"],
        targets: Int[Tensor, " batch seq"],
        num_targets: Float[Tensor, ""] | None = None,
        document_starts: Int[Tensor, " batch seq"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy of the targets in nats per token, in at least float32.

        Args:
            token_ids: at most context_length in a row.
            targets: the token after each one, or -100 for a position that takes no part in the mean.
            num_targets: the number that the sum is divided by, if a batch is computed in several calls; None for the
                number of positions that take part.
            document_starts: index of the first token of each token's document, if a sequence has several, of which none
                attends to another; None for one.

        Returns:
            The mean. On a GPU, and in compiled code, NaN if an id or a target is outside the vocabulary.

        Raises:
            TypeError: an argument is not a tensor of integers.
            IndexError: an id or a target is outside the vocabulary (on the CPU).
        """
        x = self.features(token_ids, document_starts=document_starts)
        return dispatch.linear_cross_entropy(x, self.lm_head.weight, targets, num_targets=num_targets)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations, and so of keys and values."""
        return self.activation_dtype or self.token_embeddings.weight.dtype

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matmul_flops_per_token(self, context_length: int | None = None) -> int:
        """Floating-point operations of the matrix multiplications in a forward pass, for each token.

        (m, k) times (k, n) counts 2 m k n. Attention counts in full, without the half that the mask removes, since the
        plain operations compute it; a sliding window counts as the number of keys.

        Args:
            context_length: length of the sequence; by default the configuration's.
        """
        context_length = context_length or self.config.context_length
        in_matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        num_keys = min(context_length, self.config.sliding_window or context_length)
        in_attention = 2 * num_keys * self.config.num_heads * self.config.d_head * self.config.num_layers
        return 2 * (in_matrices + in_attention)


def make_norm(config: ModelConfig) -> Module:
    """RMSNorm, or the identity in the ablation without norms."""
    return Identity() if config.norm == "none" else RMSNorm(config.d_model, config.norm_eps)


def check_rope_scaling(scaling: tuple[float, ...]) -> None:
    if not (len(scaling) in (0, 1, 4) and all(0 < number < float("inf") for number in scaling)) or (
        len(scaling) == 4 and not scaling[1] < scaling[2]
    ):
        raise InvalidConfigError(
            "rope_scaling must be empty, the divisor of all angles, or Llama 3's four numbers (divisor, low < high "
            f"frequency factor, earlier context length), all > 0; got {scaling}"
        )


def _check_heads(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
    if head_dim is None and d_model % num_heads:
        raise InvalidConfigError(
            f"d_model={d_model} must be divisible by num_heads={num_heads}; change one of them (the remainder is "
            f"{d_model % num_heads}), or give head_dim"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise InvalidConfigError(
            f"num_kv_heads={num_kv_heads} must be at least 1 and divide num_heads={num_heads}; change one of them, or "
            "leave num_kv_heads out for as many"
        )


def _align_leading(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Insert dimensions of size 1 before the last, so that the leading ones align with the first ones of `shape`."""
    missing = len(shape) - positions.ndim
    fits = all(size in (1, wanted) for size, wanted in zip(positions.shape[:-1], shape, strict=False))
    if missing <= 0 or positions.ndim == 1 or not fits:
        return positions
    return positions.reshape(*positions.shape[:-1], *([1] * missing), positions.shape[-1])
