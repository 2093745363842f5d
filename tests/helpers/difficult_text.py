"""Texts that try what tokenizers may get wrong, and files of them."""

import random
from pathlib import Path

END = "<|endoftext|>"
OVERLAPPING = [END, "<|end", "|>", " the", "é\u3000"]

# Each class of the pattern and its special cases: letters, digits, contractions, all kinds of white space, control
# characters that are white space for str.isspace only, marks, emoji, the code points next to the surrogates.
DIFFICULT = [
    *(
        "a",
        "Z",
        "é",
        "ß",
        "漢",
        "한",
        "ع",
        "\U00010400",
        "1",
        "٣",
        "²",
        "Ⅷ",
        "'",
        "'s",
        "'t",
        "'ll",
        "'ve",
        "'re",
        "'S",
    ),
    *("l", "v", "r", "e", "s"),
    *(" ", " ", "  ", "\n", "\t", "\r\n", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u1680", "\u2003"),
    *("\u2028", "\u2029", "\u202f", "\u3000", "\u200b", "\u180e", "\u0301", "\u0903", "😀", "👩\u200d💻"),
    *(".", "!", "¿", "—", "_", "\x00", "\x7f", "\ud7ff", "\ue000", "\ufffd", "\uffff", "\U00010000", "\U0010ffff"),
]


def difficult_text(rng: random.Random, max_length: int) -> str:
    # Also long runs of one character: the hash table stores pre-tokens of more than 15 bytes differently.
    return "".join(rng.choice(DIFFICULT) * rng.choice((1, 1, 1, 2, 9)) for _ in range(rng.randint(0, max_length)))


def write(folder: Path, text: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path
