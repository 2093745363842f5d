"""Plots of runs: file formats, and that curves, floor, labels and missing values appear."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from basic.analysis.plotting import plot_losses, run_labels
from basic.common.errors import InvalidInputError


def records(scale: float, num_records: int = 8) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * i,
            "tokens": 640 * i,
            "wall_s": 0.5 * i,
            "train_loss": scale / i + 0.7,
            "learning_rate": 1e-3 / i,
            "gradient_norm": 2 / i,
            "tokens_per_s": 1280.0,
            **({"valid_loss": scale / i + 0.75} if i % 2 == 0 else {}),
        }
        for i in range(1, num_records + 1)
    ]


def pixels(path, color: str) -> int:
    """Count the pixels of exactly this color."""
    return int((np.abs(imread(path)[..., :3] - to_rgb(color)).max(-1) < 1 / 255).sum())


def test_each_run_has_its_own_color_in_a_png(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_losses({"first": records(3.0)}, one)
    plot_losses({"first": records(3.0), "second": records(2.0)}, two)
    for path in (one, two):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert imread(path).shape[0] > 600
        assert imread(path).shape[1] > 900
    assert pixels(one, "C0") > 500
    assert pixels(one, "C1") == 0
    assert pixels(two, "C0") > 500
    assert pixels(two, "C1") > 500


def test_floor_is_a_horizontal_line(tmp_path):
    plain, floored = tmp_path / "plain.png", tmp_path / "floored.png"
    plot_losses({"run": records(3.0)}, plain)
    plot_losses({"run": records(3.0)}, floored, floor_nats=0.6)
    # Count pixel rows with a long dark line: the x-axes of both rows of panels, and the floor.
    without, with_floor = (int(((imread(path)[..., :3].max(-1) < 0.7).sum(1) > 300).sum()) for path in (plain, floored))
    assert without >= 2
    assert with_floor > without


def test_single_record_without_validation_is_visible(tmp_path):
    plot_losses({"run": records(3.0, num_records=1)}, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", "C0") > 20


def test_all_panels_are_labeled_and_null_values_are_skipped(tmp_path):
    with_nulls: list[dict] = [dict(record) for record in records(3.0)]
    with_nulls[2] |= {"train_loss": None, "gradient_norm": None}
    with_nulls[7] |= {"valid_loss": None}
    plot_losses({"run": with_nulls}, tmp_path / "loss.svg")
    labels = svg_texts(tmp_path / "loss.svg")
    assert "run: validation loss 1.250" in labels
    for name in (
        "step",
        "tokens",
        "wall time (s)",
        "learning rate",
        "gradient norm before clipping",
        "tokens per second",
    ):
        assert name in labels


def svg_texts(path: Path) -> list[str]:
    """Return the texts of an SVG: matplotlib draws them as outlines and writes each in a comment."""
    return re.findall(r"<!-- (.*) -->", path.read_text())


def test_suffix_selects_the_format(tmp_path):
    plot_losses({"run": records(3.0)}, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_bytes().startswith(b"<?xml")


def test_run_without_records_and_unknown_format_are_errors(tmp_path):
    with pytest.raises(InvalidInputError, match="the run empty has no metrics yet"):
        plot_losses({"run": records(3.0), "empty": []}, tmp_path / "loss.png")
    with pytest.raises(InvalidInputError, match=r"'text' is not supported \(supported formats: .*png"):
        plot_losses({"run": records(3.0)}, tmp_path / "loss.text")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_replaces_no_file_of_others(tmp_path):
    path = tmp_path / "loss.svg"
    path.write_text("a drawing of mine")
    with pytest.raises(FileExistsError, match=r"exists and is not a picture that this library wrote"):
        plot_losses({"run": records(3.0)}, path)
    assert path.read_text() == "a drawing of mine"
    path.unlink()
    for scale in (3.0, 2.0):
        before = path.read_bytes() if path.exists() else b""
        plot_losses({"run": records(scale)}, path)
        assert path.read_bytes() != before


# --- Labels ---------------------------------------------------------------------------------------------------

BASE = {"model": {"d_model": 64}, "train": {"max_learning_rate": 1e-3, "seed": 0, "compile": False}}


def changed(**values) -> dict:
    return BASE | {"train": BASE["train"] | values}


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([BASE], ["runs/0"]),
        ([BASE, BASE], ["runs/0", "runs/1"]),
        ([BASE, changed(max_learning_rate=0.02)], ["max_learning_rate=0.001", "max_learning_rate=0.02"]),
        ([BASE, changed(seed=3, compile=True)], ["seed=0, compile=False", "seed=3, compile=True"]),
        ([changed(d_ff=256), BASE], ["d_ff=256", "d_ff=None"]),
        # Two of three runs have the same settings.
        ([BASE, changed(seed=1), BASE], ["seed=0 (runs/0)", "seed=1", "seed=0 (runs/2)"]),
        ([BASE, changed(seed=1, compile=True, a=1, b=1)], ["runs/0", "runs/1"]),
        # Different values that print the same.
        ([changed(eps=0.1), changed(eps=0.1 + 1e-12)], ["eps=0.1 (runs/0)", "eps=0.1 (runs/1)"]),
    ],
)
def test_labels_are_the_settings_that_differ(configs, labels):
    assert run_labels({f"runs/{number}": config for number, config in enumerate(configs)}) == labels
