"""The training loop: from token arrays to a run folder.

A batch is a pure function of seed and step, and a checkpoint contains all other state. So a resumed run continues as if
it had never been interrupted: with bitwise equal results on a CPU, and on a GPU with differences as small as those
between two equal runs. The result does not depend on the number of ranks either: each computes some sequences of
every batch, and gradients are averaged.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basic.common.arguments import check_type, id_array
from basic.common.command_line import print_text
from basic.common.errors import BasicError, InvalidConfigError, InvalidInputError
from basic.common.files import make_folder
from basic.common.folder_lock import FolderLock
from basic.generation.text import SavableTokenizer, tokenizer_for_samples
from basic.model import TransformerLM
from basic.tokens.opening import open_mask
from basic.training.batches import (
    BatchSampler,
    check_learned,
    check_token_ids,
    check_tokenizer_size,
    document_starts,
    read_ahead,
)
from basic.training.parallel.devices import (
    activation_dtype,
    advice_on_failures,
    check_precision,
    choose_device,
    deterministic_on_cpu,
    device_name,
    reduce_dtype,
    training_flops_per_token,
)
from basic.training.parallel.stop_signals import StopSignals
from basic.training.parallel.world import SINGLE_PROCESS, World
from basic.training.records.environment import append_environment, check_environment, describe_environment
from basic.training.records.log import NullLog, RunLog
from basic.training.records.meter import Meter, TimeBudget
from basic.training.records.nonfinite import NonfiniteSteps, first_of
from basic.training.records.samples import write_sample
from basic.training.records.trackers import check_trackers
from basic.training.run_folder import Run, check_same_model, create_run_folder, load_run_config, save_run_config
from basic.training.saving import CheckpointManager, RunProgress, find_checkpoint, resume_run
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep, dropout_seed, make_optimizer, mean_loss


def train(
    config: RunConfig,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    run_dir: str | os.PathLike,
    *,
    tokenizer: SavableTokenizer | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    world: World = SINGLE_PROCESS,
    init_from: TransformerLM | None = None,
    optimizer: Callable[[TransformerLM], torch.optim.Optimizer] | None = None,
    schedule: Callable[[int], float] | None = None,
    on_step: Callable[[int, torch.Tensor, TransformerLM], object] | None = None,
    make_step: Callable[..., TrainStep] = TrainStep,
) -> Run:
    """Train a model and save everything about the run in a folder (see `basic.training.run_folder`).

    Args:
        config: saved with the run.
        train_tokens, valid_tokens: token ids, integers (tokens,), as arrays (may be memory maps), tensors or lists.
        run_dir: folder of the run; must not contain a run, unless it is resumed or overwritten.
        tokenizer: for samples and for rows = "documents"; a copy is saved with the run.
        resume: continue from the newest complete checkpoint in `run_dir`.
        overwrite: remove the run in `run_dir`, after all checks of the arguments.
        progress: show progress on stderr.
        world: the ranks that train together. Each calls this function with the same arguments; rank 0 writes the
            folder.
        init_from: a model whose weights begin the run, with the configuration of this one (its context length aside).
            None for random weights. A resumed run needs it only if it has no checkpoint yet.
        optimizer: makes an optimizer of one's own, in place of that of the configuration, for example
            `lambda model: torch.optim.SGD(model.parameters(), lr=0.1)`. Its state is in the checkpoints. The learning
            rate of a group is that of the schedule, times the group's `rate_factor` if it has one.
        schedule: the learning rate of a step, counted from 1, in place of the configuration's.
        on_step: called after each step with its number, its loss on the device, and the model. To resume a run, give
            the same three functions again: a run folder has no code.
        make_step: called like `TrainStep`, whose subclasses tests pass here.

    Raises:
        TypeError: an argument has another type.
        FileExistsError: `run_dir` contains a run, and neither `resume` nor `overwrite` is given.
        BlockingIOError: another process writes `run_dir`.
        NotARunError: `run_dir` contains no run to resume.
        InvalidInputError: data, tokenizer and configuration do not fit together, or do not fit the resumed run, or it
            is finished, or its warm-up and decay are longer than the run.
        WrongTokenizerError: tokens or tokenizer have ids that the model does not have, or are not those of the
            resumed run.
        DamagedFileError: no checkpoint of the resumed run is complete, or its config.toml is damaged.
        DependencyError: a tracker cannot be opened, or torch.compile fails.
        FloatingPointError: a loss or gradient is not finite. Neither the weights nor the checkpoints contain that step.
        MemoryError: out of memory; the message says which setting to lower.
        OSError: the last checkpoint could not be written.
        KeyboardInterrupt: SIGINT or SIGTERM was received. The run is saved; the message says how to resume it.
    """
    check_type("config", config, RunConfig, "load_config of basic.common.config_files reads one from a TOML file")
    train_tokens, valid_tokens = id_array("train_tokens", train_tokens), id_array("valid_tokens", valid_tokens)
    if resume and overwrite:
        raise InvalidInputError("a run cannot be both resumed and overwritten; choose one")
    run_dir, settings = Path(run_dir), config.train
    settings.check_schedule()
    if init_from is not None:
        source = settings.init_from or "the model of init_from"
        check_same_model(
            init_from.config,
            config.model,
            f"{source} was made",
            "this run has",
            may_differ=("context_length",),
            remedy="leave the setting out, or begin a new model without init_from",
        )
    warn = partial(print_text, file=sys.stderr) if world.is_rank_0 else lambda message: None
    device = choose_device(world.device_name(settings.device))
    check_precision(config, device, world.size)
    check_trackers(settings.trackers)
    train_sampler, valid_sampler = _make_samplers(config, train_tokens, valid_tokens, tokenizer, world)
    environment = describe_environment(run_dir, train_tokens, valid_tokens, tokenizer, device, world.size)
    with ExitStack() as stack:
        checkpoint = None
        if resume:
            load_run_config(run_dir)  # only a run can be locked
        world.on_rank_0(lambda: _lock_run_folder(run_dir, stack))
        if resume:
            check_environment(run_dir, environment, warn)
            checkpoint = find_checkpoint(run_dir, config, warn, world)
            if checkpoint is None and settings.init_from and init_from is None:
                raise InvalidInputError(f"{run_dir} begins with the weights of {settings.init_from}; give init_from")
        else:
            world.on_rank_0(lambda: create_run_folder(run_dir, config, tokenizer, overwrite=overwrite))
        torch.manual_seed(settings.seed)
        model = TransformerLM(config.model)
        model.configure_training(settings.dropout, settings.activation_checkpointing)
        if init_from is not None and checkpoint is None:
            model.load_state_dict(init_from.state_dict())
        flops_per_token = training_flops_per_token(model)
        model.activation_dtype = activation_dtype(settings, device)
        if settings.parallel == "sharded" and world.size > 1:
            world.shard(model, device, model.activation_dtype, reduce_dtype(settings))
        model.to(device)
        own_optimizer = None if optimizer is None else _own_optimizer(optimizer, model, world)
        optimizer_in_use = own_optimizer or make_optimizer(model, settings)
        start = RunProgress()
        if resume:
            start = resume_run(run_dir, config, checkpoint, model, optimizer_in_use, world)
            train_sampler.sequence_offset = start.sequences - start.step * settings.batch_size
        world.on_rank_0(lambda: append_environment(run_dir, environment, start.step))
        log = NullLog()
        if world.is_rank_0:
            log = RunLog(
                run_dir,
                config,
                first_step=start.step,
                flops_per_token=flops_per_token,
                device_name=device_name(device),
                num_processes=world.size,
                progress=progress,
            )
        checkpoints = CheckpointManager(run_dir, settings, log, world)
        loop = _TrainingLoop(
            config=config,
            model=model,
            optimizer=optimizer_in_use,
            schedule=schedule,
            on_step=on_step,
            train_sampler=train_sampler,
            valid_sampler=valid_sampler,
            tokenizer=tokenizer_for_samples(tokenizer, settings.end_of_text, warn),
            log=log,
            checkpoints=checkpoints,
            world=world,
            device=device,
            make_step=make_step,
        )
        with deterministic_on_cpu(device), advice_on_failures(config), log, checkpoints, world.detect_hangs():
            config = loop.run(start)
    tokenizer_path = run_dir / "tokenizer" if tokenizer is not None else None
    return Run(model.eval(), config, tokenizer_path, config.train.steps)


def _own_optimizer(
    make: Callable[[TransformerLM], torch.optim.Optimizer], model: TransformerLM, world: World
) -> torch.optim.Optimizer:
    """The optimizer that a user's function makes."""
    if world.size > 1:
        raise InvalidInputError("an optimizer of one's own trains in one process; leave torchrun out")
    own = make(model)
    check_type("optimizer", own, torch.optim.Optimizer, "give a function that makes one: optimizer=lambda model: ...")
    try:
        inspect.signature(own.step).bind()
    except TypeError as error:
        raise InvalidInputError(
            f"{type(own).__name__} computes the loss itself, several times a step ({error}), which train cannot do; "
            "use an optimizer whose step() needs no argument, such as AdamW"
        ) from error
    return own


def _lock_run_folder(run_dir: Path, stack: ExitStack) -> None:
    """Take the lock of a run's folder until the stack is closed; the folder is created if it does not exist."""
    make_folder(run_dir)
    stack.enter_context(FolderLock(run_dir))


@dataclass(frozen=True, kw_only=True)
class _TrainingLoop:
    """The loop over a run's steps, and the objects that it uses."""

    config: RunConfig
    model: TransformerLM
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float] | None
    on_step: Callable[[int, torch.Tensor, TransformerLM], object] | None
    train_sampler: BatchSampler
    valid_sampler: BatchSampler
    tokenizer: SavableTokenizer | None
    log: RunLog | NullLog
    checkpoints: CheckpointManager
    world: World
    device: torch.device
    make_step: Callable[..., TrainStep]

    def run(self, start: RunProgress) -> RunConfig:
        """Take all steps after `start`; return the configuration, which has their number, also if it was planned."""
        config, settings = self.config, self.config.train
        take_step = self.make_step(self.model, self.optimizer, settings, self.device, self.world)
        take_step.fp8_scales = start.fp8_scales
        if take_step.compiles:
            time = "up to a minute" if self.device.type == "cuda" else "a minute or, with a long context, several"
            self.log.print_message(f"compiling the model: the first step takes {time}")
        tokens_per_step = settings.batch_size * self.config.model.context_length
        tokens_before = start.sequences * self.config.model.context_length
        meter = Meter(start.step, tokens_before, start.wall_s, tokens_per_step, self.device)
        nonfinite = NonfiniteSteps(settings, self.train_sampler, start.nonfinite_steps, self.log, take_step)
        budget = None
        if settings.steps == 0:
            budget = TimeBudget((settings.minutes or 0.0) * 60, meter, settings.evaluation_overhead)
            settings = settings.before_planning
        steps = range(start.step, settings.steps)
        with StopSignals() as stop, read_ahead(self.train_sampler, steps, self.device) as batches:
            for step, batch in enumerate(batches, start.step + 1):
                scheduled = settings.scheduled(step)
                if self.schedule is not None:
                    scheduled["learning_rate"] = float(self.schedule(step))
                if settings.dropout:  # so that a resumed run draws what an uninterrupted one would
                    torch.manual_seed(dropout_seed(settings.seed, step, self.world.rank))
                try:
                    loss, gradient_norm = take_step(batch, **scheduled)
                except Exception as error:
                    if stop.received is None:
                        raise
                    # The signal has ended what the step had started, such as a C++ compiler.
                    message = f"stopped by {stop.received.name} in step {step:,}, which is not saved"
                    raise KeyboardInterrupt(message) from error
                nonfinite.handle(meter.add(loss, gradient_norm, scheduled["learning_rate"]))
                if self.on_step is not None:
                    self.on_step(step, loss, self.model)
                self.log.update_progress(step, meter.latest.loss if meter.latest is not None else None)

                valid_loss = None
                is_evaluated = _is_due(step, settings.eval_interval, settings)
                # The first step shows the loss before training. It compiles and tunes, which is no part of a speed.
                is_first = step == 1 and settings.log_interval > 0
                is_logged = is_first or is_evaluated or _is_due(step, settings.log_interval, settings)
                if is_logged:
                    nonfinite.handle(meter.synchronize())
                    record = meter.record()
                    if step == 1:
                        del record["tokens_per_s"]
                    valid_loss = self._log_interval(record, take_step if is_evaluated else None)
                    if unusual := take_step.take_unusual():
                        self.log.print_message(f"warning: in fp8, {first_of(unusual)}")
                if self.tokenizer is not None and _is_due(step, settings.sample_interval, settings):
                    where = self.checkpoints.run_dir, self.log, self.world
                    write_sample(self.model, self.tokenizer, self.config, step, *where)

                planned_steps = budget.plan() if budget is not None and self.world.is_rank_0 else 0
                signal_number, is_due, planned_steps = self.world.all_reduce_max(
                    stop.received or 0, self.checkpoints.is_due(step, valid_loss), planned_steps
                )
                if planned_steps:
                    budget, config = None, self._set_steps(planned_steps)
                    settings = config.train
                is_last = step == settings.steps or signal_number > 0
                if is_due or is_last:
                    nonfinite.handle(meter.synchronize())  # before saving, so that a failed run leaves good checkpoints
                    sequences = start.sequences + (step - start.step) * settings.batch_size
                    progress = RunProgress(step, meter.wall_s(), nonfinite.count, sequences, take_step.fp8_scales)
                    self.checkpoints.save(self.model, self.optimizer, progress, valid_loss=valid_loss, is_last=is_last)
                if signal_number:
                    resume = f"resume with: `basic train --resume {self.checkpoints.run_dir}`"
                    then = "the run is finished" if step == settings.steps else resume
                    name = signal.Signals(signal_number).name
                    raise KeyboardInterrupt(f"stopped after step {step:,} by {name}, and saved; {then}")
                if is_logged:
                    meter.start_interval()
                if step == settings.steps:
                    break
        return config

    def _set_steps(self, steps: int) -> RunConfig:
        """Set and save the number of steps of a run whose time is given."""
        config = replace(self.config, train=replace(self.config.train, steps=steps))
        config.train.check_schedule()
        self.world.on_rank_0(lambda: save_run_config(self.checkpoints.run_dir, config))
        self.log.set_total_steps(steps)
        return config

    def _log_interval(self, record: dict[str, Any], take_step: TrainStep | None) -> float | None:
        """Log the record of an interval; with a step, compute and log the validation loss too, and return it."""
        valid_loss = None
        if take_step is not None:
            num_batches = self.config.train.eval_batches
            valid_loss = mean_loss(take_step.loss_fn, self.valid_sampler, num_batches, self.device, self.world)
            record["valid_loss"] = valid_loss
            self.log.write({"kind": "evaluation", **{key: record[key] for key in ("step", "wall_s", "valid_loss")}})
        self.log.write(record)
        return valid_loss


def _is_due(step: int, interval: int, config: TrainConfig) -> bool:
    return step == config.steps or (interval > 0 and step % interval == 0)


def _make_samplers(
    config: RunConfig,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: SavableTokenizer | None,
    world: World,
) -> tuple[BatchSampler, BatchSampler]:
    """Create the samplers for training and validation; check tokens and tokenizer against the model."""
    settings, context_length, vocab_size = config.train, config.model.context_length, config.model.vocab_size
    if tokenizer is not None:
        check_tokenizer_size(tokenizer.vocab_size, vocab_size, "set model.vocab_size to at least that")
    rows = settings.rows

    def make_sampler(name: str, tokens: np.ndarray, seed: int, local_sequences: np.ndarray | None) -> BatchSampler:
        try:
            check_token_ids(tokens, vocab_size)
            mask, starts = open_mask(tokens), None
            if mask is not None:
                check_learned(mask)
            if rows in ("documents", "packed"):
                separator_id = _separator_id(tokenizer, settings) if mask is None else None
                shortest = 1 if rows == "packed" else context_length
                starts = document_starts(tokens, separator_id, shortest, mask=mask)
            return BatchSampler(
                tokens,
                settings.batch_size,
                context_length,
                seed=seed,
                starts=starts,
                shuffled=rows == "shuffled",
                packed=rows == "packed",
                mask=mask,
                vocab_size=vocab_size,
                local_sequences=local_sequences,
            )
        except BasicError as error:
            raise type(error)(f"{name} tokens: {error}") from error

    train_sequences = world.local_sequences(settings.batch_size, settings.gradient_accumulation)
    valid_sequences = world.local_sequences(settings.batch_size)
    train_sampler = make_sampler("training", train_tokens, settings.seed, train_sequences)
    return train_sampler, make_sampler("validation", valid_tokens, settings.seed + 1, valid_sequences)


def _separator_id(tokenizer: SavableTokenizer | None, settings: TrainConfig) -> int:
    ids = {} if tokenizer is None else tokenizer.special_token_ids
    if settings.end_of_text not in ids:
        raise InvalidConfigError(
            f'rows = "{settings.rows}" needs a tokenizer with the special token {settings.end_of_text!r}, '
            f"got {'none' if tokenizer is None else f'one with {list(ids)}'}"
        )
    return ids[settings.end_of_text]
