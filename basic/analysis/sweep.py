"""Sweeps: runs that differ in a few settings, read from a TOML file, trained in turn and compared in a table.

    config = "../configs/tinystories.toml"         # base configuration of all runs, relative to this file
    [settings]                                     # changes to it, for all runs
    train.min_learning_rate = 0.0
    [grid]                                         # one run for each combination of these values
    train.max_learning_rate = [1e-3, 1e-2]
    [[variants]]                                   # optional: each combination is run with each variant
    name = "post-norm"
    model.norm = "post"
    [small]                                        # optional: the same keys, which replace those above with --small
    config = "../configs/small.toml"

runs/SWEEP/NAME/               a run folder (`basic.training.run_folder`), and outcome.json once the run has ended
           table.md, final_loss.png (over the setting that changes), loss.png (during training)
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from basic.analysis.evaluation import evaluate_tokens
from basic.common.config_files import (
    differing_settings,
    flatten_settings,
    from_table,
    load_table,
    setting_label,
    to_table,
    toml_path,
)
from basic.common.errors import DamagedFileError, InvalidConfigError
from basic.common.files import atomic_write, load_json_object, make_folder, open_file, write_json
from basic.common.folder_lock import FolderLock
from basic.common.outputs import Output, check_outputs
from basic.generation.text import SavableTokenizer
from basic.training.checkpoints.of_run import checkpoint_paths, newest_checkpoint
from basic.training.loop import train
from basic.training.records.metrics import logged_metrics
from basic.training.run_folder import Run, load_run, load_run_config
from basic.training.settings import DataConfig, RunConfig

_KEYS = ("config", "settings", "grid", "variants")
_TABLE_HEADER = "| run | loss on all validation tokens (nats per token) |"
_TABLE_START = "| run | "  # earlier versions had another name for the loss


class SweepRun(NamedTuple):
    """A run of a sweep, before training."""

    name: str
    """The settings that distinguish the run; also the name of its folder."""
    config: RunConfig


class SweepData(NamedTuple):
    """The tokens that a run trains on and is evaluated on."""

    train_tokens: np.ndarray
    valid_tokens: np.ndarray
    tokenizer: SavableTokenizer | None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run; outcome.json holds these fields."""

    name: str
    loss: float | None
    """Nats per token over all validation tokens (`evaluate_tokens`); None if the run failed."""
    tokens: int
    """Number of training tokens processed."""
    wall_s: float
    remark: str = ""
    """Why the run failed, or a warning about its loss."""


def read_sweep(path: str | os.PathLike, *, small: bool = False) -> list[SweepRun]:
    """Read the runs of a sweep file.

    Raises:
        FileNotFoundError: the file, or the configuration file that it names, does not exist.
        InvalidConfigError: the file is not TOML, a key is unknown or missing, or a value is out of its range.
    """
    path = toml_path(path, "sweep")
    table = load_table(path, "sweep")
    try:
        small_table = table.pop("small", {})
        if not isinstance(small_table, dict):
            raise InvalidConfigError(f"small must be a table, got {small_table!r}")
        if small and not small_table:
            raise InvalidConfigError("there is no [small] table; omit --small")
        for key in (*table, *small_table):
            if key not in _KEYS:
                raise InvalidConfigError(f"unknown key {key!r}; the keys here are {', '.join(_KEYS)}, small")
        if small:
            table |= small_table
        if not isinstance(table.get("config"), str):
            raise InvalidConfigError("the key 'config' is missing or no string: the path of the base configuration")
        base = load_table(path.parent / table["config"], "configuration")
        settings = flatten_settings(base) | flatten_settings(table.get("settings", {}))
        return _expand(settings, flatten_settings(table.get("grid", {})), table.get("variants", [{}]))
    except ValueError as error:
        raise InvalidConfigError(f"{path}: {error}") from error


def run_sweep(
    runs: Sequence[SweepRun],
    folder: str | os.PathLike,
    open_data: Callable[[DataConfig], SweepData],
    *,
    report: Callable[[str], None] = print,
    progress: bool = False,
    train: Callable[..., Run] = train,
) -> list[RunResult]:
    """Train all runs that have no result yet; an interrupted run resumes from its newest checkpoint.

    A run that diverges or runs out of memory gets a result too, and the sweep continues.

    Args:
        folder: holds one folder per run, and table.md, which is rewritten after every run; created if missing.
        open_data: opens the data of a run; called once for consecutive runs with the same data.
        train: trains a run, as `basic.training.loop.train`.

    Raises:
        InvalidConfigError: a run's folder holds a run with another configuration; or as for `train`.
        DamagedFileError: an outcome.json is damaged.
        FileExistsError: table.md, final_loss.png or loss.png is not one of a sweep.
        BlockingIOError: another process trains this sweep.
        KeyboardInterrupt: a signal arrived; the current run has been saved.
    """
    from basic.analysis.plotting import picture_output

    folder = Path(folder)
    outputs = [Output(folder / "table.md", "the table of a sweep", _is_table)]
    if not (folder / "table.md").exists():  # otherwise the picture is that of the same sweep
        outputs += [picture_output(folder / name) for name in ("final_loss.png", "loss.png")]
    check_outputs(outputs, overwrite=True)
    make_folder(folder)
    results: list[RunResult] = []
    opened: tuple[DataConfig, SweepData] | None = None
    with FolderLock(folder):
        for run in runs:
            _check_same_config(folder / run.name, run.config)
        for number, run in enumerate(runs, 1):
            result, note = _read_result(folder / run.name), " (finished earlier)"
            if result is None:
                if opened is None or opened[0] != run.config.data:
                    opened = run.config.data, open_data(run.config.data)
                result, note = _train_and_evaluate(run, folder / run.name, opened[1], train, progress), ""
            loss = "failed" if result.loss is None else f"{result.loss:.4f}"
            report(f"{number}/{len(runs)} {run.name}: {loss}{note}" + f"; {result.remark}" * bool(result.remark))
            results.append(result)
            with atomic_write(folder / "table.md") as file:
                file.write(result_table(results).encode())
    return results


def result_table(results: Sequence[RunResult]) -> str:
    """Format results as a Markdown table, with the lowest loss in bold."""
    best = min((result.loss for result in results if result.loss is not None), default=None)
    lines = [f"{_TABLE_HEADER} perplexity | tokens | wall time | remark |", "|---|--:|--:|--:|--:|---|"]
    for result in results:
        loss = perplexity = "–"
        if result.loss is not None:
            bold = "**" * (result.loss == best)
            loss = f"{bold}{result.loss:.3f}{bold}"
            perplexity = f"{math.exp(min(result.loss, 700)):.4g}"
        row = (result.name, loss, perplexity, f"{result.tokens:,}", f"{result.wall_s:.0f} s", result.remark)
        lines.append(f"| {' | '.join(row)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def plot_sweep(runs: Sequence[SweepRun], folder: str | os.PathLike) -> Path | None:
    """Plot the losses of all runs that have records to loss.png, and return its path; None without any records."""
    from basic.analysis.plotting import plot_losses

    records = {run.name: logged for run in runs if (logged := logged_metrics(Path(folder) / run.name))}
    if not records:
        return None
    picture = Path(folder) / "loss.png"
    plot_losses(records, picture)
    return picture


def _expand(
    settings: Mapping[str, Any], grid: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]
) -> list[SweepRun]:
    """Make a run for each pair of a variant and a combination of grid values; keys are dotted."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InvalidConfigError(f"grid.{key} must be a list of values to try, got {values!r}")
    runs: dict[str, SweepRun] = {}
    for variant in variants:
        changes = {key: value for key, value in flatten_settings(variant).items() if key != "name"}
        labels = [variant["name"]] if "name" in variant else [setting_label(*change) for change in changes.items()]
        axes = {key: values for key, values in grid.items() if key not in changes}  # the variant's own value wins
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = ",".join(labels + [setting_label(*setting) for setting in point.items()]) or "only"
            if name in runs:
                raise InvalidConfigError(f"two runs would be called {name!r}; change the names")
            if "/" in name or name.startswith("."):
                raise InvalidConfigError(f"a run would be called {name!r}, which cannot name a folder; change the name")
            runs[name] = SweepRun(name, from_table(RunConfig, _nest({**settings, **changes, **point})))
    return list(runs.values())


def _train_and_evaluate(
    run: SweepRun, run_dir: Path, data: SweepData, train: Callable[..., Run], progress: bool
) -> RunResult:
    """Train a run, evaluate it on all validation tokens and write its result to outcome.json."""
    loss, remark = None, ""
    try:
        model = _trained_run(run, run_dir, data, train, progress).model
        special_ids = {} if data.tokenizer is None else data.tokenizer.special_token_ids
        end_id = special_ids.get(run.config.train.end_of_text)
        loss = evaluate_tokens(model, data.valid_tokens, prefix_token_id=end_id).loss
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        if loss > math.log(run.config.model.vocab_size):
            remark = "worse than knowing nothing"
    except (FloatingPointError, MemoryError) as error:
        kind = "out of memory" if isinstance(error, MemoryError) else "diverged"
        loss, remark = None, f"{kind}: {str(error).splitlines()[0].split(';')[0]}"
    last = (logged_metrics(run_dir) or [{"tokens": 0, "wall_s": 0.0}])[-1]
    tokens, wall_s = last.get("tokens", 0), last.get("wall_s") or 0.0
    result = RunResult(name=run.name, loss=loss, tokens=tokens, wall_s=wall_s, remark=remark)
    run_dir.mkdir(parents=True, exist_ok=True)  # missing if memory ran out before training started
    write_json(run_dir / "outcome.json", asdict(result), indent=2)
    return result


def _trained_run(run: SweepRun, run_dir: Path, data: SweepData, train: Callable[..., Run], progress: bool) -> Run:
    """Train a run, from its newest checkpoint if it has one; one that was trained to its end is only loaded."""
    resume, config = (run_dir / "config.toml").is_file() and bool(checkpoint_paths(run_dir)), run.config
    if resume and config.train.steps == 0:  # the steps were planned when the run was started
        config = load_run_config(run_dir)
    if resume and newest_checkpoint(run_dir, warnings.warn).entry("iteration") >= config.train.steps > 0:
        return load_run(run_dir, device=config.train.device)
    tokens, options = (data.train_tokens, data.valid_tokens), {"tokenizer": data.tokenizer, "progress": progress}
    return train(config, *tokens, run_dir, resume=resume, overwrite=not resume, **options)


def _read_result(run_dir: Path) -> RunResult | None:
    path = run_dir / "outcome.json"
    if not path.is_file():
        return None
    try:
        return from_table(RunResult, load_json_object(path))
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is not the result of a run ({error}); remove it, and the run is evaluated again"
        ) from None


def _is_table(path: Path) -> bool:
    with open_file(path) as file:
        return file.read(len(_TABLE_START)) == _TABLE_START.encode()


def _check_same_config(run_dir: Path, config: RunConfig) -> None:
    """Raise InvalidConfigError if the folder holds a run with another configuration."""
    if not (run_dir / "config.toml").is_file():
        return
    differing, (saved, new) = differing_settings(map(to_table, (load_run_config(run_dir), config)))
    for key in differing:
        if key != "train.steps" or new.get(key) != 0:  # planned when the run was started
            raise InvalidConfigError(
                f"{run_dir} holds a run with {key} = {saved.get(key)}, but the sweep has {key} = {new.get(key)}; "
                "choose another --output, or remove that folder"
            )


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested tables, the inverse of `flatten_settings`."""
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        table = tables
        for name in outer:
            table = table.setdefault(name, {})
        table[last] = value
    return tables
