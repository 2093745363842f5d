"""The normalizer and the pre-tokenizers of tokenizer.json, to and from a normal form and a `Pattern`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import regex

from basic.common.errors import InvalidInputError
from basic.pretokenization import GPT2_PATTERN, Pattern

# Syntax with another meaning in Oniguruma, the engine of the `tokenizers` package, than in the `regex` package:
# possessive counts, anchors of lines, some letters after a backslash, and the flag m; in a class, intersections and
# classes. The groups find what is skipped: other escapes, and the beginning of a class, whose first ] is a character.
_OUTSIDE = re.compile(r"(\\[^hHRXGKQ])|(\[\^?\]?)|\{[\d,]+\}\+|\$|\^|\\.|\(\?[a-z]*m")
_INSIDE = re.compile(r"(\\[^hHRXGKQ])|(\])|&&|\[|\\.")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_KINDS = "ByteLevel at the end, after any number of Split and Digits,"
_DIGITS = {r"\p{N}": True, r"\p{N}+": False}
_EVERYTHING = r"[\s\S]+"


def require(field: str, value: object, allowed: object) -> None:
    """Raise InvalidInputError unless a value is the allowed one."""
    if value != allowed:
        shown = value.get("type", value) if isinstance(value, Mapping) else value
        raise InvalidInputError(
            f"{field} is {json.dumps(shown):.200}, which is not supported; only {json.dumps(allowed)} is"
        )


def check_syntax(pattern: str, name: str) -> None:
    """Check that a regular expression means the same for the `regex` package and for the `tokenizers` package.

    Raises:
        InvalidInputError: it has syntax with two meanings; the message shows it.
    """
    position, in_class = 0, False
    while match := (_INSIDE if in_class else _OUTSIDE).search(pattern, position):
        position = match.end()
        if match.group(2) is not None:
            in_class = not in_class
        elif match.group(1) is None:
            raise InvalidInputError(
                f"{name} has {match.group()!r} in {pattern!r}, which the regex package and the tokenizers package "
                "interpret differently; write the pattern without it"
            )


def _flat(value: Mapping[str, Any] | None, children: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a value, with those of each Sequence in its place."""
    if value is None:
        return
    if value["type"] == "Sequence":
        for inner in value[children]:
            yield from _flat(inner, children)
    else:
        yield value


def parse_normalizer(value: Mapping[str, Any] | None) -> str | None:
    """The normal form of a normalizer: "NFC" or None; a Sequence of nothing is nothing.

    Raises:
        InvalidInputError: another kind of normalizer.
    """
    kinds = [step["type"] for step in _flat(value, "normalizers")]
    for kind in kinds:
        require("normalizer", kind, "NFC")
    return "NFC" if kinds else None


def parse_pre_tokenizer(value: Mapping[str, Any] | None) -> Pattern:
    """The pattern that is equivalent to the pre-tokenizers.

    Raises:
        InvalidInputError: they are not supported.
    """
    steps = list(_flat(value, "pretokenizers"))
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or not {*kinds[:-1]} <= {"Split", "Digits"}:
        raise InvalidInputError(f"pre_tokenizer is {kinds}, which is not supported; only {_KINDS} is")
    splits = [_parse_split(step) for step in steps[:-1]]
    require("pre_tokenizer.add_prefix_space", steps[-1]["add_prefix_space"], False)
    if steps[-1].get("use_regex", True):
        splits += GPT2_PATTERN.splits
    return Pattern(*splits or [_EVERYTHING])


def _parse_split(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits", False) else r"\p{N}+"
    ((kind, split),) = step["pattern"].items()
    if kind == "String":
        split = regex.escape(split)
    else:
        check_syntax(split, "pre_tokenizer.pattern")
    behavior = (step["behavior"], step["invert"])
    # To remove text that does not match has no effect with a pattern that matches all text.
    if behavior[0] != "Isolated" and not (behavior == ("Removed", True) and Pattern(split).covers_all_text):
        raise InvalidInputError(
            f"pre_tokenizer.behavior is {behavior[0]!r} with invert = {json.dumps(behavior[1])}, which is not "
            "supported; only 'Isolated' is"
        )
    return split


def pre_tokenizer_json(pattern: Pattern) -> dict[str, Any]:
    """The pre-tokenizers that are equivalent to a pattern.

    Raises:
        InvalidInputError: the `tokenizers` package would interpret it differently.
    """
    splits = pattern.splits
    use_regex = splits[-1:] == GPT2_PATTERN.splits
    steps: list[dict[str, Any]] = []
    for split in splits[:-1] if use_regex else splits:
        if split in _DIGITS and len(splits) > 1:
            steps.append({"type": "Digits", "individual_digits": _DIGITS[split]})
            continue
        check_syntax(split, "the tokenizer's pattern")
        steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    byte_level = {**BYTE_LEVEL, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level
