"""Published rank files: which pattern and which special tokens belong to them. The files themselves have neither."""

from __future__ import annotations

from dataclasses import dataclass

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PublishedRanks:
    """What belongs to a published rank file.

    Attributes:
        sha256: of the file.
        pattern: its name in `basic.pretokenization.PATTERNS`.
        special_tokens: with their ids.
    """

    sha256: str
    pattern: str
    special_tokens: dict[str, int]


def _llama3() -> dict[str, int]:
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        5: "step_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
        11: "image",
    }
    reserved = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    return {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}


# Sources: tiktoken's openai_public.py; llama_models/llama3/tokenizer.py of Llama 3.1 and later; Qwen2's tokenizer.
PUBLISHED_RANKS = {
    "r50k_base": PublishedRanks(
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", "gpt2", {_END_OF_TEXT: 50_256}
    ),
    "p50k_base": PublishedRanks(
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", "gpt2", {_END_OF_TEXT: 50_256}
    ),
    "cl100k_base": PublishedRanks(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "cl100k",
        {
            _END_OF_TEXT: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": PublishedRanks(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k",
        {_END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018},
    ),
    "Llama 3": PublishedRanks("82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", "llama3", _llama3()),
    "Qwen 2": PublishedRanks(
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        "qwen2",
        {_END_OF_TEXT: 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
    ),
}


def find_published(sha256: str, vocab: dict[int, bytes]) -> tuple[str, dict[str, int]] | None:
    """The pattern and the special tokens that belong to a rank file; None if it is not known.

    A file is known if it is a published one, or if it has special tokens of only one of them, at their published ids.

    Args:
        sha256: of the file.
        vocab: id to token, of all lines.
    """
    for published in PUBLISHED_RANKS.values():
        if published.sha256 == sha256:
            return published.pattern, published.special_tokens
    found: dict[str, dict[str, int]] = {}
    for published in PUBLISHED_RANKS.values():
        for token, token_id in published.special_tokens.items():
            if vocab.get(token_id) == token.encode():
                found.setdefault(published.pattern, {})[token] = token_id
    return next(iter(found.items())) if len(found) == 1 else None
