"""Open whatever holds a tokenizer: our folder, tokenizer.json, the folder of a Hugging Face model, a rank file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from basic.bytes_utils import load_merges, load_vocab
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.file_sets import CHECKSUMS_NAME
from basic.common.files import decode_utf8, load_json_object, read_file
from basic.pretokenization import PATTERNS, Pattern, resolve_pattern
from basic.tokenizer_files.content import ChatTemplate, TokenizerContent, TokenizerSettings, changed_flags
from basic.tokenizer_files.equivalent_merges import missing_bytes
from basic.tokenizer_files.our_folder import SPECIAL_TOKENS_FILE, parse_chat_template, read_folder
from basic.tokenizer_files.rank_file import read_rank_file
from basic.tokenizer_files.tokenizer_json import read_tokenizer_json

# The pattern and the normalizer of tokenizer classes of transformers whose folders may have vocab.json and merges.txt.
_CONFIG_FILE = "tokenizer_config.json"
_CLASSES = {"GPT2Tokenizer": ("gpt2", None), "Qwen2Tokenizer": ("qwen2", "NFC")}


def is_our_folder(path: Path) -> bool:
    """Whether a folder is one that `Tokenizer.save` wrote, perhaps damaged."""
    has_others = any((path / name).exists() for name in ("tokenizer.json", "config.json"))  # of an exported model
    return (path / SPECIAL_TOKENS_FILE).exists() or ((path / CHECKSUMS_NAME).exists() and not has_others)


def read_tokenizer(path: str | os.PathLike, *, pattern: str | Pattern | None = None) -> tuple[TokenizerContent, bool]:
    """Read a tokenizer from a file or folder of any kind; for a run, its own tokenizer.

    Returns:
        The parts of the tokenizer, and whether this library saved it.

    Raises:
        FileNotFoundError: there is no tokenizer.
        DamagedFileError: a file is damaged.
        InvalidInputError: a file has something that is not supported, or the pattern is not known, or not that of the
            file.
        OSError: a file cannot be read.
    """
    path = Path(path)
    if (path / "config.toml").is_file() and (path / "tokenizer").is_dir() and not (path / SPECIAL_TOKENS_FILE).exists():
        path /= "tokenizer"  # of a run
    is_ours = path.is_dir() and is_our_folder(path)
    if path.is_dir():
        content = _read_any_folder(path, pattern)
    elif path.exists():
        content = _read_file(path, pattern)
    else:
        raise FileNotFoundError(
            f"there is no file or folder {os.fspath(path)!r}; give a tokenizer's path (`basic train-bpe` makes one)"
        )
    if content is None:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} is not the folder of a saved tokenizer: it has no {SPECIAL_TOKENS_FILE}; save a "
            "tokenizer there (`basic train-bpe` does), or give a tokenizer.json, a folder with it or with vocab.json "
            "and merges.txt, or a rank file"
        )
    if pattern is not None and resolve_pattern(pattern) != resolve_pattern(content.pattern):
        raise InvalidInputError(
            f"{os.fspath(path)!r} says itself how a text is split, by {content.pattern or 'gpt2'!r}; no other pattern "
            "can be given"
        )
    return content, is_ours


def _read_file(path: Path, pattern: str | Pattern | None) -> TokenizerContent:
    content = read_file(path)
    if content.lstrip()[:1] in (b"{", b"["):
        return read_tokenizer_json(path, content)
    return read_rank_file(path, content, pattern=pattern)


def _read_any_folder(folder: Path, pattern: str | Pattern | None) -> TokenizerContent | None:
    if is_our_folder(folder):
        return read_folder(folder)
    if (folder / "tokenizer.json").exists():
        return replace(read_tokenizer_json(folder / "tokenizer.json"), chat_template=_chat_template(folder))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return replace(_read_two_files(folder, pattern), chat_template=_chat_template(folder))
    ranks = [*folder.glob("*.tiktoken"), *folder.glob("tokenizer.model")]
    if len(ranks) > 1:
        raise InvalidInputError(f"{os.fspath(folder)!r} has several rank files, {sorted(map(str, ranks))}; give one")
    return read_rank_file(ranks[0], pattern=pattern) if ranks else None


def _chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a Hugging Face folder: a file of its own, or a field of tokenizer_config.json."""
    fields = {**_optional_object(folder / "special_tokens_map.json"), **_optional_object(folder / _CONFIG_FILE)}
    if (file := folder / "chat_template.jinja").exists():
        fields["chat_template"] = decode_utf8(read_file(file))
    try:
        return parse_chat_template(fields)
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedFileError(f"the chat template of {os.fspath(folder)!r} cannot be read: {error!r}") from error


def _read_two_files(folder: Path, pattern: str | Pattern | None) -> TokenizerContent:
    """Read `vocab.json` and `merges.txt` of transformers, with the special tokens of the other files."""
    config = _optional_object(folder / _CONFIG_FILE)
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in _CLASSES and pattern is None:
        raise InvalidInputError(
            f"{os.fspath(folder)!r} has no tokenizer.json, and the tokenizer_class {kind!r} of its "
            f"tokenizer_config.json is not known ({', '.join(_CLASSES)} are); save its tokenizer.json with "
            f"transformers, or give a pattern: {', '.join(PATTERNS)}"
        )
    if config.get("add_prefix_space"):
        raise InvalidInputError(
            f"{os.fspath(folder)!r}: add_prefix_space is true, which is not supported; only false is"
        )
    name, normalizer = _CLASSES.get(kind, (pattern, None))
    vocab, merges = load_vocab(folder / "vocab.json"), load_merges(folder / "merges.txt")
    special_tokens, flags = _special_tokens(folder, config, vocab)
    settings = TokenizerSettings(
        normalizer=normalizer,
        one_merge_at_a_time=True,
        flags=flags,
        missing_bytes={"unk_token": None} if missing_bytes(vocab.values()) else None,
    )
    return TokenizerContent(vocab=vocab, merges=merges, special_tokens=special_tokens, pattern=name, settings=settings)


def _special_tokens(
    folder: Path, config: Mapping[str, Any], vocab: Mapping[int, bytes]
) -> tuple[dict[str, int], dict[str, dict[str, bool]]]:
    """The ids of the special tokens, and their options."""
    special: dict[str, int] = {}
    flags: dict[str, dict[str, bool]] = {}
    try:
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            special[token["content"]] = int(token_id)
            if token.get("single_word"):
                raise InvalidInputError(
                    f"added token {token['content']!r}: single_word is true, which is not supported"
                )
            if changed := changed_flags(token):
                flags[token["content"]] = changed
        for token, token_id in _optional_object(folder / "added_tokens.json").items():
            special.setdefault(token, token_id)
        ids = {token: token_id for token_id, token in sorted(vocab.items(), reverse=True)}
        for token in _named_tokens({**config, **_optional_object(folder / "special_tokens_map.json")}):
            if token not in special and token.encode() in ids:
                special[token] = ids[token.encode()]
        if not special and b"<|endoftext|>" in ids:  # the default of GPT-2's class
            special["<|endoftext|>"] = ids[b"<|endoftext|>"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise DamagedFileError(f"the special tokens of {os.fspath(folder)!r} cannot be read: {error!r}") from error
    return special, flags


def _named_tokens(fields: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that have a role, such as "eos_token": strings, or objects with their content."""
    for name, value in fields.items():
        if name.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, str):
                    yield token
                elif isinstance(token, Mapping):
                    yield token["content"]


def _optional_object(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.exists() else {}
