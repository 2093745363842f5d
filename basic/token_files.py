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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from basic.atomic_file import atomic_paths

if TYPE_CHECKING:
    from basic.token_index import Tokens

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
_DTYPES = {"uint16": UINT16, "uint32": UINT32}

# Ids converted, hashed and written at a time: large enough to be fast, small beside any machine's memory.
_CHUNK_TOKENS = 1 << 20


def token_dtype(vocab_size: int | np.integer) -> np.dtype:
    """The smallest of the two dtypes of token files that holds every id below `vocab_size`.

    Args:
        vocab_size: number of ids, so that the largest is `vocab_size - 1`; from 1 to 2**32.

    Raises:
        ValueError: no id, or ids beyond 32 bits.
    """
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size={vocab_size} must lie between 1 and 2**32, the ids that a token file holds")
    return UINT16 if vocab_size <= 2**16 else UINT32


def sidecar_path(path: str | os.PathLike) -> Path:
    """The path of the JSON file that describes the token file at `path`: tokens.bin -> tokens.json.

    Raises:
        ValueError: `path` is itself such a JSON file.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path} is the place of a sidecar; give the token file itself, such as tokens.bin")
    return path.with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class TokenFileInfo:
    """What the sidecar of a token file says.

    Attributes:
        dtype: of the ids in the file, little-endian uint16 or uint32 (in the JSON its name).
        count: number of ids.
        source_bytes: length of the text they were encoded from, in bytes of UTF-8; 0 where nobody said.
        largest_id: the largest id that occurs; None in an empty file.
        vocab_size: every id is below it.
        tokenizer_fingerprint: of the tokenizer that made the ids, or None.
        sha256: hexadecimal digest of the data file.
    """

    dtype: np.dtype
    count: int
    source_bytes: int
    largest_id: int | None
    vocab_size: int
    tokenizer_fingerprint: str | None
    sha256: str


def info_as_json(info: TokenFileInfo) -> dict[str, Any]:
    """What a sidecar or an index says, as JSON values."""
    return {**asdict(info), "dtype": info.dtype.name}


def info_from_json(content: dict[str, Any]) -> TokenFileInfo:
    """The same back; ValueError, KeyError or TypeError where it is something else."""
    values = {field.name: content[field.name] for field in fields(TokenFileInfo)}
    values["dtype"] = _DTYPES[values["dtype"]]
    if not isinstance(values["count"], int):
        raise TypeError(f"count is {values['count']!r}")
    return TokenFileInfo(**values)


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


def read_info(path: str | os.PathLike) -> TokenFileInfo:
    """What the sidecar of the token file at `path` says, or the index of a dataset of several.

    Args:
        path: of the data, not of the sidecar; or of an index, or its folder.

    Raises:
        FileNotFoundError: there is no sidecar.
        ValueError: the sidecar is damaged, or describes something else.
    """
    if (index := index_of(path)) is not None:
        from basic.token_index import read_index

        return read_index(index)[0]
    sidecar = sidecar_path(path)
    try:
        return info_from_json(json.loads(sidecar.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{sidecar}, the sidecar that says how to read {path}, is missing: make the token file again, or "
            "open it with dtype=... if you know it (uint16 for vocabularies up to 65536 as a rule)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{sidecar} is not the sidecar of a token file, or a damaged one ({type(error).__name__}: {error}): "
            f"make {path} again, or move the sidecar away and open the data with dtype=..."
        ) from error


def known_info(path: str | os.PathLike) -> TokenFileInfo | None:
    """The same where a sidecar or an index says it; None for a file of which nothing is known."""
    if not Path(path).exists() or (index_of(path) is None and not sidecar_path(path).is_file()):
        return None
    return read_info(path)


def index_of(path: str | os.PathLike) -> Path | None:
    """The index that a path means, its own or that of a folder; None for the path of a single token file."""
    path = Path(path)
    if path.is_dir():
        path /= "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {str(path)!r}: the folder is no token dataset, or one that is not complete yet; "
                "local/encode.py, run again, goes on with it"
            )
    return path if path.suffix == ".json" else None


def open_tokens(
    path: str | os.PathLike,
    *,
    dtype: npt.DTypeLike | None = None,
    verify: bool = False,
    made_by: str | None = None,
) -> np.ndarray:
    """Map a file of token ids into memory, reading none of it yet; or all files of an index, as one.

    Args:
        path: a token file with its sidecar, a flat file of integers whose `dtype` is given, or a
            one-dimensional integer array saved as `.npy`; or the index of a dataset, or its folder.
        dtype: needed where there is no sidecar; otherwise it must agree with what the file says.
        verify: read all the data once and compare its SHA-256 with the sidecar's. Without it, a file of the
            right length with other contents passes.
        made_by: fingerprint of the tokenizer whose ids these are to be, as far as the file says whose they are.

    Returns:
        A one-dimensional read-only array, an `np.memmap` unless the file is empty (nothing can be mapped); of an
        index `basic.token_index.ShardedTokens`, which can do what is done with one here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file contradicts its sidecar, `dtype` or `made_by`, or is not an array of token ids.
    """
    path, index = Path(path), index_of(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no token file {str(path)!r}; local/encode.py makes one from a text")
    if made_by is not None and path.suffix != ".npy":
        info = known_info(path)
        if info is not None and info.tokenizer_fingerprint not in (None, made_by):
            raise ValueError(
                f"{path} was made by another tokenizer than the one that is used with it; encode the text again with it"
            )
    asked = None if dtype is None else np.dtype(dtype)
    if asked is not None and asked.kind not in "iu":
        raise ValueError(f"dtype={asked} cannot hold token ids; give an integer type, such as uint16")
    if index is not None:
        from basic.token_index import ShardedTokens

        tokens = ShardedTokens(index, verify=verify)
        if asked not in (None, tokens.dtype):
            raise ValueError(f"dtype={asked} was asked for, but {index} says {tokens.dtype.name}; leave dtype out")
        return cast("np.ndarray", tokens)
    if path.suffix == ".npy":
        if verify:
            raise ValueError(f"{path}: an .npy file has no checksum to verify; open it without verify=True")
        return _open_npy(path, asked)

    if sidecar_path(path).exists() or asked is None:
        info = read_info(path)
        _check_sidecar(path, info, asked, verify)
        asked = info.dtype
    elif verify:
        raise ValueError(f"{path} has no sidecar and so no checksum to verify; open it without verify=True")
    size_bytes = path.stat().st_size
    if size_bytes % asked.itemsize:
        raise ValueError(
            f"{path} has {size_bytes} bytes, which is no whole number of {asked.name} ids of {asked.itemsize} bytes: "
            "the dtype is another, or the file is incomplete"
        )
    if size_bytes == 0:
        return np.frombuffer(b"", asked)
    return np.memmap(path, dtype=asked, mode="r")


def mapped_file(tokens: Tokens) -> tuple[Path | None, TokenFileInfo | None]:
    """The file that an array of `open_tokens` maps, and what its sidecar says; None for either where there is none."""
    if not isinstance(tokens, np.ndarray):
        return tokens.path, tokens.info
    path = Path(tokens.filename) if isinstance(tokens, np.memmap) and tokens.filename else None
    if path is None or path.suffix == ".npy" or not sidecar_path(path).is_file():
        return path, None
    info = read_info(path)
    return path, info if info.count == len(tokens) else None


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


def _open_npy(path: Path, asked: np.dtype | None) -> np.ndarray:
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
