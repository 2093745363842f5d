"""The checkpoints of a run: decide when one is due, which are kept, retry when a disk is full, and resume."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from basic.common.config_files import differing_settings, to_table
from basic.common.errors import DamagedFileError, InvalidConfigError, InvalidInputError
from basic.common.files import atomic_write, difference_from_object, read_file
from basic.model import TransformerLM
from basic.training.checkpoints.background import BackgroundSaver
from basic.training.checkpoints.file import Checkpoint, load_state
from basic.training.checkpoints.of_run import (
    checkpoint_paths,
    checkpoint_step,
    newest_checkpoint,
    open_checkpoint,
    valid_losses,
)
from basic.training.checkpoints.sharded import load_sharded_state, remove_checkpoint
from basic.training.parallel.world import SINGLE_PROCESS, World, is_sharded
from basic.training.records.log import NullLog, RunLog
from basic.training.records.metrics import describe_lost_records, encode_record, read_all_records
from basic.training.records.samples import format_sample
from basic.training.run_folder import check_model_config, check_same_model, load_run_config, save_run_config, set_aside
from basic.training.settings import RunConfig, TrainConfig
from basic.transformer.optimizer import AdamW

_RUN_STATE = {"wall_s": (float, int), "nonfinite_steps": int, "random_state": dict}
RETRY_S = 10.0
"""Seconds until the next attempt after a checkpoint could not be written."""
_FINAL_ATTEMPTS = 6


class RunProgress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    wall_s: float = 0.0
    nonfinite_steps: int = 0
    """Steps that were skipped because their loss or gradient was not finite."""
    sequences: int = 0
    """Sequences that the model has seen."""
    fp8_scales: dict[str, list[float]] | None = None
    """In fp8, those of the next step; see `TrainStep`."""


class CheckpointManager:
    """Saves the checkpoints of a run in the background and removes old ones; a context manager.

    It keeps the newest checkpoints, the one with the lowest validation loss, and milestones. If a disk is full or fails
    otherwise, it prints a warning; training continues, older checkpoints stay, and the state at a later step is saved.

    Args:
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
        self._valid_losses = valid_losses(run_dir)
        if world.is_rank_0:
            _remove_unfinished(run_dir)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.saver.__exit__(*exception)
        self._finish_save(wait=True)

    def is_due(self, step: int, valid_loss: float | None) -> bool:
        """Whether to save the state after a step: by its number, by time, as the best, or after a failed attempt."""
        if not self.world.is_rank_0:
            return False
        # What is due while the saver is busy is saved when it is free, at a later step. Only a milestone waits for it.
        if self.saver.is_busy and not self._is_milestone(step):
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
            is_last: the process ends afterwards: wait until the checkpoint is on the disk, and retry several times.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        start = partial(self._start_save, model, optimizer, progress, valid_loss)
        save = partial(self._save, start, _FINAL_ATTEMPTS if is_last else 1)
        if is_sharded(model):
            with self.world.pause_hang_detection():
                save()
        else:
            self.world.on_rank_0(save)

    def _save(self, start: Callable[[], None], attempts: int) -> None:
        self._finish_save(wait=True)
        for attempt in range(attempts):
            time.sleep(self.retry_s if attempt else 0)
            start()
            if attempts == 1 or self._finish_save(wait=True):
                return
        raise OSError(
            f"the checkpoint of step {self._step} could not be saved in {attempts} tries; make room on the disk "
            f"of {self.run_dir}, then resume from the previous checkpoint with --resume {self.run_dir}"
        )

    def _start_save(
        self, model: TransformerLM, optimizer: torch.optim.Optimizer, progress: RunProgress, valid_loss: float | None
    ) -> None:
        name = f"step_{progress.step:08d}" + ("" if is_sharded(model) else ".safetensors")
        path = self.run_dir / "checkpoints" / name
        settings = {"model": to_table(model.config), "valid_loss": valid_loss, "logged_step": self.log.last_step}
        extra = {**progress._asdict(), "random_state": _get_random_state(), **settings}
        if self.world.is_rank_0 and not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            self.log.print_message(
                f"warning: {self.run_dir} was moved or removed; checkpoints are now written to a new folder, "
                f"{path.parent.absolute()}: move them to the run's own checkpoints/ before you resume it"
            )
        self._last_save_s, self._retry_at_s, self._step = time.monotonic(), math.inf, progress.step

        def on_saved() -> None:
            if not self.world.is_rank_0:
                return
            if valid_loss is not None:
                self._valid_losses[progress.step] = valid_loss
            self._remove_old(progress.step)
            save_s = round(time.monotonic() - self._last_save_s, 3)
            self.log.write({"kind": "checkpoint", "step": progress.step, "save_s": save_s})

        # The log first: a checkpoint that is on the disk has all its records.
        save = partial(self.saver.start, model, optimizer, progress.step, path, extra=extra)
        save(before_write=self.log.sync, on_saved=on_saved)

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
        interval = self.config.checkpoint_interval
        return self._is_milestone(step) or (interval > 0 and step % interval == 0)

    def _is_milestone(self, step: int) -> bool:
        return self.config.milestone_interval > 0 and step % self.config.milestone_interval == 0

    def _is_best(self, valid_loss: float | None) -> bool:
        return (
            self.config.keep_best
            and valid_loss is not None
            and valid_loss < min(self._valid_losses.values(), default=math.inf)
        )

    def _remove_old(self, saved_step: int) -> None:
        """Remove checkpoints before the one just saved; those of later steps are not of this run."""
        paths = [path for path in checkpoint_paths(self.run_dir) if checkpoint_step(path) <= saved_step]
        steps = sorted({checkpoint_step(path) for path in paths})
        kept = set(steps[-self.config.checkpoints_kept :])
        if self.config.keep_best and self._valid_losses:
            kept.add(min(self._valid_losses, key=lambda step: self._valid_losses[step]))
        kept |= set(filter(self._is_milestone, steps))
        for path in paths:
            if checkpoint_step(path) not in kept:
                remove_checkpoint(path)
                self._valid_losses.pop(checkpoint_step(path), None)


def find_checkpoint(
    run_dir: Path, config: RunConfig, report: Callable[[str], None], world: World = SINGLE_PROCESS
) -> Checkpoint | None:
    """Open the checkpoint from which a run is resumed, and check that it can be; nothing is changed.

    Returns:
        The newest complete checkpoint, or None if the run has none: then it starts again at its first step.

    Raises:
        NotARunError: the folder holds no run.
        InvalidConfigError: the run was started with another model or optimizer, or has done more than all its steps.
        InvalidInputError: the run is finished.
        DamagedFileError: no checkpoint is complete.
    """
    saved = load_run_config(run_dir)
    check_same_model(saved.model, config.model, f"{run_dir} was started", "is to be resumed with")
    if saved.train.optimizer != config.train.optimizer:
        raise InvalidConfigError(
            f"{run_dir} was started with optimizer = {saved.train.optimizer}, whose state {config.train.optimizer} "
            "cannot continue; resume it with its own, or train in another folder"
        )
    newest: list[Checkpoint] = []

    def find_newest() -> str | None:
        if checkpoint_paths(run_dir):
            newest.append(newest_checkpoint(run_dir, report))
        return str(newest[0].src) if newest else None

    path = world.on_rank_0(find_newest)
    if path is None:
        report(f"{run_dir} has no checkpoint yet; it starts again at its first step")
        return None
    checkpoint = newest[0] if newest else open_checkpoint(Path(path))
    check_model_config(config.model, checkpoint, run_dir)
    if world.is_rank_0 and (problem := describe_lost_records(run_dir / "metrics.jsonl", checkpoint.entry("extra"))):
        report(problem)
    step, steps = checkpoint.entry("iteration"), config.train.steps
    if step == steps:
        raise InvalidInputError(
            f"{run_dir} is finished: it has done its {steps:,} steps; to train it longer, give more "
            f"(--resume {run_dir} --steps {2 * steps})"
        )
    if step > steps > 0:
        raise InvalidConfigError(
            f"{run_dir} has done {step:,} steps, so it cannot be resumed with steps = {steps:,}; give more than it has "
            "done, or train in another folder"
        )
    differing, (before, after) = differing_settings(map(to_table, (saved, config)))
    changed = [f"{key} = {after.get(key)!r} instead of {before.get(key)!r}" for key in differing]
    if changed:
        report(f"{run_dir} is resumed with other settings than before: {', '.join(changed)}")
    return checkpoint


def resume_run(
    run_dir: Path,
    config: RunConfig,
    checkpoint: Checkpoint | None,
    model: TransformerLM,
    optimizer: torch.optim.Optimizer,
    world: World = SINGLE_PROCESS,
) -> RunProgress:
    """Load the checkpoint of `find_checkpoint` into a model and its optimizer, and rewind the folder to its step.

    Records of later steps are removed, because these steps are done again, and later checkpoints, which are damaged,
    are set aside. The configuration is saved again, because a resumed run may have more steps.

    Args:
        checkpoint: None to start again at step 0.
        world: the ranks that resume; rank 0 changes the folder.

    Raises:
        DamagedFileError: the checkpoint was not saved by a run.
        InvalidInputError: the checkpoint does not fit the model or the optimizer.
    """
    progress = RunProgress()
    if checkpoint is not None:
        extra = checkpoint.entry("extra")
        if (problem := difference_from_object(extra, _RUN_STATE)) is not None:
            raise DamagedFileError(f"{checkpoint.src} is imported or damaged: its state of a training run {problem}")
        own = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        if is_sharded(model):
            step = load_sharded_state(checkpoint, model, optimizer, world)
        else:
            step = load_state(checkpoint, model, optimizer)
        if isinstance(optimizer, AdamW):  # another one may keep state in its groups
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                # Those of the checkpoint would undo what the user has changed; its weight decay is a scheduled one.
                group |= {"base_weight_decay": settings["weight_decay"]} | settings
        # Only for an earlier version's checkpoint: rank 0 may be writing the configuration already.
        if (sequences := extra.get("sequences")) is None:
            sequences = step * load_run_config(run_dir).train.batch_size
        scales = extra.get("fp8_scales")
        progress = RunProgress(step, extra["wall_s"], extra["nonfinite_steps"], sequences, scales)
        _set_random_state(extra["random_state"])
    world.on_rank_0(lambda: _rewind_folder(run_dir, config, progress.step))
    return progress


def _rewind_folder(run_dir: Path, config: RunConfig, step: int) -> None:
    """Make a folder that of a run which has done `step` steps: its log, samples, checkpoints and configuration."""
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.txt"
    if metrics.exists():
        records = read_all_records(metrics)
        with atomic_write(metrics) as file:
            file.writelines(encode_record(record) for record in records if record["step"] <= step)
        later = [record for record in records if record["step"] > step and record.get("kind") == "sample"]
        if later and samples.exists():
            content = read_file(samples)
            for record in reversed(later):
                content = content.removesuffix(format_sample(record).encode())
            with atomic_write(samples) as file:
                file.write(content)
    for path in checkpoint_paths(run_dir):
        if checkpoint_step(path) > step:
            set_aside(path)
    _remove_unfinished(run_dir)
    save_run_config(run_dir, config)


def _remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed process was writing: this one, which holds the lock, may not save the same step again."""
    for path in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
