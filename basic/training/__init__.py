"""Training: from token ids to a model, with its settings, run folder, checkpoints and records."""

from importlib import import_module
from typing import Any

from basic.training.loop import train as train
from basic.training.records.metrics import read_metrics as read_metrics
from basic.training.run_folder import Run as Run
from basic.training.run_folder import load_run as load_run
from basic.training.settings import DataConfig as DataConfig
from basic.training.settings import RunConfig as RunConfig
from basic.training.settings import TrainConfig as TrainConfig


def __getattr__(name: str) -> Any:
    # By its name, because it needs the tokenizer, which training itself never imports.
    if name == "train_text":
        return import_module("basic.commands.own_text").train_text
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
