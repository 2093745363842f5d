"""GPT-2's printable form and its two files, and decoding in blocks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basic.bytes_utils import (
    bytes_to_unicode,
    decode_blocks,
    from_printable,
    load_merges,
    load_vocab,
    save_merges,
    save_vocab,
    to_printable,
)
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.corpus.files import read_blocks
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import printable_bytes

tokens = st.binary(min_size=1, max_size=6)


def test_printable_form_is_that_of_the_tokenizers_package():
    theirs = {byte: character for character, byte in printable_bytes().items()}
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert theirs.keys() == set(range(256)) - never_in_utf8
    assert {byte: bytes_to_unicode()[byte] for byte in theirs} == theirs
    assert len(set(bytes_to_unicode().values())) == 256
    assert not any(character.isspace() for character in bytes_to_unicode().values())


@given(st.binary())
def test_printable_form_round_trip(token):
    assert from_printable(to_printable(token)) == token


def test_gpt2_files_round_trip_byte_for_byte(tmp_path):
    vocab, merges = shared_data("gpt2_vocab.json"), shared_data("gpt2_merges.txt")
    save_vocab(load_vocab(vocab), tmp_path / "vocab.json")
    save_merges(load_merges(merges), tmp_path / "merges.txt")
    assert (tmp_path / "vocab.json").read_bytes() == vocab.read_bytes()
    version, _, rest = (tmp_path / "merges.txt").read_bytes().partition(b"\n")
    assert version == b"#version: 0.2"
    assert rest == merges.read_bytes()


@settings(max_examples=30)
@given(vocab=st.dictionaries(st.integers(0, 10**6), st.binary(max_size=6)), merges=st.lists(st.tuples(tokens, tokens)))
def test_files_round_trip(tmp_path_factory, vocab, merges):
    folder = tmp_path_factory.mktemp("files")
    save_vocab(vocab, folder / "vocab.json")
    save_merges(merges, folder / "merges.txt")
    assert load_vocab(folder / "vocab.json") == vocab
    assert load_merges(folder / "merges.txt") == merges


def test_two_ids_with_the_same_bytes_are_both_read_back(tmp_path):
    vocab = {0: b"a", 1: b"b", 2: b"a"}
    save_vocab(vocab, tmp_path / "vocab.json")
    assert load_vocab(tmp_path / "vocab.json") == vocab


def test_special_tokens_in_the_vocabulary_file(tmp_path):
    vocab = dict(enumerate(s.encode() for s in ["<|endoftext|>", "<| end of text |>", "<|конец|>", "Ġ"]))
    save_vocab(vocab, tmp_path / "vocab.json")
    assert load_vocab(tmp_path / "vocab.json") == vocab
    assert json.loads((tmp_path / "vocab.json").read_text())["<|endoftext|>"] == 0
    # The tokenizers package writes special tokens as plain text. With a space it cannot be a printable form.
    (tmp_path / "vocab.json").write_text('{"<| end of text |>": 7}')
    assert load_vocab(tmp_path / "vocab.json") == {7: b"<| end of text |>"}


def test_only_a_version_in_the_first_line_is_skipped(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("# #\n#version: x\n## #\n")
    assert load_merges(path) == [(b"#", b"#"), (b"#version:", b"x"), (b"##", b"#")]
    path.write_bytes(b"#version: 0.2\r\n# #\r\n")
    assert load_merges(path) == [(b"#", b"#")]
    path.write_bytes(b"")
    assert load_merges(path) == []
    merges = [(b"#version", b":"), (b"#version:", b"0")]
    save_merges(merges, path)
    assert load_merges(path) == merges


@pytest.mark.parametrize("line", ["a", "a b c", "a  b", " a", "", "a \N{EM SPACE}"])
def test_the_error_names_the_line_of_a_damaged_merge(tmp_path, line):
    path = tmp_path / "merges.txt"
    path.write_text(f"#version: 0.2\na b\n{line}\nc d\n", encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"merges\.txt', line 3: "):
        load_merges(path)


def test_the_error_names_the_offset_of_invalid_utf8_in_merges(tmp_path):
    (tmp_path / "merges.txt").write_bytes(b"a b\n\xff c\n")
    with pytest.raises(DamagedFileError, match="byte offset 4"):
        load_merges(tmp_path / "merges.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 0,\n "b" 1}', "line 2"),
        ('["a", "b"]', "one JSON object"),
        ('{"a": "0"}', "id of 'a' is '0'"),
        ('{"a": -1}', "id of 'a' is -1"),
        ('{"a": true}', "id of 'a' is True"),
        ('{"a": 0, "b": 0}', "id 0 is given twice, again to 'b'"),
    ],
)
def test_the_error_says_what_is_wrong_in_a_damaged_vocabulary(tmp_path, content, message):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(DamagedFileError, match=message) as error:
        load_vocab(tmp_path / "vocab.json")
    assert "vocab.json" in str(error.value)


@given(text=st.text(), size=st.integers(1, 5))
def test_blocks_are_decoded_wherever_they_are_divided(text, size):
    data = text.encode()
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    assert "".join(decode_blocks(blocks, "name")) == text


@given(
    data=st.one_of(st.binary(), st.text().map(str.encode).flatmap(lambda b: st.just(b[:-1]))), size=st.integers(1, 5)
)
def test_the_error_names_the_offset_of_invalid_utf8(data, size):
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    try:
        expected = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(InvalidInputError, match=f"'name' is not valid UTF-8 at byte offset {1000 + error.start} "):
            list(decode_blocks(blocks, "name", start=1000))
    else:
        assert "".join(decode_blocks(blocks, "name")) == expected


def test_files_are_read_without_newline_translation(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\x1a")
    monkeypatch.setattr("basic.corpus.files.BLOCK_BYTES", 4)
    assert "".join(decode_blocks(read_blocks(path), path)) == "\ufeffa\r\nb\rc\n\x1a"
    assert b"".join(read_blocks(path, 3, 9)) == b"a\r\nb\rc"
    assert b"".join(read_blocks(path, 5, 5)) == b""


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "merges.txt").write_bytes(b"\xef\xbb\xbf#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_bytes(b'\xef\xbb\xbf{"a": 0}')
    assert load_merges(tmp_path / "merges.txt") == [(b"a", b"b")]
    assert load_vocab(tmp_path / "vocab.json") == {0: b"a"}
