"""A training run as it lies on the disk: its configuration, and a folder with all that came of it.

runs/NAME/config.toml                        what was asked for, defaults filled in
          environment.json                   code, machine and data, for every start
          metrics.jsonl                      a line of numbers every few steps
          samples.txt                        what the model wrote on the way
          tokenizer/                         vocabulary, merges and special tokens, if a tokenizer was given
          checkpoints/step_00001000.safetensors    or, of a sharded model, a folder step_00001000/
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
from basic.generation.text import SavableTokenizer
from basic.model import TransformerLM
from basic.training.checkpoints.file import Checkpoint, read_checkpoint, restore
from basic.training.checkpoints.sharded import read_parts
from basic.training.devices import activation_dtype, choose_device
from basic.training.settings import RunConfig

_CHECKPOINT_NAME = re.compile(r"step_\d+(\.safetensors)?")


class Run(NamedTuple):
    """A trained model and where it comes from."""

    model: TransformerLM
    config: RunConfig
    tokenizer_path: Path | None
    """Folder for `Tokenizer.load`."""
    step: int
    """Optimizer steps it has seen."""

    def with_document_start(self, prompt: str) -> str:
        """The prompt as the model knows texts.

        One whose rows were documents knows them from their beginning only, which the token before it marks.
        """
        start = self.config.train.end_of_text if self.config.train.rows == "documents" else ""
        return start + prompt.removeprefix(start)


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration with which a run was begun or last gone on with.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: the configuration is not valid.
    """
    if not (run_dir / "config.toml").is_file():
        raise FileNotFoundError(f"{run_dir} is not a run: it has no config.toml; start one with local/train.py")
    return load_config(run_dir / "config.toml", RunConfig)


def load_run(path: str | os.PathLike, *, device: str = "auto") -> Run:
    """The trained model of a run's folder, with its configuration: its newest checkpoint that is whole.

    Args:
        device: as for `choose_device`.

    Raises:
        FileNotFoundError: the folder, its configuration or a checkpoint is missing.
        ValueError: no checkpoint is whole, or it does not fit the configuration.
    """
    run_dir = Path(path)
    config = load_run_config(run_dir)
    model = TransformerLM(config.model)
    step = restore(newest_checkpoint(run_dir, warnings.warn), model)
    chosen = choose_device(device)
    model.to(chosen).eval()
    model.activation_dtype = activation_dtype(config.train, chosen)
    tokenizer_path = run_dir / "tokenizer"
    return Run(model, config, tokenizer_path if tokenizer_path.is_dir() else None, step)


def create_run_folder(
    run_dir: Path, config: RunConfig, tokenizer: SavableTokenizer | None, *, overwrite: bool = False
) -> None:
    """Make a run's folder with its configuration and a copy of its tokenizer.

    Args:
        overwrite: remove a run that is there already; of other files in the folder, none.

    Raises:
        FileExistsError: there is a run already, and `overwrite` is off.
    """
    if (run_dir / "config.toml").exists():
        if not overwrite:
            raise FileExistsError(
                f"{run_dir} already holds a run; choose another folder, go on with it (--resume {run_dir}), or "
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
    """All checkpoints of a run, files and folders, oldest first."""
    paths = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in paths if _CHECKPOINT_NAME.fullmatch(path.name)), key=lambda path: path.name)


def checkpoint_step(path: Path) -> int:
    """The number of steps after which a checkpoint was saved."""
    return int(path.stem.removeprefix("step_"))


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of either form, if it is whole.

    Raises:
        ValueError: it is not.
    """
    return read_parts(path) if path.is_dir() else read_checkpoint(path)


def newest_checkpoint(run_dir: Path, report: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint of a run that is whole.

    Args:
        report: called with a line for each newer one that is not.

    Raises:
        FileNotFoundError: there is none at all.
        ValueError: none is whole.
    """
    paths = checkpoint_paths(run_dir)
    if not paths:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'} has no checkpoint (step_*) yet")
    for path in reversed(paths):
        try:
            return open_checkpoint(path)
        except ValueError as error:
            report(f"warning: {error}")
    raise ValueError(
        f"none of the {len(paths)} checkpoints in {run_dir / 'checkpoints'} is whole, the newest is {paths[-1].name}; "
        "restore one from a copy, or train again with --overwrite"
    )
