"""Encoding and decoding by the kernels against the plain path and tiktoken."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from basic.bpe.arrays import bytes_array
from basic.bpe.patterns.automaton import compile_splits
from basic.common.errors import InvalidInputError
from basic.encoding import encode_file
from basic.pretokenization import GPT2_PATTERN
from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.opening import open_tokens, read_info
from tests.conftest import SHARED_DATA, shared_data
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.difficult_text import END, OVERLAPPING, difficult_text, write
from tests.helpers.tokenizer_tools import BYTES, TEXT_FILES, tiktoken_of

# ---- encoding


@pytest.mark.parametrize("name", TEXT_FILES)
def test_ids_equal_those_of_tiktoken(gpt2, name):
    text = shared_data(name).read_bytes()[: 4 << 20].decode(errors="ignore")
    if name.endswith(".json"):
        text += "".join(json.loads(text))
    expected = tiktoken_of(gpt2).encode_to_numpy(text, allowed_special="all")
    for num_threads in (1, 2):
        ids = gpt2.encode_array(text, num_threads=num_threads)
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, expected)
    assert gpt2.encode(text[:100_000]) == tiktoken_of(gpt2).encode(text[:100_000], allowed_special="all")
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("seed", range(12))
def test_the_ids_do_not_depend_on_the_chunks(tmp_path, monkeypatch, pair, seed):
    fast, slow = pair
    rng = random.Random(seed)
    text = "".join(
        difficult_text(rng, 30) + rng.choice([*OVERLAPPING, "<|endoftext", "<|end|>", " th"]) for _ in range(300)
    )
    as_text = seed % 3 == 0
    expected = slow.encode(text, specials_as_text=as_text)
    assert fast.encode(text, specials_as_text=as_text) == expected
    texts = (text[start : start + 7] for start in range(0, len(text), 7))
    assert list(fast.encode_iterable(texts, specials_as_text=as_text)) == expected
    for data in (text, text.encode(), memoryview(text.encode()), np.frombuffer(text.encode(), np.uint8)):
        ids = fast.encode_array(data, num_threads=rng.randint(1, 8), specials_as_text=as_text)
        assert ids.tolist() == expected
        assert ids.dtype == np.uint16
    assert slow.encode_array(text.encode(), specials_as_text=as_text).tolist() == expected
    options: dict[str, Any] = {"specials_as_text": as_text, "chunk_bytes": rng.choice([1, 100, 3000])}
    path = write(tmp_path, text)
    for tokenizer, name in ((fast, "fast.bin"), (slow, "slow.bin")):
        info = encode_file(tokenizer, path, tmp_path / name, num_threads=rng.randint(1, 4), **options)
        assert info == read_info(tmp_path / name)
        assert open_tokens(tmp_path / name, verify=True).tolist() == expected
    assert read_info(tmp_path / "fast.bin") == read_info(tmp_path / "slow.bin")
    lines = text.splitlines(keepends=True)
    for num_threads in (1, 3):
        batch = fast.encode_batch(lines, num_threads=num_threads, specials_as_text=as_text)
        assert batch == [slow.encode(line, specials_as_text=as_text) for line in lines]


def test_a_full_cache_is_emptied(pair):
    from basic.bpe.kernels.encoders import PretokenEncoder
    from basic.bpe.kernels.merges.merge_arrays import merges_as_arrays
    from basic.bpe.kernels.scan import pattern_tables
    from basic.bpe.kernels.special_tokens import special_token_tables

    slow = pair[1]
    merges, no_specials = merges_as_arrays(slow._rules), special_token_tables([])
    encoder = PretokenEncoder(
        pattern_tables(compile_splits(GPT2_PATTERN.splits)),
        merges,
        np.dtype(np.uint16),
        max_slots=1 << 16,
        max_pool=1 << 14,
    )
    rng = random.Random(0)
    pretokens = [f" {rng.getrandbits(80):x}"[: rng.randint(2, 20)] for _ in range(60_000)]
    text = "".join(rng.choices(pretokens, k=100_000))
    ids = encoder.encode(bytes_array(text.encode()), 0, len(text), no_specials)
    assert ids.tolist() == slow.encode(text, specials_as_text=True)
    assert (len(encoder._table), len(encoder._pool)) == (4 << 16, 1 << 14), "the largest sizes"


def test_the_vocabulary_alone_determines_the_ids(trained):
    vocab, merges = trained
    rng = random.Random(0)
    text = SAMPLE.read_bytes().decode() + difficult_text(rng, 500)
    for largest in (len(vocab) - 1, 65_535, 65_536, 1_000_000, 3_000_000):
        ids = [*rng.sample(range(largest), len(vocab) - 1), largest]
        rng.shuffle(ids)
        shuffled = dict(zip(ids, vocab.values(), strict=True))
        fast = Tokenizer(shuffled, merges, [END], kernels=True)
        expected = Tokenizer(shuffled, merges, [END], kernels=False).encode(text)
        encoded = fast.encode_array(text)
        assert encoded.tolist() == fast.encode(text) == expected
        assert encoded.dtype == (np.uint16 if largest < 65_536 else np.uint32)
        assert fast.decode(encoded) == text


def test_merges_in_any_order():
    """A merge may come before those that produce its two tokens."""
    rng = random.Random(0)
    for _ in range(150):
        vocab, merges = dict(BYTES), []
        for _ in range(rng.randint(1, 12)):
            left, right = (
                rng.choice([b"a", b"b", *(token for token in vocab.values() if len(token) > 1)]) for _ in "12"
            )
            if left + right not in vocab.values():
                vocab[len(vocab)] = left + right
            merges.append((left, right))
        rng.shuffle(merges)
        fast, slow = (Tokenizer(vocab, merges, kernels=kernels) for kernels in (True, False))
        for length in (5, 20, 90, 150, 1500):
            text = "".join(rng.choices("ab", k=length))
            assert fast.encode(text) == slow.encode(text)


def test_a_missing_byte(tmp_path, trained):
    vocab = {i: token for i, token in trained[0].items() if token != b"q"}
    merges = [merge for merge in trained[1] if b"q" not in merge[0] + merge[1]]
    fast = Tokenizer(vocab, merges, kernels=True)
    assert fast.decode(fast.encode("fine")) == "fine"
    path = write(tmp_path, "fine " + "x" * 3000 + " q")
    for text in ("not quite", "x" * 3000 + "q"):
        with pytest.raises(InvalidInputError, match="no token for the byte 0x71"):
            fast.encode(text)
        with pytest.raises(InvalidInputError, match="no token for the byte 0x71"):
            fast.encode_array(text)
    with pytest.raises(InvalidInputError, match=r"no token for the byte 0x71, at byte offset 3006 of .*text\.txt"):
        encode_file(fast, path, tmp_path / "ids.bin")
    assert list(tmp_path.iterdir()) == [path]


def test_after_a_missing_byte_the_cache_is_still_correct(trained):
    vocab = {i: token for i, token in trained[0].items() if token != b"q"}
    merges = [merge for merge in trained[1] if b"q" not in merge[0] + merge[1]]
    fast, slow = Tokenizer(vocab, merges, kernels=True), Tokenizer(vocab, merges, kernels=False)
    for text in ("new words and a queen", "new words, " + "y" * 300 + "q and a queen"):
        with pytest.raises(InvalidInputError, match=rf"0x71, at byte offset {text.index('q')} of 'text'"):
            fast.encode(text)
        # The pre-tokens before it had slots already.
        assert fast.encode("new words and a new word") == slow.encode("new words and a new word")


def test_pretokens_too_long_for_the_cache_between_new_ones(pair):
    fast, slow = pair
    rng = random.Random(5)
    for _ in range(50):
        letters = ["".join(rng.choices("abcdeé", k=rng.choice([1, 3, 9, 17, 255, 256, 300, 700]))) for _ in range(9)]
        text = " ".join(letters)
        assert fast.encode(text) == slow.encode(text)


def test_a_text_that_is_a_pretoken_has_its_ids():
    # The plain path takes the ids of a short text from the cache, if it is one of the pre-tokens there.
    rng = random.Random(6)
    merges = [(b" ", b" "), (b"'", b"s"), (b"\n", b"\n"), (b" ", b"a"), (b"a", b"a")]
    vocab = BYTES | {256 + i: left + right for i, (left, right) in enumerate(merges)}
    warm = Tokenizer(vocab, merges, ["<|a|>"], kernels=False)
    for _ in range(3000):
        text = "".join(rng.choices("aas' \n\t1!<|>\u00a0", k=rng.randint(0, 12)))
        fresh = Tokenizer(vocab, merges, ["<|a|>"], kernels=False)
        assert warm.encode(text) == fresh.encode(text) == list(fresh.encode_iterable([text]))


def test_a_million_identical_letters(gpt2):
    for number in (10**6, 2 * 10**6):
        assert gpt2.encode_array("a" * number).tolist() == [24794] * (number // 4)


def test_surrogates(pair):
    fast, slow = pair
    for text in ("\ud83d\ude00", "a\ud800b", "\udfff" * 3):
        assert fast.encode(text) == slow.encode(text) == fast.encode_array(text).tolist()


@pytest.mark.parametrize("kernels", [True, False])
def test_bytes_that_are_not_utf8(tmp_path, monkeypatch, trained, kernels):
    tokenizer = Tokenizer(*trained, OVERLAPPING, kernels=kernels)
    rng = random.Random(0)
    garbage = b" ".join(difficult_text(rng, 20).encode()[rng.randint(0, 3) :] for _ in range(200))
    cases = [garbage, b"\xff", b"abc \xe2\x82", b"a" * 3000 + b"\x80", b"good \xed\xa0\x80 bad"]
    if (SHARED_DATA / "utf8tests.bin").is_file():
        cases.append((SHARED_DATA / "utf8tests.bin").read_bytes())
    for data in cases:
        path = write(tmp_path, data)
        expected = tokenizer.encode(data.decode(errors="replace"))
        with pytest.raises(UnicodeDecodeError) as error:
            data.decode()
        message = f"not valid UTF-8 at byte offset {error.value.start} "
        with pytest.raises(InvalidInputError, match=message):
            tokenizer.encode_array(data)
        with pytest.raises(InvalidInputError, match=message):
            encode_file(tokenizer, path, tmp_path / "ids.bin", chunk_bytes=500)
        assert list(tmp_path.iterdir()) == [path]
        assert tokenizer.encode_array(data, errors="replace", num_threads=2).tolist() == expected
        info = encode_file(tokenizer, path, tmp_path / "ids.bin", errors="replace", chunk_bytes=500)
        assert open_tokens(tmp_path / "ids.bin").tolist() == expected
        assert info.source_bytes == len(data)
        (tmp_path / "ids.bin").unlink()
        (tmp_path / "ids.json").unlink()


def test_an_interrupted_encode_file_leaves_nothing(tmp_path, monkeypatch, pair):
    path = write(tmp_path, "some words\n" * 10_000)
    written = []

    def interrupted(self, ids, source_bytes=0):
        written.append(source_bytes)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenFileWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_file(pair[0], path, tmp_path / "ids.bin", num_threads=2, chunk_bytes=1000)
    assert list(tmp_path.iterdir()) == [path]


# ---- decoding


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, np.uint64])
def test_arrays_are_decoded(gpt2, dtype):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, gpt2.vocab_size, 2_500_000 if dtype == np.uint16 else 1000).astype(dtype)
    assert gpt2.decode_bytes(ids) == b"".join(gpt2.vocab[i] for i in ids.tolist())
    assert gpt2.decode_bytes(ids[::-3]) == b"".join(gpt2.vocab[i] for i in ids[::-3].tolist())
    assert gpt2.decode(ids[:0]) == ""


def test_unknown_ids():
    tokenizer = Tokenizer({i + i // 100: bytes([i]) for i in range(256)}, [], kernels=True)
    assert tokenizer.decode(np.array([65, 66])) == "AB"
    for wrong in (-1, 100, 258, 1 << 40):
        with pytest.raises(InvalidInputError, match=f"id {wrong} at position 1 is not in the vocabulary"):
            tokenizer.decode(np.array([65, wrong, 66]))
