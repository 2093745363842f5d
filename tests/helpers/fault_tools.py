"""A tiny run, and the faults that tests inject into it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: here once for all forks

from basic.common.errors import DamagedFileError
from basic.model import ModelConfig
from basic.training.checkpoints.file import read_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.loop import train
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep
from tests.helpers.forks import exit_status, run_in_fork

VOCAB = 40
TRAIN, VALID = (np.random.default_rng(seed).integers(VOCAB, size=2000).astype(np.uint16) for seed in (0, 1))


def configuration(**settings: Any) -> RunConfig:
    """Two layers, and a batch large enough that two threads share the embedding's gradient."""
    model = ModelConfig(vocab_size=VOCAB, context_length=32, d_model=32, num_layers=2, num_heads=2)
    defaults: dict[str, Any] = {"steps": 20, "batch_size": 16, "warmup_steps": 1, "eval_batches": 1, "device": "cpu"}
    settings = {**defaults, "log_interval": 1, **settings}
    return RunConfig(model=model, train=TrainConfig(**settings))


def checkpoint_names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint_paths(run_dir)]


def last_logged_checkpoint(run_dir: Path) -> int:
    """The last step whose checkpoint is on the disk according to the log."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    steps = [0]
    for line in lines:
        if '"checkpoint"' in line and line.endswith("}"):
            steps.append(json.loads(line)["step"])
    return max(steps)


def kill_at_random_times(run_dir: Path, kills: int, seed: int, max_delay_s: float = 0.3) -> dict[str, int]:
    """Start a run, kill it with SIGKILL at random times, and resume it every time.

    Returns:
        The number of kills, after how many of them the newest checkpoint was a later one, the number of incomplete
        checkpoints, and the step of the newest checkpoint.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    config = configuration(steps=1_000_000, checkpoint_interval=2, log_interval=1, eval_interval=7)
    delays, incomplete, newest_step, progressed = random.Random(seed), 0, 0, 0
    for kill in range(kills):
        resume = (run_dir / "config.toml").exists()
        logged = last_logged_checkpoint(run_dir)
        child = run_in_fork(_train_silently, config, run_dir, resume)
        if kill % 4:  # kill most runs while they train, also on a slow machine; the others while they start
            while last_logged_checkpoint(run_dir) <= logged:
                time.sleep(0.01)
        time.sleep(delays.uniform(0, max_delay_s))
        os.kill(child, signal.SIGKILL)
        status = exit_status(child)
        assert status == -signal.SIGKILL, f"it ended by itself with status {status}"
        complete_steps = [0]
        for path in checkpoint_paths(run_dir):
            try:
                complete_steps.append(read_checkpoint(path).entry("iteration"))
            except DamagedFileError:
                incomplete += 1
        assert max(complete_steps) >= max(logged, last_logged_checkpoint(run_dir)), "a logged checkpoint is missing"
        progressed += max(complete_steps) > newest_step
        newest_step = max(complete_steps)
    return {"kills": kills, "progressed": progressed, "incomplete": incomplete, "step": newest_step}


def _train_silently(config: RunConfig, run_dir: Path, resume: bool) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    train(config, TRAIN, VALID, run_dir, resume=resume)


def poisoned_step(poisoned: Collection[int], value: float) -> Any:
    """A subclass of `TrainStep` whose loss is multiplied by `value` (NaN, infinity) in some steps, counted from 1.

    The attribute `count` of the class is the number of steps taken.
    """

    class PoisonedStep(TrainStep):
        count = 0

        def _step(self, batch):
            PoisonedStep.count += 1
            loss_fn = self.loss_fn
            if PoisonedStep.count in poisoned:
                self.loss_fn = lambda *batch: loss_fn(*batch) * value
            try:
                return super()._step(batch)
            finally:
                self.loss_fn = loss_fn

    return PoisonedStep
