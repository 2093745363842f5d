"""The tokenizer: text to ids and back, with the merges that `basic.train_bpe` learned or GPT-2's own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from basic.bpe import arrays, compiled, loading
from basic.bpe.plain import PretokenCache
from basic.bytes_utils import decode_blocks, invalid_byte_error, load_merges, load_vocab, save_merges, save_vocab
from basic.common.files import atomic_paths, atomic_write, load_json
from basic.common.progress import default_num_workers
from basic.pretokenization import (
    GPT2_PATTERN,
    SpecialTokens,
    chunks_of_array,
    compile_pattern,
    pattern_name,
    pretokenize,
    pretokenize_stream,
    without_surrogates,
)
from basic.tokens.info import token_dtype

_FILES = ("vocab.json", "merges.txt", "special_tokens.json")
_PATTERN_FILE = "pattern.json"
_NO_SPECIALS = SpecialTokens(())

# Calling a kernel takes two microseconds: for a word or two the plain path is faster. Where there are no kernels, a
# text of many characters is streamed, so that there is never a list of all its words.
_FEW_CHARACTERS, _MANY_CHARACTERS = 6, 1 << 14


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
        pattern: finds the pre-tokens: "gpt2", "cl100k", "o200k", or another in the syntax of the `regex` package;
            GPT-2's by default, for which alone there is a compiled scanner.
        kernels: whether to use compiled code; by default for large texts, and for all once it is loaded. The ids are
            the same.

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
        *,
        pattern: str | None = None,
        kernels: bool | None = None,
    ) -> None:
        self.special_tokens = SpecialTokens(special_tokens)
        self.compiled_pattern = compile_pattern(pattern)
        self.kernels = kernels
        self.vocab = dict(vocab)
        self.merges = list(merges)
        ids: dict[bytes, int] = {}
        for token_id, token in sorted(self.vocab.items()):
            if not isinstance(token_id, int) or not isinstance(token, bytes):
                raise TypeError(f"vocab must map ints to bytes, but has {token_id!r}: {token!r}")
            if token_id < 0:
                raise ValueError(f"vocab has the id {token_id}; ids must be at least 0")
            ids.setdefault(token, token_id)
        self._words = PretokenCache(ids, self.merges)
        self.special_token_ids: dict[str, int] = {}
        next_id = max(self.vocab, default=-1) + 1
        for special_token in self.special_tokens.tokens:
            token = special_token.encode()
            if token not in ids:
                ids[token] = next_id
                self.vocab[next_id] = token
                next_id += 1
            self.special_token_ids[special_token] = ids[token]
        self.vocab_size = max(self.vocab, default=-1) + 1
        self._kernel_encoder: compiled.KernelEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What the kernels remember can be built again, and is of no use to another process.
        return {**self.__dict__, "_kernel_encoder": None}

    def __repr__(self) -> str:
        special = list(self.special_token_ids)
        more = f" and {len(special) - 4} more" if len(special) > 5 else ""
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, "
            f"pattern={pattern_name(self.compiled_pattern.pattern) or self.compiled_pattern.pattern!r}, "
            f"special_tokens={special[:4] if more else special}{more})"
        )

    @property
    def pattern(self) -> str | None:
        """The pattern that finds the pre-tokens, None for GPT-2's."""
        return None if self.compiled_pattern is GPT2_PATTERN else self.compiled_pattern.pattern

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides which ids a text gets; equal after saving and loading."""
        content = [
            [[token_id, self.vocab[token_id].hex()] for token_id in sorted(self.vocab)],
            [[left.hex(), right.hex()] for left, right in self.merges],
            sorted(self.special_token_ids.items()),
        ]
        if self.pattern is not None:
            content.append(self.pattern)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, *, specials_as_text: bool = False) -> list[int]:
        """The ids of a text. Lone surrogates, which have no UTF-8 form, are encoded as U+FFFD.

        Args:
            text: of any length.
            specials_as_text: whether special tokens in the text are text like any other.

        Raises:
            TypeError: `text` is not a string.
            ValueError: the text needs a byte that the vocabulary lacks.
        """
        length = len(text) if isinstance(text, str) else 0
        if length > _FEW_CHARACTERS and (encoder := self._encoder_for(length)) is not None:
            data = np.frombuffer(_utf8(text), np.uint8)
            try:
                return encoder.encode_list(data, specials_as_text)
            except arrays.InvalidByteError as error:
                raise invalid_byte_error(
                    "text", data, error.offset, error.offset, lacks_token=error.lacks_token
                ) from None
        if length > _MANY_CHARACTERS or not isinstance(text, str):
            return list(chain.from_iterable(self.encode_stream([text], specials_as_text=specials_as_text)))
        return self._encode_whole(text if text.isascii() else "".join(without_surrogates([text])), specials_as_text)

    def encode_array(
        self,
        data: str | bytes | bytearray | memoryview | npt.NDArray[np.uint8],
        *,
        num_threads: int | None = None,
        errors: str = "strict",
        specials_as_text: bool = False,
    ) -> np.ndarray:
        """The ids of a text as an array: much faster than a list.

        Args:
            data: the text, or its UTF-8 bytes.
            num_threads: by default one for each processor that this process may use; the result is the same.
            errors: what to do about bytes that are not UTF-8: "strict" raises, "replace" encodes U+FFFD for them.
            specials_as_text: whether special tokens in the text are text like any other.

        Returns:
            uint16 where all ids of the vocabulary fit, else uint32.

        Raises:
            TypeError: `data` is something else.
            ValueError: the bytes are not UTF-8, or need a byte that the vocabulary lacks.
        """
        _check_errors(errors)
        num_threads = _checked_threads(num_threads)
        array = np.frombuffer(_utf8(data), np.uint8) if isinstance(data, str) else _readonly_bytes(data)
        if (encoder := self._encoder_for(len(array))) is None:
            text = decode_blocks([array.tobytes()], "data", errors=errors)
            ids = chain.from_iterable(self.encode_stream(text, specials_as_text=specials_as_text))
            return np.fromiter(ids, token_dtype(max(self.vocab_size, 1)))
        special = self.active_special_tokens(specials_as_text)
        chunks = chunks_of_array(array, special, len(array) // num_threads + 1)
        try:
            encoded = encoder.encode_chunks(chunks, specials_as_text, num_threads, replace=errors == "replace")
            parts = [ids for ids, _ in encoded]
        except arrays.InvalidByteError as error:
            raise invalid_byte_error("data", array, error.offset, error.offset, lacks_token=error.lacks_token) from None
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, encoder.dtype)])

    def encode_batch(
        self, texts: Iterable[str], *, num_threads: int | None = None, specials_as_text: bool = False
    ) -> list[list[int]]:
        """The ids of each text, `encode` of each in turn, in threads where the kernels are used."""
        texts, num_threads = list(texts), _checked_threads(num_threads)
        encode = partial(self.encode, specials_as_text=specials_as_text)
        num_characters = sum(map(len, texts))
        if self._encoder_for(num_characters) is None or num_threads == 1 or len(texts) < 2:
            return list(map(encode, texts))
        with ThreadPoolExecutor(num_threads) as executor:
            # Some pieces a thread: one that has the longest texts is not waited for, nor each text handed over.
            size = -(-len(texts) // (8 * num_threads))
            pieces = [texts[start : start + size] for start in range(0, len(texts), size)]
            return list(chain.from_iterable(executor.map(lambda piece: list(map(encode, piece)), pieces)))

    def encode_iterable(self, iterable: Iterable[str], *, specials_as_text: bool = False) -> Iterator[int]:
        """The ids of a text that comes in pieces (the lines of an open file, say), one by one.

        They equal the ids of the joined text wherever the pieces are cut. Memory is bounded by the longest
        piece, the longest pre-token and a cache of fixed size.

        Raises:
            TypeError: a piece is not a string.
            ValueError: the text needs a byte that the vocabulary lacks.
        """
        return chain.from_iterable(self.encode_stream(iterable, specials_as_text=specials_as_text))

    def encode_stream(self, texts: Iterable[str], *, specials_as_text: bool = False) -> Iterator[list[int]]:
        """The ids of a text that comes in pieces, some pre-tokens at a time; as `encode_iterable`, without kernels."""
        special = self.active_special_tokens(specials_as_text)
        return self._ids_of(pretokenize_stream(without_surrogates(texts), special, self.compiled_pattern))

    def encode_chunks(
        self,
        chunks: Iterable[arrays.Chunk],
        *,
        num_threads: int,
        errors: str = "strict",
        specials_as_text: bool = False,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of chunks and the bytes of each, in order, by kernels; where `uses_kernels` only.

        Args:
            chunks: arrays of bytes that begin and end at safe places (`basic.pretokenization.chunk_ends`).

        Raises:
            InvalidByteError: a byte is not UTF-8 and errors is "strict", or the vocabulary lacks it; of several the
                first.
        """
        encoder = self._encoder_for(1 << 62)
        assert encoder is not None, "uses_kernels says when there are any"
        return encoder.encode_chunks(chunks, specials_as_text, num_threads, replace=errors == "replace")

    def active_special_tokens(self, specials_as_text: bool) -> SpecialTokens:
        """The special tokens that a text is split at; none where they are text like any other."""
        return _NO_SPECIALS if specials_as_text else self.special_tokens

    def uses_kernels(self, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
        """Whether a text of this size is encoded by kernels, which run side by side in threads.

        Args:
            num_mapped_bytes: address space that reading the text will yet take.
        """
        return self._encoder_for(num_bytes, num_mapped_bytes) is not None

    def _encode_whole(self, text: str, specials_as_text: bool) -> list[int]:
        """The ids of a text without surrogates that is not worth being streamed."""
        special = self.active_special_tokens(specials_as_text)
        if self.compiled_pattern is GPT2_PATTERN and not special.pattern.search(text):
            if (known := self._words.get(text)) is not None:  # a word of this pattern is one too if it stands alone
                return list(known)
            return list(chain.from_iterable(map(self._words.__getitem__, GPT2_PATTERN.findall(text))))
        return list(chain.from_iterable(self._ids_of(pretokenize(text, special, self.compiled_pattern))))

    def _ids_of(self, batches: Iterable[tuple[list[str], str | None]]) -> Iterator[list[int]]:
        for pretokens, special_token in batches:
            ids = list(chain.from_iterable(map(self._words.__getitem__, pretokens)))
            if special_token is not None:
                ids.append(self.special_token_ids[special_token])
            yield ids

    def _encoder_for(self, num_bytes: int, num_mapped_bytes: int = 0) -> compiled.KernelEncoder | None:
        """What encodes a text of this size with kernels, None where the plain path shall."""
        if self.kernels is False or not (
            self.kernels or loading.kernels_pay_off("encoding", num_bytes, num_mapped_bytes)
        ):
            return None
        if self._kernel_encoder is None:
            if self.pattern is not None or max(self.vocab_size, len(self.merges)) >= arrays.MAX_VOCAB_SIZE:
                return None
            self._kernel_encoder = compiled.KernelEncoder(
                *self._words.tables(),
                self.vocab,
                [(token, self.special_token_ids[token.decode()]) for token in self.special_tokens.longest_first_bytes],
                token_dtype(max(self.vocab_size, 1)),
            )
        return self._kernel_encoder

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
        if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
            encoder = self._encoder_for(4 * len(ids))  # four bytes a token, as is usual
            # The plain path says what is wrong with an id.
            if encoder is not None and (decoded := encoder.decode(ids)) is not None:
                return decoded
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
        *,
        pattern: str | None = None,
        kernels: bool | None = None,
    ) -> Tokenizer:
        """A tokenizer from GPT-2's two files, `vocab.json` and `merges.txt`.

        Raises:
            ValueError: a file is damaged (the line is named), or the files do not fit each other.
            OSError: a file cannot be read.
        """
        vocab, merges = load_vocab(vocab_filepath), load_merges(merges_filepath)
        return cls(vocab, merges, special_tokens, pattern=pattern, kernels=kernels)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer to a folder, made if need be: `vocab.json`, `merges.txt`, `special_tokens.json`; and
        `pattern.json` where the pattern is not GPT-2's."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _PATTERN_FILE).unlink(missing_ok=True)
        if self.pattern is not None:
            with atomic_write(directory / _PATTERN_FILE) as file:
                file.write(json.dumps(self.pattern).encode() + b"\n")
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
        pattern_path = Path(directory) / _PATTERN_FILE
        pattern = load_json(pattern_path) if pattern_path.exists() else None
        return cls.from_files(vocab_path, merges_path, special_tokens, pattern=pattern)


def _checked_threads(num_threads: int | None) -> int:
    if num_threads is None:
        return default_num_workers()
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    return num_threads


def _check_errors(errors: str) -> None:
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} must be 'strict' or 'replace'")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return "".join(without_surrogates([text])).encode()


def _readonly_bytes(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if not isinstance(data, bytes | bytearray | memoryview | np.ndarray):
        raise TypeError(f"data must be a string, bytes or a uint8 array, got {type(data).__name__}: {data!r:.80}")
    if isinstance(data, np.ndarray) and (data.dtype != np.uint8 or data.ndim != 1):
        raise TypeError(f"an array of text must be one-dimensional uint8, got {data.dtype} of shape {data.shape}")
    array = np.frombuffer(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data, np.uint8)
    array.flags.writeable = False
    return array
