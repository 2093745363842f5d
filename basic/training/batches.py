"""From token ids on the disk to batches: rows of `context_length` ids, and the same rows one token later.

A row that starts at `p` is `x = tokens[p : p + context_length]` with `y = tokens[p + 1 : p + context_length + 1]`,
so the starts of `n` tokens are `0 .. n - context_length - 1`. Only the rows of a batch are ever read, so the
tokens may be a memory map far larger than memory, or the many files of an index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from basic.tokens.index import Tokens
from basic.tokens.opening import mapped_file

# Tokens looked at together when a whole file is scanned: a few MB, whatever the size of the file.
_SCAN_TOKENS = 1 << 22
# Up to so many tokens without a sidecar are read whole before training: about a second.
_MOST_SCANNED_TOKENS = 1 << 30


def get_batch(
    dataset: Tokens, batch_size: int, context_length: int, device: str | torch.device
) -> tuple[Int64[Tensor, " batch_size context_length"], Int64[Tensor, " batch_size context_length"]]:
    """Draw rows at random, every possible start equally likely and independent of the others.

    The starts come from torch's global generator, so `torch.manual_seed` repeats them.

    Args:
        dataset: one-dimensional integer array of token ids, also a memory map.
        batch_size: number of rows.
        context_length: tokens a row.
        device: where the tensors shall be; an unusable one raises torch's own error.

    Returns:
        Inputs and targets; the targets are the inputs shifted by one token.

    Raises:
        ValueError: the dataset is not such an array, or has no `context_length + 1` tokens.

    Source: assignment, section "Training loop", data loading.
    """
    num_starts = _count_starts(dataset, batch_size, context_length)
    # A remainder of few random bits favours the low starts, by 6 % in the worst case if left to randint(num_starts);
    # of 63 bits, by nothing that could be measured.
    starts = torch.randint(2**63 - 1, (batch_size,)) % num_starts
    x, y = _rows(dataset, starts.numpy(), context_length)
    return to_device(x, device), to_device(y, device)


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Send a CPU tensor to a device; to a GPU without waiting for it, so that the copy runs beside the computation.

    An unusable device raises torch's own error.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        # Only pinned memory can be copied in the background; torch keeps it until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class BatchSampler:
    """Batches as a pure function of (seed, step): a resumed run sees the same data without any saved state.

    Without `starts`, every row is a random window, drawn with replacement. With `starts`, rows begin at these
    positions only, each once an epoch in an order shuffled anew for every epoch; a batch that reaches the end of
    an epoch goes on with the next. Fixed validation batches are the first steps of a sampler of their own.

    Args:
        tokens: one-dimensional integer array of token ids, also a memory map.
        batch_size: rows a batch.
        context_length: tokens a row.
        seed: non-negative; other seeds give independent batches.
        starts: allowed first positions of rows, such as those of `document_starts`.
        vocab_size: every batch is checked to have no id beyond it; None for no check.
        own_rows: which rows of every batch are wanted here, as others compute the rest; None for all.

    Raises:
        ValueError: too few tokens for one row, a start that leaves no room for its row, or a negative seed.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        context_length: int,
        *,
        seed: int,
        starts: np.ndarray | None = None,
        vocab_size: int | None = None,
        own_rows: np.ndarray | None = None,
    ) -> None:
        self.num_starts = _count_starts(tokens, batch_size, context_length)
        if starts is not None:
            _check_starts(starts, self.num_starts)
        if seed < 0:
            raise ValueError(f"{seed=} must not be negative")
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.starts = starts
        self.vocab_size = vocab_size
        self.own_rows = own_rows
        self._orders: dict[int, np.ndarray] = {}

    def batch(
        self, step: int
    ) -> tuple[Int64[Tensor, " batch_size context_length"], Int64[Tensor, " batch_size context_length"]]:
        """Inputs and targets of a step, counted from 0, on the CPU; the same at every call, in any order."""
        starts = self.row_starts(step)
        if self.own_rows is not None:
            starts = starts[self.own_rows]
        x, y = _rows(self.tokens, starts, self.context_length)
        if self.vocab_size is not None:
            _check_rows(x, starts, self.vocab_size)
            _check_rows(y[:, -1:], starts + self.context_length, self.vocab_size)
        return x, y

    def row_starts(self, step: int) -> np.ndarray:
        """The positions at which all rows of a step begin, int64 (batch_size,)."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative: batches are counted from 0")
        if self.starts is not None:
            return self._shuffled(self.starts, step)
        return np.random.default_rng([self.seed, step]).integers(self.num_starts, size=self.batch_size)

    def _shuffled(self, starts: np.ndarray, step: int) -> np.ndarray:
        """The starts of a step, cut from the endless row of all epochs' orders laid end to end."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, len(starts))
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            if epoch not in self._orders:
                # A batch that crosses into an epoch needs the order of the one before as well; older ones go.
                self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(starts)
            chosen[epochs == epoch] = self._orders[epoch][places[epochs == epoch]]
        return chosen


@contextmanager
def prefetch(
    sampler: BatchSampler, steps: range, device: torch.device, *, ahead: int = 2
) -> Generator[Iterator[tuple[Tensor, Tensor]]]:
    """The batches of some steps on the device, cut and sent by a thread while the steps before are computed.

    Args:
        ahead: batches that may be waiting.

    Yields:
        An iterator over the batches; a failure of the thread is raised by it. Leaving the block ends the thread.
    """
    with ThreadPoolExecutor(1, "prefetch") as thread:
        waiting: deque[Future] = deque()

        def fetch(step: int) -> tuple[Tensor, Tensor]:
            x, y = sampler.batch(step)
            return to_device(x, device), to_device(y, device)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for step in steps:
                waiting.append(thread.submit(fetch, step))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield batches()
        finally:
            for future in waiting:
                future.cancel()


def document_starts(tokens: Tokens, separator_id: int, context_length: int) -> np.ndarray:
    """Positions where a row may begin so that its first token is the separator before a document.

    A row begins at the separator, not after it, so that the first token of the document is a target too.

    Args:
        tokens: one-dimensional integer array of token ids, also a memory map; scanned in pieces.
        separator_id: id of the token between documents, such as that of `<|endoftext|>`.
        context_length: tokens a row; a separator too near the end for a row is left out.

    Returns:
        int64 array, ascending.

    Raises:
        ValueError: there is no such position.

    Example:
        >>> document_starts(np.array([0, 5, 6, 0, 7, 8]), separator_id=0, context_length=2).tolist()
        [0, 3]
    """
    num_starts = max(len(tokens) - context_length, 0)
    pieces = [
        begin + np.flatnonzero(tokens[begin : min(begin + _SCAN_TOKENS, num_starts)] == separator_id)
        for begin in range(0, num_starts, _SCAN_TOKENS)
    ]
    starts = np.concatenate([np.empty(0, np.int64), *pieces])
    if len(starts) == 0:
        raise ValueError(
            f"token {separator_id} does not occur in the {len(tokens)} tokens with {context_length} more after it; "
            "check the separator, shorten the context, or use random windows"
        )
    return starts


def check_token_ids(tokens: Tokens, vocab_size: int) -> None:
    """Make sure that a model of this vocabulary can embed the tokens, without reading a large file.

    A token file says in its sidecar which id is its largest. Other tokens are read once, in pieces, unless there are
    more than a billion of them; those are left to the check of each batch, as is damage to a file.

    Args:
        tokens: one-dimensional integer array of token ids, also a memory map.
        vocab_size: number of ids the model knows.

    Raises:
        ValueError: an id is negative or not below `vocab_size`; the smallest or largest is named with its position.
    """
    path, info = mapped_file(tokens)
    if info is not None:
        if (info.largest_id or 0) >= vocab_size:
            raise ValueError(
                f"{path} has token ids up to {info.largest_id}, but the vocabulary has {vocab_size} (0 to "
                f"{vocab_size - 1}); set model.vocab_size to that of its tokenizer, {info.vocab_size}, or encode the "
                "text again with the right one"
            )
        return
    if not 0 < len(tokens) <= _MOST_SCANNED_TOKENS:
        return
    smallest_at = largest_at = 0
    for begin in range(0, len(tokens), _SCAN_TOKENS):
        piece = tokens[begin : begin + _SCAN_TOKENS]
        smallest_at = min(smallest_at, begin + int(piece.argmin()), key=tokens.__getitem__)
        largest_at = max(largest_at, begin + int(piece.argmax()), key=tokens.__getitem__)
    for position in (smallest_at, largest_at):
        _check_id(int(tokens[position]), position, vocab_size)


def _check_rows(rows: Tensor, starts: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError if a row, whose first token stands at its start in the file, has an id that no model knows."""
    smallest, largest = rows.aminmax()
    if smallest >= 0 and largest < vocab_size:
        return
    for place in (int(rows.argmin()), int(rows.argmax())):
        row, offset = divmod(place, rows.shape[1])
        _check_id(int(rows[row, offset]), int(starts[row]) + offset, vocab_size)


def _check_id(token_id: int, position: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise ValueError(
            f"token id {token_id} at position {position} is not in the vocabulary of {vocab_size} ids "
            f"(0 to {vocab_size - 1}); these tokens were made by another tokenizer, opened with another dtype, or "
            "damaged: encode the text again"
        )


def _rows(
    tokens: Tokens, starts: np.ndarray, context_length: int
) -> tuple[Int64[Tensor, " rows context_length"], Int64[Tensor, " rows context_length"]]:
    windows = tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64)
    x, y = windows[:, :-1], windows[:, 1:]
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))


def _count_starts(tokens: Tokens, batch_size: int, context_length: int) -> int:
    """The number of positions at which a row may start; raises ValueError if there is none."""
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be a one-dimensional array of integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"{batch_size=} and {context_length=} must be at least 1")
    if len(tokens) <= context_length:
        raise ValueError(
            f"the dataset has {len(tokens)} tokens, but {context_length=} needs at least {context_length + 1} "
            "(a row and the token after it); give more text or a shorter context"
        )
    return len(tokens) - context_length


def _check_starts(starts: np.ndarray, num_starts: int) -> None:
    if starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) == 0:
        raise ValueError(
            f"starts must be a one-dimensional, non-empty array of integers, got {starts.dtype} of shape {starts.shape}"
        )
    if starts.min() < 0 or starts.max() >= num_starts:
        raise ValueError(
            f"starts go from {starts.min()} to {starts.max()}, but a row and the token after it fit only at 0 to "
            f"{num_starts - 1}"
        )
