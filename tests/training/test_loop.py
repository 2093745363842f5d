"""The training loop, compared with a loop of PyTorch's own modules, and the files that a run writes."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from basic.common.config_files import load_config
from basic.common.errors import InvalidConfigError, InvalidInputError, WrongTokenizerError
from basic.model import ModelConfig, TransformerLM
from basic.training.batches import BatchSampler
from basic.training.loop import train
from basic.training.recipes import recipe_settings
from basic.training.records.meter import memory_use
from basic.training.records.metrics import read_metrics
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep
from tests.helpers.number_tokenizer import END, NumberTokenizer

VOCAB, CONTEXT = 20, 8
MODEL = ModelConfig(vocab_size=VOCAB, context_length=CONTEXT, d_model=16, num_layers=1, num_heads=2)
# Documents of 1 to 9 tokens, each after the separator END.
RANDOM = np.random.default_rng(0)
TRAIN = np.concatenate([[END, *RANDOM.integers(1, VOCAB, size=RANDOM.integers(1, 10))] for _ in range(60)])
VALID = np.concatenate([[END, *RANDOM.integers(1, VOCAB, size=RANDOM.integers(1, 10))] for _ in range(20)])
KEYS = ["step", "tokens", "wall_s", "train_loss", "learning_rate", "gradient_norm", "tokens_per_s"]
MEMORY = list(memory_use(torch.device("cpu")))  # none on Windows


MODERN = recipe_settings("modern", vocab_size=VOCAB, depth=1)


def configuration(**settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "steps": 8,
        "batch_size": 4,
        "max_learning_rate": 1e-2,
        "min_learning_rate": 1e-3,
        "warmup_steps": min(3, (settings.get("steps") or 8) - 1),
        "log_interval": 1,
        "eval_batches": 2,
        "device": "cpu",
    }
    return RunConfig(model=MODEL, train=TrainConfig(**{**defaults, **settings}))


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run_dir / "checkpoints" / f"step_{step:08}.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def step_that_fails(number: int, error: BaseException) -> type[TrainStep]:
    """A step that raises an error instead of step `number`, as an interrupt does."""
    calls = itertools.count(1)

    class FailingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            if next(calls) == number:
                raise error
            return super().__call__(batch, *scheduled, **options)

    return FailingStep


# --- Results ------------------------------------------------------------------------------------------------


def scheduled(settings: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 1: linear warm-up, then a cosine."""
    assert settings.warmup_steps is not None
    if step < settings.warmup_steps:
        return settings.max_learning_rate * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    span = settings.max_learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def test_weights_equal_those_of_a_loop_with_pytorchs_modules(tmp_path):
    config = configuration(max_gradient_norm=0.5, weight_decay=0.2, beta2=0.9, eps=1e-6, seed=3)
    run = train(config, TRAIN, VALID, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")

    torch.manual_seed(3)
    model = TransformerLM(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.9), eps=1e-6, weight_decay=0.2)
    sampler = BatchSampler(TRAIN, 4, CONTEXT, seed=3)
    norms = []
    for step, record in enumerate(records, 1):
        inputs, targets = sampler.batch(step - 1)
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.param_groups[0]["lr"] = scheduled(config.train, step)
        optimizer.step()
        assert record["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["gradient_norm"] == pytest.approx(norms[-1], rel=1e-4)
    assert len(norms) == 8
    assert max(norms) > 0.5  # clipping took place
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_accumulation_gives_the_result_of_the_full_batch(tmp_path):
    runs, metrics = {}, {}
    for count in (1, 2, 4):
        run_dir = tmp_path / str(count)
        runs[count] = train(configuration(gradient_accumulation=count), TRAIN, VALID, run_dir)
        metrics[count] = read_metrics(run_dir / "metrics.jsonl")
    for count in (2, 4):
        for parameter, expected in zip(runs[count].model.parameters(), runs[1].model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
        for record, expected in zip(metrics[count], metrics[1], strict=True):
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls_on_repeated_text(tmp_path, precision):
    tokens = np.tile(np.array([1, 5, 2, 7, 3], np.uint16), 40)
    config = configuration(steps=60, batch_size=8, log_interval=10, precision=precision)
    run = train(config, tokens, tokens, tmp_path / "run")
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 1.5
    assert losses[-1] < 0.2
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_auto_precision_is_float32_on_a_cpu_and_bfloat16_rounds(tmp_path):
    losses = {}
    for precision in ("float32", "auto", "bfloat16"):
        # With a learning rate of 0, the validation loss is that of the same weights.
        config = configuration(steps=1, precision=precision, max_learning_rate=0.0, min_learning_rate=0.0)
        train(config, TRAIN, VALID, tmp_path / precision)
        (record,) = read_metrics(tmp_path / precision / "metrics.jsonl")
        losses[precision] = (record["train_loss"], record["valid_loss"])
    assert losses["auto"] == losses["float32"]
    for rounded, exact in zip(losses["bfloat16"], losses["float32"], strict=True):
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_rate_factor_of_0_leaves_embedding_and_output_matrix_unchanged(tmp_path, tied):
    config = configuration(embedding_rate_factor=0.0)
    config = replace(config, model=replace(MODEL, tied_embeddings=tied))
    trained = train(config, TRAIN, VALID, tmp_path / "run").model.state_dict()
    torch.manual_seed(config.train.seed)
    before = TransformerLM(config.model).state_dict()
    same = {name for name in before if torch.equal(before[name], trained[name])}
    assert same == {"token_embeddings.weight", "lm_head.weight"}


def test_with_documents_sequences_start_at_the_separator(tmp_path):
    batches = []

    class RecordingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            batches.append(batch)
            return super().__call__(batch, *scheduled, **options)

    config = configuration(rows="documents")
    train(config, TRAIN, VALID, tmp_path / "run", tokenizer=NumberTokenizer(VOCAB), make_step=RecordingStep)
    assert len(batches) == 8
    assert all((inputs[:, 0] == END).all() for inputs, _ in batches)


# --- Metrics --------------------------------------------------------------------------------------------------


def test_metrics_have_their_keys_and_values(tmp_path):
    config = configuration(steps=10, log_interval=3, eval_interval=5)
    train(config, TRAIN, VALID, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    all_records = [json.loads(line) for line in lines]
    records = [record for record in all_records if "kind" not in record]
    evaluations = [record for record in all_records if record.get("kind") == "evaluation"]
    assert [(r["step"], r["valid_loss"]) for r in evaluations] == [
        (r["step"], r["valid_loss"]) for r in records if "valid_loss" in r
    ]
    assert [record["step"] for record in records] == [1, 3, 5, 6, 9, 10]
    for record in records:
        evaluated = ["valid_loss"] if record["step"] in (5, 10) else []
        # The first step compiles: it has no speed.
        assert list(record) == [*(KEYS[:-1] if record["step"] == 1 else KEYS), *MEMORY, *evaluated, "crc32"]
        assert record["tokens"] == record["step"] * 4 * CONTEXT
        assert record["learning_rate"] == pytest.approx(scheduled(config.train, record["step"]))
        assert record.get("tokens_per_s", 1) > 0
        assert record["gradient_norm"] > 0
    walls = [record["wall_s"] for record in records]
    assert walls == sorted(walls)
    assert walls[0] > 0
    # train_loss is the mean over the steps since the last record.
    train(replace(config, train=replace(config.train, log_interval=1)), TRAIN, VALID, tmp_path / "each")
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "each" / "metrics.jsonl")]
    intervals = losses[:1], losses[1:3], losses[3:5], losses[5:6], losses[6:9], losses[9:]
    for record, interval in zip(records, intervals, strict=True):
        assert record["train_loss"] == pytest.approx(sum(interval) / len(interval), rel=1e-5)


def test_intervals_of_zero_mean_the_last_step_only(tmp_path):
    settings = dict.fromkeys(("log_interval", "eval_interval", "sample_interval", "checkpoint_interval"), 0)
    train(configuration(**settings), TRAIN, VALID, tmp_path / "run", tokenizer=NumberTokenizer(VOCAB))
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["step"] == 8
    assert "valid_loss" in record
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000008.safetensors"]
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("--- step 8 ---\n")


def test_every_evaluation_uses_the_same_batches(tmp_path):
    config = configuration(eval_interval=2, max_learning_rate=0.0, min_learning_rate=0.0)  # the weights stay
    run = train(config, TRAIN, VALID, tmp_path / "run")
    losses = [r["valid_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid_loss" in r]
    sampler = BatchSampler(VALID, 4, CONTEXT, seed=1)
    with torch.no_grad():
        expected = [
            torch.nn.functional.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten()).item()
            for inputs, targets in map(sampler.batch, range(2))
        ]
    assert losses == [pytest.approx(sum(expected) / 2, rel=1e-5)] * 4
    assert len(set(losses)) == 1


# --- The folder -----------------------------------------------------------------------------------------------


def test_a_run_writes_configuration_tokenizer_samples_and_its_last_two_checkpoints(tmp_path):
    config = configuration(sample_interval=4, sample_tokens=5, checkpoint_interval=3)
    run = train(config, TRAIN, VALID, tmp_path / "deep" / "run", tokenizer=NumberTokenizer(VOCAB))
    folder = tmp_path / "deep" / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoints", "checksums.json", "config.toml", "environment.json"),
        *("metrics.jsonl", "samples.txt", "tokenizer"),
    ]
    # The one of step 6 is saved later, or never, if the disk is so slow that the one of step 3 is still being written.
    before_last, last = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert before_last in [f"step_0000000{step}.safetensors" for step in (3, 6, 7)]
    assert last == "step_00000008.safetensors"
    assert load_config(folder / "config.toml", RunConfig) == config
    assert (folder / "tokenizer" / "vocab_size.txt").read_text() == str(VOCAB)
    samples = re.findall(r"--- step (\d+) ---\n(.*)\n\n", (folder / "samples.txt").read_text())
    assert [step for step, _ in samples] == ["4", "8"]
    assert all(len(text.split()) <= 5 for _, text in samples)
    assert (run.step, run.config, run.tokenizer_path) == (8, config, folder / "tokenizer")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, saved(folder, 8)["model." + name])


def test_an_existing_run_is_refused_and_unchanged_unless_overwrite_is_given(tmp_path):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run", tokenizer=NumberTokenizer(VOCAB))
    (tmp_path / "run" / "notes.txt").write_text("mine")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(FileExistsError, match=r"run already contains a run; choose another .*--resume .*--overwrite"):
        train(configuration(), TRAIN, VALID, tmp_path / "run")
    with pytest.raises(InvalidInputError, match="both resumed and overwritten"):
        train(configuration(), TRAIN, VALID, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(InvalidInputError, match="training tokens: the dataset has 8 tokens"):
        train(configuration(), TRAIN[:8], VALID, tmp_path / "run", overwrite=True)
    assert files() == before

    with pytest.warns(UserWarning, match="it is now set_aside_tokenizer"):  # it has no checksums, so it may be anything
        train(configuration(steps=3), TRAIN, VALID, tmp_path / "run", overwrite=True)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert sorted(str(path.relative_to(tmp_path / "run")) for path in files()) == [
        *("checkpoints/step_00000003.safetensors", "checksums.json", "config.toml"),
        *("environment.json", "metrics.jsonl", "notes.txt", "set_aside_tokenizer/vocab_size.txt"),
    ]


# --- Invalid arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"train_tokens": TRAIN[:8]},
            InvalidInputError,
            "training tokens: the dataset has 8 tokens, but context_length=8 needs at least 9",
        ),
        ({"valid_tokens": VALID[:0]}, InvalidInputError, "validation tokens: the dataset has 0 tokens"),
        (
            {"train_tokens": np.append(TRAIN, 20)},
            WrongTokenizerError,
            f"training tokens: token id 20 at position {len(TRAIN)} is not in the",
        ),
        ({"valid_tokens": np.append(-1, VALID)}, WrongTokenizerError, "validation tokens: token id -1 at position 0"),
        ({"train_tokens": TRAIN.astype(float)}, InvalidInputError, "train_tokens must be .* of integers, got float64"),
        (
            {"tokenizer": NumberTokenizer(21)},
            WrongTokenizerError,
            "the tokenizer's 21 ids do not fit into the model's vocab_size=20; set",
        ),
        (
            {"config": configuration(rows="documents")},
            InvalidConfigError,
            "needs a tokenizer .*'<|endoftext|>', got none",
        ),
        (
            {"config": configuration(rows="documents", end_of_text="<END>"), "tokenizer": NumberTokenizer(VOCAB)},
            InvalidConfigError,
            r"special token '<END>', got one with \['<\|endoftext\|>'\]",
        ),
        (
            {
                "config": configuration(rows="documents"),
                "tokenizer": NumberTokenizer(VOCAB),
                "valid_tokens": VALID[VALID != END],
            },
            InvalidInputError,
            "validation tokens: token 0, the separator, is not in the first",
        ),
        *(
            (
                {"config": configuration(device=name)},
                InvalidConfigError,
                rf"device '{name}' cannot be used here \(.*\); use cpu or auto",
            )
            for name in ("abacus", "cuda:77")
        ),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused_before_anything_is_written(tmp_path, changes, error, message):
    arguments: dict[str, Any] = {"config": configuration(), "train_tokens": TRAIN, "valid_tokens": VALID, **changes}
    with pytest.raises(error, match=message):
        train(**arguments, run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("steps", "batch_size", "sample_tokens")),
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("gradient_accumulation", "eval_batches")),
        *(({name: -1}, f"{name} must be at least 0, got -1") for name in ("warmup_steps", "log_interval", "seed")),
        *(({name: -1}, f"{name} must be at least 0, got -1") for name in ("eval_interval", "checkpoint_interval")),
        *(({name: -0.1}, f"{name} must be at least 0, got -0.1") for name in ("eps", "weight_decay")),
        ({"sample_interval": -1}, "sample_interval must be at least 0, got -1"),
        ({"embedding_rate_factor": -1.0}, "embedding_rate_factor must be at least 0, got -1.0"),
        ({"min_learning_rate": math.nan}, "min_learning_rate must be a finite number, got nan"),
        ({"max_learning_rate": 1e-4}, "max_learning_rate=0.0001 must be at least min_learning_rate=0.001"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"beta2": -0.5}, "beta2 must be at least 0 and below 1, got -0.5"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be above 0, got 0.0"),
        ({"decay_share": 1.5}, "decay_share must be from 0 to 1, got 1.5"),
        ({"warmup_share": 0.1}, "warmup_steps=3 and warmup_share=0.1 say the same; leave one out"),
        ({"gradient_accumulation": 3}, "batch_size=4 must be divisible by gradient_accumulation=3"),
        ({"rows": "lines"}, "rows must be one of windows, shuffled, documents, packed, got 'lines'"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16, fp8, got 'float16'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InvalidConfigError, match=re.escape(message)):
        configuration(**settings)
