"""Runs of two processes with one GPU each equal runs of one process."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.parallel.world import SINGLE_PROCESS
from tests.helpers.ranks_tools import checksums, fp8_scales, losses, run_job, signal_rank_1, start_processes


def run_on_two_gpus(folder: Path, jobs: dict[str, dict[str, Any]]) -> str:
    """Run the jobs one after the other, each in the folder of its name; return what rank 0 prints."""
    processes = start_processes(2, [{"run": str(folder / name), **job} for name, job in jobs.items()])
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0][1]


def test_two_gpus_train_as_one_does(tmp_path):
    """With and without CUDA graphs, in both precisions, and with checkpoints that one form loads from the other."""
    exact = {"device": "auto", "precision": "float32"}
    narrow = {"device": "auto", "precision": "bfloat16", "compile": True}
    eager = {"cuda_graph": False, "gradient_accumulation": 2}
    jobs = {
        "replicated": exact,
        "eager": {**exact, **eager},
        "sharded": {**exact, **eager, "parallel": "sharded"},
        "narrow": narrow,
        "narrow_sharded": {**narrow, "parallel": "sharded"},
        "from_sharded": {**exact, "from": str(tmp_path / "sharded")},
        "from_replicated": {**exact, "from": str(tmp_path / "replicated"), "parallel": "sharded"},
    }
    run_on_two_gpus(tmp_path, jobs)
    run_job({"run": tmp_path / "one", **exact}, SINGLE_PROCESS)
    run_job({"run": tmp_path / "narrow_one", **narrow}, SINGLE_PROCESS)
    for name in jobs:
        one, tolerance = ("narrow_one", 2e-2) if name.startswith("narrow") else ("one", 1e-3)
        difference = np.abs(np.subtract(losses(tmp_path / name), losses(tmp_path / one))).max()
        print(f"{name}: losses differ by at most {difference:.1e}")
        assert difference < tolerance, name
    assert checkpoint_paths(tmp_path / "narrow_sharded")[-1].is_dir()


def test_two_gpus_share_the_work_of_muon(tmp_path):
    muon = {"device": "auto", "precision": "bfloat16", "optimizer": "muon", "max_learning_rate": 0.02}
    jobs = {"replicated": muon, "sharded": {**muon, "parallel": "sharded"}}
    jobs["from_sharded"] = {**jobs["sharded"], "from": str(tmp_path / "sharded")}
    run_on_two_gpus(tmp_path, jobs)
    run_job({"run": tmp_path / "one", **muon}, SINGLE_PROCESS)
    for name in jobs:
        difference = np.abs(np.subtract(losses(tmp_path / name), losses(tmp_path / "one"))).max()
        print(f"{name}: losses differ by at most {difference:.1e}")
        assert difference < 3e-2, name


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 9), reason="needs GPUs that multiply in 8 bits")
def test_two_gpus_train_in_fp8_as_one_does(tmp_path):
    """Compiled in CUDA graphs, resumed with the same weights bit for bit, and with a NaN on one rank only."""
    graphs: dict[str, Any] = {"device": "auto", "precision": "fp8", "compile": True, "sample_interval": 0}
    eager = {**graphs, "compile": False, "cuda_graph": False, "gradient_accumulation": 2}
    bad = {**eager, "gradient_accumulation": 1, "steps": 6, "poisoned": [3], "on_nonfinite": "skip"}
    jobs = {"graphs": graphs, "resumed": {**graphs, "from": str(tmp_path / "graphs")}, "eager": eager, "bad": bad}
    printed = run_on_two_gpus(tmp_path, jobs)
    run_job({"run": tmp_path / "one", **graphs, "compile": False}, SINGLE_PROCESS)
    for name in jobs:
        assert len(checksums(tmp_path / name, 2)) == 1, name
    for name in ("graphs", "resumed", "eager"):
        difference = np.abs(np.subtract(losses(tmp_path / name), losses(tmp_path / "one"))).max()
        print(f"{name}: losses differ by at most {difference:.1e}")
        assert difference < 3e-2, name
    print(fp8_scales(tmp_path / "graphs"), fp8_scales(tmp_path / "one"))
    assert fp8_scales(tmp_path / "graphs") == fp8_scales(tmp_path / "resumed")
    assert checksums(tmp_path / "graphs", 2) == checksums(tmp_path / "resumed", 2)
    assert re.search(r"step 3 gave the loss nan.* in fp8, .*\(gradient\) was not finite in 1 steps", printed), printed


@pytest.mark.parametrize("lost_by", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_a_lost_process_ends_the_job(tmp_path, lost_by, parallel):
    """Although the other one waits for it on the GPU, where a collective has no timeout."""
    run_dir = tmp_path / "run"
    settings = {"device": "auto", "precision": "bfloat16", "compile": True, "parallel": parallel, "sample_interval": 0}
    processes = start_processes(2, [{"run": str(run_dir), "steps": 10**6, **settings}])
    try:
        error, seconds = signal_rank_1(processes, run_dir, lost_by, checkpoints=3, within_s=200)
    finally:
        for process in processes:
            process.kill()
    print(f"{lost_by.name}, {parallel}: the job ended {seconds:.0f} s later: {error.splitlines()[-1]}")
    assert processes[0].returncode == 1
    assert re.search(rf"rank 0 .*rank 1 \(process {processes[1].pid} on .*\) ", error), error
