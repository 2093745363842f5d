"""Token by token on a GPU: packed weights, a static key-value cache, and the whole step as one recorded CUDA graph."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from basic.generation import decode_kernels
from basic.model import KVCache, RotaryPositionalEmbedding, TransformerLM
from basic.transformer.kernels.flash_attention import LOG2_E


class Decoder:
    """Continues a cache that the model has filled with the prompts.

    The rows stand at one position, and take from `tokens` what was given: rows with longer prompts are still inside
    theirs while others are continued already.

    Args:
        model: pre-norm, RoPE, SwiGLU, own keys and values for each head (see `kernels.cover_decoding`). Its weights
            are copied into the cache's precision.
        cache: is continued in place.
        prompt_lengths: int64 (rows,).
        vocab_size: choose among so many first ids only; None for all.
    """

    def __init__(self, model: TransformerLM, cache: KVCache, prompt_lengths: Tensor, vocab_size: int | None = None):
        config = model.config
        self.config, self.cache, self.prompt_lengths = config, cache, prompt_lengths
        self.rows, self.dtype, self.device = cache.keys.shape[1], cache.keys.dtype, cache.keys.device
        self.padded = 1 if self.rows == 1 else max(16, triton.next_power_of_2(self.rows))
        self.splits = _splits(self.rows)
        self.choices = min(vocab_size or config.vocab_size, config.vocab_size)
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)

        weights = model.state_dict()

        def pack(*names: str) -> Tensor:
            return torch.cat([weights[f"{name}.weight"].to(self.dtype) for name in names])

        self.embedding, self.head = pack("token_embeddings"), pack("lm_head")
        self.layers = [
            (
                weights[f"layers.{i}.ln1.weight"],
                pack(*(f"layers.{i}.attn.{name}_proj" for name in "qkv")),
                pack(f"layers.{i}.attn.output_proj"),
                weights[f"layers.{i}.ln2.weight"],
                pack(f"layers.{i}.ffn.w1", f"layers.{i}.ffn.w3"),
                pack(f"layers.{i}.ffn.w2"),
            )
            for i in range(config.num_layers)
        ]
        self.ln_final = weights["ln_final.weight"]
        rope = next(module for module in model.modules() if isinstance(module, RotaryPositionalEmbedding))
        self.cos, self.sin = rope.cos, rope.sin

        def buffer(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.x = buffer(self.rows, config.d_model)
        self.qkv = buffer(self.rows, 3 * config.d_model)
        self.shares = buffer(self.rows, config.num_heads, self.splits, config.d_head + 2, dtype=torch.float32)
        self.arrivals = buffer(self.rows, config.num_heads, dtype=torch.int32)
        self.attended = buffer(self.rows, config.d_model)
        assert config.d_ff is not None  # the configuration saw to that
        self.gated = buffer(self.rows, config.d_ff)
        self.logits = buffer(self.rows, config.vocab_size)
        self.tokens = buffer(self.rows, config.context_length + 1, dtype=torch.int64)
        self.positions = buffer(self.rows, dtype=torch.int64)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, tokens: Tensor) -> None:
        """Take over the ids (rows, length) up to the end of the longest prompt or further; the cache says where we are.

        The last id that counts, at the position of the cache's length, is not in the cache yet.
        """
        length = min(tokens.shape[1], self.tokens.shape[1])
        self.tokens[:, :length] = tokens[:, :length]
        self.positions.fill_(self.cache.length)
        if self.device.type == "cuda" and self.graph is None:
            self._record()
            self.tokens[:, :length] = tokens[:, :length]
            self.positions.fill_(self.cache.length)

    def step(self) -> None:
        """Take every row's token in, leave the scores of the next one in `logits` and the likeliest in `tokens`."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        self.cache.advance(1)

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # compiles; what it writes is overwritten by the first real step
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that sends batches, go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._step()

    def _step(self) -> None:
        config, rows = self.config, self.rows
        d, width, eps = config.d_model, config.d_ff, config.norm_eps
        assert width is not None
        scale = LOG2_E / math.sqrt(config.d_head)
        capacity = config.context_length
        decode_kernels.embed[rows,](
            self.embedding, self.tokens, self.positions, self.x, capacity + 1, d,
            BLOCK_K=triton.next_power_of_2(d), **self._launch(4))  # fmt: skip
        for layer, (ln1, qkv, output, ln2, w13, w2) in enumerate(self.layers):
            self._project(self.x, qkv, ln1, self.qkv, norm=True)
            decode_kernels.attend[rows, config.num_heads, self.splits](
                self.qkv, self.cache.keys[layer], self.cache.values[layer], self.cos, self.sin, self.positions,
                self.shares, self.arrivals, self.attended, config.num_heads, capacity, scale,
                D=config.d_head, SPLITS=self.splits, BLOCK=64, EARLY=rows <= 2, **self._launch(4))  # fmt: skip
            self._project(self.attended, output, ln1, self.x, add=True)
            block_n, block_k, warps = _tiles(width, d, self.padded)
            decode_kernels.gate[triton.cdiv(width, block_n),](
                self.x, w13, ln2, self.gated, rows, d, width, eps,
                ROWS=self.padded, BLOCK_N=block_n, BLOCK_K=block_k, **self._launch(warps))  # fmt: skip
            self._project(self.gated, w2, ln2, self.x, add=True)
        self._project(self.x, self.head, self.ln_final, self.logits, norm=True)
        decode_kernels.choose[rows,](
            self.logits, self.tokens, self.prompt_lengths, self.positions, capacity + 1, config.vocab_size,
            self.choices, BLOCK_N=min(triton.next_power_of_2(self.choices), 16384), **self._launch(16))  # fmt: skip

    def _project(
        self, x: Tensor, weight: Tensor, gain: Tensor, y: Tensor, *, norm: bool = False, add: bool = False
    ) -> None:
        n, k = weight.shape
        block_n, block_k, warps = _tiles(n, k, self.padded)
        decode_kernels.project[triton.cdiv(n, block_n),](
            x, weight, gain, y, self.rows, k, n, self.config.norm_eps,
            ROWS=self.padded, BLOCK_N=block_n, BLOCK_K=block_k, NORM=norm, ADD=add, **self._launch(warps))  # fmt: skip

    def _launch(self, warps: int) -> dict[str, int | bool]:
        options = {"OVERLAP": self.overlap, "num_warps": warps, "num_stages": 3}
        return {**options, "launch_pdl": True} if self.overlap else options


def _splits(rows: int) -> int:
    """Programs that share the keys of a head: enough of them to fill the GPU."""
    return 16 if rows <= 2 else 8 if rows <= 8 else 4


def _tiles(n: int, k: int, rows: int) -> tuple[int, int, int]:
    """Outputs a program, inputs at a time, warps; found by trying them on an H200.

    One sequence: as much of the weights as fits is asked for at once, because waiting for memory is all there is.
    """
    if rows == 1:
        return (2 if n <= 8192 else 8), triton.next_power_of_2(k), 4
    return (16 if n <= 4096 else 32), 256, 4
