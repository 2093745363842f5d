"""Open token ids on disk in any form: a token file, a flat file, an .npy array, or a dataset with an index."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from basic.common.errors import DamagedFileError, InvalidInputError, WrongTokenizerError
from basic.common.files import check_regular_file, open_file
from basic.tokens.flat_file import open_flat_file, open_npy
from basic.tokens.index import INDEX_NAME, ShardedTokens, Tokens, read_index
from basic.tokens.info import TokenFileInfo, mask_path, read_sidecar, sidecar_path

_MIN_TEXT_BYTES = 32  # of a file that should hold ids, to be taken for a text


def open_tokens(
    path: str | os.PathLike, *, dtype: npt.DTypeLike | None = None, verify: bool = False, made_by: str | None = None
) -> np.ndarray:
    """Map token ids into memory without reading them.

    Args:
        path: a token file with its sidecar, a flat file of integers whose `dtype` is given, a one-dimensional integer
            array saved as `.npy`, an index, or the folder of an index.
        dtype: required for a flat file without a sidecar; otherwise it must agree with the file.
        verify: read all the data once and compare its SHA-256 with the sidecar or index. Without it, changed data of
            the right size is not detected.
        made_by: fingerprint of the tokenizer that the ids must be from, if the file records a tokenizer.

    Returns:
        A one-dimensional read-only array: an `np.memmap`, or an array in memory if the file is empty. For an index, a
        `basic.tokens.index.ShardedTokens`, which has the operations of an array that this library uses.

    Raises:
        FileNotFoundError: there is no such file, or a flat file has neither a sidecar nor a `dtype`.
        DamagedFileError: the data contradicts its sidecar, its index or `dtype`, or a sidecar or index is invalid.
        WrongTokenizerError: another tokenizer made the ids.
        InvalidInputError: `dtype` contradicts the file, the file is a text, the array does not hold token ids, or there
            is no checksum.
    """
    path, index = Path(path), _find_index(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no token file {str(path)!r}; `basic encode` makes one from a text")
    try:
        dtype = None if dtype is None else np.dtype(dtype)
    except TypeError:
        raise InvalidInputError(f"dtype={dtype!r} is not a type; give an integer type, such as uint16") from None
    if dtype is not None and dtype.kind not in "iu":
        raise InvalidInputError(f"dtype={dtype} cannot hold token ids; give an integer type, such as uint16")
    if index is None:
        check_regular_file(path)
        if path.suffix != ".npy" and _is_text(path, dtype):
            raise InvalidInputError(
                f"{path} is a text, not token ids; `basic encode` makes a token file from it (to read its bytes as "
                "ids, give dtype=uint8)"
            )
    if made_by is not None and path.suffix != ".npy":
        info = find_info(path)
        if info is not None and info.tokenizer_fingerprint not in (None, made_by):
            raise WrongTokenizerError(
                f"{path} was made by another tokenizer than that of the model (or --tokenizer); encode it with that"
            )
    if index is not None:
        tokens = ShardedTokens(index, verify=verify)
        if dtype not in (None, tokens.dtype):
            raise InvalidInputError(f"dtype={dtype} was given, but {index} says {tokens.dtype.name}; omit dtype")
        return cast("np.ndarray", tokens)
    if path.suffix == ".npy":
        if verify:
            raise InvalidInputError(f"{path}: an .npy file has no checksum to verify; open it without verify=True")
        return open_npy(path, dtype)
    return open_flat_file(path, dtype, verify=verify)


def read_info(path: str | os.PathLike) -> TokenFileInfo:
    """Read what the sidecar of a token file, or the index of a dataset, says.

    Args:
        path: a token file (not its sidecar), an index, or the folder of an index.

    Raises:
        FileNotFoundError: there is no sidecar or index.
        DamagedFileError: the sidecar or index is invalid.
    """
    if (index := _find_index(path)) is not None:
        return read_index(index)[0]
    return read_sidecar(path)


def find_info(path: str | os.PathLike) -> TokenFileInfo | None:
    """Like `read_info`, but None if there is no such file, or a file without a sidecar."""
    if not Path(path).exists() or (_find_index(path) is None and not sidecar_path(path).is_file()):
        return None
    return read_info(path)


def mapped_file(tokens: Tokens) -> tuple[Path | None, TokenFileInfo | None]:
    """Return the file that an array of `open_tokens` maps, and what its sidecar says; None for what does not exist.

    What the sidecar says is None for a part of the ids, too.
    """
    path, info, part = _mapped_part(tokens)
    return path, None if info is None or part != slice(0, info.count, 1) else info


def open_mask(tokens: Tokens) -> np.ndarray | None:
    """Map the mask of an array of `open_tokens`, or of a slice of one, into memory, uint8 (tokens,).

    Returns:
        The mask; None if the file has none, or if the ids are a copy (`np.array(tokens)`).

    Raises:
        DamagedFileError: the sidecar of the tokens says that they have a mask, but it is missing or has another size.
        InvalidInputError: the array maps a file that has a mask, but it is no slice of its ids.
    """
    path, info, part = _mapped_part(tokens)
    if path is None or info is None or info.mask_sha256 is None:
        return None
    if part is None:
        raise InvalidInputError(
            f"an array of shape {tokens.shape} ({tokens.dtype}) is no slice of the {info.count} ids of {path}, so the "
            "mask of these, which says what is learned, does not fit; take a slice of open_tokens(...), or to learn "
            "all, np.array(tokens)"
        )
    if isinstance(tokens, ShardedTokens):
        masks = [open_mask(open_flat_file(file)) for file in tokens.files]
        return np.concatenate([mask for mask in masks if mask is not None])
    file = mask_path(path)
    if not file.is_file() or file.stat().st_size != info.count:
        has = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        raise DamagedFileError(f"{file}, the mask of {path}, {has}, which has {info.count} ids; encode the text again")
    return np.memmap(file, dtype=np.uint8, mode="r")[part] if info.count else np.zeros(0, np.uint8)


def _mapped_part(tokens: Tokens) -> tuple[Path | None, TokenFileInfo | None, slice | None]:
    """The file that an array maps, what its sidecar says, and which of its ids these are; None if no slice gives them.

    A view of a map, such as a slice, maps the file of the array that it is a view of.
    """
    if not isinstance(tokens, np.ndarray):
        return tokens.path, tokens.info, slice(0, tokens.info.count, 1)
    mapped, path, array = tokens, None, tokens
    while array is not None:
        if isinstance(array, np.memmap) and array.filename:
            mapped, path = array, Path(array.filename)  # the last one is the map: NumPy gives its views the same offset
        array = getattr(array, "base", None)
    if path is None or not isinstance(mapped, np.memmap):
        return None, None, None
    if path.suffix == ".npy" or not sidecar_path(path).is_file():
        return path, None, None
    info = read_info(path)
    if tokens.dtype != info.dtype or tokens.ndim != 1:
        return path, info, None
    if len(tokens) == 0:
        return path, info, slice(0, 0, 1)
    size = info.dtype.itemsize
    start, shift = divmod(mapped.offset + tokens.ctypes.data - mapped.ctypes.data, size)
    step, rest = divmod(tokens.strides[0], size) if len(tokens) > 1 else (1, 0)
    stop = start + step * len(tokens)
    if shift or rest or step == 0 or not (0 <= start < info.count and 0 <= stop - step < info.count):
        return path, info, None
    return path, info, slice(start, stop if stop >= 0 else None, step)


def _is_text(path: Path, dtype: np.dtype | None) -> bool:
    """Whether a flat file is certainly a text: valid UTF-8 without control characters, other than white space.

    A few ids can look like text by chance. Bytes can be ids on purpose, if their dtype is given.
    """
    with open_file(path) as file:
        head = file.read(4096)
    has_sidecar = sidecar_path(path).is_file()
    if has_sidecar:
        info = read_sidecar(path)
        if path.stat().st_size == info.count * info.dtype.itemsize:
            return False  # it is the sidecar of this file, and not that of another file with the same stem
    should_hold_ids = has_sidecar or dtype is not None
    if should_hold_ids and (dtype == np.uint8 or len(head) < _MIN_TEXT_BYTES):
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")("strict" if should_hold_ids else "replace").decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character in "\n\r\t\f\ufeff" for character in text)


def _find_index(path: str | os.PathLike) -> Path | None:
    """The index that a path means, its own or that of a folder; None for a single token file."""
    path = Path(path)
    if path.is_dir():
        path /= INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {str(path)!r}: the folder is not a token dataset, or is not complete yet; "
                "run `basic encode` again, which resumes it"
            )
    return path if path.suffix == ".json" else None
