"""Read and write tokenizers as `tokenizer.json`, the file of the `tokenizers` package: byte-level BPE.

A tokenizer that is read or written gives the same ids in both programs. What only one of them can do is an error that
names it. One difference remains: the programs have different versions of the Unicode tables, so a character that is a
letter only in the newer version can be split differently.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import regex

from basic.bytes_utils import from_printable, to_printable
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import atomic_write, load_json
from basic.formats.equivalent_merges import check_all_bytes, used_merges
from basic.pretokenization import GPT2_PATTERN, Pattern, covers_all_text, is_regular_expression
from basic.Tokenizer import Tokenizer

# Syntax with another meaning in Oniguruma, the engine of the `tokenizers` package, than in the `regex` package:
# possessive counts, anchors of lines, intersections of classes, some letters after a backslash, and the flag m.
_DIFFERENT_SYNTAX = re.compile(r"\{[\d,]+\}\+|(?<!\\)\$|(?<![\[\\])\^|&&|\\[hHRXGKQ]|\(\?[a-z]*m")

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer as `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads.

    The `tokenizers` package then gives the same ids, also for special tokens. (Its decoder takes a special token of
    Latin-1 letters, such as "<é>", for the printable form of bytes; this does not change ids.)

    Raises:
        InvalidInputError: the file format cannot express the tokenizer; the message has the token, merge or pattern.
        OSError: the file cannot be written.
    """
    check_all_bytes(tokenizer.vocab.values(), "the vocabulary")
    used_merges(tokenizer.merges)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, i) for token, i in tokenizer.special_token_ids.items()],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.compiled_pattern),
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


def _pre_tokenizer(pattern: Pattern) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:
        return {**_BYTE_LEVEL, "use_regex": True}
    steps: list[dict[str, Any]] = []
    for split in pattern.splits:
        _check_syntax(split, "the tokenizer's pattern")
        steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, {**_BYTE_LEVEL, "use_regex": False}]}


def _check_syntax(pattern: str, name: str) -> None:
    if (match := _DIFFERENT_SYNTAX.search(pattern)) is not None:
        raise InvalidInputError(
            f"{name} has {match.group()!r} in {pattern!r}, which the regex package and the tokenizers package "
            "interpret differently; write the pattern without it"
        )


def _vocab_entries(tokenizer: Tokenizer) -> dict[str, int]:
    """Token to id. The package looks up special tokens as plain text, and the tokens of merges in printable form."""
    special = {token_id: token for token, token_id in tokenizer.special_token_ids.items()}
    in_merges = {token for left, right in tokenizer.merges for token in (left, right, left + right)}
    entries: dict[str, int] = {}
    for token_id, token in sorted(tokenizer.vocab.items()):
        names = [] if token_id not in special else [special[token_id]]
        if token_id not in special or len(token) == 1 or token in in_merges:
            names.append(to_printable(token))
        for name in names:
            if entries.setdefault(name, token_id) != token_id:
                raise InvalidInputError(
                    f"the ids {entries[name]} and {token_id} would both be written as {name!r} in tokenizer.json; "
                    "give each token other bytes"
                )
    return entries


def load_tokenizer_json(path: str | os.PathLike) -> Tokenizer:
    """Read a `tokenizer.json` with byte-level BPE.

    Added tokens become special tokens, in the order of the file, whether they are marked as special or not.

    Raises:
        DamagedFileError: the file is not JSON, or a field is missing or has the wrong type.
        InvalidInputError: `Tokenizer` does not support a value; the message has the field.
        OSError: the file cannot be read.
    """
    content = load_json(path)
    try:
        return _parse_tokenizer(content)
    except InvalidInputError as error:
        raise InvalidInputError(f"{os.fspath(path)!r}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(
            f"{os.fspath(path)!r} is not a complete tokenizer.json ({type(error).__name__}: {error}); write it again "
            "with the tokenizers package"
        ) from error


def _parse_tokenizer(content: dict[str, Any]) -> Tokenizer:
    for name in ("normalizer", "truncation", "padding"):
        _require(name, content.get(name), None)
    _check_post_processor(content.get("post_processor"), "post_processor")
    _require("decoder.type", (content["decoder"] or {}).get("type"), "ByteLevel")
    pattern = _parse_pattern(content["pre_tokenizer"])
    model = content["model"]
    _require("model.type", model.get("type", "BPE"), "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(f"model.{name}", model.get(name) or None, None)
    # unk_token, fuse_unk and byte_fallback have no effect if every byte has a token, which is checked below.
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    _check_added_tokens(content["added_tokens"], model["vocab"])
    vocab = _parse_vocab(model["vocab"], added)
    merges = _parse_merges(model["merges"])
    check_all_bytes(vocab.values(), "model.vocab")
    tokenizer = Tokenizer(vocab, merges, added, pattern=pattern)
    merged = {left + right for left, right in used_merges(merges)}
    if model.get("ignore_merges"):
        special = set(added.values())
        unmerged = [token for i, token in vocab.items() if i not in special and len(token) > 1 and token not in merged]
        if (token := next(filter(_is_text, unmerged), None)) is not None:
            raise InvalidInputError(
                f"model.ignore_merges is true, which is not supported for the token {token!r}: a pre-token with these "
                "bytes would become this token, but no merges produce it"
            )
    return tokenizer


def _require(field: str, value: object, allowed: object) -> None:
    if value != allowed:
        shown = value.get("type", value) if isinstance(value, dict) else value
        raise InvalidInputError(
            f"{field} is {json.dumps(shown):.200}, which is not supported; only {json.dumps(allowed)} is"
        )


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def _check_post_processor(processor: dict[str, Any] | None, field: str) -> None:
    """Check that a post-processor adds no tokens to a text."""
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":  # it changes offsets only
        return
    if kind == "Sequence":
        for i, inner in enumerate(processor["processors"]):
            _check_post_processor(inner, f"{field}.processors[{i}]")
    elif kind == "TemplateProcessing":
        for i, item in enumerate(processor["single"]):
            if "SpecialToken" in item:
                token = item["SpecialToken"]["id"]
                raise InvalidInputError(f"{field}.single[{i}] adds {token!r} to every text, which is not supported")
    else:
        raise InvalidInputError(f"{field}.type is {kind!r}, which may add tokens to every text and is not supported")


def _parse_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that is equivalent to the pre-tokenizers, None for GPT-2's."""
    steps: list[Any] = [pre_tokenizer]
    while len(steps) == 1 and steps[0] is not None and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step and step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise InvalidInputError(
            f"pre_tokenizer is {kinds}, which is not supported; only ByteLevel, alone or after a Split, is"
        )
    _require("pre_tokenizer.add_prefix_space", steps[-1]["add_prefix_space"], False)
    _require("pre_tokenizer.use_regex", steps[-1].get("use_regex", True), len(steps) == 1)
    if len(steps) == 1:
        return None
    split = steps[0]
    ((kind, pattern),) = split["pattern"].items()
    if kind == "String":
        pattern = regex.escape(pattern)
    else:
        _check_syntax(pattern, "pre_tokenizer.pattern")
    if not is_regular_expression(pattern):  # such as "ab", which would be taken for a name
        pattern = f"(?:{pattern})"
    behavior = (split["behavior"], split["invert"])
    # To remove text that does not match has no effect with a pattern that matches all text.
    if behavior[0] != "Isolated" and not (behavior == ("Removed", True) and covers_all_text(Pattern(pattern))):
        raise InvalidInputError(
            f"pre_tokenizer.behavior is {behavior[0]!r} with invert = {json.dumps(behavior[1])}, which is not "
            "supported; only 'Isolated' is"
        )
    return pattern


def _check_added_tokens(tokens: list[dict[str, Any]], entries: dict[str, int]) -> None:
    """Check that added tokens have no options that special tokens of `Tokenizer` do not have."""
    ids: list[int] = []
    for token in tokens:
        field = f"added_tokens[{token['content']!r}]"
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(f"{field}.{flag}", token[flag], False)
        # The package uses the id of the vocabulary or the next free one, and ignores the id in the file.
        expected = entries.get(token["content"], max([len(entries), *(i + 1 for i in ids)]))
        if token["id"] != expected:
            raise InvalidInputError(f"{field}.id is {token['id']}, but the tokenizers package would give it {expected}")
        ids.append(expected)
    # The package finds tokens with normalized = false first, also if another token starts to the left of them.
    for token in tokens:
        for other in tokens:
            left, right = token["content"], other["content"]
            if token["normalized"] and not other["normalized"] and _overlap(left, right):
                raise InvalidInputError(f"added_tokens {left!r} and {right!r} overlap and differ in 'normalized'")


def _overlap(one: str, other: str) -> bool:
    """Whether occurrences of both in a text can share a character."""
    if one in other or other in one:
        return True
    lengths = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in lengths)


def _parse_vocab(entries: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
    vocab: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for name, token_id in [*entries.items(), *added.items()]:
        try:
            token = name.encode() if name in added else from_printable(name)
        except KeyError:  # no merge produces it; it is only decoded
            token = name.encode()
        if vocab.setdefault(token_id, token) != token or ids.setdefault(token, token_id) != token_id:
            raise InvalidInputError(
                f"model.vocab and added_tokens have {name!r} as {token_id}, where {vocab[token_id]!r} is "
                f"{ids[vocab[token_id]]}; each token must have one id, and each id one token"
            )
    return vocab


def _parse_merges(lines: list[Any]) -> list[tuple[bytes, bytes]]:
    merges: dict[tuple[bytes, bytes], None] = {}
    for i, line in enumerate(lines):
        if isinstance(line, str) and line.startswith("#version"):
            continue
        tokens = line.split(" ") if isinstance(line, str) else line
        try:
            left, right = map(from_printable, tokens)
        except (KeyError, ValueError):
            raise InvalidInputError(
                f"model.merges[{i}] is {line!r}, but must be two tokens in printable form"
            ) from None
        if (left, right) in merges:
            raise InvalidInputError(f"model.merges[{i}], {line!r}, is given twice")
        merges[left, right] = None
    return list(merges)
