"""Runs of two processes with a GPU each beside those of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from basic.distributed import ALONE
from basic.runs import checkpoint_paths

from ..ranks_tools import do, losses, start_processes


def test_two_gpus_do_what_one_does(tmp_path):
    """Recorded and not, in both precisions, with checkpoints that move between the two forms."""
    exact = {"device": "auto", "precision": "float32"}
    narrow = {"device": "auto", "precision": "bfloat16", "compile": True}
    parts = {"cuda_graph": False, "gradient_accumulation": 2}
    jobs = {
        "replicated": exact,
        "eager": {**exact, **parts},
        "sharded": {**exact, **parts, "parallel": "sharded"},
        "narrow": narrow,
        "narrow_sharded": {**narrow, "parallel": "sharded"},
        "from_sharded": {**exact, "from": str(tmp_path / "sharded")},
        "from_replicated": {**exact, "from": str(tmp_path / "replicated"), "parallel": "sharded"},
    }
    processes = start_processes(2, [{"run": str(tmp_path / name), **job} for name, job in jobs.items()])
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    do({"run": tmp_path / "one", **exact}, ALONE)
    do({"run": tmp_path / "narrow_one", **narrow}, ALONE)
    for name in jobs:
        one, tolerance = ("narrow_one", 2e-2) if name.startswith("narrow") else ("one", 1e-3)
        difference = np.abs(np.subtract(losses(tmp_path / name), losses(tmp_path / one))).max()
        print(f"{name}: losses differ by at most {difference:.1e}")
        assert difference < tolerance, name
    assert checkpoint_paths(tmp_path / "narrow_sharded")[-1].is_dir()
