"""Tokenizers as `tokenizer.json`, the file of the `tokenizers` package: byte-level BPE, written and read.

What is read gives the ids that the package gives, and what is written gives the package our ids; what cannot be said
on the other side is an error that names it. One difference stays: each program has the Unicode tables of its year, and
characters that are letters only in the newer ones are cut differently.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import regex

from basic.bytes_utils import from_printable, to_printable
from basic.common.files import atomic_write, load_json
from basic.formats.equivalent_merges import check_bytes, used_merges
from basic.pretokenization import pattern_name
from basic.Tokenizer import Tokenizer

# What the `regex` package and Oniguruma read differently: possessive counts, anchors of lines, intersections of
# classes, some letters behind a backslash, and the flag m.
_READ_DIFFERENTLY = re.compile(r"\{[\d,]+\}\+|(?<!\\)\$|(?<![\[\\])\^|&&|\\[hHRXGKQ]|\(\?[a-z]*m")

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer as `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads.

    The `tokenizers` package then gives our ids, special tokens included. (Its decoder takes a special token made of
    Latin-1 letters, such as "<é>", for the printable form of bytes; ids are not concerned.)

    Raises:
        ValueError: the file could not say what the tokenizer does; the message names the token, merge or pattern.
    """
    check_bytes(tokenizer.vocab.values(), "the vocabulary")
    used_merges(tokenizer.merges)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, i) for token, i in tokenizer.special_token_ids.items()],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.pattern),
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _vocab_entries(tokenizer),
            "merges": [[to_printable(left), to_printable(right)] for left, right in dict.fromkeys(tokenizer.merges)],
        },
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")


def _added_token(token: str, token_id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": token, **flags}


def _pre_tokenizer(pattern: str | None) -> dict[str, Any]:
    if pattern is None:
        return {**_BYTE_LEVEL, "use_regex": True}
    _check_engines_agree(pattern, "the tokenizer's pattern")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


def _check_engines_agree(pattern: str, what: str) -> None:
    if (found := _READ_DIFFERENTLY.search(pattern)) is not None:
        raise ValueError(
            f"{what} has {found.group()!r} in {pattern!r}, which the regex package and the tokenizers package read "
            "differently; write it without"
        )


def _vocab_entries(tokenizer: Tokenizer) -> dict[str, int]:
    """Token to id: the package looks for special tokens as plain text, for those of merges in printable form."""
    special = {token_id: token for token, token_id in tokenizer.special_token_ids.items()}
    merged = {part for left, right in tokenizer.merges for part in (left, right, left + right)}
    entries: dict[str, int] = {}
    for token_id, token in sorted(tokenizer.vocab.items()):
        names = [] if token_id not in special else [special[token_id]]
        if token_id not in special or len(token) == 1 or token in merged:
            names.append(to_printable(token))
        for name in names:
            if entries.setdefault(name, token_id) != token_id:
                raise ValueError(
                    f"the ids {entries[name]} and {token_id} would both be written as {name!r} in tokenizer.json; "
                    "give each token other bytes"
                )
    return entries


def load_tokenizer_json(path: str | os.PathLike) -> Tokenizer:
    """Read a `tokenizer.json` that holds byte-level BPE.

    Added tokens become special tokens, in the order of the file, whether they are marked as special or not.

    Raises:
        ValueError: the file is damaged, or asks for what `Tokenizer` does not do; the message names the field.
        OSError: the file cannot be read.
    """
    content = load_json(path)
    try:
        return _tokenizer_of(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a whole tokenizer.json ({type(error).__name__}: {error}); write it again with "
            "save of the tokenizers package"
        ) from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def _tokenizer_of(content: dict[str, Any]) -> Tokenizer:
    for name in ("normalizer", "truncation", "padding"):
        _only(name, content.get(name), None)
    _check_post_processor(content.get("post_processor"), "post_processor")
    _only("decoder.type", (content["decoder"] or {}).get("type"), "ByteLevel")
    pattern = _pattern_of(content["pre_tokenizer"])
    model = content["model"]
    _only("model.type", model.get("type", "BPE"), "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _only(f"model.{name}", model.get(name) or None, None)
    # Without effect where every byte has its token, which is checked below: unk_token, fuse_unk, byte_fallback.
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    _check_added_tokens(content["added_tokens"], model["vocab"])
    vocab = _vocab_of(model["vocab"], added)
    merges = _merges_of(model["merges"])
    check_bytes(vocab.values(), "model.vocab")
    tokenizer = Tokenizer(vocab, merges, added, pattern=pattern)
    made = {left + right for left, right in used_merges(merges)}
    if model.get("ignore_merges"):
        special = set(added.values())
        never = [token for i, token in vocab.items() if i not in special and len(token) > 1 and token not in made]
        if (whole := next(filter(_is_text, never), None)) is not None:
            raise ValueError(
                f"model.ignore_merges is true and matters: a pre-token {whole!r} would become that token, which no "
                "merges make"
            )
    return tokenizer


def _only(field: str, value: object, allowed: object) -> None:
    if value != allowed:
        shown = value.get("type", value) if isinstance(value, dict) else value
        raise ValueError(f"{field} is {json.dumps(shown):.200}, which is not supported, only {json.dumps(allowed)} is")


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def _check_post_processor(processor: dict[str, Any] | None, field: str) -> None:
    """Allow what adds no tokens to a text."""
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":  # which changes offsets only
        return
    if kind == "Sequence":
        for i, part in enumerate(processor["processors"]):
            _check_post_processor(part, f"{field}.processors[{i}]")
    elif kind == "TemplateProcessing":
        for i, piece in enumerate(processor["single"]):
            if "SpecialToken" in piece:
                token = piece["SpecialToken"]["id"]
                raise ValueError(f"{field}.single[{i}] adds {token!r} to every text, which is not supported")
    else:
        raise ValueError(f"{field}.type is {kind!r}, which may add tokens to every text and is not supported")


def _pattern_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that cuts as these pre-tokenizers do, None for GPT-2's."""
    steps: list[Any] = [pre_tokenizer]
    while len(steps) == 1 and steps[0] is not None and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step and step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(
            f"pre_tokenizer is {kinds}, which is not supported; only ByteLevel, alone or behind a Split, is"
        )
    _only("pre_tokenizer.add_prefix_space", steps[-1]["add_prefix_space"], False)
    _only("pre_tokenizer.use_regex", steps[-1].get("use_regex", True), len(steps) == 1)
    if len(steps) == 1:
        return None
    split = steps[0]
    ((kind, pattern),) = split["pattern"].items()
    if kind == "String":
        pattern = regex.escape(pattern)
    else:
        _check_engines_agree(pattern, "pre_tokenizer.pattern")
    behavior = (split["behavior"], split["invert"])
    # To remove what is not found is nothing, where the pattern is known to find all.
    if behavior[0] != "Isolated" and not (behavior == ("Removed", True) and pattern_name(pattern) is not None):
        raise ValueError(
            f"pre_tokenizer.behavior is {behavior[0]!r} with invert = {json.dumps(behavior[1])}, which is not "
            "supported, only 'Isolated' is"
        )
    return pattern


def _check_added_tokens(tokens: list[dict[str, Any]], entries: dict[str, int]) -> None:
    """Raise ValueError for what an added token can do and a special token cannot."""
    ids: list[int] = []
    for token in tokens:
        field = f"added_tokens[{token['content']!r}]"
        for flag in ("single_word", "lstrip", "rstrip"):
            _only(f"{field}.{flag}", token[flag], False)
        # The package takes the id from the vocabulary or counts on, whatever the file says.
        expected = entries.get(token["content"], max([len(entries), *(i + 1 for i in ids)]))
        if token["id"] != expected:
            raise ValueError(f"{field}.id is {token['id']}, but the tokenizers package would give it {expected}")
        ids.append(expected)
    # Those with normalized = false are found first, even where another begins to the left of them.
    for token in tokens:
        for other in tokens:
            left, right = token["content"], other["content"]
            if token["normalized"] and not other["normalized"] and _overlap(left, right):
                raise ValueError(f"added_tokens {left!r} and {right!r} overlap and differ in 'normalized'")


def _overlap(one: str, other: str) -> bool:
    """Whether both can be found in a text so that they share a character."""
    if one in other or other in one:
        return True
    lengths = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in lengths)


def _vocab_of(entries: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
    vocab: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for name, token_id in [*entries.items(), *added.items()]:
        try:
            token = name.encode() if name in added else from_printable(name)
        except KeyError:  # never made by merges, only decoded
            token = name.encode()
        if vocab.setdefault(token_id, token) != token or ids.setdefault(token, token_id) != token_id:
            raise ValueError(
                f"model.vocab and added_tokens have {name!r} as {token_id}, where {vocab[token_id]!r} is "
                f"{ids[vocab[token_id]]}; bytes and ids must belong together one to one"
            )
    return vocab


def _merges_of(lines: list[Any]) -> list[tuple[bytes, bytes]]:
    merges: dict[tuple[bytes, bytes], None] = {}
    for i, line in enumerate(lines):
        if isinstance(line, str) and line.startswith("#version"):
            continue
        parts = line.split(" ") if isinstance(line, str) else line
        try:
            left, right = map(from_printable, parts)
        except (KeyError, ValueError):
            raise ValueError(f"model.merges[{i}] is {line!r}, but must be two tokens in printable form") from None
        if (left, right) in merges:
            raise ValueError(f"model.merges[{i}], {line!r}, is given twice")
        merges[left, right] = None
    return list(merges)
