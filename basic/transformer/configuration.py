"""The architecture of a language model: its sizes, and what differs between Llama, its relatives and the ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from basic.common.config_files import check_fields, check_numbers, short_repr
from basic.common.errors import InvalidConfigError


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
    window_pattern: str = ""
    """Which blocks have the sliding window, as letters that are repeated over the blocks: S (short) for those that have
    it, L (long) for those that do not, such as SSSL; empty for all blocks."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias."""
    qk_norm: bool | Literal["all_heads"] = False
    """Whether each head of queries and keys is normalized (RMSNorm, with gains that the heads share) before RoPE;
    "all_heads": all heads of a token together, with a gain for each feature."""
    norm: Literal["pre", "post", "sublayer", "none"] = "pre"
    """Position of RMSNorm: before each sublayer, after each residual sum, after each sublayer and before its sum, or no
    norm."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    positions: Literal["rope", "none"] = "rope"
    """Encoding of the token positions."""
    ffn: Literal["swiglu", "silu", "relu2"] = "swiglu"
    """The feed-forward layer: W2 (SiLU(W1 x) * W3 x), or W2 SiLU(W1 x), or W2 ReLU(W1 x)^2."""
    tied_embeddings: bool = False
    """Whether the output layer uses the embedding's matrix."""
    embedding_norm: bool = False
    """Whether the embeddings are normalized (RMSNorm without gains) before the first block."""
    value_embeddings: bool = False
    """Whether every second block, the last one included, has embeddings of its own, which are added to the values of
    its attention, with a gate for each head."""
    zero_outputs: bool = False
    """Whether the last matrix of each attention and feed-forward layer starts at zero, so that the blocks start as the
    identity."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_ff is None:
            # Three matrices of 8/3 d_model features have as many parameters as two of 4 d_model.
            d_ff = 4 * self.d_model if self.ffn != "swiglu" else max(64, round(self.d_model * 8 / 3 / 64) * 64)
            object.__setattr__(self, "d_ff", d_ff)
        sizes = "vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff", "head_dim"
        check_numbers(self, (*sizes, "sliding_window"), 1)
        if not {*self.window_pattern} <= {"S", "L"} or (self.window_pattern and self.sliding_window is None):
            raise InvalidConfigError(
                "window_pattern must have the letters S (block with the sliding window) and L (without) only, and it "
                f"needs sliding_window; got {self.window_pattern!r} with sliding_window={self.sliding_window}"
            )
        check_heads(self.d_model, self.num_heads, self.kv_heads, self.head_dim)
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

    @property
    def d_head(self) -> int:
        """Features of one attention head, never None."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values, never None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def window(self, layer: int) -> int | None:
        """`sliding_window` of a block; None if it has none."""
        pattern = self.window_pattern or "S"
        return self.sliding_window if pattern[layer % len(pattern)] == "S" else None

    @property
    def not_in_llama(self) -> list[str]:
        """The settings, such as "ffn='relu2'", that neither Llama nor its relatives have."""
        llama: dict[str, Any] = {"norm": "pre", "positions": "rope", "ffn": "swiglu", "embedding_norm": False}
        llama |= {"value_embeddings": False, "window_pattern": ""}
        if self.norm == "sublayer":  # OLMo 2
            llama |= {"norm": "sublayer", "qk_norm": "all_heads", "qkv_bias": False, "sliding_window": None}
            llama |= {"head_dim": None}
        elif self.qk_norm == "all_heads":  # which only OLMo 2 has
            llama["qk_norm"] = False
        return [f"{name}={getattr(self, name)!r}" for name, value in llama.items() if getattr(self, name) != value]


def check_rope_scaling(scaling: tuple[float, ...]) -> None:
    if not (len(scaling) in (0, 1, 4) and all(0 < number < float("inf") for number in scaling)) or (
        len(scaling) == 4 and not scaling[1] < scaling[2]
    ):
        raise InvalidConfigError(
            "rope_scaling must be empty, the divisor of all angles, or Llama 3's four numbers (divisor, low < high "
            f"frequency factor, earlier context length), all > 0; got {scaling}"
        )


def check_heads(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
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
