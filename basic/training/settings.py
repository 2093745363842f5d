"""The configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from basic.common.config_files import check_fields, check_numbers, short_repr
from basic.common.errors import InvalidConfigError
from basic.transformer.configuration import ModelConfig

# The docstrings of the fields are the texts of `basic train --help`.


_DEFAULT_WARMUP_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """How Muon updates the matrices, if optimizer is muon (see `basic.transformer.muon.Muon`).

    Raises:
        InvalidConfigError: a setting is out of its range.
    """

    momentum: float = 0.95
    """Muon: decay rate of the running mean of the gradient."""
    first_momentum: float = 0.85
    """Muon: the momentum at the start, from which it grows linearly in momentum_warmup_steps."""
    momentum_warmup_steps: int = 0
    """Muon: steps until the momentum is reached."""
    orthogonalization: Literal["polar_express", "newton_schulz"] = "polar_express"
    """Muon: the polynomials that take the singular values of the momentum to 1."""
    iterations: int = 5
    """Muon: number of polynomials."""
    normalization: Literal["none", "rows", "long_side"] = "rows"
    """Muon: divide each row of the update (long_side: each column of a matrix with more columns than rows) by the
    root of a running mean of its mean square."""
    normalization_beta: float = 0.95
    """Muon: decay rate of the running mean of the normalization."""
    cautious: bool = True
    """Muon: only weights that the update moves towards 0 decay."""
    update_scale: Literal["shape", "rms"] = "shape"
    """Muon: factor of the update: shape = sqrt(max(1, rows / columns)); rms = 0.2 sqrt(max(rows, columns)), for
    learning rates like those of AdamW."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_fields(self)
        check_numbers(self, ["momentum", "first_momentum", "normalization_beta"], 0, 1, prefix="muon.")
        check_numbers(self, ["momentum_warmup_steps"], 0, prefix="muon.")
        check_numbers(self, ["iterations"], 1, prefix="muon.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Raises:
        InvalidConfigError: a setting is out of its range, or gradient_accumulation does not divide batch_size.
    """

    steps: int = 0
    """Number of optimizer steps. The run sees steps x batch_size x context_length tokens. With minutes, 0 for as many
    as take that time."""
    minutes: float | None = None
    """Time that the run is to take, compiling and evaluations included. The number of steps is set after the first
    timed ones and saved in config.toml."""
    batch_size: int = 64
    """Sequences per step, on all GPUs together."""
    gradient_accumulation: int = 1
    """Number of micro-batches into which each batch is split. They are computed one after the other, which needs less
    memory and gives the same result."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw = AdamW for all parameters; muon = Muon for the matrices of the blocks, AdamW for all others. A good
    learning rate for Muon is about 0.02."""
    max_learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_learning_rate: float = 1e-4
    """Learning rate at the last step, where the schedule ends."""
    embedding_rate_factor: float = 1.0
    """Factor for the learning rate of the token embedding and the output matrix, whose rows are updated rarely."""
    head_rate_factor: float | None = None
    """Factor for the learning rate of the output matrix; None for embedding_rate_factor."""
    gain_rate_factor: float = 1.0
    """Factor for the learning rate of the norms' gains."""
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """The learning rate after its warm-up: cosine = half a cosine down to the minimum; trapezoid = constant, then
    linear decay to the minimum."""
    warmup_steps: int | None = None
    """Steps in which the learning rate grows linearly from 0 to its maximum; None for 100, or for a tenth of the run if
    it has at most 100 steps."""
    warmup_share: float | None = None
    """The warm-up as a share of the run, instead of warmup_steps."""
    decay_share: float = 0.5
    """Trapezoid: share of the run in which the learning rate decays; 0 for a constant rate."""
    decay_steps: int | None = None
    """Trapezoid: the steps of the decay, instead of decay_share."""
    beta1: float = 0.9
    """AdamW: decay rate of the running mean of the gradient."""
    beta2: float = 0.95
    """AdamW: decay rate of the running mean of the squared gradient."""
    eps: float = 1e-8
    """AdamW: small number in the denominator, against division by zero."""
    weight_decay: float = 0.1
    """Weight decay. Each step removes learning rate x weight_decay of every weight."""
    other_weight_decay: float | None = None
    """Weight decay of the token embedding, the output matrix and the gains; None for weight_decay with AdamW, and for
    none with Muon."""
    head_weight_decay: float | None = None
    """Weight decay of the output matrix; None for other_weight_decay."""
    weight_decay_schedule: Literal["constant", "linear"] = "constant"
    """linear = weight decay falls linearly from its value to 0 at the last step."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """How Muon updates the matrices."""
    max_gradient_norm: float = 1.0
    """Gradient clipping: gradients with a larger L2 norm (over all parameters) are scaled down to it."""
    init_from: str = ""
    """Begin with the weights of another model, without an optimizer: a run, or one of its checkpoint files, or a model
    of another program as for `basic import`. The model's settings and its tokenizer are those of the source."""
    rows: Literal["windows", "shuffled", "documents", "packed"] = "windows"
    """Where the sequences of a batch start: windows = at random positions; shuffled = each window of the text once
    before any comes again; documents = at the start of a document (at the end_of_text token before it); packed =
    complete documents, several in a sequence, none of which attends to another; one that is longer than the context is
    cut. A token file of conversations says itself where its documents start."""
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
    precision: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """Data type of activations and matrix multiplications. Weights, norms, softmax and loss are always float32. auto is
    bfloat16 on GPUs that support it, else float32. fp8 = bfloat16, with the matrices of the blocks multiplied in 8
    bits, for large models on a GPU that can (NVIDIA's since the L4 and the H100). d_model, d_ff, the features of all
    heads and the tokens that a GPU computes at a time must be divisible by 16, and the parameters not sharded."""
    cuda_graph: bool = True
    """Capture the whole step in a CUDA graph and replay it, so that the GPU does not wait for Python. It has no effect
    with gradient accumulation or sharded parameters."""
    compile: bool = False
    """Compile the model with torch.compile. On a GPU training is faster, but the first step takes up to a minute. On a
    CPU it takes a minute or more, and then steps are slower, because they do without the operators for a CPU."""
    dropout: float = 0.0
    """Probability with which each feature of the embedding, and of what attention and feed-forward layer add to it, is
    set to zero in training. It helps where the same text is seen many times, as in fine-tuning."""
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass, which computes the block again: less memory, and about a
    third more time."""
    parallel: Literal["replicated", "sharded"] = "replicated"
    """What each GPU stores (`torchrun --nproc-per-node N`): replicated = the whole model; sharded = a slice of every
    matrix, its gradient and its AdamW moments (FSDP), for models that are too large for one GPU."""
    reduce_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type in which gradients are summed over GPUs. auto is the data type of each gradient, or float32 with
    gradient accumulation. bfloat16 halves the amount of data to send."""

    @property
    def total_warmup_steps(self) -> int:
        """Length of the warm-up in steps, from `warmup_share`, `warmup_steps` or the default."""
        if self.warmup_share is not None:
            return round(self.warmup_share * self.steps)
        if self.warmup_steps is not None:
            return self.warmup_steps
        # A short run does not end in its warm-up: from 10 steps on, the learning rate reaches its maximum.
        return _DEFAULT_WARMUP_STEPS if self.steps > _DEFAULT_WARMUP_STEPS else self.steps // 10

    @property
    def total_decay_steps(self) -> int:
        """Length of the trapezoid's decay in steps."""
        return round(self.decay_share * self.steps) if self.decay_steps is None else self.decay_steps

    @property
    def evaluation_overhead(self) -> float:
        """Time for evaluations, for each second of steps: they have no backward pass, two thirds of a step's time."""
        return self.eval_batches / self.eval_interval / 3 if self.eval_interval else 0.0

    def scheduled(self, step: int) -> dict[str, float]:
        """The arguments of a `TrainStep` at a step, counted from 1, so that the first rate is above 0.

        Returns:
            `learning_rate`; with Muon also `momentum`; with a schedule for the weight decay also its factor.
        """
        from basic.transformer.optimizer import cosine_schedule, trapezoid_schedule  # imported late: they need torch

        rates, warmup = (self.max_learning_rate, self.min_learning_rate), self.total_warmup_steps
        if self.schedule == "cosine":
            arguments = {"learning_rate": cosine_schedule(step, *rates, warmup, self.steps)}
        else:
            rate = trapezoid_schedule(step, *rates, warmup, self.total_decay_steps, self.steps)
            arguments = {"learning_rate": rate}
        if self.optimizer == "muon":
            muon = self.muon
            share = min(step / muon.momentum_warmup_steps, 1.0) if muon.momentum_warmup_steps else 1.0
            arguments["momentum"] = muon.first_momentum + share * (muon.momentum - muon.first_momentum)
        if self.weight_decay_schedule == "linear":
            arguments["weight_decay_factor"] = 1 - step / self.steps
        return arguments

    @property
    def before_planning(self) -> TrainConfig:
        """The settings of the first steps of a run in minutes, whose number of steps is not known yet.

        The learning rate is in its warm-up, or has its maximum.
        """
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            warmup_steps = 0 if self.warmup_share == 0 else _DEFAULT_WARMUP_STEPS
        return replace(self, steps=10**9, warmup_steps=warmup_steps, warmup_share=None)

    def check_schedule(self) -> None:
        """Check that warm-up and decay fit into the run; only a run that is trained needs it.

        Raises:
            InvalidConfigError: they do not.
        """
        if self.steps == 0:  # not planned yet
            return
        warmup, decay = self.total_warmup_steps, self.total_decay_steps if self.schedule == "trapezoid" else 0
        if warmup and warmup >= self.steps:
            raise InvalidConfigError(
                f"the warm-up of {warmup:,} steps does not fit into steps = {self.steps:,}, so the learning rate would "
                f"never reach its maximum; give --warmup-steps {self.steps // 10}, or --warmup-share 0.1 for any length"
            )
        if warmup + decay > self.steps:
            raise InvalidConfigError(
                f"a warm-up of {warmup:,} steps and a decay of {decay:,} do not fit into steps = {self.steps:,}; lower "
                "one of them"
            )

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_fields(self, may_be_infinite=("max_gradient_norm",))
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InvalidConfigError(f"minutes must be above 0, got {self.minutes}")
        if self.minutes is None and self.steps < 1:
            raise InvalidConfigError(f"steps must be at least 1, got {self.steps}; set steps, or minutes")
        counts = ("batch_size", "gradient_accumulation", "eval_batches", "sample_tokens", "checkpoints_kept")
        check_numbers(self, counts, 1)
        intervals = ("log_interval", "eval_interval", "sample_interval", "checkpoint_interval", "milestone_interval")
        numbers = ("min_learning_rate", "embedding_rate_factor", "eps", "weight_decay", "checkpoint_minutes")
        numbers += ("head_rate_factor", "gain_rate_factor", "other_weight_decay", "head_weight_decay")
        steps = "steps", "warmup_steps", "decay_steps", "max_nonfinite_steps"
        check_numbers(self, (*steps, "seed", *numbers, *intervals), 0)
        if self.seed >= 2**64:  # what torch's generators accept
            raise InvalidConfigError(f"seed must be below 2**64, got {self.seed}")
        check_numbers(self, ["beta1", "beta2", "dropout"], 0, 1)
        for name in ("warmup_share", "decay_share"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise InvalidConfigError(f"{name} must be from 0 to 1, got {share}")
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise InvalidConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_share={self.warmup_share} say the same; leave one out"
            )
        if not self.max_gradient_norm > 0:
            raise InvalidConfigError(f"max_gradient_norm must be above 0, got {self.max_gradient_norm}")
        if not self.max_learning_rate >= self.min_learning_rate:
            raise InvalidConfigError(
                f"max_learning_rate={self.max_learning_rate} must be at least "
                f"min_learning_rate={self.min_learning_rate}; change one of them"
            )
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
    """The tokenizer that made these tokens: a folder, a tokenizer.json, a rank file (all that Tokenizer.load opens).
    The run gets a copy. Samples need it, and so do rows = "documents" and "packed"."""
    dtype: str = ""
    """Integer type of token files without a sidecar, such as uint16 for those of nanoGPT."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run."""

    model: ModelConfig
    """Architecture and sizes of the model."""
    train: TrainConfig
    """How the model is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the model is trained on."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_fields(self)
