"""A token dataset in shards: token files one after the other, and an index that says which; read as one array.

`index.json` lists the files that lie beside it, with counts and checksums, and says of all of them together what a
sidecar says of one file. Whoever opens it gets what stands for the array of all ids: rows may cross from one file to
the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from basic.common.files import atomic_write
from basic.tokens.flat_file import open_flat_file
from basic.tokens.info import TokenFileInfo, info_as_json, info_from_json, read_sidecar

INDEX_NAME = "index.json"
_MOST_MAPPED = 1 << 12  # files at a time: a process may have no more than some ten thousand maps


def write_index(path: str | os.PathLike, names: Sequence[str]) -> TokenFileInfo:
    """Write the index of token files in the same folder, and return what it says of them together.

    Raises:
        ValueError: the files were not made by one tokenizer.
    """
    infos = [read_sidecar(Path(path).parent / name) for name in names]
    for key in ("dtype", "vocab_size", "tokenizer_fingerprint"):
        if len(found := {getattr(info, key) for info in infos}) != 1:
            raise ValueError(f"the files of {path} differ in {key}: {sorted(map(str, found))}; encode the text again")
    digest = hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest()
    together = TokenFileInfo(
        dtype=infos[0].dtype,
        count=sum(info.count for info in infos),
        source_bytes=sum(info.source_bytes for info in infos),
        largest_id=max((info.largest_id for info in infos if info.largest_id is not None), default=None),
        vocab_size=infos[0].vocab_size,
        tokenizer_fingerprint=infos[0].tokenizer_fingerprint,
        sha256=digest,  # of the files' digests, one after the other
    )
    shards = [
        {"file": name, "count": info.count, "sha256": info.sha256} for name, info in zip(names, infos, strict=True)
    ]
    with atomic_write(path) as file:
        file.write(json.dumps({**info_as_json(together), "shards": shards}, indent=1).encode() + b"\n")
    return together


def read_index(path: str | os.PathLike) -> tuple[TokenFileInfo, list[dict[str, Any]]]:
    """What an index says of all files together, and of each: `file`, `count`, `sha256`.

    Raises:
        ValueError: it is no index, or a damaged one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        info, shards = info_from_json(content), content["shards"]
        if sum(shard["count"] for shard in shards) != info.count or not all(shard["file"] for shard in shards):
            raise ValueError("the counts of the files do not add up")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the index of a token dataset, or a damaged one ({type(error).__name__}: {error}). Of a "
            "single token file give the .bin; a damaged index is written anew by encoding again, which goes on from "
            "what is there"
        ) from None
    return info, shards


class ShardedTokens:
    """The ids of all files of an index as one array; see `basic.tokens.opening.open_tokens`.

    It has what those who read tokens use of an array: length, dtype, slices, and arrays of indices of any shape. What
    it gives are arrays in memory. Files are mapped when they are first read.

    Attributes:
        path: of the index.
        info: what it says of all files together.
    """

    ndim = 1

    def __init__(self, path: str | os.PathLike, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.info, self._shards = read_index(path)
        self.dtype = self.info.dtype
        self.shape = (self.info.count,)
        self._ends = np.cumsum([shard["count"] for shard in self._shards], dtype=np.int64)
        self._map = lru_cache(_MOST_MAPPED)(self._open)
        for shard in self._shards:
            file = self.path.parent / shard["file"]
            size_bytes = file.stat().st_size if file.is_file() else None
            if size_bytes != shard["count"] * self.dtype.itemsize:
                raise ValueError(
                    f"{file} {'is missing' if size_bytes is None else f'has {size_bytes} bytes'}, but {self.path} says "
                    f"{shard['count']} ids of {self.dtype.name}, {shard['count'] * self.dtype.itemsize} bytes: the "
                    "data is incomplete or another; encode again, which makes the missing files"
                )
            if verify:
                self._verify(file, shard["sha256"])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map = lru_cache(_MOST_MAPPED)(self._open)

    def __len__(self) -> int:
        return self.info.count

    def __repr__(self) -> str:
        return f"ShardedTokens({str(self.path)!r}, {len(self):,} {self.dtype.name} in {len(self._shards)} files)"

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._shards)):
            yield from self._map(number)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("tokens in several files cannot be an array without being copied")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        """Ids like those of a numpy array of one dimension: of an integer, a slice, or integers of any shape."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
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
        ids = self._gathered(flat)
        return ids.reshape(indices.shape) if indices.ndim else ids[0]

    def _gathered(self, flat: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self._ends, flat, side="right")
        if numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            return np.asarray(self._map(int(numbers[0]))[flat - self._start(int(numbers[0]))])
        order = np.argsort(numbers, kind="stable")
        present, firsts = np.unique(numbers[order], return_index=True)
        ids = np.empty(len(flat), self.dtype)
        for number, places in zip(present.tolist(), np.split(order, firsts[1:]), strict=True):
            ids[places] = self._map(number)[flat[places] - self._start(number)]
        return ids

    def _range(self, start: int, stop: int) -> np.ndarray:
        parts = [np.empty(0, self.dtype)]
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = self._start(number)
            parts.append(self._map(number)[start - first : stop - first])
            start, number = int(self._ends[number]), number + 1
        return np.concatenate(parts)

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._shards[number]["count"]

    def _open(self, number: int) -> np.ndarray:
        return open_flat_file(self.path.parent / self._shards[number]["file"], self.dtype)

    def _verify(self, file: Path, sha256: str) -> None:
        with open(file, "rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(
                f"{file} has the SHA-256 {digest}, but {self.path} says {sha256}: the data has changed since it was "
                "written; remove it and encode again, which makes it anew"
            )


# What stands for all ids of a dataset: an array, or files that are read as one.
Tokens = np.ndarray | ShardedTokens
