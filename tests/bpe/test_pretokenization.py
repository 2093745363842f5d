"""Pre-tokens: the pattern, special tokens, streams and files cut anywhere."""

import itertools
import subprocess
import sys
from collections import Counter

import pytest
import regex
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from basic import pretokenization
from basic.corpus.counting import count_pretokens
from basic.pretokenization import GPT2_PATTERN, SpecialTokens, chunk_ends, pretokenize_stream, without_surrogates
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import PATTERN, SAMPLE, SPECIAL_TOKENS, naive_pretoken_counts

pytestmark = pytest.mark.usefixtures("plain_path")

# One of each kind that the pattern tells apart, and what is special: contractions, white space beyond ASCII,
# control characters that str.isspace and the pattern see differently.
ALPHABET = "ls1' \n!\u00a0\u3000\x1c\x85é漢٣²😀\u0301"
OVERLAPPING = ["l s", "s l", "'l", "ll", "!", "!!", "! !", "é\u3000"]
texts = st.lists(st.sampled_from([*ALPHABET, *OVERLAPPING]), max_size=25).map("".join)
special_token_lists = st.lists(st.sampled_from(OVERLAPPING), unique=True, max_size=4)


def whole(text: str, special_tokens: list[str]) -> list[str]:
    """The oracle: pre-tokens and special tokens of the whole text, found with one pattern."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    found, position = [], 0
    for match in regex.finditer("|".join(map(regex.escape, longest_first)) or "(?!)", text):
        found += [*regex.findall(PATTERN, text[position : match.start()]), match.group()]
        position = match.end()
    return found + regex.findall(PATTERN, text[position:])


def streamed(pieces, special_tokens) -> list[str]:
    found = []
    for pretokens, special_token in pretokenize_stream(pieces, SpecialTokens(special_tokens)):
        found += pretokens if special_token is None else [*pretokens, special_token]
    return found


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise([0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)])]


def test_pattern_leaves_nothing_out_and_is_that_of_the_tokenizers_package():
    # The two packages know different versions of Unicode, so only text whose characters are old.
    text = SAMPLE.read_bytes().decode()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    spans = [span for _, span in byte_level.pre_tokenize_str(text)]
    assert GPT2_PATTERN.findall(text) == [text[a:b] for a, b in spans]
    for code in range(sys.maxunicode + 1):
        assert GPT2_PATTERN.fullmatch(chr(code))


def test_streams_cut_anywhere_exhaustively():
    """All texts of at most 5 of the characters that matter, in two pieces and letter by letter."""
    for length in range(6):
        for characters in itertools.product("ls' \n!", repeat=length):
            text = "".join(characters)
            expected = regex.findall(PATTERN, text)
            assert streamed(text, []) == expected
            for cut in range(1, length):
                assert streamed([text[:cut], text[cut:]], []) == expected


@given(text=texts, special_tokens=special_token_lists, cuts=st.lists(st.integers(0, 30)))
def test_streams_with_special_tokens_cut_anywhere(text, special_tokens, cuts):
    expected = whole(text, special_tokens)
    assert streamed([text], special_tokens) == expected
    assert streamed(text, special_tokens) == expected
    assert streamed(pieces_of(text, cuts), special_tokens) == expected


class CountingPattern:
    """Counts the characters that are scanned, so that quadratic work shows without a clock."""

    def __init__(self, pattern):
        self.pattern = pattern
        self.scanned = 0

    def findall(self, text):
        self.scanned += len(text)
        return self.pattern.findall(text)


@pytest.mark.parametrize("unit", ["a", " ", "!", "ab ", "'"])
@pytest.mark.parametrize("piece_length", [1, 7, 100_000])
def test_streaming_is_linear(monkeypatch, unit, piece_length):
    pattern = CountingPattern(GPT2_PATTERN)
    monkeypatch.setattr(pretokenization, "GPT2_PATTERN", pattern)
    text = (unit * 100_000)[:100_000]
    pieces = (text[i : i + piece_length] for i in range(0, len(text), piece_length))
    assert "".join(streamed(pieces, ["<|endoftext|>"])) == text
    assert pattern.scanned < 4 * len(text)


def test_streaming_yields_what_is_certain_before_it_asks_for_more():
    asked = itertools.count()
    pieces = ("some words, and then more; " for _ in asked)
    batches = pretokenize_stream(pieces, SpecialTokens(["<|endoftext|>"]))
    assert "".join(itertools.chain.from_iterable(pretokens for pretokens, _ in itertools.islice(batches, 5)))
    assert next(asked) < 10


def test_batches_stay_small_when_pieces_are_large():
    batches = pretokenize_stream(["a b " * 100_000], SpecialTokens([]))
    assert max(len(pretokens) for pretokens, _ in batches) < 20_000


@given(text=st.text(st.sampled_from("a\ud83d\ude00\ud800\ufeff😀"), max_size=12), cuts=st.lists(st.integers(0, 12)))
def test_surrogates(text, cuts):
    repaired = "".join(without_surrogates(pieces_of(text, cuts)))
    assert repaired == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert repaired.encode().decode() == repaired


# Cutting files


def chunk_boundaries(path, special_tokens, chunk_bytes):
    data = path.read_bytes()
    return [0, *chunk_ends(lambda start, length: data[start : start + length], len(data), special_tokens, chunk_bytes)]


def test_safe_places_exhaustively():
    """Before white space that follows another character, no pre-token crosses or looks ahead."""
    safe = regex.compile(pretokenization._SAFE_CUT)
    num_cuts = 0
    for characters in itertools.product("ls1' \n!", repeat=5):
        text = "".join(characters)
        expected = GPT2_PATTERN.findall(text)
        for match in safe.finditer(text):
            num_cuts += 1
            cut = match.start()
            assert GPT2_PATTERN.findall(text[:cut]) + GPT2_PATTERN.findall(text[cut:]) == expected
    assert num_cuts > 10_000


@given(
    text=texts.map(lambda text: text * 2),
    special_tokens=special_token_lists,
    chunk_bytes=st.integers(1, 9),
    search_bytes=st.sampled_from([1, 7, 4096]),
)
@example(text="l s" * 9, special_tokens=["l s"], chunk_bytes=1, search_bytes=1)
def test_files_are_cut_only_at_safe_places(tmp_path_factory, text, special_tokens, chunk_bytes, search_bytes):
    path = tmp_path_factory.mktemp("cut") / "text.txt"
    data = text.encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenization, "_SEARCH_BYTES", search_bytes)
        boundaries = chunk_boundaries(path, SpecialTokens(special_tokens), chunk_bytes)
    assert boundaries == sorted(set(boundaries))
    assert (boundaries[0], boundaries[-1]) == (0, len(data))
    parts = [data[a:b].decode() for a, b in itertools.pairwise(boundaries)]
    assert list(itertools.chain.from_iterable(whole(part, special_tokens) for part in parts)) == whole(
        text, special_tokens
    )


def test_cuts_are_found_where_there_are_some(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 5000)
    sizes = [b - a for a, b in itertools.pairwise(chunk_boundaries(path, SpecialTokens(["aa"]), 100))]
    assert sizes == [5000], "which pairs are the special ones depends on all letters before"
    path.write_text("word " * 1000)
    sizes = [b - a for a, b in itertools.pairwise(chunk_boundaries(path, SpecialTokens(["<|endoftext|>"]), 100))]
    assert len(sizes) == 50
    path.write_text("一二三四五<|endoftext|>" * 100, encoding="utf-8")
    sizes = [b - a for a, b in itertools.pairwise(chunk_boundaries(path, SpecialTokens(["<|endoftext|>"]), 100))]
    assert len(sizes) > 20, "a text without white space is cut at special tokens"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [40, 500])
def test_counts_are_the_same_for_any_workers_and_cutting(num_workers, chunk_bytes):
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
def test_invalid_utf8_in_any_chunk_is_named_by_its_offset_in_the_file(tmp_path, num_workers):
    path = tmp_path / "text.txt"
    path.write_bytes("é word ".encode() * 100 + b"\xe3\x80 word \xff" + b" word" * 100)
    with pytest.raises(ValueError, match=r"text\.txt' is not valid UTF-8 at byte offset 800 "):
        count_pretokens(path, SpecialTokens([]), num_workers=num_workers, shard_bytes=100)


def test_numbers_too_small():
    with pytest.raises(ValueError, match="num_workers=0 must be at least 1"):
        count_pretokens(SAMPLE, SpecialTokens([]), num_workers=0)
    with pytest.raises(ValueError, match="shard_bytes=0 must be at least 1"):
        count_pretokens(SAMPLE, SpecialTokens([]), shard_bytes=0)


@pytest.mark.parametrize(
    ("special_tokens", "error", "message"),
    [
        (["a", ""], ValueError, "special token 1 is empty"),
        (["a", "b", "a"], ValueError, "special token 'a' is given twice"),
        (["a", b"b"], TypeError, "special token 1 must be a string, got b'b'"),
        ([None], TypeError, "special token 0 must be a string, got None"),
        ("<|endoftext|>", TypeError, r"must be a list of strings, got '<\|endoftext\|>'"),
        (["\ud800"], ValueError, "no UTF-8 form"),
    ],
)
def test_bad_special_tokens(special_tokens, error, message):
    with pytest.raises(error, match=message):
        SpecialTokens(special_tokens)
