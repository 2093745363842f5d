"""The tokenizer: text to ids and back, with the merges that `basic.train_bpe` learned or GPT-2's own."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from basic.atomic_file import atomic_paths
from basic.bytes_utils import (
    decode_blocks,
    file_size_bytes,
    load_json,
    load_merges,
    load_vocab,
    progress_bar,
    read_blocks,
    save_merges,
    save_vocab,
)
from basic.pretokenization import SpecialTokens, pretoken_batches, without_surrogates
from basic.token_files import TokenFileInfo, TokenFileWriter

# Half a megabyte of cached words, of everyday length: memory stays flat on a text without end.
_CACHE_WORDS = 3072
_CACHE_WORD_CHARACTERS = 32

# Up to here the simple loop is the faster one.
_SHORT_WORD_BYTES = 64

Pair = tuple[int, int]
_NO_ID = -1  # where a word ends, and where an id has become part of the one to its left

_FILES = ("vocab.json", "merges.txt", "special_tokens.json")


class Tokenizer:
    """Byte-pair encoding over bytes, with special tokens.

    Text is cut at the special tokens, then into pre-tokens; inside each, the merge that comes first in `merges`
    is applied wherever it can be, until none can.

    Args:
        vocab: id to bytes; any ids, in any order, also with gaps; not changed. Bytes that stand under several
            ids are encoded as the smallest.
        merges: pairs of tokens, the earliest first; of equal ones the first counts.
        special_tokens: strings that become one token each and are never split; of several that begin at the
            same place the longest. One whose bytes are in the vocabulary has that id; the others get the ids
            after the largest, in the order given.

    Attributes:
        vocab: id to bytes, with the special tokens.
        merges: as given.
        special_token_ids: special token to id, in the order given.
        vocab_size: the largest id plus one: the rows that an embedding of these ids needs.

    Raises:
        TypeError: an argument holds something else than is asked for.
        ValueError: an id is negative, a special token is empty or given twice, or a merge has a part or a
            result that is not in the vocabulary.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Iterable[str] | None = None,
    ) -> None:
        self._special = SpecialTokens(special_tokens)
        self.vocab = dict(vocab)
        self.merges = list(merges)
        ids: dict[bytes, int] = {}
        for token_id, token in sorted(self.vocab.items()):
            if not isinstance(token_id, int) or not isinstance(token, bytes):
                raise TypeError(f"vocab must map ints to bytes, but has {token_id!r}: {token!r}")
            if token_id < 0:
                raise ValueError(f"vocab has the id {token_id}; ids must be at least 0")
            ids.setdefault(token, token_id)
        self._words = _WordIds(ids, self.merges)
        self.special_token_ids: dict[str, int] = {}
        next_id = max(self.vocab, default=-1) + 1
        for special_token in self._special.tokens:
            token = special_token.encode()
            if token not in ids:
                ids[token] = next_id
                self.vocab[next_id] = token
                next_id += 1
            self.special_token_ids[special_token] = ids[token]
        self.vocab_size = max(self.vocab, default=-1) + 1

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, "
            f"special_tokens={list(self.special_token_ids)})"
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides which ids a text gets; equal after saving and loading."""
        content = [
            [[token_id, self.vocab[token_id].hex()] for token_id in sorted(self.vocab)],
            [[left.hex(), right.hex()] for left, right in self.merges],
            sorted(self.special_token_ids.items()),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Lone surrogates, which have no UTF-8 form, are encoded as U+FFFD.

        Raises:
            TypeError: `text` is not a string.
            ValueError: the text needs a byte that the vocabulary lacks.
        """
        return list(chain.from_iterable(self._encode_batches([text])))

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """The ids of a text that comes in pieces (the lines of an open file, say), one by one.

        They equal the ids of the joined text wherever the pieces are cut. Memory is bounded by the longest
        piece, the longest pre-token and a cache of fixed size.

        Raises:
            TypeError: a piece is not a string.
            ValueError: the text needs a byte that the vocabulary lacks.
        """
        return chain.from_iterable(self._encode_batches(iterable))

    def encode_file(
        self, input_path: str | os.PathLike, output_path: str | os.PathLike, *, progress: bool = False
    ) -> TokenFileInfo:
        """Encode a text file of any size into a token file, in bounded memory.

        Args:
            input_path: a text file in UTF-8.
            output_path: of the token file, `*.bin`; it and its sidecar appear when they are complete.
            progress: whether to show a progress bar.

        Returns:
            What the sidecar says, with `source_bytes`, the size of the text file.

        Raises:
            ValueError: the text is not UTF-8 (the byte offset is named), or needs a byte that the vocabulary
                lacks; or both paths are the same file.
            OSError: a file cannot be read or written.
        """
        size = file_size_bytes(input_path)
        if os.path.exists(output_path) and os.path.samefile(input_path, output_path):
            raise ValueError(f"{os.fspath(output_path)!r} is the text itself; give another output_path")
        with (
            TokenFileWriter(output_path, self.vocab_size, tokenizer_fingerprint=self.fingerprint) as writer,
            progress_bar(progress, desc="encoding", total=size, unit="B", unit_scale=True) as advance,
        ):

            def blocks() -> Iterator[bytes]:
                for block in read_blocks(input_path):
                    writer.write((), source_bytes=len(block))
                    advance(len(block))
                    yield block

            for ids in self._encode_batches(decode_blocks(blocks(), input_path)):
                writer.write(ids)
        return writer.info

    def _encode_batches(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        for pretokens, special_token in pretoken_batches(without_surrogates(pieces), self._special):
            ids = list(chain.from_iterable(map(self._words.__getitem__, pretokens)))
            if special_token is not None:
                ids.append(self.special_token_ids[special_token])
            yield ids

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
        """The text of ids (a list, an array, any iterable); bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes of ids, which need not be whole characters.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        try:
            return b"".join([self.vocab[token_id] for token_id in ids])
        except (KeyError, TypeError):
            position, wrong = next(
                (i, x) for i, x in enumerate(ids) if not isinstance(x, int | np.integer) or x not in self.vocab
            )
            raise ValueError(
                f"id {wrong!r} at position {position} is not in the vocabulary, whose largest id is "
                f"{self.vocab_size - 1}; are these the ids of another tokenizer?"
            ) from None

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike,
        merges_filepath: str | os.PathLike,
        special_tokens: Iterable[str] | None = None,
    ) -> Tokenizer:
        """A tokenizer from GPT-2's two files, `vocab.json` and `merges.txt`.

        Raises:
            ValueError: a file is damaged (the line is named), or the files do not fit each other.
            OSError: a file cannot be read.
        """
        return cls(load_vocab(vocab_filepath), load_merges(merges_filepath), special_tokens)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer to a folder, made if need be: `vocab.json`, `merges.txt`, `special_tokens.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_paths(*(directory / name for name in _FILES)) as (vocab, merges, special_tokens):
            save_vocab(self.vocab, vocab)
            save_merges(self.merges, merges)
            special_tokens.write_text(json.dumps(list(self.special_token_ids)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer that was saved to a folder, special tokens included.

        Raises:
            ValueError: a file is damaged.
            OSError: a file is missing or cannot be read.
        """
        vocab_path, merges_path, special_tokens_path = (Path(directory) / name for name in _FILES)
        if not special_tokens_path.exists():
            raise FileNotFoundError(
                f"{os.fspath(directory)!r} is not the folder of a saved tokenizer: it has no {_FILES[2]}; save one "
                "there (local/train_bpe.py does), or read GPT-2's two files with from_files"
            )
        special_tokens = load_json(special_tokens_path)
        if not isinstance(special_tokens, list):
            raise ValueError(f"{str(special_tokens_path)!r} must hold a JSON list of strings")
        return cls.from_files(vocab_path, merges_path, special_tokens)


class _WordIds(dict[str, tuple[int, ...]]):
    """The ids of each word, worked out where it is first looked up, and kept while there is room.

    Args:
        ids: of the tokens.
        merges: pairs of tokens, the earliest first.
    """

    def __init__(self, ids: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> None:
        self._byte_ids = {byte: ids[bytes([byte])] for byte in range(256) if bytes([byte]) in ids}
        self._ranks: dict[Pair, int] = {}
        self._results: list[int] = []  # by rank
        for rank, merge in enumerate(merges):
            try:
                left, right = merge
                pair, result = (ids[left], ids[right]), ids[left + right]
            except (KeyError, TypeError, ValueError):
                raise _merge_error(rank, merge, ids) from None
            self._ranks.setdefault(pair, rank)
            self._results.append(result)

    def __missing__(self, word: str) -> tuple[int, ...]:
        try:
            ids = [self._byte_ids[byte] for byte in word.encode()]
        except KeyError as error:
            raise ValueError(
                f"the vocabulary has no token for the byte 0x{error.args[0]:02x}, which {word[:40]!r} needs; "
                "train the tokenizer with all 256 bytes"
            ) from None
        merge_word = merge_short_word if len(ids) <= _SHORT_WORD_BYTES else merge_long_word
        encoded = tuple(merge_word(ids, self._ranks, self._results))
        if len(word) <= _CACHE_WORD_CHARACTERS:
            if len(self) >= _CACHE_WORDS:
                self.clear()
            self[word] = encoded
        return encoded


def _merge_error(rank: int, merge: tuple[bytes, bytes], ids: dict[bytes, int]) -> Exception:
    """What is wrong with a merge."""
    if not (isinstance(merge, tuple | list) and len(merge) == 2 and all(isinstance(part, bytes) for part in merge)):
        return TypeError(f"merge {rank} must be a pair of bytes, got {merge!r}")
    left, right = merge
    missing = next(token for token in (left, right, left + right) if token not in ids)
    return ValueError(f"merge {rank}, {merge!r}, needs the token {missing!r}, which is not in the vocabulary")


def merge_short_word(ids: list[int], ranks: dict[Pair, int], results: list[int]) -> list[int]:
    """Apply merges to a word: the earliest wherever it can be, from left to right, again and again until none can.

    Takes time quadratic in the length of the word, yet nothing is faster for the length of everyday words.

    Args:
        ids: of the tokens of the word; changed.
        ranks: the place of each pair of ids in the list of merges.
        results: the id that each merge makes, by rank.

    Returns:
        The ids after all merges.
    """
    none = len(results)
    pair_ranks = [ranks.get(pair, none) for pair in pairwise(ids)]
    while pair_ranks and (rank := min(pair_ranks)) < none:
        while rank in pair_ranks:
            i = pair_ranks.index(rank)
            ids[i : i + 2] = [results[rank]]
            del pair_ranks[i]
            if i > 0:
                pair_ranks[i - 1] = ranks.get((ids[i - 1], ids[i]), none)
            if i < len(pair_ranks):
                pair_ranks[i] = ranks.get((ids[i], ids[i + 1]), none)
    return ids


def merge_long_word(ids: list[int], ranks: dict[Pair, int], results: list[int]) -> list[int]:
    """The same, in time that hardly grows faster than the word.

    The places of the pairs are kept by rank, and the ranks in a heap. A merge puts its result into the place of
    the left id, and `right_of` and `left_of` lead past the place of the right one. Places at which the pair is no
    more are not looked for, but passed over.
    """
    right_of, left_of = list(range(1, len(ids) + 1)), list(range(-1, len(ids)))
    ids.append(_NO_ID)  # right of the last place and, as ids[-1], left of the first
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(pairwise(ids)):
        if (rank := ranks.get(pair)) is not None:
            places.setdefault(rank, []).append(place)
    heap = list(places)
    heapq.heapify(heap)
    while heap:
        rank = heapq.heappop(heap)
        result = results[rank]
        for place in sorted(places.pop(rank)):
            right = right_of[place]
            if ranks.get((ids[place], ids[right])) != rank:
                continue
            ids[place], ids[right] = result, _NO_ID
            before, after = left_of[place], right_of[right]
            right_of[place], left_of[after] = after, place
            for new_place, pair in ((before, (ids[before], result)), (place, (result, ids[after]))):
                if (new_rank := ranks.get(pair)) is None:
                    continue
                if new_rank not in places:
                    places[new_rank] = []
                    heapq.heappush(heap, new_rank)
                places[new_rank].append(new_place)
    return [token_id for token_id in ids if token_id != _NO_ID]
