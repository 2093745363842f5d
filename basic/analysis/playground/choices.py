"""What can be chosen on the page: tokenizers, published vocabularies, and the checkpoints of runs.

Names come from a browser. They are only ever looked up in these lists, and never used as paths.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from basic.chat import ChatFormat
from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
from basic.training.checkpoints.of_run import checkpoint_paths, checkpoint_step
from basic.training.records.environment import check_run_tokenizer
from basic.training.run_folder import Run, load_run

MAX_LOADED = 4
"""Models that stay in memory."""
# The name on the page, the name of tiktoken, and that of the file in its cache (the SHA-1 of the file's address).
PUBLISHED = (
    ("GPT-2", "r50k_base", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"),
    ("cl100k (GPT-4)", "cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    ("o200k (GPT-4o)", "o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
)


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    run: Run
    tokenizer: Tokenizer

    @property
    def chat(self) -> ChatFormat:
        """How conversations become text.

        Raises:
            InvalidInputError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise InvalidInputError("this model's tokenizer has no chat template; choose another model")
        return ChatFormat(self.tokenizer, end_of_text=self.run.config.train.end_of_text)


def find_tokenizers(runs: str | os.PathLike) -> dict[str, Path]:
    """Find the saved tokenizers in a folder of runs: those of the runs, and tokenizer folders beside them, by name."""
    folder = Path(runs)
    tokenizers = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        for candidate in (entry / "tokenizer", entry):
            if (candidate / "special_tokens.json").is_file():
                tokenizers[entry.name] = candidate
                break
    return tokenizers


def find_runs(runs: str | os.PathLike) -> dict[str, Path]:
    """Find the runs with a tokenizer and a checkpoint, also those of sweeps, by name; the newest comes first."""
    found = {}
    for pattern in ("*/checkpoints", "*/*/checkpoints"):
        for folder in Path(runs).glob(pattern):
            if (folder.parent / "tokenizer").is_dir() and (paths := checkpoint_paths(folder.parent)):
                found[folder.parent] = max(path.stat().st_mtime for path in paths)
    newest_first = sorted(found, key=lambda run: found[run], reverse=True)
    return {run.relative_to(runs).as_posix(): run for run in newest_first}


def find_published(data: str | os.PathLike) -> dict[str, Path]:
    """Find the rank files of published vocabularies, in a folder or in tiktoken's cache, by their names on the page."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = Path(tempfile.gettempdir()) / "data-gym-cache" if cache is None else Path(cache)
    found = {}
    for name, file_name, cached_name in PUBLISHED:
        for path in (Path(data) / f"{file_name}.tiktoken", folder / cached_name):
            if path.is_file():
                found.setdefault(name, path)
    return found


def how_to_get(data: str | os.PathLike) -> dict[str, str]:
    """For each published vocabulary, how to get it."""
    return {
        name: f"To compare with {name}, put {file_name}.tiktoken into the folder {os.fspath(data)}, or let tiktoken "
        f"get it once: python -c \"import tiktoken; tiktoken.get_encoding('{file_name}')\" (pip install tiktoken). "
        "Then reload the page."
        for name, file_name, _ in PUBLISHED
    }


class Choices:
    """The lists, read anew at each request for them, and what was loaded; methods may be called from several threads.

    Models are loaded when they are first used. `model` and `checkpoint` choose one: a name that is listed, None for the
    first, and a step, None for the newest. An unknown name is a KeyError.

    Args:
        runs: folder of runs, searched for tokenizers and models at every request that needs their list.
        first: runs that come first in the list, by their names on the page: folders, or loaded runs.
        others: more tokenizers for comparison, by their names on the page.
        data: folder that may have rank files of published vocabularies.

    Raises:
        InvalidInputError: a run of `first` has no tokenizer. If one vanishes later, it only leaves the lists.
    """

    def __init__(
        self,
        runs: str | os.PathLike,
        first: Mapping[str, Path | Run] | None = None,
        *,
        others: Mapping[str, Tokenizer] | None = None,
        data: str | os.PathLike = "data",
        device: str = "auto",
    ) -> None:
        self._runs, self._first, self._others, self._data, self._device = runs, first or {}, others or {}, data, device
        for run in self._first.values():
            _tokenizer_path(run)
        self._tokenizers: dict[str, tuple[Any, Tokenizer]] = {}
        self._models: dict[Any, LoadedModel] = {}
        self._lock = threading.Lock()

    def tokenizers(self) -> list[str]:
        """The names of all tokenizers."""
        return [*self._tokenizer_paths(), *self._others]

    def models(self) -> list[dict[str, Any]]:
        """For each model its name, its checkpoints, and whether it has a chat template."""
        described = []
        for name, run in self._all_runs().items():
            steps = [run.step] if isinstance(run, Run) else [checkpoint_step(path) for path in checkpoint_paths(run)]
            has_chat = (_tokenizer_path(run) / "chat_template.json").exists()
            described.append({"name": name, "checkpoints": steps, "chat": has_chat})
        return described

    def tokenizer(self, name: str) -> Tokenizer:
        """Load a tokenizer, or return it if it has not changed since.

        Raises:
            KeyError: the name is unknown.
            OSError, DamagedFileError: its files are missing or damaged.
        """
        if name in self._others:
            return self._others[name]
        with self._lock:
            path = self._tokenizer_paths()[name]
            # A run that was trained again may have another tokenizer under the same name.
            version = path, (path / "special_tokens.json" if path.is_dir() else path).stat().st_mtime_ns
            if self._tokenizers.get(name, (None,))[0] != version:
                self._tokenizers[name] = version, Tokenizer.load(path)
            return self._tokenizers[name][1]

    def model(self, name: str | None = None, checkpoint: int | None = None) -> LoadedModel:
        """Load a model, or return it if it is in memory.

        Raises:
            KeyError: the name is unknown.
            InvalidInputError: there is no model.
            OSError, BasicError: as `load_run`.
        """
        with self._lock:
            runs = self._all_runs()
            if not runs:
                raise InvalidInputError("there is no model yet; `basic quickstart` trains one")
            run = runs[next(iter(runs)) if name is None else name]
            version = None if isinstance(run, Run) else [path.stat().st_mtime_ns for path in checkpoint_paths(run)]
            key = name, checkpoint, str(version)
            self._models[key] = self._models.pop(key, None) or self._load(run, checkpoint)
            while len(self._models) > MAX_LOADED:  # the one that was used longest ago
                del self._models[next(iter(self._models))]
            return self._models[key]

    def _load(self, run: Path | Run, checkpoint: int | None) -> LoadedModel:
        loaded = run if isinstance(run, Run) else load_run(run, checkpoint=checkpoint, device=self._device)
        tokenizer = Tokenizer.load(_tokenizer_path(run))
        check_run_tokenizer(_tokenizer_path(run).parent, tokenizer.fingerprint)
        return LoadedModel(loaded, tokenizer)

    def _all_runs(self) -> dict[str, Path | Run]:
        first = {name: run for name, run in self._first.items() if _saved_tokenizer(run)}
        return {**first, **{name: run for name, run in find_runs(self._runs).items() if name not in first}}

    def _tokenizer_paths(self) -> dict[str, Path]:
        first = {name: path for name, run in self._first.items() if (path := _saved_tokenizer(run))}
        found = {name: path for name, path in find_tokenizers(self._runs).items() if name not in first}
        return {**first, **found, **find_published(self._data)}


def _saved_tokenizer(run: Path | Run) -> Path | None:
    path = run.tokenizer_path if isinstance(run, Run) else run / "tokenizer"
    return path if path is not None and path.is_dir() else None


def _tokenizer_path(run: Path | Run) -> Path:
    if (path := _saved_tokenizer(run)) is None:
        name = run if isinstance(run, Path) else "given"
        raise InvalidInputError(f"the run {name} has no tokenizer/ folder; choose a run that has one")
    return path
