"""The kernels against the plain path, tiktoken, the `regex` package and naive merging."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from basic.bpe import loading
from basic.common.errors import InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.encoding import encode_file
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.train_bpe import merges_from_counts, train_bpe
from tests.conftest import SHARED_DATA, shared_data
from tests.fixtures.make_tokenizer_fixtures import PATTERN, SAMPLE, naive_merges
from tests.helpers.difficult_text import END, OVERLAPPING, difficult_text, write

REPOSITORY = Path(__file__).resolve().parents[2]


def counts_of_kernels(
    path: Path | list[Path], special_tokens: list[str] | tuple[str, ...] = (), **options
) -> Counter[bytes]:
    return count_pretokens(path, SpecialTokens(special_tokens), kernels=True, **options)


def counts_of_regex(text: str) -> Counter[bytes]:
    return encoded(Counter(regex.findall(PATTERN, text)))


def encoded(counts: Counter[str]) -> Counter[bytes]:
    return Counter({pretoken.encode(): count for pretoken, count in counts.items()})


# ---- the scanner


def test_every_code_point_has_the_class_that_the_regex_package_gives(tmp_path):
    """Each after a letter and a space, before a digit and a sign: every class gives other pre-tokens."""
    for plane in range(0, 0x110000, 0x10000):
        characters = (chr(code) for code in range(plane, plane + 0x10000) if not 0xD800 <= code < 0xE000)
        text = "".join(f"a{c}1 {c}." for c in characters)
        assert counts_of_kernels(write(tmp_path, text), num_workers=1) == counts_of_regex(text)


def test_random_difficult_strings(tmp_path):
    rng = random.Random(0)
    texts = [difficult_text(rng, 12) for _ in range(100_000)]
    expected: Counter[str] = Counter()
    for text in texts:
        expected.update(regex.findall(PATTERN, text))
    separator = "\U000e0001"  # not in the alphabet
    counts = counts_of_kernels(write(tmp_path, separator.join(texts)), [separator])
    assert counts == encoded(expected)


@pytest.mark.parametrize("name", [path.name for path in sorted(SHARED_DATA.glob("*.txt"))] or ["novels_valid.txt"])
def test_pretokens_of_real_text(tmp_path, name):
    text = shared_data(name).read_bytes()[: 3 << 20].decode(errors="ignore")
    expected: Counter[str] = Counter()
    for document in text.split(END):
        expected.update(regex.findall(PATTERN, document))
    counts = counts_of_kernels(write(tmp_path, text), [END])
    assert counts == encoded(expected)


# ---- counting


@pytest.mark.parametrize("seed", range(12))
def test_the_counts_do_not_depend_on_the_chunks(tmp_path, seed):
    rng = random.Random(seed)
    chunk_bytes = rng.choice([1, 50, 1000])
    special_tokens = rng.sample(OVERLAPPING, rng.randint(0, len(OVERLAPPING)))
    texts = [difficult_text(rng, 30) + rng.choice([*OVERLAPPING, "<|endoftext", "<|end|>", " th"]) for _ in range(200)]
    path = write(tmp_path, "".join(texts))
    expected = count_pretokens(path, SpecialTokens(special_tokens), num_workers=1, kernels=False)
    for _ in range(2):
        options: dict[str, Any] = {"num_workers": rng.randint(1, 8), "shard_bytes": rng.choice([300, 1000, 5000])}
        assert counts_of_kernels(path, special_tokens, chunk_bytes=chunk_bytes, **options) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "a" * 5000,
        " " * 5000,
        "\u3000" * 3000 + "x",
        "'" * 2000 + "s" * 3000,
        " 漢字" * 2000,
        "漢字" * 2000,
        "".join(f"{number:x}-" for number in range(20_000)),
        " ".join(f"w{'x' * (number % 40)}{number}" for number in range(60_000)),  # all distinct: the tables grow
        "".join(chr(0x4E00 + number % 20_000) * (number % 50) + "\n" for number in range(10_000)),  # long ones too
        "".join("x" * length + " " for length in [*range(1, 40), *range(1000, 1060), *range(1000, 1060)]),
    ],
    ids=range(12),
)
def test_odd_files(tmp_path, text, pair):
    path = write(tmp_path, text)
    assert counts_of_kernels(path) == counts_of_regex(text)
    fast, slow = pair
    assert fast.encode(text) == slow.encode(text)


def test_no_pretoken_crosses_the_end_of_a_file(tmp_path):
    paths = [write(tmp_path, text, name) for text, name in (("ab a", "1"), ("b ab", "2"), ("", "3"))]
    assert counts_of_kernels(paths) == {b"ab": 1, b" a": 1, b"b": 1, b" ab": 1}
    assert count_pretokens(paths, SpecialTokens(()), kernels=False) == counts_of_kernels(paths)
    vocab, merges = train_bpe(paths, 260, [], kernels=True)
    assert (vocab, merges) == train_bpe(paths, 260, [], kernels=False)


def test_counts_have_64_bits():
    counts = {b"abc": 1 << 61, b"bcd": (1 << 61) + 1}
    assert merges_from_counts(counts, 5, kernels=True) == merges_from_counts(counts, 5, kernels=False)
    larger = {pretoken: count << 8 for pretoken, count in counts.items()}  # for the plain path only
    assert merges_from_counts(larger, 5, kernels=True) == merges_from_counts(counts, 5, kernels=False)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_error_names_the_offset_of_invalid_utf8(tmp_path, num_workers):
    rng = random.Random(num_workers)
    for _ in range(300):
        good = difficult_text(rng, 300).encode()
        position = rng.randint(0, len(good))
        bad = rng.choice(
            [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80", b"\xf0\x9f"]
        )
        data = good[:position] + bad + good[position:]
        try:
            data.decode()
            continue  # a character may have been completed
        except UnicodeDecodeError as error:
            offset = error.start
        path = write(tmp_path, data)
        with pytest.raises(InvalidInputError, match=f"not valid UTF-8 at byte offset {offset} "):
            counts_of_kernels(path, num_workers=num_workers, shard_bytes=400)


# ---- merges


def test_merges_equal_naive_merging_on_corpora_with_many_ties():
    rng = random.Random(0)
    for number in range(1000):
        alphabet = (b"a", b"ab", b"abc", b"ab")[number % 4]
        pretokens = (bytes(rng.choices(alphabet, k=rng.randint(1, 14))) for _ in range(rng.randint(0, 12)))
        counts = {pretoken: rng.randint(0, 3) for pretoken in pretokens}
        num_merges = rng.randint(0, 40)
        expected = naive_merges({pretoken: count for pretoken, count in counts.items() if count}, num_merges)
        assert merges_from_counts(counts, num_merges, kernels=True) == expected


def test_merges_equal_the_plain_path_on_novels():
    path = shared_data("novels_valid.txt")
    assert train_bpe(path, 10_000, [END], kernels=True) == train_bpe(path, 10_000, [END], kernels=False)


# ---- other patterns


@pytest.mark.parametrize("pattern", [r"\w+|\s", r"(?<=a)b+|(c)(d)", r"\p{Lu}?\p{Ll}+(?= )", r"\n"])
def test_another_pattern(tmp_path, pattern):
    """The oracle: its matches and the text between them, between special tokens."""
    text = (SAMPLE.read_bytes().decode()[:3000] + END + "abb cd Ab ab") * 3
    pretokens = []
    for document in regex.split(regex.escape(END), text):
        position = 0
        for match in regex.finditer(pattern, document):
            pretokens += [document[position : match.start()], match.group()]
            position = match.end()
        pretokens.append(document[position:])
    expected = Counter(pretoken.encode() for pretoken in pretokens if pretoken)
    path = write(tmp_path, text)
    special_tokens = SpecialTokens([END])
    for shard_bytes in (100, 4000, 1 << 20):
        assert count_pretokens(path, special_tokens, pattern=pattern, shard_bytes=shard_bytes) == expected
    vocab, merges = train_bpe(path, 300, [END], pattern=pattern, kernels=True)
    assert merges == merges_from_counts(expected, 300 - 257, kernels=False)
    tokenizer = Tokenizer(vocab, merges, [END], pattern=pattern, kernels=True)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == list(tokenizer.encode_iterable(text)) == tokenizer.encode_array(text.encode()).tolist()
    plain = Tokenizer(vocab, merges, [END])
    assert tokenizer.fingerprint != plain.fingerprint
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    plain.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == plain.fingerprint


def test_tiktokens_newer_pattern_gives_tiktokens_ids(gpt2):
    import tiktoken

    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    text = SAMPLE.read_bytes().decode() + " It's 12345 o'clock!\n\n  end "
    ranks = {token: i for i, token in gpt2.vocab.items() if i != 50256}
    theirs = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 50256})
    ours = Tokenizer(gpt2.vocab, gpt2.merges, [END], pattern=pattern)
    assert ours.encode(text) == theirs.encode(text, allowed_special="all")


# ---- bad arguments


def test_bad_arguments(tmp_path, pair):
    fast = pair[0]
    path = write(tmp_path, "text")
    with pytest.raises(InvalidInputError, match="num_threads must be at least 1, got 0"):
        fast.encode_array("a", num_threads=0)
    with pytest.raises(InvalidInputError, match="errors='ignore' must be 'strict' or 'replace'"):
        encode_file(fast, path, tmp_path / "ids.bin", errors="ignore")
    with pytest.raises(TypeError, match="must be a string, bytes or a uint8 array, got list"):
        fast.encode_array([1, 2])
    with pytest.raises(TypeError, match="must be one-dimensional uint8, got int64"):
        fast.encode_array(np.arange(3))
    with pytest.raises(TypeError, match="text must be a string, got bytes"):
        fast.encode(b"bytes")
    with pytest.raises(InvalidInputError, match=r"pattern '\(' is not in the syntax of the regex package"):
        Tokenizer({}, [], pattern="(")
    with pytest.raises(TypeError, match="pattern must be a name, a regular expression or a Pattern"):
        Tokenizer({}, [], pattern=PATTERN.encode())  # ty: ignore[invalid-argument-type]


# ---- loading


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_small_texts_do_not_load_numba(tmp_path):
    path = write(tmp_path, SAMPLE.read_bytes() * 3)
    code = """if True:
        import sys
        from basic.encoding import encode_file
        from basic.Tokenizer import Tokenizer
        from basic.train_bpe import train_bpe
        tokenizer = Tokenizer(*train_bpe(sys.argv[1], 300, ["<|endoftext|>"]), ["<|endoftext|>"])
        encode_file(tokenizer, sys.argv[1], sys.argv[2])
        tokenizer.decode(tokenizer.encode_array(open(sys.argv[1], "rb").read()))
        assert not {"numba", "torch"} & sys.modules.keys()
    """
    result = run_python(code, path, tmp_path / "ids.bin")
    assert result.returncode == 0, result.stderr


def test_large_texts_use_the_kernels(tmp_path, trained):
    text = SAMPLE.read_bytes().decode() * (loading.MIN_BYTES_FOR_KERNELS // SAMPLE.stat().st_size + 1)
    tokenizer = Tokenizer(*trained, OVERLAPPING)
    assert tokenizer.encode(text[:5000]) == Tokenizer(*trained, OVERLAPPING, kernels=False).encode(text[:5000])
    tokenizer.encode_array(text)
    assert tokenizer._kernel_encoder is not None


def test_the_kernels_are_not_used_with_little_address_space(tmp_path):
    """LLVM would end the process. The plain path encodes, or raises MemoryError and then still works."""
    pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know how much address space is in use")
    code = """if True:
        import resource, sys
        from basic.Tokenizer import Tokenizer
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
        tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
        try:
            print(len(tokenizer.encode("some text " * 500_000)))
        except MemoryError:
            print("MemoryError")
        assert tokenizer.encode("ab") == [97, 98]
        assert "numba" not in sys.modules
    """
    for megabytes, expected in ((1500, "5000000"), (20, "MemoryError")):
        result = run_python(code, megabytes)
        assert (result.returncode, result.stdout.strip()) == (0, expected), result.stderr


def test_kernels_are_compiled_without_a_cache_folder(monkeypatch):
    from basic.common.native import object_files
    from basic.common.native.kernel import Kernel

    monkeypatch.setattr(object_files, "cache_folder", lambda: None)
    assert Kernel(lambda x: x + 1, {})(1) == 2


def test_the_cache_folder_is_the_first_that_is_absolute_and_writable(capsys, tmp_path):
    from basic.common.native.object_files import first_writable_folder

    (tmp_path / "file").touch()
    unusable = [None, "", "relative", tmp_path / "file" / "x"]
    folder = first_writable_folder([*unusable, tmp_path / "first", tmp_path / "second"])
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "first"]
    assert first_writable_folder(unusable) is None
    assert "no folder for compiled kernels is writable (set NUMBA_CACHE_DIR)" in capsys.readouterr().err


def test_a_message_says_that_kernels_are_compiled(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "_call_training_kernels", lambda: None)
    monkeypatch.setattr("basic.common.native.object_files.cache_folder", lambda: tmp_path)
    for expected in ("compiling the kernels for training, once on this machine (ahead", ""):
        monkeypatch.setattr(loading, "_loaded", set())  # as in a new process
        loading.are_compiled.cache_clear()
        loading.load_kernels("training")
        assert (capsys.readouterr().err == "") == (expected == "")
    loading.are_compiled.cache_clear()


def test_a_tokenizer_with_kernels_can_be_pickled(pair):
    import pickle

    fast = pair[0]
    assert fast.encode("the same") == pickle.loads(pickle.dumps(fast)).encode("the same")


def test_threads_may_share_a_tokenizer(pair):
    from concurrent.futures import ThreadPoolExecutor

    fast, slow = pair
    texts = [SAMPLE.read_bytes().decode()[start : start + 3000] for start in range(0, 3000, 100)]
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(fast.encode, texts)) == list(map(slow.encode, texts))
