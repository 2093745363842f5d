"""Tiny runs by several processes, which are started here as torchrun starts them, but without its own process.

`python -m tests.helpers.ranks_tools JOBS` is one of the processes: it does one job after the other, as the
environment says together with others. A job is {"run": folder, "from": folder whose checkpoint of step 10 is resumed,
or "", "poisoned": steps in which the last process's loss shall be NaN, "other_weights": whether all but the first
process shall draw other ones, and settings of `TrainConfig`}.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from basic.common import command_line
from basic.training.loop import train
from basic.training.parallel.world import join
from basic.training.records.metrics import read_records
from basic.training.run_folder import checkpoint_paths, open_checkpoint
from tests.helpers.fault_tools import TRAIN, VALID, VOCAB, configuration, poison

REPOSITORY = Path(__file__).resolve().parents[2]


class Numbers:
    """A tokenizer whose texts are ids."""

    vocab_size = VOCAB
    special_token_ids = {"<|endoftext|>": 0}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [0] * text.count("<|endoftext|>")

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def save(self, directory) -> None:
        Path(directory).mkdir()


def start_processes(count: int, jobs: list[dict[str, Any]]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        place["GLOO_SOCKET_IFNAME"] = "lo"  # also where the machine's own name means nothing
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.ranks_tools", json.dumps(jobs)],
                cwd=REPOSITORY,
                env={**os.environ, **place, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def lose(
    processes: list[subprocess.Popen], run_dir: Path, lost_by: int, *, checkpoints: int = 1, within_s: float = 120
) -> tuple[str, float]:
    """Once a run has saved so often, which it must in this time, send the second of two processes a signal.

    Returns:
        What the first one says before it ends, and the seconds until it has.
    """
    log, until = run_dir / "metrics.jsonl", time.monotonic() + within_s
    while not (log.exists() and log.read_text().count("checkpoint") >= checkpoints):
        assert processes[0].poll() is None, processes[0].communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    processes[1].send_signal(lost_by)
    lost = time.monotonic()
    _, error = processes[0].communicate(timeout=60)
    return error, time.monotonic() - lost


def do(job: dict[str, Any], world) -> None:
    """Do a job; with a world of one in this process, otherwise in each of the processes."""
    settings = {**job}
    run_dir, source = Path(settings.pop("run")), settings.pop("from", "")
    poisoned, other_weights = settings.pop("poisoned", []), settings.pop("other_weights", False)

    def copy() -> None:
        (run_dir / "checkpoints").mkdir(parents=True)
        for name in ("config.toml", "environment.json", "metrics.jsonl"):
            shutil.copy(Path(source) / name, run_dir / name)
        for path in checkpoint_paths(Path(source)):
            if "00000010" in path.name:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, run_dir / "checkpoints" / path.name)

    if source:
        world.on_first(copy)
    usual = {"checkpoint_interval": 10, "checkpoints_kept": 9, "sample_interval": 20, "sample_tokens": 16}
    config = configuration(**{**usual, **settings})
    seed = torch.manual_seed
    with pytest.MonkeyPatch.context() as patch:
        if other_weights and world.rank > 0:
            patch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        if world.rank == world.size - 1:
            poison(patch, set(poisoned), math.nan)
        train(config, TRAIN, VALID, run_dir, tokenizer=Numbers(), resume=bool(source), world=world)


def losses(run_dir: Path) -> list[float]:
    records = read_records(run_dir / "metrics.jsonl", None)
    seen = [record["train_loss"] for record in records if record["train_loss"] is not None]
    return [*seen, records[-1]["valid_loss"]]


def state(run_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of a run's last checkpoint, without the time that it took."""
    checkpoint = open_checkpoint(checkpoint_paths(run_dir)[-1])
    document = {**checkpoint.document, "extra": {**checkpoint.document["extra"], "wall_s": None}}
    return document, dict(checkpoint.tensors)


def main() -> None:
    with join(os.environ) as world:
        for job in json.loads(sys.argv[1]):
            do(job, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line.run(main)
