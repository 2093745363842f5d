"""Decoding speed on one GPU: `python3 local/bench/decoding.py --batch-size 64` prints one JSON line.

Greedy decoding in bfloat16, with a prompt of 32 tokens and 512 new tokens. `tokens_per_s` is the speed of the decoding
steps alone, for all sequences together. `generate_tokens_per_s` is that of a complete call of
`basic.generation.generate`, which also copies the weights and reads the prompt.
`first_token_ms` is the time of `generate` from a prompt of 1,000 tokens (or the context, if it is shorter) to one new
token, when the model has generated before; `first_token_of_first_call_ms`, when its decoder is made anew.
`limit_tokens_per_s` is the memory's speed, measured by a copy, over the bytes of the weights that a step reads.
`--peers` adds a line for Hugging Face's Llama with a static cache, compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from training import SIZES

from basic.generation import gpu_decoder
from basic.generation.continuation import generate
from basic.generation.gpu_decoder import GpuDecoder
from basic.model import KVCache, ModelConfig, TransformerLM

PROMPT_TOKENS, NEW_TOKENS = 32, 512


def median_s(function: Callable[[], object], repeats: int = 3) -> float:
    """The median time of the calls in seconds, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


@torch.inference_mode()
def ours(config: ModelConfig, batch_size: int) -> dict[str, float]:
    model = TransformerLM(config).cuda()
    model.activation_dtype = torch.bfloat16
    prompts = torch.randint(config.vocab_size, (batch_size, PROMPT_TOKENS), device="cuda")
    cache = KVCache(config, batch_size, dtype=torch.bfloat16, device="cuda")
    decoder = GpuDecoder(model, cache, torch.full((batch_size,), PROMPT_TOKENS, device="cuda"))

    def steps() -> None:
        cache.length = PROMPT_TOKENS - 1
        decoder.start(prompts)
        for _ in range(NEW_TOKENS):
            decoder.step()

    model(prompts[:, :-1], cache)
    steps_s = median_s(steps)
    ids = prompts.tolist()
    generate_s = median_s(lambda: generate(model, ids, NEW_TOKENS, temperature=0.0))
    num_tokens = batch_size * NEW_TOKENS
    long_prompt = torch.randint(config.vocab_size, (batch_size, min(1000, config.context_length - 1))).tolist()
    first_token_s = median_s(lambda: generate(model, long_prompt, 1, temperature=0.0), repeats=5)

    def first_call() -> None:
        gpu_decoder.idle_decoders.clear()
        generate(model, long_prompt, 1, temperature=0.0)

    first_call_s = median_s(first_call)
    read_bytes = 2 * sum(p.numel() for name, p in model.named_parameters() if name != "token_embeddings.weight")
    read_bytes += 2 * model.lm_head.weight.numel() if config.tied_embeddings else 0
    return {
        "tokens_per_s": round(num_tokens / steps_s),
        "generate_tokens_per_s": round(num_tokens / generate_s),
        "first_token_ms": round(1000 * first_token_s, 1),
        "first_token_of_first_call_ms": round(1000 * first_call_s, 1),
        "limit_tokens_per_s": round(batch_size * bytes_per_s() / read_bytes),
    }


def bytes_per_s() -> float:
    """The speed of the GPU's memory, reading and writing together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source), repeats=9)


@torch.inference_mode()
def peer(config: ModelConfig, batch_size: int) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff or 0,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        max_position_embeddings=config.context_length, num_key_value_heads=config.kv_heads,
        tie_word_embeddings=config.tied_embeddings,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).cuda().bfloat16().eval()
    model.generation_config.eos_token_id = None
    prompts = torch.randint(config.vocab_size, (batch_size, PROMPT_TOKENS), device="cuda")

    def run_generate() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=False,
                       cache_implementation="static", pad_token_id=0)  # fmt: skip

    return {"generate_tokens_per_s": round(batch_size * NEW_TOKENS / median_s(run_generate, repeats=2))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    config = ModelConfig(**SIZES[options.size])
    for name, run in {"basic": ours, **({"HF Llama": peer} if options.peers else {})}.items():
        torch.manual_seed(0)
        print(json.dumps({"model": name, "size": options.size, "batch_size": options.batch_size,
                          **run(config, options.batch_size), "device": torch.cuda.get_device_name(),
                          "torch": torch.__version__}), flush=True)  # fmt: skip
