"""Decode: copy the bytes of one token after the other, eight at a time."""

from __future__ import annotations

import numpy as np

from basic.bpe.arrays import joined_bytes
from basic.bpe.kernels.instructions import (
    TYPE_OFFSET,
    U64,
    allocate,
    as_integer,
    bytes_address,
    clear_error,
    free,
    int32s_at,
    list_item,
    list_size,
    load8,
    load_address,
    new_bytes,
    new_integer,
    store8,
    writable_bytes_at,
)
from basic.common.native.kernel import PreparedCall, functions_are_safe, kernel

_BLOCK_IDS = 1 << 20  # decoded at a time, so that the temporary arrays are small


@kernel
def _copy_tokens(ids, data, starts, lengths, out):
    """Write the bytes of tokens to `out`, which has eight bytes more than they need."""
    offset_out = U64(0)
    for i in range(len(ids)):
        start, length = U64(starts[ids[i]]), U64(lengths[ids[i]])
        # Almost all tokens have at most eight bytes: one copy without a branch.
        store8(out, offset_out, load8(data, start))
        for k in range(U64(8), length, U64(8)):
            store8(out, offset_out + k, load8(data, start + k))
        offset_out += length


@kernel
def _ids_of_list(items, type_of_int, lengths, ids):
    """Write the items of a Python list to an array; returns the number of bytes of their tokens.

    It returns -1 if an item is not a known id. Items must be exactly of type int: to convert others could run Python
    code, which could change the list.
    """
    num_bytes = 0
    for i in range(len(ids)):
        item = list_item(items, i)
        if load_address(item + TYPE_OFFSET) != type_of_int:
            return -1
        token_id = as_integer(item)
        if token_id < 0 or token_id >= len(lengths) or lengths[token_id] < 0:
            clear_error()  # the number may be too large
            return -1
        ids[i] = token_id
        num_bytes += lengths[token_id]
    return num_bytes


@kernel
def _decode_list(items, type_of_int, data, starts, lengths):
    """Decode a Python list of ids to a bytes object; the result is an int object if an item is not a known id."""
    num_ids = list_size(items)
    memory = allocate(4 * num_ids)
    if memory == 0:
        return new_integer(0)
    ids, result = int32s_at(memory, num_ids), 0
    num_bytes = _ids_of_list(items, type_of_int, lengths, ids)
    if num_bytes < 0:
        result = new_integer(0)
    else:
        result = new_bytes(0, num_bytes)
        if result != 0:
            # The last ids byte by byte, because a copy of eight bytes would write after the end.
            last, tail = num_ids, 0
            while last > 0 and tail < 8:
                last -= 1
                tail += lengths[ids[last]]
            out = writable_bytes_at(bytes_address(result), num_bytes)
            _copy_tokens(ids[:last], data, starts, lengths, out)
            offset_out = num_bytes - tail
            for i in range(last, num_ids):
                for k in range(lengths[ids[i]]):
                    out[offset_out + k] = data[starts[ids[i]] + k]
                offset_out += lengths[ids[i]]
    free(memory)
    return result


class TokenBytes:
    """The bytes of all tokens in one array."""

    def __init__(self, tokens: dict[int, bytes]) -> None:
        ids = np.array(list(tokens), np.int64)
        self._lengths = np.full(ids.max(initial=-1) + 1, -1, np.int64)
        self._lengths[ids] = [len(token) for token in tokens.values()]
        self._starts = np.zeros(len(self._lengths), np.int64)
        self._data, starts = joined_bytes([*tokens.values(), bytes(8)])
        self._starts[ids] = starts[:-2]
        self._list_call = PreparedCall(_decode_list, 0, id(int), self._data, self._starts, self._lengths)
        self._decode_list = self._list_call.as_function() if functions_are_safe() else None

    def decode_list(self, ids: list[int]) -> bytes | None:
        """The bytes of ids, or None if an item is not exactly an int or not in the vocabulary."""
        decoded = self._decode_list(ids) if self._decode_list is not None else None
        return decoded if isinstance(decoded, bytes) else None

    def decode(self, ids: np.ndarray) -> bytes | None:
        """The bytes of integer ids, or None if an id is not in the vocabulary."""
        blocks = []
        for start in range(0, len(ids), _BLOCK_IDS):
            block = ids[start : start + _BLOCK_IDS]
            if block.min() < 0 or block.max() >= len(self._lengths) or self._lengths[block].min() < 0:
                return None
            num_bytes = int(self._lengths[block].sum())
            out = np.empty(num_bytes + 8, np.uint8)
            _copy_tokens(block.astype(np.int64), self._data, self._starts, self._lengths, out)
            blocks.append(out[:num_bytes])
        return b"".join(block_bytes.data for block_bytes in blocks)
