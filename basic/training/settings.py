"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from basic.common.config_files import check_choices
from basic.common.errors import InvalidConfigError
from basic.model import ModelConfig

# The docstrings of the fields are the texts of `local/train.py --help`.


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Raises:
        InvalidConfigError: a setting is out of its range, or gradient_accumulation does not divide batch_size.
    """

    steps: int
    """Number of optimizer steps. The run sees steps x batch_size x context_length tokens."""
    batch_size: int = 64
    """Sequences per step, on all GPUs together."""
    gradient_accumulation: int = 1
    """Number of micro-batches into which each batch is split. They are computed one after the other, which needs less
    memory and gives the same result."""
    max_learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_learning_rate: float = 1e-4
    """Learning rate at the last step, where the cosine schedule ends."""
    embedding_rate_factor: float = 1.0
    """Factor for the learning rate of the token embedding and the output matrix, whose rows are updated rarely."""
    warmup_steps: int = 100
    """Steps in which the learning rate grows linearly from 0 to its maximum; a tenth of the steps, with a warning, if
    the run is not longer than its warm-up."""
    beta1: float = 0.9
    """AdamW: decay rate of the running mean of the gradient."""
    beta2: float = 0.95
    """AdamW: decay rate of the running mean of the squared gradient."""
    eps: float = 1e-8
    """AdamW: small number in the denominator, against division by zero."""
    weight_decay: float = 0.1
    """AdamW: weight decay. Each step removes learning rate x weight_decay of every weight."""
    max_gradient_norm: float = 1.0
    """Gradient clipping: gradients with a larger L2 norm (over all parameters) are scaled down to it."""
    rows: Literal["windows", "documents"] = "windows"
    """Where the sequences of a batch start: windows = at random positions; documents = at the start of a document (at
    the end_of_text token before it)."""
    end_of_text: str = "<|endoftext|>"
    """The special token that separates documents."""
    log_interval: int = 50
    """Steps between two records in metrics.jsonl. For all intervals, 0 means the last step only."""
    eval_interval: int = 500
    """Steps between two evaluations on the validation tokens."""
    eval_batches: int = 20
    """Batches per evaluation. They are always the same ones."""
    sample_interval: int = 0
    """Steps between two text samples from the model. Samples need a tokenizer."""
    sample_tokens: int = 256
    """Maximum number of tokens in a sample."""
    checkpoint_interval: int = 1000
    """Steps between two checkpoints."""
    checkpoint_minutes: float = 30.0
    """Maximum number of minutes between two checkpoints, whatever the step; 0 for no limit."""
    checkpoints_kept: int = 2
    """Number of newest checkpoints to keep. With 2, an older one is left if the newest is damaged."""
    keep_best: bool = True
    """Also save and keep the checkpoint with the lowest validation loss."""
    milestone_interval: int = 0
    """Steps between two checkpoints that are never deleted; 0 for none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do after a step whose loss or gradient is NaN or infinite: stop the run, or skip the step. The weights
    are not updated in either case."""
    max_nonfinite_steps: int = 10
    """Maximum number of steps to skip, if on_nonfinite is skip."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Programs that also receive the metrics: tensorboard, wandb."""
    seed: int = 0
    """Random seed of the initial weights, the batches and the samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of activations and matrix multiplications. Weights, norms, softmax and loss are always float32. auto is
    bfloat16 on GPUs that support it, else float32."""
    cuda_graph: bool = True
    """Capture the whole step in a CUDA graph and replay it, so that the GPU does not wait for Python. It has no effect
    with gradient accumulation or sharded parameters."""
    compile: bool = False
    """Compile the model with torch.compile. Training is faster, but the first step takes up to a minute."""
    parallel: Literal["replicated", "sharded"] = "replicated"
    """What each GPU stores (`torchrun --nproc-per-node N`): replicated = the whole model; sharded = a slice of every
    matrix, its gradient and its AdamW moments (FSDP), for models that are too large for one GPU."""
    reduce_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type in which gradients are summed over GPUs. auto is the data type of each gradient, or float32 with
    gradient accumulation. bfloat16 halves the amount of data to send."""

    @property
    def fitted_warmup_steps(self) -> int:
        """`warmup_steps`, or a tenth of the steps if the run is not longer than its warm-up.

        So a short run does not end in its warm-up: from 10 steps on, the learning rate reaches its maximum.
        """
        return self.warmup_steps if self.warmup_steps < self.steps else self.steps // 10

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "gradient_accumulation", "eval_batches", "sample_tokens", "checkpoints_kept")
        for name in counts:
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        intervals = ("log_interval", "eval_interval", "sample_interval", "checkpoint_interval", "milestone_interval")
        numbers = ("min_learning_rate", "embedding_rate_factor", "eps", "weight_decay", "checkpoint_minutes")
        for name in ("warmup_steps", "seed", "max_nonfinite_steps", *numbers, *intervals):
            if not getattr(self, name) >= 0:
                raise InvalidConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.seed >= 2**64:  # what torch's generators accept
            raise InvalidConfigError(f"seed must be below 2**64, got {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not self.max_gradient_norm > 0:
            raise InvalidConfigError(f"max_gradient_norm must be above 0, got {self.max_gradient_norm}")
        if not self.max_learning_rate >= self.min_learning_rate:
            raise InvalidConfigError(
                f"max_learning_rate={self.max_learning_rate} must be at least "
                f"min_learning_rate={self.min_learning_rate}; change one of them"
            )
        check_choices(self)
        if self.batch_size % self.gradient_accumulation:
            raise InvalidConfigError(
                f"batch_size={self.batch_size} must be divisible by gradient_accumulation={self.gradient_accumulation}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Paths of the training data."""

    train_tokens: str = ""
    """Token file, or folder of a token dataset, to train on."""
    valid_tokens: str = ""
    """Token file, or folder of a token dataset, to evaluate on."""
    tokenizer: str = ""
    """Folder of the tokenizer that made these tokens. Samples and rows = "documents" need it."""
    dtype: str = ""
    """Integer type of token files without a sidecar, such as uint16 for those of nanoGPT."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run."""

    model: ModelConfig
    """Architecture and sizes of the model."""
    train: TrainConfig
    """How the model is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the model is trained on."""
