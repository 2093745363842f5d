"""Train a model from a configuration file: `basic train --config tinystories`.

Every setting of the file can be overridden: `--batch-size 32 --num-layers 6`. `--resume runs/NAME` resumes a run and
needs no other option. `--init-from runs/NAME` begins with the weights of another model. An error is one line;
--traceback shows where it comes from.

Without a configuration, on your own text: `basic train --text my.txt --minutes 10`; add --help to it for its options.

On several GPUs: `torchrun --nproc-per-node 4 -m basic train ...`, with the same options, but not with --text.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from basic.common import command_line
from basic.common.config_files import convert, from_table, load_config
from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.training.recipes import RecipeName, recipe_settings
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from basic.transformer.configuration import ModelConfig

if TYPE_CHECKING:
    from basic.formats.initial_model import InitialModel
    from basic.Tokenizer import Tokenizer
    from basic.training.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.OmitArgPrefixes[RunConfig]
    """The model, the training and the data."""
    config: Path | None = None
    """TOML file with settings; they become the defaults of the other options."""
    recipe: RecipeName | None = None
    """Sizes, optimizer, rates and number of steps that suit a depth, or the minutes; modern reaches a lower loss in the
    same time than the assignment's, handout. Settings of --config, and options, override those of the recipe."""
    depth: int | None = None
    """Number of blocks of the recipe; None for as many as suit --minutes on this machine."""
    output: Path | None = None
    """Run folder to create; None: runs/ and the name of the configuration file. Must not contain another run."""
    resume: Path | None = None
    """Folder of a run to resume from its newest complete checkpoint, with its settings. Options override them, for
    example --steps for a longer run."""
    overwrite: bool = False
    """Delete the run in the output folder and start again; other files in the folder remain."""
    verify: bool = False
    """Compare all token files with their checksums before training."""


def parse(arguments: list[str]) -> tuple[Options, InitialModel | None]:
    """Parse the options, and open the model of --init-from.

    --config, --recipe, --resume and --init-from are parsed first, because they have the defaults of the other options.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--init-from")
    source, arguments = first.parse_known_args(arguments)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path, nargs="?")
    first.add_argument("--recipe")
    first.add_argument("--depth", type=command_line.parse_integer)
    given, others = first.parse_known_args(arguments)
    initial = None
    if source.init_from is not None:
        from basic.formats.initial_model import open_initial_model

        initial = open_initial_model(source.init_from)
    if initial is not None and given.resume is not None:
        raise InvalidInputError("--resume continues with the weights of the run itself; leave --init-from out")
    if given.config is not None and given.resume is not None:
        raise InvalidInputError("--resume takes the settings from the run itself; leave --config out")
    if given.recipe is not None and (given.resume or initial):
        raise InvalidInputError("the model and its settings exist already; leave --recipe out")
    if given.depth is not None and given.recipe is None:
        raise InvalidInputError("--depth is the number of blocks of a recipe; give --recipe too, or use --num-layers")
    if given.recipe is not None and given.config is None and {"-h", "--help"}.intersection(others):
        return command_line.parse(Options, __doc__, args=arguments), None  # no sizes are known without a tokenizer
    if given.recipe is not None:
        output = Path("runs") / (given.recipe if given.config is None else given.config.stem)
        complete = partial(add_recipe, given.recipe, given.depth, others)
        if given.config is None:
            complete(table := {})
            config = from_table(RunConfig, table)
        else:
            config = load_config(given.config, RunConfig, complete)
        default = Options(run=config, config=given.config, recipe=given.recipe, depth=given.depth, output=output)
    elif given.resume is not None:
        from basic.training.run_folder import load_run_config

        default = Options(run=load_run_config(given.resume), output=given.resume)
    elif initial is not None or given.config is not None:
        output = None if given.config is None else Path("runs") / given.config.stem
        config = (
            load_config(given.config, RunConfig, partial(add_vocab_size, others))
            if initial is None
            else initial.run_config(given.config)
        )
        default = Options(run=config, config=given.config, output=output)
    elif any(other.partition("=")[0] in ("-h", "--help", "--vocab-size") for other in others):
        return command_line.parse(Options, __doc__, args=arguments), None
    else:
        got = " ".join(others) or "none of them"
        raise InvalidInputError(
            f"give --text TEXT, --config FILE, --recipe NAME, --init-from MODEL or --resume FOLDER; got {got}"
        )
    return command_line.parse(Options, __doc__, args=arguments, default=default), initial


def add_vocab_size(arguments: list[str], table: dict[str, Any]) -> None:
    """A configuration without model.vocab_size gets that of its tokenizer."""
    from basic.Tokenizer import Tokenizer

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--tokenizer")
    first.add_argument("--vocab-size", type=command_line.parse_integer)
    given, _ = first.parse_known_args(arguments)
    model, data = table.get("model"), table.get("data", {})
    if not isinstance(model, dict) or not isinstance(data, dict) or "vocab_size" in model:
        return  # complete, or refused later
    path = data.get("tokenizer") if given.tokenizer is None else given.tokenizer
    if given.vocab_size is not None:
        model["vocab_size"] = given.vocab_size
    elif isinstance(path, str) and path:
        model["vocab_size"] = Tokenizer.load(path).vocab_size


def add_recipe(name: str, depth: int | None, arguments: list[str], table: dict[str, Any]) -> None:
    """A configuration gets the settings of a recipe that it does not have itself."""
    from basic.training.parallel.devices import choose_device, matmul_flops_per_s

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for part in ("model", "train"):
        if not isinstance(table.setdefault(part, {}), dict):
            raise InvalidConfigError(f"{part} must be a table of settings, got {table[part]!r}")
    model, train = table["model"], table["train"]
    first.add_argument("--minutes", type=float)
    first.add_argument("--device", default=convert(str, train.get("device", "auto"), "train.device"))
    first.add_argument("--warmup-steps", default=train.get("warmup_steps"))
    given, _ = first.parse_known_args(arguments)
    minutes = convert(float | None, train.get("minutes"), "train.minutes") if given.minutes is None else given.minutes
    add_vocab_size(arguments, table)
    if "vocab_size" not in model:
        raise InvalidConfigError("a recipe needs the size of the vocabulary; give --tokenizer or --vocab-size")
    device, speed = choose_device(given.device), None
    if depth is None and minutes is not None:
        if is_one_of_several():  # each process would measure another speed
            raise InvalidInputError("several processes cannot choose the depth of a recipe; give --depth")
        speed = matmul_flops_per_s(device)
    size = {"vocab_size": convert(int, model["vocab_size"], "model.vocab_size"), "depth": depth, "minutes": minutes}
    on_device = {"matmul_flops_per_s": speed, "has_gpu": device.type == "cuda"}
    recipe = recipe_settings(name, **size, **on_device)  # ty: ignore[invalid-argument-type]
    if given.warmup_steps is not None:
        del recipe["train"]["warmup_share"]
    table |= {"model": recipe["model"] | model, "train": recipe["train"] | train}


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def command() -> None:
    given = [argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:]]
    if "--text" in given:
        from basic.commands import own_text

        classes = (Options, ModelConfig, TrainConfig, DataConfig)
        chosen = {f"--{each.name.replace('_', '-')}" for options in classes for each in fields(options)}
        chosen -= {f"--{each.name.replace('_', '-')}" for each in fields(own_text.Options)}
        if wrong := chosen.intersection(given):
            raise InvalidInputError(
                f"{min(wrong)} is no option with --text, which chooses the settings; `basic train --text TEXT --help` "
                "lists those that are, and the token files of a text, in data/, can be given to `basic train --config`"
            )
        if is_one_of_several():  # each process would measure another speed
            raise InvalidInputError(
                "several processes cannot choose the settings for a text; leave torchrun out, or give the token files "
                "of the text, in data/, to `basic train --config` or to `basic train --recipe modern --depth N`"
            )
        own_text.command(sys.argv[1:])
        return
    options, initial = parse(sys.argv[1:])
    from basic.training.parallel.world import join_world

    with join_world(os.environ) as world:
        start(options, initial, world)


def open_data(data: DataConfig, *, verify: bool = False) -> tuple[Any, Any, Tokenizer | None]:
    """Open the tokens for training, those for validation, and the tokenizer, with which they must have been made."""
    from basic.Tokenizer import Tokenizer
    from basic.tokens.opening import open_tokens

    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else None
    made_by = None if tokenizer is None else tokenizer.fingerprint
    paths = data.train_tokens, data.valid_tokens
    train, valid = (open_tokens(path, dtype=data.dtype or None, verify=verify, made_by=made_by) for path in paths)
    return train, valid, tokenizer


def start(options: Options, initial: InitialModel | None, world: World) -> None:
    from basic.commands.own_text import announce
    from basic.commands.show.report import leave_report
    from basic.formats.initial_model import open_initial_model
    from basic.training.checkpoints.of_run import checkpoint_paths
    from basic.training.loop import train
    from basic.training.parallel.devices import choose_device
    from basic.training.records.metrics import logged_metrics

    output, data = options.output or Path("runs/unnamed"), options.run.data
    if options.resume is not None and output != options.resume:
        raise InvalidInputError(
            f"--resume writes to the run's own folder; leave out --output, or copy the run first, got --output {output}"
        )
    for name in ("train_tokens", "valid_tokens"):
        if not getattr(data, name):
            raise InvalidConfigError(f"data.{name} is not set; give a token file made by `basic encode`")
    own = output / "tokenizer"  # a run folder has a copy of its tokenizer
    if options.resume is not None and own.is_dir():
        data = replace(data, tokenizer=str(own))
    *tokens, tokenizer = open_data(data, verify=options.verify)
    if initial is None and options.run.train.init_from and not checkpoint_paths(output):
        initial = open_initial_model(options.run.train.init_from)  # a run that was stopped before its first checkpoint
    if initial is not None:
        initial.check_tokenizer(tokenizer)
    vocab_size = options.run.model.vocab_size
    if world.is_rank_0 and tokenizer is not None and vocab_size > tokenizer.vocab_size:
        unused = vocab_size - tokenizer.vocab_size
        print(
            f"note: vocab_size={vocab_size:,} is {unused:,} more than the tokenizer has tokens; they are never used",
            file=sys.stderr,
        )
    is_new = options.overwrite or not (output / "config.toml").exists()
    if world.size == 1 and options.run.train.minutes is None and (is_new or options.resume is not None):
        options.run.train.check_schedule()
        records = [] if is_new else logged_metrics(output)
        steps_left = options.run.train.steps - (records[-1]["step"] if records else 0)
        if all(len(each) > options.run.model.context_length for each in tokens):  # else the run says what is wrong
            announce(options.run, steps_left, choose_device(options.run.train.device))
    how: dict[str, Any] = {"resume": options.resume is not None, "overwrite": options.overwrite, "progress": True}
    how["init_from"] = None if initial is None else initial.model
    run = train(options.run, tokens[0], tokens[1], output, tokenizer=tokenizer, world=world, **how)
    if world.is_rank_0:
        leave_report(output)
        print(f"trained {run.model.num_parameters:,} parameters for {run.step:,} steps; everything is in {output}")
