"""The rules and the words of the embedded corpus, read from `stories.toml`; `grammar.py` samples from them."""

from __future__ import annotations

import tomllib
from pathlib import Path

Word = dict[str, str]


def _list(text: str | list[str]) -> list[str]:
    """Split a text with commas, which may have several lines; a list is returned as it is."""
    return [" ".join(item.split()) for item in text.split(",")] if isinstance(text, str) else text


def _words(text: str, **forms: str) -> list[Word]:
    """Make words with their indefinite article (form `a`) and the forms that all of them share."""
    return [{"": word, "a": f"{'an' if word[0] in 'aeiou' else 'a'} {word}", **forms} for word in _list(text)]


_DATA = tomllib.loads(Path(__file__).with_name("stories.toml").read_text(encoding="utf-8"))
WORDS: dict[str, list[Word]] = {
    name: _words(words) if isinstance(words, str) else [word for each in words for word in _words(**each)]
    for name, words in _DATA["words"].items()
}
WORDS["anyone"] = WORDS["girl"] + WORDS["boy"]
DRAWN_FROM: dict[str, str] = _DATA["drawn_from"]
RULES: dict[str, list[str]] = {name: _list(alternatives) for name, alternatives in _DATA["rules"].items()}
