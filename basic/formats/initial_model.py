"""The weights that begin a run (`basic train --init-from`): a run of ours, or a model of another program."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from basic.common.config_files import load_config, to_table
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.formats.gguf_file import is_gguf
from basic.formats.import_model import open_model
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.checkpoints.of_run import checkpoint_step, find_checkpoint_path
from basic.training.run_folder import load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig

# What a run has that is started from weights, unless it is told otherwise: rates that change trained weights little.
_DEFAULTS = TrainConfig(steps=1000, max_learning_rate=1e-4, min_learning_rate=1e-5)


class InitialModel(NamedTuple):
    """A model whose weights begin a run."""

    model: TransformerLM
    source: str
    """Where the weights are from: a checkpoint of a run, or the path that was given."""
    tokenizer: Tokenizer | None
    tokenizer_path: Path | None
    end_of_text: str | None
    """The special token between its documents; None if the source does not say it."""

    def run_config(self, config_path: Path | None = None) -> RunConfig:
        """The configuration of a run that begins with these weights.

        Args:
            config_path: a TOML file as for a new run, which may leave out the model and what it has of it; None for
                1,000 steps at a learning rate of 1e-4 that falls to 1e-5.

        Raises:
            InvalidConfigError: the file is not such a configuration.
        """
        data = {"tokenizer": str(self.tokenizer_path)} if self.tokenizer_path is not None else {}
        ends: dict[str, Any] = {} if self.end_of_text is None else {"end_of_text": self.end_of_text}
        if config_path is None:
            train = replace(_DEFAULTS, init_from=self.source, **ends)
            return RunConfig(model=self.model.config, train=train, data=DataConfig(**data))
        defaults = {"model": to_table(self.model.config), "train": ends, "data": data}

        def complete(table: dict[str, Any]) -> None:
            for name, values in defaults.items():
                if isinstance(given := table.get(name, {}), dict):  # else it is refused later
                    table[name] = {**values, **given}
                    if name == "train":
                        table[name]["init_from"] = self.source

        return load_config(config_path, RunConfig, complete)

    def check_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Check that the tokenizer of a run is that of these weights, as far as both are known.

        Raises:
            WrongTokenizerError: it is another one.
        """
        if tokenizer and self.tokenizer and tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise WrongTokenizerError(
                f"{self.source} was trained with another tokenizer than that of this run, so its weights mean other "
                f"ids; leave --tokenizer out, or give {self.tokenizer_path}, and encode the text with it"
            )


def open_initial_model(source: str | os.PathLike) -> InitialModel:
    """Open the weights that begin a run, on the CPU.

    Args:
        source: the folder of a run, for its newest checkpoint; a checkpoint in it (runs/a/checkpoints/step_...); or the
            folder of a model of transformers.

    Raises:
        FileNotFoundError: there is no such file or folder.
        NotARunError, DamagedFileError, InvalidInputError: as for `load_run` and `open_model`.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no run, checkpoint or model {os.fspath(source)!r}")
    is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step_")
    run_dir = path.parents[1] if is_checkpoint else path
    if (run_dir / "config.toml").is_file():
        run = load_run(run_dir, checkpoint=checkpoint_step(path) if is_checkpoint else None, device="cpu")
        tokenizer = None if run.tokenizer_path is None else run.tokenizer
        saved = str(find_checkpoint_path(run_dir, run.step))
        return InitialModel(run.model, saved, tokenizer, run.tokenizer_path, run.config.train.end_of_text)
    if is_gguf(path):
        raise InvalidInputError(
            f"{path} is a GGUF file; import it first, `basic import {path} --output runs/NAME`, and give that run"
        )
    if not path.is_dir():
        raise InvalidInputError(f"{path} is no run, checkpoint of a run, or model folder of transformers")
    has_tokenizer = (path / "tokenizer.json").is_file()
    model, tokenizer, end_of_text = open_model(path, with_tokenizer=has_tokenizer)
    return InitialModel(model, os.fspath(source), tokenizer, path if has_tokenizer else None, end_of_text)
