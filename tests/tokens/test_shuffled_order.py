"""The shuffled order of windows: each once an epoch, as random as a shuffled array, and no array of all windows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basic.tokens.shuffled_order import ShuffledWindows, permute


@given(size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_every_number_has_one_image(size: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(2**63, size=6, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


@given(num_tokens=st.integers(5, 200), context_length=st.integers(1, 4), seed=st.integers(0, 9))
def test_windows_of_an_epoch_do_not_overlap_and_fit(num_tokens: int, context_length: int, seed: int) -> None:
    order = ShuffledWindows(num_tokens, context_length, seed)
    for epoch in range(3):
        starts = np.sort(order.starts(epoch * order.num_windows + np.arange(order.num_windows)))
        assert (np.diff(starts) == context_length).all()
        assert starts[0] in range(context_length)
        # No token is left out but those before the offset, and fewer than a window's at the end.
        assert num_tokens - 2 * context_length <= starts[-1] + context_length < num_tokens


def test_images_are_as_uniform_as_random_ones() -> None:
    """Image and number in a table of 10 x 10: of 10,000 pairs each field has 100, with a standard deviation below 10.

    A chi-squared sum of 81 degrees of freedom has the mean 81 and a standard deviation of 12.7.
    """
    keys = np.random.default_rng(0).integers(2**63, size=6, dtype=np.uint64)
    images = permute(np.arange(10_000), 10_000, keys)
    for numbers in (np.arange(10_000), np.roll(images, 1)):  # also of neighbors
        table = np.histogram2d(numbers, images, bins=10)[0]
        assert ((table - 100) ** 2 / 100).sum() < 81 + 5 * 12.7


def test_epochs_and_seeds_differ_and_nothing_depends_on_how_many_are_asked_for() -> None:
    order = ShuffledWindows(1000, 8, 0)
    starts = order.starts(np.arange(3 * order.num_windows))
    first, second, third = starts.reshape(3, -1)
    assert first.tolist() != second.tolist() != third.tolist()
    assert len({epoch.min() for epoch in (first, second, third)}) > 1  # the offsets
    assert ShuffledWindows(1000, 8, 1).starts(np.arange(124)).tolist() != first.tolist()
    singly = [order.starts(np.array([sequence])).item() for sequence in range(len(starts))]
    assert singly == starts.tolist()


@pytest.mark.parametrize("num_tokens", [10**10, 10**15])
def test_a_large_text_needs_no_memory(num_tokens: int) -> None:
    tracemalloc.start()
    order = ShuffledWindows(num_tokens, 1024, 0)
    starts = order.starts(np.arange(order.num_windows - 32, order.num_windows + 32))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert 0 <= starts.min() < starts.max() <= num_tokens - 1025
    assert len(set(starts.tolist())) == 64
