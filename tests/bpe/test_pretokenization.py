"""Pre-tokens: the pattern, special tokens, streams and files divided anywhere."""

import itertools
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import regex
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from basic.bpe.patterns.automaton import compile_splits
from basic.bpe.patterns.cuts import SafeCuts
from basic.common.errors import InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.pretokenization import (
    GPT2_PATTERN,
    PATTERNS,
    Pattern,
    SpecialTokens,
    chunk_ends,
    pretokenize_stream,
    replace_surrogates,
    replace_surrogates_in_stream,
    resolve_pattern,
)
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import PATTERN, SAMPLE, SPECIAL_TOKENS, naive_pretoken_counts
from tests.helpers.tokenizer_tools import BYTES

pytestmark = pytest.mark.usefixtures("plain_path")

# One character of each class of the pattern, and special cases: contractions, white space beyond ASCII, control
# characters that are white space for str.isspace but not for the pattern.
ALPHABET = "ls1' \n!\u00a0\u3000\x1c\x85é漢٣²😀\u0301"
OVERLAPPING = ["l s", "s l", "'l", "ll", "!", "!!", "! !", "é\u3000"]
texts = st.lists(st.sampled_from([*ALPHABET, *OVERLAPPING]), max_size=25).map("".join)
special_token_lists = st.lists(st.sampled_from(OVERLAPPING), unique=True, max_size=4)


def split_by_definition(text: str, special_tokens: list[str]) -> list[str]:
    """The oracle: pre-tokens and special tokens of the complete text, found with one pattern."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    tokens, position = [], 0
    for match in regex.finditer("|".join(map(regex.escape, longest_first)) or "(?!)", text):
        tokens += [*regex.findall(PATTERN, text[position : match.start()]), match.group()]
        position = match.end()
    return tokens + regex.findall(PATTERN, text[position:])


def split_stream(texts, special_tokens, pattern=GPT2_PATTERN) -> list[str]:
    tokens = []
    for pretokens, special_token in pretokenize_stream(texts, SpecialTokens(special_tokens), pattern):
        tokens += pretokens if special_token is None else [*pretokens, special_token]
    return tokens


def divide(text: str, positions: list[int]) -> list[str]:
    ends = sorted(position % (len(text) + 1) for position in positions)
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]


def test_pattern_leaves_nothing_out_and_is_that_of_the_tokenizers_package():
    # The two packages know different versions of Unicode, so only text whose characters are old.
    text = SAMPLE.read_bytes().decode()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    spans = [span for _, span in byte_level.pre_tokenize_str(text)]
    assert GPT2_PATTERN.find(text) == [text[a:b] for a, b in spans]
    fullmatch = regex.compile(GPT2_PATTERN.splits[0]).fullmatch
    assert all(map(fullmatch, map(chr, range(sys.maxunicode + 1))))


def test_streams_divided_anywhere_exhaustively():
    """All texts of at most 5 of the characters that matter, as two strings and one string a character."""
    for length in range(6):
        for characters in itertools.product("ls' \n!", repeat=length):
            text = "".join(characters)
            expected = regex.findall(PATTERN, text)
            assert split_stream(text, []) == expected
            for position in range(1, length):
                assert split_stream([text[:position], text[position:]], []) == expected


@given(text=texts, special_tokens=special_token_lists, positions=st.lists(st.integers(0, 30)))
def test_streams_with_special_tokens_divided_anywhere(text, special_tokens, positions):
    expected = split_by_definition(text, special_tokens)
    assert split_stream([text], special_tokens) == expected
    assert split_stream(text, special_tokens) == expected
    assert split_stream(divide(text, positions), special_tokens) == expected


class CountingPattern:
    """GPT-2's pattern, which counts the searched characters: quadratic work shows without a clock."""

    splits, num_searched = GPT2_PATTERN.splits, 0

    def find(self, text):
        self.num_searched += len(text)
        return GPT2_PATTERN.find(text)


@pytest.mark.parametrize("unit", ["a", " ", "!", "ab ", "'"])
@pytest.mark.parametrize("length", [1, 7, 100_000])
def test_streaming_is_linear(unit, length):
    pattern = CountingPattern()
    text = (unit * 100_000)[:100_000]
    texts = (text[i : i + length] for i in range(0, len(text), length))
    assert "".join(split_stream(texts, ["<|endoftext|>"], pattern)) == text
    assert 0 < pattern.num_searched < 4 * len(text)


def test_streaming_yields_final_pretokens_before_it_reads_more():
    num_read = itertools.count()
    texts = ("some words, and then more; " for _ in num_read)
    batches = pretokenize_stream(texts, SpecialTokens(["<|endoftext|>"]))
    assert "".join(itertools.chain.from_iterable(pretokens for pretokens, _ in itertools.islice(batches, 5)))
    assert next(num_read) < 10


def test_batches_are_small_if_the_strings_are_large():
    batches = pretokenize_stream(["a b " * 100_000], SpecialTokens([]))
    assert max(len(pretokens) for pretokens, _ in batches) < 20_000


@given(
    text=st.text(st.sampled_from("a\ud83d\ude00\ud800\ufeff😀"), max_size=12), positions=st.lists(st.integers(0, 12))
)
def test_surrogates(text, positions):
    replaced = replace_surrogates(text)
    assert replaced == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert replaced.encode().decode() == replaced
    assert "".join(replace_surrogates_in_stream(divide(text, positions))) == replaced


# Dividing files


def chunk_boundaries(data, special_tokens, chunk_bytes, pattern=GPT2_PATTERN, **options):
    def read(start, length):
        return data[start : start + length]

    return [0, *chunk_ends(read, len(data), special_tokens, chunk_bytes, pattern, **options)]


def test_safe_positions_exhaustively():
    cuts, num_positions = SafeCuts(compile_splits(GPT2_PATTERN.splits)), 0
    for characters in itertools.product("ls1' \n!", repeat=5):
        text = "".join(characters)
        expected = GPT2_PATTERN.find(text)
        for position in cuts.positions(text):
            num_positions += 1
            assert GPT2_PATTERN.find(text[:position]) + GPT2_PATTERN.find(text[position:]) == expected
    assert num_positions > 10_000
    assert cuts.positions("one two, it's 3\n \n4").tolist() == [3, 7, 8, 11, 13, 15]


@given(
    text=texts.map(lambda text: text * 2),
    special_tokens=special_token_lists,
    chunk_bytes=st.integers(1, 9),
    search_bytes=st.sampled_from([1, 7, 4096]),
)
@example(text="l s" * 9, special_tokens=["l s"], chunk_bytes=1, search_bytes=1)
def test_chunks_end_only_at_safe_positions(text, special_tokens, chunk_bytes, search_bytes):
    data = text.encode()
    boundaries = chunk_boundaries(data, SpecialTokens(special_tokens), chunk_bytes, search_bytes=search_bytes)
    assert boundaries == sorted(set(boundaries))
    assert (boundaries[0], boundaries[-1]) == (0, len(data))
    chunks = [data[a:b].decode() for a, b in itertools.pairwise(boundaries)]
    tokens = itertools.chain.from_iterable(split_by_definition(chunk, special_tokens) for chunk in chunks)
    assert list(tokens) == split_by_definition(text, special_tokens)


def test_safe_positions_are_found():
    boundaries = chunk_boundaries(b"a" * 5000, SpecialTokens(["aa"]), 100)
    assert boundaries == [0, 5000], "which pairs are the special tokens depends on all letters before"
    assert len(chunk_boundaries(b"word " * 1000, SpecialTokens(["<|endoftext|>"]), 100)) == 51
    data = ("一二三四五<|endoftext|>" * 100).encode()
    boundaries = chunk_boundaries(data, SpecialTokens(["<|endoftext|>"]), 100)
    assert len(boundaries) > 21, "a text without white space is divided at special tokens"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [40, 500])
def test_counts_are_the_same_for_any_workers_and_chunks(num_workers, chunk_bytes):
    counts = count_pretokens(SAMPLE, SpecialTokens(SPECIAL_TOKENS), num_workers=num_workers, shard_bytes=chunk_bytes)
    assert counts == naive_pretoken_counts(SAMPLE.read_bytes().decode(), SPECIAL_TOKENS)


@pytest.mark.parametrize("name", ["japanese_novel.txt", "multilingual_wikipedia.txt"])
def test_counts_of_real_text(name):
    path = shared_data(name)
    expected = naive_pretoken_counts(path.read_bytes().decode(), ["<|endoftext|>"])
    special_tokens = SpecialTokens(["<|endoftext|>"])
    assert count_pretokens(path, special_tokens, num_workers=2, shard_bytes=100_000) == expected


def test_counting_works_where_processes_are_spawned(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from basic.corpus.counting import count_pretokens\n"
        "from basic.pretokenization import SpecialTokens\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    special = SpecialTokens(['<|endoftext|>'])\n"
        "    counts = count_pretokens(sys.argv[1], special, num_workers=2, shard_bytes=200)\n"
        "    print(sum(counts.values()))\n"
    )
    done = subprocess.run([sys.executable, script, SAMPLE], capture_output=True, text=True, check=True)
    expected = naive_pretoken_counts(SAMPLE.read_bytes().decode(), ["<|endoftext|>"])
    assert int(done.stdout) == sum(expected.values())


def test_an_empty_file_has_no_pretokens(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert count_pretokens(tmp_path / "empty.txt", SpecialTokens([])) == Counter()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_error_names_the_offset_in_the_file_of_invalid_utf8(tmp_path, num_workers):
    path = tmp_path / "text.txt"
    path.write_bytes("é word ".encode() * 100 + b"\xe3\x80 word \xff" + b" word" * 100)
    with pytest.raises(InvalidInputError, match=r"text\.txt' is not valid UTF-8 at byte offset 800 "):
        count_pretokens(path, SpecialTokens([]), num_workers=num_workers, shard_bytes=100)


def test_numbers_too_small():
    with pytest.raises(InvalidInputError, match="num_workers must be at least 1, got 0"):
        count_pretokens(SAMPLE, SpecialTokens([]), num_workers=0)
    with pytest.raises(InvalidInputError, match="shard_bytes must be at least 1, got 0"):
        count_pretokens(SAMPLE, SpecialTokens([]), shard_bytes=0)


@pytest.mark.parametrize(
    ("special_tokens", "error", "message"),
    [
        (["a", ""], InvalidInputError, "special token 1 is empty"),
        (["a", "b", "a"], InvalidInputError, "special token 'a' is given twice"),
        (["a", b"b"], TypeError, "special token 1 must be a string, got b'b'"),
        ([None], TypeError, "special token 0 must be a string, got None"),
        ("<|endoftext|>", TypeError, r"must be a list of strings, got '<\|endoftext\|>'"),
        (["\ud800"], InvalidInputError, "no UTF-8 form"),
    ],
)
def test_bad_special_tokens(special_tokens, error, message):
    with pytest.raises(error, match=message):
        SpecialTokens(special_tokens)


# Names of patterns


@pytest.mark.parametrize("name", sorted(openai_public.ENCODING_CONSTRUCTORS))
def test_the_names_of_tiktokens_encodings(name, monkeypatch):
    """tiktoken would download the ranks; the pattern is in its code."""
    for download in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, download, lambda *arguments, **options: {})
    assert resolve_pattern(openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]) == resolve_pattern(name)


@pytest.mark.parametrize("name", ["gpt-2", "GPT2", "gpt2"])
def test_spellings_of_gpt2(name):
    assert resolve_pattern(name) is GPT2_PATTERN


def test_known_patterns_differ():
    text = "I'LL see HTMLParser's 12345 \n\n  x/\n漢aあ \n "
    assert len({tuple(resolve_pattern(name).find(text)) for name in PATTERNS}) == len(PATTERNS)


@pytest.mark.parametrize("pattern", ["cl100k_basis", "gpt-3.5", "llama", "a b", "", "x"])
def test_an_unknown_name_is_not_a_regular_expression(pattern):
    message = "is neither a known name \\(gpt2, cl100k, o200k, llama3, .*, smollm2\\) nor a regular expression"
    with pytest.raises(InvalidInputError, match=message):
        resolve_pattern(pattern)
    with pytest.raises(InvalidInputError, match=message):
        Tokenizer({}, [], pattern=pattern)
    with pytest.raises(InvalidInputError, match=message):
        train_bpe("no such file", 300, [], pattern=pattern)


@pytest.mark.parametrize(("pattern", "name"), [("o200k-base", "o200k_base"), ("gpt2 ", "gpt2"), ("lama3", "llama3")])
def test_the_error_for_a_misspelt_name_has_the_right_one(pattern, name):
    with pytest.raises(InvalidInputError, match=f"did you mean {name!r}\\? or write"):
        resolve_pattern(pattern)


@pytest.mark.parametrize("pattern", [".", "[ab]", "a|b", r"\d", "a+", "(?:ab)"])
def test_regular_expressions_are_no_names(pattern):
    assert resolve_pattern(pattern).splits == (pattern,)


@given(text=st.text(alphabet="a'S1٣ \n!漢あ\x00/"))
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), Pattern("a|1", "[a!]")])
def test_a_pattern_divides_each_pretoken_of_the_split_before(pattern, text):
    pretokens = [text] if text else []
    for split in pattern.splits:
        after = []
        for pretoken in pretokens:
            # The groups of regex.split are the matches.
            after += [part for part in regex.split(f"({split})", pretoken) if part]
        pretokens = after
    assert pattern.find(text) == pretokens


@pytest.mark.parametrize("pattern", [Pattern("a|b", r"\d"), Pattern("x"), "smollm", "deepseek", r"\w+|\W", "llama3"])
def test_a_pattern_survives_saving(tmp_path, pattern):
    tokenizer = Tokenizer(BYTES, [], pattern=pattern)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.pattern == tokenizer.pattern
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.fingerprint != Tokenizer(tokenizer.vocab, []).fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).pattern == tokenizer.pattern


def test_bad_patterns():
    with pytest.raises(InvalidInputError, match="at least one regular expression"):
        Pattern()
    with pytest.raises(InvalidInputError, match=r"pattern '\(' is not in the syntax of the regex package"):
        Pattern("a", "(")
    with pytest.raises(TypeError, match="a pattern must be a string"):
        Pattern(b"a")  # ty: ignore[invalid-argument-type]


# Coverage


COVERING = [
    *("gpt2", "cl100k", "o200k", "llama3", "qwen2"),
    r"\s|\S",
    r"\p{L}+|\P{L}",
    r"\S+|\s+(?!\S)|\s",
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|[^a]|a",
    r"[a-z]+(?!\d)|[^a-z]|[a-z]",
    r"\]|[^\]]",
    r"\w++|\W",
]
NOT_COVERING = [
    r"[a-z]+|[0-9]",
    ".",  # no newline
    r"\p{L}+|[^\p{L}\n]",
    r"[a-z]+(?!\d)|[^a-z]",  # "a1"
    r"^\w|\W",
    r"^\]|[^\]]",  # "a]"
    r"\w+\b(?!x)|\W",
    r"\w*|\W",  # the empty match wins: "!"
    r"(?=a)|\s|\S",
    r"\w+|\W|",
    r"\w+x|\W",
]
NOT_KNOWN = [r"(?s:.)", r"(?i)\w|\W", "[[a]b]|[^ab]", r"(a)\1|\s|\S"]  # they have no automaton


@pytest.mark.parametrize("pattern", [*COVERING, *NOT_COVERING, *NOT_KNOWN])
def test_patterns_that_cover_all_text(pattern):
    assert resolve_pattern(pattern).covers_all_text == (pattern in COVERING)


@pytest.mark.parametrize("pattern", COVERING)
@given(text=st.text())
@example("a1")
@example("a]!\n")
def test_a_pattern_that_covers_all_text_leaves_nothing_out(pattern, text):
    matches = [match.group() for match in regex.finditer(resolve_pattern(pattern).splits[0], text)]
    assert "".join(matches) == text
    assert "" not in matches
