"""What a tokenizer file says: the plain data of which a `Tokenizer` is made, and which it is written from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from basic.common.errors import InvalidInputError
from basic.pretokenization import Pattern
from basic.tokenizer_files.post_processors import Template, parse_post_processor

# The options of a special token, as in tokenizer.json, and their values where nothing else is said.
DEFAULT_FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a tokenizer does beside splitting and merging. The defaults are those of a tokenizer that is trained here.

    Attributes:
        normalizer: "NFC": the text between special tokens is brought to this Unicode normal form before it is split.
        ignore_merges: a pre-token that is in the vocabulary becomes this token, whatever the merges are. This matters
            for tokens that no merges produce.
        one_merge_at_a_time: see `basic.bpe.plain.MergeRules`.
        flags: special token to its options that are not those of `DEFAULT_FLAGS`. "special": it is left out where
            special tokens are skipped. "normalized": it is searched for in the normalised text. "lstrip", "rstrip": it
            takes the white space before or after it, which then gives no ids.
        post_processor: that of tokenizer.json, as JSON; it has the tokens that `encode(text, template=True)` adds.
        missing_bytes: only for vocabularies that lack bytes: the options of tokenizer.json for such bytes ("unk_token"
            and so on), which are written back. Here a text with such a byte is an error.

    Raises:
        InvalidInputError: a value is not one of these.
    """

    normalizer: str | None = None
    ignore_merges: bool = False
    one_merge_at_a_time: bool = False
    flags: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    post_processor: Mapping[str, Any] | None = None
    missing_bytes: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.normalizer not in (None, "NFC"):
            raise InvalidInputError(f"normalizer={self.normalizer!r} must be None or 'NFC'")
        for name in ("ignore_merges", "one_merge_at_a_time"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.flags, Mapping):
            raise InvalidInputError(f"flags={self.flags!r} must be an object of special tokens and their options")
        for token, flags in self.flags.items():
            if not isinstance(flags, Mapping) or not flags.keys() <= DEFAULT_FLAGS.keys():
                raise InvalidInputError(
                    f"flags of {token!r} are {flags!r}, but may only have {', '.join(DEFAULT_FLAGS)}"
                )
            if not all(isinstance(value, bool) for value in flags.values()):
                raise InvalidInputError(f"flags of {token!r} are {flags!r}, but must be true or false")
        for name in ("post_processor", "missing_bytes"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise InvalidInputError(f"{name}={getattr(self, name)!r} must be an object or null")
        self.template()

    def template(self) -> Template:
        """The ids that the post-processor adds before and after a text."""
        return parse_post_processor(self.post_processor, "post_processor")

    def flag(self, token: str, name: str) -> bool:
        """The value of an option of a special token."""
        return self.flags.get(token, {}).get(name, DEFAULT_FLAGS[name])

    def that_change_ids(self) -> dict[str, Any]:
        """The settings that change the ids of a text, by name, if they are not the default."""
        names = {"lstrip", "rstrip", *(["normalized"] if self.normalizer else [])}
        flags = {
            token: sorted(name for name, value in flags.items() if value and name in names)
            for token, flags in sorted(self.flags.items())
        }
        values = {
            "normalizer": self.normalizer,
            "ignore_merges": self.ignore_merges,
            "one_merge_at_a_time": self.one_merge_at_a_time,
            "flags": {token: names for token, names in flags.items() if names},
        }
        return {name: value for name, value in values.items() if value}

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name)}


@dataclass(frozen=True, kw_only=True)
class TokenizerContent:
    """The parts of a tokenizer; see `Tokenizer`.

    Attributes:
        vocab: id to bytes.
        merges: None if the ids are ranks (a rank file of tiktoken).
        special_tokens: in the order of the file, with their ids if the file has them.
        pattern: for the pre-tokens; None is GPT-2's.
        settings: all else.
    """

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]] | None
    special_tokens: Mapping[str, int] | Iterable[str] = ()
    pattern: str | Pattern | None = None
    settings: TokenizerSettings = TokenizerSettings()
