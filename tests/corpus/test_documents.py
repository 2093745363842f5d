"""Documents of JSON lines, Parquet tables, iterators and standard input; lines without a text; separators."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from basic.bpe import loading
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.corpus.counting import count_pretokens
from basic.corpus.documents import BadLines, read_parquet, warn_of_skipped
from basic.corpus.files import BLOCK_BYTES
from basic.corpus.shards import entire_source, exceeds
from basic.corpus.sources import TextSource, expand_inputs, read_text
from basic.corpus.train_valid import split_text
from basic.encoding import encode_file, encode_files
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from tests.helpers.scripts import run_script
from tests.helpers.tokenizer_tools import BYTES

pytestmark = pytest.mark.usefixtures("plain_path")

END = "<|endoftext|>"
DOCUMENTS = ["One document.", "", f"it's {END} in a text", "日本 é\u0301 the same the same"]
BOTH = pytest.mark.parametrize("kernels", [False, True])


def write_json_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def texts_of(source: Any) -> str:
    return "".join(read_text(source))


# Fields


@pytest.mark.parametrize(
    ("record", "field", "expected"),
    [
        ({"data": {"text": "a"}}, "data.text", "a"),
        ({"data": {"text": "a"}, "data.text": "b"}, "data.text", "b"),
        ({"data": {"text": "a"}, "data.text": 5}, "data.text", "a"),
        ({"a": {"b": {"c": "x"}}, "a.b": {"c": "y"}}, "a.b.c", "y"),
        ({"a": {"b.c": "z", "b": {"c": "x"}}}, "a.b.c", "z"),
        ({"a.b": {}, "a": {"b": {"c": "x"}}}, "a.b.c", "x"),
        ({"": {"": "e"}}, ".", "e"),
    ],
)
def test_a_field_with_dots(tmp_path, record, field, expected):
    assert texts_of(TextSource(write_json_lines(tmp_path / "a.jsonl", [record]), field=field)) == expected


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "data.body",
            r"has no field 'data.body'; the field must be one of its strings, \['id', 'data.text', 'data.x.y'\]",
        ),
        ("data", r'has \{"text": "a".* as .data.'),
        ("id.x", "has no field 'id.x'"),
        ("data.n", "has 5 as 'data.n'"),
    ],
)
def test_a_field_that_is_not_there(tmp_path, field, message):
    path = write_json_lines(tmp_path / "a.jsonl", [{"id": "i", "data": {"text": "a", "n": 5, "x": {"y": "b"}}}])
    with pytest.raises(InvalidInputError, match=message):
        texts_of(TextSource(path, field=field))


# Parquet


@BOTH
def test_a_table_is_read_as_its_json_lines(tmp_path, kernels):
    lines = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    table = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "text": DOCUMENTS}, row_group_size=3)
    special = SpecialTokens([END])
    for inputs in ([table], [table, lines, table]):
        expected = [lines] * len(inputs)
        assert count_pretokens(inputs, special, kernels=kernels) == count_pretokens(expected, special, kernels=False)
        tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
        encode_file(tokenizer, inputs, tmp_path / "table.bin")
        encode_file(tokenizer, expected, tmp_path / "lines.bin")
        ids = open_tokens(tmp_path / "table.bin").tolist()
        assert ids == open_tokens(tmp_path / "lines.bin").tolist()
        assert ids.count(256) == 4 * len(inputs) - 1
        encode_files(tokenizer, inputs, tmp_path / "ids", shard_bytes=1, start_over=True)
        assert open_tokens(tmp_path / "ids")[:].tolist() == ids
    with pytest.raises(InvalidInputError, match="also separates the documents in plain text"):
        split_text(table, tmp_path)


def test_columns_of_a_table(tmp_path):
    texts = ["a", "b", "a"]
    struct = pyarrow.array([{"text": text, "n": 1} for text in texts])
    columns = {
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "binary": pyarrow.array(texts, pyarrow.binary()),
        "data": struct,
        "data.x": pyarrow.array(["x", "x", "x"]),
        "outer": pyarrow.array([{"data": {"text": text}} for text in texts]),
        "n": [1, 2, 3],
    }
    path = write_parquet(tmp_path / "a.PARQUET", columns)
    for field in ("dictionary", "large", "binary", "data.text", "outer.data.text"):
        assert texts_of(TextSource(path, field=field)) == END.join(texts)
    assert texts_of(TextSource(path, field="data.x")) == END.join("xxx")
    for field, message in [
        ("text", r"has no column 'text'; .* one of its columns of texts, \['dictionary', .*'data.text', 'data.x',"),
        ("n", "has int64 in the column 'n'"),
        ("data", "has struct<.* in the column 'data'"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            texts_of(TextSource(path, field=field))


def test_a_row_group_is_read_in_blocks(tmp_path):
    texts = [random.Random(row).randbytes(5000).hex() for row in range(600)]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4, "data_page_size": 1}
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, **options)
    sizes = []

    class Recorded(io.FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    with Recorded(path) as file:
        read = read_parquet(file, "a.parquet", "text", errors="strict", bad_lines=BadLines(None))
        assert list(read) == texts
    assert max(sizes) < 2 * BLOCK_BYTES < path.stat().st_size // 4


def test_bad_tables(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a" * 100] * 50})
    content = path.read_bytes()
    for damaged in (b"a", content[:-20], content[:10] + b"x" * 30 + content[40:], b"PAR1" + b"\0" * 50 + b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match="is no Parquet table, or is damaged"):
            texts_of(path)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(content))
    with pytest.raises(InvalidInputError, match="is a compressed Parquet table; decompress it first"):
        texts_of(tmp_path / "b.parquet.gz")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        texts_of(tmp_path / "none.parquet")
    binary = pyarrow.array([b"good", b"a\xffb"], pyarrow.binary())
    path = write_parquet(tmp_path / "c.parquet", {"text": binary})
    with pytest.raises(InvalidInputError, match=r"c.parquet, row 2' is not valid UTF-8 at byte offset 1"):
        texts_of(path)
    encode_file(Tokenizer(BYTES, [], [END]), path, tmp_path / "ids.bin", errors="replace")
    assert Tokenizer(BYTES, [], [END]).decode(open_tokens(tmp_path / "ids.bin")) == f"good{END}a\ufffdb"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInputError, match=r"needs pyarrow; use `pip install pyarrow`, or .* --extra formats"):
        texts_of(path)


def test_a_table_behind_a_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = write_parquet(tmp_path / "a.parquet", {"text": DOCUMENTS})
    with fsspec.open("memory://tables/a.parquet", "wb") as file:
        file.write(path.read_bytes())
    assert texts_of("memory://tables/a.parquet") == END.join(DOCUMENTS)


# Lines without a text

GOOD = '{"text": "good one"}'
BAD = ["not JSON", '["a list"]', '{"other": 1}', '{"text": null}', '{"text": "\xff"}', '{"text": "cut']
NUM_BAD = len(BAD)


def write_bad_lines(path: Path) -> Path:
    path.write_bytes("\n".join([GOOD, *BAD[:3], "", GOOD, *BAD[3:]]).encode("latin-1"))
    return path


@BOTH
def test_lines_without_a_text_are_skipped_and_counted(tmp_path, kernels):
    path = write_bad_lines(tmp_path / "a.jsonl")
    table = write_parquet(tmp_path / "b.parquet", {"text": ["good one", None, "good one", None]})
    tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
    for name, num_skipped in ((path, NUM_BAD), (table, 2), ([path, table, path], 2 * NUM_BAD + 2)):
        inputs = [TextSource(each, on_bad_line="skip") for each in (name if isinstance(name, list) else [name])]
        first = "row 2' has no text" if name == table else r"line 2' \(from byte offset 21 on\) is not JSON"
        message = rf"^lines or rows skipped: {num_skipped}; the first: .*{first}"
        with pytest.warns(UserWarning, match=message):
            counts = count_pretokens(inputs, SpecialTokens([END]), kernels=kernels, shard_bytes=1, fan_in=2)
        assert counts == {b"good": 2 * len(inputs), b" one": 2 * len(inputs)}
        with pytest.warns(UserWarning, match=message):
            encode_file(tokenizer, inputs, tmp_path / "ids.bin")
        text = END.join(["good one"] * 2 * len(inputs))
        assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == text
        for _ in range(2):  # the second time, nothing is read
            with pytest.warns(UserWarning, match=message):
                encode_files(tokenizer, inputs, tmp_path / f"ids-{num_skipped}", shard_bytes=1)
        assert tokenizer.decode(open_tokens(tmp_path / f"ids-{num_skipped}")) == text
    with pytest.raises(InvalidInputError, match=r"line 2' .* is not JSON"):
        encode_file(tokenizer, path, tmp_path / "ids.bin")


def test_nothing_is_said_of_no_lines(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_pretokens(TextSource(path, on_bad_line="skip"), SpecialTokens([END]))


def test_a_wrong_field_is_found_although_lines_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("basic.corpus.documents.MAX_BAD_LINES_AT_START", 6)
    path = write_bad_lines(tmp_path / "a.jsonl")
    table = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array([None] * 6, pyarrow.string())})
    assert texts_of(TextSource(path, on_bad_line="skip")) == f"good one{END}good one"
    for source, message in [
        (
            TextSource(path, field="wrong", on_bad_line="skip"),
            r"none of the first 6 lines or rows has a text: .*line 7",
        ),
        (TextSource(table, on_bad_line="skip"), "none of the first 6 lines or rows has a text: .*row 6"),
        (TextSource(table, field="wrong", on_bad_line="skip"), "has no column 'wrong'"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            texts_of(source)
    few = write_json_lines(tmp_path / "few.jsonl", [{"wrong": "a"}] * 5)  # one bad file of many ends nothing
    assert texts_of(TextSource(few, on_bad_line="skip")) == ""


def test_a_long_line_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("basic.corpus.documents.MAX_LINE_BYTES", 30)
    monkeypatch.setattr("basic.corpus.documents.BLOCK_BYTES", 7)
    path = tmp_path / "a.jsonl.gz"
    lines = [GOOD, '{"text": "' + "a" * 100 + '"}', GOOD, '{"text": "' + "a" * 100]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.warns(UserWarning, match="^lines or rows skipped: 2; .* is longer than 30"):
        encode_file(Tokenizer(BYTES, [], [END]), TextSource(path, on_bad_line="skip"), tmp_path / "ids.bin")
    assert open_tokens(tmp_path / "ids.bin").tolist() == [*b"good one", 256, *b"good one"]
    with pytest.raises(InvalidInputError, match=r"line 2 \(from byte offset 21 on\) is longer than 30 bytes"):
        texts_of(path)


def test_another_option_is_other_work(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a", "body": "b"}])
    tokenizer = Tokenizer(BYTES, [], [END])
    encode_files(tokenizer, path, tmp_path / "ids")
    count_pretokens(path, SpecialTokens([END]), work_folder=tmp_path / "work")
    others: list[dict[str, Any]] = [{"field": "body"}, {"on_bad_line": "skip"}, {"specials_in_documents": True}]
    for other in [TextSource(path, **options) for options in others]:
        with pytest.raises(InvalidInputError, match="holds other work, with other input_sha256"):
            encode_files(tokenizer, other, tmp_path / "ids")
        with pytest.raises(InvalidInputError, match="holds other work, with other input_sha256"):
            count_pretokens(other, SpecialTokens([END]), work_folder=tmp_path / "work")
    with pytest.raises(InvalidInputError, match="holds other work, with other errors"):
        count_pretokens(path, SpecialTokens([END]), work_folder=tmp_path / "work", errors="replace")
    with pytest.raises(InvalidInputError, match="on_bad_line='ignore' must be 'error' or 'skip'"):
        TextSource(path, on_bad_line="ignore")  # ty: ignore[invalid-argument-type]


# Separators


@BOTH
def test_special_tokens_in_documents_are_special_only_if_the_caller_says_it(tmp_path, kernels):
    tokenizer = Tokenizer(BYTES, [], [END, "<pad>"], kernels=kernels)
    documents = [f"a{END}b", "<pad>"]
    lines = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    table = write_parquet(tmp_path / "a.parquet", {"text": documents})
    for path in (lines, table, None):
        for special in (False, True):
            source = TextSource(path or iter(documents), specials_in_documents=special)
            encode_file(tokenizer, source, tmp_path / "ids.bin")
            ids = [*b"a", 256, *b"b", 256, 257] if special else [*documents[0].encode(), 256, *b"<pad>"]
            assert open_tokens(tmp_path / "ids.bin").tolist() == ids
            source = TextSource(path or iter(documents), specials_in_documents=special)
            counts = count_pretokens(source, SpecialTokens([END, "<pad>"]), kernels=kernels)
            assert counts[b"pad"] == (0 if special else 1)
            assert counts[b"endoftext"] == (0 if special else 1)
            assert counts[b"a"] == 1


# Iterators and standard input


@BOTH
def test_an_iterator_gives_documents(tmp_path, kernels):
    documents = [*DOCUMENTS, "a\ud83d\ude00\ud800"]
    lines = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    assert train_bpe(iter(documents), 300, [END], kernels=kernels) == train_bpe(lines, 300, [END], kernels=False)
    assert train_bpe((text for text in documents), 300, [END], num_workers=2, chunk_bytes=9, kernels=kernels) == (
        train_bpe(lines, 300, [END], kernels=False)
    )
    tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
    encode_file(tokenizer, [lines, TextSource(iter(documents))], tmp_path / "both.bin")
    ids = [*tokenizer.encode(documents[0]), 256]
    assert open_tokens(tmp_path / "both.bin").tolist().count(256) == 9
    encode_file(tokenizer, iter(documents), tmp_path / "ids.bin")
    assert open_tokens(tmp_path / "ids.bin")[: len(ids)].tolist() == ids
    assert texts_of(iter(documents)) == END.join([*DOCUMENTS, "a😀\ufffd"])
    assert train_bpe(iter([]), 256, [])[1] == []
    assert train_bpe(iter(["aa"]), 257, [])[1] == [(b"a", b"a")]  # its separator need not be a special token


@pytest.mark.parametrize("is_large", [False, True])
def test_the_kernels_for_an_iterator_are_chosen_by_its_first_texts(monkeypatch, is_large):
    monkeypatch.setattr(loading, "_loaded", set())
    taken = []
    texts = ["a", "b" * (loading.MIN_BYTES_FOR_KERNELS - 2 + is_large), "c" * 5]
    (source,) = expand_inputs(text for text in texts if taken.append(text) is None)
    assert exceeds([entire_source(source)], loading.MIN_BYTES_FOR_KERNELS - 1 + is_large)
    assert taken == texts[:2]  # no more than needed
    assert exceeds([entire_source(source)], sum(map(len, texts)) + 1) is False
    assert texts_of(source) == END.join(texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([Path("a")], "must give strings, got PosixPath: .* paths are given in a list"), (["a", 5], "must give strings")],
)
def test_an_iterator_of_something_else_is_refused(tmp_path, texts, message):
    with pytest.raises(TypeError, match=message):
        train_bpe(iter(texts), 300, [END])
    with pytest.raises(TypeError, match=message):
        encode_file(Tokenizer(BYTES, [], [END]), iter(texts), tmp_path / "ids.bin")
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_read_only_once_cannot_be_divided(tmp_path):
    tokenizer = Tokenizer(BYTES, [], [END])
    for inputs, message in (
        (iter(["a"]), "an iterator of texts can be read only once"),
        ("-", "standard input can be"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            encode_files(tokenizer, inputs, tmp_path / "ids")
        with pytest.raises(InvalidInputError, match=message):
            train_bpe(inputs, 300, [END], work_folder=tmp_path / "work")
        with ThreadPoolExecutor(1) as executor, pytest.raises(InvalidInputError, match=message):
            train_bpe(inputs, 300, [END], executor=executor)
    with pytest.raises(InvalidInputError, match="given twice"):
        train_bpe(["-", "-"], 300, [END])


def set_standard_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


STREAMS = {
    "text": (f"low lower{END}lowest".encode(), f"low lower{END}lowest"),
    "JSON lines": (b'{"text": "low lower"}\n{"text": "lowest <|endoftext|>"}\n', f"low lower{END}lowest {END}"),
    "a byte order mark": (b"\xef\xbb\xbflow low", "low low"),
    "nothing": (b"", ""),
}


@pytest.mark.parametrize("name", STREAMS)
@BOTH
def test_standard_input(tmp_path, monkeypatch, name, kernels):
    content, text = STREAMS[name]
    set_standard_input(monkeypatch, content)
    tokenizer = Tokenizer(BYTES, [], [END], kernels=kernels)
    encode_file(tokenizer, "-", tmp_path / "ids.bin")
    assert tokenizer.decode(open_tokens(tmp_path / "ids.bin")) == text
    assert not sys.stdin.buffer.closed
    set_standard_input(monkeypatch, content)
    counts = count_pretokens("-", SpecialTokens([END]), kernels=kernels)
    assert counts[b"low"] + counts[b" low"] == text.count("low ") + (name == "a byte order mark")


@pytest.mark.parametrize("size", [0, 100, loading.MIN_BYTES_FOR_KERNELS - 1, loading.MIN_BYTES_FOR_KERNELS])
def test_the_kernels_for_standard_input_are_chosen_by_its_size(monkeypatch, size):
    monkeypatch.setattr(loading, "_loaded", set())
    set_standard_input(monkeypatch, size * b"a")
    source = TextSource("-")
    assert exceeds([entire_source(source)], loading.MIN_BYTES_FOR_KERNELS) == (size == loading.MIN_BYTES_FOR_KERNELS)
    assert "".join(read_text(source)) == size * "a"


@pytest.mark.parametrize(
    "options",
    [
        *({"field": 5}, {"end_of_text": None}, {"begins_with_separator": 1}),
        *({"specials_in_documents": "no"}, {"path": 5}, {"path": b"a.txt"}),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_named(options: dict[str, Any]):
    (name,) = options
    arguments: dict[str, Any] = {"path": "a.txt"} | options
    with pytest.raises(TypeError, match=f"{name} must be a"):
        TextSource(**arguments)


def test_a_damaged_record_of_skipped_lines_spoils_no_work():
    with pytest.warns(UserWarning, match="^lines or rows skipped: 3; the first: not recorded"):
        warn_of_skipped([{"skipped": 0}, {"skipped": 3}])


def test_scripts_with_standard_input_and_options(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"data": {"text": f"low lower {i}"}}) for i in range(20)]
    content = "\n".join([*lines, "bad"]).encode() + b'\n{"data": {"text": "\xff"}}'
    set_standard_input(monkeypatch, content)
    reading = ["--field", "data.text", "--on-bad-line", "skip", "--errors", "replace"]
    settings = ["--vocab-size", "262", "--num-workers", "1", "--max-token-bytes", "3"]
    with pytest.warns(UserWarning, match="^lines or rows skipped: 1; .* is not JSON"):
        run_script(monkeypatch, "train_bpe", "-", "--output", tmp_path / "first", *settings, *reading)
    assert "262 (5 merges)" in capsys.readouterr().out
    first = Tokenizer.load(tmp_path / "first")
    assert max(len(left + right) for left, right in first.merges) == 3

    set_standard_input(monkeypatch, b"newest newest newest <pad>")
    settings = ["--vocab-size", "266", "--special-tokens", "<pad>", "--num-workers", "1"]
    arguments = ["-", "--extend", tmp_path / "first", "--output", tmp_path / "second"]
    run_script(monkeypatch, "train_bpe", *arguments, *settings)
    assert "266 (3 new merges)" in capsys.readouterr().out
    second = Tokenizer.load(tmp_path / "second")
    assert second.vocab.items() > first.vocab.items()
    assert second.special_token_ids == {END: 0, "<pad>": 262}
    assert second.merges[:5] == first.merges
    with pytest.raises(SystemExit, match="--vocab-size 100 is less than the 263 tokens of --extend"):
        run_script(monkeypatch, "train_bpe", *arguments, *settings, "--vocab-size", "100", "--overwrite")

    set_standard_input(monkeypatch, content)
    with pytest.warns(UserWarning, match="^lines or rows skipped: 1; .* is not JSON"):
        run_script(monkeypatch, "encode", "-", tmp_path / "ids.bin", "--tokenizer", tmp_path / "second", *reading)
    expected = END.join([*(f"low lower {i}" for i in range(20)), "\ufffd"])
    assert second.decode(open_tokens(tmp_path / "ids.bin")) == expected


# Bytes that are not UTF-8


@BOTH
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl"])
def test_counting_can_replace_invalid_bytes(tmp_path, kernels, suffix):
    content = b"good \xff\xfe text \xe2\x82 " * 50 + "日本".encode()[:-1]
    text = content.decode(errors="replace")
    path, plain = tmp_path / f"a{suffix}", tmp_path / "valid.txt"
    plain.write_text(text)
    line = b'{"text": "' + content + b'"}\n' + b'{"text": "a"}'
    path.write_bytes({".txt": content, ".txt.gz": gzip.compress(content), ".jsonl": line}[suffix])
    expected = count_pretokens(plain, SpecialTokens([END]), kernels=False)
    if suffix == ".jsonl":
        expected[b"a"] += 1
    divided: dict[str, Any] = {"chunk_bytes": 20, "shard_bytes": 60, "num_workers": 2}
    for options in ({}, divided):
        counts = count_pretokens(path, SpecialTokens([END]), kernels=kernels, errors="replace", **options)
        assert counts == expected
    with pytest.raises(InvalidInputError, match="is not valid UTF-8"):
        count_pretokens(path, SpecialTokens([END]), kernels=kernels)
    with pytest.raises(InvalidInputError, match="errors='ignore' must be"):
        count_pretokens(path, SpecialTokens([END]), errors="ignore")
