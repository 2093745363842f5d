"""BPE training: against naive counting, the `tokenizers` package, and the worked example; for any number of workers."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basic.common.errors import InvalidInputError
from basic.train_bpe import merges_from_counts

from .adapters import run_train_bpe
from .conftest import shared_data
from .fixtures.make_tokenizer_fixtures import (
    SAMPLE,
    SNAPSHOT,
    SPECIAL_TOKENS,
    agree_up_to_a_tie,
    merges_of_tokenizers,
    naive_merges,
    naive_pretoken_counts,
)

pytestmark = pytest.mark.usefixtures("plain_path")

# Few letters give many ties, overlaps ("aaa") and tokens that several merges produce.
ties = st.text(st.sampled_from("aab b"), max_size=40)


def write(tmp_path_factory, data: bytes):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes(data)
    return path


def test_worked_example():
    words = "low low low low low lower lower widest widest widest newest newest newest newest newest newest"
    counts = {word.encode(): words.split().count(word) for word in words.split()}
    merges = merges_from_counts(counts, 100)
    text = ", ".join(f"{left.decode()} {right.decode()}" for left, right in merges)
    assert text == "s t, e st, o w, l ow, w est, n e, ne west, w i, wi d, wid est, low e, lowe r"
    assert merges_from_counts(counts, 3) == merges[:3]


def test_snapshot():
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    expected = [tuple(map(bytes.fromhex, line.split())) for line in snapshot["merges_hex"]]
    special_tokens = snapshot["special_tokens"]
    vocab, merges = run_train_bpe(SAMPLE, 256 + len(special_tokens) + len(expected), special_tokens)
    assert merges == expected
    tokens = [token.encode() for token in special_tokens] + [bytes([byte]) for byte in range(256)]
    assert vocab == dict(enumerate(tokens + [left + right for left, right in expected]))


@given(
    text=ties, special_tokens=st.sampled_from([[], ["b"], ["ab", "a"], ["a b", "b a"]]), num_merges=st.integers(0, 30)
)
def test_equals_naive_counting(tmp_path_factory, text, special_tokens, num_merges):
    path = write(tmp_path_factory, text.encode())
    vocab, merges = run_train_bpe(path, 256 + len(special_tokens) + num_merges, special_tokens)
    assert merges == naive_merges(naive_pretoken_counts(text, special_tokens), num_merges)
    assert len(vocab) == 256 + len(special_tokens) + len(merges)


@given(
    counts=st.dictionaries(
        st.text(st.sampled_from("ab\u00e9"), max_size=12).map(str.encode),
        st.integers(1, 3) | st.just(2**40),
        max_size=12,
    )
)
def test_merges_from_counts_equals_naive_counting(counts):
    assert merges_from_counts(counts, 40) == naive_merges(counts, 40)


def test_zero_counts_and_the_order_of_pretokens_do_not_matter():
    counts = {b"abab": 2, b"cdcd": 2, b"aaaa": 1, b"x": 9, b"": 4}
    merges = merges_from_counts(counts, 10)
    assert merges == merges_from_counts(dict(reversed(counts.items())) | {b"zzz": 0}, 10)
    assert merges[0] == (b"c", b"d")


@pytest.mark.parametrize("name", ["corpus.en", "german.txt", "tinystories_sample.txt"])
def test_equals_naive_counting_on_real_text(name):
    path = shared_data(name)
    _, merges = run_train_bpe(path, 257 + 60, ["<|endoftext|>"])
    counts = naive_pretoken_counts(path.read_bytes().decode(), ["<|endoftext|>"])
    assert merges == naive_merges(counts, 60)


@pytest.mark.parametrize(("name", "at_least"), [("corpus.en", 30), ("tinystories_2MiB.txt", 150)])
def test_equals_the_tokenizers_package_up_to_a_tie(name, at_least):
    path = shared_data(name)
    text = path.read_bytes().decode()
    _, merges = run_train_bpe(path, 257 + 200, ["<|endoftext|>"])
    theirs = merges_of_tokenizers(text, ["<|endoftext|>"], 200)
    agreed = agree_up_to_a_tie(merges, theirs, naive_pretoken_counts(text, ["<|endoftext|>"]))
    assert agreed >= at_least


@pytest.mark.parametrize("special_tokens", [["<|endoftext|>"], [], SPECIAL_TOKENS])
def test_result_is_the_same_for_any_number_of_workers(tmp_path, special_tokens):
    path = tmp_path / "corpus.txt"
    path.write_bytes(SAMPLE.read_bytes() * 40)
    vocab, merges = run_train_bpe(path, 600, special_tokens, num_workers=1)
    assert merges == naive_merges(naive_pretoken_counts(path.read_bytes().decode(), special_tokens), len(merges))
    for num_workers in (2, 4, None):
        result = run_train_bpe(path, 600, special_tokens, num_workers=num_workers, shard_bytes=1 << 12)
        assert result == (vocab, merges)


def test_ids_are_special_tokens_then_bytes_then_merges(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("aaab<|x y|>aaab<|x y|>")
    vocab, merges = run_train_bpe(str(path), 260, ["<|x y|>", "é"])
    assert vocab[0] == b"<|x y|>"
    assert vocab[1] == "é".encode()
    assert [vocab[2 + byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert vocab[258] == b"aa"
    assert merges == [(b"a", b"a"), (b"aa", b"a")]
    assert vocab[259] == b"aaa"
    assert len(vocab) == 260


def test_nothing_is_merged_across_special_tokens(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("ab<|endoftext|>ab<|endoftext|>" * 100)
    _, merges = run_train_bpe(path, 400, ["<|endoftext|>"])
    assert merges == [(b"a", b"b")]


def test_the_longest_special_token_is_used(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("xy<s><s>xy")
    assert run_train_bpe(path, 400, ["<s>", "<s><s>"])[1] == [(b"x", b"y")]


@pytest.mark.parametrize("text", ["", "a", "a b c", "<|endoftext|>"])
def test_training_stops_early_without_pairs(tmp_path, text):
    path = tmp_path / "corpus.txt"
    path.write_text(text)
    vocab, merges = run_train_bpe(path, 1000, ["<|endoftext|>"])
    assert len(vocab) == 257 + len(merges)
    assert merges == {"a b c": [(b" ", b"c"), (b" ", b"b")]}.get(text, [])


def test_newlines_are_not_translated(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\r\n\r\nx" * 5)
    assert run_train_bpe(path, 257, [])[1] == [(b"\r", b"\n")]


def test_progress_bars_change_nothing(tmp_path, capsys):
    shown = run_train_bpe(SAMPLE, 300, SPECIAL_TOKENS, progress=True)
    assert shown == run_train_bpe(SAMPLE, 300, SPECIAL_TOKENS)
    error = capsys.readouterr().err
    assert re.search("counting: 100%", error)
    assert re.search("merging: 100%", error)


# Bad input


def test_vocab_size_too_small(tmp_path):
    run_train_bpe(SAMPLE, 258, ["a", "b"])
    with pytest.raises(InvalidInputError, match=r"vocab_size=257 is too small: .* 2 special tokens need at least 258"):
        run_train_bpe(SAMPLE, 257, ["a", "b"])


@pytest.mark.parametrize(
    ("special_tokens", "error"),
    [([""], InvalidInputError), (["a", "a"], InvalidInputError), ([1], TypeError), ("a", TypeError)],
)
def test_bad_special_tokens(special_tokens, error):
    with pytest.raises(error, match="special"):
        run_train_bpe(SAMPLE, 300, special_tokens)


def test_missing_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nowhere\.txt'"):
        run_train_bpe(tmp_path / "nowhere.txt", 300, [])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        run_train_bpe(tmp_path, 300, [])


def test_the_error_names_the_offset_of_invalid_utf8(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"good \xc3\xa9 \xc3( bad")
    with pytest.raises(InvalidInputError, match=r"corpus\.txt' is not valid UTF-8 at byte offset 8 "):
        run_train_bpe(path, 300, [])
    path = shared_data("utf8tests.bin")
    with pytest.raises(UnicodeDecodeError) as expected:
        path.read_bytes().decode()
    with pytest.raises(InvalidInputError, match=f"at byte offset {expected.value.start} "):
        run_train_bpe(path, 300, [])


@pytest.mark.parametrize(
    ("counts", "num_merges", "message"), [({b"ab": 1}, -1, "num_merges=-1"), ({b"ab": -2}, 1, "count of b'ab' is -2")]
)
def test_bad_counts(counts, num_merges, message):
    with pytest.raises(InvalidInputError, match=message):
        merges_from_counts(counts, num_merges)


def test_pretokens_must_be_bytes():
    with pytest.raises(TypeError, match="pre-tokens must be bytes, got 'ab'"):
        merges_from_counts({"ab": 1}, 1)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("size", ["300", 300.0, None])
def test_a_size_that_is_no_integer_is_named(size):
    with pytest.raises(TypeError, match=f"vocab_size must be an integer, got {type(size).__name__}: {size!r}"):
        run_train_bpe("no such file", size, [])
    with pytest.raises(TypeError, match="num_merges must be an integer"):
        merges_from_counts({}, size)
