"""A tiny run for tests that do to it what happens to real ones, also in processes of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: once for all forks

from basic.model import ModelConfig
from basic.training.checkpoints.file import read_checkpoint
from basic.training.loop import train
from basic.training.run_folder import checkpoint_paths
from basic.training.settings import RunConfig, TrainConfig
from basic.training.step import TrainStep

VOCAB = 40
TRAIN, VALID = (np.random.default_rng(seed).integers(VOCAB, size=2000).astype(np.uint16) for seed in (0, 1))


def configuration(**settings: Any) -> RunConfig:
    """Two layers, and a batch large enough that two threads share the embedding's gradient."""
    model = ModelConfig(vocab_size=VOCAB, context_length=32, d_model=32, num_layers=2, num_heads=2)
    defaults: dict[str, Any] = {"steps": 20, "batch_size": 16, "warmup_steps": 5, "eval_batches": 1, "device": "cpu"}
    settings = {**defaults, "log_interval": 1, **settings}
    return RunConfig(model=model, train=TrainConfig(**settings))


def in_a_process(function: Any, *arguments: Any) -> int:
    """Call a function in a fork of this process, which has everything imported; return the fork's id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def acknowledged(run_dir: Path) -> int:
    """The last step of which the log says that its checkpoint is safe."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    steps = [0]
    for line in lines:
        if '"checkpoint"' in line and line.endswith("}"):
            steps.append(json.loads(line)["step"])
    return max(steps)


def kill_at_random_moments(run_dir: Path, kills: int, seed: int, longest_s: float = 0.3) -> dict[str, int]:
    """Start a run, kill it with SIGKILL at random moments, and go on with it every time.

    Returns:
        The number of kills, how often the run had come further in between, the checkpoints found invalid, and the step
        that was reached.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    config = configuration(steps=1_000_000, checkpoint_interval=2, log_interval=1, eval_interval=7)
    moments, invalid, done, further = random.Random(seed), 0, 0, 0
    for kill in range(kills):
        resume = (run_dir / "config.toml").exists()
        safe = acknowledged(run_dir)
        child = in_a_process(_train_quietly, config, run_dir, resume)
        if kill % 4:  # on a busy machine too, most kills shall find it at work; the others find it starting
            while acknowledged(run_dir) <= safe:
                time.sleep(0.01)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        status = status_of(child)
        assert status == -signal.SIGKILL, f"it ended by itself with status {status}"
        paths = checkpoint_paths(run_dir)
        whole = []
        for path in paths:
            try:
                whole.append(read_checkpoint(path).part("iteration"))
            except ValueError:
                invalid += 1
        assert max(whole, default=0) >= max(safe, acknowledged(run_dir)), "a checkpoint that was acknowledged is gone"
        further += max(whole, default=0) > done
        done = max(whole, default=0)
    return {"kills": kills, "further": further, "invalid": invalid, "step": done}


def _train_quietly(config: RunConfig, run_dir: Path, resume: bool) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    train(config, TRAIN, VALID, run_dir, resume=resume)


def poison(monkeypatch, bad: set[int], value: float) -> list[int]:
    """Let the loss of some steps be `value`, as the batch or the weights might make it."""
    real, steps = TrainStep._step, []

    def take_step(step, batch):
        steps.append(len(steps) + 1)
        loss_of = step.loss_of
        if steps[-1] in bad:
            step.loss_of = lambda *batch: loss_of(*batch) * value
        try:
            return real(step, batch)
        finally:
            step.loss_of = loss_of

    monkeypatch.setattr(TrainStep, "_step", take_step)
    return steps
