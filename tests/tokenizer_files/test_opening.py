"""`Tokenizer.load` opens whatever holds a tokenizer."""

import json

import pytest

from basic.bytes_utils import save_merges, save_vocab
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.formats.tokenizers import save_tiktoken, save_tokenizer_json
from basic.pretokenization import Pattern
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.content import TokenizerSettings
from tests.helpers.tokenizer_tools import BYTES, END

pytestmark = pytest.mark.usefixtures("plain_path")

VOCAB = {**BYTES, 256: b"th", 257: b"the"}
MERGES = [(b"t", b"h"), (b"th", b"e")]
TEXT = f"the  theory {END} 123\n's"


@pytest.fixture
def ours() -> Tokenizer:
    return Tokenizer(VOCAB, MERGES, [END], pattern="cl100k")


def test_all_forms_of_a_tokenizer_are_opened(tmp_path, ours):
    ours.save(tmp_path / "folder")
    ours.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "run" / "checksums.json").touch()
    (tmp_path / "hf").mkdir()
    save_tokenizer_json(ours, tmp_path / "hf" / "tokenizer.json")
    save_tiktoken(ours, tmp_path / "ranks.tiktoken")
    for name in ("folder", "run", "hf", "hf/tokenizer.json"):
        loaded = Tokenizer.load(tmp_path / name)
        assert (loaded.fingerprint, loaded.encode(TEXT)) == (ours.fingerprint, ours.encode(TEXT))
        assert Tokenizer.load(str(tmp_path / name), pattern="cl100k_base").fingerprint == ours.fingerprint
        with pytest.raises(InvalidInputError, match="says itself how a text is split"):
            Tokenizer.load(tmp_path / name, pattern="gpt2")
    from_ranks = Tokenizer.load(tmp_path / "ranks.tiktoken", pattern=Pattern(*ours.compiled_pattern.splits))
    assert from_ranks.with_special_tokens([END]).fingerprint == ours.fingerprint


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a saved tokenizer.* or a rank file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*missing'"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(DamagedFileError, match=r"config\.json' is not a complete tokenizer\.json"):
        Tokenizer.load(tmp_path / "config.json")
    (tmp_path / "text.txt").write_text("the")
    with pytest.raises(DamagedFileError, match=r"text\.txt', line 1: b'the' must be a token in base64"):
        Tokenizer.load(tmp_path / "text.txt", pattern="gpt2")
    save_vocab(VOCAB, tmp_path / "gpt2_vocab.json")
    with pytest.raises(InvalidInputError, match=r"gpt2_vocab\.json' is a vocabulary without merges.*give a folder"):
        Tokenizer.load(tmp_path / "gpt2_vocab.json")
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_text("")
    with pytest.raises(InvalidInputError, match="has several rank files"):
        Tokenizer.load(tmp_path, pattern="gpt2")


# ---- vocab.json and merges.txt of transformers


@pytest.fixture
def two_files(tmp_path):
    save_vocab({**VOCAB, 258: END.encode()}, tmp_path / "vocab.json")
    save_merges(MERGES, tmp_path / "merges.txt")
    return tmp_path


def test_the_two_files_of_gpt2(two_files):
    loaded = Tokenizer.load(two_files)
    assert loaded.fingerprint == Tokenizer({**VOCAB, 258: END.encode()}, MERGES, [END]).fingerprint


def test_the_two_files_of_qwen_with_their_special_tokens(two_files):
    added = {"content": "<think>", "special": False, "normalized": False, "lstrip": False, "rstrip": True}
    config = {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": {"260": added}, "eos_token": END}
    (two_files / "tokenizer_config.json").write_text(json.dumps(config))
    (two_files / "added_tokens.json").write_text('{"<tool>": 261}')
    (two_files / "special_tokens_map.json").write_text('{"pad_token": {"content": "the"}, "unk_token": "none"}')
    loaded = Tokenizer.load(two_files)
    assert (loaded.compiled_pattern.name, loaded.settings.normalizer) == ("qwen2", "NFC")
    assert loaded.special_token_ids == {"<think>": 260, "<tool>": 261, END: 258, "the": 257}
    assert loaded.settings.flags == {"<think>": {"special": False, "rstrip": True}}
    assert loaded.encode("<think> e\u0301") == [260, *"é".encode()]
    assert loaded.decode([260, 258, 97], skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"tokenizer_class": "BartTokenizer"},
            InvalidInputError,
            "the tokenizer_class 'BartTokenizer' .*give a pattern",
        ),
        ({"add_prefix_space": True}, InvalidInputError, "add_prefix_space is true"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, DamagedFileError, "special tokens of .* cannot be read"),
        ({"added_tokens_decoder": {"300": {"content": "<x>", "single_word": True}}}, InvalidInputError, "single_word"),
        ({"added_tokens_decoder": {"97": {"content": "<x>"}}}, InvalidInputError, "'<x>' cannot have the id 97"),
    ],
)
def test_the_two_files_with_what_is_not_supported(two_files, config, error, message):
    (two_files / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        Tokenizer.load(two_files)


# ---- settings in our folder


def test_all_settings_survive_saving(tmp_path):
    processor = {"type": "BertProcessing", "cls": ["<a>", 258], "sep": ["<b>", 259]}
    flags = {"<a>": {"lstrip": True, "special": False}, "<b>": {"normalized": True}}
    vocab = {i: token for i, token in VOCAB.items() if token != b"\x04"} | {260: b"xyz"}
    settings = TokenizerSettings(
        normalizer="NFC",
        ignore_merges=True,
        one_merge_at_a_time=True,
        flags=flags,
        post_processor=processor,
        missing_bytes={"unk_token": None},
    )
    ours = Tokenizer({**vocab, 258: b"<a>", 259: b"<b>"}, MERGES, ["<a>", "<b>"], settings=settings)
    ours.save(tmp_path / "folder")
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    for name in ("folder", "tokenizer.json"):
        loaded = Tokenizer.load(tmp_path / name)
        assert loaded.fingerprint == ours.fingerprint
        assert loaded.settings.flags == flags
        assert loaded.settings.post_processor == processor
        for text in ["the e\u0301  <a> <b>", "xyz xyz"]:
            assert loaded.encode(text, template=True) == ours.encode(text, template=True)
    save_tokenizer_json(Tokenizer.load(tmp_path / "folder"), tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").fingerprint == ours.fingerprint


def test_the_fingerprint_has_only_settings_that_change_ids():
    plain = Tokenizer(VOCAB, MERGES, ["<a>"])

    def fingerprint(**settings) -> str:
        return Tokenizer(VOCAB, MERGES, ["<a>"], settings=TokenizerSettings(**settings)).fingerprint

    for same in (
        {"ignore_merges": True},
        {"one_merge_at_a_time": True},
        {"post_processor": {"type": "ByteLevel"}},
        {"flags": {"<a>": {"special": False, "normalized": True}}},
    ):
        assert fingerprint(**same) == plain.fingerprint
    other = [fingerprint(normalizer="NFC"), fingerprint(flags={"<a>": {"lstrip": True}})]
    assert len({plain.fingerprint, *other}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "must be an object with the format"),
        ({"format": "basic tokenizer settings 2"}, "is it of a newer version"),
        ({"other": 1}, "other"),
        ({"normalizer": "NFD"}, "normalizer='NFD' must be None or 'NFC'"),
        ({"ignore_merges": 1}, "ignore_merges=1 must be True or False"),
        ({"flags": {"<a>": {"bold": True}}}, "may only have special, normalized, lstrip, rstrip"),
        ({"flags": {"<a>": {"lstrip": 1}}}, "must be true or false"),
        ({"flags": []}, "must be an object of special tokens"),
        ({"post_processor": "x"}, "post_processor='x' must be an object or null"),
    ],
)
def test_damaged_settings_are_named(tmp_path, ours, fields, message):
    ours.save(tmp_path)
    (tmp_path / "checksums.json").unlink()
    (tmp_path / "tokenizer_settings.json").write_text(json.dumps(fields))
    with pytest.raises(DamagedFileError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)
