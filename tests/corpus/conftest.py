"""A corpus and a tokenizer for all tests of this folder."""

import gzip
import json
from pathlib import Path

import pytest

from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.corpus_tools import END, TEXT


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Files of every kind, one of them twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "plain.txt").write_text(TEXT * 3, newline="")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(TEXT[::-1].encode()))
    lines = [json.dumps({"text": document}) for document in TEXT.split("\n")]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    (folder / "empty.txt").touch()
    names = ("plain.txt", "packed.txt.gz", "empty.txt", "lines.jsonl", "plain.txt")
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(*train_bpe(SAMPLE, 400, [END], kernels=False), [END], kernels=False)
