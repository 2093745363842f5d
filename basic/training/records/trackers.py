"""Passing a run's records on to Weights & Biases or TensorBoard, under the names that they have in metrics.jsonl.

A training record's numbers keep their names (`train_loss`, `valid_loss`, ...); those of another kind stand behind it
(`checkpoint/save_s`). Texts, such as samples, go along as texts. Both packages are optional, and imported only when
they are asked for.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

NAMES = ("wandb", "tensorboard")


class Tracker(Protocol):
    """Somewhere to send records to."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], run_dir: Path, *, first_step: int = 0, config_table: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """Start the trackers of these names.

    Args:
        names: of `NAMES`.
        run_dir: their files go into folders in here, and its name is the run's.
        first_step: steps done before; what a tracker knows of later ones is from before a crash, and is done again.
        config_table: the run's configuration as nested dictionaries, shown beside the curves.

    Raises:
        ValueError: an unknown name, or its package is not installed.
    """
    check_trackers(names)
    makers = {"wandb": _Wandb, "tensorboard": _TensorBoard}
    return [makers[name](run_dir, first_step, dict(config_table or {})) for name in dict.fromkeys(names)]


def check_trackers(names: Sequence[str]) -> None:
    """Whether these trackers can be used, to be asked before anything is made.

    Raises:
        ValueError: an unknown name, or its package is not installed.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"there is no tracker {name!r}; choose from {', '.join(NAMES)}")
        try:
            if name == "wandb":
                import wandb  # noqa: F401
            else:
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"the tracker {name} needs the package of that name, which cannot be imported ({error}); "
                f"start with `uv run --extra {name} local/train.py ...`, or leave the tracker out"
            ) from error


def named(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's numbers and texts under their full names; the step and the kind itself are left out.

    Example:
        >>> named({"step": 5, "train_loss": 2.5}), named({"kind": "sample", "step": 5, "text": "Once"})
        ({'train_loss': 2.5}, {'sample/text': 'Once'})
    """
    prefix = f"{record['kind']}/" if "kind" in record else ""
    return {
        prefix + key: value
        for key, value in record.items()
        if key not in ("step", "kind") and isinstance(value, int | float | str)
    }


class _Wandb:
    """A run of Weights & Biases, which a resumed run goes on with."""

    def __init__(self, run_dir: Path, first_step: int, config: dict[str, Any]):
        import wandb

        self.text = wandb.Html
        id_file = run_dir / "wandb" / "run_id.txt"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        known = id_file.read_text() if first_step and id_file.exists() else None
        self.run = wandb.init(
            project="basic", name=run_dir.name, dir=str(run_dir), config=config, id=known, resume="allow"
        )
        id_file.write_text(self.run.id)
        # Steps of ours are an axis like any other: wandb's own only grows, and a checkpoint may be reported late.
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        values = {
            name: self.text(f"<pre style='white-space: pre-wrap'>{html.escape(value)}</pre>")
            if isinstance(value, str)
            else value
            for name, value in named(record).items()
        }
        self.run.log({"step": record["step"], **values})

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, run_dir: Path, first_step: int, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        rows = [f"    {table}.{key} = {value!r}" for table, values in config.items() for key, value in values.items()]
        self.writer.add_text("config", "\n".join(rows), first_step)  # indented: as it stands, in Markdown

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in named(record).items():
            if isinstance(value, str):
                self.writer.add_text(name, "    " + value.replace("\n", "\n    "), record["step"])
            else:
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()
