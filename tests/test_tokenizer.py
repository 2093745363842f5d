"""The tokenizer: against tiktoken, the `tokenizers` package and itself; the memory is that of a real process."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from basic.bpe.plain import MergeRules, PretokenCache, merge_long, merge_short
from basic.common.errors import InvalidInputError
from basic.encoding import encode_file
from basic.pretokenization import PATTERNS
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens, read_info
from tests.helpers.tokenizer_tools import BYTES, TEXT_FILES, tiktoken_of, tokenizers_of

from .adapters import get_tokenizer, run_train_bpe
from .conftest import shared_data
from .fixtures.make_tokenizer_fixtures import SAMPLE, SNAPSHOT, SPECIAL_TOKENS

pytestmark = pytest.mark.usefixtures("plain_path")

REPOSITORY = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"


# Against other programs


def test_snapshot():
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    lines = [line.split() for line in snapshot["merges_hex"]]
    merges = [(bytes.fromhex(left), bytes.fromhex(right)) for left, right in lines]
    tokens = [token.encode() for token in SPECIAL_TOKENS] + [*BYTES.values()]
    vocab = dict(enumerate(tokens + [left + right for left, right in merges]))
    ids = get_tokenizer(vocab, merges, snapshot["special_tokens"]).encode(SAMPLE.read_bytes().decode())
    assert ids == [int(i) for i in snapshot["ids"].split()]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_gpt2_equals_tiktoken(gpt2, name):
    text = shared_data(name).read_bytes().decode()[:400_000]
    if name.endswith(".json"):
        text += "".join(json.loads(text))  # the file has escape sequences; the strings have the characters
    ids = gpt2.encode(text)
    assert ids == tiktoken_of(gpt2).encode(text, allowed_special="all")
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("name", ["corpus.en", "multilingual_wikipedia.txt", "naughty_strings.json"])
def test_a_trained_vocabulary_equals_tiktoken_and_tokenizers(tmp_path, name):
    path = tmp_path / "text.txt"  # whatever it holds is plain text
    path.write_bytes(shared_data(name).read_bytes())
    text = path.read_bytes().decode()[:200_000] + SAMPLE.read_bytes().decode()
    tokenizer = get_tokenizer(*run_train_bpe(path, 800, [END]), [END])
    ids = tokenizer.encode(text)
    assert ids == tiktoken_of(tokenizer).encode(text, allowed_special="all")
    assert ids == tokenizers_of(tokenizer).encode(text).ids


@given(text=st.text(st.sampled_from("lowes rt'd \n\u00e9\u706f1<|>"), max_size=60))
def test_random_text_equals_tiktoken_and_tokenizers(ours, text):
    ids = ours.encode(text)
    assert ids == tiktoken_of(ours).encode(text, allowed_special="all")
    assert ids == tokenizers_of(ours).encode(text).ids


@given(
    special_tokens=st.lists(st.sampled_from(["<a>", "<a><a>", "a><a", "<a>b", "b", "<"]), unique=True),
    text=st.lists(st.sampled_from(["<a>", "<", "a>", "b", " "]), max_size=12).map("".join),
)
def test_overlapping_special_tokens_equal_those_of_tokenizers(special_tokens, text):
    tokenizer = get_tokenizer(BYTES, [], special_tokens)
    assert tokenizer.encode(text) == tokenizers_of(tokenizer).encode(text).ids


@given(text=st.text(st.sampled_from("a\ud83d\ude00\ud800\U0001f600"), max_size=8))
def test_surrogates_equal_tiktoken(ours, text):
    ids = ours.encode(text)
    assert ids == tiktoken_of(ours).encode(text)
    assert list(ours.encode_iterable(text)) == ids


def test_a_lone_surrogate_is_the_replacement_character(ours):
    assert ours.encode("a\ud800b\udfff") == ours.encode("a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}")


# Against itself


@given(st.text())
def test_round_trip(text):
    tokenizer = get_tokenizer(BYTES, [], [END])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    strings=st.lists(st.sampled_from([END, END[:5], END[5:], "<| a break |>", "it's", "'", "ll", "  ", "\n", "row"])),
    positions=st.lists(st.integers(0, 200)),
)
def test_encode_iterable_equals_encode_wherever_the_text_is_divided(ours, strings, positions):
    text = "".join(strings)
    ends = sorted(position % (len(text) + 1) for position in positions)
    texts = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    ids = ours.encode(text)
    assert list(ours.encode_iterable(texts)) == ids
    assert list(ours.encode_iterable(text)) == ids
    assert ours.decode(ids) == text


def test_encode_iterable_of_lines_and_letters(gpt2):
    path = shared_data("tinystories_sample.txt")
    text = path.read_bytes().decode()
    with open(path, encoding="utf-8", newline="") as lines:
        assert list(gpt2.encode_iterable(lines)) == gpt2.encode(text)
    assert list(gpt2.encode_iterable(text)) == gpt2.encode(text)


def test_encode_iterable_is_lazy(ours):
    num_read = itertools.count()
    ids = ours.encode_iterable(f"line {number} of an endless text\n" for number in num_read)
    assert len(list(itertools.islice(ids, 100))) == 100
    assert next(num_read) < 50


@given(
    ids=st.lists(st.integers(0, 2), min_size=10, max_size=80),
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), unique=True, max_size=15),
)
@example(ids=[1, 1, 0, 1, 0, 1], pairs=[(0, 1), (1, 1), (2, 2)])
def test_long_pretokens_are_merged_like_short_ones(ids, pairs):
    """Random merges in any order: a merge may produce what an earlier one needs, and several may produce the same."""
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    results = [max(pair) + 1 for pair in pairs]
    assert merge_long(list(ids), ranks, results) == merge_short(list(ids), ranks, results)


def test_long_pretokens_equal_tiktoken(gpt2):
    generator = random.Random(0)
    for letters in ("ab", "etaoinshrdl", "=-"):
        text = "".join(generator.choices(letters, k=3000))
        assert gpt2.encode(text) == tiktoken_of(gpt2).encode(text)


def test_a_million_identical_letters(gpt2):
    """In quadratic time this would take days."""
    ids = gpt2.encode("a" * 1_000_000)
    assert ids == gpt2.encode("a" * 1_000) * 1_000
    assert gpt2.encode("a" * 1_000) == tiktoken_of(gpt2).encode("a" * 1_000)


def test_the_cache_holds_a_limited_number_of_short_pretokens():
    cache = PretokenCache(MergeRules({byte: byte for byte in range(256)}, {}, []), max_pretokens=5)
    pretokens = [*map(str, range(100, 150)), "x" * 1000]
    for pretoken in pretokens * 2:
        assert cache[pretoken] == tuple(pretoken.encode())
        assert len(cache) <= 5
    assert max(map(len, cache)) < 100


# Any vocabulary


@given(seed=st.integers(0, 1000), text=st.text(st.sampled_from("lower thn's"), max_size=40))
def test_the_vocabulary_alone_determines_the_ids(ours, seed, text):
    new_ids = random.Random(seed).sample(range(10**6), len(ours.vocab))
    translate = dict(zip(ours.vocab, new_ids, strict=True))
    vocab = {translate[i]: token for i, token in ours.vocab.items()}
    shuffled = get_tokenizer(vocab, ours.merges, list(ours.special_token_ids))
    assert shuffled.encode(text) == [translate[i] for i in ours.encode(text)]


def test_special_tokens_get_their_ids():
    vocab = {5: b"a", 900: b"<x>", 7: b"<"}
    tokenizer = get_tokenizer(vocab, [], ["<new>", "<x>", "é", "<"])
    assert tokenizer.special_token_ids == {"<new>": 901, "<x>": 900, "é": 902, "<": 7}
    assert vocab == {5: b"a", 900: b"<x>", 7: b"<"}, "the caller's dictionary is not changed"
    assert tokenizer.encode("a<new>é<x><a") == [5, 901, 902, 900, 7, 5]
    assert tokenizer.decode([901, 902, 900]) == "<new>é<x>"
    assert tokenizer.vocab_size == 903


def test_a_vocabulary_entry_that_looks_special_is_not():
    vocab = BYTES | {256: b"<|endoftext|>"}
    assert get_tokenizer(vocab, []).encode(END) == list(END.encode())
    assert get_tokenizer(vocab, [], [END]).encode(END) == [256]


def test_bytes_with_two_ids_are_encoded_as_the_smaller():
    tokenizer = get_tokenizer({9: b"a", 2: b"a", 4: b"b", 3: b"ab", 1: b"ab"}, [(b"a", b"b")])
    assert tokenizer.encode("aba") == [1, 2]
    assert tokenizer.decode([9, 3]) == "aab"


def test_the_first_of_equal_merges_counts():
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"b")]
    vocab = dict(enumerate([b"a", b"b", b"c", b"ab", b"bc"]))
    assert get_tokenizer(vocab, merges).encode("abc") == [3, 2]


def test_a_missing_byte():
    tokenizer = get_tokenizer({0: b"a", 1: b" "}, [], [END])
    assert tokenizer.encode(f"a a{END}") == [0, 1, 0, 2]
    for text in ("ab", "é"):
        with pytest.raises(
            InvalidInputError, match=f"no token for the byte 0x{text.encode().removeprefix(b'a')[0]:02x}"
        ):
            tokenizer.encode(text)
    assert tokenizer.encode("a") == [0]


# Decoding


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, lambda ids: np.array(ids, np.uint16)])
def test_decode_takes_any_ids(ours, kind):
    text = SAMPLE.read_bytes().decode()
    assert ours.decode(kind(ours.encode(text))) == text
    assert ours.decode_bytes(kind(ours.encode(text))) == text.encode()


def test_malformed_utf8_becomes_replacement_characters():
    tokenizer = get_tokenizer(BYTES, [])
    data = shared_data("utf8tests.bin").read_bytes()
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode_bytes([0xC3]) == b"\xc3"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(("ids", "wrong"), [([1, 500], "id 500 at position 1"), ([-1], "id -1")])
def test_decode_names_an_id_out_of_range(ours, ids, wrong):
    assert ours.vocab_size == 500
    with pytest.raises(InvalidInputError, match=f"{wrong}.* whose largest id is 499"):
        ours.decode(ids)


@pytest.mark.parametrize("kernels", [True, False])
def test_decode_takes_lists_arrays_and_tensors(kernels):
    tokenizer = Tokenizer(BYTES, [], kernels=kernels)
    ids = [104, 105]
    for same in (tuple(ids), iter(ids), np.array(ids), np.array(ids, ">u2"), list(np.array(ids)), torch.tensor(ids)):
        assert tokenizer.decode(same) == "hi"
    assert tokenizer.decode(list(torch.tensor(ids, dtype=torch.int32))) == "hi"
    assert tokenizer.decode(np.array([])) == tokenizer.decode(torch.tensor([])) == ""


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (5, TypeError, r"ids must be a list, an array or a tensor of token ids, got int: 5; write \[5\]"),
        ("hi", TypeError, "ids must be a list, .*, got str: 'hi'"),
        (b"hi", TypeError, "ids must be a list, .*, got bytes"),
        ({104: 1}, TypeError, "ids must be a list, .*, got dict"),
        (None, TypeError, "ids must be a list, .*, got NoneType"),
        (["a"], TypeError, r"ids\[0\] must be an integer, got str: 'a'"),
        ([104, 105.0], TypeError, r"ids\[1\] must be an integer, got float: 105.0"),
        ([True], TypeError, r"ids\[0\] must be an integer, got bool: True"),
        ([[104]], TypeError, r"ids\[0\] must be an integer, got list"),
        ([torch.tensor(1.5)], TypeError, r"ids\[0\] must be an integer, got Tensor"),
        (np.array([[104]]), InvalidInputError, r"ids must be a one-dimensional .*, got int64 of shape \(1, 1\)"),
        (np.array([104.0]), InvalidInputError, "ids must be .* of integers, got float64"),
        (torch.tensor([[104]]), InvalidInputError, r"got torch.int64 of shape \(1, 1\)"),
        (torch.tensor([True]), InvalidInputError, "of integers, got torch.bool"),
    ],
)
def test_decode_names_what_is_no_list_of_ids(ids, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(BYTES, []).decode(ids)


@pytest.mark.parametrize("texts", ["abc", b"abc"])
def test_encode_batch_does_not_take_a_text_for_a_list_of_letters(texts):
    with pytest.raises(TypeError, match=r"texts must be a list of strings, got one: b?'abc'; write \[b?'abc'\]"):
        Tokenizer(BYTES, []).encode_batch(texts)


@pytest.mark.parametrize("token_id", [1 << 21, 1 << 31, (1 << 32) - 2, 1 << 40])
def test_kernels_do_not_decode_ids_for_which_their_arrays_would_be_huge(token_id):
    tokenizer = Tokenizer({**BYTES, token_id: b"th"}, [], kernels=True)
    assert tokenizer.decode([token_id, 101]) == tokenizer.decode(np.array([token_id, 101])) == "the"


@pytest.mark.parametrize(
    ("token_id", "error"), [(-1, InvalidInputError), (300.0, TypeError), (True, TypeError), ("300", TypeError)]
)
def test_the_id_of_a_special_token_is_a_number_from_0_on(token_id, error):
    with pytest.raises(error, match="special token '<s>'"):
        Tokenizer(BYTES, [], {"<s>": token_id})


def test_encode_batch_names_what_is_not_a_string():
    with pytest.raises(TypeError, match="text must be a string, got NoneType"):
        Tokenizer(BYTES, []).encode_batch(["abc", None])  # ty: ignore


def test_decode_names_an_id_of_an_array_out_of_range(ours):
    with pytest.raises(InvalidInputError, match="id 65535 at position 2"):
        ours.decode(np.array([0, 1, 65535], np.uint16))


# Files


@pytest.mark.parametrize("block_bytes", [1, 1 << 16])
def test_encode_file(tmp_path, monkeypatch, ours, block_bytes):
    monkeypatch.setattr("basic.corpus.files.BLOCK_BYTES", block_bytes)
    info = encode_file(ours, SAMPLE, tmp_path / "sample.bin")
    data = SAMPLE.read_bytes()
    assert open_tokens(tmp_path / "sample.bin", verify=True).tolist() == ours.encode(data.decode())
    assert info == read_info(tmp_path / "sample.bin")
    assert info.source_bytes == len(data)
    assert (info.vocab_size, info.tokenizer_fingerprint) == (500, ours.fingerprint)


def test_encode_file_leaves_no_incomplete_file(tmp_path, ours):
    text, output = tmp_path / "text.txt", tmp_path / "tokens.bin"
    text.write_bytes(b"good " * 100_000 + b"\xff")
    with pytest.raises(InvalidInputError, match=r"text\.txt' is not valid UTF-8 at byte offset 500000 "):
        encode_file(ours, text, output)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        encode_file(ours, tmp_path / "nowhere.txt", output)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        encode_file(ours, tmp_path, output)
    with pytest.raises(InvalidInputError, match=r"text\.txt', a token file to be written, is also an input"):
        encode_file(ours, text, text)
    assert text.stat().st_size == 500_001


# Bad input


@pytest.mark.parametrize(
    ("vocab", "merges", "special_tokens", "error", "message"),
    [
        (BYTES, [(b"a", b"b")], None, InvalidInputError, r"merge 0, \(b'a', b'b'\), needs the token b'ab'"),
        (BYTES | {256: b"ab"}, [(b"a", b"b"), (b"ab", b"cd")], None, InvalidInputError, "merge 1, .*the token b'cd'"),
        ({0: b"b", 1: b"ab"}, [(b"a", b"b")], None, InvalidInputError, "needs the token b'a'"),
        (BYTES, [("a", "b")], None, TypeError, "merge 0 must be a pair of bytes, got"),
        (BYTES, [(b"a",)], None, TypeError, "merge 0 must be a pair of bytes, got"),
        (BYTES, [b"ab"], None, TypeError, "merge 0 must be a pair of bytes, got b'ab'"),
        ({0: "a"}, [], None, TypeError, "vocab must map ints to bytes, but has 0: 'a'"),
        ({"a": 0}, [], None, TypeError, "vocab must map ints to bytes, but has 'a': 0"),
        ({-1: b"a"}, [], None, InvalidInputError, "the id -1"),
        (BYTES, [], [""], InvalidInputError, "special token 0 is empty"),
        (BYTES, [], ["a", "a"], InvalidInputError, "'a' is given twice"),
        (BYTES, [], [b"a"], TypeError, "must be a string, got b'a'"),
        (BYTES, [], "a", TypeError, "must be a list of strings"),
    ],
)
def test_bad_arguments(vocab, merges, special_tokens, error, message):
    with pytest.raises(error, match=message):
        get_tokenizer(vocab, merges, special_tokens)


def test_text_must_be_a_string(ours):
    with pytest.raises(TypeError, match="text must be a string, got bytes"):
        ours.encode(b"bytes")
    with pytest.raises(TypeError, match="text must be a string, got int"):
        list(ours.encode_iterable(["a", 1]))
    with pytest.raises(TypeError, match="the texts must be an iterable of strings, got NoneType: None"):
        ours.encode_iterable(None)


def test_repr(ours):
    start = "Tokenizer(vocab_size=500, merges=242, pattern='gpt2'"
    assert repr(ours) == f"{start}, special_tokens=['{END}', '<| a break |>'])"
    many = Tokenizer(BYTES, [], list("abcdefgh"), pattern=r"\w+|\W")
    assert repr(many).endswith(r"pattern='\\w+|\\W', special_tokens=['a', 'b', 'c', 'd'] and 4 more)")


# Memory, in a separate process

linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")

MEASURE = """
import collections, itertools, resource, sys
from basic.Tokenizer import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])

def memory_bytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def limit(allowance_bytes):
    most = memory_bytes("VmSize") + allowance_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

def peak_bytes():
    return memory_bytes("VmHWM")

def lines(size_bytes, start=0):
    # A long pre-token of one token is fast; each line has a new pre-token, so an unbounded cache would be visible.
    for number in itertools.count(start):
        line = " lighthousekeeper" * 40 + " the" + "".join(chr(97 + int(digit)) for digit in str(number)) + "\\n"
        size_bytes -= len(line)
        if size_bytes < 0:
            return
        yield line

def consume(ids):
    collections.deque(ids, maxlen=0)
"""


def measured(tmp_path, tokenizer: Tokenizer, code: str) -> str:
    tokenizer.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURE + code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux_only
def test_encode_iterable_memory_does_not_grow_with_the_stream(tmp_path):
    pretoken = b" lighthousekeeper"
    merges = [(pretoken[:i], pretoken[i : i + 1]) for i in range(1, len(pretoken))]
    vocab = BYTES | {256 + i: left + right for i, (left, right) in enumerate(merges)}
    code = """
consume(tokenizer.encode_iterable(lines(8_000_000)))  # with more pre-tokens than the smallest table of the kernels
before = peak_bytes()
consume(tokenizer.encode_iterable(lines(5_000_000, 10_000)))
after_5 = peak_bytes()
consume(tokenizer.encode_iterable(lines(50_000_000, 100_000)))
after_50 = peak_bytes()
ids = list(tokenizer.encode_iterable(lines(30_000_000)))
print(after_5 - before, after_50 - after_5, peak_bytes() - after_50)
"""
    growth_5, growth_45_more, control = map(int, measured(tmp_path, get_tokenizer(vocab, merges, [END]), code).split())
    assert growth_5 <= 1_000_000
    assert growth_45_more <= 1_000_000
    assert control > 2_000_000, "the measurement sees the memory of a list of ids"


@linux_only
def test_encode_iterable_fits_a_megabyte_and_encode_ends_in_memory_error(tmp_path, gpt2):
    path = shared_data("tinystories_shuffled_words_5M.txt")
    code = f"""
text = open({str(path)!r}, encoding="utf-8", newline="")
complete = text.read()
text.seek(0)
long_pretoken, surrogates = "a" * 5_000_000, "a\\ud800" * 2_000_000
consume(tokenizer.encode_iterable(["a warm-up"]))
limit(1_000_000)
consume(tokenizer.encode_iterable(text))
for too_large in (complete, long_pretoken, surrogates):
    try:
        tokenizer.encode(too_large)
    except MemoryError:
        print("MemoryError", end=" ")
print(len(tokenizer.encode("and it still works")))
"""
    assert measured(tmp_path, gpt2, code) == "MemoryError MemoryError MemoryError 4"


# The scripts


def run_script(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "local" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_scripts_train_and_encode(tmp_path):
    trained = run_script(
        "train_bpe.py", SAMPLE, "--vocab-size", 400, "--output", tmp_path / "tokenizer", "--pattern", "smollm"
    )
    assert trained.returncode == 0, trained.stderr
    assert "400 (143 merges)" in trained.stdout
    encoded = run_script("encode.py", SAMPLE, tmp_path / "sample.bin", "--tokenizer", tmp_path / "tokenizer")
    assert encoded.returncode == 0, encoded.stderr
    ids = open_tokens(tmp_path / "sample.bin", verify=True)
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.decode(ids) == SAMPLE.read_bytes().decode()
    assert loaded.pattern == PATTERNS["starcoder"]
    failed = run_script("train_bpe.py", tmp_path / "nowhere.txt", "--output", tmp_path / "never")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: there is no file")
    assert not (tmp_path / "never").exists()


def test_the_module_in_place_of_the_class_names_the_import():
    from basic import Tokenizer as module

    with pytest.raises(AttributeError, match=r": from basic\.Tokenizer import Tokenizer$"):
        getattr(module, "load")("tokenizer")  # noqa: B009
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        getattr(module, "nothing")  # noqa: B009
