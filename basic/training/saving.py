"""The checkpoints of a run while it trains: when one is due, which are kept, and what happens when a disk is full."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from basic.common.config_files import save_config
from basic.common.files import atomic_write
from basic.model import ModelConfig, TransformerLM
from basic.training.checkpoints.background import BackgroundSaver
from basic.training.checkpoints.file import Checkpoint, restore
from basic.training.checkpoints.sharded import remove_checkpoint, restore_parts
from basic.training.parallel.world import ALONE, World, is_sharded
from basic.training.records.log import NoLog, RunLog
from basic.training.records.metrics import read_all_records, read_metrics
from basic.training.run_folder import checkpoint_paths, checkpoint_step, config_of, newest_checkpoint, open_checkpoint
from basic.training.settings import RunConfig, TrainConfig

RETRY_S = 10.0
"""After a checkpoint could not be written."""
LAST_TRIES = 6
"""Of a checkpoint after which the process ends."""


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    wall_s: float = 0.0
    nonfinite_steps: int = 0
    """Steps that it went on without."""


class RunCheckpoints:
    """Saves a run's checkpoints in the background and keeps those that are wanted; a context manager.

    The newest are kept, the one with the lowest validation loss, and milestones. A disk that is full, or fails
    otherwise, is a warning: the run goes on, older checkpoints stay, and a newer state is tried some seconds later.

    Args:
        run_dir: of the run.
        config: how it is trained.
        log: told of every checkpoint, after it is safely on the disk.
        world: the processes that train together. The first one decides when a checkpoint is due, and writes it.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, log: RunLog | NoLog, world: World = ALONE):
        self.run_dir, self.config, self.log, self.world = run_dir, config, log, world
        self.saver = BackgroundSaver(world)
        self._started_s = time.monotonic()
        self._retry_s = math.inf
        self._step = 0
        known = {checkpoint_step(path) for path in checkpoint_paths(run_dir)}
        metrics = run_dir / "metrics.jsonl"
        self._valid_losses = {
            record["step"]: record["valid_loss"]
            for record in (read_metrics(metrics) if metrics.exists() else [])
            if record.get("valid_loss") is not None and record["step"] in known
        }
        if world.is_first:
            for leftover in (run_dir / "checkpoints").glob(".step_*.tmp"):  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.saver.__exit__(*exception)
        self._settle(wait=True)

    def due(self, done: int, valid_loss: float | None) -> bool:
        """Whether the state after so many steps is to be saved: by steps, by time, as the best, or after a failure.

        Args:
            valid_loss: of this state, if it was measured.
        """
        if not self.world.is_first:
            return False
        if self.saver.busy:  # what is due now is due again when it has ended
            if self._due_by_step(done) or self._would_be_best(valid_loss):
                self._retry_s = 0.0
            return False
        self._settle(wait=False)
        now_s, period_s = time.monotonic(), self.config.checkpoint_minutes * 60
        by_time = now_s >= self._retry_s or (period_s > 0 and now_s >= self._started_s + period_s)
        return by_time or self._due_by_step(done) or self._would_be_best(valid_loss)

    def save(
        self,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        valid_loss: float | None = None,
        last: bool = False,
    ) -> None:
        """Copy the state, and write it in the background.

        Args:
            valid_loss: of this state, if it was measured.
            last: the process ends after it: wait until it is on the disk, and try several times.

        Raises:
            OSError: the last one could not be written.
        """
        save = partial(self._save, model, optimizer, progress, valid_loss, LAST_TRIES if last else 1)
        if is_sharded(model):
            with self.world.unhurried():
                save()
        else:
            self.world.on_first(save)

    def _save(
        self,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        valid_loss: float | None,
        tries: int,
    ) -> None:
        self._settle(wait=True)
        for attempt in range(tries):
            time.sleep(RETRY_S if attempt else 0)
            self._start(model, optimizer, progress, valid_loss)
            if tries == 1 or self._settle(wait=True):
                return
        raise OSError(
            f"the checkpoint of step {progress.step} could not be saved in {tries} tries; make room on the disk "
            f"of {self.run_dir}, then go on from the one before with --resume {self.run_dir}"
        )

    def _start(
        self, model: TransformerLM, optimizer: torch.optim.Optimizer, progress: Progress, valid_loss: float | None
    ) -> None:
        name = f"step_{progress.step:08d}" + ("" if is_sharded(model) else ".safetensors")
        path = self.run_dir / "checkpoints" / name
        extra = {**progress._asdict(), "random_state": _random_state()}
        self._started_s, self._retry_s, self._step = time.monotonic(), math.inf, progress.step

        def saved() -> None:
            if not self.world.is_first:
                return
            if valid_loss is not None:
                self._valid_losses[progress.step] = valid_loss
            self._remove_old()
            save_s = round(time.monotonic() - self._started_s, 3)
            self.log.write({"kind": "checkpoint", "step": progress.step, "save_s": save_s})

        self.saver.start(model, optimizer, progress.step, path, extra=extra, then=saved)

    def _settle(self, *, wait: bool) -> bool:
        """Whether the save that has ended, if one has, ended well; what is not the disk's fault is raised."""
        try:
            self.saver.finish(wait=wait)
        except OSError as error:
            self._retry_s = time.monotonic() + RETRY_S
            self.log.message(
                f"warning: the checkpoint of step {self._step} could not be saved ({error}); those before are "
                f"untouched, and the run goes on; trying again in {RETRY_S:.0f} s"
            )
            return False
        return True

    def _due_by_step(self, done: int) -> bool:
        intervals = (self.config.checkpoint_interval, self.config.milestone_interval)
        return any(interval > 0 and done % interval == 0 for interval in intervals)

    def _would_be_best(self, valid_loss: float | None) -> bool:
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
    log: Any,
    world: World = ALONE,
) -> Progress:
    """Put the newest checkpoint that is whole into model and optimizer; a run that has none yet begins at its start.

    Lines of the metrics log from after that step are removed: the steps will be done again. The configuration is
    saved anew, because a run may go on for more steps than it was begun for.

    Args:
        log: called with a line for the user where something is not as it should be.
        world: the processes that go on with it; the first one changes the folder.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run was begun with another model, or no checkpoint is whole.
    """
    began_with = config_of(run_dir).model
    for name in (setting.name for setting in fields(ModelConfig)):
        old, value = getattr(began_with, name), getattr(config.model, name)
        if old != value:
            raise ValueError(
                f"{run_dir} was begun with model.{name} = {old}, but is to be resumed with {value}; "
                "resume it with the model it has, or train this one in another folder"
            )
    progress = Progress()
    found: list[Checkpoint] = []

    def newest() -> str | None:
        if checkpoint_paths(run_dir):
            found.append(newest_checkpoint(run_dir, log))
        return str(found[0].src) if found else None

    path = world.on_first(newest)
    if path is not None:
        checkpoint = found[0] if found else open_checkpoint(Path(path))
        if is_sharded(model):
            step = restore_parts(checkpoint, model, optimizer, world)
        else:
            step = restore(checkpoint, model, optimizer)
        extra = checkpoint.part("extra")
        progress = Progress(step, extra["wall_s"], extra["nonfinite_steps"])
        _set_random_state(extra["random_state"])
    else:
        log(f"{run_dir} has no checkpoint yet; it begins again at its first step")
    world.on_first(lambda: _cut_log(run_dir, config, progress.step))
    return progress


def _cut_log(run_dir: Path, config: RunConfig, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        kept = [record for record in read_all_records(metrics) if record.get("step", 0) <= step]
        with atomic_write(metrics) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
    save_config(config, run_dir / "config.toml")


def _random_state() -> dict[str, str]:
    """The state of torch's generators, as text: nothing draws from them now, but a model with dropout would."""
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
