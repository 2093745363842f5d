"""Train a model from a configuration file: `uv run local/train.py --config local/configs/tinystories.toml`.

Every setting of the file can be overridden: `--batch-size 32 --num-layers 6`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.config_files import load_config
from basic.runs import RunConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.OmitArgPrefixes[RunConfig]
    """What to train, on what and how."""
    config: Path | None = None
    """TOML file with these settings; its values become the defaults of the other options."""
    output: Path | None = None
    """Folder for the run; by default runs/ and the configuration file's name. Must not hold another run."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder."""
    overwrite: bool = False
    """Remove the run that the folder holds, and start anew; other files in it stay."""


def parse(arguments: list[str]) -> Options:
    """The options; the file named by --config is read first, because it gives the others their defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(arguments)[0].config
    if path is None:
        return tyro.cli(Options, args=arguments, description=__doc__)
    default = Options(run=load_config(path, RunConfig), config=path, output=Path("runs") / path.stem)
    return tyro.cli(Options, args=arguments, default=default, description=__doc__)


def main(options: Options) -> None:
    from basic.token_files import open_tokens, read_info, sidecar_path
    from basic.Tokenizer import Tokenizer
    from basic.training import train

    output = options.output or Path("runs/unnamed")
    data = options.run.data
    for name in ("train_tokens", "valid_tokens"):
        if not getattr(data, name):
            raise ValueError(f"data.{name} is not set; give a token file made by local/encode.py")
    tokens = open_tokens(data.train_tokens), open_tokens(data.valid_tokens)
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else None
    for path in (data.train_tokens, data.valid_tokens):
        maker = read_info(path).tokenizer_fingerprint if sidecar_path(path).is_file() else None
        if tokenizer is not None and maker not in (None, tokenizer.fingerprint):
            raise ValueError(f"{path} was not made by the tokenizer in {data.tokenizer}; encode the text again with it")
    run = train(
        options.run,
        *tokens,
        output,
        tokenizer=tokenizer,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"trained {run.model.num_parameters:,} parameters for {run.step:,} steps; everything is in {output}")


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
