"""Training: from token ids to a model, with its settings, run folder, checkpoints and records."""

from importlib import import_module
from typing import Any

from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import Run, load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig

__all__ = ["DataConfig", "Run", "RunConfig", "TrainConfig", "load_run", "read_metrics", "train", "train_text"]


def __getattr__(name: str) -> Any:
    # By its name, because it needs the tokenizer, which training itself never imports.
    if name == "train_text":
        return import_module("basic.commands.own_text").train_text
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
