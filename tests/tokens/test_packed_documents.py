"""Documents packed into rows, against the algorithm document by document."""

import numpy as np
import pytest

from basic.tokens.info import BEGINS_DOCUMENT
from basic.tokens.packed_documents import PackedDocuments, find_documents, pack

SEPARATOR = 0


def corpus(seed: int, num_documents: int = 40, longest: int = 30) -> np.ndarray:
    random = np.random.default_rng(seed)
    documents = [[SEPARATOR, *random.integers(1, 99, random.integers(0, longest))] for _ in range(num_documents)]
    return np.concatenate(documents).astype(np.uint16)


def pack_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing: the fullest row that has room, of equally full ones the first that became so."""
    rooms: list[int] = []
    rows = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        row = min(fitting, key=lambda row: rooms[row])
        rooms[row] -= lengths[index]
        rows[index] = row
    return rows


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("capacity", [1, 7, 16, 100])
def test_rows_are_as_full_as_those_of_best_fit_decreasing(seed, capacity):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, capacity + 1, random.integers(0, 200))
    rows = pack(lengths, capacity)
    expected = pack_one_by_one(lengths.tolist(), capacity)
    totals = np.bincount(rows, lengths, minlength=len(lengths))
    assert (totals <= capacity).all()
    # Which of two equally full rows a document goes to is arbitrary; how full the rows become is not.
    assert sorted(totals) == sorted(np.bincount(np.array(expected, int), lengths, minlength=len(lengths)))


@pytest.mark.parametrize("context_length", [1, 5, 8, 16, 64])
def test_an_epoch_has_every_input_once_and_documents_are_not_divided_unless_too_long(context_length):
    tokens = corpus(1)
    starts = find_documents(tokens, SEPARATOR, None)
    packed = PackedDocuments(starts, len(tokens), context_length, seed=3)
    positions, document_starts = packed.rows(np.arange(packed.num_rows))
    assert sorted(positions[positions >= 0]) == list(range(len(tokens) - 1))
    for row, begins in zip(positions, document_starts, strict=True):
        seen = row[row >= 0]
        assert (row[len(seen) :] == -1).all()  # padding comes last
        assert (begins[len(seen) :] == len(seen)).all()
        for index, position in enumerate(seen):
            first = begins[index]
            assert (seen[first : index + 1] == np.arange(seen[first], position + 1)).all()
            offset = seen[first] - starts[starts <= seen[first]].max()
            assert offset % context_length == 0  # only what is too long begins elsewhere
            assert first == 0 or begins[first - 1] != first
    # Few rows are needed.
    lengths = np.diff([*starts, len(tokens) - 1])
    assert packed.num_rows <= -(-(len(tokens) - 1) // context_length) * 1.3 + 1
    assert packed.num_rows >= (lengths.sum() + context_length - 1) // context_length


def test_the_order_is_another_in_each_epoch_and_for_each_seed_and_depends_on_nothing_else():
    tokens = corpus(2, 300)
    starts = find_documents(tokens, SEPARATOR, None)
    packed = PackedDocuments(starts, len(tokens), 16, seed=0)
    n = packed.num_rows
    first, second = (packed.rows(np.arange(start, start + n))[0] for start in (0, n))
    assert not np.array_equal(first, second)
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
    assert not np.array_equal(first, PackedDocuments(starts, len(tokens), 16, seed=1).rows(np.arange(n))[0])
    across = packed.rows(np.arange(n - 3, n + 3))[0]
    assert np.array_equal(across, np.concatenate([first[-3:], second[:3]]))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_documents_begin_where_the_mask_says_or_at_the_separators(monkeypatch, chunk):
    monkeypatch.setattr("basic.tokens.packed_documents._CHUNK_TOKENS", chunk)
    tokens = corpus(3)
    mask = np.zeros(len(tokens), np.uint8)
    mask[[0, 7, 20]] = BEGINS_DOCUMENT
    mask[[3, 20]] |= 1
    assert find_documents(tokens, SEPARATOR, mask).tolist() == [0, 7, 20]
    assert find_documents(tokens, SEPARATOR, None).tolist() == np.flatnonzero(tokens == SEPARATOR).tolist()


def test_tokens_before_the_first_separator_are_a_document():
    packed = PackedDocuments(np.array([3]), 6, 4, seed=0)
    positions, starts = packed.rows(np.arange(packed.num_rows))
    rows = sorted(map(tuple, positions))
    assert rows == [(0, 1, 2, -1), (3, 4, -1, -1)]
    assert sorted(map(tuple, starts)) == [(0, 0, 0, 3), (0, 0, 2, 2)]
