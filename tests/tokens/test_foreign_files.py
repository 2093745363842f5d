"""A text in place of token ids, ids of another dtype, and token files behind links."""

import numpy as np
import pytest

from basic.common.errors import InvalidInputError
from basic.encoding import encode_file
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens, read_info

BYTES = Tokenizer({i: bytes([i]) for i in range(256)}, [])
TEXT = "Once upon a time there was a token file.\n" * 4


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.txt", None), ("a.txt", "uint16"), ("b.bin", "uint16"), ("b.bin", None)]
)
def test_a_text_is_never_taken_for_ids(name, dtype, tmp_path):
    """Also beside the sidecar of another file with its stem."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.bin").write_text(TEXT)
    encode_file(BYTES, tmp_path / "a.txt", tmp_path / "a.bin")
    with pytest.raises(InvalidInputError, match="is a text, not token ids"):
        open_tokens(tmp_path / name, dtype=dtype)
    assert bytes(open_tokens(tmp_path / "b.bin", dtype="uint8")) == TEXT.encode()  # its bytes, on request
    assert BYTES.decode(open_tokens(tmp_path / "a.bin")) == TEXT


@pytest.mark.parametrize("vocab_size", [20, 40, 300, 5000])
@pytest.mark.parametrize("wrong", ["uint32", "int32", "int64"])
def test_narrow_ids_are_not_opened_as_wide_ones(vocab_size, wrong, tmp_path):
    ids = np.random.default_rng(0).zipf(1.3, 4000) % vocab_size
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(InvalidInputError, match="it holds ids of uint16, as its content shows"):
        open_tokens(tmp_path / "a.bin", dtype=wrong)
    for dtype in ("uint16", "uint32", "int32", "int64"):
        ids.astype(dtype).tofile(tmp_path / "a.bin")
        assert np.array_equal(open_tokens(tmp_path / "a.bin", dtype=dtype), ids)


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_file_behind_a_link_has_its_sidecar(exists, tmp_path):
    """Both the link and the file itself can be opened."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "store").mkdir()
    if exists:
        encode_file(BYTES, tmp_path / "a.txt", tmp_path / "store" / "a.bin")
    (tmp_path / "link.bin").symlink_to("store/a.bin")
    encode_file(BYTES, tmp_path / "a.txt", tmp_path / "link.bin")
    for path in (tmp_path / "link.bin", tmp_path / "store" / "a.bin"):
        assert BYTES.decode(open_tokens(path, verify=True)) == TEXT
        assert read_info(path).count == len(TEXT)
    assert not (tmp_path / "link.json").exists()
