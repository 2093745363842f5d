"""Patterns that find the pre-tokens, under the names of the vocabularies that they are published with.

Written without possessive quantifiers and `$`, so that they mean the same to the `regex` package, to Oniguruma (in the
`tokenizers` package) and to tiktoken's engine.
"""

from __future__ import annotations

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PATTERNS = {
    "gpt2": (
        r"'(?:[sdmt]|ll|ve|re)"  # the end of a contraction
        r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # a run of letters, of digits, of other signs, with a space before it
        r"|\s+(?!\S)|\s+"  # white space, which leaves its last character to the run after it
    ),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# What others write for the same.
_SPELLINGS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ): "cl100k",
}


def spelled_out(pattern: str) -> str:
    """The pattern that goes by a name, our spelling of a known pattern, and any other pattern as it is."""
    return PATTERNS.get(_SPELLINGS.get(pattern, pattern), pattern)


def name_of(pattern: str) -> str | None:
    """The name of a pattern, None where it has none."""
    return next((name for name, known in PATTERNS.items() if known == spelled_out(pattern)), None)
