"""The Transformer language model: Llama's architecture (RMSNorm, RoPE, SwiGLU), and what its relatives add to it.

The modules have the parameters; the formulas are in `basic.transformer.functional`, one function each. Attention,
SwiGLU and the loss are called through `dispatch`, which calls a GPU kernel where there is one, else the function of the
same name in `functional`. All of them, the configuration, the loss and the optimizer can be imported from here:
`from basic.model import ModelConfig, TransformerLM, cross_entropy, AdamW`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.utils.checkpoint import checkpoint

from basic.common.arguments import check_integer, check_size, check_type
from basic.common.errors import InvalidInputError
from basic.transformer.attention import AttentionOptions
from basic.transformer.configuration import ModelConfig, check_heads
from basic.transformer.functional import check_ids, cross_entropy, dropout, softmax
from basic.transformer.kernels import dispatch
from basic.transformer.layers import (
    FEED_FORWARD,
    Embedding,
    KVCache,
    LayerCache,
    Linear,
    RMSNorm,
    RotaryPositionalEmbedding,
    SiLUFeedForward,
    SwiGLU,
    make_norm,
    norm_heads,
)
from basic.transformer.optimizer import AdamW, clip_gradients, cosine_schedule
from basic.transformer.summary import Summary, summarize

__all__ = ["AdamW", "Embedding", "KVCache", "Linear", "ModelConfig", "MultiHeadSelfAttention", "RMSNorm"]
__all__ += ["RotaryPositionalEmbedding", "SiLUFeedForward", "SwiGLU", "TransformerBlock", "TransformerLM"]
__all__ += ["clip_gradients", "cosine_schedule", "cross_entropy", "softmax"]

_GATE_FEATURES = 32
"""Features of a token, the first ones, that set the gates of its value embeddings."""


class MultiHeadSelfAttention(Module):
    """Causal self-attention with several heads.

    Args:
        d_model: features of a token.
        num_heads: number of heads.
        rope: rotates queries and keys; None for no positions.
        num_kv_heads: number of heads of keys and values, each shared by a group of neighboring query heads; None for
            num_heads.
        head_dim: features of a head; None for d_model / num_heads.
        bias: whether queries, keys and values have one.
        norm_eps: normalize queries and keys with this number added to their mean square; None for no norm.
        norm_all_heads: normalize all heads of a token together instead of each.
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
        norm_all_heads: bool = False,
        sliding_window: int | None = None,
        num_value_embeddings: int = 0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        d_model, num_heads = check_size("d_model", d_model), check_size("num_heads", num_heads)
        num_kv_heads = check_integer("num_kv_heads", num_kv_heads)
        check_heads(d_model, num_heads, num_kv_heads, head_dim)
        head_dim = d_model // num_heads if head_dim is None else check_size("head_dim", head_dim)
        self.num_heads, self.num_kv_heads, self.rope = num_heads, num_kv_heads, rope
        self.sliding_window = None if sliding_window is None else check_size("sliding_window", sliding_window)
        self.q_proj = Linear(d_model, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.fp8: Any = None  # the three above, joined in 8 bits by training
        self.output_proj = Linear(num_heads * head_dim, d_model)
        self.q_norm = self.k_norm = None
        if norm_eps is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(head_dim * (heads if norm_all_heads else 1), norm_eps) for heads in (num_heads, num_kv_heads)
            )
        self.value_embeddings: Embedding | None = None
        if num_value_embeddings:
            # As large as the values, whose matrix keeps the size of normalized features.
            self.value_embeddings = Embedding(num_value_embeddings, num_kv_heads * head_dim)
            self.value_gate = Linear(min(_GATE_FEATURES, d_model), num_kv_heads)
            self.value_gate.weight.detach().zero_()

    def forward(
        self,
        x: Float[Tensor, " ... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: LayerCache | None = None,
        token_ids: Int[Tensor, " ... seq"] | None = None,
        document_starts: Int[Tensor, "... seq"] | None = None,
    ) -> Float[Tensor, " ... seq d_model"]:
        """Attend from every token to itself and the tokens before it.

        Args:
            x: features.
            token_positions: for RoPE only, by default counted from 0, or from the end of the cache; they broadcast
                against the leading dimensions of x.
            cache: keys and values of earlier tokens; those of x are added.
            token_ids: of x, for value embeddings.
            document_starts: index of the first token of each token's document, before which it does not attend.
        """
        values = None
        if self.value_embeddings is not None:
            assert token_ids is not None
            gates = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.weight.shape[1]]))  # 1 at the start
            values = rearrange(
                self.value_embeddings(token_ids).to(x.dtype), "... (head d) -> ... head d", head=self.num_kv_heads
            )
            values = gates.unsqueeze(-1) * values
        changes_heads = self.q_proj.bias is not None or self.q_norm is not None or values is not None
        num_cached = 0 if cache is None else cache.length
        options = AttentionOptions(
            num_heads=self.num_heads,
            rope=None if self.rope is None else self.rope.tables(x, token_positions, first_position=num_cached),
            window=self.sliding_window,
            document_starts=document_starts,
            change_heads=partial(self._change_heads, values) if changes_heads else None,
            extend_cache=None if cache is None else cache.extend,
            num_cached=num_cached,
            fp8=self.fp8,
        )
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        attended = dispatch.causal_self_attention(x, *weights, options)
        return self.output_proj(attended)

    def _change_heads(
        self, values: Float[Tensor, " ... kv_heads head_dim"] | None, qkv: Float[Tensor, " ... heads head_dim"]
    ) -> Float[Tensor, " ... heads head_dim"]:
        """Add biases, and embeddings to the values, and normalize the heads of queries and keys."""
        biases = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        if biases[0] is not None:
            qkv = qkv + torch.cat(biases).view(qkv.shape[-2:]).to(qkv.dtype)  # ty: ignore[invalid-argument-type]
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), -2)
        if values is not None:
            v = v + values
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)
        return torch.cat((q, k, v), -2)


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
        self.norm = config.norm
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
            norm_all_heads=config.qk_norm == "all_heads",
            sliding_window=config.window(layer),
            num_value_embeddings=config.vocab_size if has_values else 0,
        )
        self.ln2 = make_norm(config)
        self.ffn = FEED_FORWARD[config.ffn](config.d_model, config.d_ff)
        if config.zero_outputs:
            self.attn.output_proj.weight.detach().zero_()
            self.ffn.w2.weight.detach().zero_()

    def forward(
        self,
        x: Float[Tensor, " ... seq d_model"],
        cache: LayerCache | None = None,
        token_ids: Int[Tensor, " ... seq"] | None = None,
        document_starts: Int[Tensor, "... seq"] | None = None,
    ) -> Float[Tensor, " ... seq d_model"]:
        if self.recomputes and cache is None and torch.is_grad_enabled():
            draws = self.dropout > 0 and self.training
            compute = partial(checkpoint, self._compute, use_reentrant=False, preserve_rng_state=draws)
            return compute(x, None, token_ids, document_starts)
        return self._compute(x, cache, token_ids, document_starts)

    def _compute(
        self, x: Tensor, cache: LayerCache | None, token_ids: Tensor | None, document_starts: Tensor | None
    ) -> Tensor:
        attend = partial(self.attn, cache=cache, token_ids=token_ids, document_starts=document_starts)
        if self.norm == "sublayer":
            x = x + self.ln1(_drop(self, attend(x)))
            return x + self.ln2(_drop(self, self.ffn(x)))
        if self.norm == "post":
            x = self.ln1(x + _drop(self, attend(x)))
            return self.ln2(x + _drop(self, self.ffn(x)))
        x = x + _drop(self, attend(self.ln1(x)))
        return x + _drop(self, self.ffn(self.ln2(x)))


def _drop(module: TransformerBlock | TransformerLM, x: Tensor) -> Tensor:
    # Without gradients there is no dropout either: a run evaluates and samples between two steps.
    return dropout(x, module.dropout) if module.dropout and module.training and torch.is_grad_enabled() else x


class TransformerLM(Module):
    """A causal language model: from token ids to the logits of each next token.

    Args:
        config: the architecture, such as `ModelConfig(vocab_size=1000, context_length=64, d_model=64, num_layers=2,
            num_heads=4)`.

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
        return self.ln_final(self._compute_blocks(token_ids, cache, document_starts))

    # Training compiles `_embed`, the blocks and `_loss_after_blocks`, each by itself.

    def _embed(self, token_ids: Tensor) -> Tensor:
        x = self.token_embeddings(token_ids).to(self.compute_dtype)
        if self.config.embedding_norm:
            x = dispatch.rms_norm(x, x.new_ones(x.shape[-1]), self.config.norm_eps)
        return _drop(self, x)

    def _compute_blocks(self, token_ids: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        x = self._embed(token_ids)
        for layer, block in enumerate(self.layers):
            x = block(x, None if cache is None else cache.of_layer(layer), token_ids, document_starts)
        return x

    def _loss_after_blocks(self, x: Tensor, targets: Tensor, num_targets: Tensor | None) -> Tensor:
        return dispatch.linear_cross_entropy(self.ln_final(x), self.lm_head.weight, targets, num_targets=num_targets)

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
        return self._loss_after_blocks(self._compute_blocks(token_ids, None, document_starts), targets, num_targets)

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
        windows = (self.config.window(layer) or context_length for layer in range(self.config.num_layers))
        num_keys = sum(min(context_length, window) for window in windows)
        in_attention = 2 * num_keys * self.config.num_heads * self.config.d_head
        return 2 * (in_matrices + in_attention)
