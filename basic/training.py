"""The training loop: token arrays in, a run's folder out.

A batch is a pure function of the seed and the step, so a run goes on from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from basic.data import BatchSampler, check_token_ids, document_starts, prefetch
from basic.evaluation import mean_loss
from basic.generation import TextCodec, complete
from basic.model import TransformerLM
from basic.optimizer import AdamW, cosine_schedule
from basic.runs import DataConfig as DataConfig
from basic.runs import (
    Run,
    RunConfig,
    TrainConfig,
    activation_dtype,
    choose_device,
    load_newest,
    save_step,
    start_folder,
)
from basic.runs import load_run as load_run
from basic.train_step import TrainStep


class Tokenizing(TextCodec, Protocol):
    """What the loop needs of a tokenizer; `basic.Tokenizer.Tokenizer` has it."""

    def save(self, directory: str | os.PathLike) -> None: ...


def train(
    config: RunConfig,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    run_dir: str | os.PathLike,
    *,
    tokenizer: Tokenizing | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Run:
    """Train a model and leave everything about it in a folder (`basic.runs` shows its layout).

    Args:
        config: saved with the run.
        train_tokens, valid_tokens: integers (tokens,), a memmap of any size too.
        run_dir: is made; must not hold a run already, unless it is resumed or overwritten.
        tokenizer: for samples and for rows that begin at documents; a copy is saved with the run.
        resume: go on from the newest checkpoint of `run_dir`.
        overwrite: remove the run that `run_dir` holds, once it is clear that the new one can begin.
        progress: show a bar.

    Raises:
        FileExistsError: `run_dir` holds a run, and neither `resume` nor `overwrite` is on.
        FileNotFoundError: there is nothing to resume.
        ValueError: data, tokenizer and configuration do not fit together.
        FloatingPointError: the loss is no longer finite; the checkpoints from before are left as they were.
    """
    if resume and overwrite:
        raise ValueError("a run cannot be both resumed and overwritten; choose one")
    run_dir, settings = Path(run_dir), config.train
    device = choose_device(settings.device)
    training, validation = _samplers(config, train_tokens, valid_tokens, tokenizer)
    if not resume:
        start_folder(run_dir, config, tokenizer, overwrite=overwrite)
    torch.manual_seed(settings.seed)
    model = TransformerLM(config.model).to(device)
    model.activation_dtype = activation_dtype(settings, device)
    optimizer = make_optimizer(model, settings)
    first_step, wall_s = load_newest(run_dir, config, model, optimizer) if resume else (0, 0.0)
    take_step = TrainStep(model, optimizer, settings, device)
    meter = _Meter(first_step, wall_s, settings.batch_size * config.model.context_length, device)

    with (
        open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as log,
        tqdm(total=settings.steps, initial=first_step, desc="training", unit="step", disable=not progress) as bar,
        prefetch(training, range(first_step, settings.steps), device) as batches,
    ):
        for done, batch in enumerate(batches, first_step + 1):
            rate = _learning_rate(settings, done)
            loss, norm = take_step(batch, rate)
            meter.add(loss)
            evaluate = _due(done, settings.eval_interval, settings)
            log_now = evaluate or _due(done, settings.log_interval, settings)
            save_now = _due(done, settings.checkpoint_interval, settings)
            if log_now or save_now:
                meter.check_finite(norm)
            if log_now:
                record = meter.record(learning_rate=rate, gradient_norm=norm.item())
                if evaluate:
                    record["valid_loss"] = mean_loss(take_step.loss_of, validation, settings.eval_batches, device)
                _log(record, log, bar)
            if tokenizer is not None and _due(done, settings.sample_interval, settings):
                _write_sample(run_dir / "samples.txt", model, tokenizer, settings, done)
            if save_now:
                save_step(run_dir, model, optimizer, done, meter.wall_s())
            if log_now:
                meter.restart()
            bar.update()
    saved_tokenizer = run_dir / "tokenizer" if tokenizer is not None else None
    return Run(model.eval(), config, saved_tokenizer, max(first_step, settings.steps))


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


class _Meter:
    """Sums the loss on the device and measures time between two records, without waiting at every step."""

    def __init__(self, step: int, wall_before_s: float, tokens_a_step: int, device: torch.device):
        self.step, self.tokens_a_step = step, tokens_a_step
        self.loss_sum = torch.zeros((), device=device)
        self.started_s = time.perf_counter() - wall_before_s
        self.restarted_s = time.perf_counter()
        self.steps_since = 0

    def add(self, loss: Tensor) -> None:
        self.loss_sum += loss
        self.step += 1
        self.steps_since += 1

    def wall_s(self) -> float:
        return time.perf_counter() - self.started_s

    def check_finite(self, gradient_norm: Tensor) -> None:
        """End the run if a loss since the last restart was not finite, or now the gradient, which ruins all weights."""
        for name, value in (("training loss", self.loss_sum.item()), ("gradient's norm", gradient_norm.item())):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} by step {self.step}; checkpoints from before are untouched; try a "
                    "lower max_learning_rate or a longer warm-up"
                )

    def record(self, *, learning_rate: float, gradient_norm: float) -> dict[str, float]:
        """The numbers since the last restart."""
        since_s = time.perf_counter() - self.restarted_s
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_a_step,
            "wall_s": round(self.wall_s(), 3),
            "train_loss": self.loss_sum.item() / self.steps_since,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens_per_s": round(self.steps_since * self.tokens_a_step / since_s, 1),
        }

    def restart(self) -> None:
        """Begin the next interval here: its speed is that of training alone, without what was done between."""
        self.loss_sum.zero_()
        self.restarted_s = time.perf_counter()
        self.steps_since = 0


def _due(done: int, interval: int, config: TrainConfig) -> bool:
    return done == config.steps or (interval > 0 and done % interval == 0)


def _learning_rate(config: TrainConfig, done: int) -> float:
    """The rate of the step that makes it `done` steps: above zero in the first one, the minimum in the last."""
    return cosine_schedule(done, config.max_learning_rate, config.min_learning_rate, config.warmup_steps, config.steps)


def _log(record: dict[str, float], log: Any, bar: tqdm) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()
    bar.set_postfix({key: f"{record[key]:.3f}" for key in ("train_loss", "valid_loss") if key in record})


def _samplers(
    config: RunConfig, train_tokens: np.ndarray, valid_tokens: np.ndarray, tokenizer: Tokenizing | None
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
    for name, tokens, seed in (
        ("training", train_tokens, settings.seed),
        ("validation", valid_tokens, settings.seed + 1),
    ):
        try:
            check_token_ids(tokens, config.model.vocab_size)
            starts = None if separator_id is None else document_starts(tokens, separator_id, context)
            samplers.append(BatchSampler(tokens, settings.batch_size, context, seed=seed, starts=starts))
        except ValueError as error:
            raise ValueError(f"{name} tokens: {error}") from error
    return samplers[0], samplers[1]


def _separator_id(tokenizer: Tokenizing | None, end_of_text: str) -> int:
    ids = {} if tokenizer is None else tokenizer.special_token_ids
    if end_of_text not in ids:
        raise ValueError(
            f'rows = "documents" needs a tokenizer with the special token {end_of_text!r}, '
            f"got {'none' if tokenizer is None else f'one with {list(ids)}'}"
        )
    return ids[end_of_text]


def _write_sample(path: Path, model: TransformerLM, tokenizer: TextCodec, config: TrainConfig, step: int) -> None:
    end = config.end_of_text
    (text,) = complete(model, tokenizer, [end], config.sample_tokens, top_p=0.95, seed=config.seed, end_of_text=end)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"--- step {step} ---\n{text.strip()}\n\n")
