"""What a sidecar or an index records about token ids: dtype, count, checksum and tokenizer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import is_unfinished, load_object
from basic.common.outputs import Output

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
_DTYPES = {"uint16": UINT16, "uint32": UINT32}


@dataclass(frozen=True, kw_only=True)
class TokenFileInfo:
    """The contents of the sidecar of a token file.

    Attributes:
        dtype: of the ids, little-endian uint16 or uint32; in JSON its name.
        source_bytes: size of the text in bytes of UTF-8; 0 if unknown.
        largest_id: the largest id in the file; None if the file is empty.
        tokenizer_fingerprint: of the tokenizer that made the ids; None if unknown.
        mask_sha256: of the mask beside it; None if there is none.
    """

    dtype: np.dtype
    count: int
    source_bytes: int
    largest_id: int | None
    vocab_size: int
    tokenizer_fingerprint: str | None
    sha256: str
    mask_sha256: str | None = None


INFO_TYPES = {
    "dtype": str,
    "count": int,
    "source_bytes": int,
    "largest_id": (int, type(None)),
    "vocab_size": int,
    "tokenizer_fingerprint": (str, type(None)),
    "sha256": str,
}
"""The types of the fields in JSON."""


def token_dtype(vocab_size: int | np.integer) -> np.dtype:
    """Return the smaller of the two dtypes of token files that holds every id below `vocab_size`.

    Raises:
        InvalidInputError: `vocab_size` is out of range.
    """
    if not 1 <= vocab_size <= 2**32:
        raise InvalidInputError(f"vocab_size={vocab_size} must be from 1 to 2**32, as a token file has ids of 32 bits")
    return UINT16 if vocab_size <= 2**16 else UINT32


def sidecar_path(path: str | os.PathLike) -> Path:
    """Return the path of the sidecar of a token file: tokens.bin -> tokens.json.

    It is beside the file itself, and not beside a link to it, unless there is one beside the link.

    Raises:
        InvalidInputError: `path` ends in .json.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise InvalidInputError(f"{path} is the path of a sidecar; give the token file itself, such as tokens.bin")
    sidecar = path.with_suffix(".json")
    if path.is_symlink() and not os.path.lexists(sidecar):
        target = Path(os.path.realpath(path))
        return target.with_suffix(".json") if target.suffix != ".json" else sidecar
    return sidecar


# The bits of a token's byte in a mask.
IS_LEARNED, BEGINS_DOCUMENT = 1, 2


def mask_path(path: str | os.PathLike) -> Path:
    """Return the path of the mask of a token file, beside its sidecar: tokens.bin -> tokens.mask.

    A mask has a byte for each token: the bit `IS_LEARNED` if it counts as a target of training, and the bit
    `BEGINS_DOCUMENT` if it is the first token of a document.
    """
    return sidecar_path(path).with_suffix(".mask")


def read_sidecar(path: str | os.PathLike) -> TokenFileInfo:
    """Read the sidecar of the token file at `path`.

    Raises:
        FileNotFoundError: there is no sidecar.
        DamagedFileError: the file is not a valid sidecar.
    """
    sidecar = sidecar_path(path)
    try:
        return info_from_json(load_object(sidecar, INFO_TYPES))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{sidecar}, the sidecar that says how to read {path}, is missing: make the token file again, or "
            "open it with dtype=... if you know it (usually uint16 for vocabularies up to 65536)"
        ) from None
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{sidecar} is not the sidecar of a token file, or is damaged ({error}): make {path} again, or move the "
            "sidecar away and open the data with dtype=..."
        ) from None


def token_file_outputs(path: str | os.PathLike, *, with_mask: bool = False) -> list[Output]:
    """The files of a token file, for `reserved_outputs`."""
    sidecar = sidecar_path(path)

    def is_ours(existing: Path) -> bool:
        return is_unfinished(sidecar) or (sidecar.exists() and bool(read_sidecar(path)))

    outputs = [Output(path, "a token file", is_ours), Output(sidecar, "the sidecar of a token file", is_ours)]
    return [*outputs, Output(mask_path(path), "the mask of a token file", is_ours)] if with_mask else outputs


def info_to_json(info: TokenFileInfo) -> dict[str, Any]:
    """Convert to the JSON object of a sidecar or an index, without its checksum."""
    content = {**asdict(info), "dtype": info.dtype.name}
    return {name: value for name, value in content.items() if name != "mask_sha256" or value is not None}


def info_from_json(content: dict[str, Any]) -> TokenFileInfo:
    """Convert from the JSON object of a sidecar or an index, whose types are `INFO_TYPES`.

    Raises:
        DamagedFileError: a value is none that a token file can have.
    """
    values = {name: content[name] for name in INFO_TYPES}
    if values["dtype"] not in _DTYPES:
        raise DamagedFileError(f"dtype is {values['dtype']!r:.40}, which must be one of {', '.join(_DTYPES)}")
    values["dtype"] = _DTYPES[values["dtype"]]
    if not (values["count"] >= 0 and values["source_bytes"] >= 0 and 1 <= values["vocab_size"] <= 2**32):
        raise DamagedFileError("a number is out of its range")
    if not isinstance(mask_sha256 := content.get("mask_sha256"), str | None):
        raise DamagedFileError(f"mask_sha256 is {mask_sha256!r:.40}, which must be a string")
    return TokenFileInfo(**values, mask_sha256=mask_sha256)
