"""A training run as it lies on the disk: its configuration, and a folder with all that came of it.

runs/NAME/config.toml                        what was asked for, defaults filled in
          environment.json                   code, machine and data, for every start
          metrics.jsonl                      a line of numbers every few steps
          samples.txt                        what the model wrote on the way
          tokenizer/                         vocabulary, merges and special tokens, if a tokenizer was given
          checkpoints/step_00001000.safetensors    or, of a sharded model, a folder step_00001000/
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from basic.checkpoint import Checkpoint, read_checkpoint, restore
from basic.config_files import load_config, save_config
from basic.model import ModelConfig, TransformerLM
from basic.sharded_checkpoint import read_parts

_CHECKPOINT_NAME = re.compile(r"step_\d+(\.safetensors)?")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Raises:
        ValueError: a setting is out of its range, or the accumulation does not divide the batch.
    """

    steps: int
    """Optimizer steps; the tokens seen are steps x batch_size x context_length."""
    batch_size: int = 64
    """Sequences a step, of all processes together."""
    gradient_accumulation: int = 1
    """Parts into which a batch is cut to save memory; they are computed one after the other, for the same result."""
    max_learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_learning_rate: float = 1e-4
    """Learning rate at the last step, at the end of a cosine."""
    embedding_rate_factor: float = 1.0
    """Learning rate of the embedding and output matrices, over that of all else: their rows are learned one by one."""
    warmup_steps: int = 100
    """Steps in which the learning rate grows from 0."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient, a step."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient, a step."""
    eps: float = 1e-8
    """AdamW's addend to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """AdamW's weight decay, times the learning rate, a step."""
    max_gradient_norm: float = 1.0
    """Gradients whose joint L2 norm is above this are scaled down to it."""
    rows: Literal["windows", "documents"] = "windows"
    """Where a row of the batch begins: anywhere, or at a document's start (behind an end-of-text token)."""
    end_of_text: str = "<|endoftext|>"
    """The special token between documents."""
    log_interval: int = 50
    """Steps between lines of the metrics log; 0 for the last step only, as for the other intervals."""
    eval_interval: int = 500
    """Steps between evaluations."""
    eval_batches: int = 20
    """Batches of an evaluation, always the same ones."""
    sample_interval: int = 0
    """Steps between samples, if a tokenizer is there."""
    sample_tokens: int = 256
    """Most tokens of a sample."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    checkpoint_minutes: float = 30.0
    """Minutes after which a checkpoint is saved whatever the step; 0 for never."""
    checkpoints_kept: int = 2
    """The newest so many are kept; the one before is there should the newest turn out damaged."""
    keep_best: bool = True
    """Whether the weights with the lowest validation loss are saved and kept too."""
    milestone_interval: int = 0
    """Steps between checkpoints that are kept for good; 0 for none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is not finite. The weights never take that step: the run stops, or goes on
    without it."""
    max_nonfinite_steps: int = 10
    """Most steps that a run may go on without, if on_nonfinite is skip."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Programs that the metrics are sent to as well: tensorboard, wandb."""
    seed: int = 0
    """Of the initial weights, the batches and the samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto takes the best there is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the activations and matrix products; weights, norms, softmax and loss stay float32. auto is bfloat16 on GPUs
    that have it."""
    cuda_graph: bool = True
    """Whether a GPU records the whole step once and replays it, so that it never waits for Python (not with
    gradient accumulation)."""
    compile: bool = False
    """Whether torch.compile makes the model faster; the first step then takes up to a minute."""
    parallel: Literal["replicated", "sharded"] = "replicated"
    """What each of several processes (`torchrun --nproc-per-node N`) has: the whole model, or a part of every matrix,
    gradient and moment, for models that do not fit one GPU."""
    reduce_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of gradients on their way between processes. auto is that in which each was computed, so with precision bfloat16
    half as much to send for most of them; but float32 where those of several parts of a batch are added up."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "gradient_accumulation", "eval_batches", "sample_tokens", "checkpoints_kept")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        intervals = ("log_interval", "eval_interval", "sample_interval", "checkpoint_interval", "milestone_interval")
        numbers = ("min_learning_rate", "embedding_rate_factor", "eps", "weight_decay", "checkpoint_minutes")
        for name in ("warmup_steps", "seed", "max_nonfinite_steps", *numbers, *intervals):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be above 0, got {self.max_gradient_norm}")
        if not self.max_learning_rate >= self.min_learning_rate:
            raise ValueError(
                f"max_learning_rate={self.max_learning_rate} must be at least "
                f"min_learning_rate={self.min_learning_rate}; change one of them"
            )
        choices = {
            "rows": ("windows", "documents"),
            "precision": ("auto", "float32", "bfloat16"),
            "on_nonfinite": ("stop", "skip"),
            "parallel": ("replicated", "sharded"),
            "reduce_precision": ("auto", "float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} must be divisible by gradient_accumulation={self.gradient_accumulation}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data lies."""

    train_tokens: str = ""
    """Token file to learn from."""
    valid_tokens: str = ""
    """Token file to measure on."""
    tokenizer: str = ""
    """Folder of the tokenizer that made them; needed for samples and for rows = "documents"."""
    dtype: str = ""
    """Integer type of token files without a sidecar, such as nanoGPT's uint16."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made from."""

    model: ModelConfig
    """The model's shape."""
    train: TrainConfig
    """How it is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""


class Savable(Protocol):
    """A tokenizer, as far as a run's folder is concerned."""

    def save(self, directory: str | os.PathLike) -> None: ...


class Run(NamedTuple):
    """A trained model and where it comes from."""

    model: TransformerLM
    config: RunConfig
    tokenizer_path: Path | None
    """Folder for `Tokenizer.load`."""
    step: int
    """Optimizer steps it has seen."""

    def begun(self, prompt: str) -> str:
        """The prompt as the model knows texts.

        One whose rows were documents knows them from their beginning only, which the token before it marks.
        """
        start = self.config.train.end_of_text if self.config.train.rows == "documents" else ""
        return start + prompt.removeprefix(start)


def config_of(run_dir: Path) -> RunConfig:
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
    config = config_of(run_dir)
    model = TransformerLM(config.model)
    step = restore(newest_checkpoint(run_dir, warnings.warn), model)
    chosen = choose_device(device)
    model.to(chosen).eval()
    model.activation_dtype = activation_dtype(config.train, chosen)
    tokenizer_path = run_dir / "tokenizer"
    return Run(model, config, tokenizer_path if tokenizer_path.is_dir() else None, step)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is a CUDA GPU, else Apple's, else the CPU.

    Raises:
        ValueError: the device is not usable here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from error
    return torch.device(name)


def activation_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What the model computes in between its weights, which are float32, and its loss, which is too."""
    has_bfloat16 = device.type == "mps"
    if device.type == "cuda":  # older GPUs only emulate it, slower than float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    use = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16)
    return torch.bfloat16 if use else torch.float32


def reduce_dtype(config: TrainConfig) -> torch.dtype | None:
    """What gradients are added up in between processes; None for the precision in which each was computed."""
    if config.reduce_precision == "auto":
        return None if config.gradient_accumulation == 1 else torch.float32
    return torch.bfloat16 if config.reduce_precision == "bfloat16" else torch.float32


def start_folder(run_dir: Path, config: RunConfig, tokenizer: Savable | None, *, overwrite: bool = False) -> None:
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


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The training records of a metrics log, oldest first; the log's other records have a kind."""
    return read_records(path, None)


def read_records(path: str | os.PathLike, kind: str | None) -> list[dict[str, Any]]:
    """The records of one kind in a metrics log, oldest first.

    Args:
        kind: "evaluation", "sample", "checkpoint" or "nonfinite"; None for the training records.
    """
    return [record for record in read_all_records(path) if record.get("kind") == kind]


def read_all_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a metrics log; lines that a crash or a full disk cut off are left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


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
