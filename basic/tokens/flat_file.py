"""Files of token ids: a flat array on the disk, a JSON sidecar that says how to read it, a memory map to read it.

`tokens.bin` holds the ids one after the other, little-endian, without a header, so that any program can map
it; two bytes an id where the vocabulary fits, otherwise four. `tokens.json` beside it says which, and how many,
from how many bytes of text, by which tokenizer, and the SHA-256 of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from basic.common.files import atomic_paths
from basic.tokens.info import TokenFileInfo, info_as_json, read_sidecar, sidecar_path, token_dtype

# Ids converted, hashed and written at a time: large enough to be fast, small beside any machine's memory.
_CHUNK_TOKENS = 1 << 20


class TokenFileWriter:
    """Write a token file piece by piece, in memory that depends on the pieces alone.

    A context manager: the file and its sidecar appear together when the block ends; if it raises, whatever
    stood there before is untouched.

    Args:
        path: where the data shall stand, by custom `*.bin`; the sidecar goes beside it.
        vocab_size: decides the dtype, and no id may reach it.
        tokenizer_fingerprint: recorded in the sidecar, so that ids and tokenizer can be matched later.

    Attributes:
        info: the `TokenFileInfo` of the finished file, once the block has ended.

    Example:
        >>> with TokenFileWriter("tokens.bin", vocab_size=300) as writer:
        ...     writer.write([72, 105], source_bytes=2)
        >>> open_tokens("tokens.bin").tolist()
        [72, 105]
    """

    info: TokenFileInfo

    def __init__(
        self, path: str | os.PathLike, vocab_size: int | np.integer, *, tokenizer_fingerprint: str | None = None
    ) -> None:
        self.path = Path(path)
        if self.path.suffix == ".npy":
            raise ValueError(f"{path}: a token file has no .npy header; name it *.bin")
        self.vocab_size = int(vocab_size)
        self.dtype = token_dtype(vocab_size)
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._sidecar = sidecar_path(self.path)
        self._digest = hashlib.sha256()
        self._count = 0
        self._source_bytes = 0
        self._largest_id: int | None = None
        self._block = self._writing()

    def __enter__(self) -> TokenFileWriter:
        return self._block.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._block.__exit__(kind, error, traceback)

    @contextmanager
    def _writing(self) -> Generator[TokenFileWriter]:
        with atomic_paths(self.path, self._sidecar) as (data, sidecar):
            with open(data, "xb") as self._file:
                yield self
            self.info = TokenFileInfo(
                dtype=self.dtype,
                count=self._count,
                source_bytes=self._source_bytes,
                largest_id=self._largest_id,
                vocab_size=self.vocab_size,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                sha256=self._digest.hexdigest(),
            )
            sidecar.write_text(json.dumps(info_as_json(self.info), indent=2) + "\n", encoding="utf-8")

    def write(self, ids: npt.ArrayLike | Sequence[int], source_bytes: int | np.integer = 0) -> None:
        """Append ids.

        Args:
            ids: one-dimensional array or sequence of integers; checked as a whole before any is written.
            source_bytes: length of the text that they stand for, added up for the sidecar.

        Raises:
            TypeError: not integers.
            ValueError: more than one dimension, or an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"token ids must be one-dimensional, got shape {array.shape}")
        self._source_bytes += int(source_bytes)
        if array.size == 0:
            return
        # Python integers beyond 64 bits make an array of objects; they are told apart by their range below.
        if array.dtype.kind not in "iuO":
            raise TypeError(f"token ids must be integers, got {array.dtype}")
        smallest, largest = int(array.min()), int(array.max())
        if smallest < 0 or largest >= self.vocab_size:
            raise ValueError(
                f"token id {smallest if smallest < 0 else largest} lies outside the vocabulary: ids go from 0 to "
                f"{self.vocab_size - 1}; give the vocab_size of the tokenizer that made them"
            )
        for begin in range(0, array.size, _CHUNK_TOKENS):
            piece = np.ascontiguousarray(array[begin : begin + _CHUNK_TOKENS], self.dtype)  # no copy if it is that
            self._digest.update(piece.data)
            self._file.write(piece.data)
        self._count += array.size
        self._largest_id = max(largest, self._largest_id or 0)


def open_flat_file(path: Path, dtype: np.dtype | None = None, *, verify: bool = False) -> np.ndarray:
    """Map a flat file of token ids into memory.

    Args:
        dtype: needed where there is no sidecar; otherwise it must agree with what the sidecar says.
        verify: compare the data's SHA-256 with the sidecar's.

    Raises:
        FileNotFoundError: there is neither a sidecar nor a `dtype`.
        ValueError: the file contradicts its sidecar or `dtype`.
    """
    if sidecar_path(path).exists() or dtype is None:
        info = read_sidecar(path)
        _check_sidecar(path, info, dtype, verify)
        dtype = info.dtype
    elif verify:
        raise ValueError(f"{path} has no sidecar and so no checksum to verify; open it without verify=True")
    size_bytes = path.stat().st_size
    if size_bytes % dtype.itemsize:
        raise ValueError(
            f"{path} has {size_bytes} bytes, which is no whole number of {dtype.name} ids of {dtype.itemsize} bytes: "
            "the dtype is another, or the file is incomplete"
        )
    if size_bytes == 0:
        return np.frombuffer(b"", dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _check_sidecar(path: Path, info: TokenFileInfo, asked: np.dtype | None, verify: bool) -> None:
    """Raise ValueError if the data at `path` is not what its sidecar describes."""
    if asked is not None and asked != info.dtype:
        raise ValueError(
            f"dtype={asked.name} was asked for, but {sidecar_path(path)} says {info.dtype.name}; leave dtype out"
        )
    size_bytes = path.stat().st_size
    if size_bytes != info.count * info.dtype.itemsize:
        raise ValueError(
            f"{path} has {size_bytes} bytes, but {sidecar_path(path)} says {info.count} ids of {info.dtype.name}, "
            f"{info.count * info.dtype.itemsize} bytes: the two do not belong together, or the data is "
            "incomplete; make the token file again"
        )
    if verify:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != info.sha256:
            raise ValueError(
                f"{path} has the SHA-256 {digest}, but {sidecar_path(path)} says {info.sha256}: the data has "
                "changed since it was written; make the token file again"
            )


def open_npy(path: Path, asked: np.dtype | None) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy array that can be mapped ({error}); save it again") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}, but token ids are a one-dimensional array of "
            "integers; save it as such (array.reshape(-1).astype(...))"
        )
    if asked is not None and asked != array.dtype:
        raise ValueError(f"dtype={asked.name} was asked for, but {path} says {array.dtype.name}; leave dtype out")
    return array
