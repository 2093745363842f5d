"""Tiny runs by several processes, started with the environment variables of torchrun, but without torchrun.

`python -m tests.helpers.ranks_tools JOBS` is one of the processes. It runs one job after the other, together with the
other ranks. A job is a dictionary: "run" is the run folder; "from" is a folder whose checkpoint of step 10 is resumed
(default: none); "poisoned" are the steps in which the last rank's loss is NaN; with "other_weights", all ranks but the
first draw other weights; everything else are settings of `TrainConfig`. Each rank leaves the checksum of its weights in
the run folder.
"""

from __future__ import annotations

import hashlib
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

import torch

from basic.common import command_line
from basic.training.checkpoints.of_run import checkpoint_paths, open_checkpoint
from basic.training.loop import train
from basic.training.parallel.world import World, join_world
from basic.training.records.metrics import read_records
from basic.transformer.optimizer import local_shard
from tests.helpers.fault_tools import TRAIN, VALID, VOCAB, configuration, poisoned_step
from tests.helpers.number_tokenizer import NumberTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def environments(count: int) -> list[dict[str, str]]:
    """The variables of torchrun, for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # works even if the machine's own name cannot be resolved
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_processes(count: int, jobs: list[dict[str, Any]]) -> list[subprocess.Popen]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ranks_tools", json.dumps(jobs)],
            cwd=REPOSITORY,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments(count)
    ]


def signal_rank_1(
    processes: list[subprocess.Popen], run_dir: Path, number: int, *, checkpoints: int = 1, within_s: float = 120
) -> tuple[str, float]:
    """Wait until a run has so many checkpoints, at most `within_s`; then send a signal to the second of two processes.

    Returns:
        What the first process prints on stderr before it ends, and the seconds until then.
    """
    log, deadline_s = run_dir / "metrics.jsonl", time.monotonic() + within_s
    while not (log.exists() and log.read_text().count("checkpoint") >= checkpoints):
        assert processes[0].poll() is None, processes[0].communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    processes[1].send_signal(number)
    sent_s = time.monotonic()
    _, error = processes[0].communicate(timeout=60)
    return error, time.monotonic() - sent_s


def run_job(job: dict[str, Any], world: World) -> None:
    """Run a job: in this process with a world of one, otherwise on every rank."""
    settings = {**job}
    run_dir, source = Path(settings.pop("run")), settings.pop("from", "")
    poisoned, other_weights = settings.pop("poisoned", []), settings.pop("other_weights", False)

    def copy_run() -> None:
        (run_dir / "checkpoints").mkdir(parents=True)
        for name in ("config.toml", "environment.json", "metrics.jsonl"):
            shutil.copy(Path(source) / name, run_dir / name)
        for path in checkpoint_paths(Path(source)):
            if "00000010" in path.name:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, run_dir / "checkpoints" / path.name)

    if source:
        world.on_rank_0(copy_run)
    defaults = {"checkpoint_interval": 10, "checkpoints_kept": 9, "sample_interval": 20, "sample_tokens": 16}
    config = configuration(**{**defaults, **settings})

    def make_step(model: Any, *arguments: Any) -> Any:
        if other_weights and world.rank > 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
        is_last_rank = world.rank == world.size - 1
        return poisoned_step(poisoned if is_last_rank else [], math.nan)(model, *arguments)

    options: dict[str, Any] = {"tokenizer": NumberTokenizer(VOCAB), "resume": bool(source), "world": world}
    run = train(config, TRAIN, VALID, run_dir, make_step=make_step, **options)
    checksum = hashlib.sha256()
    for parameter in run.model.parameters():
        checksum.update(local_shard(parameter.detach()).cpu().numpy().tobytes())
    (run_dir / f"weights_{world.rank}").write_text(checksum.hexdigest())


def checksums(run_dir: Path, count: int) -> set[str]:
    """The different checksums of the weights of so many ranks."""
    return {(run_dir / f"weights_{rank}").read_text() for rank in range(count)}


def losses(run_dir: Path) -> list[float]:
    """All training losses of a run, and its last validation loss."""
    records = read_records(run_dir / "metrics.jsonl", None)
    train_losses = [record["train_loss"] for record in records if record["train_loss"] is not None]
    return [*train_losses, records[-1]["valid_loss"]]


def newest_state(run_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of a run's newest checkpoint, without its wall time."""
    checkpoint = open_checkpoint(checkpoint_paths(run_dir)[-1])
    document = {**checkpoint.document, "extra": {**checkpoint.document["extra"], "wall_s": None}}
    return document, dict(checkpoint.tensors)


def fp8_scales(run_dir: Path) -> dict[str, list[float]]:
    """Those of a run's newest checkpoint."""
    return open_checkpoint(checkpoint_paths(run_dir)[-1]).entry("extra")["fp8_scales"]


def main() -> None:
    with join_world(os.environ) as world:
        for job in json.loads(sys.argv[1]):
            run_job(job, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line.run(main)
