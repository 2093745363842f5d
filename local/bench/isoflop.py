"""The best size for a compute: `python3 local/bench/isoflop.py runs/isoflop_small`, after the sweep isoflop.toml.

The sweep trains shapes at three fixed computes (floating-point operations of all steps, as
`basic.training.recipes.training_flops` counts them). For each compute, a parabola through the losses over the logarithm
of the parameters gives the best size; a line through those gives the exponent with which it grows. Prints a table and
writes isoflop.png beside the runs.

Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", section 3.2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from basic.training.recipes import flops_per_token, num_matrix_parameters
from basic.training.run_folder import load_run_config


class Point(NamedTuple):
    """A run."""

    compute: float
    parameters: int
    tokens: int
    loss: float


class Optimum(NamedTuple):
    """The best size for a compute; None where the lowest loss is that of the smallest or largest size."""

    compute: float
    parameters: float | None
    tokens: float | None


def read_points(folder: Path) -> dict[str, list[Point]]:
    """The finished runs of a sweep, by the compute in their names ("compute 3e11 depth 2"), small models first."""
    groups: dict[str, list[Point]] = {}
    for path in sorted(folder.glob("compute *depth */outcome.json")):
        config, outcome = load_run_config(path.parent), json.loads(path.read_text())
        if outcome["loss"] is not None:
            compute = flops_per_token(config.model) * outcome["tokens"]
            point = Point(compute, num_matrix_parameters(config.model), outcome["tokens"], outcome["loss"])
            groups.setdefault(path.parent.name.split()[1], []).append(point)
    return {name: sorted(points) for name, points in sorted(groups.items(), key=lambda group: float(group[0]))}


def best_size(points: list[Point]) -> Optimum:
    """The minimum of the parabola through the points around the lowest loss."""
    points = sorted(points, key=lambda point: point.parameters)
    lowest = min(range(len(points)), key=lambda index: points[index].loss)
    compute = float(np.mean([point.compute for point in points]))
    if lowest in (0, len(points) - 1):
        return Optimum(compute, None, None)
    near = points[lowest - 1 : lowest + 2]
    a, b, _ = np.polyfit(np.log([point.parameters for point in near]), [point.loss for point in near], 2)
    parameters = float(np.exp(-b / (2 * a)))
    # Tokens shrink with the size at a fixed compute, so they follow from the same point of the curve.
    tokens = np.interp(np.log(parameters), np.log([p.parameters for p in near]), np.log([p.tokens for p in near]))
    return Optimum(compute, parameters, float(np.exp(tokens)))


def draw(groups: dict[str, list[Point]], optima: list[Optimum], path: Path) -> None:
    from matplotlib import pyplot

    for name, points in groups.items():
        points = sorted(points, key=lambda point: point.parameters)
        pyplot.semilogx([p.parameters for p in points], [p.loss for p in points], "o-", label=f"{name} FLOPs")
    for optimum in optima:
        if optimum.parameters is not None:
            pyplot.axvline(optimum.parameters, color="gray", linewidth=0.8, linestyle=":")
    sizes = sorted({point.parameters for points in groups.values() for point in points})
    pyplot.xticks(sizes, [f"{size / 1e6:.2g}M" for size in sizes])
    pyplot.minorticks_off()  # their labels would overlap
    pyplot.xlabel("parameters that are multiplied with every token")
    pyplot.ylabel("loss (nats per token)")
    pyplot.legend()
    pyplot.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep's runs")
    folder = parser.parse_args().sweep
    groups = read_points(folder)
    if not groups:
        sys.exit(f"{folder} has no finished run of the sweep isoflop")
    optima = [best_size(points) for points in groups.values()]
    print("| compute (FLOPs) | parameters: loss | best size | tokens for each parameter |\n|---|---|--:|--:|")
    for (name, points), optimum in zip(groups.items(), optima, strict=True):
        losses = ", ".join(f"{p.parameters / 1e6:.3g}M: {p.loss:.3f}" for p in sorted(points, key=lambda p: p[1]))
        best = "outside", "–"
        if optimum.parameters is not None and optimum.tokens is not None:
            best = f"{optimum.parameters / 1e6:.3g}M", f"{optimum.tokens / optimum.parameters:.2g}"
        print(f"| {name} | {losses} | {' | '.join(best)} |")
    known = [(optimum.compute, optimum.parameters) for optimum in optima if optimum.parameters is not None]
    if len(known) > 1:
        exponent = np.polyfit(*np.log(np.array(known)).T, 1)[0]
        print(f"\nThe best size grows with the compute to the power of {exponent:.2f}.")
    draw(groups, optima, folder / "isoflop.png")
    print(f"wrote {folder / 'isoflop.png'}")


if __name__ == "__main__":
    main()
