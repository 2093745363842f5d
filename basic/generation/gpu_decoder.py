"""Decoding on a GPU: packed weights, a static key-value cache, and each step as one replay of a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from basic.generation import decode_kernels
from basic.generation.decoder import Decoder
from basic.generation.packed_weights import PackedWeights
from basic.model import KVCache, TransformerLM
from basic.transformer.functional import rms_norm, silu
from basic.transformer.kernels import swiglu
from basic.transformer.kernels.attention import flash_attention, rope
from basic.transformer.kernels.interpreter import LOG2_E

_FEW_SEQUENCES = 4  # up to so many, the matrices are multiplied with one vector after the other
_MAX_ROWS = 64  # of more sequences, a program multiplies some
_PROMPT_BLOCK = 128  # prompts are padded to a multiple of it, so that those of about the same length share a graph
# Prompts up to this length are read by replayed single steps: as fast as launching the kernels of a whole prompt, and a
# few times slower than replaying those, which the second prompt of about a length does.
_MAX_REPLAYED_PROMPT = 16

idle_decoders: WeakKeyDictionary[TransformerLM, GpuDecoder] = WeakKeyDictionary()
"""The last decoder of each model, with its copy of the weights, its cache and its graphs: a second call begins
sooner."""
_MAX_IDLE_BYTES = 2**29  # of keys; larger caches are for many sequences, whose decoding takes longer than a beginning


@torch.inference_mode()  # as the steps: what is made in this mode can only be changed in it
def make_gpu_decoder(
    model: TransformerLM, cache: KVCache, prompt_lengths: Tensor, vocab_size: int | None
) -> GpuDecoder:
    """The idle decoder of a model, if it has one for such a cache, else a new one; see `GpuDecoder`."""
    if (idle := idle_decoders.pop(model, None)) is not None and idle.restart(model, cache, prompt_lengths, vocab_size):
        return idle
    return GpuDecoder(model, cache, prompt_lengths, vocab_size)


class GpuDecoder(Decoder):
    """Continues a cache that the model has filled with the prompts.

    All sequences are at one position. Those that are still inside their prompt take its next token from `tokens`; the
    others take the likeliest.

    Args:
        model: pre-norm and RoPE, and a cache that `dispatch.supports_decoding` accepts. Its weights are copied in
            the cache's dtype.
        cache: is continued in place.
        prompt_lengths: int64 (batch,).
        vocab_size: take the likeliest of the ids below this; None for all.
        tiles: chooses the tiles of a matrix multiplication, as `choose_tiles` does.
        splits: programs among which the keys of a head are divided; None for a number that fills the GPU.
    """

    cache: KVCache
    chooses = True

    def __init__(
        self,
        model: TransformerLM,
        cache: KVCache,
        prompt_lengths: Tensor,
        vocab_size: int | None = None,
        *,
        tiles: Callable[[int, int, int], tuple[int, int, int]] | None = None,
        splits: int | None = None,
    ):
        config = model.config
        # Not the model, which would live as long as its idle decoder.
        self.config, self.cache, self.prompt_lengths = config, cache, prompt_lengths.clone()
        self.batch_size, self.dtype, self.device = cache.keys.shape[1], cache.keys.dtype, cache.keys.device
        self.is_small = self.batch_size <= _FEW_SEQUENCES
        self.rows = triton.next_power_of_2(
            self.batch_size if self.is_small else min(max(16, self.batch_size), _MAX_ROWS)
        )
        self.tiles = tiles or choose_tiles
        self.splits = splits or choose_splits(self.batch_size * config.num_heads)
        self.num_choices = min(vocab_size or config.vocab_size, config.vocab_size)
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.windows = [config.window(layer) or 0 for layer in range(config.num_layers)]
        self.weights = PackedWeights(model, self.dtype)
        self.weights.update(model)

        def buffer(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        batch_size = self.batch_size
        self.x, self.normalized = buffer(batch_size, config.d_model), buffer(batch_size, config.d_model)
        self.qkv = buffer(batch_size, self.weights.qkv.shape[1])
        self.partials = buffer(batch_size, config.num_heads, self.splits, config.d_head + 2, dtype=torch.float32)
        self.num_finished = buffer(batch_size, config.num_heads, dtype=torch.int32)
        self.attended = buffer(batch_size, config.num_heads * config.d_head)
        self.gated = buffer(batch_size, self.weights.w2.shape[2])
        self.logits = buffer(batch_size, config.vocab_size)
        self.tokens = buffer(batch_size, config.context_length + 1, dtype=torch.int64)
        self.positions = buffer(batch_size, dtype=torch.int64)
        self.last_position = buffer(1, dtype=torch.int64)  # of a prompt
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prompt_graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # by padded length; None before it is recorded

    def restart(self, model: TransformerLM, cache: KVCache, prompt_lengths: Tensor, vocab_size: int | None) -> bool:
        """Begin anew with an empty cache and the weights that the model has now, if what is given fits the old buffers.

        The recorded graphs are kept, which is most of the time of a beginning. `cache` is only compared.
        """
        old, new = self.cache.keys, cache.keys
        fits = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        if not fits or self.config != model.config or self.num_choices != (vocab_size or model.config.vocab_size):
            return False
        self.weights.update(model)
        self.prompt_lengths.copy_(prompt_lengths)
        self.cache.length = 0
        return True

    def close(self, model: TransformerLM) -> None:
        if self.cache.keys.nbytes <= _MAX_IDLE_BYTES:
            idle_decoders[model] = self

    def forget(self, num_known: int) -> None:
        self.cache.length = 0
        self.prompt_lengths.fill_(num_known)

    def read(self, ids: Tensor) -> Tensor:
        num_new = ids.shape[1] - self.cache.length
        if num_new > _MAX_REPLAYED_PROMPT:
            return self.read_prompt(ids)
        self.start(ids)
        for _ in range(num_new):
            self.step()
        return self.logits

    def choose(self, ids: Tensor, length: int, most: int) -> int:
        """See `Decoder.choose`; it does not wait for the GPU."""
        self.start(ids)
        end = min(length + most, ids.shape[1], self.tokens.shape[1])
        for _ in range(length, end):
            self.step()
        ids[:, length:end] = self.tokens[:, length:end]
        return end

    def read_prompt(self, tokens: Tensor) -> Tensor:
        """Read the first tokens of all sequences, (batch, length), at once; return the logits of the tokens after them.

        The cache must be empty. Lengths are rounded up, so that a second prompt of about this length replays a CUDA
        graph. The keys and values after the end, of any tokens, are overwritten before they are read.
        """
        length = tokens.shape[1]
        assert self.cache.length == 0
        padded = min(triton.cdiv(length, _PROMPT_BLOCK) * _PROMPT_BLOCK, self.config.context_length)
        self.tokens[:, :length] = tokens
        self.last_position.fill_(length - 1)
        if padded not in self.prompt_graphs or self.device.type != "cuda":
            self._launch_prompt(padded)
            self.prompt_graphs[padded] = None
        else:
            if (graph := self.prompt_graphs[padded]) is None:
                graph = self.prompt_graphs[padded] = record(partial(self._launch_prompt, padded))
            graph.replay()
        self.cache.advance(length)
        return self.logits

    def _launch_prompt(self, length: int) -> None:
        """The logits after `last_position`; in a third of the launches of the model's own forward pass."""
        config, weights, cache, batch = self.config, self.weights, self.cache, self.batch_size
        tokens, eps = self.tokens[:, :length].flatten(), config.norm_eps
        heads = config.num_heads, config.kv_heads, config.kv_heads
        x = weights.embedding[tokens]
        if config.embedding_norm:
            x = rms_norm(x, x.new_ones(config.d_model), eps)
        for layer in range(config.num_layers):
            outputs = self._normalized(x, weights.gains1[layer]) @ weights.qkv[layer].T
            if weights.biases is not None:
                outputs += weights.biases[layer]
            qkv = outputs[:, : sum(heads) * config.d_head].view(batch, length, sum(heads), config.d_head)
            q, k, v = qkv.split(heads, 2)
            if (index := weights.value_indices[layer]) >= 0:
                gates = 2 * torch.sigmoid(outputs[:, -config.kv_heads :]).unsqueeze(-1)
                v += (gates * weights.value_embeddings[index][tokens].unflatten(-1, (config.kv_heads, -1))).view_as(v)
            if weights.qk_gains is not None:
                for part, gains in zip((q, k), weights.qk_gains, strict=True):
                    part.copy_(rms_norm(part, gains[layer], eps))
            rope.rotate_packed(qkv, weights.cos, weights.sin, sum(heads[:2]), qkv)
            cache.keys[layer, :, :, :length] = k.transpose(1, 2)
            cache.values[layer, :, :, :length] = v.transpose(1, 2)
            window = self.windows[layer]
            attended, _ = flash_attention.forward(q, k, v, window if window < length else 0)
            x = torch.addmm(x, attended.view(batch * length, -1), weights.output[layer].T)
            gated = self._activated(self._normalized(x, weights.gains2[layer]) @ weights.w13[layer].T)
            x = torch.addmm(x, gated, weights.w2[layer].T)
        last = x.view(batch, length, -1).index_select(1, self.last_position)[:, 0]
        torch.mm(self._normalized(last, weights.final_gain), weights.head.T, out=self.logits)

    def _activated(self, x: Tensor) -> Tensor:
        if self.config.ffn == "swiglu":
            return swiglu.forward(x)
        return silu(x) if self.config.ffn == "silu" else x.clamp(min=0).square()

    def _normalized(self, x: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
        y = torch.empty_like(x) if out is None else out
        block_k = triton.next_power_of_2(x.shape[1])
        decode_kernels.normalize[len(x),](
            x, gain, y, x.shape[1], self.config.norm_eps, BLOCK_K=block_k, **self._options(4))  # fmt: skip
        return y

    def start(self, tokens: Tensor) -> None:
        """Set the ids (batch, length), at least up to the end of the longest prompt.

        The next step reads the id at position `cache.length`, which is not in the cache yet.
        """
        length = min(tokens.shape[1], self.tokens.shape[1])
        self.tokens[:, :length] = tokens[:, :length]
        self.positions.fill_(self.cache.length)
        if self.device.type == "cuda" and self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._launch_step()  # compiles the kernels; the first real step overwrites its results
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = record(self._launch_step)
            self.tokens[:, :length] = tokens[:, :length]
            self.positions.fill_(self.cache.length)

    def step(self) -> None:
        """Read one token of every sequence; write the logits of the next to `logits`, and its id to `tokens`."""
        if self.graph is None:
            self._launch_step()
        else:
            self.graph.replay()
        self.cache.advance(1)

    def _launch_step(self) -> None:
        config, weights, batch_size = self.config, self.weights, self.batch_size
        d_model, d_ff, eps = config.d_model, config.d_ff, config.norm_eps
        assert d_ff is not None
        capacity = config.context_length
        q_gains, k_gains = weights.qk_gains or (weights.gains1, weights.gains1)
        decode_kernels.embed[batch_size,](
            weights.embedding, self.tokens, self.positions, self.x, capacity + 1, d_model, eps,
            BLOCK_K=triton.next_power_of_2(d_model), NORM=config.embedding_norm, **self._options(4))  # fmt: skip
        for layer in range(config.num_layers):
            index, ln1, ln2 = weights.value_indices[layer], weights.gains1[layer], weights.gains2[layer]
            self._project(self.x, weights.qkv[layer], ln1, self.qkv, norm=True,
                          biases=None if weights.biases is None else weights.biases[layer])  # fmt: skip
            decode_kernels.attend[batch_size, config.num_heads, self.splits](
                self.qkv, self.qkv.shape[1], q_gains[layer], k_gains[layer],
                weights.value_embeddings[index] if index >= 0 else weights.embedding, self.tokens,
                self.cache.keys[layer], self.cache.values[layer], weights.cos, weights.sin, self.positions,
                self.partials, self.num_finished, self.attended, config.num_heads, capacity,
                LOG2_E / math.sqrt(config.d_head), eps, GROUP=config.num_heads // config.kv_heads, D=config.d_head,
                WIDTH=triton.next_power_of_2(config.d_head), SPLITS=self.splits, BLOCK=64,
                NORM=config.qk_norm, HAVE_EMBEDDINGS=index >= 0, WINDOW=self.windows[layer],
                EARLY=batch_size <= 2, **self._options(4))  # fmt: skip
            self._project(self.attended, weights.output[layer], ln1, self.x, add=True)
            block_n, block_k, warps = self.tiles(d_ff, d_model, self.rows)
            x = self.x if self.is_small else self._normalized(self.x, ln2, self.normalized)
            decode_kernels.activate[triton.cdiv(d_ff, block_n), triton.cdiv(batch_size, self.rows)](
                x, weights.w13[layer], ln2, self.gated, batch_size, d_model, d_ff, eps, FFN=config.ffn,
                ROWS=self.rows, BLOCK_N=block_n, BLOCK_K=block_k, FEW=self.is_small,
                **self._options(warps))  # fmt: skip
            self._project(self.gated, weights.w2[layer], ln2, self.x, add=True)
        self._project(self.x, weights.head, weights.final_gain, self.logits, norm=True)
        decode_kernels.choose[batch_size,](
            self.logits, self.tokens, self.prompt_lengths, self.positions, capacity + 1, config.vocab_size,
            self.num_choices, BLOCK_N=min(triton.next_power_of_2(self.num_choices), 16384),
            **self._options(16))  # fmt: skip

    def _project(
        self, x: Tensor, weight: Tensor, gain: Tensor, y: Tensor, *, norm: bool = False, add: bool = False,
        biases: Tensor | None = None,
    ) -> None:  # fmt: skip
        n, k = weight.shape
        block_n, block_k, warps = self.tiles(n, k, self.rows)
        if norm and not self.is_small:
            x, norm = self._normalized(x, gain, self.normalized), False
        decode_kernels.project[triton.cdiv(n, block_n), triton.cdiv(self.batch_size, self.rows)](
            x, weight, gain, gain if biases is None else biases, y, self.batch_size, k, n, self.config.norm_eps,
            ROWS=self.rows, BLOCK_N=block_n, BLOCK_K=block_k, FEW=self.is_small, NORM=norm, ADD=add,
            BIAS=biases is not None, **self._options(warps))  # fmt: skip

    def _options(self, warps: int) -> dict[str, int | bool]:
        """Launch options. PDL (programmatic dependent launch) lets a kernel start while the one before still runs."""
        options = {"OVERLAP": self.overlap, "num_warps": warps, "num_stages": 3}
        return {**options, "launch_pdl": True} if self.overlap else options


def record(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as one that sends batches, may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch()
    return graph


def choose_splits(num_heads: int) -> int:
    """Programs among which the keys of a head are divided: enough to fill the GPU, a power of two.

    With many heads, of all sequences together, a program each is faster than to combine the results of several.
    """
    return min(16, max(1, triton.next_power_of_2(512 // num_heads)))


def choose_tiles(n: int, k: int, rows: int) -> tuple[int, int, int]:
    """Outputs per program, inputs per iteration, and warps of a matrix multiplication; tuned on an H200.

    With few sequences a program loads all inputs at once, since its time is that of reading the weights.
    """
    if rows <= _FEW_SEQUENCES:
        block_k = triton.next_power_of_2(k)
        wide = block_k <= 2048 and (rows == 4 or (rows == 1 and n > 4096))
        return (8 if n > 8192 else 4 if wide else 2), block_k, 4
    return (16, 512, 4) if n <= 4096 else (32, 256, 4)
