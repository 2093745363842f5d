"""Post-processors of tokenizer.json: the ids that they add before and after a text (BOS, EOS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from basic.common.errors import InvalidInputError


class Template(NamedTuple):
    """The ids that are added to a text.

    Attributes:
        before, after: the ids.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def parse_post_processor(processor: Mapping[str, Any] | None, field: str) -> Template:
    """The ids that a post-processor adds to a single text.

    Args:
        processor: the JSON value.
        field: its name, for the error message.

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
