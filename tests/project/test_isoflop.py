"""local/bench/isoflop.py finds the minimum of curves that are known."""

from __future__ import annotations

import json
import math
import sys

import pytest

from basic.common.config_files import save_config
from basic.model import ModelConfig
from basic.training.recipes import flops_per_token
from basic.training.settings import RunConfig, TrainConfig
from tests.helpers.bench_tools import bench_script


@pytest.fixture(scope="module")
def script():
    return bench_script("isoflop")


def points(script, best: float, compute: float):
    sizes = [best / 3, best * 0.8, best * 1.5, best * 5]
    return [script.Point(compute, round(n), round(compute / 6 / n), 2 + 0.1 * math.log(n / best) ** 2) for n in sizes]


def test_the_minimum_of_a_parabola_is_found(script):
    optimum = script.best_size(points(script, 1e6, 6e13))
    assert optimum.parameters == pytest.approx(1e6, rel=1e-3)
    assert optimum.tokens == pytest.approx(1e7, rel=1e-3)
    assert script.best_size(points(script, 1e6, 6e13)[:2]).parameters is None


def test_the_runs_of_a_sweep_become_a_table_and_a_picture(script, tmp_path, monkeypatch, capsys):
    for compute in (1e9, 1e10):
        for depth, loss in ((1, 3.1), (2, 3.0), (3, 3.2)):
            folder = tmp_path / f"compute {compute:.0e} depth {depth}"
            folder.mkdir()
            model = ModelConfig(vocab_size=50, context_length=8, d_model=8 * depth, num_layers=depth, num_heads=depth)
            save_config(RunConfig(model=model, train=TrainConfig(steps=1)), folder / "config.toml")
            tokens = round(compute / flops_per_token(model))
            (folder / "outcome.json").write_text(json.dumps({"loss": loss, "tokens": tokens}))
    monkeypatch.setattr(sys, "argv", ["isoflop.py", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out
    assert printed.count("outside") == 0
    assert "to the power of 0.00" in printed.replace("-0.00", "0.00")  # the best size was the same twice
    assert (tmp_path / "isoflop.png").stat().st_size > 1000
