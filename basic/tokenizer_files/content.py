"""What a tokenizer file says: the plain data of which a `Tokenizer` is made, and which it is written from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from basic.common.errors import InvalidInputError
from basic.pretokenization import Pattern

# The options of a special token, as in tokenizer.json, and their values where nothing else is said.
DEFAULT_FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}


def changed_flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """The options of an added token of other programs that are not those of `DEFAULT_FLAGS`."""
    return {name: token[name] for name, default in DEFAULT_FLAGS.items() if token.get(name, default) != default}


class Template(NamedTuple):
    """The ids that are added to a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def parse_post_processor(processor: Mapping[str, Any] | None, field: str) -> Template:
    """The ids that a post-processor adds to a single text.

    Raises:
        InvalidInputError: the kind of post-processor is not known, or a value is missing.
    """
    if processor is None:
        return Template()
    kind = processor.get("type")
    try:
        if kind == "ByteLevel":  # it changes offsets only
            return Template()
        if kind == "Sequence":
            processors = enumerate(processor["processors"])
            inner = [(f"{field}.processors[{i}]", each) for i, each in processors if each["type"] != "ByteLevel"]
            if len(inner) > 1:  # the package applies the second to the parts of the first, not to the result
                raise InvalidInputError(f"{field} has several processors that add tokens, which is not supported")
            return parse_post_processor(inner[0][1], inner[0][0]) if inner else Template()
        if kind == "TemplateProcessing":
            return _parse_template(processor, field)
        if kind in ("RobertaProcessing", "BertProcessing"):
            return Template((_check_id(processor["cls"][1]),), (_check_id(processor["sep"][1]),))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{field} is incomplete ({type(error).__name__}: {error})") from None
    raise InvalidInputError(f"{field}.type is {kind!r}, which may add tokens to every text and is not supported")


def _parse_template(processor: Mapping[str, Any], field: str) -> Template:
    before: list[int] = []
    after: list[int] | None = None
    for i, item in enumerate(processor["single"]):
        ((kind, value),) = item.items()
        if kind == "Sequence" and value["id"] == "A" and after is None:
            after = []
        elif kind == "SpecialToken":
            ids = map(_check_id, processor["special_tokens"][value["id"]]["ids"])
            (before if after is None else after).extend(ids)
        else:
            raise InvalidInputError(
                f"{field}.single[{i}] is {item!r}, which is not supported; only special tokens and one text A are"
            )
    if after is None:
        raise InvalidInputError(f"{field}.single has no text A, which is not supported")
    return Template(tuple(before), tuple(after))


def _check_id(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not an id")
    return value


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a tokenizer does beside splitting and merging. The defaults are those of a tokenizer that is trained here.

    Attributes:
        normalizer: "NFC": the text between special tokens is brought to this Unicode normal form before it is split.
        ignore_merges: a pre-token that is in the vocabulary becomes this token, whatever the merges are. This matters
            for tokens that no merges produce.
        one_merge_at_a_time: see `basic.bpe.plain.MergeRules`.
        flags: special token to its options that are not those of `DEFAULT_FLAGS`. "special": it is left out where
            special tokens are skipped. "normalized": it is searched for in the normalized text. "lstrip", "rstrip": it
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
class ChatTemplate:
    """How a conversation becomes a text: a Jinja template, as transformers keeps it beside a tokenizer.

    Attributes:
        tokens: the special tokens that it may name, such as "bos_token" and "eos_token".
    """

    source: str
    tokens: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class TokenizerContent:
    """The parts of a tokenizer; see `Tokenizer`.

    Attributes:
        merges: None if the ids are ranks (a rank file of tiktoken).
        special_tokens: in the order of the file, with their ids if the file has them.
        pattern: for the pre-tokens; None is GPT-2's.
    """

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]] | None
    special_tokens: Mapping[str, int] | Iterable[str] = ()
    pattern: str | Pattern | None = None
    settings: TokenizerSettings = TokenizerSettings()
    chat_template: ChatTemplate | None = None
