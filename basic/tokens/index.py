"""Token datasets: several token files and an index, read as one array.

`index.json` lists the token files of its folder, in order, with counts and checksums. Its other keys are those of a
sidecar, for all files together. `ShardedTokens` reads the files as one array: a sequence may begin in one file and end
in the next.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from basic.common.errors import DamagedFileError, WrongTokenizerError
from basic.common.files import difference_from_object, load_object, sha256_of_file, with_checksum, write_json
from basic.tokens.flat_file import open_flat_file
from basic.tokens.info import INFO_TYPES, TokenFileInfo, info_from_json, info_to_json, read_sidecar

INDEX_NAME = "index.json"
_MAX_MAPPED_FILES = 1 << 12  # systems limit the maps of a process to some ten thousand


def write_index(path: str | os.PathLike, names: Sequence[str]) -> TokenFileInfo:
    """Write the index of token files in the same folder; return what it says about all of them together.

    Raises:
        WrongTokenizerError: the files were not made by the same tokenizer.
    """
    infos = [read_sidecar(Path(path).parent / name) for name in names]
    for key in ("dtype", "vocab_size", "tokenizer_fingerprint"):
        if len(values := {getattr(info, key) for info in infos}) != 1:
            raise WrongTokenizerError(
                f"the files of {path} differ in {key}: {sorted(map(str, values))}; encode the text again"
            )
    masks = [info.mask_sha256 for info in infos if info.mask_sha256 is not None]  # of all files, or of none
    total = TokenFileInfo(
        dtype=infos[0].dtype,
        count=sum(info.count for info in infos),
        source_bytes=sum(info.source_bytes for info in infos),
        largest_id=max((info.largest_id for info in infos if info.largest_id is not None), default=None),
        vocab_size=infos[0].vocab_size,
        tokenizer_fingerprint=infos[0].tokenizer_fingerprint,
        sha256=hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest(),
        mask_sha256=hashlib.sha256("".join(masks).encode()).hexdigest() if masks else None,
    )
    shards = [
        {"file": name, "count": info.count, "sha256": info.sha256} for name, info in zip(names, infos, strict=True)
    ]
    write_json(path, with_checksum({**info_to_json(total), "shards": shards}), indent=1)
    return total


def read_index(path: str | os.PathLike) -> tuple[TokenFileInfo, list[dict[str, Any]]]:
    """Read an index: what it says about all files together, and `file`, `count` and `sha256` of each.

    Raises:
        DamagedFileError: the file is not a valid index.
    """
    try:
        content = load_object(path, {**INFO_TYPES, "shards": list})
        info, shards = info_from_json(content), content["shards"]
        for shard in shards:
            if (problem := difference_from_object(shard, {"file": str, "count": int, "sha256": str})) is not None:
                raise DamagedFileError(f"one of its shards {problem}")
        counts = [shard["count"] for shard in shards]
        if sum(counts) != info.count or min(counts, default=0) < 0 or not all(shard["file"] for shard in shards):
            raise DamagedFileError("the counts of the files do not add up")
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{path} is not the index of a token dataset, or is damaged ({error}). For a single token file give the "
            ".bin; to repair an index, encode again, which keeps the finished files"
        ) from None
    return info, shards


class ShardedTokens:
    """The ids of all files of an index as one array; see `basic.tokens.opening.open_tokens`.

    Like a one-dimensional NumPy array it has a length, a dtype, slices, and indexing by integer arrays of any shape.
    The results are arrays in memory. A file is mapped when it is first read.

    Args:
        verify: compare the SHA-256 of every file with the index.

    Raises:
        DamagedFileError: the index is invalid, or a file is missing, has another size or another SHA-256.
    """

    ndim = 1

    def __init__(self, path: str | os.PathLike, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.info, self._shards = read_index(path)
        self.dtype = self.info.dtype
        self.shape = (self.info.count,)
        self._shard_ends = np.cumsum([shard["count"] for shard in self._shards], dtype=np.int64)
        self._map = lru_cache(_MAX_MAPPED_FILES)(self._open)
        for shard in self._shards:
            self._check_shard(shard, verify)

    @property
    def files(self) -> list[Path]:
        """The token files, in order."""
        return [self.path.parent / shard["file"] for shard in self._shards]

    def _check_shard(self, shard: dict[str, Any], verify: bool) -> None:
        file = self.path.parent / shard["file"]
        size_bytes = file.stat().st_size if file.is_file() else None
        if size_bytes != shard["count"] * self.dtype.itemsize:
            raise DamagedFileError(
                f"{file} {'is missing' if size_bytes is None else f'has {size_bytes} bytes'}, but {self.path} says "
                f"{shard['count']} ids of {self.dtype.name}, {shard['count'] * self.dtype.itemsize} bytes: the "
                "data is incomplete or another; encode again, which makes the missing files"
            )
        if verify and (sha256 := sha256_of_file(file)) != shard["sha256"]:
            raise DamagedFileError(
                f"{file} has the SHA-256 {sha256}, but {self.path} says {shard['sha256']}: the data has changed since "
                "it was written; encode again, which makes it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map = lru_cache(_MAX_MAPPED_FILES)(self._open)

    def __len__(self) -> int:
        return self.info.count

    def __repr__(self) -> str:
        return f"ShardedTokens({str(self.path)!r}, {len(self):,} {self.dtype.name} in {len(self._shards)} files)"

    def __iter__(self) -> Iterator[Any]:
        for shard in range(len(self._shards)):
            yield from self._map(shard)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("tokens in several files cannot be an array without being copied")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        """Index like a one-dimensional NumPy array: by an integer, a slice, or an integer array of any shape."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._slice(start, max(start, stop))
            index = np.arange(start, stop, step)
        indices = np.asarray(index)
        if indices.size == 0:
            return np.empty(indices.shape, self.dtype)
        if indices.dtype.kind not in "iu":
            raise IndexError(f"tokens are indexed by integers and slices, got {indices.dtype}")
        flat = indices.reshape(-1).astype(np.int64)
        flat = np.where(flat < 0, flat + len(self), flat)
        if flat.min() < 0 or flat.max() >= len(self):
            raise IndexError(f"index {index if indices.ndim == 0 else 'in an array'} is outside {len(self)} tokens")
        ids = self._gather(flat)
        return ids.reshape(indices.shape) if indices.ndim else ids[0]

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        """The ids at one-dimensional indices, none of them negative."""
        shards = np.searchsorted(self._shard_ends, indices, side="right")
        if shards[0] == shards[-1] and (shards == shards[0]).all():
            shard = int(shards[0])
            return np.asarray(self._map(shard)[indices - self._shard_start(shard)])
        order = np.argsort(shards, kind="stable")
        present, firsts = np.unique(shards[order], return_index=True)
        ids = np.empty(len(indices), self.dtype)
        for shard, positions in zip(present.tolist(), np.split(order, firsts[1:]), strict=True):
            ids[positions] = self._map(shard)[indices[positions] - self._shard_start(shard)]
        return ids

    def _slice(self, start: int, stop: int) -> np.ndarray:
        slices = [np.empty(0, self.dtype)]
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        while start < stop:
            shard_start = self._shard_start(shard)
            slices.append(self._map(shard)[start - shard_start : stop - shard_start])
            start, shard = int(self._shard_ends[shard]), shard + 1
        return np.concatenate(slices)

    def _shard_start(self, shard: int) -> int:
        return int(self._shard_ends[shard]) - self._shards[shard]["count"]

    def _open(self, shard: int) -> np.ndarray:
        return open_flat_file(self.path.parent / self._shards[shard]["file"], self.dtype)


# All ids of a dataset: one array, or several files that are read as one.
Tokens = np.ndarray | ShardedTokens
