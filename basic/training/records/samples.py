"""Texts that a model writes while it is trained: in samples.txt, and in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from basic.generation.text import TextTokenizer, complete
from basic.model import RotaryPositionalEmbedding, TransformerLM
from basic.training.parallel.world import World, is_sharded
from basic.training.records.log import NullLog, RunLog
from basic.training.settings import RunConfig


def write_sample(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    config: RunConfig,
    step: int,
    run_dir: Path,
    log: RunLog | NullLog,
    world: World,
) -> None:
    """Generate a text and append it to samples.txt, on rank 0; all ranks call this."""
    full, settings = _full_model(model, world), config.train

    def write() -> None:
        end, path = settings.end_of_text, run_dir / "samples.txt"
        how: dict[str, Any] = {"top_p": 0.95, "seed": settings.seed, "end_of_text": end}
        (text,) = complete(full, tokenizer, [end], settings.sample_tokens, **how)
        record = {"kind": "sample", "step": step, "text": text.strip()}
        log.write(record)
        try:
            with open(path, "ab") as file:
                file.write(format_sample(record).encode())
        except OSError as error:  # the disk is full; the log keeps lines that it cannot write
            log.print_message(f"warning: {path} cannot be written ({error})")

    world.on_rank_0(write)


def format_sample(record: dict[str, Any]) -> str:
    """The entry in samples.txt of a sample's record in the log."""
    return f"--- step {record['step']} ---\n{record.get('text', '')}\n\n"


def _full_model(model: TransformerLM, world: World) -> TransformerLM:
    """Return the model; of a sharded model, a copy with all weights gathered on rank 0."""
    if not is_sharded(model):
        return model
    weights = world.full_state_dict(model, model.compute_dtype)
    with torch.device("meta"):  # allocates no memory and draws no random numbers
        full = TransformerLM(model.config)
    for module in full.modules():
        if isinstance(module, RotaryPositionalEmbedding):
            module.to_empty(device=model.token_embeddings.weight.device)
    if world.is_rank_0:
        full.load_state_dict(weights, assign=True)
    full.activation_dtype = model.compute_dtype
    return full
