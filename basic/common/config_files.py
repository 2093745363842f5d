"""Frozen dataclasses to TOML files and back: unknown keys and wrong types are errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from basic.common.files import atomic_write

T = TypeVar("T")


def load_config(path: str | os.PathLike, cls: type[T]) -> T:
    """Read a TOML file into a dataclass; tables become its nested dataclasses.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown or missing key, a value of the wrong type or out of its range; the message
            starts with the file's path.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
        return from_table(cls, table)
    except ValueError as error:  # tomllib's own error is one too
        raise ValueError(f"{path}: {error}") from error


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write a dataclass as TOML, keys in the order of its fields; a field that is None is left out."""
    import tomli_w  # here, so that only those who save need it

    with atomic_write(path) as file:
        tomli_w.dump(to_table(config), file)


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries without None, which TOML cannot say."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: to_table(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not None
    }


def from_table(cls: type[T], table: dict[str, Any], where: str = "") -> T:
    """Build a dataclass from nested dictionaries.

    Args:
        where: the dotted name of the table, for messages.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type or out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]
    for key in table:
        if key not in fields:
            raise ValueError(f"unknown key {where + key!r}; the keys here are {', '.join(fields)}")
    hints = get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _checked(hints[name], table[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the key {where + name!r} is missing, and it has no default")
    return cls(**values)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """The value as the type its field is annotated with, or a ValueError."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(hint, value, name + ".")
    if get_origin(hint) is tuple and isinstance(value, list):  # tuple[item, ...], which TOML has as a list
        return tuple(_checked(get_args(hint)[0], item, f"{name}[{place}]") for place, item in enumerate(value))
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:  # not isinstance: True would pass for an int
            return value
    allowed = " or ".join(_describe(option) for option in options if option is not type(None))
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    if dataclasses.is_dataclass(option):
        return "a table with the keys " + ", ".join(field.name for field in dataclasses.fields(option))
    if get_origin(option) is tuple:
        return f"a list, each item {_describe(get_args(option)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}[option]
