"""Trackers: send a run's records to Weights & Biases or TensorBoard.

The values of a training record keep the names that they have in metrics.jsonl (`train_loss`, `valid_loss`, ...). The
values of other records have the kind as prefix (`checkpoint/save_s`). Both packages are optional and imported only
when they are used.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from basic.common.errors import InvalidConfigError, failures_of, how_to_install
from basic.common.files import atomic_write

_REMEDIES = {
    "wandb": "log in (`wandb login`), work without a network (WANDB_MODE=offline), or leave the tracker out",
    "tensorboard": "leave the tracker out",
}


class Tracker(Protocol):
    """A receiver of records."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], run_dir: Path, *, first_step: int = 0, config_table: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """Open the trackers with these names.

    Args:
        run_dir: trackers store their files in subfolders of it; its name is the name of the run.
        first_step: number of steps done before. If there are any, the run of Weights & Biases is continued. TensorBoard
            drops what an earlier process logged after this step.
        config_table: the run's configuration as nested dictionaries, shown with the curves.

    Raises:
        DependencyError: a tracker cannot be opened, for example without a key or a network.
    """
    makers = {"wandb": _Wandb, "tensorboard": _TensorBoard}
    trackers = []
    for name in dict.fromkeys(names):
        with failures_of(f"the tracker {name}", _REMEDIES[name]):
            trackers.append(makers[name](run_dir, first_step, dict(config_table or {})))
    return trackers


def check_trackers(names: Sequence[str]) -> None:
    """Check that these trackers can be used, before any file is written.

    Raises:
        InvalidConfigError: a name is unknown, or its package is not installed.
    """
    for name in names:
        try:
            if name == "wandb":
                import wandb  # noqa: F401
            else:
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except Exception as error:  # a package of the wrong version may raise anything
            raise InvalidConfigError(
                f"the tracker {name} needs the package of that name, which cannot be imported ({error}); "
                f"{how_to_install(name, name)}; or leave the tracker out"
            ) from error


def tracker_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's numbers and texts by their full names, without its step and kind.

    Examples:
        >>> tracker_values({"step": 5, "train_loss": 2.5})
        {'train_loss': 2.5}
        >>> tracker_values({"kind": "sample", "step": 5, "text": "Once"})
        {'sample/text': 'Once'}
    """
    prefix = f"{record['kind']}/" if "kind" in record else ""
    return {
        prefix + key: value
        for key, value in record.items()
        if key not in ("step", "kind") and isinstance(value, int | float | str)
    }


class _Wandb:
    """A run of Weights & Biases; a resumed run continues it."""

    def __init__(self, run_dir: Path, first_step: int, config: dict[str, Any]):
        import wandb

        self.html_type = wandb.Html
        id_file = run_dir / "wandb" / "run_id.txt"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        run_id = id_file.read_text() if first_step and id_file.exists() else None
        self.run = wandb.init(
            project="basic", name=run_dir.name, dir=str(run_dir), config=config, id=run_id, resume="allow"
        )
        with atomic_write(id_file) as file:
            file.write(self.run.id.encode())
        # wandb's own step must not decrease, but the record of a checkpoint may come after later steps.
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        values = {
            name: self.html_type(f"<pre style='white-space: pre-wrap'>{html.escape(value)}</pre>")
            if isinstance(value, str)
            else value
            for name, value in tracker_values(record).items()
        }
        self.run.log({"step": record["step"], **values})

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    """Event files in the run folder; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, run_dir: Path, first_step: int, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        lines = [f"    {table}.{key} = {value!r}" for table, values in config.items() for key, value in values.items()]
        self.writer.add_text("config", "\n".join(lines), first_step)  # indented, so that Markdown shows it verbatim

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in tracker_values(record).items():
            if isinstance(value, str):
                self.writer.add_text(name, "    " + value.replace("\n", "\n    "), record["step"])
            else:
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()
