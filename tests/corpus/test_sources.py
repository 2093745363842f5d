"""Compressed text and JSON lines: the counts and ids of the plain text, and errors that name the offset."""

import bz2
import codecs
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import sys
import tarfile
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basic.bpe import arrays, loading
from basic.common.errors import BasicError, DamagedFileError, InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.corpus.shards import ShardChunks, entire_source, exceeds
from basic.corpus.sources import TextSource, read_text
from basic.corpus.train_valid import split_text
from basic.encoding import encode_file, encode_files
from basic.pretokenization import (
    GPT2_PATTERN,
    SpecialTokens,
    chunks_of_stream,
    pretokenize,
    replace_surrogates,
    resolve_pattern,
)
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from tests.bpe.test_pretokenization import divide, special_token_lists, split_by_definition, split_stream, texts
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.scripts import run_script
from tests.helpers.tokenizer_tools import BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

END = "<|endoftext|>"
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
FORMATS = [kind + packed for kind in (".txt", ".jsonl") for packed in PACK][1:]
DOCUMENTS = ["One document.", "", "Two\r\nlines, 日本 é\u0301", "the same the same", " 'll \x85 \x00 "]
TEXT = END.join(DOCUMENTS)


def content_of(documents: list[str], suffix: str) -> bytes:
    """The bytes of a file with this suffix that holds these documents."""
    content = END.join(documents)
    if suffix.startswith((".jsonl", ".ndjson", ".json")):
        lines = [json.dumps({"id": 7, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
        content = "\n".join(lines)
    return packed(content.encode(), suffix)


def packed(content: bytes, name: str | Path) -> bytes:
    """Compressed as the end of the name says."""
    return PACK.get(Path(name).suffix, bytes)(content)


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
    documents = [*DOCUMENTS, *SAMPLE.read_bytes().decode().split(END), "a" * 2000, *DOCUMENTS]
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
    special, compiled_pattern = SpecialTokens(special_tokens), resolve_pattern(pattern)
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


# ---- special tokens inside documents are text, and one separator is between two documents

PAD = "<|pad|>"
PIECES = st.sampled_from([END, PAD, END[:5], "a", "the", " ", "  ", "\n", "ÿþþ", "\ud800", "\udcff\udcfe", "é日"])
JSON_DOCUMENTS = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=5)
SUFFIXES = (".jsonl", ".ndjson.gz", ".json.bz2")


def ids_by_definition(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    ids = []
    for document in documents:
        ids += [*tokenizer.encode(document, specials_as_text=True), tokenizer.special_token_ids[END]]
    return ids[:-1]


@pytest.mark.parametrize(("kernels", "pattern"), [(False, None), (True, None), (False, r"\w+|\W")])
@settings(max_examples=20)
@given(
    documents=JSON_DOCUMENTS,
    suffix=st.sampled_from(SUFFIXES),
    options=st.fixed_dictionaries(
        {"chunk_bytes": st.integers(1, 40), "errors": st.sampled_from(["strict", "replace"])}
        | {"specials_as_text": st.booleans(), "num_threads": st.integers(1, 2)}
    ),
)
def test_special_tokens_in_documents_are_text(tmp_path_factory, kernels, pattern, documents, suffix, options):
    folder = tmp_path_factory.getbasetemp()
    path, special = folder / f"corpus{suffix}", SpecialTokens([END, PAD])
    content = "\n".join(json.dumps({"text": document}) for document in documents)
    path.write_bytes(packed(content.encode(), suffix))
    merges = [(b"<", b"|"), (b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
    vocab = {**BYTES, **{256 + i: left + right for i, (left, right) in enumerate(merges)}}
    tokenizer = Tokenizer(vocab, merges, special.tokens, pattern=pattern, kernels=kernels)
    expected = ids_by_definition(tokenizer, documents)
    info = encode_file(tokenizer, path, folder / "ids.bin", **options)
    assert open_tokens(folder / "ids.bin").tolist() == expected
    assert info.source_bytes == len(END.join(map(replace_surrogates, documents)).encode())

    # Plain text before and after it: special tokens there are special tokens.
    plain = folder / "plain.txt"
    plain.write_text(f"a{END}b", encoding="utf-8")
    encode_file(tokenizer, [plain, path, plain], folder / "ids.bin", **options)
    of_plain = tokenizer.encode(f"a{END}b", specials_as_text=options["specials_as_text"])
    separator = tokenizer.special_token_ids[END]
    assert open_tokens(folder / "ids.bin").tolist() == [*of_plain, separator, *expected, *of_plain]

    counted = count_pretokens(
        [plain, path, plain], special, pattern=pattern, kernels=kernels, chunk_bytes=options["chunk_bytes"]
    )
    by_definition = Counter({b"a": 2, b"b": 2})
    for document in documents:
        ((pretokens, _),) = pretokenize(replace_surrogates(document), SpecialTokens([]), resolve_pattern(pattern))
        by_definition.update(map(str.encode, pretokens))
    assert counted == by_definition


@pytest.mark.parametrize("kernels", [False, True])
def test_a_dataset_of_documents_with_special_tokens(tmp_path, kernels):
    documents = ["bye", f"say {END} now", "", f"{END}{END}"]
    paths = [write(tmp_path, documents, suffix) for suffix in SUFFIXES]
    tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
    encode_files(tokenizer, paths, tmp_path / "ids", shard_bytes=100)
    ids = ids_by_definition(tokenizer, documents)
    assert open_tokens(tmp_path / "ids")[:].tolist() == [*ids, 256, *ids, 256, *ids]
    _, merges = train_bpe(paths, 259, [END], kernels=kernels)
    assert merges == [(b"|", b">"), (b"x", b"t")]  # of the separators in the text


def test_a_document_with_the_separator_does_not_become_plain_text(tmp_path):
    """There the two could not be told apart."""
    path = write(tmp_path, ["bye", f"say {END} now"], ".jsonl")
    with pytest.raises(InvalidInputError, match=r"'say <\|endoftext\|> now'; choose another separator"):
        split_text(path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    split_text(TextSource(path, end_of_text="<s>"), tmp_path)
    assert (tmp_path / "train.txt").read_text() + (tmp_path / "valid.txt").read_text() == f"bye<s>say {END} now"


def test_streams_are_divided_at_many_safe_positions():
    chunks = list(chunks_of_stream(["some words " * 50] * 100, SpecialTokens([END]), 1000, GPT2_PATTERN))
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
        read.append(
            sum(stop - start for _, start, stop in chunks_of_stream(read_text(path), special, 1 << 16, GPT2_PATTERN))
        )

    assert peak_bytes(consume) < 2_000_000
    assert read[0] >= 10_000_000


def test_kernels_are_chosen_by_the_size_of_the_decompressed_text(tmp_path, monkeypatch):
    """The plain path would need a hundred bytes of memory a byte for one pre-token of this length."""
    monkeypatch.setattr(loading, "_loaded", set())  # as in a new process that has to compile them
    monkeypatch.setattr(loading, "are_compiled", lambda task: False)
    path = tmp_path / "corpus.txt.zst"
    for size, choice in [(loading.MIN_BYTES_FOR_KERNELS - 1, False), (loading.MIN_BYTES_FOR_KERNELS, True)]:
        path.write_bytes(zstd.compress(b"a" * size))
        assert exceeds([entire_source(TextSource(path))], loading.MIN_BYTES_FOR_KERNELS) == choice
        encode_file(Tokenizer(BYTES, []), path, tmp_path / "ids.bin")
        assert loading._loaded == ({"encoding"} if choice else set())
        count_pretokens(path, SpecialTokens([]))
        assert loading._loaded == ({"encoding", "training"} if choice else set())


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".txt.zst", ".jsonl.gz"])
def test_a_pretoken_that_is_too_long_is_refused(tmp_path, monkeypatch, kernels, suffix):
    monkeypatch.setattr(arrays, "MAX_PRETOKEN_BYTES", 40_000)
    tokenizer = Tokenizer({**BYTES, 256: b"aa"}, [(b"a", b"a")], [END], kernels=kernels)
    encode = partial(encode_file, tokenizer, output_path=tmp_path / "ids.bin", chunk_bytes=1000, overwrite=True)
    encode(write(tmp_path, ["one\n" + "a" * 40_000 + " two", "three"], suffix))
    ids = [*b"one\n", *[256] * 20_000, *b" two"]
    assert open_tokens(tmp_path / "ids.bin")[: len(ids)].tolist() == ids
    for length in (40_001, 4_000_000):
        path = write(tmp_path, ["one\n" + "a" * length, "three"], suffix)
        with pytest.raises(InvalidInputError, match=r"more than 40000 bytes, the limit.*aaaa"):
            encode(path)
    if suffix == ".txt.zst" and not kernels:  # refused before it is read

        def read() -> None:
            with pytest.raises(InvalidInputError):
                encode(path)

        assert peak_bytes(read) < 2_000_000


def test_memory_for_a_long_pretoken_in_the_plain_path():
    """It was 100 bytes for each byte."""
    tokenizer = Tokenizer({**BYTES, 256: b"aa", 257: b"aaaa"}, [(b"a", b"a"), (b"aa", b"aa")], kernels=False)
    ids = []
    assert peak_bytes(lambda: ids.extend(tokenizer.encode("a" * 60_000))) < 60 * 60_000
    assert ids == [257] * 15_000


def test_a_long_line_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("basic.corpus.documents.MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD_LINE + b'{"text": "' + b"a" * (1 << 24)))

    def read() -> None:
        with pytest.raises(InvalidInputError, match=r"line 2 \(from byte offset 14 on\) is longer than 65536 bytes"):
            list(read_text(path))

    assert peak_bytes(read) < 2_000_000
    line = b'{"text": "' + b"a" * ((1 << 16) - 12) + b'"}'
    path.write_bytes(gzip.compress(line))
    assert len(line) == 1 << 16
    assert "".join(read_text(path)) == "a" * ((1 << 16) - 12)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_text_that_has_been_read_leaves_memory(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"some words " * 3_000_000)
    chunks = ShardChunks(
        [entire_source(TextSource(tmp_path / "text.txt"))], SpecialTokens([]), GPT2_PATTERN, chunk_bytes=1 << 20
    )

    def resident_kilobytes() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(tmp_path / "text.txt"))[1]
        return int(maps.split("Rss:")[1].split()[0])

    resident = []
    for data, start, stop in chunks:
        assert data[start:stop].sum() > 0  # reads it
        chunks.mark_done()
        resident.append(resident_kilobytes())
    assert len(resident) > 20
    assert max(resident) < 10_000


# ---- formats


@pytest.mark.parametrize("suffix", [kind + packed for kind in (".ndjson", ".json") for packed in PACK])
def test_json_lines_by_any_of_their_names(tmp_path, suffix):
    assert "".join(read_text(write(tmp_path, DOCUMENTS, suffix))) == TEXT


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz", ".ndjson.xz"])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix, kernels):
    path = tmp_path / f"corpus{suffix}"
    for documents in (["one ", " two"], [""]):
        content = content_of(documents, Path(suffix).stem)
        path.write_bytes(packed(codecs.BOM_UTF8 + content, suffix))
        tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
        info = encode_file(tokenizer, path, tmp_path / "ids.bin", chunk_bytes=2)
        assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == END.join(documents)
        assert info.source_bytes == len(END.join(documents))
        encode_files(tokenizer, path, tmp_path / "ids", start_over=True, shard_bytes=2)
        assert tokenizer.decode(open_tokens(tmp_path / "ids")) == END.join(documents)
    path.write_bytes(packed(codecs.BOM_UTF8 + content[:5] + b"\xff", suffix))
    with pytest.raises(InvalidInputError, match=f"byte offset {3 + len(content[:5])} "):
        encode_file(tokenizer, path, tmp_path / "ids.bin")


def tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO(content))
    return file.getvalue()


JSON_LINE = b'{"text": "a"}\n'
OTHER_FORMATS = {
    "gzip": (".txt", gzip.compress(b"a"), r"compressed by gzip, .* end its name in \.gz"),
    "Zstandard": (".jsonl", zstd.compress(JSON_LINE), r"compressed by Zstandard, .* \.zst"),
    "xz": ("", lzma.compress(b"a"), r"compressed by xz, .* \.xz"),
    "bzip2": (".log", bz2.compress(b"a"), r"compressed by bzip2, .* \.bz2"),
    "twice compressed": (".gz", gzip.compress(gzip.compress(b"a")), "compressed by gzip"),
    "a JSON list": (".data", b'[ {"text": 5}]', "is JSON, as its first bytes show: end its name in .jsonl if"),
    "a JSON list, compressed": (".zst", zstd.compress(b'[{"text": 5}]'), "is JSON, as its first bytes show"),
    "a JSON document by content": (".data", b'{\n"text": "a"}', "is JSON, as its first bytes show"),
    "not JSON lines": ("", JSON_LINE + b"b", r"line 2' .* is not JSON: .* begins like JSON lines; .* is named \.txt"),
    "a JSON document": (".json", b'{\n"text": "a"}', r"line 1' .* is not JSON: .* one object a line .* named \.txt"),
    "a list in a line": (".json", b'[{"text": "a"}]', r"line 1' .* is no JSON object, .* one object a line"),
    "Parquet": (".txt", b"PAR1\0\0PAR1", r"a Parquet table, as its first bytes show: end its name in \.parquet"),
    "a table": (".csv", b"id,text\n", r"a table in text form, as its name says, .* name a text file \.txt"),
    "an archive by name": (".tar.xz", lzma.compress(b"a"), "a tar archive, as its name says, .* unpack it"),
    "an archive": (".txt.gz", gzip.compress(tar(b"a")), "a tar archive, as its first bytes show"),
    "a zip file": ("", b"PK\3\4", "a zip archive"),
    "PDF": (".PDF", b"a", "a PDF document, as its name says"),
    "UTF-16": (".txt", codecs.BOM_UTF16_LE + b"a\0", "text in UTF-16"),
    "UTF-16 without a mark": (".txt", ("word " * 20).encode("utf-16-le"), "many of its first bytes are zero"),
}


@pytest.mark.parametrize(("suffix", "content", "message"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_what_is_no_text_is_refused_by_its_name(tmp_path, suffix, content, message):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(content)
    assert_refused(path, message)
    tokenizer = Tokenizer(BYTES, [], [END])
    with pytest.raises(InvalidInputError, match=message):
        encode_file(tokenizer, path, tmp_path / "ids.bin", errors="replace")
    with pytest.raises(InvalidInputError, match=message):
        encode_files(tokenizer, path, tmp_path / "ids", errors="replace")


PLAIN = {".txt": '{"text": 5}\n', ".md": "[link](a)", "": "{a: 1}", ".py": "{1: 2}", ".gz": "\0a"}


@pytest.mark.parametrize(("suffix", "text"), PLAIN.items())
def test_any_other_text_is_plain_text(tmp_path, suffix, text):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(packed(text.encode(), path))
    assert "".join(read_text(path)) == text


def test_the_query_of_a_web_address_is_no_part_of_the_name():
    source = TextSource("https://example.org/data/Train.JSONL.gz?download=true&name=a.txt")
    assert (source.known_content, source.compression) == ("json lines", ".gz")


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
    tokenizer = Tokenizer(BYTES, [], ["<s>"])
    encode_file(tokenizer, source, tmp_path / "ids.bin")
    assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == "a<s>b😀\ufffd"
    other = dataclasses.replace(source, end_of_text=END)
    for wrong in (
        lambda: count_pretokens(other, SpecialTokens(["<s>"])),
        lambda: train_bpe(other, 300, ["<s>"]),
        lambda: encode_file(tokenizer, other, tmp_path / "ids.bin"),
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
    "no string": (".jsonl", b'{"text": ["a"]}', r"line 1' .* has \[\"a\"\] as 'text'; .* a string, and it has none"),
    "null": (".jsonl", b'{"text": null, "a": "b"}', r"line 1' .* has null as 'text'; .* one of its strings, \['a'\]"),
    "a wrong byte in a line": (
        ".jsonl",
        GOOD_LINE + b'{"text": "\xff"}',
        "line 2' is not valid UTF-8 at byte offset 24 ",
    ),
    "a wrong byte": (".txt", b"a" * 70_000 + b"\xff", "is not valid UTF-8 at byte offset 70000 "),
    "a cut character": (".txt", b"a\xc3", "is not valid UTF-8 at byte offset 1 "),
}


@pytest.mark.parametrize(("suffix", "content", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz", ".bz2"])
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
    tokenizer = Tokenizer(BYTES, [], [END], kernels=False)
    for read in (
        lambda: train_bpe(path, 300, [END], kernels=False),
        lambda: encode_file(tokenizer, path, folder / "ids.bin"),
        lambda: split_text(path, folder),
    ):
        with pytest.raises(ValueError, match=message):
            read()
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("suffix", [kind + packed for kind in (".txt", ".jsonl") for packed in list(PACK)[1:]])
def test_an_incomplete_or_changed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    content = content_of(DOCUMENTS, suffix)
    if suffix.endswith(".zst"):  # with a checksum, which gzip always has
        content = zstd.compress(zstd.decompress(content), options={zstd.CompressionParameter.checksum_flag: 1})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"is incomplete: it ends soon after byte offset|is damaged"):
            list(read_text(path))
    path.write_bytes(content)
    expected, num_refused = list(read_text(path)), 0
    start = {".xz": 0, ".bz2": 4}.get(path.suffix, 10)
    for offset in range(start, len(content)):  # after the time stamp of gzip
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        try:
            assert list(read_text(path)) == expected  # gzip has some unused bits
        except BasicError:  # gzip checks its checksum at the end, after text that may be invalid
            num_refused += 1
    assert num_refused > 0.9 * (len(content) - start)
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
    tokenizer = Tokenizer(BYTES, [], [END])
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
