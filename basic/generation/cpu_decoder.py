"""Single steps of generation on a CPU: few calls of kernels, and weights of as few bytes as their numbers allow.

A token reads all weights and computes little. So a matrix whose numbers are all bfloat16 ones, as in most published
models, is kept in 16 bits, whatever the model's own dtype is, and multiplied in float32: the same sums to the last bit,
from half of the bytes. Python's own work, most of it out of the caches, would take a third of the time: here it is one
loop over calls that are prepared for all tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleList

from basic.common.native.kernel import PreparedCall
from basic.generation.decoder import Decoder
from basic.model import KVCache, ModelConfig, MultiHeadSelfAttention, TransformerBlock, TransformerLM
from basic.transformer.cpu import decode_kernels, kernels
from basic.transformer.functional import linear
from basic.transformer.kernels import dispatch
from basic.transformer.layers import FEED_FORWARD, Embedding, Identity, Linear, RMSNorm, RotaryPositionalEmbedding

_MODULES: tuple[type, ...] = (TransformerLM, TransformerBlock, MultiHeadSelfAttention, RotaryPositionalEmbedding)
_MODULES += ModuleList, Embedding, Linear, RMSNorm, Identity, *FEED_FORWARD.values()

_DTYPES = torch.float32, torch.bfloat16
_MAX_ROWS, _MAX_NARROW_ROWS = 16, 28
"""Tokens, of all sequences together, up to which the kernel is faster than the BLAS: with weights of 32 and 16 bits."""
_WIDENED_ROWS = 256
"""Rows of a matrix of 16 bits that are widened at a time for the BLAS."""
_MAX_PROMPT = 64
"""Tokens, of all sequences together, of a prompt that is read here. The model reads more of them faster, since its
attention computes with several tokens at a time."""
_PASSES_BEFORE_COPY = 4
"""Passes with weights of 32 bits before those that fit are copied to 16, which takes as long as these passes."""
_MIN_NUMBERS = 1 << 17
"""Numbers of a matrix, or of keys and values, for which it pays to wake other threads."""

_Matrices: TypeAlias = "dict[tuple[Linear, ...], tuple[Tensor, ...]]"
"""Weights in 16 bits, by their layers (`_layers_of_one_input`)."""


def make_cpu_decoder(model: TransformerLM, batch_size: int) -> CpuDecoder | None:
    """The decoder of a float32 or bfloat16 model, none of whose modules a user has changed; else None."""
    tensors = *model.parameters(), *model.buffers()
    if not (dispatch.takes_cpu_operators(*tensors, dtypes=_DTYPES) and all(x.is_contiguous() for x in tensors)):
        return None
    if model.compute_dtype not in _DTYPES or len({parameter.dtype for parameter in model.parameters()}) > 1:
        return None
    usual = {"multiply": linear, "compute": dispatch.swiglu, "norm": model.config.norm}
    for module in model.modules():
        own = vars(module)
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in own
        if hooks or any(own.get(k, value) != value for k, value in usual.items()) or type(module) not in _MODULES:
            return None
    return CpuDecoder(model, batch_size) if _shapes(model) == _shapes_of(model.config) else None


def _shapes(model: TransformerLM) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


@cache
def _shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Those of a model that nobody has changed: other layers may be larger, or have a bias."""
    with torch.device("meta"):
        return _shapes(TransformerLM(config))


class CpuDecoder(Decoder):
    """The model's logits in few calls of kernels.

    Everything but the weights is float32, and so are the logits. For a float32 model these are the model's own, within
    rounding. For one that computes in bfloat16 they are those of its weights in float32: closer to the exact ones than
    the model's own, whose activations are rounded to 8 bits after each operation.

    Args:
        model: see `make_cpu_decoder`. Its weights must not change.
        batch_size: number of sequences.
    """

    cache: KVCache

    def __init__(self, model: TransformerLM, batch_size: int):
        super().__init__(copy.copy(model), KVCache(model.config, batch_size))  # a copy of the same modules
        self._owner, self.model.activation_dtype = model, torch.float32
        self._matrices: _Matrices = {}
        self._passes: dict[int, _Pass] = {}  # by the number of tokens of each sequence
        self._num_passes, self._memory = 0, None

    def read(self, ids: Int[Tensor, " batch length"]) -> Float[Tensor, "batch vocab_size"]:
        new = ids[:, self.num_read :]
        logits = self._logits(new)
        self.cache.advance(new.shape[1])
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        """Those of the token after these, the first of which are at the position `num_read`."""
        if ids.shape[1] > 1 and ids.numel() > _MAX_PROMPT:
            return self.model.lm_head(self.model.features(ids, self.cache)[:, -1])
        if self._num_passes == _PASSES_BEFORE_COPY:
            self._copy_to_16_bits()
        self._num_passes += 1
        if (one_pass := self._passes.get(ids.shape[1])) is None:
            one_pass = self._passes[ids.shape[1]] = _Pass(self.model, self.cache, ids.shape[1], self._matrices)
        return one_pass.logits(ids)

    def _copy_to_16_bits(self) -> None:
        """Copy each float32 matrix whose numbers are bfloat16 ones."""
        groups = [group for block in self.model.layers for group in _layers_of_one_input(block)]
        groups.append((self.model.lm_head,))
        count = sum(layer.weight.numel() for group in groups for layer in group)
        is_wide = self.model.lm_head.weight.dtype == torch.float32
        if not is_wide or self.cache.keys.shape[1] > _MAX_ROWS or not _is_free(2 * count):
            return
        memory = _idle_memory.pop(self._owner, None)
        try:  # NumPy asks for large pages, with which a core reads 15 instead of 12 GB/s
            self._memory = np.empty(count, np.uint16) if memory is None or len(memory) != count else memory
        except MemoryError:
            return
        free = torch.from_numpy(self._memory).view(torch.bfloat16)
        for group in groups:
            sizes = [layer.weight.numel() for layer in group]
            *parts, rest = free.split([*sizes, len(free) - sum(sizes)])
            copies = [part.view(layer.weight.shape) for part, layer in zip(parts, group, strict=True)]
            if all(_copy(layer.weight.detach(), to) for layer, to in zip(group, copies, strict=True)):
                self._matrices[group], free = tuple(copies), rest
        if self._matrices:
            self._passes.clear()

    def close(self, model: TransformerLM) -> None:
        """Keep the memory of the copies for the next decoder of the model: new memory takes up to ten times as long."""
        if self._matrices and self._memory is not None:
            _idle_memory[model], self._memory = self._memory, None
        self._passes.clear()


_idle_memory: WeakKeyDictionary[TransformerLM, np.ndarray] = WeakKeyDictionary()


def _is_free(num_bytes: int) -> bool:
    """Whether the machine has twice so much memory left, as far as it says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 2 * num_bytes < next(1024 * int(line.split()[1]) for line in file if "MemAvailable" in line)
    except (OSError, StopIteration):
        return True


def _empty(*sizes: int) -> Tensor:
    """Memory for the kernels, whatever torch's default dtype is."""
    return torch.empty(sizes, dtype=torch.float32)


def _layers_of_one_input(block: Any) -> list[tuple[Linear, ...]]:
    """The matrices of a block, those together that are multiplied by the same features."""
    attn, ffn = block.attn, block.ffn
    up = (ffn.w1, ffn.w3) if isinstance(ffn, FEED_FORWARD["swiglu"]) else (ffn.w1,)
    return [(attn.q_proj, attn.k_proj, attn.v_proj), (attn.output_proj,), up, (ffn.w2,)]


def _copy(weight: Tensor, to: Tensor) -> bool:
    """Copy float32 numbers to bfloat16; returns whether they are equal there."""
    lost = np.zeros(1, np.int64)
    arguments = np.zeros(1, np.int64), weight.view(-1), to.view(-1), lost
    decode_kernels.copy_upper_halves(*arguments, num_threads=torch.get_num_threads())
    return not lost[0]


def _add_widened(y: Tensor, x: Tensor, weight: Tensor, *, beta: int) -> None:
    """y = beta y + x W, with W (d_in, d_out) in bfloat16: widened in parts that stay in the cache."""
    for columns, part in zip(weight.split(_WIDENED_ROWS, 1), y.split(_WIDENED_ROWS, 1), strict=True):
        part.addmm_(x, columns.float(), beta=beta)


class _Pass:
    """The calls for some tokens of each sequence.

    Args:
        num_tokens: of each sequence.
        matrices: the weights in 16 bits that there are.
    """

    def __init__(self, model: TransformerLM, cache: KVCache, num_tokens: int, matrices: _Matrices):
        config, B, T = model.config, cache.keys.shape[1], num_tokens
        assert config.d_ff is not None  # set by __post_init__
        N = B * T
        self.model, self.cache, self.matrices, self.num_tokens = model, cache, matrices, num_tokens
        self.position, self.ids = np.zeros(1, np.int64), torch.empty(N, dtype=torch.int64)
        # One for each call of a kernel: norms, norms of heads, attention, SwiGLU and multiplications.
        self.counters = np.zeros(((2 * N + 8) * config.num_layers + 3, 1), np.int64)
        self._unused_counters = iter(self.counters)
        self.sizes = [heads * config.d_head for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.x, self.normed = _empty(N, config.d_model), _empty(N, config.d_model)
        self.scales = _empty(max(N, config.num_heads))
        self.projected, self.attended = _empty(N, sum(self.sizes)), _empty(N, self.sizes[0])
        gates = 2 if config.ffn == "swiglu" else 1
        self.hidden, self.gated = _empty(N, gates * config.d_ff), _empty(N, config.d_ff)
        self.scores, self.output = _empty(*cache.keys.shape[1:4]), _empty(B, config.vocab_size)
        self.calls: list[Callable[[], object]] = [self._take_rows(model.token_embeddings.weight, self.x)]
        if config.embedding_norm:
            self._normalize(torch.ones(config.d_model, dtype=torch.float32), config.norm_eps, self.x, self.x)
        layers: Any = model.layers
        for index, block in enumerate(layers):
            qkv, output, up, down = _layers_of_one_input(block)
            self._add_sublayer(block.ln1, partial(self._add_attention, block.attn, index, qkv), output)
            self._add_sublayer(block.ln2, partial(self._add_feed_forward, config.ffn, up), down)
        last = self._norm(model.ln_final, self.x, self.normed)
        if T > 1:
            every, last = last, _empty(B, config.d_model)
            self.calls.append(partial(last.copy_, every[T - 1 :: T]))
        self._multiply(last, (model.lm_head,), self.output)

    def logits(self, ids: Tensor) -> Tensor:
        self.counters[:], self.position[0] = 0, self.cache.length
        self.ids.view(ids.shape).copy_(ids)
        for call in self.calls:
            call()
        return self.output

    def _take_rows(self, table: Tensor, to: Tensor) -> Callable[[], object]:
        """A call that copies the embeddings of the ids."""
        if table.dtype == torch.float32:
            return partial(torch.index_select, table.detach(), 0, self.ids, out=to)
        ids = self.ids  # not self, which would keep all memory until Python looks for circles
        return lambda: to.copy_(table.index_select(0, ids))

    def _multiply(self, x: Tensor, layers: tuple[Linear, ...], y: Tensor, add: bool = False) -> None:
        """Write, or add, to y the products of x and the matrices of some layers side by side."""
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        if biases:
            self.calls.append(partial(y.copy_, torch.cat(biases).detach()))
        add, weights = add or bool(biases), tuple(layer.weight.detach() for layer in layers)
        if len(x) <= _MAX_ROWS:
            weights = self.matrices.get(layers, weights)
        is_wide = weights[0].dtype == torch.float32
        if len(x) > (_MAX_ROWS if is_wide else _MAX_NARROW_ROWS):  # operations are the limit: the BLAS is faster
            for weight, part in zip(weights, y.split([len(weight) for weight in weights], 1), strict=True):
                multiply = part.addmm_ if is_wide else partial(_add_widened, part)
                self.calls.append(partial(multiply, x, weight.T, beta=int(add)))
            return
        outputs, num_threads = y.shape[1], torch.get_num_threads()
        num_threads = num_threads if outputs * x.shape[1] >= _MIN_NUMBERS else 1
        # Long chunks: what is requested ahead of a chunk's end is read in vain.
        chunk = max(1, -(-outputs // (2 * num_threads * 16))) * 16
        three = *weights, *[weights[0][:0]] * (3 - len(weights))  # another number would be another kernel to compile
        arguments = next(self._unused_counters), x, three, chunk, int(add), y
        self.calls.append(partial(PreparedCall(decode_kernels.multiply, *arguments), num_threads))

    def _add_sublayer(self, ln: Module, add: Callable[[Tensor], Tensor], output: tuple[Linear, ...]) -> None:
        """Attention or feed-forward layer: `add` adds the calls for its input, and returns what `output` multiplies."""
        x, normed, norm = self.x, self.normed, self.model.config.norm
        result = add(self._norm(ln, x, normed) if norm == "pre" else x)
        if norm == "sublayer":
            self._multiply(result, output, normed)
            self.calls.append(partial(x.add_, self._norm(ln, normed, normed)))
        else:
            self._multiply(result, output, x, add=True)
            if norm == "post":
                self._norm(ln, x, x)

    def _norm(self, norm: Module, x: Tensor, y: Tensor) -> Tensor:
        """Where the normalized x is: in y, if it is normalized at all."""
        if not isinstance(norm, RMSNorm):
            return x
        self._normalize(norm.weight, norm.eps, x, y)
        return y

    def _normalize(self, weight: Tensor, eps: float, x: Tensor, y: Tensor) -> None:
        arguments = next(self._unused_counters), x, weight.detach().float(), eps, y, self.scales[: len(x)]
        self.calls.append(PreparedCall(kernels.norm_forward, *arguments))

    def _add_attention(self, attn: MultiHeadSelfAttention, index: int, layers: tuple[Linear, ...], x: Tensor) -> Tensor:
        self._multiply(x, layers, self.projected)
        parts = self.projected.split(self.sizes, 1)
        if attn.value_embeddings is not None:
            self._add_value_embeddings(attn, x, parts[2])
        for norm, part in ((attn.q_norm, parts[0]), (attn.k_norm, parts[1])):
            if norm is not None:
                for row in part:  # the heads of a token are side by side, those of several are not
                    heads = row.view(-1, norm.weight.numel())
                    self._normalize(norm.weight, norm.eps, heads, heads)
        cache = self.cache
        keys, values = cache.keys[index], cache.values[index]
        qkv, o = (x.view(len(keys), self.num_tokens, -1, keys.shape[-1]) for x in (self.projected, self.attended))
        no_angles = _empty(keys.shape[-2], 0)
        angles = (no_angles, no_angles) if attn.rope is None else (attn.rope.cos, attn.rope.sin)
        how = *angles, math.log2(math.e) * keys.shape[-1] ** -0.5, attn.sliding_window or 0, keys, values
        counter = next(self._unused_counters)
        call = PreparedCall(decode_kernels.decode_attention, counter, self.position, qkv, *how, self.scores, o)
        numbers_per_token, num_threads = 2 * keys[:, :, 0].numel(), torch.get_num_threads()
        least = _MIN_NUMBERS // numbers_per_token
        self.calls.append(lambda: call(num_threads if cache.length >= least else 1))
        return self.attended

    def _add_value_embeddings(self, attn: MultiHeadSelfAttention, x: Tensor, values: Tensor) -> None:
        """Add the gated embeddings of the ids to the values; see `MultiHeadSelfAttention.forward`."""
        assert attn.value_embeddings is not None
        gate, rows = attn.value_gate.weight.detach().float(), _empty(*values.shape)
        by_head, rows_by_head = (tensor.unflatten(1, (len(gate), -1)) for tensor in (values, rows))

        def add() -> None:
            gates = (x[:, : gate.shape[1]] @ gate.T).sigmoid_().unsqueeze(-1)
            by_head.addcmul_(rows_by_head, gates, value=2)

        self.calls += self._take_rows(attn.value_embeddings.weight, rows), add

    def _add_feed_forward(self, ffn: str, layers: tuple[Linear, ...], x: Tensor) -> Tensor:
        hidden, gated = self.hidden, self.gated
        self._multiply(x, layers, hidden)
        if ffn == "swiglu":
            counter = next(self._unused_counters)
            self.calls.append(PreparedCall(kernels.swiglu_forward, counter, hidden, gated))
        elif ffn == "relu2":
            self.calls.append(partial(torch.clamp, hidden, min=0, out=hidden))
            self.calls.append(partial(torch.mul, hidden, hidden, out=gated))
        else:
            self.calls.append(partial(torch.sigmoid, hidden, out=gated))
            self.calls.append(partial(gated.mul_, hidden))
        return gated
