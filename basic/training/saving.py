"""The checkpoints of a run: decide when one is due, which are kept, retry when a disk is full, and resume."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from basic.common.config_files import save_config
from basic.common.errors import InvalidConfigError
from basic.common.files import atomic_write
from basic.model import ModelConfig, TransformerLM
from basic.training.checkpoints.background import BackgroundSaver
from basic.training.checkpoints.file import Checkpoint, load_state
from basic.training.checkpoints.sharded import load_sharded_state, remove_checkpoint
from basic.training.parallel.world import SINGLE_PROCESS, World, is_sharded
from basic.training.records.log import NullLog, RunLog
from basic.training.records.metrics import read_all_records, read_metrics
from basic.training.run_folder import (
    checkpoint_paths,
    checkpoint_step,
    load_run_config,
    newest_checkpoint,
    open_checkpoint,
)
from basic.training.settings import RunConfig, TrainConfig

RETRY_S = 10.0
"""Seconds until the next attempt after a checkpoint could not be written."""
_FINAL_ATTEMPTS = 6


class RunProgress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    wall_s: float = 0.0
    nonfinite_steps: int = 0
    """Steps that were skipped because their loss or gradient was not finite."""


class CheckpointManager:
    """Saves the checkpoints of a run in the background and removes old ones; a context manager.

    It keeps the newest checkpoints, the one with the lowest validation loss, and milestones. If a disk is full or fails
    otherwise, it prints a warning; training continues, older checkpoints stay, and the state at a later step is saved.

    Args:
        run_dir: run folder.
        config: settings of the run.
        log: gets a record for every checkpoint that is on the disk.
        world: the ranks that train together. Rank 0 decides when a checkpoint is due, and writes it unless the model is
            sharded.
        retry_s: seconds until the next attempt after a checkpoint could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        log: RunLog | NullLog,
        world: World = SINGLE_PROCESS,
        *,
        retry_s: float = RETRY_S,
    ):
        self.run_dir, self.config, self.log, self.world, self.retry_s = run_dir, config, log, world, retry_s
        self.saver = BackgroundSaver(world)
        self._last_save_s = time.monotonic()
        self._retry_at_s = math.inf
        self._step = 0
        steps = {checkpoint_step(path) for path in checkpoint_paths(run_dir)}
        metrics = run_dir / "metrics.jsonl"
        self._valid_losses = {
            record["step"]: record["valid_loss"]
            for record in (read_metrics(metrics) if metrics.exists() else [])
            if record.get("valid_loss") is not None and record["step"] in steps
        }
        if world.is_rank_0:
            for leftover in (run_dir / "checkpoints").glob(".step_*.tmp"):  # of a killed process
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.saver.__exit__(*exception)
        self._finish_save(wait=True)

    def is_due(self, step: int, valid_loss: float | None) -> bool:
        """Whether to save the state after a step: by its number, by time, as the best, or after a failed attempt.

        Args:
            valid_loss: of this state, if it was measured.
        """
        if not self.world.is_rank_0:
            return False
        if self.saver.is_busy:  # a checkpoint that is due now is saved as soon as the saver is free
            if self._is_due_by_step(step) or self._is_best(valid_loss):
                self._retry_at_s = 0.0
            return False
        self._finish_save(wait=False)
        now_s, period_s = time.monotonic(), self.config.checkpoint_minutes * 60
        due_by_time = now_s >= self._retry_at_s or (period_s > 0 and now_s >= self._last_save_s + period_s)
        return due_by_time or self._is_due_by_step(step) or self._is_best(valid_loss)

    def save(
        self,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
        progress: RunProgress,
        *,
        valid_loss: float | None = None,
        is_last: bool = False,
    ) -> None:
        """Copy the state, and write it in the background.

        Args:
            valid_loss: of this state, if it was measured.
            is_last: the process ends afterwards: wait until the checkpoint is on the disk, and retry several times.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        save = partial(self._save, model, optimizer, progress, valid_loss, _FINAL_ATTEMPTS if is_last else 1)
        if is_sharded(model):
            with self.world.pause_hang_detection():
                save()
        else:
            self.world.on_rank_0(save)

    def _save(
        self,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
        progress: RunProgress,
        valid_loss: float | None,
        attempts: int,
    ) -> None:
        self._finish_save(wait=True)
        for attempt in range(attempts):
            time.sleep(self.retry_s if attempt else 0)
            self._start_save(model, optimizer, progress, valid_loss)
            if attempts == 1 or self._finish_save(wait=True):
                return
        raise OSError(
            f"the checkpoint of step {progress.step} could not be saved in {attempts} tries; make room on the disk "
            f"of {self.run_dir}, then resume from the previous checkpoint with --resume {self.run_dir}"
        )

    def _start_save(
        self, model: TransformerLM, optimizer: torch.optim.Optimizer, progress: RunProgress, valid_loss: float | None
    ) -> None:
        name = f"step_{progress.step:08d}" + ("" if is_sharded(model) else ".safetensors")
        path = self.run_dir / "checkpoints" / name
        extra = {**progress._asdict(), "random_state": _get_random_state()}
        self._last_save_s, self._retry_at_s, self._step = time.monotonic(), math.inf, progress.step

        def on_saved() -> None:
            if not self.world.is_rank_0:
                return
            if valid_loss is not None:
                self._valid_losses[progress.step] = valid_loss
            self._remove_old()
            save_s = round(time.monotonic() - self._last_save_s, 3)
            self.log.write({"kind": "checkpoint", "step": progress.step, "save_s": save_s})

        self.saver.start(model, optimizer, progress.step, path, extra=extra, on_saved=on_saved)

    def _finish_save(self, *, wait: bool) -> bool:
        """Whether the save that has finished, if any, succeeded; errors other than an OSError are raised."""
        try:
            self.saver.finish(wait=wait)
        except OSError as error:
            self._retry_at_s = time.monotonic() + self.retry_s
            self.log.print_message(
                f"warning: the checkpoint of step {self._step} could not be saved ({error}); earlier checkpoints are "
                f"unchanged, and training continues; the next attempt is in {self.retry_s:.0f} s"
            )
            return False
        return True

    def _is_due_by_step(self, step: int) -> bool:
        intervals = (self.config.checkpoint_interval, self.config.milestone_interval)
        return any(interval > 0 and step % interval == 0 for interval in intervals)

    def _is_best(self, valid_loss: float | None) -> bool:
        return (
            self.config.keep_best
            and valid_loss is not None
            and valid_loss < min(self._valid_losses.values(), default=math.inf)
        )

    def _remove_old(self) -> None:
        paths = checkpoint_paths(self.run_dir)
        steps = sorted({checkpoint_step(path) for path in paths})
        kept = set(steps[-self.config.checkpoints_kept :])
        if self.config.keep_best and self._valid_losses:
            kept.add(min(self._valid_losses, key=lambda step: self._valid_losses[step]))
        if self.config.milestone_interval:
            kept |= {step for step in steps if step % self.config.milestone_interval == 0}
        for path in paths:
            if checkpoint_step(path) not in kept:
                remove_checkpoint(path)
                self._valid_losses.pop(checkpoint_step(path), None)


def resume_run(
    run_dir: Path,
    config: RunConfig,
    model: TransformerLM,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None],
    world: World = SINGLE_PROCESS,
) -> RunProgress:
    """Load the newest complete checkpoint into a model and its optimizer; without any, the run starts again at step 0.

    Metrics of later steps are removed, because these steps are done again. The configuration is saved again, because a
    resumed run may have more steps.

    Args:
        report: called with each message for the user.
        world: the ranks that resume; rank 0 changes the folder.

    Raises:
        NotARunError: the folder holds no run.
        InvalidConfigError: the run was started with another model.
        DamagedFileError: no checkpoint is complete.
    """
    saved_config = load_run_config(run_dir).model
    for name in (field.name for field in fields(ModelConfig)):
        saved, value = getattr(saved_config, name), getattr(config.model, name)
        if saved != value:
            raise InvalidConfigError(
                f"{run_dir} was started with model.{name} = {saved}, but is to be resumed with {value}; "
                "resume it with the model it has, or train this one in another folder"
            )
    newest: list[Checkpoint] = []

    def find_newest() -> str | None:
        if checkpoint_paths(run_dir):
            newest.append(newest_checkpoint(run_dir, report))
        return str(newest[0].src) if newest else None

    path = world.on_rank_0(find_newest)
    if path is None:
        report(f"{run_dir} has no checkpoint yet; it starts again at its first step")
        progress = RunProgress()
    else:
        checkpoint = newest[0] if newest else open_checkpoint(Path(path))
        if is_sharded(model):
            step = load_sharded_state(checkpoint, model, optimizer, world)
        else:
            step = load_state(checkpoint, model, optimizer)
        extra = checkpoint.entry("extra")
        progress = RunProgress(step, extra["wall_s"], extra["nonfinite_steps"])
        _set_random_state(extra["random_state"])
    world.on_rank_0(lambda: _rewind_folder(run_dir, config, progress.step))
    return progress


def _rewind_folder(run_dir: Path, config: RunConfig, step: int) -> None:
    """Remove the metrics of steps after `step`, and save the configuration."""
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        records = [record for record in read_all_records(metrics) if record.get("step", 0) <= step]
        with atomic_write(metrics) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    save_config(config, run_dir / "config.toml")


def _get_random_state() -> dict[str, str]:
    """The states of torch's generators, in hexadecimal; training does not use them, but a model with dropout would."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: state.numpy().tobytes().hex() for device, state in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    for device, text in states.items():
        state = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
