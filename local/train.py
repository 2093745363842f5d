"""Train a model from a configuration file: `uv run local/train.py --config local/configs/tinystories.toml`.

Every setting of the file can be overridden: `--batch-size 32 --num-layers 6`. `--resume runs/NAME` goes on with a run,
with nothing else to say. Errors are one line; with --traceback they show where they come from.

On several GPUs: `uv run torchrun --nproc-per-node 4 local/train.py ...`, with all else as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line
from basic.common.config_files import load_config
from basic.training.parallel.world import World, join
from basic.training.run_folder import config_of
from basic.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.OmitArgPrefixes[RunConfig]
    """What to train, on what and how."""
    config: Path | None = None
    """TOML file with these settings; its values become the defaults of the other options."""
    output: Path | None = None
    """Folder for the run; by default runs/ and the configuration file's name. Must not hold another run."""
    resume: Path | None = None
    """Folder of a run to go on with, from its newest whole checkpoint and with its settings; those given here change
    them, such as --steps for a longer run."""
    overwrite: bool = False
    """Remove the run that the folder holds, and start anew; other files in it stay."""
    verify: bool = False
    """Read all tokens first and compare them with their checksums."""


def parse(arguments: list[str]) -> Options:
    """The options; what --config or --resume names is read first, because it gives the others their defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path, nargs="?")
    given = first.parse_known_args(arguments)[0]
    if given.config is not None and given.resume is not None:
        raise ValueError("--resume takes the settings from the run itself; leave --config out")
    if given.resume is not None:
        default = Options(run=config_of(given.resume), output=given.resume)
    elif given.config is not None:
        output = Path("runs") / given.config.stem
        default = Options(run=load_config(given.config, RunConfig), config=given.config, output=output)
    else:
        return tyro.cli(Options, args=arguments, description=__doc__)
    return tyro.cli(Options, args=arguments, default=default, description=__doc__)


def main() -> None:
    options = parse(sys.argv[1:])
    with join(os.environ) as world:
        start(options, world)


def start(options: Options, world: World) -> None:
    from basic.Tokenizer import Tokenizer
    from basic.tokens.opening import open_tokens
    from basic.training.loop import train

    output, data = options.output or Path("runs/unnamed"), options.run.data
    if options.resume is not None and output != options.resume:
        raise ValueError(f"a run goes on in its own folder; leave out --output {output}, or copy the folder first")
    for name in ("train_tokens", "valid_tokens"):
        if not getattr(data, name):
            raise ValueError(f"data.{name} is not set; give a token file made by local/encode.py")
    # A run has a copy of its tokenizer.
    own = output / "tokenizer" if options.resume else Path()
    folder = own if options.resume and own.is_dir() else data.tokenizer
    tokenizer = Tokenizer.load(folder) if folder else None
    made_by = None if tokenizer is None else tokenizer.fingerprint
    tokens = [
        open_tokens(path, dtype=data.dtype or None, verify=options.verify, made_by=made_by)
        for path in (data.train_tokens, data.valid_tokens)
    ]
    how = {"resume": options.resume is not None, "overwrite": options.overwrite, "progress": True}
    run = train(options.run, tokens[0], tokens[1], output, tokenizer=tokenizer, world=world, **how)
    if world.is_first:
        print(f"trained {run.model.num_parameters:,} parameters for {run.step:,} steps; everything is in {output}")


if __name__ == "__main__":
    command_line.run(main)
