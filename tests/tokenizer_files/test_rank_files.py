"""Tokenizers that files cannot express, and rank files that cannot be read."""

import base64

import pytest
import tokenizers

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.tokenizers import load_tiktoken, save_tiktoken, save_tokenizer_json
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import TokenizerSettings
from tests.helpers.tokenizer_tools import BYTES, tiktoken_of_file

pytestmark = pytest.mark.usefixtures("plain_path")

LSTRIP = TokenizerSettings(flags={"<x>": {"lstrip": True}})


# ---- tokenizers that cannot be written


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer({0: b"a"}, []), "the vocabulary lacks a token for the byte 0x00"),
        (Tokenizer({**BYTES, 256: b"a"}, []), "the ids 97 and 256 would both be written as 'a'"),
        (Tokenizer({**BYTES}, [], ["Ġ"]), "the ids 32 and 256 would both be written as 'Ġ'"),
        (Tokenizer({**BYTES, 256: b"aa", 257: b"aaa"}, [(b"aa", b"a"), (b"a", b"a")]), "comes before the merges"),
        (Tokenizer(BYTES, [], pattern=r"\w+$|."), r"the tokenizer's pattern has '\$'"),
    ],
)
def test_tokenizers_that_tokenizer_json_cannot_express(tmp_path, tokenizer, message):
    with pytest.raises(InvalidInputError, match=message):
        save_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer({0: b"a"}, []), "the vocabulary lacks a token for the byte 0x00"),
        (Tokenizer({**BYTES, 256: b"a"}, []), "the ids 97 and 256 are both b'a'"),
        (Tokenizer({**BYTES, 256: b"abc"}, []), "the token b'abc' of rank 256 does not result from two tokens"),
        (Tokenizer({**BYTES, 256: b"ab"}, []), "must be in the order of the merges"),
        (Tokenizer({**BYTES, 256: b"ab", 257: b"bc"}, [(b"b", b"c"), (b"a", b"b")]), "must be in the order"),
        (Tokenizer(BYTES, [], pattern="[a-z]+|[0-9]"), r"pattern '\[a-z\]\+\|\[0-9\]' may leave out characters"),
        (Tokenizer(BYTES, [], pattern=r"\w(?!x)|\W"), "may leave out characters, which tiktoken would drop"),
        (Tokenizer(BYTES, [], pattern="starcoder"), "has 2 regular expressions"),
        (Tokenizer(BYTES, [], settings=TokenizerSettings(normalizer="NFC")), "brings text to NFC first"),
        (Tokenizer(BYTES, [], ["<x>"], settings=LSTRIP), "special token '<x>' has lstrip"),
        (
            Tokenizer({**BYTES, 256: b"aa", 257: b"aaa"}, [(b"aa", b"a"), (b"a", b"a")]),
            "comes before the merges that produce its two tokens",
        ),
    ],
)
def test_tokenizers_that_ranks_cannot_express(tmp_path, tokenizer, message):
    with pytest.raises(InvalidInputError, match=message):
        save_tiktoken(tokenizer, tmp_path / "ranks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "llama3", "qwen2", r"\w+|\W"])
def test_ranks_of_a_pattern_that_leaves_nothing_out(tmp_path, pattern):
    ours = Tokenizer({**BYTES, 256: b"ab"}, [(b"a", b"b")], pattern=pattern)
    save_tiktoken(ours, tmp_path / "ranks")
    assert load_tiktoken(tmp_path / "ranks", pattern=pattern).fingerprint == ours.fingerprint
    text = "ab cab! \n\n a1b\u3000\u0301"
    assert tiktoken_of_file(tmp_path / "ranks", {}, ours.compiled_pattern.splits[0]).encode(text) == ours.encode(text)


def test_special_tokens_that_are_also_ordinary_tokens(tmp_path):
    ours = Tokenizer({**BYTES, 256: b" t", 257: b"x y"}, [(b" ", b"t")], [" t", "\n", "x y"])
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    save_tiktoken(ours, tmp_path / "ranks")
    from_ranks = load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=ours.special_token_ids)
    for other in (Tokenizer.load(tmp_path / "tokenizer.json"), from_ranks):
        assert other.fingerprint == ours.fingerprint
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "a t\nx y the  t"
    assert huggingface.encode(text).ids == ours.encode(text)
    assert huggingface.decode(ours.encode(text), skip_special_tokens=False) == text


LINES = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (b"YWI=256\n", r"line 257: b'YWI=256' must be a token in base64, a space and a rank"),
        (b"\n\nYW_I 256\n", "line 259"),
        (b"YWI= -1\n", "line 257"),
        (b" 256\n", "line 257"),
        (b"YQ== 256\n", "line 257: the token b'a' is given twice"),
        (b"YWI= 97\n", "the tokens b'a' and b'ab' have the same rank"),
    ],
)
def test_bad_rank_files(tmp_path, more, message):
    (tmp_path / "ranks").write_bytes(LINES + more)
    with pytest.raises(DamagedFileError, match=message) as error:
        load_tiktoken(tmp_path / "ranks", pattern="gpt2")
    assert "ranks'" in str(error.value)


def test_special_tokens_of_rank_files(tmp_path):
    (tmp_path / "ranks").write_bytes(LINES)
    assert load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=["<a>"]).encode("<a>") == [256]
    assert load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens={"<a>": 300}).encode("<a>") == [300]
    for special_tokens in [{"<a>": 97}, {"a": 98}, {"a": 300}]:
        with pytest.raises(InvalidInputError, match=r"cannot have the id .* the token has another id"):
            load_tiktoken(tmp_path / "ranks", pattern="gpt2", special_tokens=special_tokens)
    (tmp_path / "ranks").write_bytes(LINES[: LINES.index(b"\n", 999) + 1])
    with pytest.raises(InvalidInputError, match="the file lacks a token for the byte"):
        load_tiktoken(tmp_path / "ranks", pattern="gpt2")


def rank_lines(*tokens: bytes, start: int = 256) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens, start))


def test_the_pattern_of_a_rank_file_is_given_or_found_by_its_special_tokens(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(LINES)
    with pytest.raises(
        InvalidInputError, match=r"ranks\.tiktoken' is a rank file.*give its pattern: gpt2, cl100k, o200k"
    ):
        Tokenizer.load(path)
    with pytest.raises(InvalidInputError, match="pattern 'cl99k' is neither a known name"):
        Tokenizer.load(path, pattern="cl99k")
    ours = Tokenizer.load(path, pattern="cl100k_base")
    assert (ours.compiled_pattern.name, ours.special_token_ids) == ("cl100k", {})
    path.write_bytes(LINES + rank_lines(b"<|begin_of_text|>", b"<|eot_id|>", b"<|begin", b"_of_text|>", start=300))
    with pytest.raises(InvalidInputError, match="none of the published files"):
        Tokenizer.load(path)  # not at the ids of Llama 3
    path.write_bytes(LINES + rank_lines(b"<|eot_id|>", start=128_009))
    llama = Tokenizer.load(tmp_path)  # the only rank file in the folder
    assert (llama.compiled_pattern.name, llama.special_token_ids) == ("llama3", {"<|eot_id|>": 128_009})
    assert llama.encode("a<|eot_id|>") == [97, 128_009]
    assert llama.encode("<|eot_id|>", specials_as_text=True) == [*b"<|eot_id|>"]
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(InvalidInputError, match="is a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model", pattern="gpt2")


def test_ranks_without_merges_are_those_of_tiktoken(tmp_path):
    """A pre-token that is a token is not split, although no merges produce it; a long one has the same ids."""
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(LINES + rank_lines(b"abcd", b"cab", b"ab", b"abab"))
    ours = Tokenizer.load(path, pattern=r"[^ ]+| ")
    encoding = tiktoken_of_file(path, {}, r"[^ ]+| ")
    for text in ["abcd", "abcdabcd abcd", "bcab", "xabab abab", "abcdab" * 300, "cab" * 50 + "d", "abab" * 999]:
        assert ours.encode(text) == encoding.encode(text)
    assert ours.used_merges.unmade == [b"abcd"]
    assert ours.used_merges.early is not None
    ours.save(tmp_path / "folder")
    saved = Tokenizer.load(tmp_path / "folder")
    assert saved.fingerprint == ours.fingerprint != Tokenizer(ours.vocab, ours.merges, pattern=ours.pattern).fingerprint
    assert saved.encode("abcd abcdabcd") == ours.encode("abcd abcdabcd") == encoding.encode("abcd abcdabcd")


def test_a_rank_file_is_replaced_unless_it_may_not_be(tmp_path):
    tokenizer = Tokenizer(BYTES | {256: b"ab"}, [(b"a", b"b")])
    for _ in range(2):
        save_tiktoken(tokenizer, tmp_path / "ranks")
    with pytest.raises(FileExistsError, match="ranks' already exists"):
        save_tiktoken(tokenizer, tmp_path / "ranks", overwrite=False)
