"""A tokenizer for tests whose token ids mean nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from basic.bpe.stream_decoder import StreamDecoder

END = 0


class NumberTokenizer:
    """A tokenizer of numbers: the text "3 4" is [3, 4], and <|endoftext|> is END."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.special_token_ids = {"<|endoftext|>": END}

    def encode(self, text: str) -> list[int]:
        return [END if word == "<|endoftext|>" else int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(lambda ids: self.decode(ids).encode())

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir()
        (Path(directory) / "vocab_size.txt").write_text(str(self.vocab_size))
