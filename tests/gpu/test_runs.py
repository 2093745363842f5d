"""Runs on a GPU: resuming, saving in the background, and steps that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from basic.analysis.evaluation import evaluate_tokens
from basic.model import ModelConfig, TransformerLM
from basic.training.checkpoints.background import BackgroundSaver
from basic.training.checkpoints.file import read_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.loop import make_optimizer, train
from basic.training.records.metrics import read_metrics, read_records
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep

CUDA = torch.device("cuda")
VOCAB = 1000
TRAIN, VALID = (
    # A random walk over the ids, so that the model can learn something.
    (np.cumsum(np.random.default_rng(seed).integers(1, 4, size=200_000)) % VOCAB).astype(np.uint16)
    for seed in (0, 1)
)


def configuration(**settings: Any) -> RunConfig:
    model = ModelConfig(vocab_size=VOCAB, context_length=128, d_model=128, num_layers=2, num_heads=4)
    defaults: dict[str, Any] = {
        "steps": 20,
        "batch_size": 32,
        "warmup_steps": min(5, settings.get("steps", 20) - 1),
        "eval_batches": 2,
        "device": "cuda",
    }
    settings = {**defaults, "log_interval": 1, **settings}
    return RunConfig(model=model, train=TrainConfig(**settings))


def checkpoint(run_dir: Path, step: int) -> Mapping[str, torch.Tensor]:
    return read_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}.safetensors").tensors


def difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest relative difference (L2 norm) of any tensor."""
    assert first.keys() == second.keys()
    return max(
        ((first[name].double() - second[name].double()).norm() / second[name].double().norm().clamp(min=1e-12)).item()
        for name in first
    )


@pytest.mark.parametrize("settings", [{"compile": True}, {"gradient_accumulation": 4}], ids=str)
def test_a_resumed_run_differs_no_more_than_two_equal_runs(tmp_path, settings):
    config = configuration(checkpoint_interval=10, eval_interval=0, checkpoints_kept=9, **settings)
    first, second, resumed = (tmp_path / name for name in ("first", "second", "resumed"))
    train(config, TRAIN, VALID, first)
    train(config, TRAIN, VALID, second)
    (resumed / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", "environment.json", "checkpoints/step_00000010.safetensors"):
        (resumed / name).write_bytes((first / name).read_bytes())
    train(config, TRAIN, VALID, resumed, resume=True)
    expected, start = checkpoint(first, 20), checkpoint(first, 10)
    noise = difference(checkpoint(second, 20), expected)
    error = difference(checkpoint(resumed, 20), expected)
    change = difference(start, expected)
    print(f"two equal runs differ by {noise:.2e}, a resumed one by {error:.2e}; ten steps change {change:.2e}")
    assert change > 0.05
    # Even if equal runs are bitwise equal, a resumed run may round differently: its first steps use no CUDA graph.
    assert error <= max(3 * noise, 1e-3)


def test_a_checkpoint_has_the_state_of_its_step_while_training_continues(tmp_path):
    torch.manual_seed(0)
    model = TransformerLM(configuration().model).to(CUDA)
    model.activation_dtype = torch.bfloat16
    settings = configuration(max_learning_rate=1e-2).train
    optimizer = make_optimizer(model, settings)
    step = TrainStep(model, optimizer, settings, CUDA)
    generator = np.random.default_rng(0)

    def take_step() -> None:
        ids = torch.from_numpy(generator.integers(VOCAB, size=(32, 129)))
        step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), 1e-2)

    for _ in range(5):
        take_step()
    saved: list[int] = []
    with BackgroundSaver() as saver:
        for number in range(3):  # the second and third one reuse memory
            expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
            path = tmp_path / f"{number}.safetensors"
            saver.start(model, optimizer, number, path, extra={}, on_saved=lambda number=number: saved.append(number))
            for _ in range(20):
                take_step()
            saver.finish(wait=True)
            tensors = read_checkpoint(path).tensors
            for name, tensor in expected.items():
                assert torch.equal(tensors[f"model.{name}"], tensor.cpu()), name
                assert not torch.equal(model.state_dict()[name], tensor), name
            saved_moments = [tensor for name, tensor in tensors.items() if name.endswith("exp_avg")]
            assert sorted(x.double().sum().item() for x in saved_moments) == sorted(
                x.cpu().double().sum().item() for x in moments
            )
    assert saved == [0, 1, 2]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_run_stops_within_ten_steps_of_a_nonfinite_loss(tmp_path, cuda_graph):
    config = configuration(steps=60, checkpoint_interval=20, eval_interval=0, log_interval=0, cuda_graph=cuda_graph)
    calls = []

    class StepWithNan(TrainStep):
        def __call__(self, batch, learning_rate, *others, **options):
            calls.append(learning_rate)
            # The learning rate of step 21 is NaN, so the weights and the loss of step 22 are NaN.
            rate = float("nan") if len(calls) == 21 else learning_rate
            return super().__call__(batch, rate, *others, **options)

    with pytest.raises(FloatingPointError, match="step 22 gave the loss nan"):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=StepWithNan)
    assert 22 <= len(calls) <= 32
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")] == [22]
    newest = checkpoint_paths(tmp_path / "run")[-1]
    assert newest.name == "step_00000020.safetensors"
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(newest).tensors.values())


def test_losses_and_speed_are_logged(tmp_path):
    config = configuration(steps=30, log_interval=10, eval_interval=15, compile=False)
    run = train(config, TRAIN, VALID, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 10, 15, 20, 30]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert all(record["tokens_per_s"] > 0 for record in records[1:])
    assert run.model.token_embeddings.weight.device.type == "cuda"


def test_a_file_scores_the_same_on_every_device(tmp_path):
    run = train(configuration(steps=60, max_learning_rate=3e-3), TRAIN, VALID, tmp_path / "run")
    model, tokens = run.model, VALID[:5000]
    half = evaluate_tokens(model, tokens).loss
    model.activation_dtype = torch.float32
    full = evaluate_tokens(model, tokens).loss
    plain = evaluate_tokens(model.cpu(), tokens).loss
    print("nats per token: bfloat16", half, "float32 on the GPU", full, "on the CPU", plain)
    assert abs(full - plain) < 1e-4 * plain
    assert abs(half - plain) < 5e-3 * plain
