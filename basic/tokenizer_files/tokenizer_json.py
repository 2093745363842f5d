"""Read and write `tokenizer.json`, the file of the `tokenizers` package: byte-level BPE.

A tokenizer that is read or written gives the same ids in both programs. What only one of them can do is an error that
names it. One difference remains: the programs have different versions of the Unicode tables, so a character that is a
letter only in the newer version can be split differently.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from basic.bytes_utils import from_printable, to_printable
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import load_json, load_object
from basic.common.outputs import Output, write_output
from basic.pretokenization import resolve_pattern
from basic.tokenizer_files.content import DEFAULT_FLAGS, TokenizerContent, TokenizerSettings, changed_flags
from basic.tokenizer_files.equivalent_merges import UsedMerges, check_all_bytes, missing_bytes
from basic.tokenizer_files.normalization import overlap
from basic.tokenizer_files.pre_tokenizers import (
    BYTE_LEVEL,
    parse_normalizer,
    parse_pre_tokenizer,
    pre_tokenizer_json,
    require,
)

# What the package does with a byte that has no token; without effect if all bytes have one.
_MISSING_BYTES = ("unk_token", "fuse_unk", "byte_fallback")

# Fields with the types or the values that the package takes; ... stands for a field that is not there.
_OPTIONAL = (None, ...)
_TYPES: dict[str, tuple[type | tuple[Any, ...], ...]] = {
    "truncation.direction": (("Left", "Right", ...),),
    "truncation.max_length": (int,),
    "truncation.strategy": (("LongestFirst", "OnlyFirst", "OnlySecond"),),
    "truncation.stride": (int,),
    "padding.strategy": (("BatchLongest",), dict),
    "padding.direction": (("Left", "Right"),),
    "padding.pad_to_multiple_of": (int, _OPTIONAL),
    "padding.pad_id": (int,),
    "padding.pad_type_id": (int,),
    "padding.pad_token": (str,),
    **{f"added_tokens.{flag}": (bool,) for flag in ("single_word", *DEFAULT_FLAGS)},
    **{f"model.{field}": (bool, _OPTIONAL) for field in ("fuse_unk", "byte_fallback", "ignore_merges")},
    "model.dropout": (float, int, _OPTIONAL),
    **{f"model.{f}": (str, _OPTIONAL) for f in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")},
}


def read_tokenizer_json(path: str | os.PathLike, content: bytes | None = None) -> TokenizerContent:
    """Read a `tokenizer.json` with byte-level BPE.

    Added tokens become special tokens, in the order of the file; those that are not marked as special are only not left
    out when special tokens are skipped. Truncation and padding are ignored with a warning.

    Args:
        content: the file's content, if it has been read already.

    Raises:
        DamagedFileError: the file is not JSON, or a field is missing or has the wrong type.
        InvalidInputError: `Tokenizer` does not support a value; the message has the field.
        OSError: the file cannot be read.
    """
    fields = load_json(path, content)
    if isinstance(fields, dict) and len(fields) >= 256 and all(isinstance(value, int) for value in fields.values()):
        raise InvalidInputError(
            f"{os.fspath(path)!r} is a vocabulary without merges, not a tokenizer.json; give a folder that has it as "
            "vocab.json, and merges.txt"
        )
    try:
        return _parse(fields, os.fspath(path))
    except InvalidInputError as error:
        raise InvalidInputError(f"{os.fspath(path)!r}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(
            f"{os.fspath(path)!r} is not a complete tokenizer.json ({type(error).__name__}: {error}); write it again "
            "with the tokenizers package"
        ) from error


def _parse(fields: dict[str, Any], name: str) -> TokenizerContent:
    _check_types(fields)
    for field in ("truncation", "padding"):
        if fields.get(field) is not None:
            warnings.warn(f"{name!r}: {field} is {json.dumps(fields[field]):.200}, which is ignored", stacklevel=2)
    normalizer, pattern = parse_normalizer(fields.get("normalizer")), parse_pre_tokenizer(fields["pre_tokenizer"])
    require("decoder.type", (fields["decoder"] or {}).get("type"), "ByteLevel")
    model = fields["model"]
    require("model.type", model.get("type", "BPE"), "BPE")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(f"model.{field}", model.get(field) or None, None)
    added = {token["content"]: token["id"] for token in fields["added_tokens"]}
    _check_added_tokens(fields["added_tokens"], model["vocab"])
    flags = {token["content"]: changed for token in fields["added_tokens"] if (changed := changed_flags(token))}
    ignore_merges = bool(model.get("ignore_merges"))
    vocab = _parse_vocab(model["vocab"], added, ignore_merges)
    settings = TokenizerSettings(
        normalizer=normalizer,
        ignore_merges=ignore_merges,
        one_merge_at_a_time=True,
        flags=flags,
        post_processor=fields.get("post_processor"),
        missing_bytes={key: model.get(key) for key in _MISSING_BYTES} if missing_bytes(vocab.values()) else None,
    )
    for token_id in (*settings.template().before, *settings.template().after):
        if token_id not in vocab:
            raise InvalidInputError(f"post_processor adds the id {token_id}, which is not in the vocabulary")
    merges = _parse_merges(model["merges"])
    return TokenizerContent(vocab=vocab, merges=merges, special_tokens=added, pattern=pattern, settings=settings)


def _check_types(fields: dict[str, Any]) -> None:
    """Check the fields that do not matter here: a file that the package refuses is refused too."""
    require("version", fields.get("version", "1.0"), "1.0")
    for name, allowed in _TYPES.items():
        where, _, field = name.rpartition(".")
        objects = fields["added_tokens"] if where == "added_tokens" else [fields.get(where)]
        for number, values in enumerate(objects):
            if values is None and where in ("truncation", "padding"):
                continue
            if not isinstance(values, dict):
                raise InvalidInputError(f"{where} is {json.dumps(values):.80}, but must be an object")
            value = values.get(field, ...)
            if not any(_fits(value, kind) for kind in allowed):
                place = f"added_tokens[{number}].{field}" if where == "added_tokens" else name
                raise InvalidInputError(
                    f"{place} is {'missing' if value is ... else json.dumps(value):.80}, which the tokenizers package "
                    "refuses; write the file again with that package"
                )


def _fits(value: Any, kind: type | tuple[Any, ...]) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind is dict:  # the only object among the values
        return isinstance(value, dict) and [*value] == ["Fixed"] and _fits(value["Fixed"], int)
    return type(value) is kind and (kind is not int or value >= 0)


def _check_added_tokens(tokens: list[dict[str, Any]], entries: dict[str, int]) -> None:
    """Check that added tokens have no options that special tokens of `Tokenizer` do not have."""
    ids: list[int] = []
    for token in tokens:
        field = f"added_tokens[{token['content']!r}]"
        require(f"{field}.single_word", token["single_word"], False)
        # The package uses the id of the vocabulary or the next free one, and ignores the id in the file.
        expected = entries.get(token["content"], max([len(entries), *(i + 1 for i in ids[-1:])]))
        if token["id"] != expected:
            raise InvalidInputError(f"{field}.id is {token['id']}, but the tokenizers package would give it {expected}")
        ids.append(max([expected, *ids[-1:]]))
    # The package finds tokens with normalized = false first, also if another token starts to the left of them, and they
    # take the white space beside them before another token can be found in it.
    normalized = [token["content"] for token in tokens if token["normalized"]]
    for left in normalized:
        for other in tokens:
            is_taken = (other["rstrip"] and left[:1].isspace()) or (other["lstrip"] and left[-1:].isspace())
            if not other["normalized"] and (is_taken or overlap(left, other["content"])):
                raise InvalidInputError(
                    f"added_tokens {left!r} and {other['content']!r} overlap and differ in 'normalized'"
                )


def _parse_vocab(entries: dict[str, int], added: dict[str, int], ignore_merges: bool) -> dict[int, bytes]:
    vocab: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for name, token_id in [*entries.items(), *added.items()]:
        try:
            token = name.encode() if name in added else from_printable(name)
        except KeyError:  # no merge produces it; it is only decoded
            token = name.encode()
            if ignore_merges:
                raise InvalidInputError(
                    f"model.vocab has {name!r}, which is not in printable form; this is not supported together with "
                    "model.ignore_merges"
                ) from None
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


def write_tokenizer_json(content: TokenizerContent, used: UsedMerges, path: str | os.PathLike) -> None:
    """Write a tokenizer as `tokenizer.json`.

    Args:
        content: with ids for the special tokens, and merges.

    Raises:
        InvalidInputError: the file format cannot express the tokenizer; the message has the token, merge or pattern.
        OSError: the file cannot be written.
    """
    settings, special_token_ids = content.settings, dict(content.special_tokens)  # ty: ignore
    if settings.missing_bytes is None:
        check_all_bytes(content.vocab.values(), "the vocabulary")
    if not settings.one_merge_at_a_time:
        used.check_order()
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, "single_word": False}
            | {flag: settings.flag(token, flag) for flag in DEFAULT_FLAGS}
            for token, token_id in special_token_ids.items()
        ],
        "normalizer": settings.normalizer and {"type": settings.normalizer},
        "pre_tokenizer": pre_tokenizer_json(resolve_pattern(content.pattern)),
        "post_processor": settings.post_processor,
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **(settings.missing_bytes or {}),
            "ignore_merges": settings.ignore_merges,
            "vocab": _vocab_entries(content, special_token_ids),
            "merges": [
                [to_printable(left), to_printable(right)] for left, right in dict.fromkeys(content.merges or ())
            ],
        },
    }
    with write_output(Output(path, "a tokenizer.json", lambda path: bool(load_object(path, {"model": dict})))) as file:
        file.write(json.dumps(fields, ensure_ascii=False, indent=2).encode() + b"\n")


def _vocab_entries(content: TokenizerContent, special_token_ids: dict[str, int]) -> dict[str, int]:
    """Token to id. The package looks up special tokens as plain text, and the tokens of merges in printable form."""
    special = {token_id: token for token, token_id in special_token_ids.items()}
    in_merges = {token for left, right in content.merges or () for token in (left, right, left + right)}
    entries: dict[str, int] = {}
    for token_id, token in sorted(content.vocab.items()):
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
