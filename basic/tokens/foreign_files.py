"""Token files of other programs: those with a header, or with another dtype than the given one, are recognized."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from basic.common.errors import InvalidInputError
from basic.common.files import open_file

# llm.c: the first of 256 integers (int32) before the ids, and the dtype of the ids.
_LLM_C = {20240520: "uint16", 20240801: "uint32"}
_LLM_C_HEADER_BYTES = 1024

_SAMPLE_IDS = 1 << 13
_MIN_SAMPLE_IDS = 128
_MAX_VOCAB_SIZE = 1 << 21  # of known tokenizers, with much to spare
_MIN_DISTINCT_IDS = 16  # of text
_MAX_SMALL_ID = 1 << 12


def check_header(path: Path) -> None:
    """Check that a flat file without a sidecar has no header.

    Raises:
        InvalidInputError: it is a file of llm.c.
    """
    with open_file(path) as file:
        head = file.read(8)
    magic, version = struct.unpack("<ii", head) if len(head) == 8 else (0, 0)
    if (right := _LLM_C.get(magic)) is not None and 0 < version < 256:
        raise InvalidInputError(
            f"{path} is a token file of llm.c: {_LLM_C_HEADER_BYTES} bytes of header, then ids of {right}; write the "
            f"ids without it: np.fromfile({str(path)!r}, {right!r}, offset={_LLM_C_HEADER_BYTES}).tofile('ids.bin'), "
            f"and open that with dtype={right!r}"
        )


def check_ids(path: Path, ids: np.ndarray) -> None:
    """Check that the ids of a flat file without a sidecar are not plainly those of another dtype.

    Raises:
        InvalidInputError: they are.
    """
    right = _dtype_by_content(ids)
    if right is not None and right != ids.dtype:
        raise InvalidInputError(
            f"{path} was opened with dtype={ids.dtype.name}, but it holds ids of {right}, as its content shows; open "
            f"it with dtype={right!r}"
        )


def _dtype_by_content(ids: np.ndarray) -> str | None:
    """The dtype that the first ids certainly have, None if several are possible.

    In a file of uint32 every second uint16 is the high half of an id and so small, while the others are not. In a file
    of uint16 a uint32 consists of two ids, and is too large for an id unless the second is small.
    """
    if ids.dtype.kind not in "iu" or len(ids) < _MIN_SAMPLE_IDS or ids.dtype.itemsize not in (2, 4, 8):
        return None
    sample = ids[:_SAMPLE_IDS].view(f"<u{ids.dtype.itemsize}")
    sample = np.asarray(sample[: len(sample) // 2 * 2])
    if ids.dtype.itemsize < 8 and len(ids) % 2 == 0:
        low, high = sample[0::2], sample[1::2]
        is_high_half = high.max() == 0 or (
            ids.dtype.itemsize == 2 and high.max() < _MAX_VOCAB_SIZE >> 16 and low.max() >= 256
        )
        if is_high_half and len(np.unique(low)) >= _MIN_DISTINCT_IDS:
            doubled = _dtype_by_content(ids.view(f"<u{2 * ids.dtype.itemsize}"))
            return doubled or f"uint{16 * ids.dtype.itemsize}"
    # Two small ids in the halves of a number: as the id of one token, it would be large, and its low half any number.
    low, high = sample & (1 << 4 * ids.dtype.itemsize) - 1, sample >> 4 * ids.dtype.itemsize
    are_small_ids = high.any() and low.max() < _MAX_SMALL_ID and len(np.unique(high)) > 1
    if ids.dtype.itemsize > 2 and (np.count_nonzero(sample >= _MAX_VOCAB_SIZE) > len(sample) // 16 or are_small_ids):
        halves = ids.view(f"<u{ids.dtype.itemsize // 2}")
        return _dtype_by_content(halves) or f"uint{4 * ids.dtype.itemsize}"
    return None
