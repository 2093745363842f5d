"""Training and decoding on a CPU, beside a plain twin of nanoGPT and beside transformers, in turns in one process.

`python local/bench/cpu.py training` prints the time of a step for each program and the ratio, taken pair by pair;
`python local/bench/cpu.py decoding` prints tokens a second for a Llama of SmolLM2's shape with random weights.
`--threads 1` is the steadiest on a busy machine: it counts CPU time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional

from basic.formats.export_model import export_hf
from basic.generation.continuation import generate
from basic.model import ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.kernels import dispatch


class TwinBlock(nn.Module):
    """A block of nanoGPT: LayerNorm, attention by torch's fused function, and two matrices with GELU between them."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int):
        super().__init__()
        self.num_heads = num_heads
        self.ln1, self.ln2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.up, self.down = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2)
                   for part in self.qkv(self.ln1(x)).split(width, dim=2))  # fmt: skip
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.ln2(x))))


class Twin(nn.Module):
    """nanoGPT of the sizes of one of our models; its two matrices have as many weights as SwiGLU's three."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.d_ff is not None
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model)
        d_ff = config.d_ff * 3 // 2 if config.ffn == "swiglu" else config.d_ff
        self.blocks = nn.ModuleList(TwinBlock(config.d_model, config.num_heads, d_ff) for _ in range(config.num_layers))
        self.ln_final = nn.LayerNorm(config.d_model, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_final(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


Step = Callable[[Tensor, Tensor], Tensor]


def twin_step(config: ModelConfig) -> Step:
    """nanoGPT's step: AdamW, gradients clipped."""
    model = Twin(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(config: ModelConfig, optimizer: str, *, plain: bool = False) -> Step:
    model = TransformerLM(config)
    settings = TrainConfig(steps=1, batch_size=1, optimizer=optimizer)  # ty: ignore[invalid-argument-type]
    take_step = TrainStep(model, make_optimizer(model, settings), settings, torch.device("cpu"))

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with dispatch.use_operators(None) if plain else nullcontext():
            return take_step((ids, targets), 1e-4)[0]

    return step


def training(options: argparse.Namespace) -> None:
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for rows, length in ((16, 128), (8, 128), (1, 1024)):
        config = ModelConfig(
            vocab_size=2048, context_length=length, d_model=128, num_layers=2, num_heads=4, d_ff=128
        )  # fmt: skip
        steps = {
            "nanoGPT's twin, AdamW": twin_step(config),
            "basic, AdamW": our_step(config, "adamw"),
            "basic, Muon": our_step(config, "muon"),
            "basic, AdamW, plain functions": our_step(config, "adamw", plain=True),
        }
        batch = torch.randint(config.vocab_size, (2, rows, length))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(2 + options.rounds):
            for name, step in steps.items():
                started = clock()
                step(batch[0], batch[1])
                if number >= 2:
                    times[name].append(clock() - started)
        twin = times["nanoGPT's twin, AdamW"]
        for name, measured in times.items():
            ratios = [theirs / ours for theirs, ours in zip(twin, measured, strict=True)]
            print(json.dumps({"rows": rows, "length": length, "model": name,
                              "step_ms": round(statistics.median(measured) * 1e3, 1),
                              "best_ms": round(min(measured) * 1e3, 1),
                              "times_as_fast": round(statistics.median(ratios), 2)}), flush=True)  # fmt: skip


EXACT = "float32, weights of bfloat16"


def decoding(options: argparse.Namespace) -> None:
    """Greedy ids for one prompt: those of ours are those of transformers in float32 with the same weights.

    Random weights need all bits of float32; those of most published models are bfloat16 numbers, as the others here.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "d_ff": 1536}
    config = ModelConfig(vocab_size=49_152, context_length=256, tied_embeddings=True, **sizes)
    ours = TransformerLM(config).eval()
    half = copy.deepcopy(ours).bfloat16()
    models = {"float32": ours, EXACT: copy.deepcopy(half).float(), "bfloat16": half}
    theirs: dict[str, Any] = {}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            export_hf(model, Path(folder) / "llama")
            path, dtype = Path(folder) / "llama", torch.bfloat16 if name == "bfloat16" else torch.float32
            theirs[name] = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    prompt = [1, 2, 3, 4, 5]

    def by_transformers(name: str, count: int) -> list[int]:
        ids, limits = torch.tensor([prompt]), {"max_new_tokens": count, "min_new_tokens": count}
        return theirs[name].generate(ids, attention_mask=ids > 0, **limits, do_sample=False)[0, len(prompt) :].tolist()

    def by_us(name: str, count: int) -> list[int]:
        return generate(models[name], [prompt], count, temperature=0.0)[0]

    clock = time.process_time if options.threads == 1 else time.perf_counter
    rates = {(who, name): list[float]() for name in models for who in ("transformers", "basic")}
    made: dict[tuple[str, str], list[int]] = {}
    reading: list[float] = []
    weights = torch.ones(ours.num_parameters)
    for number in range(1 + options.rounds):
        for who, name in rates:
            started = clock()
            made[who, name] = (by_us if who == "basic" else by_transformers)(name, options.tokens)
            if number:
                rates[who, name].append(options.tokens / (clock() - started))
        started = clock()
        weights.sum()
        reading.append(clock() - started)
    # A sum reads as fast as memory allows: the limit for weights of 32 bits.
    print(json.dumps({"program": "sum of the weights", "times_per_s": round(1 / statistics.median(reading), 1)}))
    for (who, name), measured in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(measured, rates["transformers", name], strict=True)]
        ids, expected = made[who, name], made["transformers", "float32" if name == "float32" else EXACT]
        same = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), len(ids))
        print(json.dumps({"program": who, "model": name, "tokens_per_s": round(statistics.median(measured), 1),
                          "times_as_fast": round(statistics.median(ratios), 2), "same_first_ids": same}))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["training", "decoding"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20, help="steps, or texts, of each program")
    parser.add_argument("--tokens", type=int, default=20, help="decoding: length of a text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"training": training, "decoding": decoding}[options.what](options)
