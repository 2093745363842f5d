"""Our own folder of a tokenizer: GPT-2's two files, and what else it needs.

    vocab.json           id of each token, in printable form
    merges.txt           the merges, the lowest rank first
    special_tokens.json  a list of strings
    pattern.json         the pattern, if it is not GPT-2's: a regular expression, or a list of several
    tokenizer_settings.json  the other `TokenizerSettings`, if they are not those of a tokenizer trained here
    chat_template.json   the chat template and the special tokens that it names, if the tokenizer came with one
    checksums.json       the SHA-256 of the others

All are replaced at once (`basic.common.file_sets`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from basic.bytes_utils import load_merges, load_vocab, save_merges, save_vocab
from basic.common.errors import DamagedFileError
from basic.common.file_sets import CHECKSUMS_NAME, atomic_set, read_set
from basic.common.files import load_json, make_folder
from basic.common.outputs import Output, check_outputs
from basic.pretokenization import GPT2_PATTERN, Pattern, resolve_pattern
from basic.tokenizer_files.content import ChatTemplate, TokenizerContent, TokenizerSettings

_VOCAB_FILE, _MERGES_FILE, SPECIAL_TOKENS_FILE = "vocab.json", "merges.txt", "special_tokens.json"
_PATTERN_FILE, _SETTINGS_FILE, _CHAT_FILE = "pattern.json", "tokenizer_settings.json", "chat_template.json"
_FILES = (_VOCAB_FILE, _MERGES_FILE, SPECIAL_TOKENS_FILE, _PATTERN_FILE, _SETTINGS_FILE, _CHAT_FILE)
_FORMAT = "basic tokenizer settings 1"


def write_folder(content: TokenizerContent, directory: str | os.PathLike) -> None:
    """Write a tokenizer to a folder, which is created if needed.

    Raises:
        FileExistsError: the folder has files of these names that are not a saved tokenizer.
        OSError: a file cannot be written.
    """
    check_outputs(tokenizer_outputs(directory), overwrite=True)
    make_folder(directory)
    pattern = resolve_pattern(content.pattern)
    with atomic_set(directory, _FILES) as paths:
        save_vocab(content.vocab, paths[_VOCAB_FILE])
        save_merges(content.merges or (), paths[_MERGES_FILE])
        _write_json(list(content.special_tokens), paths[SPECIAL_TOKENS_FILE])
        if pattern != GPT2_PATTERN:
            _write_json(pattern.short_form, paths[_PATTERN_FILE])
        if settings := content.settings.changed():
            _write_json({"format": _FORMAT, **settings}, paths[_SETTINGS_FILE])
        if (chat := content.chat_template) is not None:
            _write_json({"chat_template": chat.source, **chat.tokens}, paths[_CHAT_FILE])


def _write_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def read_folder(directory: str | os.PathLike) -> TokenizerContent:
    """Read a tokenizer that `write_folder` wrote.

    Raises:
        DamagedFileError: a file is damaged or was changed (the message says how to accept it).
        OSError: a file is missing or cannot be read.
    """
    folder = Path(directory)
    files = read_set(folder, _FILES)
    special_tokens = load_json(folder / SPECIAL_TOKENS_FILE, files.get(SPECIAL_TOKENS_FILE))
    if not isinstance(special_tokens, list):
        raise DamagedFileError(f"{str(folder / SPECIAL_TOKENS_FILE)!r} must hold a JSON list of strings")
    pattern = load_json(folder / _PATTERN_FILE, files[_PATTERN_FILE]) if _PATTERN_FILE in files else None
    settings = load_json(folder / _SETTINGS_FILE, files[_SETTINGS_FILE]) if _SETTINGS_FILE in files else {}
    chat = load_json(folder / _CHAT_FILE, files[_CHAT_FILE]) if _CHAT_FILE in files else None
    try:
        return TokenizerContent(
            vocab=load_vocab(folder / _VOCAB_FILE, files.get(_VOCAB_FILE)),
            merges=load_merges(folder / _MERGES_FILE, files.get(_MERGES_FILE)),
            special_tokens=special_tokens,
            pattern=Pattern(*pattern) if isinstance(pattern, list) else pattern,
            settings=_parse_settings(settings),
            chat_template=None if chat is None else parse_chat_template(chat),
        )
    except DamagedFileError:
        raise
    except (ValueError, TypeError) as error:
        raise damaged_folder(directory, error) from error


def parse_chat_template(fields: object) -> ChatTemplate | None:
    """The template in the fields of a tokenizer_config.json, or of our own file; None if there is none.

    Raises:
        ValueError: the fields are not such fields.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"a chat template must be in a JSON object, got {type(fields).__name__}")
    source = fields.get("chat_template")
    if isinstance(source, list):  # several with names, as for tools; "default" is that of a conversation
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    if source is None:
        return None
    tokens = {name: value for name, value in fields.items() if name.endswith("_token")}
    tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
    if not isinstance(source, str):
        raise ValueError(f"chat_template must be a string, got {type(source).__name__}")
    return ChatTemplate(source=source, tokens=tokens)


def _parse_settings(fields: object) -> TokenizerSettings:
    if not isinstance(fields, dict) or fields.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{_SETTINGS_FILE} must be an object with the format {_FORMAT!r}; is it of a newer version?")
    return TokenizerSettings(**{name: value for name, value in fields.items() if name != "format"})


def damaged_folder(directory: str | os.PathLike, error: Exception) -> DamagedFileError:
    """The error for files of which no tokenizer can be made."""
    return DamagedFileError(
        f"the files of the tokenizer in {os.fspath(directory)!r} are damaged, or are not those of one "
        f"tokenizer: {error}; save it again"
    )


def tokenizer_outputs(directory: str | os.PathLike) -> list[Output]:
    """The files that `write_folder` may write into a folder, for `check_outputs`."""

    def is_ours(path: Path) -> bool:
        return _is_saved_tokenizer(path.parent)

    return [Output(Path(directory) / name, f"the {name} of a tokenizer", is_ours) for name in (*_FILES, CHECKSUMS_NAME)]


def _is_saved_tokenizer(folder: Path) -> bool:
    """Whether `write_folder` wrote the files of a folder; some may be damaged."""
    try:
        special_tokens = load_json(folder / SPECIAL_TOKENS_FILE)
        return isinstance(special_tokens, list) and all(isinstance(token, str) for token in special_tokens)
    except (DamagedFileError, OSError):
        pass
    try:
        return load_json(folder / CHECKSUMS_NAME)["sha256"].keys() <= set(_FILES)
    except (DamagedFileError, OSError, LookupError, TypeError, AttributeError):
        return False
