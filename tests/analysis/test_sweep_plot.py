"""The picture of final losses: what is on which axis, and that failed runs are marked."""

from __future__ import annotations

from typing import Any

import pytest

from basic.analysis import sweep_plot
from basic.analysis.sweep import RunResult, SweepRun
from basic.model import ModelConfig
from basic.training.settings import RunConfig, TrainConfig


def sweep(names: dict[str, dict[str, Any]]) -> list[SweepRun]:
    model = ModelConfig(vocab_size=20, context_length=8, d_model=16, num_layers=1, num_heads=2)
    return [
        SweepRun(name, RunConfig(model=model, train=TrainConfig(steps=9, min_learning_rate=0.0, **settings)))
        for name, settings in names.items()
    ]


def result(name: str, loss: float | None, remark: str = "") -> RunResult:
    return RunResult(name=name, loss=loss, tokens=1, wall_s=1.0, remark=remark)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a sweep, and returns its axes."""
    figures: list[Any] = []
    save = sweep_plot.save_figure
    monkeypatch.setattr(sweep_plot, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))

    def draw(runs: list[SweepRun], results: list[RunResult]) -> Any:
        sweep_plot.plot_final_losses(runs, results, tmp_path / "final_loss.png")
        assert (tmp_path / "final_loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes[0]

    return draw


def test_losses_are_over_the_learning_rate_with_a_cross_for_what_diverged(drawn):
    rates, batches = (0.001, 0.01, 0.1), (2, 4)
    runs = sweep(
        {
            f"batch_size={batch},max_learning_rate={rate:g}": {"batch_size": batch, "max_learning_rate": rate}
            for batch in batches
            for rate in rates
        }
    )
    losses = [3.0, 2.0, None, 2.5, 2.2, 9.0]
    remarks = ["", "", "diverged: nan", "", "", "worse than knowing nothing"]
    axes = drawn(
        runs, [result(run.name, loss, remark) for run, loss, remark in zip(runs, losses, remarks, strict=True)]
    )
    assert axes.get_xlabel() == "max learning rate"
    assert axes.get_xscale() == "log"
    lines = {
        line.get_label(): [point.tolist() for point in line.get_data()] for line in axes.lines if line.get_xdata().size
    }
    assert lines["batch_size=2"] == [[0.001, 0.01], [3.0, 2.0]]
    assert lines["batch_size=4"] == [[0.001, 0.01], [2.5, 2.2]]
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[0.1], [0.1]]
    assert all(line.get_ydata()[0] > 3 for line in crosses)
    assert "diverged" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_where_no_number_changes_runs_are_bars(drawn):
    runs = sweep({"baseline": {}, "no warmup": {"warmup_steps": 0}})
    axes = drawn(runs, [result("baseline", 2.0), result("no warmup", None, "diverged: nan")])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "no warmup"]
    assert [bar.get_width() for bar in axes.patches] == [2.0, axes.get_xlim()[0]]
    assert [text.get_text() for text in axes.texts] == ["2.000", "diverged"]
