"""Tokenizers that are saved to a folder: what is loaded, replaced, found damaged, and left alone."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basic.common.errors import DamagedFileError
from basic.Tokenizer import Tokenizer
from tests.adapters import get_tokenizer
from tests.conftest import shared_data
from tests.fixtures.make_tokenizer_fixtures import SAMPLE
from tests.helpers.tokenizer_tools import BYTES

pytestmark = pytest.mark.usefixtures("plain_path")

END = "<|endoftext|>"


def test_from_files_reads_the_files_of_gpt2():
    vocab, merges = shared_data("gpt2_vocab.json"), shared_data("gpt2_merges.txt")
    tokenizer = Tokenizer.from_files(vocab, str(merges), special_tokens=[END])
    assert tokenizer.special_token_ids == {END: 50256}
    assert tokenizer.encode(f"Hello world{END}") == [15496, 995, 50256]


def test_save_and_load(tmp_path, ours):
    ours.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert (loaded.vocab, loaded.merges) == (ours.vocab, ours.merges)
    assert loaded.special_token_ids == ours.special_token_ids
    assert loaded.fingerprint == ours.fingerprint
    text = SAMPLE.read_bytes().decode()
    assert loaded.encode(text) == ours.encode(text)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "checksums.json",
        "merges.txt",
        "special_tokens.json",
        "vocab.json",
    ]


@settings(max_examples=30)
@given(
    special_tokens=st.lists(st.text(min_size=1), unique=True, max_size=4),
    merges=st.lists(
        st.tuples(st.sampled_from([b"#", b"\n", b" ", b"\xff"]), st.sampled_from([b"#", b"\r"])), unique=True
    ),
)
def test_any_special_tokens_and_merges_survive_saving(tmp_path_factory, special_tokens, merges):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = dict(enumerate([*BYTES.values(), *(left + right for left, right in merges)]))
    tokenizer = get_tokenizer(vocab, merges, special_tokens)
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert (loaded.vocab, loaded.merges) == (tokenizer.vocab, tokenizer.merges)
    assert list(loaded.special_token_ids.items()) == list(tokenizer.special_token_ids.items())
    assert loaded.fingerprint == tokenizer.fingerprint


def test_fingerprints_differ_if_tokenizers_differ():
    vocab = BYTES | {256: b"ab", 257: b"bc"}
    merges = [(b"a", b"b"), (b"b", b"c")]
    tokenizer = get_tokenizer(vocab, merges, ["<x>", "<y>"])
    others = [
        get_tokenizer(vocab, merges, ["<y>", "<x>"]),
        get_tokenizer(vocab, merges, ["<x>"]),
        get_tokenizer(tokenizer.vocab, merges, ["<x>"]),
        get_tokenizer(vocab, merges[::-1], ["<x>", "<y>"]),
        get_tokenizer(vocab, merges[:1], ["<x>", "<y>"]),
        get_tokenizer(vocab | {256: b"bc", 257: b"ab"}, merges, ["<x>", "<y>"]),
    ]
    assert len({other.fingerprint for other in [tokenizer, *others]}) == len(others) + 1
    assert get_tokenizer(dict(reversed(vocab.items())), merges, ["<x>", "<y>"]).fingerprint == tokenizer.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", tokenizer.fingerprint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("special_tokens.json", '{"<x>": 1}', "must hold a JSON list"),
        ("special_tokens.json", "[", "is not JSON"),
        ("special_tokens.json", '["a", 1]', "special token 1 must be a string"),
        ("special_tokens.json", '["a", "a"]', "'a' is given twice"),
        ("merges.txt", "q z\n", r"merge 0.*needs the token b'qz'"),
        ("vocab.json", "[]", "must hold one JSON object"),
        ("pattern.json", '"("', "not in the syntax of the regex package"),
        ("pattern.json", "1", "pattern must be a name"),
    ],
)
def test_the_error_names_the_damaged_file_or_folder(tmp_path, ours, name, content, message):
    ours.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DamagedFileError, match=rf"{name} has (changed|been added) since .*delete .*checksums\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(DamagedFileError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_edited_tokenizer_is_accepted_on_request(tmp_path, ours):
    ours.save(tmp_path)
    (tmp_path / "special_tokens.json").write_text('["<|endoftext|>", "<new>"]')
    with pytest.raises(DamagedFileError, match="if you have edited it on purpose, delete"):
        Tokenizer.load(tmp_path)
    (tmp_path / "checksums.json").unlink()
    assert "<new>" in Tokenizer.load(tmp_path).special_token_ids


def test_a_flipped_bit_or_a_cut_is_found(tmp_path, gpt2):
    gpt2.save(tmp_path)
    merges = tmp_path / "merges.txt"
    content = merges.read_bytes()
    for damaged in (content[:2000], content[:-9], content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
        merges.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"merges\.txt has changed"):
            Tokenizer.load(tmp_path)


def test_saving_replaces_a_saved_tokenizer_and_nothing_else(tmp_path, ours, gpt2):
    ours.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Tokenizer(BYTES, [], pattern="[a-z]+|.").save(tmp_path)
    assert Tokenizer.load(tmp_path).pattern == "[a-z]+|."
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == ours.fingerprint
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for name in ("vocab.json", "merges.txt", "pattern.json", "special_tokens.json", "checksums.json"):
        folder = tmp_path / "theirs" / name
        folder.mkdir(parents=True)
        (folder / name).write_text('{"mine": 1}')
        with pytest.raises(FileExistsError, match=rf"{name}' exists and is not .* that this library wrote"):
            ours.save(folder)
        assert [path.name for path in folder.iterdir()] == [name]


def test_saving_to_a_link_to_a_folder_that_is_not_there_yet(tmp_path, ours):
    (tmp_path / "link").symlink_to("there")
    ours.save(tmp_path / "link")
    assert Tokenizer.load(tmp_path / "there").fingerprint == ours.fingerprint
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file' is a file"):
        ours.save(tmp_path / "file")


def test_a_full_disk_leaves_the_saved_tokenizer_whole(tmp_path, ours):
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    old = Tokenizer(BYTES, [], ["<x>"], pattern="cl100k")
    old.save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            ours.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert Tokenizer.load(tmp_path).fingerprint == old.fingerprint


def test_a_folder_without_a_tokenizer_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a saved tokenizer"):
        Tokenizer.load(tmp_path)
