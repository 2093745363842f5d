"""The Transformer language model: a Llama-like decoder (RMSNorm, RoPE, SwiGLU, no biases), from parameters up.

The modules hold parameters and wire operations together; the arithmetic is in `functional`. The losses and the
optimizer can be imported from here too, so that a notebook needs one line:
`from basic.model import TransformerLM, cross_entropy, AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.init import trunc_normal_

from basic.common.config_files import check_choices
from basic.common.errors import InvalidConfigError
from basic.transformer.functional import (
    causal_mask,
    linear,
    rms_norm,
    rope_tables,
    rotate_pairs,
    scaled_dot_product_attention,
    silu,
)
from basic.transformer.functional import cross_entropy as cross_entropy
from basic.transformer.functional import softmax as softmax
from basic.transformer.kernels import dispatch
from basic.transformer.optimizer import AdamW as AdamW
from basic.transformer.optimizer import clip_gradients as clip_gradients
from basic.transformer.optimizer import cosine_schedule as cosine_schedule
from basic.transformer.summary import Summary, summarize


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model, and the handout's ablations.

    Raises:
        InvalidConfigError: a size is not positive, the heads do not divide d_model, or RoPE meets an odd head size.
    """

    vocab_size: int
    """Number of token ids."""
    context_length: int
    """Most tokens the model looks at."""
    d_model: int
    """Features of a token between the layers."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads; they share d_model evenly."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each for a group of attention heads; None for one to each head."""
    d_ff: int | None = None
    """Features inside the feed-forward layer; None is the multiple of 64 nearest to 8/3 d_model, or 4 d_model for
    `ffn="silu"`, which has two matrices instead of three."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths, in tokens / (2 pi)."""
    norm: Literal["pre", "post", "none"] = "pre"
    """Where RMSNorm stands: before each sublayer, after each residual sum, or nowhere."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    positions: Literal["rope", "none"] = "rope"
    """How the model knows the order of its tokens."""
    ffn: Literal["swiglu", "silu"] = "swiglu"
    """The feed-forward layer: W2 (SiLU(W1 x) * W3 x), or W2 SiLU(W1 x)."""
    tied_embeddings: bool = False
    """Whether the output layer uses the embedding's matrix."""

    def __post_init__(self) -> None:
        if self.d_ff is None:
            # The least features at which three matrices cost what two of 4 d_model do is 8/3 d_model.
            d_ff = 4 * self.d_model if self.ffn == "silu" else max(64, round(self.d_model * 8 / 3 / 64) * 64)
            object.__setattr__(self, "d_ff", d_ff)
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"):
            if not getattr(self, name) >= 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise InvalidConfigError(
                f"d_model={self.d_model} must be divisible by num_heads={self.num_heads}; "
                f"change one of them (the remainder is {self.d_model % self.num_heads})"
            )
        _check_groups(self.num_heads, self.kv_heads)
        if self.positions == "rope" and self.d_head % 2:
            raise InvalidConfigError(
                f"RoPE rotates pairs of features, so the head size must be even, got {self.d_head} "
                f"(d_model={self.d_model} / num_heads={self.num_heads}); change one of them or use "
                "positions='none'"
            )
        if not self.rope_theta > 0:
            raise InvalidConfigError(f"rope_theta must be a number > 0, got {self.rope_theta}")
        if not self.norm_eps >= 0:
            raise InvalidConfigError(f"norm_eps must be a number >= 0, got {self.norm_eps}")
        check_choices(self)

    def __repr__(self) -> str:
        shown = [setting.name for setting in fields(self) if getattr(self, setting.name) != setting.default]
        return f"ModelConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def d_head(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; unlike `num_kv_heads` never None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class Linear(Module):
    """Multiply by a matrix, without a bias: x W^T.

    Args:
        d_in: features of the input.
        d_out: features of the output; the weight is (d_out, d_in).
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = Parameter(torch.empty(d_out, d_in))
        std = (2 / (d_in + d_out)) ** 0.5
        trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Float[Tensor, " ... d_in"]) -> Float[Tensor, " ... d_out"]:
        return linear(x, self.weight)


class Embedding(Module):
    """A row of features for each id.

    Args:
        vocab_size: number of ids.
        d_model: features of a row.
        std: standard deviation of the initial features.
    """

    def __init__(self, vocab_size: int, d_model: int, *, std: float = 1.0):
        super().__init__()
        self.weight = Parameter(torch.empty(vocab_size, d_model))
        trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, token_ids: Int[Tensor, " ..."]) -> Float[Tensor, " ... d_model"]:
        _check_range(token_ids, self.weight.shape[0], "token id", "vocab_size")
        return self.weight[token_ids]


class RMSNorm(Module):
    """Root-mean-square normalisation with a gain for each feature.

    Args:
        d_model: features of a token.
        eps: added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return rms_norm(x, self.weight, self.eps)


class Unchanged(Module):
    """Stands where a norm was taken out: returns its input."""

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return x


class RotaryPositionalEmbedding(Module):
    """RoPE: rotates the pairs of a query or key by angles that grow with its position.

    Args:
        theta: base of the wavelengths.
        d_k: features of a query or key, even.
        max_seq_len: positions go from 0 to max_seq_len - 1.

    Raises:
        ValueError: `d_k` is odd.
    """

    def __init__(self, theta: float, d_k: int, max_seq_len: int):
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE rotates pairs of features, so d_k must be even, got {d_k}")
        self.theta, self.d_k, self.max_seq_len = theta, d_k, max_seq_len
        # The default device is where the parameters made beside these tables lie.
        cos, sin = rope_tables(theta, d_k, max_seq_len, dtype=torch.float32, device=torch.get_default_device())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPositionalEmbedding:
        # `.to(...)`, `.bfloat16()` and the like come here. A table cast to bfloat16 would place tokens wrong, and
        # one cast up to float64 would keep float32's error: make it anew where and how it is wanted.
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.cos.dtype, torch.float32)
        self.cos, self.sin = rope_tables(self.theta, self.d_k, self.max_seq_len, dtype=dtype, device=self.cos.device)
        return self

    def forward(
        self, x: Float[Tensor, " ... seq d_k"], token_positions: Int[Tensor, "... seq"] | None = None
    ) -> Float[Tensor, " ... seq d_k"]:
        """Rotate each row of x by its position.

        Args:
            x: queries or keys.
            token_positions: their positions, by default 0 .. seq - 1. Leading dimensions are matched with the
                first ones of x, so that (batch, seq) serves (batch, heads, seq, d_k) too, or else broadcast
                from the right as usual.

        Raises:
            ValueError: x has more rows than there are positions, and is to be numbered by default.
            IndexError: a position outside 0 .. max_seq_len - 1 (on the CPU; a GPU stops with its own assertion).
        """
        if token_positions is None:
            if x.shape[-2] > self.max_seq_len:
                raise ValueError(f"{x.shape[-2]} tokens do not fit into max_seq_len={self.max_seq_len}")
            cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        else:
            _check_range(token_positions, self.max_seq_len, "position", "max_seq_len")
            token_positions = _match_leading(token_positions, x.shape[:-1])
            cos, sin = self.cos[token_positions], self.sin[token_positions]
        return rotate_pairs(x, cos, sin)


class KVCache:
    """Keys and values of the tokens a model has already seen, for every layer, at fixed size.

    The model writes each layer's new rows behind the `length` rows that count; `advance` makes them count. It is
    the caller who advances, once for a forward pass, because no single layer knows that it is the last.

    Args:
        config: shape of the model.
        batch_size: sequences that are continued side by side.
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
        """Write one layer's new rows (batch, heads, new, d_head), and return all its rows up to them."""
        end = self.length + keys.shape[-2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Let the rows written in the last forward pass count."""
        self.length += num_tokens


class MultiHeadSelfAttention(Module):
    """Causal self-attention with several heads, each on its own slice of the projected features.

    Args:
        d_model: features of a token.
        num_heads: they share d_model evenly.
        rope: rotates queries and keys; None for no positions.
        num_kv_heads: heads of keys and values, each for a group of neighbouring query heads; None for one to each.

    Raises:
        ValueError: the heads do not divide d_model, or those of keys and values do not divide the heads.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models" (the groups).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rope: RotaryPositionalEmbedding | None = None,
        num_kv_heads: int | None = None,
    ):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model} must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_groups(num_heads, self.num_kv_heads)
        kv_features = self.num_kv_heads * (d_model // num_heads)
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, kv_features)
        self.v_proj = Linear(d_model, kv_features)
        self.output_proj = Linear(d_model, d_model)
        self.rope = rope

    def forward(
        self,
        x: Float[Tensor, " ... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, " ... seq d_model"]:
        """Let every token look at itself and the tokens before it.

        Args:
            x: features; the first token stands at position 0, or behind the cached ones.
            token_positions: for RoPE only, by default counted from the first token on; they broadcast against
                the leading dimensions of x and sequence.
            cache: keys and values of earlier tokens, to which these are added.
            layer: which layer of the cache is this one's.
        """
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        if token_positions is None and cache is None and dispatch.cover_attention(x, len(weights[0]) // self.num_heads):
            tables = None if self.rope is None else (self.rope.cos, self.rope.sin)
            if self.num_kv_heads < self.num_heads:  # the kernels take parts of one size, so the rows are repeated
                sizes = {"head": self.num_kv_heads, "copies": self.num_heads // self.num_kv_heads}
                k, v = (repeat(w, "(head d) d_in -> (head copies d) d_in", **sizes) for w in weights[1:])
                weights = weights[0], k, v
            attended = dispatch.rotary_attention(x, weights, self.num_heads, tables)
        else:
            attended = self._attend(linear(x, *weights), token_positions, cache, layer)
        return self.output_proj(rearrange(attended, "... seq head d -> ... seq (head d)"))

    def _attend(
        self, qkv: Tensor, token_positions: Tensor | None, cache: KVCache | None, layer: int
    ) -> Float[Tensor, " ... seq head d"]:
        heads = rearrange(  # of queries, then of keys, then of values
            qkv, "... seq (heads d) -> ... heads seq d", heads=self.num_heads + 2 * self.num_kv_heads
        )
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-3)
        if self.rope is not None:
            if token_positions is None and cache is not None:
                token_positions = torch.arange(cache.length, cache.length + q.shape[-2], device=q.device)
            if token_positions is not None and token_positions.ndim > 1:
                # The same for every head. Ones in front hold the other axes where broadcasting against x puts
                # them, now that there is an axis more.
                missing = q.ndim - 2 - token_positions.ndim
                token_positions = token_positions.unsqueeze(-2)[(None,) * missing]
            q, k = self.rope(q, token_positions), self.rope(k, token_positions)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if self.num_kv_heads < self.num_heads:
            k, v = self._for_each_query_head(k, dim=-3), self._for_each_query_head(v, dim=-3)
        mask = causal_mask(q.shape[-2], k.shape[-2], device=q.device)
        return rearrange(scaled_dot_product_attention(q, k, v, mask), "... head seq d -> ... seq head d")

    def _for_each_query_head(self, kv: Tensor, dim: int) -> Tensor:
        """Repeat the heads of keys or values along `dim`, so that neighbouring query heads have the same one."""
        return kv.repeat_interleave(self.num_heads // self.num_kv_heads, dim)


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
        return dispatch.swiglu_linear(linear(x, self.w1.weight, self.w3.weight), self.w2.weight)


class SiLUFeedForward(Module):
    """The feed-forward layer without a gate, W2 SiLU(W1 x): the handout's ablation."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, " ... d_model"]) -> Float[Tensor, " ... d_model"]:
        return self.w2(silu(self.w1(x)))


class TransformerBlock(Module):
    """Attention and feed-forward layer, each added to the stream it reads from.

    Args:
        config: sizes, and where the norms stand.
        rope: shared by all blocks of a model; None for no positions.

    Source: handout, "The pre-norm Transformer block" and its ablations.
    """

    def __init__(self, config: ModelConfig, rope: RotaryPositionalEmbedding | None):
        super().__init__()
        feed_forward = SwiGLU if config.ffn == "swiglu" else SiLUFeedForward
        assert config.d_ff is not None  # its __post_init__ saw to that
        self.post_norm = config.norm == "post"
        self.ln1 = make_norm(config)
        self.attn = MultiHeadSelfAttention(config.d_model, config.num_heads, rope, config.kv_heads)
        self.ln2 = make_norm(config)
        self.ffn = feed_forward(config.d_model, config.d_ff)

    def forward(
        self, x: Float[Tensor, " ... seq d_model"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, " ... seq d_model"]:
        if self.post_norm:
            x = self.ln1(x + self.attn(x, cache=cache, layer=layer))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), cache=cache, layer=layer)
        return x + self.ffn(self.ln2(x))


class TransformerLM(Module):
    """A causal language model: token ids in, scores for each next token out.

    Args:
        config: its shape.

    Source: handout, "The full Transformer LM".
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        """Precision of everything between embedding and loss; None for that of the weights."""
        # A tied matrix is read as output layer too, where rows of norm 1 keep the first logits small.
        embedding_std = config.d_model**-0.5 if config.tied_embeddings else 1.0
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, std=embedding_std)
        rope = None
        if config.positions == "rope":
            rope = RotaryPositionalEmbedding(config.rope_theta, config.d_head, config.context_length)
        self.layers = ModuleList(TransformerBlock(config, rope) for _ in range(config.num_layers))
        self.ln_final = make_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tied_embeddings:
            self.lm_head.weight = self.token_embeddings.weight

    def __repr__(self) -> str:
        weight = self.token_embeddings.weight
        where = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        return f"TransformerLM({self.config}: {self.num_parameters:,} parameters, {where})"

    def summary(self, context_length: int | None = None) -> Summary:
        """A table of the parameters and of the operations for each token, as for `matmul_flops_per_token`."""
        context_length = context_length or self.config.context_length
        return summarize(self, context_length, self.matmul_flops_per_token(context_length))

    def forward(
        self, token_ids: Int[Tensor, " batch seq"], cache: KVCache | None = None
    ) -> Float[Tensor, " batch seq vocab_size"]:
        """The scores (logits, not normalised) of every token's successor.

        Args:
            token_ids: at most context_length of them, the cached ones included.
            cache: keys and values of the tokens before these; this pass writes to it, the caller advances it.

        Raises:
            ValueError: more tokens than the context holds.
            IndexError: an id outside the vocabulary (on the CPU; a GPU stops with its own assertion).
        """
        length = token_ids.shape[-1] + (0 if cache is None else cache.length)
        if length > self.config.context_length:
            raise ValueError(
                f"{length} tokens do not fit into context_length={self.config.context_length}; pass the last ones only"
            )
        return self.lm_head(self.features(token_ids, cache))

    def features(
        self, token_ids: Int[Tensor, " batch seq"], cache: KVCache | None = None
    ) -> Float[Tensor, " batch seq d_model"]:
        """What the output layer reads: each token's features after all blocks, in the activations' precision."""
        x = self.token_embeddings(token_ids).to(self.compute_dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, cache, layer)
        return self.ln_final(x)

    def loss(self, token_ids: Int[Tensor, " batch seq"], targets: Int[Tensor, " batch seq"]) -> Float[Tensor, ""]:
        """The mean cross-entropy of the targets, float32, in nats a token."""
        return dispatch.linear_cross_entropy(self.features(token_ids), self.lm_head.weight, targets)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the activations, and so of keys and values."""
        return self.activation_dtype or self.token_embeddings.weight.dtype

    @property
    def num_parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matmul_flops_per_token(self, context_length: int | None = None) -> int:
        """Floating-point operations of the matrix products in a forward pass, for each token.

        A product of (m, k) and (k, n) counts 2 m k n. Attention is counted in full, without the half that the
        mask takes away: the plain operations do compute it.

        Args:
            context_length: tokens in the sequence; by default the most that the model takes.
        """
        context_length = context_length or self.config.context_length
        matrices = [module.weight.numel() for module in self.modules() if isinstance(module, Linear)]
        scores_and_values = 2 * context_length * self.config.d_model * self.config.num_layers
        return 2 * (sum(matrices) + scores_and_values)


def make_norm(config: ModelConfig) -> Module:
    """RMSNorm, or nothing where the configuration takes the norms out."""
    return Unchanged() if config.norm == "none" else RMSNorm(config.d_model, config.norm_eps)


def _check_groups(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must be at least 1 and divide num_heads={num_heads}; change one of them, or "
            "leave num_kv_heads out for as many"
        )


def _check_range(ids: Tensor, limit: int, what: str, limit_name: str) -> None:
    """Raise IndexError for an index outside 0 .. limit - 1 (a negative one would silently count from the end).

    Only where looking is free: on a GPU it would wait for the device, and a compiled graph cannot branch on it.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    lowest, highest = ids.min().item(), ids.max().item()
    if lowest < 0 or highest >= limit:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(f"{what} {wrong} is outside 0 .. {limit - 1} ({limit_name}={limit})")


def _match_leading(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give positions the rank of `shape`, matching leading dimensions from the left where their sizes allow it."""
    while positions.ndim > len(shape) and positions.shape[0] == 1:
        positions = positions.squeeze(0)  # or the result would have a dimension more than the features
    missing = len(shape) - positions.ndim
    fits = all(size in (1, wanted) for size, wanted in zip(positions.shape[:-1], shape, strict=False))
    if missing <= 0 or positions.ndim == 1 or not fits:
        return positions
    return positions.reshape(*positions.shape[:-1], *([1] * missing), positions.shape[-1])
