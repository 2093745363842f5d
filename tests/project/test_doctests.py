"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load

from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from tests.helpers.tokenizer_tools import BYTES
from tests.project.test_architecture import TREE

MODULES = [module for module, path in TREE.modules.items() if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/my").mkdir(parents=True)
    end = "<|endoftext|>"
    vocab = {256: end.encode(), **BYTES}
    # What examples use beside the names of their module.
    names = {"tokenizer": Tokenizer(vocab, [], [end]), "tiktoken": tiktoken, "open_tokens": open_tokens}
    names["write_into"] = lambda folder: None
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
