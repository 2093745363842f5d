"""Compressed text and JSON lines: the counts and ids of the plain text, and errors that name the offset."""

import dataclasses
import gzip
import itertools
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basic.common.errors import BasicError, DamagedFileError, InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.corpus.sources import TextSource, read_text
from basic.corpus.train_valid import split_text
from basic.encoding import encode_file
from basic.pretokenization import SpecialTokens, chunks_of_stream, compile_pattern
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from tests.bpe.test_pretokenization import divide, special_token_lists, split_by_definition, split_stream, texts
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.project.test_scripts import run_script

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

END = "<|endoftext|>"
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}
FORMATS = [kind + packed for kind in (".txt", ".jsonl") for packed in PACK][1:]
DOCUMENTS = ["One document.", "", "Two\r\nlines, 日本 é\u0301", "the same the same", " 'll \x85 \x00 "]
TEXT = END.join(DOCUMENTS)


def content_of(documents: list[str], suffix: str) -> bytes:
    """The bytes of a file with this suffix that holds these documents."""
    content = END.join(documents)
    if suffix.startswith(".jsonl"):
        lines = [json.dumps({"id": 7, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
        content = "\n".join(lines)
    return PACK[suffix.removeprefix(".jsonl").removeprefix(".txt")](content.encode())


def write(folder: Path, documents: list[str], suffix: str) -> Path:
    path = folder / f"corpus{suffix}"
    path.write_bytes(content_of(documents, suffix))
    return path


@pytest.mark.parametrize("suffix", [".txt", *FORMATS])
@given(
    documents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n")), min_size=1, max_size=3
    )
)
def test_the_text_is_read_as_it_was_written(tmp_path_factory, suffix, documents):
    path = write(tmp_path_factory.getbasetemp(), documents, suffix)
    assert "".join(read_text(path)) == END.join(documents)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kernels", [False, True])
def test_counts_merges_and_ids_are_those_of_the_plain_text(tmp_path, suffix, kernels):
    documents = [*DOCUMENTS, SAMPLE.read_bytes().decode(), "a" * 2000, *DOCUMENTS]
    plain, path = write(tmp_path, documents, ".txt"), write(tmp_path, documents, suffix)
    special = SpecialTokens([END])
    expected = count_pretokens(plain, special)
    for shard_bytes in (50, None):
        for paths, times in [([path], 1), ([path, plain, path], 3)]:
            options: dict[str, Any] = {
                "kernels": kernels,
                "shard_bytes": shard_bytes,
                "num_workers": 2,
                "chunk_bytes": 300,
            }
            counts = count_pretokens(paths, special, **options)
            assert counts == {pretoken: times * count for pretoken, count in expected.items()}
    vocab, merges = train_bpe(path, 300, [END], kernels=kernels, chunk_bytes=300)
    assert (vocab, merges) == train_bpe(plain, 300, [END], kernels=False)
    tokenizer = Tokenizer(vocab, merges, [END], kernels=kernels)
    info = encode_file(tokenizer, path, tmp_path / "stream.bin", chunk_bytes=300)
    assert info == encode_file(tokenizer, plain, tmp_path / "plain.bin", chunk_bytes=300)
    assert open_tokens(tmp_path / "stream.bin").tolist() == tokenizer.encode(END.join(documents))
    assert info.source_bytes == plain.stat().st_size


@pytest.mark.parametrize("pattern", [None, r"\w+|\W"])
@given(
    text=texts,
    special_tokens=special_token_lists,
    positions=st.lists(st.integers(0, 30)),
    chunk_bytes=st.integers(1, 9),
)
def test_streams_are_divided_only_at_safe_positions(pattern, text, special_tokens, positions, chunk_bytes):
    special, compiled_pattern = SpecialTokens(special_tokens), compile_pattern(pattern)
    chunks = [
        data[start:stop].tobytes().decode()
        for data, start, stop in chunks_of_stream(divide(text, positions), special, chunk_bytes, compiled_pattern)
    ]
    assert "".join(chunks) == text
    pretokens = [split_stream([chunk], special_tokens, compiled_pattern) for chunk in chunks]
    expected = split_stream([text], special_tokens, compiled_pattern)
    assert list(itertools.chain(*pretokens)) == expected
    if pattern is None:
        assert expected == split_by_definition(text, special_tokens)


def test_streams_are_divided_at_many_safe_positions():
    chunks = list(chunks_of_stream(["some words " * 50] * 100, SpecialTokens([END]), 1000))
    assert len(chunks) > 40
    assert all(stop - start < 3000 for _, start, stop in chunks)


# ---- memory


def peak_bytes(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
def test_memory_does_not_grow_with_the_text(tmp_path, suffix):
    """Also if a small file decompresses to a long text."""
    path = tmp_path / f"corpus{suffix}"
    line = b'{"text": "%s"}\n' % (b"word " * 2000) if suffix.startswith(".jsonl") else b"word " * 2000
    path.write_bytes(PACK[path.suffix](line * 1000))
    assert path.stat().st_size < 100_000
    special, read = SpecialTokens([END]), []

    def consume() -> None:
        read.append(sum(stop - start for _, start, stop in chunks_of_stream(read_text(path), special, 1 << 16)))

    assert peak_bytes(consume) < 2_000_000
    assert read[0] >= 10_000_000


# ---- errors


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "CORPUS.JSONL.GZ").write_bytes(content_of(DOCUMENTS, ".jsonl.gz"))
    assert "".join(read_text(tmp_path / "CORPUS.JSONL.GZ")) == TEXT


def test_another_field_and_separator(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"content": "a", "text": 5}\n\n  \n{"content": "b\\ud83d\\ude00\\ud800"}')
    source = TextSource(path, field="content", end_of_text="<s>")
    assert "".join(read_text(source)) == "a<s>b😀\ufffd"
    assert count_pretokens(source, SpecialTokens(["<s>"])).total() == 3
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], ["<s>"])
    encode_file(tokenizer, source, tmp_path / "ids.bin")
    assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == "a<s>b😀\ufffd"
    other = dataclasses.replace(source, end_of_text=END)
    for wrong in (
        lambda: count_pretokens(other, SpecialTokens(["<s>"])),
        lambda: train_bpe(other, 300, ["<s>"]),
        lambda: encode_file(tokenizer, other, tmp_path / "ids.bin"),
        lambda: encode_file(tokenizer, source, tmp_path / "ids.bin", specials_as_text=True),
    ):
        with pytest.raises(ValueError, match=r"are to be joined by .* which is none of the special tokens"):
            wrong()


GOOD_LINE = b'{"text": "a"}\n'
BAD = {
    "not JSON": (".jsonl", GOOD_LINE + b'{"text": ', r"corpus.jsonl, line 2' \(from byte offset 14 on\) is not JSON"),
    "deep": (".jsonl", b"[" * 100_000, "line 1' .* is not JSON"),
    "a list": (
        ".jsonl",
        GOOD_LINE + b'\n["b"]\n',
        r"line 3' \(from byte offset 15 on\) is no JSON object, but \['b'\]",
    ),
    "no field": (
        ".jsonl",
        b'{"content": "a", "id": 1}',
        "line 1' .* has no field 'text'; .* one of its strings, .'content'",
    ),
    "no string": (".jsonl", b'{"text": ["a"]}', r"line 1' .* has \['a'\] as 'text'; .* one of its strings, \[\]"),
    "a wrong byte in a line": (
        ".jsonl",
        GOOD_LINE + b'{"text": "\xff"}',
        "line 2' is not valid UTF-8 at byte offset 24 ",
    ),
    "a wrong byte": (".txt", b"a" * 70_000 + b"\xff", "is not valid UTF-8 at byte offset 70000 "),
    "a cut character": (".txt", b"a\xc3", "is not valid UTF-8 at byte offset 1 "),
}


@pytest.mark.parametrize(("suffix", "content", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_invalid_content_is_reported_and_leaves_no_files(tmp_path, suffix, content, message, packed):
    path = tmp_path / f"corpus{suffix}{packed}"
    path.write_bytes(PACK[packed](content))
    assert_refused(path, message.replace("jsonl,", f"jsonl{packed},"))
    if suffix == ".jsonl":
        path.with_suffix("").write_bytes(content)
        assert_refused(path.with_suffix(""), message)


def assert_refused(path: Path, message: str) -> None:
    folder = path.parent
    before = sorted(folder.iterdir())
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], [END], kernels=False)
    for read in (
        lambda: train_bpe(path, 300, [END], kernels=False),
        lambda: encode_file(tokenizer, path, folder / "ids.bin"),
        lambda: split_text(path, folder),
    ):
        with pytest.raises(ValueError, match=message):
            read()
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
def test_an_incomplete_or_changed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    content = content_of(DOCUMENTS, suffix)
    if suffix.endswith(".zst"):  # with a checksum, which gzip always has
        content = zstd.compress(zstd.decompress(content), options={zstd.CompressionParameter.checksum_flag: 1})
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"is incomplete: it ends soon after byte offset|is damaged"):
            list(read_text(path))
    path.write_bytes(content)
    expected, num_refused = list(read_text(path)), 0
    for offset in range(10, len(content)):  # after the time stamp of gzip
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        try:
            assert list(read_text(path)) == expected  # gzip has some unused bits
        except BasicError:  # gzip checks its checksum at the end, after text that may be invalid
            num_refused += 1
    assert num_refused > 0.9 * (len(content) - 10)
    path.write_bytes(b"plain text")
    with pytest.raises(
        DamagedFileError, match="is damaged, or not compressed as its name says, soon after byte offset 0"
    ):
        list(read_text(path))
    path.write_bytes(content + content)  # concatenated files are one text
    if suffix.startswith(".txt"):
        assert "".join(read_text(path)) == TEXT * 2


def test_paths_that_are_not_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        list(read_text(tmp_path / "folder.jsonl"))
    for function in (lambda path: train_bpe(path, 300, [END]), lambda path: split_text(path, tmp_path)):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            function(tmp_path / "none.jsonl.gz")


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl"])
def test_invalid_bytes_can_be_replaced(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    content = b'{"text": "a\xffb"}' if suffix == ".jsonl" else gzip.compress(b"a\xffb")
    path.write_bytes(content)
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], [END])
    encode_file(tokenizer, path, tmp_path / "ids.bin", errors="replace")
    assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == "a\ufffdb"


@pytest.mark.parametrize("kernels", [False, True])
def test_a_byte_without_a_token(tmp_path, kernels):
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(b"a " * 100_000 + b"b" + b" a" * 300))
    tokenizer = Tokenizer({97: b"a", 32: b" "}, [], kernels=kernels)
    message = "no token for the byte 0x62" + (", at byte offset 200000 of" if kernels else "")
    with pytest.raises(InvalidInputError, match=message):
        encode_file(tokenizer, path, tmp_path / "ids.bin", chunk_bytes=100)
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_text_is_split_like_plain_text(tmp_path):
    documents = [f"Document {i}.\n" for i in range(50)]
    splits = []
    for suffix in [".txt", *FORMATS]:
        (tmp_path / "out").mkdir(exist_ok=True)
        split_text(write(tmp_path, documents, suffix), tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.txt", "valid.txt"]
        splits.append([(tmp_path / "out" / name).read_bytes() for name in ("train.txt", "valid.txt")])
    assert b"".join(splits[0]) == END.join(documents).encode()
    assert all(split == splits[0] for split in splits)


def test_the_scripts_take_json_lines_with_a_field_and_a_separator(tmp_path, monkeypatch):
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstd.compress(b'{"body": "low lower"}\n{"body": "lowest"}\n'))
    options = ["--field", "body", "--end-of-text", "<s>"]
    source, tokenizer = tmp_path / "corpus.jsonl.zst", tmp_path / "tokenizer"
    settings = ["--vocab-size", "260", "--special-tokens", "<s>", "--num-workers", "1"]
    run_script(monkeypatch, "train_bpe", source, "--output", tokenizer, *settings, *options)
    run_script(monkeypatch, "encode", source, tmp_path / "ids.bin", "--tokenizer", tokenizer, *options)
    assert Tokenizer.load(tokenizer).decode(open_tokens(tmp_path / "ids.bin")) == "low lower<s>lowest"


def test_a_token_file_of_another_program_opens_with_its_dtype(tmp_path):
    """nanoGPT's are uint16 without a sidecar."""
    np.array([50256, 1, 2, 65535], np.uint16).tofile(tmp_path / "train.bin")
    assert open_tokens(tmp_path / "train.bin", dtype="uint16").tolist() == [50256, 1, 2, 65535]
