"""Batches: the right tokens, all starts equally likely, and the same batch for the same seed and step."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from basic.common.errors import InvalidConfigError, InvalidInputError, WrongTokenizerError
from basic.training.batches import BatchSampler, check_token_ids, document_starts, get_batch, to_device

from .adapters import run_get_batch


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("on_disk", [False, True])
def test_targets_are_the_inputs_shifted_by_one(tmp_path, dtype, on_disk):
    tokens = (np.arange(100) * 7 % 101).astype(dtype)
    if on_disk:
        tokens.tofile(tmp_path / "tokens")
        tokens = np.memmap(tmp_path / "tokens", dtype=dtype, mode="r")
    x, y = run_get_batch(dataset=tokens, batch_size=32, context_length=8, device="cpu")
    for batch in (x, y):
        assert (batch.dtype, batch.shape, batch.device.type) == (torch.int64, (32, 8), "cpu")
        assert batch.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    # Consecutive tokens differ by 7 modulo 101.
    assert ((y - x) % 101 == 7).all()
    y += 1
    assert torch.equal(x[:, 1:], y[:, :-1] - 1)


def test_every_start_is_equally_likely():
    """Starts 0 .. 90 - 7 - 1, each expected in 1 of 83 sequences.

    The count of a start in 83,000 sequences is binomial with mean 1000 and a standard deviation below sqrt(1000) < 32.
    By chance, one of 83 starts deviates by five standard deviations in fewer than 1 of 20,000 trials.
    """
    torch.manual_seed(0)
    counts = np.zeros(90, int)
    for _ in range(83):
        x, _ = run_get_batch(np.arange(90), 1000, 7, "cpu")
        counts += np.bincount(x[:, 0].numpy(), minlength=90)
    assert (counts[83:] == 0).all()
    assert (abs(counts[:83] - 1000) < 5 * 32).all()


def test_low_starts_are_not_favored():
    """The remainder of a 32-bit number would give the lower half of these starts 51.5 % of the sequences.

    0.5 % is ten standard deviations of the fraction of one half among 1,000,000 sequences. The tokens are an array of
    zeros, without memory of its own, that records the indices at which it is read.
    """

    class RecordingArray(np.ndarray):
        def __getitem__(self, indices):
            starts.append(indices[:, 0])
            return np.zeros(indices.shape, np.uint16)

    starts = []
    num_starts = int(2**32 / 16.5)
    tokens = np.broadcast_to(np.zeros(1, np.uint16), num_starts + 1).view(RecordingArray)
    torch.manual_seed(0)
    run_get_batch(tokens, 1_000_000, 1, "cpu")
    assert abs((starts[0] < num_starts // 2).mean() - 0.5) < 0.005


def test_batches_differ_and_torchs_seed_repeats_them():
    def draw():
        return run_get_batch(np.arange(10_000), 16, 4, "cpu")[0]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_the_shortest_dataset():
    x, y = run_get_batch(np.arange(6), 3, 5, "cpu")
    assert x.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert y.tolist() == [[1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_dataset_shorter_than_the_context(length):
    with pytest.raises(InvalidInputError, match=rf"has {length} tokens, but context_length=5 needs at least 6"):
        run_get_batch(np.arange(length), 3, 5, "cpu")
    with pytest.raises(InvalidInputError, match=rf"has {length} tokens, but context_length=5 needs at least 6"):
        BatchSampler(np.arange(length), 3, 5, seed=0)


@pytest.mark.parametrize("tokens", [np.zeros((9, 9), int), np.zeros(9), np.zeros(9, bool), np.int64(3)])
def test_tokens_must_be_one_dimensional_integers(tokens):
    with pytest.raises(InvalidInputError, match="dataset must be a one-dimensional array of integers"):
        run_get_batch(np.asarray(tokens), 3, 5, "cpu")


@pytest.mark.parametrize("convert", [torch.from_numpy, np.ndarray.tolist, lambda array: torch.from_numpy(array).int()])
def test_a_dataset_as_a_tensor_or_a_list(convert):
    inputs = []
    for dataset in (np.arange(100), convert(np.arange(100))):
        torch.manual_seed(1)
        inputs.append(get_batch(dataset, 2, 8, "cpu")[0])
    assert torch.equal(*inputs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(9), 3, 5), InvalidInputError, "dataset must be .* of integers, got torch.float32"),
        ((["a"], 3, 5), TypeError, r"dataset\[0\] must be an integer, got str: 'a'"),
        (("tokens.bin", 3, 5), TypeError, "dataset must be an array of token ids, got str: 'tokens.bin'"),
        ((None, 3, 5), TypeError, "dataset must be an array of token ids, got NoneType"),
        ((np.arange(9), "3", 5), TypeError, "batch_size must be an integer, got str: '3'"),
        ((np.arange(9), 3, 5.5), TypeError, "context_length must be an integer, got float: 5.5"),
    ],
)
def test_the_wrong_argument_is_named(monkeypatch, arguments, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would fail first
    with pytest.raises(error, match=message):
        get_batch(*arguments, "cpu")


@pytest.mark.parametrize(("batch_size", "context_length"), [(0, 5), (5, 0), (-1, 5)])
def test_sizes_below_one(batch_size, context_length):
    with pytest.raises(InvalidConfigError, match="must be at least 1"):
        run_get_batch(np.arange(9), batch_size, context_length, "cpu")


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "no such device"])
def test_an_unusable_device_raises_torchs_own_error(device):
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        torch.zeros(1).to(device)
    with pytest.raises(expected.type) as raised:
        run_get_batch(np.arange(9), 3, 5, device)
    assert str(raised.value) == str(expected.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_on_a_gpu():
    x, y = run_get_batch(np.arange(1000, dtype=np.uint16), 16, 100, "cuda")
    assert x.device.type == y.device.type == "cuda"
    assert torch.equal(y.cpu(), x.cpu() + 1)
    assert torch.equal(to_device(x.cpu(), "cuda:0"), x)


# --- The sampler -----------------------------------------------------------------------------------------------


def first_tokens(sampler, steps):
    """The starts of some steps' sequences, from a sampler over the tokens 0, 1, 2, ..."""
    return [sampler.batch(step)[0][:, 0].tolist() for step in steps]


def concatenate(steps):
    return [start for starts in steps for start in starts]


@pytest.mark.parametrize("starts", [None, np.arange(0, 900, 7)])
def test_a_batch_is_a_function_of_seed_and_step(starts):
    def make(seed=5):
        return BatchSampler(np.arange(1000), 8, 16, seed=seed, starts=starts)

    in_order = first_tokens(make(), range(60))
    sampler = make()
    np.random.seed(1)  # the global random states have no effect
    torch.manual_seed(1)
    for step in (59, 3, 31, 3, 0, 58):
        assert first_tokens(sampler, [step]) == [in_order[step]]
    assert len({tuple(starts) for starts in in_order}) == 60
    assert first_tokens(make(seed=6), range(60)) != in_order


def test_sequences_of_the_sampler():
    x, y = BatchSampler(np.arange(1000, dtype=np.uint16), 8, 16, seed=0).batch(0)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))


def test_random_windows_reach_both_ends():
    sampler = BatchSampler(np.arange(20), 64, 16, seed=0)
    assert set(concatenate(first_tokens(sampler, range(4)))) == {0, 1, 2, 3}


@given(
    num_starts=st.integers(1, 12),
    batch_size=st.integers(1, 30),
    first_step=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
)
def test_every_start_once_an_epoch(num_starts, batch_size, first_step, seed):
    """The concatenated batches are permutations of the starts, also if a batch spans several epochs."""
    starts = np.arange(num_starts) * 3 + 1
    sampler = BatchSampler(np.arange(100), batch_size, 8, seed=seed, starts=starts)
    steps = range(first_step, first_step + 2 * num_starts // batch_size + 3)
    drawn = concatenate(first_tokens(sampler, steps))
    first_epoch = -(first_step * batch_size) % num_starts
    for epoch in range(first_epoch, len(drawn) - num_starts + 1, num_starts):
        assert sorted(drawn[epoch : epoch + num_starts]) == starts.tolist()
    # The order in which the steps are asked for has no effect.
    again = BatchSampler(np.arange(100), batch_size, 8, seed=seed, starts=starts)
    assert concatenate(reversed(first_tokens(again, reversed(steps)))) == drawn


def test_epochs_differ_in_order():
    sampler = BatchSampler(np.arange(100), 50, 8, seed=0, starts=np.arange(50))
    epochs = first_tokens(sampler, range(4))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_past_epochs_are_not_kept_in_memory():
    sampler = BatchSampler(np.arange(100), 7, 8, seed=0, starts=np.arange(10))
    for step in range(100):
        sampler.batch(step)
    assert len(sampler._shuffled_starts) <= 2


@pytest.mark.parametrize("batch_sizes", [(8, 8, 8), (24,), (5, 12, 7)])
def test_shuffled_windows_are_the_same_for_all_batch_sizes_and_each_comes_once(batch_sizes):
    """As in a run that is resumed with other batch sizes: the next windows are those not seen."""
    drawn, step = [], 3
    for batch_size in batch_sizes:
        sampler = BatchSampler(np.arange(203), batch_size, 8, seed=1, shuffled=True)
        sampler.sequence_offset = len(drawn) - step * batch_size
        x, y = sampler.batch(step)
        assert torch.equal(y, x + 1)
        drawn += x[:, 0].tolist()
        step += 1
    sampler = BatchSampler(np.arange(203), 24, 8, seed=1, shuffled=True)
    assert drawn == sampler.row_starts(0).tolist()
    assert len({start // 8 for start in drawn}) == 24  # all windows


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (np.array([0, 84]), "starts go from 0 to 84, but .* only at 0 to 83"),
        (np.array([-1, 3]), "starts go from -1 to 3"),
        (np.array([], int), "non-empty array of integers"),
        (np.array([0.5]), "got float64"),
        (np.zeros((2, 2), int), r"shape \(2, 2\)"),
    ],
)
def test_invalid_starts(starts, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(np.arange(100), 4, 16, seed=0, starts=starts)


def test_the_last_possible_start():
    x, y = BatchSampler(np.arange(100), 1, 16, seed=0, starts=np.array([83])).batch(0)
    assert (x[0, 0].item(), y[0, -1].item()) == (83, 99)


def test_negative_seeds_and_steps():
    with pytest.raises(InvalidConfigError, match="seed=-1 must not be negative"):
        BatchSampler(np.arange(100), 4, 16, seed=-1)
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        BatchSampler(np.arange(100), 4, 16, seed=0).batch(-1)


# --- Documents and vocabulary ----------------------------------------------------------------------------------


@pytest.fixture(params=[1, 3, 1 << 22])
def any_chunks(request, monkeypatch) -> None:
    """Tokens are scanned in chunks, whose size must not change the result."""
    monkeypatch.setattr("basic.tokens.packed_documents._CHUNK_TOKENS", request.param)


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
@pytest.mark.parametrize(("context_length", "expected"), [(1, [0, 3, 4, 7]), (2, [0, 3, 4]), (5, [0, 3]), (8, [0])])
def test_document_starts_are_separators(dtype, context_length, expected):
    tokens = np.array([9, 1, 2, 9, 9, 3, 4, 9, 5], dtype)
    starts = document_starts(tokens, 9, context_length)
    assert starts.dtype == np.int64
    assert starts.tolist() == expected
    x, y = BatchSampler(tokens, len(starts), context_length, seed=0, starts=starts).batch(0)
    assert (x[:, 0] == 9).all()
    assert sorted(y[:, 0].tolist()) == sorted(tokens[starts + 1].tolist())


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize(("separator_id", "context_length"), [(8, 2), (9, 9), (9, 100), (70_000, 2), (-1, 2)])
def test_no_document_start(separator_id, context_length):
    tokens = np.array([9, 1, 2, 9, 9, 3, 4, 9, 5], np.uint16)
    message = (
        rf"token {separator_id}, the separator, is not in the first {max(9 - context_length, 0)} of 9 tokens "
        rf"\(a sequence needs {context_length} more\); .*rows = windows"
    )
    with pytest.raises(InvalidInputError, match=message):
        document_starts(tokens, separator_id, context_length)


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([5, 7, 300, 12, 300], np.uint16), "token id 300 at position 2 is not in the vocabulary of 300 ids"),
        (np.array([299, 65_535], np.uint16), "token id 65535 at position 1"),
        (np.array([5, -2, 7, -2]), "token id -2 at position 1"),
    ],
)
def test_ids_outside_the_vocabulary(tokens, message):
    with pytest.raises(WrongTokenizerError, match=message):
        check_token_ids(tokens, 300)


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("tokens", [np.array([0, 299], np.uint16), np.array([], np.uint16), np.array([299, 0])])
def test_ids_within_the_vocabulary(tokens):
    check_token_ids(tokens, 300)
