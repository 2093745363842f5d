"""Where tokens are in a text, and decoding them one after the other: against `tokenizers` and tiktoken."""

from __future__ import annotations

import pickle
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from basic.bytes_utils import to_printable
from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import TokenizerSettings
from basic.train_bpe import train_bpe
from tests.helpers.tokenizer_tools import BYTES, tiktoken_of, tokenizers_of

from ..fixtures.make_tokenizer_fixtures import SAMPLE

END, BREAK = "<|endoftext|>", "<|break|>"

TEXTS = st.lists(
    st.sampled_from([*"abe th", "é", "ß", "€", "😀", "👩‍👩‍👧", "日本", "e\u0301", "\n", END, BREAK, "<|end"])
).map("".join)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(*train_bpe(SAMPLE, 500, [END, BREAK]), [END, BREAK])


@pytest.fixture(scope="module")
def theirs(ours) -> tokenizers.Tokenizer:
    return tokenizers_of(ours)


@pytest.fixture(scope="module")
def tiktokens(ours) -> tiktoken.Encoding:
    return tiktoken_of(ours)


# Spans


@given(text=TEXTS)
@example(text="")
@example(text=f"né 😀日{END}{BREAK}")
def test_spans_equal_those_of_tokenizers_and_tiktoken(ours, theirs, tiktokens, text):
    encoding = ours.encode(text, offsets=True)
    expected = theirs.encode(text)
    assert encoding.ids == ours.encode(text) == expected.ids
    assert encoding.char_spans == expected.offsets
    decoded, starts = tiktokens.decode_with_offsets(encoding.ids)
    # tiktoken gives a token that begins inside a character the start of this character.
    assert decoded == text
    assert [start for start, _ in encoding.char_spans] == starts


@pytest.mark.parametrize("kernels", [False, True])
def test_spans_by_definition(ours, kernels):
    """Characters and bytes are looked up one by one, also with surrogates and special tokens as text."""
    tokenizer = Tokenizer(ours.vocab, ours.merges, [END, BREAK], kernels=kernels)
    generator = random.Random(3)
    parts = [*"abe th", "é", "€", "😀", "日本", END, "\ud83d", "\ude00", "\ud83d\ude00", "\udcff"]
    for specials_as_text in (False, True):
        for _ in range(100):
            text = "".join(generator.choices(parts, k=generator.randrange(12)))
            ids, char_spans, byte_spans = tokenizer.encode(text, specials_as_text=specials_as_text, offsets=True)
            assert ids == tokenizer.encode(text, specials_as_text=specials_as_text)
            data, owners = b"", []  # of each byte: the span of its character
            position = 0
            while position < len(text):
                pair = (
                    "\ud800" <= text[position] <= "\udbff" and "\udc00" <= text[position + 1 : position + 2] <= "\udfff"
                )
                character = text[position : position + 1 + pair]
                encoded = character.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
                owners += [(position, position + len(character))] * len(encoded)
                data, position = data + encoded, position + len(character)
            assert [data[start:stop] for start, stop in byte_spans] == [tokenizer.vocab[i] for i in ids]
            assert all(stop == start for (_, stop), (start, _) in pairwise(byte_spans))
            assert char_spans == [(owners[start][0], owners[stop - 1][1]) for start, stop in byte_spans]


def test_spans_through_normalization(ours, theirs):
    """The package gives a composed character the span of the first of its characters only."""
    tokenizer = Tokenizer(ours.vocab, ours.merges, [END, BREAK], settings=TokenizerSettings(normalizer="NFC"))
    theirs = tokenizers.Tokenizer.from_str(theirs.to_str())
    theirs.normalizer = tokenizers.normalizers.NFC()
    generator = random.Random(4)
    parts = [*"abe tho", "é", "e\u0301", "\u0301", "\u0323", "q\u0307\u0323", "\u212b", "\u1112\u1161\u11ab", "\ud55c"]
    parts += ["\u0958", "\U0001f600", END]
    texts = ["".join(generator.choices(parts, k=generator.randrange(9))) for _ in range(300)]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, offsets=True), strict=True):
        expected = theirs.encode(text)
        assert encoding.ids == tokenizer.encode(text) == expected.ids
        spans = zip(encoding.ids, encoding.char_spans, encoding.byte_spans, expected.offsets, strict=True)
        for token_id, (start, stop), (first, last), (their_start, their_stop) in spans:
            assert start <= their_start < their_stop <= stop
            assert tokenizer.vocab[token_id] in unicodedata.normalize("NFC", text[start:stop]).encode()
            assert text.encode()[first:last] in text[start:stop].encode()
            if unicodedata.is_normalized("NFC", text):
                assert ((start, stop), text.encode()[first:last]) == (
                    (their_start, their_stop),
                    tokenizer.vocab[token_id],
                )
        assert max((stop for _, stop in encoding.char_spans), default=0) == len(text)
    (encoding,) = tokenizer.encode_batch(["\ud83d\ude00e\u0301"], offsets=True)
    assert encoding.char_spans[-1] == (2, 4)
    assert encoding.byte_spans[-1] == (4, 7)


def test_tokens_that_are_not_the_text_have_no_spans(ours, monkeypatch):
    monkeypatch.setitem(ours.vocab, ours.encode("a")[0], b"A")
    with pytest.raises(InvalidInputError, match=r"changes the text .* encode without offsets"):
        ours.encode("a b", offsets=True)


# Decoding

ids_of_bytes = st.binary(max_size=30).map(list)


@given(data=ids_of_bytes, sizes=st.lists(st.integers(0, 4), max_size=40))
@example(data=list("é😀\ufffd".encode()), sizes=[])
@example(data=[0xF0, 0x9F, 0x41, 0xE2, 0x82], sizes=[])
@example(data=[0xED, 0xA0, 0x80, 0xF4, 0x90], sizes=[1, 1, 1, 1, 1])
def test_a_stream_of_any_bytes_is_what_decode_returns(data, sizes):
    tokenizer = Tokenizer(BYTES, [])
    decoder, texts, rest = tokenizer.stream_decoder(), [], data
    for size in sizes:
        texts.append(decoder.decode(rest[:size]))
        rest = rest[size:]
    texts += [decoder.decode(token_id) for token_id in rest]
    assert "".join([*texts, decoder.finish()]) == tokenizer.decode(data)
    assert decoder.finish() == ""  # it can be used again
    assert decoder.decode(65) == "A"


def test_a_stream_has_no_unfinished_characters():
    tokenizer = Tokenizer(BYTES, [], [END])
    decoder = tokenizer.stream_decoder(skip_special_tokens=True)
    assert [decoder.decode(token_id) for token_id in tokenizer.encode(f"né{END}😀!")] == [
        *("n", "", "é", "", "", "", "", "😀", "!")
    ]


@pytest.mark.parametrize("kernels", [False, True])
def test_special_tokens_can_be_left_out(ours, theirs, kernels):
    tokenizer = Tokenizer(ours.vocab, ours.merges, [END, BREAK], kernels=kernels)
    ids = tokenizer.encode(f"{END}the né{BREAK}😀{END}")
    for kind in (list, tuple, np.array, torch.tensor):
        assert tokenizer.decode(kind(ids), skip_special_tokens=True) == "the né😀"
        assert tokenizer.decode(kind(ids)) == f"{END}the né{BREAK}😀{END}"
    assert theirs.decode(ids, skip_special_tokens=True) == "the né😀"
    assert tokenizer.decode([], skip_special_tokens=True) == ""
    for kind in (list, np.array):
        with pytest.raises(InvalidInputError, match="id 999 at position 2"):
            tokenizer.decode(kind([0, 0, 999]), skip_special_tokens=True)


def test_decode_batch(ours):
    rows = [ours.encode("the"), [], ours.encode(f"né{END}")]
    assert ours.decode_batch(rows) == ["the", "", f"né{END}"]
    assert ours.decode_batch(iter(rows), skip_special_tokens=True) == ["the", "", "né"]
    assert ours.decode_batch(np.array([[70, 71], [72, 73]])) == [ours.decode([70, 71]), ours.decode([72, 73])]
    with pytest.raises(TypeError, match=r"write \[5\]"):
        ours.decode_batch([5, 6])


# Tokens


def test_tokens_and_ids(ours, theirs):
    assert len(ours) == len(ours.vocab) == theirs.get_vocab_size() == 500
    for token_id in range(500):
        token = ours.id_to_token(token_id)
        assert token is not None
        assert ours.token_to_id(token) == token_id == theirs.token_to_id(to_printable(token))
    assert ours.token_to_id(" the") == ours.encode(" the")[0]
    assert ours.token_to_id(END) == ours.special_token_ids[END]
    assert ours.token_to_id("no token") is ours.token_to_id("\ud800") is ours.id_to_token(500) is None
    assert pickle.loads(pickle.dumps(ours)).token_to_id(END) == ours.token_to_id(END)

    gaps = Tokenizer({7: b"a", 3: b"b", 9: b"a"}, [], ["<s>"])
    assert (len(gaps), gaps.vocab_size, gaps.token_to_id("a"), gaps.id_to_token(4)) == (4, 11, 7, None)
    with pytest.raises(TypeError, match="token_id must be an integer, got str"):
        gaps.id_to_token("a")  # ty: ignore[invalid-argument-type]
