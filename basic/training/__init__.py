"""Training: from token ids to a model, with its settings, run folder, checkpoints and records."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basic.training.loop import train
    from basic.training.records.metrics import read_metrics
    from basic.training.run_folder import Run, load_run
    from basic.training.settings import DataConfig, RunConfig, TrainConfig

__all__ = ["DataConfig", "Run", "RunConfig", "TrainConfig", "load_run", "read_metrics", "train", "train_text"]
_MODULES = {
    **dict.fromkeys(("DataConfig", "RunConfig", "TrainConfig"), "training.settings"),
    **dict.fromkeys(("Run", "load_run"), "training.run_folder"),
    "read_metrics": "training.records.metrics",
    "train": "training.loop",
    "train_text": "commands.own_text",  # by its name, because it needs the tokenizer, which training never imports
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that settings do not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"basic.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
