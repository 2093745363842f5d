"""Small tokenizers in the formats of other programs, and texts that they split in many ways."""

from typing import Any

import tiktoken
import tokenizers
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from basic.bytes_utils import to_printable
from basic.Tokenizer import Tokenizer

END = "<|endoftext|>"
SPECIAL_TOKENS = [END, "<| a break |>", "<|ü|>\n"]
BYTES = {byte: bytes([byte]) for byte in range(256)}
OTHER = r"[\p{L}\p{N}]+|[^\p{L}\p{N}]{1,2}"
# The patterns of tiktoken's published encodings.
_END_OF_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _END_OF_WORD + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _END_OF_WORD + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    OTHER: OTHER,
}
TEXT_FILES = [
    "address.txt",
    "corpus.en",
    "german.txt",
    "japanese_novel.txt",
    "multilingual_wikipedia.txt",
    "naughty_strings.json",
    "novels_train.txt",
    "novels_valid.txt",
    "tinystories_2MiB.txt",
    "tinystories_sample.txt",
    "tinystories_shuffled_words_5M.txt",
]
TRICKY = ["'", "s", "'LL", "ſ", "é", "\u0301", "日本", "𝒳", "ǅ", "1", "²³", " ", "\n", "\r", "\t", "\x85", "/", "!"]
# Characters that all programs know, not those of the newest Unicode versions.
ANY_TEXT = st.lists(
    st.sampled_from([*TRICKY, *SPECIAL_TOKENS, "lower", "est"])
    | st.characters(max_codepoint=0x4FF, exclude_categories=["Cn", "Cs"]),
    max_size=15,
).map("".join)


def added(content: str, token_id: int, **flags: Any) -> dict[str, Any]:
    no = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **no, **flags}


def tokenizer_json(vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], *added_tokens) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {to_printable(token): i for i, token in vocab.items()},
            "merges": [[to_printable(left), to_printable(right)] for left, right in merges],
        },
    }


def tiktoken_of_file(ranks_path, special_tokens: dict[str, int], pattern: str) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(ranks_path))
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the same tokens and GPT-2's pattern; it needs ids in the order of the merges."""
    special = tokenizer.special_token_ids
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in special.values()}
    return tiktoken.Encoding("ours", pat_str=PUBLISHED["gpt2"], mergeable_ranks=ranks, special_tokens=special)


def tokenizers_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The `tokenizers` package with the same tokens and GPT-2's pattern."""
    model = tokenizers.models.BPE(
        vocab={to_printable(token): i for i, token in tokenizer.vocab.items()},
        merges=[(to_printable(left), to_printable(right)) for left, right in tokenizer.merges],
    )
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in tokenizer.special_token_ids]
    )
    return theirs
