"""A run is interrupted by a signal, its losses are not finite, or memory is full."""

import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basic.training.checkpoints.file import read_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.loop import train
from basic.training.records.metrics import read_metrics, read_records
from basic.training.step import TrainStep
from tests.helpers.fault_tools import TRAIN, VALID, checkpoint_names, configuration, poisoned_step

REPOSITORY = Path(__file__).resolve().parents[2]


# --- Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(tmp_path, number):
    class InterruptedStep(TrainStep):
        count = 0

        def __call__(self, batch, *scheduled, **options):
            InterruptedStep.count += 1
            if InterruptedStep.count == 3:
                signal.raise_signal(number)
            return super().__call__(batch, *scheduled, **options)

    before = signal.getsignal(number)
    config = configuration(steps=6, eval_interval=0)
    train(config, TRAIN, VALID, tmp_path / "uninterrupted")
    message = rf"after step 3 by {number.name}, .* --resume {re.escape(str(tmp_path / 'run'))}`$"
    with pytest.raises(KeyboardInterrupt, match=message):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=InterruptedStep)
    assert checkpoint_names(tmp_path / "run") == ["step_00000003.safetensors"]
    train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    expected, tensors = (
        read_checkpoint(checkpoint_paths(tmp_path / name)[-1]).tensors for name in ("uninterrupted", "run")
    )
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_stops_what_would_follow(tmp_path):
    class InterruptedStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            signal.raise_signal(signal.SIGTERM)
            return super().__call__(batch, *scheduled, **options)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 by SIGTERM, and saved; the run is finished"):
        train(
            configuration(steps=1, warmup_steps=0, eval_interval=0),
            TRAIN,
            VALID,
            tmp_path / "run",
            make_step=InterruptedStep,
        )
    assert checkpoint_names(tmp_path / "run") == ["step_00000001.safetensors"]


def test_an_error_after_a_signal_is_the_interruption_that_was_asked_for(tmp_path, capsys):
    """Ctrl-C also reaches a C++ compiler that torch.compile has started, which then fails."""

    class FailingStep(TrainStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.compiles = True

        def __call__(self, batch, *scheduled, **options):
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("C++ compile error")

    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT in step 1, which is not saved"):
        train(configuration(steps=2), TRAIN, VALID, tmp_path / "run", make_step=FailingStep)
    assert "compiling the model: the first step takes a minute or" in capsys.readouterr().err
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")


@pytest.mark.parametrize(("second", "same_request_s"), [("SIGTERM", 60), ("SIGINT", 0)])
def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_same_request(second, same_request_s):
    program = f"""
import signal
from basic.training.parallel import stop_signals
stop_signals._SAME_REQUEST_S = 60
with stop_signals.StopSignals() as stop:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # as uv sends it on
    assert stop.received is signal.SIGINT
    print("still running", flush=True)
    stop_signals._SAME_REQUEST_S = {same_request_s}
    signal.raise_signal(signal.{second})
    print("not ended")
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (128 + getattr(signal, second), "still running\n")
    assert "SIGINT: finishing this step and saving; once more to exit at once" in finished.stderr


# --- Losses that are not finite, and memory -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_step_stops_the_run_soon_and_nothing_is_saved(tmp_path, value):
    step = poisoned_step(range(7, 99), value)
    config = configuration(checkpoint_interval=6, log_interval=0, eval_interval=0, steps=60, seed=5)
    with pytest.raises(FloatingPointError, match=r"step 7 gave the loss (nan|inf) .* at the learning rate 0.00.*lower"):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=step)
    assert 7 <= step.count < 17
    assert checkpoint_names(tmp_path / "run") == ["step_00000006.safetensors"]
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")
    generator = np.random.default_rng([5, 6])
    assert record["row_starts"] == generator.integers(len(TRAIN) - 32, size=16).tolist()
    assert (record["step"], record["loss"]) == (7, str(value))


def test_nonfinite_steps_are_skipped_up_to_a_maximum(tmp_path, capsys):
    settings = {"steps": 12, "on_nonfinite": "skip", "max_nonfinite_steps": 2, "eval_interval": 0}
    states = []  # after each step

    class RecordingStep(poisoned_step({4, 5}, math.nan)):
        def __call__(self, batch, *scheduled, **options):
            result = super().__call__(batch, *scheduled, **options)
            weights = [parameter.detach().clone() for parameter in self.parameters]
            states.append(weights + [state["step"] for state in self.optimizer.state.values()])
            return result

    train(configuration(**settings), TRAIN, VALID, tmp_path / "run", make_step=RecordingStep)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(states[2], states[4], strict=True))
    assert not torch.equal(states[4][0], states[5][0])
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")] == [4, 5]
    assert all(math.isfinite(r["gradient_norm"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert "skipped, number 2 of at most 2" in capsys.readouterr().err
    assert read_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).entry("extra")["nonfinite_steps"] == 2
    longer = configuration(**{**settings, "steps": 16})
    options: dict[str, Any] = {"resume": True, "make_step": poisoned_step({1}, math.nan)}
    with pytest.raises(FloatingPointError, match=r"step 13 gave .* max_nonfinite_steps above 2"):
        train(longer, TRAIN, VALID, tmp_path / "run", **options)  # the count continues after a resume


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), None])
def test_out_of_memory_says_what_was_tried_and_what_to_lower(tmp_path, error):
    class FailingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            if error is not None:
                raise error
            return torch.empty(1 << 62, dtype=torch.uint8), torch.zeros(())

    expected = r"batch_size = 16, gradient_accumulation = 1, context_length = 32; try gradient_accumulation = 2 for"
    with pytest.raises(MemoryError, match=expected):
        train(configuration(), TRAIN, VALID, tmp_path / "run", make_step=FailingStep)
