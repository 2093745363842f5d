"""Strings that break programs (the Big List of Naughty Strings) as the names of files, folders and runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from basic.analysis.plotting import plot_losses
from basic.common.errors import InvalidInputError
from basic.corpus.sources import TextSource
from basic.encoding import encode_file
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run
from tests.conftest import shared_data
from tests.helpers.fault_tools import TRAIN, VALID, configuration
from tests.helpers.tokenizer_tools import BYTES

# Files are written under longer names first, and a file system has a limit (255 bytes).
MAX_BYTES = 200


@pytest.fixture(scope="module")
def names() -> list[str]:
    strings = json.loads(shared_data("naughty_strings.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(text for text in strings if "/" not in text and text not in ("", ".", ".."))
    return [name for name in names if len(name.encode()) <= MAX_BYTES]


def test_a_name_is_used_as_it_is_or_refused(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(configuration(steps=2, eval_interval=1), TRAIN, VALID, "run")
    tokenizer = Tokenizer(BYTES, [])

    def use_as_text(name: str) -> None:
        (Path("texts") / name).write_text("hello")
        encode_file(tokenizer, f"texts/{name}", f"tokens/{name}")
        assert open_tokens(f"tokens/{name}", verify=True)[:].tolist() == list(b"hello")

    def use_as_tokenizer(name: str) -> None:
        tokenizer.save(f"tokenizers/{name}")
        assert Tokenizer.load(f"tokenizers/{name}").fingerprint == tokenizer.fingerprint

    def use_as_run(name: str) -> None:
        shutil.copytree("run", f"runs/{name}")
        assert load_run(f"runs/{name}", device="cpu").step == 2

    for folder in ("texts", "tokens", "tokenizers", "runs"):
        os.mkdir(folder)
    for name in names:
        use_as_text(name)
        use_as_tokenizer(name)
        use_as_run(name)
    for name, message in (
        ("a\0b", "cannot be a path: it has a NUL"),
        ("a\ud800", "cannot be"),
        (300 * "x", "too long"),
    ):
        with pytest.raises((InvalidInputError, OSError), match=message):
            encode_file(tokenizer, "texts/undefined", f"tokens/{name}")
        with pytest.raises((InvalidInputError, OSError), match=message):
            tokenizer.save(f"tokenizers/{name}")
        with pytest.raises((InvalidInputError, OSError), match=message):
            encode_file(tokenizer, name, "tokens/new")
        with pytest.raises((InvalidInputError, OSError), match=message):
            train(configuration(steps=2), TRAIN, VALID, name)
    plot_losses(dict.fromkeys(names[:60], read_metrics("run/metrics.jsonl")), tmp_path / "losses.svg")


def test_only_a_name_that_begins_like_a_url_is_one():
    assert all(TextSource(url).is_remote for url in ("https://a/b", "s3://a", "simplecache::gs://a/b.txt"))
    assert not any(TextSource(path).is_remote for path in ("texts/<a href=http://a>", "./http://a", "a b://c"))
