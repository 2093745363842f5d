"""Measure a trained model on a whole file, each token once: `uv run local/evaluate.py runs/quickstart`.

The file is one of token ids (local/encode.py makes them) or a text. Perplexity is that of a token, so it compares
models of the same tokenizer only; bits per byte compare all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/quickstart."""
    file: tyro.conf.Positional[Path | None] = None
    """Token file (.bin, .npy) or UTF-8 text; by default the run's validation tokens."""
    stride: int | None = None
    """Tokens from one window to the next; each token sees at least context_length - stride + 1 tokens before it, as far
    as there are so many. By default half the context; less scores a little better, and takes longer."""
    batch_size: int = 8
    """Windows computed side by side; no part of the result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; with float32 the result is the same on every device."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes the best there is."""


def main(options: Options) -> None:
    from basic.analysis.evaluation import score_tokens
    from basic.Tokenizer import Tokenizer
    from basic.training.devices import activation_dtype, choose_device
    from basic.training.run_folder import load_run

    run = load_run(options.run, device=options.device)
    precision = replace(run.config.train, precision=options.precision)
    run.model.activation_dtype = activation_dtype(precision, choose_device(options.device))
    tokenizer = None if run.tokenizer_path is None else Tokenizer.load(run.tokenizer_path)
    path = options.file or Path(run.config.data.valid_tokens)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}; name a token file or a text behind the run")
    tokens, num_bytes = read(path, tokenizer, run.config.data.dtype)
    # A document begins behind an end of text, so does the file's first.
    specials = {} if tokenizer is None else tokenizer.special_token_ids
    first_id = specials.get(run.config.train.end_of_text)
    score = score_tokens(
        run.model, tokens, first_id=first_id, stride=options.stride, batch_size=options.batch_size, progress=True
    )
    print(f"{path}: {score.num_tokens:,} tokens scored, step {run.step:,} of {options.run}")
    print(f"loss            {score.loss:.6f} nats a token")
    print(f"perplexity      {score.perplexity:.4f}")
    if num_bytes:
        print(f"bits per byte   {score.bits_per_byte(num_bytes):.6f}  ({num_bytes:,} bytes)")
    else:
        print("bits per byte   unknown: nothing says from how many bytes these tokens were made")


def read(path: Path, tokenizer, dtype: str):
    """The ids of a file, and the length of the text they stand for in bytes, 0 for unknown."""
    from basic.tokens.opening import known_info, open_tokens

    if path.is_dir() or path.suffix in (".bin", ".npy", ".json"):
        info = None if path.suffix == ".npy" else known_info(path)
        dtype = "" if info or path.suffix == ".npy" else dtype
        made_by = None if tokenizer is None else tokenizer.fingerprint
        tokens = open_tokens(path, dtype=dtype or None, made_by=made_by)
        return tokens, info.source_bytes if info else 0
    if tokenizer is None:
        raise ValueError(f"the run has no tokenizer/ folder, so {path} must be a token file (.bin or .npy)")
    text = path.read_bytes()
    return tokenizer.encode_array(text), len(text)


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
