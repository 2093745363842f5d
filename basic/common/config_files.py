"""Frozen dataclasses to TOML files and back, with errors that name the key and what is allowed."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import tomllib
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from basic.common.arguments import check_integer, check_number, describe
from basic.common.errors import InvalidConfigError
from basic.common.files import atomic_write, decode_utf8, read_file

T = TypeVar("T")

# The configurations, sweeps and notebooks of local/, which are in the wheel and in a clone.
_PACKAGE = Path(__file__).parents[1]
INCLUDED = _PACKAGE / "local" if (_PACKAGE / "local").is_dir() else _PACKAGE.parent / "local"
_FOLDERS = {"configuration": "configs", "sweep": "experiments"}


def load_config(
    path: str | os.PathLike, cls: type[T], complete: Callable[[dict[str, Any]], object] = lambda table: None
) -> T:
    """Read a TOML file into a dataclass; its tables become nested dataclasses.

    Args:
        path: a file, or the name of an included configuration.
        complete: called with the table of the file, to which it may add settings.

    Raises:
        FileNotFoundError: the file does not exist.
        InvalidConfigError: the file is not TOML, a key is unknown or missing, or a value has the wrong type or is out
            of its range; the message starts with the file's path.
    """
    table = load_table(path, "configuration")
    try:
        complete(table)
        return from_table(cls, table)
    except ValueError as error:
        raise InvalidConfigError(f"{os.fspath(path)}: {error}") from error


def toml_path(path: str | os.PathLike, what: str) -> Path:
    """The path itself, or the file of this name that is included in the package, such as tinystories."""
    path = Path(path)
    included = INCLUDED / _FOLDERS[what] / f"{path}.toml"
    return included if path.name == str(path) and not path.exists() and included.is_file() else path


def load_table(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileNotFoundError: the file does not exist.
        InvalidConfigError: the file is not TOML.
        OSError: it cannot be read.
    """
    try:
        return tomllib.loads(decode_utf8(read_file(toml_path(path, what))))
    except FileNotFoundError:
        names = ", ".join(sorted(included.stem for included in (INCLUDED / _FOLDERS[what]).glob("*.toml")))
        raise FileNotFoundError(
            f"there is no {what} {os.fspath(path)!r}; give a TOML file, or the name of an included one: {names}"
        ) from None
    except (ValueError, RecursionError) as error:  # also of tables that are nested too deeply
        raise InvalidConfigError(f"{os.fspath(path)}: {error}") from error


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write a dataclass as TOML, with the keys in the order of its fields and without fields that are None."""
    import tomli_w  # imported late: only saving needs it

    with atomic_write(path) as file:
        tomli_w.dump(to_table(config), file)


def to_table(config: Any) -> dict[str, Any]:
    """Convert a dataclass to nested dictionaries and lists, without fields that are None (TOML has no null)."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: to_table(value) if dataclasses.is_dataclass(value) else list(value) if type(value) is tuple else value
        for name, value in values.items()
        if value is not None
    }


def short_repr(config: Any) -> str:
    """The call that makes a dataclass, without the settings that have their defaults; for its `__repr__`."""
    changed = []
    for field in dataclasses.fields(config):
        value, make_default = getattr(config, field.name), field.default_factory
        if value != (field.default if make_default is dataclasses.MISSING else make_default()):
            changed.append(f"{field.name}={value!r}")
    return f"{type(config).__name__}({', '.join(changed)})"


def flatten_settings(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into one, with dotted keys: {"train": {"lr": 1}} becomes {"train.lr": 1}.

    Raises:
        InvalidConfigError: `table` is not a table.
    """
    if not isinstance(table, Mapping):
        raise InvalidConfigError(f"a table of settings is needed, got {table!r}")
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            settings |= flatten_settings(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings


def differing_settings(tables: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The dotted names of the settings in which configurations differ, and the settings of each by these names."""
    settings = [flatten_settings(table) for table in tables]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1], settings


def setting_label(key: str, value: Any) -> str:
    """Format a setting for the name of a run: "train.lr", 0.1 becomes "lr=0.1"."""
    return f"{key.rpartition('.')[2]}={value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"


def from_table(cls: type[T], table: dict[str, Any], prefix: str = "") -> T:
    """Build a dataclass from nested dictionaries.

    Args:
        prefix: the table's dotted name and a dot, for messages.

    Raises:
        InvalidConfigError: a key is unknown or missing, or a value has the wrong type or is out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]
    for key in table:
        if key not in fields:
            raise InvalidConfigError(f"unknown key {prefix + key!r}; the keys here are {', '.join(fields)}")
    hints = _hints(cls)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = convert(hints[name], table[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidConfigError(f"the key {prefix + name!r} is missing, and it has no default")
    try:
        return cls(**values)
    except ValueError as error:  # of the dataclass's own checks
        raise InvalidConfigError(str(error)) from error


def check_fields(config: Any, *, may_be_infinite: Collection[str] = ()) -> None:
    """Check the values of a dataclass against the annotations of its fields, in its `__post_init__`.

    Other types that mean the same, such as NumPy's numbers, a path for a string and a list for a tuple, are converted,
    so that the configuration can be saved.

    Args:
        may_be_infinite: names of fields whose number may be infinite; no number may be NaN.

    Raises:
        TypeError: a value has another type.
        InvalidConfigError: a value is none of the choices that a Literal lists, or a number is not finite.
    """
    hints = _hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value = _checked(hints[name], getattr(config, name), name)
        if isinstance(value, float) and not (math.isfinite(value) or (name in may_be_infinite and value > 0)):
            raise InvalidConfigError(f"{name} must be a finite number, got {value}")
        object.__setattr__(config, name, value)


def check_numbers(
    config: Any, names: Iterable[str], smallest: float, below: float = math.inf, *, prefix: str = ""
) -> None:
    """Check that numbers of a dataclass, which `check_fields` has checked, are in a range; None stands for none.

    Raises:
        InvalidConfigError: one is not; the message has its name, behind the prefix.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and not smallest <= value < below:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise InvalidConfigError(f"{prefix}{name} must be at least {smallest:g}{limit}, got {value}")


def _checked(hint: Any, value: Any, name: str) -> Any:
    """Check a value of Python and convert it to the type of its field."""
    options = _options(hint)
    for option in options:
        if option is int and options == (int,):
            return check_integer(name, value)
        if option is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if option is float and (options == (float,) or isinstance(value, numbers.Real)):
            return check_number(name, value)
        if option is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if get_origin(option) is Literal:
            if any(value is choice or (isinstance(value, str) and value == choice) for choice in get_args(option)):
                return value
            raise InvalidConfigError(f"{name} must be one of {', '.join(get_args(option))}, got {value!r}")
        if get_origin(option) is tuple and isinstance(value, tuple | list):
            return tuple(_checked(get_args(option)[0], item, f"{name}[{index}]") for index, item in enumerate(value))
        if isinstance(option, type) and option not in (int, float) and isinstance(value, option):
            return value
    allowed = " or ".join(_describe(option) for option in options if option is not type(None))
    raise TypeError(f"{name} must be {allowed}, got {describe(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another annotation, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def convert(hint: Any, value: Any, name: str) -> Any:
    """Convert a TOML value to the type of its field; an InvalidConfigError names the key of one with another."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(hint, value, name + ".")
    try:
        return _checked(hint, value, name)
    except TypeError as error:
        raise InvalidConfigError(str(error)) from None


def _describe(option: Any) -> str:
    """Name a type as a user of TOML knows it."""
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    if dataclasses.is_dataclass(option):
        return "a table with the keys " + ", ".join(field.name for field in dataclasses.fields(option))
    if get_origin(option) is tuple:
        return f"a list, each item {_describe(get_args(option)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string in quotes"}
    return names.get(option, f"a {option.__name__}")
