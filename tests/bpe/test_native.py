"""Kernels as machine code: compiled once, loaded by two linkers, called with strings and lists."""

from __future__ import annotations

import gc
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from basic.bpe import loading
from basic.common.errors import InvalidInputError
from basic.common.native import object_files
from basic.common.native.kernel import Kernel
from basic.Tokenizer import Tokenizer
from tests.helpers.tokenizer_tools import BYTES

REPOSITORY = Path(__file__).resolve().parents[2]


def weighted_sum(table, numbers, factor):
    total = 0
    for i in range(len(numbers)):
        for j in range(table.shape[1]):
            total += table[i, j] * numbers[i] * factor
    return total


@pytest.mark.parametrize("linker", ["ours", "llvm"])
def test_both_linkers_load_a_kernel(monkeypatch, linker):
    monkeypatch.setattr(object_files, "cache_folder", lambda: None)
    if linker == "llvm":

        def refuse(data):
            raise object_files.UnsupportedObjectError

        monkeypatch.setattr(object_files, "_link", refuse)
    table, numbers = np.arange(12, dtype=np.int32).reshape(3, 4), np.array([1, 10, 100])
    expected = weighted_sum(table, numbers, 3)
    kernel = Kernel(weighted_sum, {})
    assert kernel(table, numbers, 3) == expected
    assert kernel(table.astype(np.uint8), numbers, 3) == expected, "another type is another kernel"


def test_other_formats_are_left_to_llvm():
    for data in (b"MZ" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)):
        with pytest.raises(object_files.UnsupportedObjectError):
            object_files._link(data)


def test_a_damaged_object_file_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(object_files, "cache_folder", lambda: tmp_path)
    object_files.write_object("one.o", b"machine code")
    assert object_files.read_object("one.o") == b"machine code"
    (tmp_path / "one.o").write_bytes((tmp_path / "one.o").read_bytes()[:-1])
    assert object_files.read_object("one.o") is None
    assert object_files.read_object("two.o") is None


def test_machine_code_of_changed_sources_is_neither_used_nor_kept(monkeypatch, tmp_path):
    """A process that runs while the package is updated has the old modules in memory."""
    monkeypatch.setattr(object_files, "cache_folder", lambda: tmp_path)
    object_files.write_object("one.o", b"machine code")
    changed = {path: time_ns + 1 for path, time_ns in object_files._sources().items()}
    monkeypatch.setattr(object_files, "_sources", lambda: changed)
    object_files.write_object("two.o", b"machine code")
    assert object_files.read_object("one.o") is None
    assert [path.name for path in tmp_path.iterdir()] == ["one.o"]


def test_machine_code_depends_on_every_module_with_kernels():
    decorated = re.compile(r"^@(kernel|inlined\w*|instruction)$", re.MULTILINE)
    modules = [path for path in (REPOSITORY / "basic").rglob("*.py") if decorated.search(path.read_text("utf-8"))]
    assert len(modules) > 10
    assert set(modules) <= object_files._sources().keys()


def test_code_that_a_garbage_collection_runs_changes_no_ids():
    """To make the list of ids can collect garbage, whose finalizers may encode, or let other threads run."""
    tokenizer = Tokenizer(BYTES, [], kernels=True)
    assert tokenizer.kernel_encoder(1 << 20) is not None
    calls, kept = [], []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            calls.append(tokenizer.encode("0123456789"))

    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for number in range(2000):  # the lists are kept, so that memory for each is allocated anew
            if number % 100 == 0:
                Garbage()
            kept.append(tokenizer.encode("abcdefghij"))
    finally:
        gc.set_threshold(*threshold)
    assert all(ids == list(b"abcdefghij") for ids in kept)
    assert calls == len(calls) * [list(b"0123456789")]
    assert len(calls) > 10


def test_a_string_without_tokens_leaves_nothing_in_the_table():
    tokenizer = Tokenizer({i: bytes([i]) for i in b"abc de"}, [], kernels=True)
    encoder = tokenizer.kernel_encoder(1 << 20)
    assert encoder is not None
    encode = encoder.strings.encode
    assert encode("abc") == list(b"abc")
    assert not isinstance(encode("abcde x"), list)
    assert encode("abcde") == list(b"abcde")


def test_strings_until_the_table_is_replaced():
    fast, slow = (
        Tokenizer(BYTES | {256: b"ab", 257: b"abc"}, [(b"a", b"b"), (b"ab", b"c")], ["<end>"], kernels=kernels)
        for kernels in (True, False)
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc é漢<end>", k=rng.randint(0, 60))) + str(number) for number in range(6000)]
    for text in [*texts, "abc" * 5000, "\ud800 abc", "a" * 300, "<end>abc<end>", ""]:
        assert fast.encode(text) == slow.encode(text)
    with pytest.raises(TypeError, match="text must be a string, got int"):
        fast.encode(7)  # ty: ignore[invalid-argument-type]


def test_lists_of_what_is_not_quite_an_id():
    fast, slow = (
        Tokenizer({i + i // 100: bytes([i]) for i in range(256)}, [], kernels=kernels) for kernels in (True, False)
    )
    ids = [*range(100), *range(101, 201)]
    for length in (0, 1, 7, 8, 9, 200):
        assert fast.decode_bytes(ids[:length]) == slow.decode_bytes(ids[:length])
    assert fast.decode_bytes([np.int64(65), 66]) == b"AB"  # ty: ignore[invalid-argument-type]
    for wrong in (-1, 100, 258, 1 << 40, 1 << 70):
        with pytest.raises(InvalidInputError, match=f"id {wrong} at position 1 is not in the vocabulary"):
            fast.decode([65, wrong, 66])
    for other in (1.0, "a", None):
        with pytest.raises(TypeError):
            fast.decode([65, other])  # ty: ignore[invalid-argument-type]


def test_compiled_kernels_need_no_compiler(tmp_path):
    """Also kernels with other argument types than at compile time would need it."""
    for task in ("training", "encoding"):
        loading.load_kernels(task)
    code = """if True:
        import sys
        import numpy as np
        from basic.Tokenizer import Tokenizer
        from basic.train_bpe import train_bpe
        path, END = sys.argv[1], "<|endoftext|>"
        vocab, merges = train_bpe(path, 400, [END], kernels=True)
        text = open(path, newline="").read()
        for tokenizer in (Tokenizer(vocab, merges, [END]), Tokenizer(vocab, merges, pattern="o200k")):
            ids = tokenizer.encode(text)
            assert tokenizer.encode_array(text.encode(), num_threads=2).tolist() == ids
            assert list(tokenizer.encode_iterable([text[:100], text[100:]])) == ids
            assert tokenizer.encode(text[:500]) == list(tokenizer.encode_iterable(text[:500]))
            assert tokenizer.decode(20 * ids) == tokenizer.decode(np.array(20 * ids)) == 20 * text
            assert tokenizer._kernel_encoder is not None
        wide = Tokenizer({70_000 + i: token for i, token in vocab.items()}, merges)
        assert wide.decode(wide.encode(text[:3000])) == text[:3000]
        assert not {"numba", "llvmlite"} & sys.modules.keys()
    """
    sample = REPOSITORY / "tests" / "fixtures" / "tokenizer_sample.txt"
    path = tmp_path / "text.txt"
    path.write_bytes(sample.read_bytes()[:60_000])
    result = subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
