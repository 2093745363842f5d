"""Batches of token ids: sequences of `context_length` tokens as inputs, and the same shifted by one token as targets.

A sequence that starts at `p` has the inputs `tokens[p : p + context_length]` and the targets
`tokens[p + 1 : p + context_length + 1]`. So `n` tokens have the starts `0 .. n - context_length - 1`. Only the tokens
of a batch are read, so a token file or dataset may be far larger than memory. Targets that a mask leaves out, and those
of padding, are `IGNORE_INDEX`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from basic.common.arguments import check_integer, id_array
from basic.common.errors import InvalidConfigError, InvalidInputError, WrongTokenizerError
from basic.common.progress import map_in_threads
from basic.tokens.index import Tokens
from basic.tokens.info import IS_LEARNED
from basic.tokens.opening import mapped_file
from basic.tokens.packed_documents import PackedDocuments, chunks, find_documents
from basic.tokens.shuffled_order import ShuffledWindows
from basic.transformer.functional import IGNORE_INDEX

_BATCHES_AHEAD = 2
_MAX_SCANNED_TOKENS = 1 << 30
"""Tokens without a sidecar are scanned before training if there are at most this many, which takes about a second."""


def get_batch(
    dataset: Tokens | Tensor | Sequence[int], batch_size: int, context_length: int, device: str | torch.device
) -> tuple[Int64[Tensor, " batch_size context_length"], Int64[Tensor, " batch_size context_length"]]:
    """Draw random sequences; all starts are equally likely and independent of each other.

    The starts come from torch's global generator, so `torch.manual_seed` makes them reproducible.

    Args:
        dataset: one-dimensional integer array of token ids, may be a memory map; or a tensor or list of ids.
        device: of the returned tensors; an unusable one raises torch's own error.

    Returns:
        Inputs and targets; the targets are the inputs shifted by one token.

    Raises:
        TypeError: the dataset is no array, or a size is not an integer.
        InvalidInputError: the dataset is not such an array, or has fewer than `context_length + 1` tokens.

    Source: assignment, section "Training loop", data loading.
    """
    dataset = id_array("dataset", dataset)
    num_starts = _count_starts(dataset, batch_size, context_length)
    # The remainder of a random number favors low starts: by up to 6 % with the bits that randint(num_starts) uses, by
    # an immeasurable amount with 63 bits.
    starts = torch.randint(2**63 - 1, (batch_size,)) % num_starts
    x, y = _shifted(dataset[starts.numpy()[:, None] + np.arange(context_length + 1)])
    return to_device(x, device), to_device(y, device)


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the copy to a GPU is asynchronous, so computation continues during it.

    An unusable device raises torch's own error.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        # Only pinned memory can be copied asynchronously. torch frees it after the copy has ended.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class BatchSampler:
    """Batches as a pure function of (seed, step), so that a resumed run sees the same data.

    Without `starts`, sequences start at random positions, drawn with replacement. With `starts`, sequences start only
    at these positions, and with `shuffled` only at multiples of the context length, behind an offset. With `packed`
    they are rows of complete documents (`basic.tokens.packed_documents`). Then each is seen once per epoch, in an order
    that is shuffled for every epoch; a batch may contain the end of one epoch and the start of the next. Validation
    uses the first steps of a sampler with another seed.

    Attributes:
        sequence_offset: with epochs, the batch of a step begins at sequence `step * batch_size + sequence_offset` of
            all epochs. It is not 0 in a run that is resumed with another batch size, so that it continues with the
            sequences that it has not seen.

    Args:
        tokens: one-dimensional integer array of token ids, may be a memory map.
        seed: >= 0; different seeds give independent batches.
        starts: positions at which sequences may start, such as those from `document_starts`.
        shuffled: see each window of the text once before any comes again; not together with `starts`.
        packed: `starts` are those of documents, which are packed into rows.
        mask: of the tokens (`basic.tokens.info.mask_path`): which of them are targets; None for all.
        vocab_size: ids of every batch are checked against it; None for no check.
        local_sequences: indices of the sequences of each batch that this rank computes; None for all of them.

    Raises:
        InvalidInputError: the tokens are not such an array, or too few for one sequence.
        InvalidConfigError: the seed is negative, or a size is below 1.
        ValueError: `starts` are no integers, or one is too close to the end for a sequence.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        context_length: int,
        *,
        seed: int,
        starts: np.ndarray | None = None,
        shuffled: bool = False,
        packed: bool = False,
        mask: np.ndarray | None = None,
        vocab_size: int | None = None,
        local_sequences: np.ndarray | None = None,
    ) -> None:
        tokens = id_array("tokens", tokens)
        self.num_starts = _count_starts(tokens, batch_size, 1 if packed else context_length)
        self.packed: PackedDocuments | None = None
        if starts is not None and packed:
            self.packed = PackedDocuments(starts, len(tokens), check_integer("context_length", context_length), seed)
        elif starts is not None:
            _check_starts(starts, self.num_starts)
        if check_integer("seed", seed) < 0:
            raise InvalidConfigError(f"{seed=} must not be negative")
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.starts = starts
        self.windows = ShuffledWindows(len(tokens), context_length, seed) if shuffled else None
        self.mask, self.vocab_size = mask, vocab_size
        self.local_sequences = local_sequences
        self.sequence_offset = 0
        self._shuffled_starts: dict[int, np.ndarray] = {}  # by epoch

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return a batch on the CPU: the arguments of `TransformerLM.loss`.

        Args:
            step: counted from 0.

        Returns:
            Inputs and targets, int64 (batch, context_length). With a mask or packed documents also the number of
            targets of the whole batch, divided by the number of ranks, float32 (). With packed documents also where
            the document of each input begins, int64 (batch, context_length).

        Raises:
            WrongTokenizerError: an id is not below `vocab_size`.
        """
        local = slice(None) if self.local_sequences is None else self.local_sequences
        if self.packed is not None:
            positions, document_starts = self.packed.rows(self._sequences(step))
        else:
            starts, document_starts = self.row_starts(step), None
            if self.mask is None:  # complete windows, all of whose targets count
                positions = starts[local, None] + np.arange(self.context_length + 1)
                ids = self.tokens[positions]
                self._check_ids(ids, positions)
                return _shifted(ids)
            positions = starts[:, None] + np.arange(self.context_length)
        is_target = positions >= 0
        if self.mask is not None:
            is_target &= self.mask[positions + 1] & IS_LEARNED > 0
        num_targets = is_target.sum() * len(positions[local]) / len(positions)  # 0 targets give the loss 0, not 0 / 0
        positions, is_target = positions[local], is_target[local]
        x = self.tokens[positions.clip(min=0)].astype(np.int64)
        y = np.where(is_target, self.tokens[positions + 1].astype(np.int64), IGNORE_INDEX)
        self._check_ids(x, positions.clip(min=0))
        self._check_ids(np.where(is_target, y, 0), positions + 1)
        batch = torch.from_numpy(x), torch.from_numpy(y), torch.tensor(max(num_targets, 1e-6), dtype=torch.float32)
        return batch if document_starts is None else (*batch, torch.from_numpy(document_starts[local]))

    def _check_ids(self, ids: np.ndarray, positions: np.ndarray) -> None:
        for index in (ids.argmin(), ids.argmax()) if self.vocab_size is not None else ():
            _check_id(int(ids.flat[index]), int(positions.flat[index]), self.vocab_size or 0)

    def _sequences(self, step: int) -> np.ndarray:
        """The numbers of the sequences of a step, through all epochs."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative: batches are counted from 0")
        first = step * self.batch_size + self.sequence_offset
        return np.arange(first, first + self.batch_size)

    def row_starts(self, step: int) -> np.ndarray:
        """Return the start positions of all sequences of a step, int64 (batch_size,)."""
        sequences = self._sequences(step)
        if self.packed is not None:
            return self.packed.rows(sequences)[0][:, 0]
        if self.windows is not None:
            return self.windows.starts(sequences)
        if self.starts is not None:
            return self._epoch_starts(self.starts, sequences)
        return np.random.default_rng([self.seed, step]).integers(self.num_starts, size=self.batch_size)

    def _epoch_starts(self, starts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        """Return a slice of the concatenated epochs, each of which is a permutation of `starts`."""
        epochs, indices = np.divmod(sequences, len(starts))
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            if epoch not in self._shuffled_starts:
                # A batch that crosses into this epoch also needs the previous one. Older epochs are dropped.
                self._shuffled_starts = {old: x for old, x in self._shuffled_starts.items() if old == epoch - 1}
                self._shuffled_starts[epoch] = np.random.default_rng([self.seed, epoch]).permutation(starts)
            chosen[epochs == epoch] = self._shuffled_starts[epoch][indices[epochs == epoch]]
        return chosen


@contextmanager
def read_ahead(sampler: BatchSampler, steps: range, device: torch.device) -> Generator[Iterator[tuple[Tensor, ...]]]:
    """Read the batches of some steps in a background thread and copy them to the device.

    Yields:
        An iterator over the batches; it raises what the thread raised. Leaving the block ends the thread.
    """

    def fetch(step: int) -> tuple[Tensor, ...]:
        return tuple(to_device(tensor, device) for tensor in sampler.batch(step))

    with closing(map_in_threads(fetch, steps, 1, most_waiting=_BATCHES_AHEAD)) as batches:
        yield batches


def document_starts(
    tokens: Tokens, separator_id: int | None, context_length: int, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return the positions of separators, where sequences may start so that they begin with a document.

    A sequence starts at the separator and not after it, so that the first token of the document is a target too.

    Args:
        tokens: one-dimensional integer array of token ids, may be a memory map.
        separator_id: id of the token between documents, such as that of `<|endoftext|>`.
        context_length: tokens per sequence; separators too close to the end for a sequence are left out.
        mask: of the tokens, if it says where documents begin; None for separators.

    Returns:
        int64 array, ascending.

    Raises:
        InvalidInputError: there is no such position.

    Examples:
        >>> document_starts(np.array([0, 5, 6, 0, 7, 8]), separator_id=0, context_length=2).tolist()
        [0, 3]
    """
    num_starts = max(len(tokens) - context_length, 0)
    starts = find_documents(tokens, separator_id, mask)
    starts = starts[starts < num_starts]
    if len(starts) == 0:
        raise InvalidInputError(
            f"token {separator_id}, the separator, is not in the first {num_starts} of {len(tokens)} tokens (a "
            f"sequence needs {context_length} more); check end_of_text, lower context_length, or set rows = windows"
        )
    return starts


def check_tokenizer_size(tokenizer_vocab_size: int, model_vocab_size: int, remedy: str) -> None:
    """Check that a model has an embedding for every id of a tokenizer.

    Raises:
        WrongTokenizerError: the tokenizer has more ids than the model.
    """
    if tokenizer_vocab_size > model_vocab_size:
        raise WrongTokenizerError(
            f"the tokenizer's {tokenizer_vocab_size} ids do not fit into the model's vocab_size={model_vocab_size}; "
            f"{remedy}"
        )


def check_token_ids(tokens: Tokens, vocab_size: int) -> None:
    """Check that a model has an embedding for every token, without reading a large file.

    The sidecar of a token file contains its largest id. Tokens without a sidecar are scanned, unless there are more
    than a billion of them. These, and damage to a file, are left to the check of each batch.

    Raises:
        WrongTokenizerError: an id is negative or not below `vocab_size`.
    """
    path, info = mapped_file(tokens)
    if info is not None:
        if (info.largest_id or 0) >= vocab_size:
            raise WrongTokenizerError(
                f"{path} has token ids up to {info.largest_id}, but the vocabulary has {vocab_size} (0 to "
                f"{vocab_size - 1}); set model.vocab_size to that of its tokenizer, {info.vocab_size}, or encode the "
                "text again with the right one"
            )
        return
    if not 0 < len(tokens) <= _MAX_SCANNED_TOKENS:
        return
    smallest_at = largest_at = 0
    for chunk in chunks(len(tokens)):
        smallest_at = min(smallest_at, chunk.start + int(tokens[chunk].argmin()), key=tokens.__getitem__)
        largest_at = max(largest_at, chunk.start + int(tokens[chunk].argmax()), key=tokens.__getitem__)
    for position in (smallest_at, largest_at):
        _check_id(int(tokens[position]), position, vocab_size)


def check_learned(mask: np.ndarray) -> None:
    """Check that training can learn a token: that one after the first, which is never a target, is learned.

    Raises:
        InvalidInputError: none is learned.
    """
    targets = mask[1:]
    if not any((targets[chunk] & IS_LEARNED).any() for chunk in chunks(len(targets))):
        raise InvalidInputError(
            f"the mask of these {len(mask)} tokens has none that is learned, so every loss would be 0; give "
            "conversations with answers of the assistant (`basic encode --chat`), or another part of the file"
        )


def _check_id(token_id: int, position: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise WrongTokenizerError(
            f"token id {token_id} at position {position} is not in the vocabulary of {vocab_size} ids "
            f"(0 to {vocab_size - 1}); these tokens were made by another tokenizer, opened with another dtype, or "
            "damaged: encode the text again"
        )


def _shifted(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64: the first ids of each window, and the last."""
    windows = windows.astype(np.int64)
    x, y = (np.ascontiguousarray(half) for half in (windows[:, :-1], windows[:, 1:]))
    return torch.from_numpy(x), torch.from_numpy(y)


def _count_starts(tokens: Tokens, batch_size: int, context_length: int) -> int:
    """Check the sizes and count the positions at which a sequence may start."""
    batch_size = check_integer("batch_size", batch_size)
    context_length = check_integer("context_length", context_length)
    if batch_size < 1 or context_length < 1:
        raise InvalidConfigError(f"{batch_size=} and {context_length=} must be at least 1")
    if len(tokens) <= context_length:
        raise InvalidInputError(
            f"the dataset has {len(tokens)} tokens, but {context_length=} needs at least {context_length + 1} "
            "(a sequence and the token after it); give more text or a shorter context"
        )
    return len(tokens) - context_length


def _check_starts(starts: np.ndarray, num_starts: int) -> None:
    if starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) == 0:
        raise ValueError(
            f"starts must be a one-dimensional, non-empty array of integers, got {starts.dtype} of shape {starts.shape}"
        )
    if starts.min() < 0 or starts.max() >= num_starts:
        raise ValueError(
            f"starts go from {starts.min()} to {starts.max()}, but a sequence and the token after it fit only at 0 to "
            f"{num_starts - 1}"
        )
