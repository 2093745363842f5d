"""Special tokens: one expression and one table for any number of them, against the alternation of all."""

from __future__ import annotations

import random
import re

import pytest

from basic.bpe.patterns.longest_of import longest_of
from basic.pretokenization import SpecialTokens, find_safe_position
from basic.Tokenizer import Tokenizer
from tests.helpers.tokenizer_tools import BYTES

ALPHABETS = ["ab", "abc]-^\\[", "a\n \u3000é😀", "".join(map(chr, range(33, 120)))]


def random_tokens(rng: random.Random) -> tuple[list[str], str]:
    """Tokens that begin alike and contain each other, and a text of their characters."""
    alphabet = rng.choice(ALPHABETS)
    tokens = {"".join(rng.choices(alphabet, k=rng.randint(1, rng.choice([5, 9])))) for _ in range(rng.randint(0, 30))}
    shuffled = sorted(tokens, key=lambda token: rng.random())
    pieces = [*alphabet, *(token[: rng.randint(1, 9)] for token in shuffled)]
    return shuffled, "".join(rng.choices(pieces, k=rng.randint(0, 40)))


def spans_by_definition(tokens: list[str], text: str) -> list[tuple[int, int]]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return [match.span() for match in re.finditer("|".join(map(re.escape, longest_first)) or "(?!)", text)]


def test_the_expression_finds_the_longest():
    rng = random.Random(0)
    for _ in range(300):
        tokens, text = random_tokens(rng)
        special = SpecialTokens(tokens)
        assert [match.span() for match in special.pattern.finditer(text)] == spans_by_definition(tokens, text)
        starts = [i for i in range(len(text)) if text.startswith(tuple(tokens), i)]
        assert list(special.starts(text)) == starts


def test_tokens_that_begin_alike_hundreds_of_times():
    tokens = ["a" * length for length in range(1, 500)]
    assert [match.end() for match in re.finditer(longest_of(tokens), "a" * 700)] == [499, 700]


def test_the_kernel_finds_the_longest():
    rng = random.Random(1)
    for _ in range(150):
        tokens, text = random_tokens(rng)
        tokenizer = Tokenizer(BYTES, [], tokens, kernels=True)
        ids, position = [], 0
        for start, stop in spans_by_definition(tokens, text):
            ids += [*text[position:start].encode(), tokenizer.special_token_ids[text[start:stop]]]
            position = stop
        assert tokenizer.encode_array(text).tolist() == [*ids, *text[position:].encode()]


@pytest.mark.parametrize("kernels", [False, True])
def test_ten_thousand_special_tokens(kernels):
    rng = random.Random(2)
    tokens = [f"<|{i}|>" for i in range(5000)] + [f"{rng.getrandbits(24):x}~" for _ in range(5000)]
    tokens = list(dict.fromkeys(tokens))
    tokenizer = Tokenizer(BYTES, [], tokens, kernels=kernels)
    chosen = rng.choices(tokens, k=300)
    text = "".join(f"{token} a b" for token in chosen)
    expected = [i for token in chosen for i in (tokenizer.special_token_ids[token], *b" a b")]
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_array(text, num_threads=2).tolist() == expected
    assert list(tokenizer.encode_iterable(text)) == expected


def test_no_safe_position_is_inside_a_special_token():
    special = SpecialTokens(["a b", "b a b a", " "])
    data = b"xa b ab a b ax"
    positions = {find_safe_position(lambda a, n: data[a : a + n], i, len(data), special) for i in range(len(data) + 1)}
    assert positions == {0, 1, 4, 6, 14}, "their starts, and not the spaces inside them"
