"""Open token ids on disk, whatever form they have: a flat file, an .npy array, or a dataset with an index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from basic.tokens.flat_file import open_flat_file, open_npy
from basic.tokens.index import INDEX_NAME, ShardedTokens, Tokens, read_index
from basic.tokens.info import TokenFileInfo, read_sidecar, sidecar_path


def read_info(path: str | os.PathLike) -> TokenFileInfo:
    """What the sidecar of the token file at `path` says, or the index of a dataset of several.

    Args:
        path: of the data, not of the sidecar; or of an index, or its folder.

    Raises:
        FileNotFoundError: there is no sidecar.
        ValueError: the sidecar is damaged, or describes something else.
    """
    if (index := index_of(path)) is not None:
        return read_index(index)[0]
    return read_sidecar(path)


def known_info(path: str | os.PathLike) -> TokenFileInfo | None:
    """The same where a sidecar or an index says it; None for a file of which nothing is known."""
    if not Path(path).exists() or (index_of(path) is None and not sidecar_path(path).is_file()):
        return None
    return read_info(path)


def index_of(path: str | os.PathLike) -> Path | None:
    """The index that a path means, its own or that of a folder; None for the path of a single token file."""
    path = Path(path)
    if path.is_dir():
        path /= INDEX_NAME
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
        index `basic.tokens.index.ShardedTokens`, which can do what is done with one here.

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
        tokens = ShardedTokens(index, verify=verify)
        if asked not in (None, tokens.dtype):
            raise ValueError(f"dtype={asked} was asked for, but {index} says {tokens.dtype.name}; leave dtype out")
        return cast("np.ndarray", tokens)
    if path.suffix == ".npy":
        if verify:
            raise ValueError(f"{path}: an .npy file has no checksum to verify; open it without verify=True")
        return open_npy(path, asked)
    return open_flat_file(path, asked, verify=verify)


def mapped_file(tokens: Tokens) -> tuple[Path | None, TokenFileInfo | None]:
    """The file that an array of `open_tokens` maps, and what its sidecar says; None for either where there is none."""
    if not isinstance(tokens, np.ndarray):
        return tokens.path, tokens.info
    path = Path(tokens.filename) if isinstance(tokens, np.memmap) and tokens.filename else None
    if path is None or path.suffix == ".npy" or not sidecar_path(path).is_file():
        return path, None
    info = read_info(path)
    return path, info if info.count == len(tokens) else None
