"""The training loop: token arrays in, a run's folder out.

A batch is a pure function of the seed and the step, and a checkpoint holds all else that a step depends on. So a run
goes on as if it had never stopped: on a CPU to the last bit, on a GPU as near as two equal runs are. Nor does it depend
on how many processes share a step: each computes some rows of every batch, and all get the same mean.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from basic.common.config_files import to_table
from basic.common.stop_signals import StopSignals
from basic.generation.text import SavableTokenizer, TextTokenizer, complete
from basic.model import RotaryPositionalEmbedding, TransformerLM
from basic.training.batches import BatchSampler, check_token_ids, document_starts, prefetch
from basic.training.devices import activation_dtype, choose_device, reduce_dtype, training_flops_per_token
from basic.training.parallel.world import ALONE, World, is_sharded
from basic.training.records.environment import append_environment, check_environment, describe_environment
from basic.training.records.log import NullLog, RunLog
from basic.training.records.meter import Meter, StepMetrics
from basic.training.records.trackers import check_trackers
from basic.training.run_folder import Run, create_run_folder
from basic.training.run_folder import load_run as load_run
from basic.training.saving import Progress, RunCheckpoints, resume_run
from basic.training.settings import DataConfig as DataConfig
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep, mean_loss
from basic.transformer.optimizer import AdamW, cosine_schedule


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
    world: World = ALONE,
) -> Run:
    """Train a model and leave everything about it in a folder (`basic.training.run_folder` shows its layout).

    Args:
        config: saved with the run.
        train_tokens, valid_tokens: integers (tokens,), a memmap of any size too.
        run_dir: is made; must not hold a run already, unless it is resumed or overwritten.
        tokenizer: for samples and for rows that begin at documents; a copy is saved with the run.
        resume: go on from the newest whole checkpoint of `run_dir`.
        overwrite: remove the run that `run_dir` holds, once it is clear that the new one can begin.
        progress: show a live line.
        world: the processes that train together; each calls this function with the same arguments, and the first of
            them writes the folder.

    Raises:
        FileExistsError: `run_dir` holds a run, and neither `resume` nor `overwrite` is on.
        FileNotFoundError: there is nothing to resume.
        ValueError: data, tokenizer and configuration do not fit together, or not to the run that is resumed.
        FloatingPointError: a loss or gradient was not finite; the weights are those from before it, and so are the
            checkpoints.
        MemoryError: the memory does not suffice; the message says what to lower.
        OSError: the last checkpoint could not be written.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run has been saved, and the message says how to go on.
    """
    if resume and overwrite:
        raise ValueError("a run cannot be both resumed and overwritten; choose one")
    run_dir, settings = Path(run_dir), config.train
    device = choose_device(world.device_name(settings.device))
    check_trackers(settings.trackers)
    training, validation = _samplers(config, train_tokens, valid_tokens, tokenizer, world)
    if not resume:
        world.on_first(lambda: create_run_folder(run_dir, config, tokenizer, overwrite=overwrite))
    torch.manual_seed(settings.seed)
    model = TransformerLM(config.model)
    flops_per_token = training_flops_per_token(model)
    model.activation_dtype = activation_dtype(settings, device)
    if settings.parallel == "sharded" and world.size > 1:
        world.shard(model, device, model.activation_dtype, reduce_dtype(settings))
    model.to(device)
    optimizer = make_optimizer(model, settings)
    start, begun = describe_environment(train_tokens, valid_tokens, tokenizer, device, world.size), Progress()
    tell = _print if world.is_first else _ignore
    if resume:
        check_environment(run_dir, start, tell)
        begun = resume_run(run_dir, config, model, optimizer, tell, world)
    world.on_first(lambda: append_environment(run_dir, start, begun.step))
    open_log = RunLog if world.is_first else NullLog
    log = open_log(
        run_dir,
        total_steps=settings.steps,
        first_step=begun.step,
        tokens_per_step=settings.batch_size * config.model.context_length,
        flops_per_token=flops_per_token,
        device=device,
        processes=world.size,
        progress=progress,
        trackers=settings.trackers,
        config_table=to_table(config),
    )
    saving = RunCheckpoints(run_dir, settings, log, world)
    with _repeatable(device), _explained_memory(config), log, saving as checkpoints, world.in_step():
        _loop(config, model, optimizer, training, validation, tokenizer, begun, log, checkpoints, world, device)
    saved_tokenizer = run_dir / "tokenizer" if tokenizer is not None else None
    return Run(model.eval(), config, saved_tokenizer, max(begun.step, settings.steps))


def _loop(
    config: RunConfig,
    model: TransformerLM,
    optimizer: AdamW,
    training: BatchSampler,
    validation: BatchSampler,
    tokenizer: SavableTokenizer | None,
    begun: Progress,
    log: RunLog | NullLog,
    checkpoints: RunCheckpoints,
    world: World,
    device: torch.device,
) -> None:
    """All steps from where the run was begun to its end."""
    settings, run_dir = config.train, checkpoints.run_dir
    take_step = TrainStep(model, optimizer, settings, device, world)
    meter = Meter(begun.step, begun.wall_s, settings.batch_size * config.model.context_length, device)
    nonfinite = _NonfiniteSteps(settings, training, begun.nonfinite_steps, log)
    steps = range(begun.step, settings.steps)
    with StopSignals() as stop, prefetch(training, steps, device) as batches:
        for done, batch in enumerate(batches, begun.step + 1):
            rate = _learning_rate(settings, done)
            nonfinite.report(meter.add(*take_step(batch, rate), rate))
            log.step(done)

            valid_loss = None
            evaluate = _due(done, settings.eval_interval, settings)
            log_now = evaluate or _due(done, settings.log_interval, settings)
            if log_now:
                nonfinite.report(meter.catch_up())
                record = meter.record()
                if evaluate:
                    valid_loss = mean_loss(take_step.loss_fn, validation, settings.eval_batches, device, world)
                    record["valid_loss"] = valid_loss
                    evaluation = {"step": done, "wall_s": record["wall_s"], "valid_loss": valid_loss}
                    log.write({"kind": "evaluation", **evaluation})
                log.write(record)
            if tokenizer is not None and _due(done, settings.sample_interval, settings):
                write = partial(_write_sample, run_dir / "samples.txt", tokenizer, settings, done, log)
                world.on_first(partial(write, _whole(model, world)))

            signal_number, due = world.largest(stop.received or 0, checkpoints.due(done, valid_loss))
            last = done == settings.steps or signal_number > 0
            if due or last:
                nonfinite.report(meter.catch_up())  # nothing is saved that may have gone wrong
                now = Progress(done, meter.wall_s(), nonfinite.count)
                checkpoints.save(model, optimizer, now, valid_loss=valid_loss, last=last)
            if signal_number and done < settings.steps:
                raise KeyboardInterrupt(
                    f"stopped after step {done:,} by {signal.Signals(signal_number).name}, and saved; go on with:  "
                    f"uv run local/train.py --resume {run_dir}"
                )
            if log_now:
                meter.restart()


def make_optimizer(model: TransformerLM, config: TrainConfig) -> AdamW:
    """AdamW with the configured settings over all parameters, the matrices with a row for each token id apart."""
    # A dictionary, because they may be one and the same, and the order of a set would change from run to run.
    by_token = dict.fromkeys([model.token_embeddings.weight, model.lm_head.weight])
    others = [parameter for parameter in model.parameters() if parameter not in by_token]
    return AdamW(
        [
            {"params": others, "rate_factor": 1.0},
            {"params": list(by_token), "rate_factor": config.embedding_rate_factor},
        ],
        lr=config.max_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


class _NonfiniteSteps:
    """Counts the steps whose loss or gradient was not finite, and ends the run when there are too many.

    The device has taken none of them: `TrainStep` leaves the weights, moments and step counts as they were.
    """

    def __init__(self, config: TrainConfig, training: BatchSampler, count: int, log: RunLog | NullLog):
        self.allowed = config.max_nonfinite_steps if config.on_nonfinite == "skip" else 0
        self.training, self.count, self.log = training, count, log

    def report(self, steps: list[StepMetrics]) -> None:
        for step in steps:
            self.count += 1
            # A batch is a function of seed and step; steps are counted from 0 there.
            starts = self.training.row_starts(step.step - 1).tolist()
            numbers = {"loss": repr(step.loss), "gradient_norm": repr(step.gradient_norm)}
            record = {"kind": "nonfinite", "step": step.step, "learning_rate": step.learning_rate, **numbers}
            self.log.write({**record, "row_starts": starts})
            shown = ", ".join(map(str, starts[:8])) + (", ..." if len(starts) > 8 else "")
            message = (
                f"step {step.step} gave the loss {step.loss} and the gradient's norm {step.gradient_norm} at the "
                f"learning rate {step.learning_rate:.3g}, on the rows that begin at tokens {shown} of the training data"
            )
            if self.count > self.allowed:
                raise FloatingPointError(
                    f"{message}; the weights did not take it, and checkpoints from before are untouched; try a lower "
                    "max_learning_rate or a longer warm-up, or look at these rows, or go on without such steps: "
                    f"on_nonfinite = skip, max_nonfinite_steps above {self.allowed}"
                )
            self.log.print_message(f"warning: {message}; skipped, number {self.count} of at most {self.allowed} such steps")


@contextmanager
def _repeatable(device: torch.device) -> Generator[None]:
    """Let a CPU add up in one order always: with two threads, the gradient of an embedding is in a race otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _explained_memory(config: RunConfig) -> Generator[None]:
    """Say what was tried, and what to lower, where the memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own for GPUs is a RuntimeError, on a CPU a plain one
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        batch_size, parts = config.train.batch_size, config.train.gradient_accumulation
        more = next((n for n in range(parts + 1, batch_size + 1) if batch_size % n == 0), None)
        remedy = "a smaller model" if more is None else f"gradient_accumulation = {more} for the same result"
        raise MemoryError(
            f"out of memory with batch_size = {batch_size}, gradient_accumulation = {parts}, context_length = "
            f"{config.model.context_length}; try {remedy}, or lower batch_size or context_length "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def _ignore(message: str) -> None:
    pass


def _due(done: int, interval: int, config: TrainConfig) -> bool:
    return done == config.steps or (interval > 0 and done % interval == 0)


def _learning_rate(config: TrainConfig, done: int) -> float:
    """The rate of the step that makes it `done` steps: above zero in the first one, the minimum in the last."""
    return cosine_schedule(done, config.max_learning_rate, config.min_learning_rate, config.warmup_steps, config.steps)


def _samplers(
    config: RunConfig,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: SavableTokenizer | None,
    world: World,
) -> tuple[BatchSampler, BatchSampler]:
    """What the batches of training and of evaluation are cut from, checked against the model and the tokenizer."""
    settings, context = config.train, config.model.context_length
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} ids do not fit into the model's "
            f"vocab_size={config.model.vocab_size}; set model.vocab_size to at least that"
        )
    samplers = []
    separator_id = _separator_id(tokenizer, settings.end_of_text) if settings.rows == "documents" else None
    own_rows = world.own_rows(settings.batch_size, settings.gradient_accumulation)
    for name, tokens, seed, rows in (
        ("training", train_tokens, settings.seed, own_rows),
        ("validation", valid_tokens, settings.seed + 1, world.own_rows(settings.batch_size)),
    ):
        try:
            check_token_ids(tokens, config.model.vocab_size)
            starts = None if separator_id is None else document_starts(tokens, separator_id, context)
            vocab_size = config.model.vocab_size
            sampler = BatchSampler(
                tokens, settings.batch_size, context, seed=seed, starts=starts, vocab_size=vocab_size, own_rows=rows
            )
            samplers.append(sampler)
        except ValueError as error:
            raise ValueError(f"{name} tokens: {error}") from error
    return samplers[0], samplers[1]


def _separator_id(tokenizer: SavableTokenizer | None, end_of_text: str) -> int:
    ids = {} if tokenizer is None else tokenizer.special_token_ids
    if end_of_text not in ids:
        raise ValueError(
            f'rows = "documents" needs a tokenizer with the special token {end_of_text!r}, '
            f"got {'none' if tokenizer is None else f'one with {list(ids)}'}"
        )
    return ids[end_of_text]


def _whole(model: TransformerLM, world: World) -> TransformerLM:
    """The model itself, or where each process has a part of it one that is whole in the first process."""
    if not is_sharded(model):
        return model
    weights = world.gathered(model, model.compute_dtype)
    with torch.device("meta"):  # no memory, and nothing drawn at random
        whole = TransformerLM(model.config)
    for module in whole.modules():
        if isinstance(module, RotaryPositionalEmbedding):
            module.to_empty(device=model.token_embeddings.weight.device)
    if world.is_first:
        whole.load_state_dict(weights, assign=True)
    whole.activation_dtype = model.compute_dtype
    return whole


def _write_sample(
    path: Path, tokenizer: TextTokenizer, config: TrainConfig, step: int, log: RunLog | NullLog, model: TransformerLM
) -> None:
    end = config.end_of_text
    (text,) = complete(model, tokenizer, [end], config.sample_tokens, top_p=0.95, seed=config.seed, end_of_text=end)
    log.write({"kind": "sample", "step": step, "text": text.strip()})
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text.strip()}\n\n")
    except OSError as error:  # a full disk; the log keeps what it cannot write
        log.print_message(f"warning: {path} cannot be written ({error})")
