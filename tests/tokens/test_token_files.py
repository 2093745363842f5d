"""Token files: round trips, and files that do not match their sidecar are refused."""

import hashlib
import json
import os
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.info import sidecar_path, token_dtype
from basic.tokens.opening import open_tokens, read_info


def write(path, ids, vocab_size=300, **options):
    with TokenFileWriter(path, vocab_size, **options) as writer:
        writer.write(ids, source_bytes=7)
    return writer.info


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.bin"


def test_the_smaller_dtype_that_fits():
    assert token_dtype(1) == token_dtype(2**16) == np.dtype("<u2")
    assert token_dtype(2**16 + 1) == token_dtype(2**32) == np.dtype("<u4")


@pytest.mark.parametrize("vocab_size", [0, -1, 2**32 + 1])
def test_a_vocabulary_size_out_of_range_is_refused(vocab_size):
    with pytest.raises(InvalidInputError, match=rf"vocab_size={vocab_size} must be from 1 to 2\*\*32"):
        token_dtype(vocab_size)


@given(
    chunks=st.lists(st.lists(st.integers(0, 69_999), max_size=20), max_size=5),
    vocab_size=st.sampled_from([70_000, 2**32]),
)
def test_round_trip_in_chunks(tmp_path_factory, chunks, vocab_size):
    path = tmp_path_factory.mktemp("round") / "tokens.bin"
    with TokenFileWriter(path, vocab_size) as writer:
        for chunk in chunks:
            writer.write(chunk)
    ids = [id for chunk in chunks for id in chunk]
    tokens = open_tokens(path, verify=True)
    assert tokens.tolist() == ids
    assert writer.info == read_info(path)
    assert writer.info.largest_id == max(ids, default=None)
    assert writer.info.count == len(ids)


@pytest.mark.parametrize(("vocab_size", "raw"), [(300, b"\x02\x00\x2b\x01"), (70_000, b"\2\0\0\0\x2b\1\0\0")])
def test_the_bytes_on_the_disk(path, vocab_size, raw):
    """Flat and little-endian, with a sidecar that people can read."""
    info = write(path, [2, 299], vocab_size, tokenizer_fingerprint="abc")
    assert path.read_bytes() == raw
    text = sidecar_path(path).read_text()
    assert text.count("\n") == 10
    content = json.loads(text)
    checksum = content.pop("checksum")
    assert checksum == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert content == {
        "dtype": info.dtype.name,
        "count": 2,
        "source_bytes": 7,
        "largest_id": 299,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": "abc",
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def test_the_map_is_one_dimensional_and_read_only(path):
    write(path, [1, 2, 3])
    tokens = open_tokens(path, dtype=np.uint16)
    assert isinstance(tokens, np.memmap)
    assert (tokens.ndim, tokens.dtype, tokens.flags.writeable) == (1, np.uint16, False)


def test_an_empty_file(path):
    assert write(path, []).largest_id is None
    tokens = open_tokens(path, verify=True)
    assert (tokens.shape, tokens.dtype, tokens.flags.writeable) == ((0,), np.uint16, False)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_ids_of_any_integer_type(path, dtype):
    write(path, np.array([0, 5, 100], dtype))
    assert open_tokens(path).tolist() == [0, 5, 100]


def test_long_arrays_are_converted_in_chunks(path):
    """Memory depends on the chunk, not on the array: 24 MB of int64 ids need less than 6 MB more."""
    ids = np.arange(3_000_000) % 300
    tracemalloc.start()
    info = write(path, ids)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 6e6
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(open_tokens(path), ids)


@pytest.mark.parametrize(
    ("ids", "named"), [([1, 300], 300), ([-1, 2], -1), ([2**70], 2**70), (np.array([2**63], np.uint64), 2**63)]
)
def test_ids_outside_the_vocabulary_are_named(path, ids, named):
    write(path, [7])
    with pytest.raises(InvalidInputError, match=rf"token id {named} is outside .* from 0 to 299"):
        write(path, ids)
    assert open_tokens(path, verify=True).tolist() == [7]
    assert len(os.listdir(path.parent)) == 2


@pytest.mark.parametrize(
    ("ids", "error"), [([1.0], TypeError), (["1"], TypeError), ([True], TypeError), ([[1]], ValueError)]
)
def test_ids_that_are_not_a_sequence_of_integers(path, ids, error):
    with pytest.raises(error, match="token ids must be"):
        write(path, ids)


def test_the_writer_is_usable_after_an_error(path):
    """Ids are checked before any of them is written, so the caller can continue after an error."""
    with TokenFileWriter(path, 300) as writer:
        writer.write([1])
        with pytest.raises(InvalidInputError, match="300"):
            writer.write([2, 300])
        writer.write([3])
    assert open_tokens(path, verify=True).tolist() == [1, 3]


def test_numpy_integers_as_sizes(path):
    with TokenFileWriter(path, np.int64(300)) as writer:
        writer.write([1], source_bytes=np.int64(4))
    assert read_info(path).source_bytes == 4


@pytest.mark.parametrize(("name", "remedy"), [("tokens.npy", r"name it \*.bin"), ("tokens.json", "tokens.bin")])
def test_misleading_file_names(tmp_path, name, remedy):
    with pytest.raises(InvalidInputError, match=remedy):
        TokenFileWriter(tmp_path / name, 300)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk(path, monkeypatch, function):
    """After a failed write, no file can be read as something that was not written."""

    def fail(*args):
        raise OSError("disk full")

    write(path, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            write(path, [3, 4])
    assert not [name for name in os.listdir(path.parent) if name.endswith(".tmp")]
    assert open_tokens(path, verify=True).tolist() == [1, 2]


def test_a_process_that_dies_between_data_and_sidecar(path, monkeypatch):
    """The number of ids is the same, so only the sidecar, which is a note now, shows that the data is new."""

    class PowerCut(BaseException):
        pass

    def die_at_the_sidecar(source, target):
        if str(target).endswith(".json") and path.read_bytes() == b"\3\0\4\0":
            raise PowerCut
        rename(source, target)

    write(path, [1, 2])
    rename = os.replace
    monkeypatch.setattr(os, "replace", die_at_the_sidecar)
    with pytest.raises(PowerCut):
        write(path, [3, 4])
    assert path.read_bytes() == b"\3\0\4\0"
    with pytest.raises(DamagedFileError, match=r"tokens.json is not the sidecar of a token file.* dtype=\.\.\."):
        open_tokens(path)
    sidecar_path(path).unlink()
    assert open_tokens(path, dtype=np.uint16).tolist() == [3, 4]


def test_without_a_sidecar_the_dtype_must_be_given(path):
    path.write_bytes(np.array([1, 70_000], "<u4").tobytes())
    with pytest.raises(FileNotFoundError, match=r"open it with dtype=\.\.\."):
        open_tokens(path)
    assert open_tokens(path, dtype="uint32").tolist() == [1, 70_000]
    with pytest.raises(InvalidInputError, match="no checksum to verify"):
        open_tokens(path, dtype="uint32", verify=True)


@pytest.mark.parametrize("dtype", [np.float32, bool, "U4"])
def test_a_dtype_that_cannot_hold_ids(path, dtype):
    write(path, [1])
    with pytest.raises(InvalidInputError, match="give an integer type"):
        open_tokens(path, dtype=dtype)


def test_a_dtype_that_contradicts_the_sidecar(path):
    write(path, [1, 2])
    with pytest.raises(InvalidInputError, match=r"dtype=uint32 was given, but .*tokens.json says uint16; omit"):
        open_tokens(path, dtype=np.uint32)


def test_data_that_is_longer_or_shorter_than_the_sidecar_says(path):
    write(path, [1, 2])
    for raw in (b"", b"\1", b"\1\0", b"\1\0\2", b"\1\0\2\0\3\0"):
        path.write_bytes(raw)
        with pytest.raises(DamagedFileError, match=rf"has {len(raw)} bytes, but .* says 2 ids of uint16, 4 bytes"):
            open_tokens(path)


def test_half_an_id_at_the_end(path):
    path.write_bytes(b"\1\0\2")
    with pytest.raises(DamagedFileError, match="has 3 bytes, which is not a multiple of 2, the size of a uint16 id"):
        open_tokens(path, dtype=np.uint16)


def test_changed_data_fails_verification(path):
    write(path, [1, 2])
    path.write_bytes(b"\1\0\3\0")
    assert open_tokens(path).tolist() == [1, 3]
    with pytest.raises(DamagedFileError, match="has changed since it was written"):
        open_tokens(path, verify=True)


SIDECAR_DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "not an object": lambda text: "[1, 2]",
    "another program's": lambda text: '{"vocab_size": 300}',
    "unknown dtype": lambda text: text.replace("uint16", "float16"),
    "dtype of another kind": lambda text: text.replace('"uint16"', "[16]"),
    "count of another kind": lambda text: text.replace('"count": 2', '"count": "2"'),
    "a truth value as count": lambda text: text.replace('"count": 2', '"count": true'),
    "vocabulary of another kind": lambda text: text.replace("300", "null"),
    "vocabulary out of range": lambda text: without_checksum(text).replace("300", "0"),
    "negative count": lambda text: without_checksum(text).replace('"count": 2', '"count": -2'),
    "deep": lambda text: "[" * 100_000,
}


def without_checksum(text: str) -> str:
    """As in a sidecar of version 0.1.0, or after a person has accepted a change."""
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"})


@pytest.mark.parametrize("damage", SIDECAR_DAMAGE.values(), ids=SIDECAR_DAMAGE.keys())
def test_a_damaged_sidecar(path, damage):
    write(path, [1, 2])
    sidecar = sidecar_path(path)
    sidecar.write_text(damage(sidecar.read_text()))
    with pytest.raises(DamagedFileError, match=r"is not the sidecar of a token file, or is damaged .* dtype=\.\.\."):
        open_tokens(path)


def test_a_flipped_bit_in_a_sidecar_is_found(path):
    """Or it changes nothing that the sidecar says."""
    info = write(path, [1, 2], tokenizer_fingerprint="abc")
    sidecar = sidecar_path(path)
    content = sidecar.read_bytes()
    num_found = 0
    for offset in range(len(content)):
        for bit in range(8):
            sidecar.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << bit]) + content[offset + 1 :])
            try:
                assert read_info(path) == info
            except DamagedFileError:
                num_found += 1
    assert num_found > 0.8 * 8 * len(content)
    sidecar.write_bytes(content.replace(b"abc", b"abd"))
    with pytest.raises(DamagedFileError, match=r"its checksum is that of other values; .* remove the line 'checksum'"):
        read_info(path)
    sidecar.write_text(without_checksum(sidecar.read_text()))
    assert read_info(path) == replace(info, tokenizer_fingerprint="abd")


def test_a_sidecar_of_random_bytes(path):
    write(path, [1, 2])
    sidecar_path(path).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFileError, match="damaged"):
        read_info(path)


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match="there is no token file"):
        open_tokens(path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
@pytest.mark.parametrize("count", [0, 5])
def test_npy_arrays(tmp_path, dtype, count):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(count, dtype=dtype))
    tokens = open_tokens(path, dtype=dtype)
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert tokens.dtype == dtype
    assert tokens.tolist() == list(range(count))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), int), r"int64 of shape \(2, 2\)"),
        (np.zeros(2), r"float64 of shape \(2,\)"),
        (np.zeros(2, bool), "bool"),
        (np.array([None]), "not a complete .npy array"),
    ],
)
def test_npy_arrays_without_token_ids(tmp_path, array, message):
    np.save(tmp_path / "tokens.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        open_tokens(tmp_path / "tokens.npy")


def test_npy_arrays_opened_with_wrong_options(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(5))
    with pytest.raises(InvalidInputError, match=r"dtype=uint16 was given, but .* says int64"):
        open_tokens(path, dtype=np.uint16)
    with pytest.raises(InvalidInputError, match="no checksum"):
        open_tokens(path, verify=True)
    raw = path.read_bytes()
    for length in (0, 4, 40, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedFileError, match=r"not a complete \.npy array"):
            open_tokens(path)


def test_the_info_cannot_be_changed(path):
    info = write(path, [1])
    assert replace(info, count=2).count == 2
    with pytest.raises(AttributeError):
        info.count = 2


@pytest.mark.skipif(sys.platform == "win32", reason="an open map keeps its file from being replaced on Windows")
def test_a_map_survives_the_replacement_of_its_file(path):
    """Writing again makes a new file; a map of the old file stays valid."""
    write(path, [1, 2])
    tokens = open_tokens(path)
    write(path, [3, 4])
    assert tokens.tolist() == [1, 2]
    assert open_tokens(path).tolist() == [3, 4]


# ---- files of other programs


def text_ids(dtype, vocab_size=50_257, count=20_000):
    """Ids as frequent as tokens of text: small ids are more frequent than large ones."""
    return (vocab_size ** np.random.default_rng(0).random(count)).astype(dtype)


WIDER_AND_NARROWER = [
    (np.uint32, np.uint16, 50_257),
    (np.uint32, np.uint16, 256),
    (np.uint32, np.uint16, 262_144),
    (np.int32, np.uint16, 50_257),
    (np.int64, np.uint16, 50_257),
    (np.int64, np.uint32, 50_257),
    (np.uint16, np.uint32, 50_257),
    (np.uint16, np.int32, 300),
    (np.uint16, np.int64, 50_257),
    (np.uint32, np.int64, 128_256),
]


@pytest.mark.parametrize(("written", "read", "vocab_size"), WIDER_AND_NARROWER)
def test_ids_that_are_read_with_another_dtype_are_refused(path, written, read, vocab_size):
    ids = text_ids(written, vocab_size)
    ids.tofile(path)
    right = np.dtype(f"u{np.dtype(written).itemsize}").name
    with pytest.raises(
        InvalidInputError, match=rf"dtype={np.dtype(read).name}, but it holds ids of {right}, .* dtype="
    ):
        open_tokens(path, dtype=read)
    np.testing.assert_array_equal(open_tokens(path, dtype=written), ids)


@pytest.mark.parametrize("vocab_size", [2, 10, 65, 256, 300, 5_000, 50_257, 65_536])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_ids_that_are_read_with_their_dtype_are_accepted(path, vocab_size, dtype):
    for ids in (text_ids(dtype, vocab_size), np.arange(20_000) % vocab_size, np.zeros(20_000), np.arange(3)):
        ids.astype(dtype).tofile(path)
        np.testing.assert_array_equal(open_tokens(path, dtype=dtype), ids.astype(dtype))


@pytest.mark.parametrize(("magic", "version", "written"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
@pytest.mark.parametrize("read", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [3, 2000])
def test_the_header_of_llm_c_is_named(path, monkeypatch, magic, version, written, read, count):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, count
    ids = text_ids(written, 50_257, count)
    path.write_bytes(header.tobytes() + ids.tobytes())
    name = np.dtype(written).name
    with pytest.raises(
        InvalidInputError, match=rf"llm.c: 1024 bytes of header, then ids of {name}; .*dtype='{name}'"
    ) as error:
        open_tokens(path, dtype=read)
    monkeypatch.chdir(path.parent)
    exec(str(error.value).split("without it: ")[1].split(", and open")[0], {"np": np})  # the remedy works
    np.testing.assert_array_equal(open_tokens("ids.bin", dtype=written), ids)
