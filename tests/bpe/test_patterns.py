"""The automata of patterns and the scanner against the `regex` package."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import regex

from basic.bpe import loading
from basic.bpe.arrays import bytes_array
from basic.bpe.patterns import tables
from basic.bpe.patterns.automaton import Automaton, compile_splits
from basic.bpe.patterns.characters import NUM_CODE_POINTS, complement, equal_ignoring_case, matched_by, union
from basic.bpe.patterns.cuts import SafeCuts, last_settled_position
from basic.bpe.patterns.parser import UnsupportedPatternError
from basic.common.native import cache_files
from basic.pretokenization import PATTERNS, Pattern, SpecialTokens, chunks_of_stream, divide_stream, pretokenize_stream
from basic.Tokenizer import Tokenizer
from tests.helpers.tokenizer_tools import BYTES

# The characters of contractions with those that are equal to them without regard to case (U+017F, U+212A), digits of
# several scripts, all kinds of white space, marks, CJK, control characters, characters of each length in UTF-8.
NASTY = [
    *"   \n\n\r\t''''sSdDmMtTlLvVeErRaAzZ019.,!/-_#\x00\x1c\x85\xa0\u2028\u3000éÉßſKǅʰªא中あ٣½²Ⅻ",
    *"\u0301ः€…😀𝔘𐀀\U000e0100",
    *("'ll", "'VE", "'ſ", "123", "!\n", "\r\n", " \n ", " \u0301", "  x"),
]
OWN = {
    "gaps of one character": Pattern("a+|[bc]"),
    "gaps after a long attempt": Pattern("abcab|b"),
    "gaps before what is missing": Pattern(r"\p{Lu}?\p{Ll}+(?= )"),
    "gaps joined": Pattern(r"(?=[a1])\w\w|!"),
    "a split of gaps": Pattern("a", "[ab]c?"),
    "possessive": Pattern(r"\s++$|\s*+[a1]|\s+|\w{1,3}+|\p{P}?+\p{L}{2}|."),
    "ignoring case": Pattern(r"(?i:[^a-l\s]|ſk|é)|[\s\S]"),
    "three splits": Pattern(r"\d", r"[a-m]+", r" ?\w+|\s+(?!\S)|\s"),
    "dot and end": Pattern(r".\Z|..|\n+"),
}


@cache
def automaton(pattern: Pattern) -> Automaton:
    return compile_splits(pattern.splits)


def nasty_texts(name: str, num_texts: int) -> list[str]:
    rng = random.Random(name)
    few = [rng.sample(NASTY, 4) for _ in range(num_texts // 4)]
    return [
        *("".join(rng.choices(NASTY, k=rng.randint(1, 24))) for _ in range(num_texts - len(few))),
        *("".join(rng.choices(some, k=rng.randint(1, 24))) for some in few),
    ]


def count(pattern: Pattern, text: str) -> Counter[bytes]:
    """The pre-tokens of a text, counted with the kernels."""
    loading.load_kernels("training")
    from basic.bpe.kernels.count import PretokenCounter
    from basic.bpe.kernels.scan import pattern_tables
    from basic.bpe.kernels.special_tokens import special_token_tables

    if pattern not in compiled_tables:
        compiled_tables[pattern] = pattern_tables(automaton(pattern))
    counter, data = PretokenCounter(compiled_tables[pattern], special_token_tables([])), bytes_array(text.encode())
    assert counter.add_text(data, 0, len(data)) is None
    return counter.pretokens().to_counter()


compiled_tables: dict[Pattern, Any] = {}


def counted(pattern: Pattern, text: str) -> Counter[bytes]:
    return Counter(map(str.encode, pattern.find(text)))


@pytest.mark.parametrize("name", [*PATTERNS, *OWN])
def test_the_scanner_finds_what_regex_finds(name):
    pattern = (PATTERNS | OWN)[name]
    for text in nasty_texts(name, 800):
        assert count(pattern, text) == counted(pattern, text)
    rng = random.Random(name)
    runs = "".join(rng.choice(NASTY) * rng.choice((1, 1, 2, 9, 400)) for _ in range(400))
    assert count(pattern, runs) == counted(pattern, runs)


def random_expression(rng: random.Random) -> str:
    sets = ["a", "[ab]", "1", r"\s", r"\S", "[^a1]", r"\p{L}", "(?i:s)", r"[\r\n]", " ", "'", "."]

    def atom() -> str:
        if rng.random() < 0.15:
            return f"(?:{'|'.join(sequence(rng.randint(1, 2)) for _ in range(rng.randint(1, 3)))})"
        return rng.choice(sets) + rng.choice(["", "", "?", "*", "+", "++", "?+", "{1,3}", "{2}", "{1,2}+"])

    def sequence(length: int) -> str:
        look = rng.choice([r"(?!\S)", "(?=a)", r"(?!\s)", "(?![ab])"]) if rng.random() < 0.15 else ""
        return "".join(atom() for _ in range(length - 1)) + rng.choice(sets) + rng.choice(["", "+", "{1,3}"]) + look

    return "|".join(sequence(rng.randint(1, 3)) for _ in range(rng.randint(1, 4)))


def test_random_patterns():
    rng, num_compiled = random.Random(3), 0
    for _ in range(150):
        splits = [random_expression(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        if len(splits) > 1:
            splits[0] = rng.choice([r"\s", "[a1]+", r"\S{1,3}", "b"])
        try:
            pattern = Pattern(*splits)
            automaton(pattern)
        except UnsupportedPatternError:
            continue
        num_compiled += 1
        for _ in range(8):
            text = "".join(rng.choices("aabsſ1 \n'é中", k=rng.randint(1, 14)))
            assert count(pattern, text) == counted(pattern, text), pattern
    assert num_compiled > 60


@pytest.mark.parametrize("name", PATTERNS)
def test_code_points_at_the_boundaries_of_classes(name):
    """The first and the last code point of every range of a class, beside characters that matter."""
    pattern = PATTERNS[name]
    firsts = automaton(pattern).first_codes[1:]
    codes = np.unique(np.concatenate([firsts - 1, firsts]))
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    for between in ("", " ", "a", "1 ", "'", "\n "):
        text = between.join(characters)
        assert count(pattern, text) == counted(pattern, text)


@pytest.mark.parametrize("name", [*PATTERNS, *OWN])
def test_a_text_can_be_divided_at_all_safe_cuts(name):
    pattern, num_cuts = (PATTERNS | OWN)[name], 0
    cuts = SafeCuts(automaton(pattern))
    for text in nasty_texts(name, 300):
        pretokens, positions = pattern.find(text), cuts.positions(text).tolist()
        num_cuts += len(positions)
        for position in positions:
            assert pattern.find(text[:position]) + pattern.find(text[position:]) == pretokens
        parts = [text[a:b] for a, b in pairwise([0, *positions, len(text)])]
        assert [pretoken for part in parts for pretoken in pattern.find(part)] == pretokens
        last = cuts.last_position(text, 0, len(text) - 1)
        assert last == max([0, *(position for position in positions if position < len(text))])
    assert num_cuts > 300 or name in OWN


@pytest.mark.parametrize("name", PATTERNS)
def test_streams_of_every_pattern_are_divided(name):
    pattern, special = PATTERNS[name], SpecialTokens(["<|a|>", "! "])
    rng = random.Random(name)
    for _ in range(60):
        texts = nasty_texts(f"{name}{rng.random()}", 8) + rng.choices(["<|a|>", "!", " ", "<|"], k=3)
        rng.shuffle(texts)
        whole = list(pretokenize_stream(["".join(texts)], special, pattern))
        parts = list(pretokenize_stream(texts, special, pattern))
        chunks = [
            data[start:stop].tobytes().decode()
            for data, start, stop in chunks_of_stream(texts, special, rng.randint(1, 40), pattern)
        ]
        assert "".join(chunks) == "".join(texts)
        of_chunks = [batch for chunk in chunks for batch in pretokenize_stream([chunk], special, pattern)]
        expected = list(split_by_definition("".join(texts), special, pattern))
        assert flat(whole) == flat(parts) == flat(of_chunks) == expected


@pytest.mark.parametrize("name", [*PATTERNS, *OWN])
def test_a_text_can_be_divided_where_its_pretokens_are_settled(name):
    """Whatever follows; and of nearly all texts only the last pre-tokens are not settled."""
    pattern, num_settled, rng = (PATTERNS | OWN)[name], 0, random.Random(name)
    for text in nasty_texts(name, 100):
        for length in range(1, len(text) + 1, rng.randint(2, 5)):
            position = last_settled_position(pattern.splits, text[:length])
            num_settled += position > 0
            for whole in (text[:length], text, text[:length] + rng.choice(NASTY)):
                assert pattern.find(whole[:position]) + pattern.find(whole[position:]) == pattern.find(whole)
    assert num_settled > 100 or name in OWN


def test_settled_positions_of_random_patterns():
    rng, num_settled = random.Random(7), 0
    for _ in range(50):
        pattern = Pattern(random_expression(rng))
        try:
            automaton(pattern)
        except UnsupportedPatternError:
            continue
        for _ in range(8):
            text = "".join(rng.choices("aabsſ1 \n'é中", k=rng.randint(2, 14)))
            position = last_settled_position(pattern.splits, text[: rng.randrange(1, len(text))])
            num_settled += position > 0
            assert pattern.find(text[:position]) + pattern.find(text[position:]) == pattern.find(text), pattern
    assert num_settled > 50


def test_a_stream_without_a_safe_pair_is_divided():
    pattern, digits = PATTERNS["cl100k"], "1234567" * 3000
    parts = list(divide_stream([digits] * 30, SpecialTokens(["<|a|>"]), pattern))
    assert "".join(parts) == digits * 30
    assert max(map(len, parts)) <= 2 * (1 << 16) + len(digits)
    assert [pretoken for part in parts for pretoken in pattern.find(part)] == pattern.find(digits * 30)


def split_by_definition(text: str, special: SpecialTokens, pattern: Pattern) -> list[str]:
    tokens, position = [], 0
    for match in special.pattern.finditer(text):
        tokens += [*pattern.find(text[position : match.start()]), match.group()]
        position = match.end()
    return tokens + pattern.find(text[position:])


def flat(batches: list[tuple[list[str], str | None]]) -> list[str]:
    return [token for pretokens, special in batches for token in [*pretokens, *([special] if special else [])]]


def test_a_stream_does_not_wait_for_its_end():
    for pattern in PATTERNS.values():
        read = 0

        def texts():
            nonlocal read
            for _ in range(1000):
                read += 1
                yield "some words\n, 12 and more; 漢字 "

        next(batch for batch in pretokenize_stream(texts(), SpecialTokens([]), pattern) if batch[0])
        assert read < 10


# ---- what is not in the subset


@pytest.mark.parametrize(
    "expression",
    ["a*?", "(?:ab)++", "(a)\\1", "(?<=a)b", "(?=ab)", "^a", "a$", "\\ba", "(?>a)", "(?i)a", "[[a]b]", "[a&&b]", "a*",
     "(?:abc){e<=1}", "(?:a?)+", "\\N{DIGIT ONE}", "(?:" * 3 + "a" + ")*" * 3, "a|", "\\X", "(?P<x>a)"],
)  # fmt: skip
def test_unsupported_patterns_raise(expression):
    with pytest.raises(UnsupportedPatternError):
        compile_splits((expression,))


def test_a_split_that_looks_ahead_must_be_the_last():
    with pytest.raises(UnsupportedPatternError, match="another split after it"):
        compile_splits((r"\s+(?!\S)|\s", "a"))


def test_a_pattern_without_automaton_uses_the_regex_package(tmp_path):
    pattern = r"(?<=a)b|\w|\W"
    tables.automaton_of.cache_clear()
    tokenizer = Tokenizer(BYTES, [], ["<|a|>"], pattern=pattern, kernels=True)
    with pytest.warns(UserWarning, match=r"'\(\?<=a\)b\|\\\\w\|\\\\W' has no kernels, the regex package finds"):
        assert tokenizer.encode("abc, <|a|>") == [*b"abc, ", 256]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert not Pattern(pattern).covers_all_text
        assert tokenizer.encode("abc, <|a|>") == [*b"abc, ", 256]


# ---- the cache, and sets of characters


def test_automata_are_kept_in_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    splits = ("[ab]+|c",)
    tables.automaton_of.cache_clear()
    first = tables.automaton_of(splits)
    (file,) = (tmp_path / "basic_patterns").iterdir()
    monkeypatch.setattr(tables, "compile_splits", lambda splits: pytest.fail("it is compiled again"))
    tables.automaton_of.cache_clear()
    second = tables.automaton_of(splits)
    assert first is not None
    assert second is not None
    for name, value in first._asdict().items():
        assert np.array_equal(value, getattr(second, name)), name
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    content = file.read_bytes()
    for damaged in (b"", content[:-100], content[:100]):
        file.write_bytes(damaged)
        tables.automaton_of.cache_clear()
        assert tables.automaton_of(splits) is not None
        assert file.read_bytes() == content, "it is written again"
    for position in (*range(0, 200, 3), *range(len(content) - 200, len(content), 3)):  # where zip files have headers
        flipped = content[position] ^ (1 << position % 8)
        file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        assert cache_files.read_checked(file) is None, position
    tables.automaton_of.cache_clear()


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    cache_files.write_checked(tmp_path / "new" / "one", b"data")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    cache_files.write_checked(tmp_path / "file" / "one", b"data")
    assert cache_files.read_checked(tmp_path / "file" / "one") is None


def test_sets_of_characters():
    digits = matched_by(r"\d")
    assert regex.fullmatch(r"\d+", chr(digits[2]) + chr(digits[3] - 1))
    others = complement(digits)
    assert np.array_equal(complement(others), digits)
    assert union(digits, others).tolist() == [0, NUM_CODE_POINTS]
    assert complement(union(digits, others)).tolist() == []
    assert equal_ignoring_case(ord("s")).tolist() == [ord("S"), ord("S") + 1, ord("s"), ord("s") + 1, 0x17F, 0x180]
    assert equal_ignoring_case(ord("é")).tolist() == [0xC9, 0xCA, 0xE9, 0xEA]
