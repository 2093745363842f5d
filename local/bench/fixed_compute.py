"""The loss after a fixed time of training: `python3 local/bench/fixed_compute.py --minutes 0.3 --recipe adamw muon`.

Prints one JSON line a recipe and seed: bits per byte on blocks held back from the training books and on books by other
authors, tokens/s, and the share of a step that the optimizer takes. Compiling is not timed, learning rates follow the
share of the time that has passed, and no window of the text comes again before all were seen. `--set
max_learning_rate=0.03 muon.momentum=0.9 model.qk_norm=true` changes settings of all recipes.

A run should see the text at most twice: with more, the recipe that learns fastest overfits most, and its loss says
little. On one H200, 64 MB of text are enough for 20 seconds (0.3 minutes) of the usual model. A run that sees the text
more often ends with a warning.

Token files are made once, in the work folder, with a tokenizer that is trained on the text; for this, the folder --text
needs books_train.txt.xz and books_valid.txt.xz. `--small` is for a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import sys
import time
import tomllib
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from basic.analysis.evaluation import evaluate_tokens
from basic.common.config_files import flatten_settings, from_table
from basic.model import ModelConfig, TransformerLM
from basic.tokens.opening import open_tokens, read_info
from basic.training.batches import BatchSampler, read_ahead
from basic.training.settings import RunConfig
from basic.training.step import TrainStep, make_optimizer

END = "<|endoftext|>"
STEPS = 1_000_000
"""Steps of every schedule; the step that the schedule is asked for is the share of the time that has passed."""
HELD_BACK_BLOCKS = 32
"""Blocks of the training text to evaluate on instead, each a 32nd of the distance to the next."""
MAX_EPOCHS = 2
"""A run that sees the text more often overfits, and is warned about."""
WARMUP_STEPS = 6
"""Steps that compile, tune kernels and capture the CUDA graph; their effect is undone."""

ADAMW = {"max_learning_rate": 1.5e-3, "embedding_rate_factor": 10.0, "warmup_share": 0.02}
# 0.3 for the embedding, 0.004 for output matrix and gains.
MUON = {"optimizer": "muon", "max_learning_rate": 0.02, "embedding_rate_factor": 15.0, "head_rate_factor": 0.2}
MUON |= {"gain_rate_factor": 0.2, "beta1": 0.8, "schedule": "trapezoid", "decay_share": 0.65, "warmup_share": 0.0}
# The model's settings begin with "model."
MODERN = {**MUON, "model.ffn": "relu2", "model.embedding_norm": True, "weight_decay": 0.3}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "adamw_trapezoid": {**ADAMW, "schedule": "trapezoid", "decay_share": 0.65},
    "muon": MUON,
    "modern": MODERN,
    "muon_windows": {**MUON, "rows": "windows"},
    "muon_plain": {**MUON, "muon.normalization": "none", "muon.cautious": False, "weight_decay": 0.0},
    "muon_not_normalized": {**MUON, "muon.normalization": "none"},
    "muon_long_side": {**MUON, "muon.normalization": "long_side"},
    "muon_newton_schulz": {**MUON, "muon.orthogonalization": "newton_schulz"},
    "muon_not_cautious": {**MUON, "muon.cautious": False},
    "muon_decay_to_0": {**MUON, "weight_decay": 0.2, "weight_decay_schedule": "linear"},
    "muon_momentum_warmup": {**MUON, "muon.momentum_warmup_steps": STEPS // 5},
    "muon_cosine": {**MUON, "schedule": "cosine"},
    "muon_rms": {**MUON, "muon.update_scale": "rms", "max_learning_rate": 0.0045},
}


def make_tokens(text_folder: Path, work: Path, vocab_size: int, max_bytes: int | None) -> None:
    """Write train.bin, same_books.bin and other_books.bin, if they do not exist."""
    if all((work / f"{name}.bin").exists() for name in ("train", "same_books", "other_books")):
        return
    from basic.encoding import encode_file
    from basic.Tokenizer import Tokenizer
    from basic.train_bpe import train_bpe

    work.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name in ("books_train", "books_valid"):
        with lzma.open(text_folder / f"{name}.txt.xz") as file:
            texts[name] = file.read() if max_bytes is None else file.read(max_bytes)
    text, train, held_back = texts["books_train"], [], []
    period = len(text) // HELD_BACK_BLOCKS
    for start in range(0, period * HELD_BACK_BLOCKS, period):
        cut = text.index(b"\n", start + period - period // HELD_BACK_BLOCKS) + 1
        begin = 0 if start == 0 else text.index(b"\n", start) + 1
        end = text.find(b"\n", start + period) + 1 or len(text)
        train.append(text[begin:cut])
        held_back.append(text[cut:end])
    for name, content in (
        ("train", END.encode().join(train)),
        ("same_books", END.encode().join(held_back)),
        ("other_books", texts["books_valid"]),
    ):
        # Bytes of a character that is cut off at the end of a limited text are left out.
        (work / f"{name}.txt").write_text(content.decode(errors="ignore"), encoding="utf-8", newline="")
    vocab, merges = train_bpe(work / "train.txt", vocab_size, [END])
    tokenizer = Tokenizer(vocab, merges, [END])
    tokenizer.save(work / "tokenizer")
    for name in ("same_books", "other_books", "train"):
        encode_file(tokenizer, work / f"{name}.txt", work / f"{name}.bin")
        (work / f"{name}.txt").unlink()


def run_config(recipe: str, changes: list[str], options: argparse.Namespace) -> RunConfig:
    """The settings of a recipe, with the changes of the command line; output projections start at zero."""
    batch_size = options.batch_tokens // options.context
    common = {"steps": STEPS, "batch_size": batch_size, "min_learning_rate": 0.0, "rows": "shuffled"}
    on_gpu = options.device != "cpu"
    settings: dict[str, Any] = {**common, "compile": on_gpu, "device": options.device, **RECIPES[recipe]}
    settings |= flatten_settings(tomllib.loads("\n".join(changes)))

    def without(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): settings.pop(name) for name in list(settings) if name.startswith(prefix)}

    sizes = {"d_model": options.width, "num_layers": options.depth, "num_heads": max(1, options.width // 64)}
    sizes |= {"vocab_size": options.vocab_size, "context_length": options.context, "zero_outputs": True}
    model, muon = {**sizes, **without("model.")}, without("muon.")
    return from_table(RunConfig, {"model": model, "train": {**settings, "muon": muon}})


def make_model(config: ModelConfig, options: argparse.Namespace, seed: int) -> TransformerLM:
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model = TransformerLM(config)
    model.activation_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device)


def train(step: TrainStep, sampler: BatchSampler, seconds: float) -> dict[str, Any]:
    """Take steps for a time; compiling comes before."""
    device, settings = step.device, step.config
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    losses: deque[torch.Tensor] = deque(maxlen=100)
    in_flight: deque[torch.cuda.Event] = deque()
    started, count = time.perf_counter(), 0
    for _ in range(WARMUP_STEPS if device.type == "cuda" else 0):
        inputs, targets = sampler.batch(0)
        step((inputs.to(device), targets.to(device)), 0.0)
    forget(step.optimizer)
    synchronize()
    compile_s = time.perf_counter() - started
    with read_ahead(sampler, range(STEPS), device) as batches:
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            scheduled = settings.scheduled(1 + int(elapsed / seconds * STEPS))
            losses.append(step(next(batches), **scheduled)[0].clone())
            count += 1
            if device.type == "cuda":  # two steps are queued: enough that the GPU does not wait for Python
                in_flight.append(torch.cuda.Event())
                in_flight[-1].record()
                if len(in_flight) > 2:
                    in_flight.popleft().synchronize()
        synchronize()
        elapsed = time.perf_counter() - started
    tokens = count * sampler.batch_size * sampler.context_length
    return {
        "train_loss": round(torch.stack(list(losses)).mean().item(), 4),
        "tokens_per_s": round(tokens / elapsed),
        "steps": count,
        "epochs": round(tokens / len(sampler.tokens), 2),
        "optimizer_share": round(optimizer_seconds(step) / (elapsed / count), 4),
        "compile_s": round(compile_s, 1),
    }


def run(recipe: str, seed: int, config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; see the module's docstring."""
    settings, model = config.train, make_model(config.model, options, seed)
    model.configure_training(settings.dropout)
    step = TrainStep(model, make_optimizer(model, settings), settings, torch.device(options.device))
    shuffled = settings.rows == "shuffled"
    tokens = open_tokens(options.work / "train.bin")
    sampler = BatchSampler(tokens, settings.batch_size, options.context, seed=seed, shuffled=shuffled)
    trained = train(step, sampler, options.minutes * 60)
    names = ("depth", "width", "batch_tokens", "minutes", "set")
    result = {"recipe": recipe, "seed": seed, **{name: getattr(options, name) for name in names}}
    result |= {name: bits_per_byte(model, options.work / f"{name}.bin") for name in ("same_books", "other_books")}
    result |= {**trained, "torch": torch.__version__}
    if model.token_embeddings.weight.is_cuda:
        peak_gb = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result |= {"peak_gb": peak_gb, "device": torch.cuda.get_device_name()}
    return result


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state to zero in place, because a captured graph updates these very tensors."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            else:
                state[name] = 0


def overfitting_warning(epochs: float, minutes: float) -> str:
    """A line for a run that saw the text more often than it should."""
    return (
        f"warning: the run saw the text {epochs:g} times and may overfit, so its loss does not compare recipes; give "
        f"more text, or --minutes {minutes * MAX_EPOCHS / epochs:.2g} for at most {MAX_EPOCHS} times"
    )


def bits_per_byte(model: TransformerLM, path: Path) -> float:
    """Over all tokens of a file, in windows side by side, so half a window of context on average."""
    result = evaluate_tokens(model, open_tokens(path), stride=model.config.context_length, batch_size=32)
    num_bytes = read_info(path).source_bytes
    assert num_bytes is not None
    return round(result.bits_per_byte(num_bytes), 4)


def optimizer_seconds(step: TrainStep, repeats: int = 10) -> float:
    """Seconds of an optimizer step on the gradients of the last step; weights and state stay the same."""
    state = [(tensor, tensor.clone()) for tensor in _tensors(step)]
    arguments: dict[str, Any] = {"gradient_factor": torch.ones((), device=step.device), "copies": step.weight_copies}
    update = partial(step.optimizer.step, **arguments)
    update()
    if step.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        update = graph.replay
        update()
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        update()
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / repeats
    with torch.no_grad():
        for tensor, before in state:
            tensor.copy_(before)
    return seconds


def _tensors(step: TrainStep) -> list[torch.Tensor]:
    """All that an optimizer step changes; the number of steps, which is no tensor on a CPU, is of no account."""
    parameters = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
    values = [value for state in step.optimizer.state.values() for value in state.values()]
    return [*parameters, *step.weight_copies.values(), *(value for value in values if isinstance(value, torch.Tensor))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    repository = Path(__file__).resolve().parents[2]
    add = parser.add_argument
    add("--recipe", nargs="+", choices=RECIPES, default=["adamw", "muon"])
    add("--minutes", type=float, help="time of training, 1 by default")
    add("--seeds", type=int, default=1, help="runs of each recipe")
    add("--first-seed", type=int, default=0)
    add("--depth", type=int, help="number of blocks, 8 by default")
    add("--width", type=int, help="d_model, 512 by default; heads have 64 features")
    add("--context", type=int, help="1024 tokens by default")
    add("--batch-tokens", type=int, help="tokens a step, 65,536 by default")
    add("--vocab-size", type=int, help="32,768 by default")
    add("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="changes, in TOML: optimizer='\"muon\"'")
    add("--text", type=Path, default=repository.parent / "shared" / "data", help="folder of the books")
    add("--work", type=Path, default=repository / "runs" / "fixed_compute", help="folder of the token files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tokens-only", action="store_true", help="make the token files and end")
    add("--small", action="store_true", help="a small model and 4 MB of the text, for a CPU")
    options = parser.parse_args()
    usual = {"minutes": 1.0, "depth": 8, "width": 512, "context": 1024, "batch_tokens": 65_536, "vocab_size": 32_768}
    small = {"minutes": 0.5, "depth": 2, "width": 128, "context": 128, "batch_tokens": 2048, "vocab_size": 2048}
    for name, value in (small if options.small else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.work = options.work / "small" if options.small else options.work
    return options


def main() -> None:
    options = parse()
    make_tokens(options.text, options.work, options.vocab_size, 4_000_000 if options.small else None)
    if options.tokens_only:
        return
    configs = {recipe: run_config(recipe, options.set, options) for recipe in options.recipe}  # checks all first
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for recipe, config in configs.items():
            try:
                result = run(recipe, seed, config, options)
                print(json.dumps(result), flush=True)
                if result["epochs"] > MAX_EPOCHS:
                    print(overfitting_warning(result["epochs"], options.minutes), file=sys.stderr, flush=True)
            except (FloatingPointError, RuntimeError) as error:  # the other recipes are still worth their time
                print(json.dumps({"recipe": recipe, "seed": seed, "error": str(error)[:500]}), flush=True)
            torch.compiler.reset()  # else compiled code is not made anew after eight models
            gc.collect()
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
