"""Evaluate a trained model on a complete file: `basic evaluate runs/quickstart`.

The file is a token file (written by `basic encode`) or a text, and each of its tokens is scored once. Loss and
perplexity are per token, so they compare only models with the same tokenizer. Bits per byte compare all models. The
validation loss in metrics.jsonl and in loss.png is another number: the mean over a few sampled sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, such as runs/quickstart."""
    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """Token file (.bin, .npy) or UTF-8 text; None: the run's validation tokens."""
    checkpoint: int | Literal["best", "last"] = "last"
    """The step of a checkpoint, best for the one with the lowest validation loss, or last for the newest."""
    stride: int | None = None
    """Tokens from the start of a window to the start of the next; each token has at least context_length - stride + 1
    tokens of context, unless it is nearer to the start of the file. None: half the context length. A smaller stride
    gives a slightly lower loss and takes longer."""
    batch_size: int = 8
    """Windows per forward pass; does not change the result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; with float32 the result is the same on every device."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    from basic.analysis.evaluation import evaluate_tokens
    from basic.training.parallel.devices import activation_dtype, choose_device
    from basic.training.run_folder import load_run

    run = load_run(options.run, checkpoint=options.checkpoint, device=options.device)
    precision = replace(run.config.train, precision=options.precision)
    run.model.activation_dtype = activation_dtype(precision, choose_device(options.device))
    tokenizer = None if run.tokenizer_path is None else run.tokenizer
    if options.file is None and not run.config.data.valid_tokens:
        raise InvalidInputError(f"{options.run} names no validation tokens; give a token file or a text after the run")
    path = options.file or Path(run.config.data.valid_tokens)
    if not (path.is_file() or path.is_dir()):  # a run of somebody else may name a device
        raise FileNotFoundError(f"there is no file {str(path)!r}; give a token file or a text after the run")
    tokens, num_bytes = read_tokens(path, tokenizer, run.config.data.dtype)
    # Every document follows an end-of-text token, and so does the first one.
    specials = {} if tokenizer is None else tokenizer.special_token_ids
    prefix_token_id = specials.get(run.config.train.end_of_text)
    score = evaluate_tokens(
        run.model,
        tokens,
        prefix_token_id=prefix_token_id,
        stride=options.stride,
        batch_size=options.batch_size,
        progress=True,
    )
    print(f"{path}: {score.num_tokens:,} tokens scored, step {run.step:,} of {options.run}")
    print(f"loss            {score.loss:.6f} nats per token")
    print(f"perplexity      {score.perplexity:.4f}")
    if num_bytes:
        print(f"bits per byte   {score.bits_per_byte(num_bytes):.6f}  ({num_bytes:,} bytes)")
    else:
        print("bits per byte   unknown: the size of the text of these tokens is not recorded")


def read_tokens(path: Path, tokenizer, dtype: str):
    """Return the ids of a file and the size of their text in bytes, 0 if unknown."""
    from basic.bytes_utils import decode_blocks
    from basic.common.files import read_file
    from basic.tokens.opening import find_info, open_tokens

    if path.is_dir() or path.suffix in (".bin", ".npy", ".json"):
        info = None if path.suffix == ".npy" else find_info(path)
        dtype = "" if info or path.suffix == ".npy" else dtype
        made_by = None if tokenizer is None else tokenizer.fingerprint
        tokens = open_tokens(path, dtype=dtype or None, made_by=made_by)
        return tokens, info.source_bytes if info else 0
    if tokenizer is None:
        raise InvalidInputError(f"the run has no tokenizer/ folder, so {path} must be a token file (.bin or .npy)")
    content = read_file(path)
    return tokenizer.encode_array("".join(decode_blocks([content], path))), len(content)
