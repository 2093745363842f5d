"""Decoding on a GPU: packed weights, a static key-value cache, and each step as one replay of a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from basic.generation import decode_kernels
from basic.model import KVCache, RotaryPositionalEmbedding, TransformerLM
from basic.transformer.functional import rms_norm, silu
from basic.transformer.kernels import flash_attention, rope, swiglu
from basic.transformer.kernels.interpreter import LOG2_E


class Decoder:
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
        self.config, self.cache, self.prompt_lengths = config, cache, prompt_lengths
        self.batch_size, self.dtype, self.device = cache.keys.shape[1], cache.keys.dtype, cache.keys.device
        self.padded_batch = 1 if self.batch_size == 1 else max(16, triton.next_power_of_2(self.batch_size))
        self.tiles, self.splits = tiles or choose_tiles, splits or choose_splits(self.batch_size)
        self.num_choices = min(vocab_size or config.vocab_size, config.vocab_size)
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)

        weights = model.state_dict()

        def pack(*names: str, kind: str = "weight") -> Tensor:
            parts = [weights[f"{name}.{kind}"] for name in names]
            sizes = [len(part) for part in parts]
            packed = torch.empty((sum(sizes), *parts[0].shape[1:]), dtype=self.dtype, device=self.device)
            for target, part in zip(packed.split(sizes), parts, strict=True):
                target.copy_(part)
            return packed

        self.embedding = pack("token_embeddings")
        self.head = self.embedding if config.tied_embeddings else pack("lm_head")
        self.layers, self.biases, self.gains = [], [], []
        self.value_embeddings: list[Tensor | None] = []
        for i in range(config.num_layers):
            names, attention = [f"layers.{i}.attn.{name}_proj" for name in "qkv"], f"layers.{i}.attn"
            qkv, biases = pack(*names), pack(*names, kind="bias") if config.qkv_bias else None
            has_values = f"{attention}.value_gate.weight" in weights
            self.value_embeddings.append(pack(f"{attention}.value_embeddings") if has_values else None)
            if has_values:  # the gates are more outputs of the same matrix, without biases
                gate = pack(f"{attention}.value_gate")
                qkv = torch.cat((qkv, qkv.new_zeros(len(gate), config.d_model)))
                qkv[-len(gate) :, : gate.shape[1]] = gate
                biases = None if biases is None else torch.cat((biases, biases.new_zeros(len(gate))))
            w13 = pack(*(f"layers.{i}.ffn.{name}" for name in (("w1", "w3") if config.ffn == "swiglu" else ("w1",))))
            ln1, ln2 = weights[f"layers.{i}.ln1.weight"], weights[f"layers.{i}.ln2.weight"]
            self.layers.append((ln1, qkv, pack(f"{attention}.output_proj"), ln2, w13, pack(f"layers.{i}.ffn.w2")))
            self.biases.append(biases)
            names = [f"{attention}.{name}_norm.weight" for name in "qk"]
            self.gains.append([weights[name] if config.qk_norm else self.embedding for name in names])
        self.ln_final = weights["ln_final.weight"]
        rope = next(module for module in model.modules() if isinstance(module, RotaryPositionalEmbedding))
        self.cos, self.sin = rope.cos, rope.sin

        def buffer(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        batch_size = self.batch_size
        self.x = buffer(batch_size, config.d_model)
        self.qkv = buffer(batch_size, max(len(qkv) for _, qkv, *_ in self.layers))
        self.partials = buffer(batch_size, config.num_heads, self.splits, config.d_head + 2, dtype=torch.float32)
        self.num_finished = buffer(batch_size, config.num_heads, dtype=torch.int32)
        self.attended = buffer(batch_size, config.num_heads * config.d_head)
        assert config.d_ff is not None  # set by ModelConfig
        self.gated = buffer(batch_size, config.d_ff)
        self.logits = buffer(batch_size, config.vocab_size)
        self.tokens = buffer(batch_size, config.context_length + 1, dtype=torch.int64)
        self.positions = buffer(batch_size, dtype=torch.int64)
        self.graph: torch.cuda.CUDAGraph | None = None

    def read_prompt(self, tokens: Tensor) -> Tensor:
        """Read the first tokens of all sequences, (batch, length), at once; return the logits of the tokens after them.

        The cache must be empty. It takes a third of the launches of the model's own forward pass.
        """
        config, cache, (batch, length) = self.config, self.cache, tokens.shape
        assert cache.length == 0
        tokens, eps = tokens.flatten(), config.norm_eps
        heads = config.num_heads, config.kv_heads, config.kv_heads
        x = self.embedding[tokens]
        if config.embedding_norm:
            x = rms_norm(x, x.new_ones(config.d_model), eps)
        for layer, (ln1, qkv_weight, output, ln2, w13, w2) in enumerate(self.layers):
            outputs = self._normalized(x, ln1) @ qkv_weight.T
            if (bias := self.biases[layer]) is not None:
                outputs += bias
            qkv = outputs[:, : sum(heads) * config.d_head].view(batch, length, sum(heads), config.d_head)
            q, k, v = qkv.split(heads, 2)
            if (values := self.value_embeddings[layer]) is not None:
                gates = 2 * torch.sigmoid(outputs[:, -config.kv_heads :]).unsqueeze(-1)
                v += (gates * values[tokens].unflatten(-1, (config.kv_heads, -1))).view_as(v)
            if config.qk_norm:
                for part, gain in zip((q, k), self.gains[layer], strict=True):
                    part.copy_(rms_norm(part, gain, eps))
            rope.rotate_packed(qkv, self.cos, self.sin, sum(heads[:2]), qkv)
            cache.keys[layer, :, :, :length] = k.transpose(1, 2)
            cache.values[layer, :, :, :length] = v.transpose(1, 2)
            window = config.window(layer) or 0
            attended, _ = flash_attention.forward(q, k, v, window if window < length else 0)
            x = torch.addmm(x, attended.view(batch * length, -1), output.T)
            x = torch.addmm(x, self._activated(self._normalized(x, ln2) @ w13.T), w2.T)
        cache.advance(length)
        last = x.view(batch, length, -1)[:, -1].contiguous()
        return self._normalized(last, self.ln_final) @ self.head.T

    def _activated(self, x: Tensor) -> Tensor:
        if self.config.ffn == "swiglu":
            return swiglu.forward(x)
        return silu(x) if self.config.ffn == "silu" else x.clamp(min=0).square()

    def _normalized(self, x: Tensor, gain: Tensor) -> Tensor:
        y = torch.empty_like(x)
        decode_kernels.normalize[len(x),](
            x, gain, y, x.shape[1], self.config.norm_eps, BLOCK_K=triton.next_power_of_2(x.shape[1]), num_warps=4
        )
        return y

    def start(self, tokens: Tensor) -> None:
        """Set the ids (batch, length), at least up to the end of the longest prompt.

        The next step reads the id at position `cache.length`, which is not in the cache yet.
        """
        length = min(tokens.shape[1], self.tokens.shape[1])
        self.tokens[:, :length] = tokens[:, :length]
        self.positions.fill_(self.cache.length)
        if self.device.type == "cuda" and self.graph is None:
            self._record()
            self.tokens[:, :length] = tokens[:, :length]
            self.positions.fill_(self.cache.length)

    def step(self) -> None:
        """Read one token of every sequence; write the logits of the next to `logits`, and its id to `tokens`."""
        if self.graph is None:
            self._launch_step()
        else:
            self.graph.replay()
        self.cache.advance(1)

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch_step()  # compiles the kernels; the first real step overwrites its results
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that sends batches, may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._launch_step()

    def _launch_step(self) -> None:
        config, batch_size = self.config, self.batch_size
        d_model, d_ff, eps = config.d_model, config.d_ff, config.norm_eps
        assert d_ff is not None
        scale = LOG2_E / math.sqrt(config.d_head)
        capacity = config.context_length
        decode_kernels.embed[batch_size,](
            self.embedding, self.tokens, self.positions, self.x, capacity + 1, d_model, eps,
            BLOCK_K=triton.next_power_of_2(d_model), NORM=config.embedding_norm, **self._options(4))  # fmt: skip
        for layer, (ln1, qkv, output, ln2, w13, w2) in enumerate(self.layers):
            values = self.value_embeddings[layer]
            self._project(self.x, qkv, ln1, self.qkv, norm=True, biases=self.biases[layer])
            decode_kernels.attend[batch_size, config.num_heads, self.splits](
                self.qkv, len(qkv), *self.gains[layer], self.embedding if values is None else values, self.tokens,
                self.cache.keys[layer], self.cache.values[layer], self.cos, self.sin, self.positions, self.partials,
                self.num_finished, self.attended, config.num_heads, capacity, scale, eps,
                GROUP=config.num_heads // config.kv_heads, D=config.d_head,
                WIDTH=triton.next_power_of_2(config.d_head), SPLITS=self.splits, BLOCK=64,
                NORM=config.qk_norm, HAVE_EMBEDDINGS=values is not None, WINDOW=config.window(layer) or 0,
                EARLY=batch_size <= 2, **self._options(4))  # fmt: skip
            self._project(self.attended, output, ln1, self.x, add=True)
            block_n, block_k, warps = self.tiles(d_ff, d_model, self.padded_batch)
            decode_kernels.activate[triton.cdiv(d_ff, block_n),](
                self.x, w13, ln2, self.gated, batch_size, d_model, d_ff, eps, FFN=config.ffn,
                ROWS=self.padded_batch, BLOCK_N=block_n, BLOCK_K=block_k, **self._options(warps))  # fmt: skip
            self._project(self.gated, w2, ln2, self.x, add=True)
        self._project(self.x, self.head, self.ln_final, self.logits, norm=True)
        decode_kernels.choose[batch_size,](
            self.logits, self.tokens, self.prompt_lengths, self.positions, capacity + 1, config.vocab_size,
            self.num_choices, BLOCK_N=min(triton.next_power_of_2(self.num_choices), 16384),
            **self._options(16))  # fmt: skip

    def _project(
        self, x: Tensor, weight: Tensor, gain: Tensor, y: Tensor, *, norm: bool = False, add: bool = False,
        biases: Tensor | None = None,
    ) -> None:  # fmt: skip
        n, k = weight.shape
        block_n, block_k, warps = self.tiles(n, k, self.padded_batch)
        decode_kernels.project[triton.cdiv(n, block_n),](
            x, weight, gain, gain if biases is None else biases, y, self.batch_size, k, n, self.config.norm_eps,
            ROWS=self.padded_batch, BLOCK_N=block_n, BLOCK_K=block_k, NORM=norm, ADD=add, BIAS=biases is not None,
            **self._options(warps))  # fmt: skip

    def _options(self, warps: int) -> dict[str, int | bool]:
        """Launch options. PDL (programmatic dependent launch) lets a kernel start while the one before still runs."""
        options = {"OVERLAP": self.overlap, "num_warps": warps, "num_stages": 3}
        return {**options, "launch_pdl": True} if self.overlap else options


def choose_splits(batch_size: int) -> int:
    """Programs among which the keys of a head are divided: enough to fill the GPU."""
    return 16 if batch_size <= 2 else 8 if batch_size <= 8 else 4


def choose_tiles(n: int, k: int, padded_batch: int) -> tuple[int, int, int]:
    """Outputs per program, inputs per iteration, and warps of a matrix multiplication; tuned on an H200.

    With one sequence a program loads all inputs at once, since its time is that of reading the weights.
    """
    if padded_batch == 1:
        return (2 if n <= 8192 else 8), triton.next_power_of_2(k), 4
    return (16 if n <= 4096 else 32), 256, 4
