"""Learning more merges after given ones, and tokens of limited length: against the algorithm by definition."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from basic.bpe.plain import merge_rules, merge_short, number_merges
from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
from basic.train_bpe import Merge, learn_more_merges, merges_from_counts, train_bpe

from ..fixtures.make_tokenizer_fixtures import SAMPLE

END = "<|endoftext|>"
BOTH = pytest.mark.parametrize("kernels", [False, True])


def random_counts(seed: int, alphabet: bytes = b"aaab\xc3\xa9c") -> dict[bytes, int]:
    generator = random.Random(seed)
    pretokens = (bytes(generator.choices(alphabet, k=generator.randrange(1, 12))) for _ in range(60))
    return {pretoken: generator.randrange(1, 9) for pretoken in pretokens}


def encoded(pretoken: bytes, merges: list[Merge]) -> list[bytes]:
    """The tokens of a pre-token, as the tokenizer's plain path finds them."""
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)])
    tokens = dict.fromkeys([*tokens, *(token for merge in merges for token in merge)])
    by_number = list(tokens)
    rules = merge_rules({token: number for number, token in enumerate(by_number)}, merges)
    return [by_number[number] for number in merge_short(list(pretoken), rules.ranks, rules.results)]


def by_definition(
    counts: dict[bytes, int], num_merges: int, first: list[Merge], max_token_bytes: int | None
) -> list[Merge]:
    """In each step count all pairs, and merge the most frequent one that may be merged."""
    words = [(encoded(pretoken, first), count) for pretoken, count in counts.items()]
    merges: list[Merge] = []
    while len(merges) < num_merges:
        pairs: Counter[Merge] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        allowed = [pair for pair in pairs if max_token_bytes is None or sum(map(len, pair)) <= max_token_bytes]
        if not allowed:
            break
        left, right = max(allowed, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return merges


def with_all_splits(merges: list[Merge]) -> list[Merge]:
    """For each token all merges of earlier tokens that make it, as files that come from tiktoken's ranks have them."""
    known, result = {bytes([byte]) for byte in range(256)}, []
    for left, right in merges:
        token = left + right
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        result += [split for split in splits if set(split) <= known]
        known.add(token)
    return result


@BOTH
@pytest.mark.parametrize("max_token_bytes", [None, 1, 2, 3, 5])
def test_merges_of_limited_length_by_definition(kernels, max_token_bytes):
    for seed in range(4):
        counts = random_counts(seed)
        expected = by_definition(counts, 40, [], max_token_bytes)
        assert merges_from_counts(counts, 40, max_token_bytes=max_token_bytes, kernels=kernels) == expected
        assert max((len(left + right) for left, right in expected), default=0) <= (max_token_bytes or 12)


@BOTH
def test_more_merges_are_those_of_an_uninterrupted_training(kernels):
    counts = random_counts(1)
    merges = merges_from_counts(counts, 60, kernels=False)
    for num_first in (0, 1, 7, 30, len(merges)):
        first = merges[:num_first]
        assert merges_from_counts(counts, 60 - num_first, first_merges=first, kernels=kernels) == merges[num_first:]


@BOTH
@pytest.mark.parametrize("max_token_bytes", [None, 4])
def test_more_merges_on_another_text_by_definition(kernels, max_token_bytes):
    for seed in range(4):
        first = merges_from_counts(random_counts(seed), 25, kernels=False)
        counts = random_counts(100 + seed, b"aab\xc3\xa9cd")
        shuffled = random.Random(seed).sample(first, len(first))  # some merges need the token of a later one
        for given in (first, with_all_splits(first), first[:5] + first, [*first, (b"zz", b"q")], shuffled):
            expected = by_definition(counts, 20, given, max_token_bytes)
            assert (
                merges_from_counts(counts, 20, first_merges=given, max_token_bytes=max_token_bytes, kernels=kernels)
                == expected
            )


def test_the_kernel_grows_its_arrays_while_it_applies_merges():
    """Thousands of pre-tokens, so that the given merges have more occurrences than the first arrays hold."""
    generator = random.Random(2)
    counts = {bytes(generator.choices(b"abcd", k=generator.randrange(5, 15))): 1 + i % 7 for i in range(4000)}
    merges = merges_from_counts(counts, 150, kernels=False)
    assert merges_from_counts(counts, 50, first_merges=merges[:100], kernels=True) == merges[100:]


def test_training_continues_on_text(tmp_path):
    vocab, merges = train_bpe(SAMPLE, 400, [END])
    assert learn_more_merges(SAMPLE, 40, merges[:-40], [END]) == merges[-40:]
    path = tmp_path / "other.txt"
    path.write_text("xyz" * 50 + " xyzzy" * 50)
    (new,) = learn_more_merges(path, 1, merges, [])
    assert new == (b"y", b"z")
    short_vocab, short_merges = train_bpe(SAMPLE, 400, [END], max_token_bytes=3)
    assert max(map(len, [left + right for left, right in short_merges])) == 3
    assert len(short_vocab) <= len(vocab)


# Tokenizers


def test_a_tokenizer_with_more_merges_is_the_one_of_an_uninterrupted_training():
    vocab, merges = train_bpe(SAMPLE, 400, [END])
    whole = Tokenizer(vocab, merges, [END])
    first = Tokenizer(*train_bpe(SAMPLE, 300, [END]), [END], kernels=False)
    extended = first.with_merges(learn_more_merges(SAMPLE, 100, first.merges, [END], pattern=first.pattern))
    assert extended.fingerprint == whole.fingerprint
    assert extended.kernels is False
    assert len(first) == 300  # it has not changed
    text = SAMPLE.read_text(encoding="utf-8")
    assert extended.encode(text) == whole.encode(text)


def test_new_tokens_get_the_ids_after_the_largest(tmp_path):
    base = Tokenizer({5: b"a", 9: b"b", 11: b"ab", 3: b"ba"}, [(b"a", b"b")], [END], pattern=r"\S+|\s+")
    extended = base.with_merges([(b"ab", b"ab"), (b"b", b"a"), (b"ab", b"a")]).with_special_tokens(["<pad>", END, "ab"])
    new = {13: b"abab", 14: b"aba", 15: b"<pad>"}
    assert extended.vocab == base.vocab | new
    assert extended.special_token_ids == {END: 12, "<pad>": 15, "ab": 11}
    assert extended.encode("abababa<pad>") == [11, 11, 11, 5, 15]  # "ab" is special now
    assert base.with_merges([(b"ab", b"ab"), (b"ab", b"a")]).encode("ababa") == [13, 5]
    assert extended.pattern == base.pattern
    extended.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == extended.fingerprint
    assert base.with_merges([]).with_special_tokens([]).fingerprint == base.fingerprint


@pytest.mark.parametrize(
    ("merge", "error"), [(("a", "b"), TypeError), ((b"a",), TypeError), ((b"x", b"y"), InvalidInputError)]
)
def test_merges_that_do_not_fit_are_refused(merge, error):
    base = Tokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")])
    with pytest.raises(error, match="merge 1"):
        base.with_merges([merge])


# Arguments


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (
            [(b"b", b"c"), (b"a", b"bc"), (b"abc", b"d"), (b"a", b"b"), (b"ab", b"c")],
            r"merge 4, .* makes a token that another merge makes too, .*Tokenizer\.used_merges\.merges",
        ),
        ([(b"a", "b")], "merge 0 must be a pair of bytes"),
        ([(b"a", b"b", b"c")], "merge 0 must be a pair of bytes"),
    ],
)
def test_merges_that_cannot_be_continued_are_refused(merges, message):
    with pytest.raises((InvalidInputError, TypeError), match=message):
        merges_from_counts({b"ab": 1}, 1, first_merges=merges)


@pytest.mark.parametrize(("limit", "error"), [(0, InvalidInputError), (-3, InvalidInputError), (2.5, TypeError)])
def test_the_limit_of_a_token_is_checked(limit, error):
    with pytest.raises(error, match="max_token_bytes"):
        merges_from_counts({b"ab": 1}, 1, max_token_bytes=limit)


def test_merges_are_numbered():
    numbered = number_merges([(b"a", b"b"), (b"ab", b"c"), (b"b", b"c"), (b"a", b"bc"), (b"a", b"b")])
    assert numbered.tokens[256:] == [b"ab", b"abc", b"bc"]
    assert numbered.triples == [(97, 98, 256), (256, 99, 257), (98, 99, 258), (97, 258, 257)]
    early = number_merges([(b"ab", b"c"), (b"b", b"d"), (b"a", b"b"), (b"a", b"d")])  # "ab" is made by the third
    assert early.triples == [(98, 100, 256), (97, 98, 257), (257, 99, 258), (97, 100, 259)]
