"""Training: from token ids to a model, with its settings, run folder, checkpoints and records."""

from typing import TYPE_CHECKING

from basic.common.progress import lazy_names

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
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
