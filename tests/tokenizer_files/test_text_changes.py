"""Changes of a text before it is split: the ids of the package `tokenizers`, and the definition."""

import json
import random
import re
import sys
import unicodedata

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from basic.common.errors import InvalidInputError
from basic.encoding import encode_file, encode_files
from basic.formats.tokenizers import save_tokenizer_json
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import TokenizerSettings
from basic.tokenizer_files.normalization import TextChanges, begins_alone
from basic.tokens.opening import open_tokens
from tests.helpers.tokenizer_tools import BYTES, END

MARKS = ["\u0301", "\u0323", "\u0338", "\u09be", "\u3099", "\u1161", "\u11a8", "\u0345"]
CHANGING = [
    "e",
    "a",
    ">",
    "が",
    "か",
    "\u1100",
    "가",
    "é",
    "\u212b",
    "\u0958",
    "\u09c7",
    "\u2126",
    " ",
    "\n",
    "\u2003",
    "<",
]
NFC = TokenizerSettings(normalizer="NFC")
SPECIALS = ["<s>", "<s>x", "<m>", "<r>"]
FLAGS = {"<m>": {"lstrip": True, "special": False}, "<r>": {"lstrip": True, "rstrip": True, "normalized": True}}


def tokenizer(settings: TokenizerSettings, specials: list[str] = SPECIALS, kernels: bool = False) -> Tokenizer:
    vocab = {**BYTES, 256: "é".encode(), 257: b"<s", 258: b"  "}
    merges = [("é".encode()[:1], "é".encode()[1:]), (b"<", b"s"), (b" ", b" ")]
    return Tokenizer(vocab, merges, specials, settings=settings, kernels=kernels)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer with all changes of text, and the same for `tokenizers`."""
    path = tmp_path_factory.mktemp("changes") / "tokenizer.json"
    ours = tokenizer(TokenizerSettings(normalizer="NFC", flags=FLAGS))
    save_tokenizer_json(ours, path)
    assert Tokenizer.load(path).fingerprint == ours.fingerprint
    return ours, tokenizers.Tokenizer.from_file(str(path))


@given(text=st.lists(st.sampled_from([*MARKS, *CHANGING, *SPECIALS, "x"]), max_size=12).map("".join))
def test_a_changed_text_has_the_ids_of_the_other_program(pair, text):
    ours, huggingface = pair
    assert ours.encode(text) == huggingface.encode(text).ids
    assert ours.encode_array(text).tolist() == ours.encode_array(text.encode()).tolist() == ours.encode(text)
    parts = [text[: len(text) // 3], text[len(text) // 3 : len(text) // 2], text[len(text) // 2 :]]
    assert list(ours.encode_iterable(parts)) == list(ours.encode_iterable(text)) == ours.encode(text)


@pytest.mark.parametrize("kernels", [False, True])
def test_normalized_tokens_are_found_in_the_normalized_text_only(tmp_path, kernels):
    flags = {"e": {"normalized": True}, "\u1161": {"normalized": True}, ";": {"normalized": True, "lstrip": True}}
    ours = tokenizer(TokenizerSettings(normalizer="NFC", flags=flags), ["<s>", *flags], kernels)
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (
        "e\u0301",
        "e\u0323\u0301<s>\u0301e",
        "\u1100\u1161",
        "\u1100<s>\u1161\u11a8",
        "a \n\u037e",
        " ;e;\u0301",
    ):
        ids = other.encode(text).ids
        assert ours.encode(text) == list(ours.encode_iterable(text)) == ours.encode_array(text).tolist() == ids, text


def test_nfc_may_be_cut_before_every_character_that_begins_alone():
    """Of all characters, those that some character before them changes when they are normalized together."""
    befores = [
        "e",
        "\u1100",
        "가",
        "か",
        "\u09c7",
        "\u0bc6",
        "\u0d47",
        "\u1025",
        "\u0f71",
        "\u0301",
        "\u0345",
        "\u1b05",
    ]
    for code in [*range(0x3400), *range(0x3400, sys.maxunicode + 1, 17)]:
        character = chr(code)
        if begins_alone(character):
            assert unicodedata.combining(character) == 0
            for before in befores if code < 0x3400 else befores[:2]:
                joined = unicodedata.normalize("NFC", before + character)
                assert joined == unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", character)
    assert all(map(begins_alone, "aK\n 中가か₂"))
    assert not any(map(begins_alone, MARKS))


def by_definition(text: str, tokens: list[str], settings: TokenizerSettings) -> str:
    for found in ([token for token in tokens if not settings.flag(token, "normalized")], tokens):
        parts = re.split(f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})", text)
        for i in range(1, len(parts), 2):
            if settings.flag(parts[i], "lstrip"):
                parts[i - 1] = parts[i - 1].rstrip()
            if settings.flag(parts[i], "rstrip"):
                parts[i + 1] = parts[i + 1].lstrip()
        parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
        text = "".join(parts)
    return text.replace("中", "\ufffd")


def test_streams_are_changed_like_the_complete_text():
    settings = TokenizerSettings(normalizer="NFC", flags=FLAGS)
    changes = TextChanges(SpecialTokens(SPECIALS), settings, missing_bytes="中".encode()[:1])
    random_ = random.Random(0)
    for _ in range(2000):
        pieces = random_.choices([*MARKS, *CHANGING, *SPECIALS, "中", "  ", "<", ">"], k=random_.randint(0, 14))
        text = "".join(pieces)
        expected = by_definition(text, SPECIALS, settings)
        assert changes.apply(text) == expected
        position, parts = 0, []
        while position < len(text):
            size = random_.randint(1, 6)
            parts.append(text[position : position + size])
            position += size
        assert "".join(changes.apply_to_stream(parts)) == expected


def test_a_stream_is_not_held_back_long():
    changes = TextChanges(SpecialTokens([END]), NFC)
    longest, taken, given_out = 0, 0, 0

    def texts():
        nonlocal taken
        for _ in range(200):
            text = "Ünïcode 中文字 가나 <m\n"
            taken += len(text)
            yield text

    for text in changes.apply_to_stream(texts()):
        given_out += len(text)
        longest = max(longest, taken - given_out)
    assert longest < 200


def test_a_text_that_is_normal_is_not_copied():
    changes = TextChanges(SpecialTokens([END]), NFC)
    for text in ["plain", "né 中", END]:
        assert changes.apply(text) is text


@pytest.mark.parametrize("token", ["<K>", "a;b", "é", "Å", "<\u0301>", "가"])
def test_special_tokens_that_nfc_could_make_are_refused(token):
    with pytest.raises(InvalidInputError, match="which NFC also makes of other characters"):
        tokenizer(NFC, [token])
    normalized = TokenizerSettings(normalizer="NFC", flags={token: {"normalized": True}})
    assert list(tokenizer(normalized, [token]).special_token_ids) == [token]


def test_a_special_token_to_be_normalized_must_be_normal():
    with pytest.raises(InvalidInputError, match="is to be normalized, but is not in NFC"):
        tokenizer(TokenizerSettings(normalizer="NFC", flags={"e\u0301": {"normalized": True}}), ["e\u0301"])
    assert tokenizer(NFC, ["<｜begin▁of▁sentence｜>"]).encode("<｜begin▁of▁sentence｜>") == [259]


@pytest.mark.parametrize("kernels", [False, True])
def test_files_and_documents_are_changed_too(tmp_path, kernels):
    ours = tokenizer(TokenizerSettings(normalizer="NFC", flags=FLAGS), [END, *SPECIALS], kernels=kernels)
    text = ("e\u0301 <m>\n  <r>  a\u0323\u0301 \u1100\u1161\n" + END) * 50
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    info = encode_file(ours, tmp_path / "text.txt", tmp_path / "ids.bin", chunk_bytes=100)
    assert open_tokens(tmp_path / "ids.bin").tolist() == ours.encode(text)
    assert info.source_bytes == len(text.encode())
    encode_files(ours, [tmp_path / "text.txt"] * 2, tmp_path / "dataset", shard_bytes=100, num_workers=1)
    assert open_tokens(tmp_path / "dataset")[:].tolist() == ours.encode(text) * 2
    documents = ["e\u0301 <m>", "\u0301a\u0323\u0301", END]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    encode_file(ours, tmp_path / "text.jsonl", tmp_path / "documents.bin")
    expected = []
    for document in documents:
        expected += [*ours.encode(document, specials_as_text=True), ours.special_token_ids[END]]
    assert open_tokens(tmp_path / "documents.bin").tolist() in (expected, expected[:-1])


# ---- vocabularies that lack bytes


def lacking(*characters: str, kernels: bool | None = None) -> Tokenizer:
    missing = {*"".join(characters).encode()}
    return Tokenizer({i: token for i, token in BYTES.items() if i not in missing}, [], kernels=kernels)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_missing_byte_is_named_with_its_place(kernels):
    ours = lacking("\x04", kernels=kernels)
    for text, offset in [("a\x04", 1), ("é\n é\x04\x04", 6), ("\x04", 0), ("ab " * 9000 + "\x04", 27000)]:
        expected = rf"no token for the byte 0x04, at byte offset {offset} of 'text'; encode with errors='replace'"
        with pytest.raises(InvalidInputError, match=expected):
            ours.encode(text)
        with pytest.raises(InvalidInputError, match=expected):
            list(ours.encode_iterable(text))


@pytest.mark.parametrize("character", ["\x04", "é", "中"])
def test_missing_bytes_can_be_replaced(tmp_path, character):
    ours = Tokenizer({i: t for i, t in BYTES.items() if i != character.encode()[0]}, [], [f"<{character}>"])
    text = f"a{character}b <{character}> {character}"
    expected = ours.encode(f"a\ufffdb <{character}> \ufffd")
    assert ours.encode(text, errors="replace") == ours.encode_array(text, errors="replace").tolist() == expected
    assert ours.encode_array(text.encode(), errors="replace").tolist() == expected
    assert list(ours.encode_iterable(text, errors="replace")) == expected
    assert ours.encode_batch([text, "a"], errors="replace") == [expected, [97]]
    (tmp_path / "text.txt").write_bytes(text.encode())
    with pytest.raises(InvalidInputError, match="no token for the byte"):
        encode_file(ours, tmp_path / "text.txt", tmp_path / "ids.bin")
    encode_file(ours, tmp_path / "text.txt", tmp_path / "ids.bin", errors="replace")
    assert open_tokens(tmp_path / "ids.bin").tolist() == expected
    with pytest.raises(InvalidInputError, match="errors='ignore' must be"):
        ours.encode(text, errors="ignore")


def test_if_the_replacement_has_no_token_either_it_is_an_error():
    with pytest.raises(InvalidInputError, match="no token for the byte 0xef"):
        lacking("\x04", "\ufffd").encode("a\x04", errors="replace")
