"""Pictures of runs: that they are pictures, and that what shall be in them can be seen."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from basic.plotting import plot_losses


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
    """How many pixels of a picture have this colour exactly."""
    return int((np.abs(imread(path)[..., :3] - to_rgb(color)).max(-1) < 1 / 255).sum())


def test_each_run_has_its_colour_in_a_png(tmp_path):
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


def test_the_floor_is_a_line_through_both_losses(tmp_path):
    plain, floored = tmp_path / "plain.png", tmp_path / "floored.png"
    plot_losses({"run": records(3.0)}, plain)
    plot_losses({"run": records(3.0)}, floored, floor_nats=0.6)
    # Rows of pixels with much black or dark grey: the lower axes of both rows of panels, and the floor.
    without, with_floor = (int(((imread(path)[..., :3].max(-1) < 0.7).sum(1) > 300).sum()) for path in (plain, floored))
    assert without >= 2
    assert with_floor > without


def test_a_single_record_and_one_without_validation_can_be_seen(tmp_path):
    plot_losses({"run": records(3.0, num_records=1)}, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", "C0") > 20


def test_the_ending_says_the_format(tmp_path):
    plot_losses({"run": records(3.0)}, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_bytes().startswith(b"<?xml")


def test_no_records_and_unknown_formats_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the run empty has no metrics yet"):
        plot_losses({"run": records(3.0), "empty": []}, tmp_path / "loss.png")
    with pytest.raises(ValueError, match=r"'text' is not supported \(supported formats: .*png"):
        plot_losses({"run": records(3.0)}, tmp_path / "loss.text")
    assert list(tmp_path.iterdir()) == []
