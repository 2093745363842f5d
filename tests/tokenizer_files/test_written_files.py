"""Saving in the format of another program replaces a file of this format, and no other."""

import pytest

from basic.formats.tokenizers import save_tiktoken, save_tokenizer_json
from basic.Tokenizer import Tokenizer
from tests.helpers.tokenizer_tools import BYTES

TOKENIZER = Tokenizer(BYTES, [], ["<|endoftext|>"])


@pytest.mark.parametrize(
    ("save", "name"), [(save_tiktoken, "a rank file"), (save_tokenizer_json, r"a tokenizer\.json")]
)
def test_only_a_file_of_the_same_format_is_replaced(save, name, tmp_path):
    save(TOKENIZER, tmp_path / "a")
    first = (tmp_path / "a").read_bytes()
    save(TOKENIZER, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == first
    for content in (b"my notes", b'{"model": 1}', b""):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(FileExistsError, match=f"b' exists and is not {name} that this library wrote"):
            save(TOKENIZER, tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == content
