"""The folder of a training run.

runs/NAME/config.toml                        the complete configuration, defaults included
          checksums.json                     the checksum of config.toml; delete it to accept an edited config.toml
          environment.json                   code, machine and data of every start
          metrics.jsonl                      one record a line: losses, speed, evaluations, samples, checkpoints
          samples.txt                        texts generated during training
          tokenizer/                         vocabulary, merges and special tokens, if a tokenizer was given
          checkpoints/step_00001000.safetensors    or a folder step_00001000/ for a sharded model

The process that writes a run folder holds its lock (`basic.common.folder_lock`).
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Collection
from dataclasses import fields, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from basic.common.config_files import from_table, load_config, save_config
from basic.common.errors import DamagedFileError, InvalidConfigError, InvalidInputError, NotARunError
from basic.common.file_sets import CHECKSUMS_NAME, check_checksums, remove_set, write_checksums
from basic.common.files import read_file, temporary_folder
from basic.generation.text import SavableTokenizer, complete
from basic.model import ModelConfig, TransformerLM
from basic.training.checkpoints.file import Checkpoint, load_state
from basic.training.checkpoints.of_run import checkpoint_paths, find_checkpoint_path, newest_checkpoint, open_checkpoint
from basic.training.checkpoints.sharded import remove_checkpoint, without_values
from basic.training.checkpoints.state import check_shapes, rename_wrapped_keys, without_wrappers
from basic.training.parallel.devices import activation_dtype, choose_device
from basic.training.records.environment import check_run_tokenizer
from basic.training.records.metrics import logged_metrics
from basic.training.settings import RunConfig

_RECORDS = ("environment.json", "metrics.jsonl", "samples.txt", "outcome.json")
"""Files to which another run must not append; outcome.json is that of a sweep."""


class Run(NamedTuple):
    """A trained model, with the configuration and tokenizer it was trained with."""

    model: TransformerLM
    config: RunConfig
    tokenizer_path: Path | None
    """Folder for `Tokenizer.load`; None if the run has no tokenizer."""
    step: int
    """Number of optimizer steps that the model was trained for."""

    @property
    def tokenizer(self) -> Any:
        """The run's `basic.Tokenizer.Tokenizer`.

        Raises:
            InvalidInputError: the run has none.
            WrongTokenizerError: it is not the one with which the run was started.
        """
        if self.tokenizer_path is None:
            raise InvalidInputError(
                "the run has no tokenizer/ folder; in Python, basic.generation.generate continues ids"
            )
        files = ((file.name, file.stat().st_mtime_ns) for file in os.scandir(self.tokenizer_path))
        tokenizer = _load_tokenizer(self.tokenizer_path.absolute(), tuple(sorted(files)))
        check_run_tokenizer(self.tokenizer_path.parent, tokenizer.fingerprint)
        return tokenizer

    def complete(self, prompts: Any = "", max_new_tokens: int = 200, **sampling: Any) -> Any:
        """Continue a text, or each of a list of texts; "" is the start of a document.

        Args:
            sampling: fields of `basic.generation.sampling.Sampling`: temperature, top_k, top_p, seed.

        Returns:
            The continuation without the prompt, or the list of them.

        Raises:
            TypeError, InvalidInputError: as `basic.generation.complete`, or the run has no tokenizer.
        """
        end = self.config.train.end_of_text
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [self.with_document_start(text) or end for text in texts]
        continued = complete(self.model, self.tokenizer, texts, max_new_tokens, end_of_text=end, **sampling)
        return continued[0] if isinstance(prompts, str) else continued

    def with_document_start(self, prompt: str) -> str:
        """Put the separator before a prompt, if every sequence that the model was trained on starts with one."""
        separator = self.config.train.end_of_text if self.config.train.rows in ("documents", "packed") else ""
        return separator + prompt.removeprefix(separator)


@lru_cache(maxsize=4)
def _load_tokenizer(path: Path, files: tuple[tuple[str, int], ...]) -> Any:
    """Load the tokenizer of a run, once as long as its files have these times of modification."""
    # Training never imports a tokenizer (tests/project/test_architecture.py); this module is imported by its name when
    # a user asks for the tokenizer of a run.
    return import_module("basic.Tokenizer").Tokenizer.load(path)


def load_run_config(run_dir: Path) -> RunConfig:
    """Load the configuration with which a run was started or last resumed.

    Raises:
        NotARunError: the folder is not a run.
        DamagedFileError: config.toml is not the one that was written; the message says how to accept it.
        InvalidConfigError: the configuration is not valid.
    """
    path = run_dir / "config.toml"
    if not path.is_file():
        inside = sorted(config.parent for config in run_dir.glob("*/config.toml"))
        guesses = (Path("runs") / run_dir, *run_dir.absolute().parents[:2], *inside)
        run = next((guess for guess in guesses if (guess / "config.toml").is_file()), None)
        remedy = "start one with `basic train`" if run is None else f"did you mean the run {run}?"
        raise NotARunError(f"{run_dir} is not a run: it has no config.toml; {remedy}")
    check_checksums(run_dir, {path.name: read_file(path)})
    return load_config(path, RunConfig)


def save_run_config(run_dir: Path, config: RunConfig) -> None:
    """Save the configuration of a run, with its checksum."""
    # Removed first: a process that is killed between the two files leaves a configuration without a checksum.
    (run_dir / CHECKSUMS_NAME).unlink(missing_ok=True)
    save_config(config, run_dir / "config.toml")
    write_checksums(run_dir, ["config.toml"])


def load_run(
    path: str | os.PathLike, *, checkpoint: int | Literal["best", "last"] | None = None, device: str = "auto"
) -> Run:
    """Load the model of a run, in evaluation mode, from its newest complete checkpoint or another one.

    A warning names every newer checkpoint that is damaged.

    Args:
        checkpoint: the step of a checkpoint; "best" for the one with the lowest validation loss; "last" or None for the
            newest.
        device: cpu, cuda, ...; "auto" is a GPU if there is one, else the CPU.

    Raises:
        NotARunError: the folder is not a run, or has no checkpoint yet.
        FileNotFoundError: it does not have this checkpoint (the message lists those that it has).
        InvalidInputError: the configuration or the device is not valid, or the checkpoint does not fit the
            configuration.
        DamagedFileError: no checkpoint, or not the one that was asked for, is complete, or config.toml is damaged.
    """
    run_dir = Path(path)
    config = load_run_config(run_dir)
    if checkpoint in ("last", None):
        opened = newest_checkpoint(run_dir, warnings.warn)
    else:
        opened = open_checkpoint(find_checkpoint_path(run_dir, checkpoint))
    check_model_config(config.model, opened, run_dir)
    try:
        model = TransformerLM(config.model)
    except (MemoryError, RuntimeError) as error:
        raise InvalidConfigError(f"the model of {run_dir / 'config.toml'} does not fit into memory: {error}") from error
    step = load_state(opened, model)
    chosen = choose_device(device)
    model.to(chosen).eval()
    model.activation_dtype = activation_dtype(config.train, chosen)
    tokenizer_path = run_dir / "tokenizer"
    return Run(model, config, tokenizer_path if tokenizer_path.is_dir() else None, step)


def create_run_folder(
    run_dir: Path, config: RunConfig, tokenizer: SavableTokenizer | None, *, overwrite: bool = False
) -> None:
    """Create a run's folder with its configuration and a copy of its tokenizer.

    A run without a step, such as one whose tracker failed at the start, is replaced without being asked. What is left
    of a run that has lost its config.toml is set aside.

    Args:
        overwrite: first remove the run that the folder contains, with its tokenizer; other files stay.

    Raises:
        FileExistsError: the folder contains a run, and `overwrite` is False; or it contains no run, but another
            tokenizer.
    """
    own = run_dir / "tokenizer"
    is_run = (run_dir / "config.toml").exists()
    if is_run and not overwrite and (_has_steps(run_dir) or not _was_started(run_dir)):
        raise FileExistsError(
            f"{run_dir} already contains a run; choose another folder, resume the run (--resume {run_dir}), or remove "
            "it (--overwrite)"
        )
    if tokenizer is not None and (own.is_symlink() or not is_run):
        _check_no_other_tokenizer(own, tokenizer)
    if is_run:
        # The configuration is replaced last: if the process is killed meanwhile, this is still a run to overwrite.
        for path in checkpoint_paths(run_dir):
            remove_checkpoint(path)
        for name in _RECORDS:
            (run_dir / name).unlink(missing_ok=True)
        if tokenizer is None:
            _remove_tokenizer(own)
    else:
        for path in [*checkpoint_paths(run_dir), *(run_dir / name for name in _RECORDS)]:
            if path.exists():
                warnings.warn(f"{path} belongs to no run; it is now {set_aside(path).name}", stacklevel=2)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(own)
    save_run_config(run_dir, config)


def _check_no_other_tokenizer(folder: Path, tokenizer: SavableTokenizer) -> None:
    """Raise a FileExistsError if saving a tokenizer into a folder would change a file."""
    if not folder.is_dir():
        return
    with temporary_folder(folder.parent / "tokenizer") as copy:
        tokenizer.save(copy)
        for path in copy.iterdir():
            if (folder / path.name).exists() and read_file(folder / path.name) != read_file(path):
                raise FileExistsError(
                    f"{folder} holds another tokenizer than that of this run, which would replace it; train in another "
                    "folder, or move it away"
                )


def _remove_tokenizer(folder: Path) -> None:
    """Remove the tokenizer of a run; if files of others are left in its folder, the folder is set aside."""
    if not folder.is_dir():
        return
    if not folder.is_symlink():
        remove_set(folder)
    try:
        folder.rmdir()
    except OSError:
        warnings.warn(f"{folder} has files that are not the run's; it is now {set_aside(folder).name}", stacklevel=3)


def _was_started(run_dir: Path) -> bool:
    """Whether config.toml is as the start of a run wrote it, and not somebody's own."""
    if not (run_dir / CHECKSUMS_NAME).is_file():
        return False
    try:
        check_checksums(run_dir, {"config.toml": read_file(run_dir / "config.toml")})
    except DamagedFileError:
        return False
    return True


def _has_steps(run_dir: Path) -> bool:
    """Whether a run has saved or logged a step."""
    return bool(checkpoint_paths(run_dir) or logged_metrics(run_dir))


def set_aside(path: Path) -> Path:
    """Rename a file or folder of a run so that it does not count any more, and return its new path."""
    names = (f"set_aside_{number}_{path.name}" if number else f"set_aside_{path.name}" for number in itertools.count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.rename(path, target)
    return target


def check_model_config(config: ModelConfig, checkpoint: Checkpoint, run_dir: Path) -> None:
    """Check that a checkpoint is one of the model of a run's config.toml, before memory is allocated for the model.

    Raises:
        InvalidInputError: it is not; the message names the setting or the weight.
    """
    path, extra = run_dir / "config.toml", checkpoint.document.get("extra")
    if isinstance(extra, dict) and isinstance(extra.get("model"), dict):
        check_same_model(from_table(ModelConfig, extra["model"]), config, f"{checkpoint.src} was saved", f"{path} has")
        return
    saved_state = dict(without_values(checkpoint).entry("model"))  # the checkpoint of an earlier version
    names = [without_wrappers(name).split(".") for name in saved_state]
    model = model_for_checks(config, len({name[1] for name in names if name[0] == "layers"}), path)
    rename_wrapped_keys(model, saved_state)
    check_shapes(model.state_dict(), saved_state)


def model_for_checks(config: ModelConfig, num_saved_blocks: int, path: Path) -> TransformerLM:
    """Create a model without memory, whose names and shapes saved weights are compared with.

    A configuration of somebody else may ask for any number of blocks and positions. One block more than is saved is
    enough to name the first missing weight, and no weight depends on the number of positions.

    Args:
        path: where the configuration is from, for the message.

    Raises:
        InvalidConfigError: no model can have these sizes.
    """
    try:
        with torch.device("meta"):
            return TransformerLM(
                replace(config, num_layers=min(config.num_layers, num_saved_blocks + 1), context_length=1)
            )
    except (RuntimeError, TypeError, OverflowError) as error:
        raise InvalidConfigError(f"{path} has sizes that no model can have: {str(error).splitlines()[0]}") from error


def check_same_model(
    saved: ModelConfig,
    given: ModelConfig,
    before: str,
    now: str,
    *,
    may_differ: Collection[str] = (),
    remedy: str = "give it the model that it was trained with, or train this one in another folder",
) -> None:
    """Check that two model configurations are equal.

    Args:
        before, now: what has them, for the message: "runs/a was started", "config.toml has".

    Raises:
        InvalidConfigError: they differ; the message names the first setting that does.
    """
    for name in (field.name for field in fields(ModelConfig)):
        if name not in may_differ and getattr(saved, name) != getattr(given, name):
            raise InvalidConfigError(
                f"{before} with model.{name} = {getattr(saved, name)}, but {now} {getattr(given, name)}; {remedy}"
            )
