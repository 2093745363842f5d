"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from basic.common.config_files import check_choices
from basic.model import ModelConfig


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
        check_choices(self)
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
