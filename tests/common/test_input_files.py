"""A pipe, a socket, a device or a folder in place of a file is refused in one line: nothing waits, nothing misleads."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from basic.analysis.sweep import read_sweep
from basic.bytes_utils import load_merges, load_vocab
from basic.common.config_files import load_config
from basic.corpus.sources import read_text
from basic.corpus.train_valid import split_text
from basic.encoding import encode_file
from basic.formats.import_model import import_pt
from basic.formats.tokenizers import load_tiktoken
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.tokenizer_json import read_tokenizer_json
from basic.tokens.opening import open_tokens, read_info
from basic.train_bpe import train_bpe
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run_config
from basic.training.settings import RunConfig

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")

BYTES = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG: Any = SimpleNamespace(data=SimpleNamespace(tokenizer=""))  # not used otherwise

READERS: dict[str, Callable[[Path], Any]] = {
    "a.bin": lambda path: open_tokens(path, dtype="uint16"),
    "b.bin": lambda path: open_tokens(path),
    "c.npy": lambda path: open_tokens(path),
    "d.json": lambda path: read_info(path.with_suffix(".bin")),
    "vocab.json": load_vocab,
    "merges.txt": load_merges,
    "special_tokens.json": lambda path: Tokenizer.load(path.parent),
    "config.toml": lambda path: load_config(path, RunConfig),
    "sweep.toml": read_sweep,
    "metrics.jsonl": read_metrics,
    "text.txt": lambda path: train_bpe(path, 300, []),
    "text.jsonl": lambda path: encode_file(BYTES, path, path.with_suffix(".bin")),
    "text.gz": lambda path: list(read_text(path)),
    "split.txt": lambda path: split_text(path, path.parent),
    "ranks.tiktoken": lambda path: load_tiktoken(path, pattern="gpt2"),
    "tokenizer.json": read_tokenizer_json,
    "weights.pt": lambda path: import_pt(path, path.parent / "run", CONFIG),
}


@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    with pytest.raises(OSError, match=rf"{name}' is not a regular file"):
        READERS[name](Path(name).absolute())
    os.unlink(name)
    os.symlink("/dev/zero", name)
    with pytest.raises(OSError, match=rf"{name}' is not a regular file"):
        READERS[name](Path(name).absolute())


def test_a_run_whose_configuration_is_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("config.toml")
        with pytest.raises(FileNotFoundError, match="is not a run: it has no"):
            load_run_config(Path())


@pytest.mark.parametrize("name", ["vocab.json", "config.toml", "metrics.jsonl", "tokenizer.json", "text.txt"])
def test_a_folder_is_not_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=rf"{name}' is a folder: give the path of one file"):
        READERS[name](tmp_path / name)
