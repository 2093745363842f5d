"""Many runs that differ in a few settings: planned in a TOML file, trained one after the other, compared in a table.

    config = "../configs/tinystories.toml"         # what all runs have in common; relative to this file
    [settings]                                     # ... and what they change of it
    train.min_learning_rate = 0.0
    [grid]                                         # one run for each combination of these values
    train.max_learning_rate = [1e-3, 1e-2]
    [[variants]]                                   # if there are any, each combination once with each of them
    name = "post-norm"
    model.norm = "post"
    [small]                                        # the same keys again: what takes their place in a small edition
    config = "../configs/small.toml"

runs/SWEEP/NAME/               a run as `basic.training.run_folder` describes it, and when it has ended, outcome.json
           table.md, loss.png
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from basic.analysis.evaluation import evaluate_tokens
from basic.common.config_files import from_table, load_config, to_table
from basic.common.files import atomic_write
from basic.generation.text import SavableTokenizer
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import checkpoint_paths
from basic.training.settings import DataConfig, RunConfig

_KEYS = ("config", "settings", "grid", "variants")


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """What sets it apart, and the name of its folder."""
    config: RunConfig


class Data(NamedTuple):
    """What a run learns from and is measured on."""

    train_tokens: np.ndarray
    valid_tokens: np.ndarray
    tokenizer: SavableTokenizer | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    name: str
    loss: float | None
    """Nats a token over the whole validation file, as `evaluate_tokens` gives them; None if the run failed."""
    tokens: int
    """Read in training."""
    wall_s: float
    remark: str = ""
    """Why it failed, or what else is to be known."""


def read_sweep(path: str | os.PathLike, *, small: bool = False) -> list[PlannedRun]:
    """The runs that a sweep's file asks for.

    Args:
        small: take its [small] edition.

    Raises:
        FileNotFoundError: no such file, or not the configuration that it names.
        ValueError: not a sweep, or one of its runs has an unknown key or a value out of its range.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        edition = table.pop("small", {})
        if small and not edition:
            raise ValueError("there is no [small] edition here; leave --small out")
        for key in (*table, *edition):
            if key not in _KEYS:
                raise ValueError(f"unknown key {key!r}; the keys here are {', '.join(_KEYS)}, small")
        if small:
            table |= edition
        if "config" not in table:
            raise ValueError("the key 'config' is missing: the configuration file that all runs have in common")
        common = tomllib.loads((path.parent / table["config"]).read_text(encoding="utf-8"))
        settings = {**_flat(common), **_flat(table.get("settings", {}))}
        return _plan(settings, _flat(table.get("grid", {})), table.get("variants", [{}]))
    except ValueError as error:  # tomllib's own error is one too
        raise ValueError(f"{path}: {error}") from error


def run_sweep(
    runs: Sequence[PlannedRun],
    folder: str | os.PathLike,
    open_data: Callable[[DataConfig], Data],
    *,
    report: Callable[[str], None] = print,
    progress: bool = False,
) -> list[Outcome]:
    """Train all runs that have not ended yet; those that were interrupted go on from their newest checkpoint.

    A run that diverges, or for which the memory does not suffice, has an outcome too, and the next one begins.

    Args:
        folder: has a folder for each run, and table.md after each of them; is made.
        open_data: the data of a run; called once for several in a row that share it.
        report: told how each run ended.
        progress: show a live line for each run.

    Raises:
        ValueError: a run's folder holds one with another configuration; or as for `train`.
        KeyboardInterrupt: a signal came, and the current run has been saved.
    """
    folder, outcomes = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        _check_unchanged(folder / run.name, run.config)
    opened: tuple[DataConfig, Data] | None = None
    for number, run in enumerate(runs, 1):
        outcome, known = _read_outcome(folder / run.name), " (known)"
        if outcome is None:
            if opened is None or opened[0] != run.config.data:
                opened = run.config.data, open_data(run.config.data)
            outcome, known = _train(run, folder / run.name, opened[1], progress), ""
        loss = "failed" if outcome.loss is None else f"{outcome.loss:.4f}"
        report(f"{number}/{len(runs)} {run.name}: {loss}{known}" + f"; {outcome.remark}" * bool(outcome.remark))
        outcomes.append(outcome)
        with atomic_write(folder / "table.md") as file:
            file.write(outcome_table(outcomes).encode())
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, the lowest loss in bold."""
    best = min((outcome.loss for outcome in outcomes if outcome.loss is not None), default=None)
    lines = ["| run | loss (nats a token) | perplexity | tokens | wall time | remark |", "|---|--:|--:|--:|--:|---|"]
    for outcome in outcomes:
        loss = perplexity = "–"
        if outcome.loss is not None:
            bold = "**" * (outcome.loss == best)
            loss = f"{bold}{outcome.loss:.3f}{bold}"
            perplexity = f"{math.exp(min(outcome.loss, 700)):.4g}"
        row = (outcome.name, loss, perplexity, f"{outcome.tokens:,}", f"{outcome.wall_s:.0f} s", outcome.remark)
        lines.append(f"| {' | '.join(row)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def plot_sweep(runs: Sequence[PlannedRun], folder: str | os.PathLike) -> Path | None:
    """Draw the curves of all runs that left any into loss.png; None where there is none."""
    from basic.analysis.plotting import plot_losses

    records = {run.name: _records(Path(folder) / run.name) for run in runs}
    records = {name: of_run for name, of_run in records.items() if of_run}
    if not records:
        return None
    picture = Path(folder) / "loss.png"
    plot_losses(records, picture)
    return picture


def _plan(
    settings: Mapping[str, Any], grid: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]
) -> list[PlannedRun]:
    """A run for each variant and each combination of the grid's values."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{key} must be a list of values to try, got {values!r}")
    runs: dict[str, PlannedRun] = {}
    for variant in variants:
        changes = {key: value for key, value in _flat(variant).items() if key != "name"}
        named = [variant["name"]] if "name" in variant else [_setting(*change) for change in changes.items()]
        axes = {
            key: values for key, values in grid.items() if key not in changes
        }  # what a variant says itself goes first
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = ",".join(named + [_setting(*each) for each in point.items()]) or "only"
            if name in runs or "/" in name or name.startswith("."):
                raise ValueError(
                    f"two runs, or none that can have a folder, would be called {name!r}; change the names"
                )
            runs[name] = PlannedRun(name, from_table(RunConfig, _nested({**settings, **changes, **point})))
    return list(runs.values())


def _train(run: PlannedRun, run_dir: Path, data: Data, progress: bool) -> Outcome:
    """Train and measure a run, and leave its outcome in its folder."""
    resume = bool(checkpoint_paths(run_dir))
    loss, remark = None, ""
    try:
        model = train(
            run.config,
            data.train_tokens,
            data.valid_tokens,
            run_dir,
            tokenizer=data.tokenizer,
            resume=resume,
            overwrite=not resume,
            progress=progress,
        ).model
        specials = {} if data.tokenizer is None else data.tokenizer.special_token_ids
        prefix_token_id = specials.get(run.config.train.end_of_text)
        loss = evaluate_tokens(model, data.valid_tokens, prefix_token_id=prefix_token_id).loss
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        if loss > math.log(run.config.model.vocab_size):
            remark = "worse than knowing nothing"
    except (FloatingPointError, MemoryError) as error:
        kind = "out of memory" if isinstance(error, MemoryError) else "diverged"
        loss, remark = None, f"{kind}: {str(error).splitlines()[0].split(';')[0]}"
    last = (_records(run_dir) or [{"tokens": 0, "wall_s": 0.0}])[-1]
    outcome = Outcome(name=run.name, loss=loss, tokens=last["tokens"], wall_s=last["wall_s"], remark=remark)
    run_dir.mkdir(parents=True, exist_ok=True)  # the memory may not even have sufficed for the model
    with atomic_write(run_dir / "outcome.json") as file:
        file.write(json.dumps(asdict(outcome), indent=2).encode() + b"\n")
    return outcome


def _read_outcome(run_dir: Path) -> Outcome | None:
    path = run_dir / "outcome.json"
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _records(run_dir: Path) -> list[dict[str, Any]]:
    log = run_dir / "metrics.jsonl"
    return read_metrics(log) if log.is_file() else []


def _check_unchanged(run_dir: Path, config: RunConfig) -> None:
    """Raise ValueError if the folder holds a run with other settings: it would not be the one that was asked for."""
    path = run_dir / "config.toml"
    if not path.is_file():
        return
    before, now = (_flat(to_table(each)) for each in (load_config(path, RunConfig), config))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{run_dir} holds a run with {key} = {before.get(key)}, but now {now.get(key)} is asked for; "
                "choose another --output, or remove that folder"
            )


def _flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one, its keys with dots."""
    return dict(_flat_items(table, where))


def _flat_items(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat_items(value, f"{where}{key}.")
        else:
            yield where + key, value


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        table = tables
        for name in outer:
            table = table.setdefault(name, {})
        table[last] = value
    return tables


def _setting(key: str, value: Any) -> str:
    return f"{key.rpartition('.')[2]}={value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"
