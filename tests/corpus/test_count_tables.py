"""Tables of pre-tokens and counts on disk."""

import gzip
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basic.bpe import compiled, loading
from basic.bpe.arrays import PretokenCounts
from basic.common.errors import InvalidInputError
from basic.corpus.count_tables import concatenate, merge_tables, read_table, sorted_table, write_table
from basic.corpus.counting import ShardCounting, count_pretokens, count_shard
from basic.corpus.shards import entire_source
from basic.corpus.sources import TextSource
from basic.train_bpe import arrays_for_kernels, train_bpe
from tests.fixtures.make_tokenizer_fixtures import SAMPLE, naive_pretoken_counts
from tests.helpers.corpus_tools import END, SPECIAL, names_in

COUNTS = st.dictionaries(
    st.builds(
        bytes.__add__,
        st.sampled_from([b"", b"abcdefg", b"abcdefgh", b"abcdefghijklmnop", b"a\0", b"\xff" * 8]),
        st.binary(min_size=1, max_size=3),
    ),
    st.integers(1, 1 << 40),
    max_size=12,
)


@settings(max_examples=40)
@given(tables=st.lists(COUNTS, max_size=7), block_pretokens=st.integers(1, 5), fan_in=st.integers(2, 4))
def test_tables_are_merged(tmp_path_factory, tables, block_pretokens, fan_in):
    folder = tmp_path_factory.getbasetemp()
    expected = sum((Counter(table) for table in tables), Counter())
    for i, table in enumerate(tables):
        blocks = [sorted_table(Counter(table))] if table else []
        write_table(folder / f"{i}.words", blocks, block_pretokens=block_pretokens)
    for kernels in (False, True):
        stored = [read_table(folder / f"{i}.words") for i in range(len(tables))]
        merged = concatenate(list(merge_tables(stored, kernels=kernels, fan_in=fan_in)))
        assert list(merged.to_counter().items()) == sorted(expected.items())


def test_unsorted_pretokens_are_sorted():
    rng = np.random.default_rng(0)
    for alphabet in (b"ab", bytes(range(256))):
        words = [bytes(rng.choice(list(alphabet), rng.integers(1, 30))) for _ in range(3000)]
        words += [b"x" * length for length in range(1, 200)]
        lengths = np.cumsum([0, *map(len, words)])
        table = PretokenCounts(np.frombuffer(b"".join(words), np.uint8), lengths, np.ones(len(words), np.int64))
        assert list(compiled.sort_pretokens(table).to_counter().items()) == sorted(Counter(words).items())


def test_memory_does_not_grow_with_the_tables(tmp_path):
    """The tables have 5 MB, in blocks of 20 kB."""
    for number in range(4):
        counts = Counter({b"%07d" % i: 1 for i in range(number, 200_000, 4)})
        write_table(tmp_path / str(number), [sorted_table(counts)], block_pretokens=1000)
    loading.load_kernels("training")
    tracemalloc.start()
    merged = merge_tables([read_table(tmp_path / str(i)) for i in range(4)], kernels=True)
    record = write_table(tmp_path / "all", merged, block_pretokens=1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (record["words"], record["count"]) == (200_000, 200_000)
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("kernels", [False, True])
def test_a_shard_with_many_distinct_pretokens_is_counted_in_several_tables(tmp_path, kernels):
    """A long stream is such a shard."""
    text = " ".join(f"{number * 7919 % 2500:x}" for number in range(5000))
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.encode()))
    counting = ShardCounting(special_tokens=(END,), kernels=kernels, num_threads=2, chunk_bytes=2000, max_pretokens=300)
    (tmp_path / "work").mkdir()
    count_shard(counting, (entire_source(TextSource(tmp_path / "text.gz")),), str(tmp_path / "work" / "table"))
    table = concatenate(list(read_table(tmp_path / "work" / "table")))
    assert list(table.to_counter().items()) == sorted(naive_pretoken_counts(text, [END]).items())
    assert names_in(tmp_path / "work") == {"table"}


def test_too_many_distinct_pretokens_to_train_on():
    with pytest.raises(InvalidInputError, match=r"distinct pre-tokens .* are too many .*min_count=2"):
        arrays_for_kernels(count_pretokens(SAMPLE, SPECIAL), kernels=True, max_symbols=100)
    assert len(train_bpe(SAMPLE, 300, [END], kernels=True, min_count=3)[1]) == 36
