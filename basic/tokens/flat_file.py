"""Token files: a flat array of ids, a JSON sidecar that describes it, and a memory map to read it.

`tokens.bin` holds the ids one after the other, little-endian and without a header, so that any program can map it. An
id has two bytes if the vocabulary fits, otherwise four. `tokens.json` beside it records the dtype, the number of ids,
the size of the text, the tokenizer, and the SHA-256 of the data. `tokens.mask` beside them, if training is to
learn some of the tokens only, has a byte for each token (`basic.tokens.info.mask_path`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from basic.common.arguments import check_integer
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import atomic_paths, sha256_of_file, with_checksum
from basic.tokens.foreign_files import check_header, check_ids
from basic.tokens.info import TokenFileInfo, info_to_json, mask_path, read_sidecar, sidecar_path, token_dtype

# Ids that are converted, hashed and written at a time.
_CHUNK_TOKENS = 1 << 20


class TokenFileWriter:
    """Write a token file chunk by chunk; memory depends on the chunks alone.

    A context manager: the file and its sidecar appear when the block ends. If the block raises, existing files are
    unchanged.

    Args:
        path: path of the data, usually `*.bin`; the sidecar is written beside it.
        vocab_size: decides the dtype; every id must be less.
        with_mask: also write a mask, which must be given with all ids.

    Attributes:
        info: the `TokenFileInfo` of the finished file; set when the block ends.

    Raises:
        InvalidInputError: `path` ends in .npy or .json, or `vocab_size` is out of range.

    Examples:
        >>> with TokenFileWriter("tokens.bin", vocab_size=300) as writer:
        ...     writer.write([72, 105], source_bytes=2)
        >>> open_tokens("tokens.bin").tolist()
        [72, 105]
    """

    info: TokenFileInfo

    def __init__(
        self,
        path: str | os.PathLike,
        vocab_size: int | np.integer,
        *,
        tokenizer_fingerprint: str | None = None,
        with_mask: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix == ".npy":
            raise InvalidInputError(f"{path}: a token file has no .npy header; name it *.bin")
        self.vocab_size = check_integer("vocab_size", vocab_size)
        self.dtype = token_dtype(vocab_size)
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._sidecar = sidecar_path(self.path)
        self._sha256, self._mask_sha256 = hashlib.sha256(), hashlib.sha256() if with_mask else None
        self._count = 0
        self._source_bytes = 0
        self._largest_id: int | None = None
        self._context = self._open()

    def __enter__(self) -> TokenFileWriter:
        return self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, traceback)

    @contextmanager
    def _open(self) -> Generator[TokenFileWriter]:
        mask_paths = [] if self._mask_sha256 is None else [mask_path(self.path)]
        with atomic_paths(self.path, self._sidecar, *mask_paths) as (data, sidecar, *masks), ExitStack() as files:
            self._mask_file = files.enter_context(open(masks[0], "xb")) if masks else None
            with open(data, "xb") as self._file:
                yield self
            self.info = TokenFileInfo(
                dtype=self.dtype,
                count=self._count,
                source_bytes=self._source_bytes,
                largest_id=self._largest_id,
                vocab_size=self.vocab_size,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                sha256=self._sha256.hexdigest(),
                mask_sha256=None if self._mask_sha256 is None else self._mask_sha256.hexdigest(),
            )
            content = with_checksum(info_to_json(self.info))
            sidecar.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def write(
        self,
        ids: npt.ArrayLike | Sequence[int],
        source_bytes: int | np.integer = 0,
        *,
        mask: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Append ids. If they are invalid, none of them is written.

        Args:
            ids: a one-dimensional array or sequence of integers.
            source_bytes: size of their text, added to the sum in the sidecar.
            mask: a byte for each id, if the writer was made with a mask.

        Raises:
            TypeError: the ids are not integers.
            InvalidInputError: the ids have more than one dimension, or an id is outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.ndim != 1:
            raise InvalidInputError(f"token ids must be one-dimensional, got shape {array.shape}")
        self._source_bytes += int(source_bytes)
        assert (self._mask_sha256 is None) == (mask is None)
        assert mask is None or (mask.shape == array.shape and mask.dtype == np.uint8)
        if array.size == 0:
            return
        # Python integers beyond 64 bits make an array of objects; the check of the range below refuses them.
        if array.dtype.kind not in "iuO":
            raise TypeError(f"token ids must be integers, got {array.dtype}")
        smallest, largest = int(array.min()), int(array.max())
        if smallest < 0 or largest >= self.vocab_size:
            raise InvalidInputError(
                f"token id {smallest if smallest < 0 else largest} is outside the vocabulary: ids are from 0 to "
                f"{self.vocab_size - 1}; give the vocab_size of the tokenizer that made them"
            )
        for start in range(0, array.size, _CHUNK_TOKENS):
            chunk = np.ascontiguousarray(array[start : start + _CHUNK_TOKENS], self.dtype)  # copies only if it must
            self._sha256.update(chunk.data)
            self._file.write(chunk.data)
        if mask is not None and self._mask_sha256 is not None and self._mask_file is not None:
            self._mask_sha256.update(mask.data)
            self._mask_file.write(mask.data)
        self._count += array.size
        self._largest_id = max(largest, self._largest_id or 0)


def open_flat_file(path: Path, dtype: np.dtype | None = None, *, verify: bool = False) -> np.ndarray:
    """Map a flat file of token ids into memory.

    Args:
        dtype: required if there is no sidecar; otherwise it must agree with the sidecar.
        verify: compare the SHA-256 of the data with the sidecar.

    Raises:
        FileNotFoundError: there is neither a sidecar nor a `dtype`.
        InvalidInputError: `dtype` contradicts the sidecar or, without a sidecar, the content, or there is no checksum
            to verify.
        DamagedFileError: the data contradicts its sidecar or `dtype`.
    """
    has_sidecar = sidecar_path(path).exists()
    if has_sidecar or dtype is None:
        info = read_sidecar(path)
        _check_against_sidecar(path, info, dtype, verify)
        dtype = info.dtype
    elif verify:
        raise InvalidInputError(f"{path} has no sidecar and so no checksum to verify; open it without verify=True")
    if not has_sidecar:
        check_header(path)
    size_bytes = path.stat().st_size
    if size_bytes % dtype.itemsize:
        raise DamagedFileError(
            f"{path} has {size_bytes} bytes, which is not a multiple of {dtype.itemsize}, the size of a {dtype.name} "
            "id: the dtype is another, or the file is incomplete"
        )
    if size_bytes == 0:
        return np.frombuffer(b"", dtype)
    ids = np.memmap(path, dtype=dtype, mode="r")
    if not has_sidecar:
        check_ids(path, ids)
    return ids


def _check_against_sidecar(path: Path, info: TokenFileInfo, dtype: np.dtype | None, verify: bool) -> None:
    sidecar = sidecar_path(path)
    if dtype is not None and dtype != info.dtype:
        raise InvalidInputError(f"dtype={dtype.name} was given, but {sidecar} says {info.dtype.name}; omit dtype")
    size_bytes = path.stat().st_size
    if size_bytes != info.count * info.dtype.itemsize:
        raise DamagedFileError(
            f"{path} has {size_bytes} bytes, but {sidecar} says {info.count} ids of {info.dtype.name}, "
            f"{info.count * info.dtype.itemsize} bytes: the two do not belong together, or the data is "
            "incomplete; make the token file again"
        )
    if verify and (sha256 := sha256_of_file(path)) != info.sha256:
        raise DamagedFileError(
            f"{path} has the SHA-256 {sha256}, but {sidecar} says {info.sha256}: the data has "
            "changed since it was written; make the token file again"
        )
    if verify and info.mask_sha256 not in (None, sha256_of_file(mask_path(path)) if info.mask_sha256 else None):
        raise DamagedFileError(f"{mask_path(path)} has changed since it was written; make the token file again")


def open_npy(path: Path, dtype: np.dtype | None = None) -> np.ndarray:
    """Map a one-dimensional integer array that `numpy.save` wrote.

    Raises:
        InvalidInputError: the array does not hold token ids, or has another dtype.
        DamagedFileError: the file is not a complete .npy file that can be mapped.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise DamagedFileError(
            f"{path} is not a complete .npy array that can be mapped ({error}); save it again"
        ) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInputError(
            f"{path} holds {array.dtype} of shape {array.shape}, but token ids are a one-dimensional array of "
            "integers; save it as such (array.reshape(-1).astype(...))"
        )
    if dtype is not None and dtype != array.dtype:
        raise InvalidInputError(f"dtype={dtype.name} was given, but {path} says {array.dtype.name}; omit dtype")
    return array
