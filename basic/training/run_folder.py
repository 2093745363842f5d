"""The folder of a training run.

runs/NAME/config.toml                        the complete configuration, defaults included
          environment.json                   code, machine and data of every start
          metrics.jsonl                      one record a line: losses, speed, evaluations, samples, checkpoints
          samples.txt                        texts generated during training
          tokenizer/                         vocabulary, merges and special tokens, if a tokenizer was given
          checkpoints/step_00001000.safetensors    or a folder step_00001000/ for a sharded model
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from basic.common.config_files import load_config, save_config
from basic.common.errors import DamagedFileError, NotARunError
from basic.generation.text import SavableTokenizer
from basic.model import TransformerLM
from basic.training.checkpoints.file import Checkpoint, load_state, read_checkpoint
from basic.training.checkpoints.sharded import read_sharded_checkpoint
from basic.training.devices import activation_dtype, choose_device
from basic.training.settings import RunConfig

_CHECKPOINT_NAME = re.compile(r"step_\d+(\.safetensors)?")


class Run(NamedTuple):
    """A trained model, with the configuration and tokenizer it was trained with."""

    model: TransformerLM
    config: RunConfig
    tokenizer_path: Path | None
    """Folder for `Tokenizer.load`; None if the run has no tokenizer."""
    step: int
    """Number of optimizer steps that the model was trained for."""

    def with_document_start(self, prompt: str) -> str:
        """Put the separator before a prompt, if every sequence that the model was trained on starts with one."""
        separator = self.config.train.end_of_text if self.config.train.rows == "documents" else ""
        return separator + prompt.removeprefix(separator)


def load_run_config(run_dir: Path) -> RunConfig:
    """Load the configuration with which a run was started or last resumed.

    Raises:
        NotARunError: the folder is not a run.
        InvalidConfigError: the configuration is not valid.
    """
    if not (run_dir / "config.toml").is_file():
        raise NotARunError(f"{run_dir} is not a run: it has no config.toml; start one with local/train.py")
    return load_config(run_dir / "config.toml", RunConfig)


def load_run(path: str | os.PathLike, *, device: str = "auto") -> Run:
    """Load the model of a run, in evaluation mode, from its newest complete checkpoint.

    A warning names every newer checkpoint that is damaged.

    Args:
        device: cpu, cuda, ...; "auto" is a GPU if there is one, else the CPU.

    Raises:
        NotARunError: the folder is not a run, or has no checkpoint yet.
        InvalidInputError: the configuration or the device is not valid, or the checkpoint does not fit the
            configuration.
        DamagedFileError: no checkpoint is complete.
    """
    run_dir = Path(path)
    config = load_run_config(run_dir)
    model = TransformerLM(config.model)
    step = load_state(newest_checkpoint(run_dir, warnings.warn), model)
    chosen = choose_device(device)
    model.to(chosen).eval()
    model.activation_dtype = activation_dtype(config.train, chosen)
    tokenizer_path = run_dir / "tokenizer"
    return Run(model, config, tokenizer_path if tokenizer_path.is_dir() else None, step)


def create_run_folder(
    run_dir: Path, config: RunConfig, tokenizer: SavableTokenizer | None, *, overwrite: bool = False
) -> None:
    """Create a run's folder with its configuration and a copy of its tokenizer.

    Args:
        overwrite: first remove the run that the folder contains; other files stay.

    Raises:
        FileExistsError: the folder contains a run, and `overwrite` is False.
    """
    if (run_dir / "config.toml").exists():
        if not overwrite:
            raise FileExistsError(
                f"{run_dir} already contains a run; choose another folder, resume the run (--resume {run_dir}), or "
                "remove it (--overwrite)"
            )
        for name in ("config.toml", "environment.json", "metrics.jsonl", "samples.txt"):
            (run_dir / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tokenizer"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(run_dir / "tokenizer")
    save_config(config, run_dir / "config.toml")


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, files and folders, oldest first."""
    paths = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in paths if _CHECKPOINT_NAME.fullmatch(path.name)), key=lambda path: path.name)


def checkpoint_step(path: Path) -> int:
    """Return the number of steps done when a checkpoint was saved."""
    return int(path.stem.removeprefix("step_"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, which is a file or the folder of a sharded model.

    Raises:
        DamagedFileError: the checkpoint is not complete.
    """
    return read_sharded_checkpoint(path) if path.is_dir() else read_checkpoint(path)


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
