"""The checkpoints in a run folder, which are files, or folders of a sharded model: which there are, and one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from basic.common.arguments import check_integer
from basic.common.errors import DamagedFileError, InvalidInputError, NotARunError
from basic.training.checkpoints.file import Checkpoint, read_checkpoint, read_document
from basic.training.checkpoints.sharded import read_sharded_checkpoint, read_sharded_document
from basic.training.records.metrics import logged_metrics

_NAME = re.compile(r"step_\d+(\.safetensors)?")


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, files and folders, oldest first."""
    paths = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=lambda path: path.name)


def checkpoint_step(path: Path) -> int:
    """Return the number of steps done when a checkpoint was saved."""
    return int(path.stem.removeprefix("step_"))


def find_checkpoint_path(run_dir: Path, checkpoint: int | str) -> Path:
    """Return the path of a checkpoint of a run.

    Args:
        checkpoint: its step, or "best" for the one with the lowest validation loss.

    Raises:
        FileNotFoundError: the run does not have it.
        InvalidInputError: `checkpoint` is something else.
    """
    paths = {checkpoint_step(path): path for path in checkpoint_paths(run_dir)}
    remedy = f"give one of {', '.join(map(str, paths)) or 'none: it has no checkpoint'}, or leave it out for the newest"
    if isinstance(checkpoint, str):
        if checkpoint != "best":
            raise InvalidInputError(f"checkpoint must be a step, 'best' or 'last', got {checkpoint!r}; {remedy}")
        losses = valid_losses(run_dir)
        if not losses:
            raise FileNotFoundError(f"{run_dir} has no checkpoint whose validation loss was measured; {remedy}")
        return paths[min(losses, key=lambda step: losses[step])]
    if check_integer("checkpoint", checkpoint) not in paths:
        raise FileNotFoundError(f"{run_dir} has no checkpoint of step {checkpoint}; {remedy}")
    return paths[checkpoint]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, which is a file or the folder of a sharded model.

    Raises:
        DamagedFileError: the checkpoint is not complete.
    """
    return read_sharded_checkpoint(path) if path.is_dir() else read_checkpoint(path)


def valid_losses(run_dir: Path) -> dict[int, float]:
    """Return the validation loss of each checkpoint for which it was measured, by step.

    A checkpoint contains its own loss. Those of earlier versions do not, so the log is asked for them.
    """
    logged = {record["step"]: record.get("valid_loss") for record in logged_metrics(run_dir)}
    losses = {}
    for path in checkpoint_paths(run_dir):
        try:
            document = read_sharded_document(path) if path.is_dir() else read_document(path)
        except DamagedFileError:
            continue
        extra = document.get("extra")
        loss = (extra if isinstance(extra, dict) else {}).get("valid_loss", logged.get(checkpoint_step(path)))
        if isinstance(loss, float):  # none was measured, or it is not finite and so no number in JSON
            losses[checkpoint_step(path)] = loss
    return losses


def newest_checkpoint(run_dir: Path, report: Callable[[str], None]) -> Checkpoint:
    """Open the newest complete checkpoint of a run.

    Args:
        report: called with a warning for each newer checkpoint that is damaged.

    Raises:
        NotARunError: there is no checkpoint.
        DamagedFileError: no checkpoint is complete.
    """
    folder, paths = run_dir / "checkpoints", checkpoint_paths(run_dir)
    if not paths:
        raise NotARunError(f"{folder} has no checkpoint (step_*) yet")
    for path in reversed(paths):
        try:
            return open_checkpoint(path)
        except DamagedFileError as error:
            report(f"warning: {error}")
    raise DamagedFileError(
        f"none of the {len(paths)} checkpoints in {folder} is complete, the newest is {paths[-1].name}; restore one "
        "from a copy, or train again with --overwrite"
    )
