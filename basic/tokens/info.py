"""What is recorded about token ids on disk: dtype, count, checksum and tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
_DTYPES = {"uint16": UINT16, "uint32": UINT32}


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


def read_sidecar(path: str | os.PathLike) -> TokenFileInfo:
    """What the sidecar of the token file at `path` says.

    Raises:
        FileNotFoundError: there is no sidecar.
        ValueError: the sidecar is damaged, or describes something else.
    """
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
