"""Check arguments that come from outside: integers, texts, and token ids in lists, arrays and tensors.

Tensors are recognized by their attributes, because text to tokens never imports torch.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from basic.common.errors import InvalidInputError


def check_integer(name: str, value: Any) -> int:
    """Return an integer argument as an int; NumPy's integers and tensors of one integer are integers too.

    Raises:
        TypeError: it is not an integer. A bool is none.
    """
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {describe(value)}") from None


def check_size(name: str, value: Any) -> int:
    """Return a size as an int; it is an InvalidInputError if it is less than 1.

    Raises:
        TypeError: it is not an integer.
        InvalidInputError: it is less than 1.
    """
    if (size := check_integer(name, value)) < 1:
        raise InvalidInputError(f"{name} must be at least 1, got {size}")
    return size


def check_number(name: str, value: Any) -> float:
    """Return a number as a float; NumPy's numbers are numbers too.

    Raises:
        TypeError: it is none. A bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    return float(value)


def check_type(name: str, value: Any, expected: type, remedy: str) -> None:
    """Raise a TypeError, with what to do, unless an argument is an instance of a class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {describe(value)}; {remedy}")


def check_text(text: Any) -> None:
    """Raise a TypeError unless a text is a string."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {describe(text)}")


def check_errors_option(errors: str) -> None:
    """Raise InvalidInputError unless the option is "strict" or "replace"."""
    if errors not in ("strict", "replace"):
        raise InvalidInputError(f"errors={errors!r} must be 'strict' or 'replace'")


def check_text_list(name: str, texts: Iterable[str]) -> list[str]:
    """Return an argument with several texts as a list.

    Raises:
        TypeError: it is one text, or cannot be iterated over.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"{name} must be a list of strings, got one: {texts!r:.40}; write [{texts!r:.40}]")
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of strings, got {describe(texts)}")
    return list(texts)


def id_list(name: str, ids: Any) -> list[int]:
    """Return one sequence of token ids as a list of ints.

    Args:
        ids: a list, an array, a tensor on any device, or any iterable of integers.

    Raises:
        TypeError: it is something else, or an element is not an integer.
        InvalidInputError: an array or tensor is not one-dimensional, or does not have an integer dtype.
    """
    if type(ids) is list and set(map(type, ids)) <= {int}:  # the usual case, at once
        return ids
    if isinstance(ids, np.ndarray) or _is_tensor(ids):
        if len(ids.shape) != 1 or len(ids) > 0:  # an empty array has a float dtype by default
            _check_array(name, ids)
        return ids.tolist()
    if isinstance(ids, str | bytes | bytearray | Mapping | Set) or not isinstance(ids, Iterable):
        remedy = f"; write [{ids}]" if isinstance(ids, int | np.integer) else ""
        raise TypeError(f"{name} must be a list, an array or a tensor of token ids, got {describe(ids)}{remedy}")
    return [check_integer(f"{name}[{position}]", token_id) for position, token_id in enumerate(ids)]


def id_array(name: str, ids: Any) -> Any:
    """Return token ids as an array; an array or a token dataset is returned as it is.

    Raises:
        TypeError: it is something else.
        InvalidInputError: it is not one-dimensional, or does not have an integer dtype.
    """
    if isinstance(ids, list | tuple):
        return np.array(id_list(name, ids), np.int64)
    if not all(hasattr(ids, attribute) for attribute in ("ndim", "dtype", "shape", "__getitem__")):
        raise TypeError(
            f"{name} must be an array of token ids, got {describe(ids)}; a token file is opened by "
            "basic.tokens.opening.open_tokens"
        )
    _check_array(name, ids)
    return ids.detach().cpu().numpy() if _is_tensor(ids) else ids


def _check_array(name: str, ids: Any) -> None:
    kind = getattr(ids.dtype, "kind", None)  # a tensor's dtype has none, but its name
    is_integer = kind in ("i", "u") if kind else str(ids.dtype).startswith(("torch.int", "torch.uint"))
    if not is_integer or ids.ndim != 1:
        raise InvalidInputError(
            f"{name} must be a one-dimensional array of integers, got {ids.dtype} of shape {tuple(ids.shape)}"
        )


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def describe(value: Any) -> str:
    """The type and the value of a wrong argument, for a message."""
    return f"{type(value).__name__}: {value!r:.80}"
