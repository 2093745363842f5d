"""Train on your own text, without a configuration: `basic train --text my.txt --minutes 10`.

Splits off a part for validation, trains a tokenizer, encodes the text, chooses a model and a batch that fit this
machine, the time and the amount of text, trains, and writes samples and a report. `basic train --help` lists the
options with which every setting is chosen by hand, for a text that is token files already.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from basic.analysis.accounting import count_parameters
from basic.commands.prepare_text import END, PreparedText, local_sources, prepare_text
from basic.commands.show.report import leave_report
from basic.common import command_line
from basic.common.config_files import from_table
from basic.common.errors import InvalidInputError
from basic.model import TransformerLM
from basic.training.checkpoints.of_run import valid_losses
from basic.training.loop import train
from basic.training.parallel.devices import (
    activation_dtype,
    choose_device,
    is_out_of_memory,
    matmul_flops_per_s,
    more_micro_batches,
)
from basic.training.recipes import (
    RecipeName,
    against_memorizing,
    depth_for,
    flops_per_token,
    most_epochs,
    most_parameters,
    num_matrix_parameters,
    recipe_settings,
)
from basic.training.run_folder import Run
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from basic.training.step import TrainStep, make_optimizer

USUAL_EPOCHS = 5
"""A text that would be seen more often gets a larger model of the modern recipe instead, if it is long enough."""
MIN_STEP_TOKENS = {"handout": 1024, "modern": 16_384}
"""Steps get smaller, down to these, where the time is too short for half of the handout's or for 1,000 modern ones."""
LONG_STEP_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    text: tuple[str, ...]
    """UTF-8 text, or JSON lines or Parquet tables, also compressed: files, globs in quotation marks, and folders. A
    file is a document; so is what stands between two <|endoftext|>, a JSON line and a row."""
    minutes: float = 10.0
    """Time for the training; the tokenizer and the token files, made once for a text, take extra time."""
    valid_fraction: float = 0.1
    """Share of the text that is kept for validation, in whole documents where there are several."""
    output: Path | None = None
    """Run folder to create; None: runs/ and the name of the text. Must not contain another run."""
    overwrite: bool = False
    """Delete the run in the output folder and start again; other files in the folder remain."""
    data: Path = Path("data")
    """Gets a folder with the tokenizer and the tokens of the text, which later runs on the same text use."""
    vocab_size: int | None = None
    """Size of the tokenizer's vocabulary; None: 512 to 32768, from the size of the text."""
    recipe: RecipeName = "modern"
    """modern reaches a lower loss in the same time; handout is the assignment's model, a Llama, which other programs
    can run after `basic export`."""
    depth: int | None = None
    """Number of Transformer blocks, from which all other sizes follow; None: what fits the machine and the time."""
    seed: int = 0
    """Seed of the initial weights, the batches and the samples."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def command(arguments: list[str]) -> None:
    """`basic train --text ...`."""
    prog = f"{command_line.command('train')} --text TEXT"
    settings = vars(command_line.parse(Options, __doc__, args=arguments, prog=prog))
    text, output, seed = settings.pop("text"), settings.pop("output"), settings["seed"]
    run_dir = output or default_output(text)
    run = train_text(text, run_dir, **settings, progress=True, confirm=True)
    samples = run.complete([""] * 2, 200, temperature=0.8, top_p=0.95, seed=seed)
    for number, sample in enumerate(samples, 1):
        command_line.print_text(f"\nsample {number}: {sample.strip()}")
    print(f"\neverything is in {run_dir}; its curves and samples: {run_dir / 'report.html'}")
    losses = valid_losses(run_dir)
    best, last = min(losses, key=lambda step: losses[step], default=0), max(losses, default=0)
    if losses and losses[best] < losses[last]:
        print(
            f"the validation loss was lowest at step {best} ({losses[best]:.3f}, at the end {losses[last]:.3f}): the "
            "text was learned by heart from there on; `--checkpoint best` uses that step"
        )
    folder = shlex.quote(str(run_dir))
    for next_command in (f"`basic generate {folder}`", f"`basic playground {folder}`"):
        print(f"next: {command_line.as_started(next_command)}")


def train_text(
    text: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    minutes: float = 10.0,
    valid_fraction: float = 0.1,
    overwrite: bool = False,
    data: str | os.PathLike = "data",
    vocab_size: int | None = None,
    recipe: RecipeName = "modern",
    depth: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
    confirm: bool = False,
) -> Run:
    """Train a tokenizer and a model on a text, with all sizes chosen for this machine and time.

    Args:
        text: a file, a glob or a folder, or several.
        output: the run folder; by default runs/ and the name of the text.
        valid_fraction: share of the text for validation, see `basic.commands.prepare_text`.
        data: gets a folder with the tokenizer and the tokens of the text; with the same text they are used again.
        recipe: `modern`, or `handout`, whose models can be exported as a Llama.
        progress: print what is chosen, and show the progress.
        confirm: ask a person at a terminal before a training of more than an hour.

    Raises:
        InvalidInputError: the text is too short, or an argument is out of its range.
        FileNotFoundError: there is no such file.
        FileExistsError: `output` contains a run.
    """
    texts = [os.fspath(each) for each in ([text] if isinstance(text, str | os.PathLike) else text)]
    if not 0 < minutes < float("inf"):
        raise InvalidInputError(f"minutes must be above 0, got {minutes}")
    # What is wrong with these is said before the text is encoded.
    recipe_settings(recipe, vocab_size=1, depth=1 if depth is None else depth)
    TrainConfig(steps=1, seed=seed)
    choose_device(device)
    local_sources(texts)
    run_dir, say = Path(default_output(texts) if output is None else output), print if progress else lambda line: None
    if (run_dir / "config.toml").exists() and not overwrite:
        raise FileExistsError(
            f"{run_dir} already contains a run; add --overwrite to replace it, give another folder with --output, or "
            f"continue it with `basic train --resume {run_dir}`"
        )
    prepared = prepare_text(texts, Path(data), valid_fraction=valid_fraction, vocab_size=vocab_size, progress=progress)
    size, where = prepared.tokenizer.vocab_size, prepared.folder
    found = "found in" if prepared.was_there else "written to"
    say(f"text    {len(prepared.train_tokens):,} tokens for training, {len(prepared.valid_tokens):,} for validation,")
    few = f" (for {vocab_size:,} the text has too few pairs)" if size < (vocab_size or 0) else ""
    say(f"        vocabulary {size:,}{few}, {found} {where}")
    config, line = choose(prepared, minutes, device, depth=depth, seed=seed, recipe=recipe)
    say(f"model   {line}")
    if confirm:
        command_line.confirm_start(minutes * 60)
    settings: dict[str, Any] = {"tokenizer": prepared.tokenizer, "overwrite": overwrite, "progress": progress}
    run = train(config, prepared.train_tokens, prepared.valid_tokens, run_dir, **settings)
    leave_report(run_dir)
    return run


def default_output(texts: Sequence[str]) -> Path:
    """runs/ and the name of the first text."""
    if not texts:
        raise InvalidInputError("there is no text; give a file, a glob or a folder")
    first = Path(texts[0])
    return Path("runs") / ((first.name.partition(".")[0] if first.exists() else "") or "text")


def choose(
    prepared: PreparedText,
    minutes: float,
    device_name: str,
    *,
    depth: int | None,
    seed: int,
    recipe: RecipeName = "modern",
) -> tuple[RunConfig, str]:
    """Choose the largest model of the recipe that learns enough in the time, by the speed of steps on this machine.

    Returns:
        The configuration, and a line that says what was chosen and measured.
    """
    device, num_tokens = choose_device(device_name), len(prepared.train_tokens)
    seconds, configure = 60 * minutes, partial(_configure, prepared, recipe, device_name=device_name, seed=seed)
    if depth is None:
        step_s, config = _largest_model(configure, recipe, num_tokens, seconds, device)
    else:
        step_s, config = time_steps(configure(depth), device)
    fewest = 1000 if recipe == "modern" else config.train.steps / 2
    most = num_tokens * most_epochs(num_matrix_parameters(config.model) / num_tokens)
    while True:
        tokens_per_step = config.train.batch_size * config.model.context_length
        if min(seconds / step_s, most / tokens_per_step) >= fewest or tokens_per_step < 2 * MIN_STEP_TOKENS[recipe]:
            break
        smaller = replace(config.train, batch_size=config.train.batch_size // 2, gradient_accumulation=1)
        step_s, config = time_steps(replace(config, train=smaller), device)
    most_steps = max(20, round(most / tokens_per_step))
    is_short, steps = seconds / step_s > most_steps, max(1, round(min(seconds / step_s, most_steps)))
    epochs = steps * tokens_per_step / num_tokens
    intervals = {"log_interval": max(1, steps // 200), "eval_interval": max(1, steps // 20)}
    intervals |= {"sample_interval": max(1, steps // 4), "checkpoint_interval": max(1, steps // 4)}
    budget_settings = {"steps": steps} if is_short else {"steps": 0, "minutes": minutes}
    train_settings: dict[str, Any] = {**intervals, **budget_settings, "eval_batches": 4}
    if recipe == "modern":
        train_settings |= against_memorizing(config, num_tokens, epochs)
    config = replace(config, train=replace(config.train, **train_settings))
    model, train_config = config.model, config.train
    blocks = f"{model.num_layers} block{'s'[: model.num_layers > 1]} of {model.d_model} features"
    line = (
        f"{blocks}, {count_parameters(model) / 1e6:.2f}M parameters; {train_config.batch_size} sequences of "
        f"{model.context_length} tokens a step, {step_s:.3g} s on {device}: about {steps:,} steps in "
        f"{steps * step_s / 60:.1f} minutes"
    )
    if is_short:
        line += f" (the text is seen {epochs:.0f} times; more would only learn it by heart)"
    if train_config.dropout:
        line += f"; dropout {train_config.dropout}, because the text is seen {epochs:.1f} times"
    return config, line


def _largest_model(
    configure: Callable[[int], RunConfig], recipe: RecipeName, num_tokens: int, seconds: float, device: torch.device
) -> tuple[float, RunConfig]:
    """The largest run of a recipe that learns enough in the time; the seconds of its steps come first."""
    vocab_size, has_gpu = configure(1).model.vocab_size, device.type == "cuda"
    most_tokens = USUAL_EPOCHS * num_tokens if recipe == "modern" else math.inf

    def within(flops: float) -> int:
        depth = depth_for(recipe, vocab_size, flops, has_gpu, most_tokens)
        while depth > 1 and num_matrix_parameters(configure(depth).model) > most_parameters(num_tokens):
            depth -= 1
        return depth

    depth = within(seconds * matmul_flops_per_s(device))
    while True:
        step_s, config = time_steps(configure(depth), device)
        tokens_per_step = config.train.batch_size * config.model.context_length
        wanted = min(config.train.steps, most_tokens / tokens_per_step)
        if depth == 1 or seconds / step_s >= wanted:
            return step_s, config
        flops_per_s = flops_per_token(config.model) * tokens_per_step / step_s
        depth = min(depth - 1, within(seconds * flops_per_s))


def _configure(prepared: PreparedText, recipe: RecipeName, depth: int, *, device_name: str, seed: int) -> RunConfig:
    """The recipe's run of a depth, with sequences that fit into the text."""
    has_gpu = choose_device(device_name).type == "cuda"
    tables = recipe_settings(recipe, vocab_size=prepared.tokenizer.vocab_size, depth=depth, has_gpu=has_gpu)
    shortest = min(len(prepared.train_tokens), len(prepared.valid_tokens))
    context, longest = tables["model"]["context_length"], 1 << (shortest - 1).bit_length() - 1
    if longest < context:  # the same number of tokens a step
        tables["train"]["batch_size"] *= context // longest
        tables["model"]["context_length"] = longest
    tables["train"] |= {"seed": seed, "device": device_name, "end_of_text": END}
    folder = prepared.folder
    data = DataConfig(
        train_tokens=str(folder / "train.bin"),
        valid_tokens=str(folder / "valid.bin"),
        tokenizer=str(folder / "tokenizer"),
    )
    return replace(from_table(RunConfig, tables), data=data)


def time_steps(config: RunConfig, device: torch.device) -> tuple[float, RunConfig]:
    """Time some steps of a run with random ids; where memory is too small, with more micro-batches.

    Returns:
        The seconds of a step, and the configuration with as many micro-batches as it needs.
    """
    while True:
        try:
            return _step_seconds(config, device), config
        except (RuntimeError, MemoryError) as error:
            more = more_micro_batches(config.train, 2 * config.train.gradient_accumulation)
            if not is_out_of_memory(error) or more is None:
                raise
            config = replace(config, train=replace(config.train, gradient_accumulation=more))


def _step_seconds(config: RunConfig, device: torch.device) -> float:
    """The mean time of some steps after those that compile and tune; about a second."""
    settings = config.train.before_planning
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = TransformerLM(config.model)
        model.activation_dtype = activation_dtype(settings, device)
        take_step = TrainStep(model.to(device), make_optimizer(model, settings), settings, device)
        shape = settings.batch_size, config.model.context_length
        ids = torch.randint(config.model.vocab_size, shape)
    scheduled = settings.scheduled(1)
    for _ in range(5 if device.type == "cuda" else 2):
        loss, _ = take_step((ids, ids), **scheduled)
    loss.item()
    num_steps, started_s = 0, time.perf_counter()
    while num_steps < 2 or (time.perf_counter() - started_s < 1 and num_steps < 200):
        loss, _ = take_step((ids, ids), **scheduled)
        num_steps += 1
        loss.item()  # waits for the device
    return (time.perf_counter() - started_s) / num_steps


def announce(config: RunConfig, steps_left: int, device: torch.device) -> None:
    """Say how long a run will take on this machine; if it is more than an hour, ask a person at a terminal."""
    tokens = steps_left * config.train.batch_size * config.model.context_length
    if tokens * 6 * num_matrix_parameters(config.model) < 2e12:
        return  # less than a minute on any machine
    print("timing some steps, to say how long the run will take", file=sys.stderr)
    with suppress(RuntimeError, MemoryError):  # the run itself reports what is wrong
        # First a small part of the batch: on a CPU, a step can take a minute. This counts what a step costs beside its
        # sequences too often, so a step that is short enough is then timed as it is.
        small = max(1, config.train.batch_size // config.train.gradient_accumulation // 16)
        part = replace(config.train, batch_size=small, gradient_accumulation=1, cuda_graph=False, compile=False)
        step_s = time_steps(replace(config, train=part), device)[0] * config.train.batch_size / small
        if step_s < LONG_STEP_S:
            step_s, _ = time_steps(replace(config, train=replace(config.train, compile=False)), device)
        seconds = steps_left * step_s * (1 + config.train.evaluation_overhead)
        less = ", less with its compiled model" if config.train.compile else ""
        print(
            f"the run will take about {command_line.duration(seconds)} on this machine ({device}){less}",
            file=sys.stderr,
        )
        command_line.confirm_start(seconds)
