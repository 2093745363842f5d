"""A corpus in several files, and executors for its tasks."""

from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from basic.encoding import encode_file
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from tests.fixtures.make_tokenizer_fixtures import SAMPLE

END = "<|endoftext|>"
SPECIAL = SpecialTokens([END])
TEXT = SAMPLE.read_bytes().decode()


class Inline(Executor):
    """Runs each task in `submit`; after some tasks it stops as Ctrl-C does."""

    def __init__(self, num_tasks: float = float("inf")) -> None:
        self.left, self.names = num_tasks, []

    def submit(self, fn, /, *args, **kwargs):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.names.append(Path(args[-1]).name)
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def encoded(tokenizer: Tokenizer, inputs: list[Path], folder: Path) -> np.ndarray:
    encode_file(tokenizer, inputs, folder / "alone.bin")
    return open_tokens(folder / "alone.bin")


def flip_a_bit(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
