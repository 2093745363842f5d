"""Tokenizers with kernels."""

from __future__ import annotations

import pytest

from basic.bytes_utils import load_merges, load_vocab
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.difficult_text import END, OVERLAPPING


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    vocab, merges = shared_data("gpt2_vocab.json"), shared_data("gpt2_merges.txt")
    return Tokenizer(load_vocab(vocab), load_merges(merges), [END], kernels=True)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    return train_bpe(SAMPLE, 600, OVERLAPPING, kernels=False)


@pytest.fixture(scope="module")
def pair(trained) -> tuple[Tokenizer, Tokenizer]:
    """The same tokenizer with and without kernels."""
    return Tokenizer(*trained, OVERLAPPING, kernels=True), Tokenizer(*trained, OVERLAPPING, kernels=False)
