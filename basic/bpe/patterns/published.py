"""The patterns of published tokenizers: their regular expressions, other spellings of the same, and their names."""

from __future__ import annotations

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = (
    r"'(?:[sdmt]|ll|ve|re)"  # the end of a contraction
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # letters, digits or other signs, with a space before them
    r"|\s+(?!\S)|\s+"  # white space; its last character belongs to the pre-token after it
)

# By name: regular expressions, applied one after the other.
PUBLISHED_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2,),
    "cl100k": (
        rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s",
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "llama3": (rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}{_END}",),
    "qwen2": (rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{_END}",),
    "deepseek": (  # version 3
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "starcoder": (r"\p{N}", _GPT2),
}

# Their regular expressions match every character of every text.
COVERING = ("gpt2", "cl100k", "o200k", "llama3", "qwen2")

# Other published spellings of the same splits, by name. The files of the models write them in these ways.
SPELLINGS: dict[tuple[str, ...], str] = {
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",): "gpt2",
    (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",): "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ): "cl100k",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ): "llama3",
}

# The names under which these patterns are published: those of tiktoken's encodings, and of models.
ALIASES = {
    **dict.fromkeys(("gpt-2", "r50k_base", "p50k_base", "p50k_edit", "gpt-3"), "gpt2"),
    **dict.fromkeys(("cl100k_base", "gpt-4", "gpt-3.5-turbo"), "cl100k"),
    **dict.fromkeys(("o200k_base", "o200k_harmony", "gpt-4o", "gpt-4.1", "gpt-5", "gpt-oss"), "o200k"),
    **dict.fromkeys(("llama4", "llama-4"), "o200k"),
    **dict.fromkeys(("llama-3", "llama3.1", "llama-3.1", "llama3.2", "llama-3.2", "llama3.3", "llama-3.3"), "llama3"),
    **dict.fromkeys(("qwen", "qwen-2", "qwen2.5", "qwen-2.5", "qwen3", "qwen-3"), "qwen2"),
    **dict.fromkeys(("deepseek3", "deepseek-v3", "deepseek-r1"), "deepseek"),
    **dict.fromkeys(("starcoder2", "smollm", "smollm2"), "starcoder"),
}
