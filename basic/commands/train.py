"""Train a model from a configuration file: `basic train --config tinystories`.

Every setting of the file can be overridden: `--batch-size 32 --num-layers 6`. `--resume runs/NAME` resumes a run and
needs no other option. An error is one line; --traceback shows where it comes from.

On several GPUs: `torchrun --nproc-per-node 4 -m basic train ...`, with the same options.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from basic.common import command_line
from basic.common.config_files import load_config
from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.training.parallel.world import World, join_world
from basic.training.run_folder import load_run_config
from basic.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.OmitArgPrefixes[RunConfig]
    """The model, the training and the data."""
    config: Path | None = None
    """TOML file with settings; they become the defaults of the other options."""
    output: Path | None = None
    """Run folder to create; None: runs/ and the name of the configuration file. Must not contain another run."""
    resume: Path | None = None
    """Folder of a run to resume from its newest complete checkpoint, with its settings. Options override them, for
    example --steps for a longer run."""
    overwrite: bool = False
    """Delete the run in the output folder and start again; other files in the folder remain."""
    verify: bool = False
    """Compare all token files with their checksums before training."""


def parse(arguments: list[str]) -> Options:
    """Parse the options. --config and --resume are parsed first, because their file has the defaults of the others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path, nargs="?")
    given, others = first.parse_known_args(arguments)
    if given.config is not None and given.resume is not None:
        raise InvalidInputError("--resume takes the settings from the run itself; leave --config out")
    if given.resume is not None:
        default = Options(run=load_run_config(given.resume), output=given.resume)
    elif given.config is not None:
        config = load_config(given.config, RunConfig)
        default = Options(run=config, config=given.config, output=Path("runs") / given.config.stem)
    elif any(other.partition("=")[0] in ("-h", "--help", "--vocab-size") for other in others):
        return command_line.parse(Options, __doc__, args=arguments)
    else:
        raise InvalidInputError(f"give --config FILE or --resume FOLDER; got {' '.join(others) or 'neither'}")
    return command_line.parse(Options, __doc__, args=arguments, default=default)


def command() -> None:
    options = parse(sys.argv[1:])
    with join_world(os.environ) as world:
        start(options, world)


def start(options: Options, world: World) -> None:
    from basic.Tokenizer import Tokenizer
    from basic.tokens.opening import open_tokens
    from basic.training.loop import train

    output, data = options.output or Path("runs/unnamed"), options.run.data
    if options.resume is not None and output != options.resume:
        raise InvalidInputError(
            f"--resume writes to the run's own folder; leave out --output, or copy the run first, got --output {output}"
        )
    for name in ("train_tokens", "valid_tokens"):
        if not getattr(data, name):
            raise InvalidConfigError(f"data.{name} is not set; give a token file made by `basic encode`")
    # A run folder has a copy of its tokenizer.
    own = output / "tokenizer" if options.resume else Path()
    folder = own if options.resume and own.is_dir() else data.tokenizer
    tokenizer = Tokenizer.load(command_line.tokenizer_folder(Path(folder))) if folder else None
    made_by = None if tokenizer is None else tokenizer.fingerprint
    tokens = [
        open_tokens(path, dtype=data.dtype or None, verify=options.verify, made_by=made_by)
        for path in (data.train_tokens, data.valid_tokens)
    ]
    how: dict[str, Any] = {"resume": options.resume is not None, "overwrite": options.overwrite, "progress": True}
    run = train(options.run, tokens[0], tokens[1], output, tokenizer=tokenizer, world=world, **how)
    if world.is_rank_0:
        print(f"trained {run.model.num_parameters:,} parameters for {run.step:,} steps; everything is in {output}")
