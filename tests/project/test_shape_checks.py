"""Annotated shapes and types are checked in every test, also when a call like an earlier one goes wrong."""

from typing import Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from basic.transformer import functional
from tests.conftest import CHECKED_MODULES, typechecked


@jaxtyped(typechecker=typechecked)
def transpose(
    x: Float[Tensor, "rows columns"], how: Literal["right", "wrong", "complex"] = "right", size: int | list[int] = 1
) -> Float[Tensor, "columns rows"]:
    return {"right": x.T, "wrong": x, "complex": x.T.to(torch.complex64)}[how]


def test_each_kind_of_call_is_checked():
    x = torch.zeros(2, 3)
    for _ in range(3):
        transpose(x)
        transpose(x, "right", [1, 2])
        for wrong in ("wrong", "complex", "else"):
            with pytest.raises(TypeCheckError):
                transpose(x, wrong)  # ty: ignore[invalid-argument-type]
        with pytest.raises(TypeCheckError):
            transpose(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeCheckError):
            transpose(torch.zeros(3))
        with pytest.raises(TypeCheckError):
            transpose(x, "right", ["1", "2"])  # ty: ignore[invalid-argument-type]
        with pytest.raises(TypeCheckError):
            transpose(np.zeros((2, 3)))  # ty: ignore[invalid-argument-type]


def test_the_formulas_are_checked():
    assert "transformer.functional" in CHECKED_MODULES
    for _ in range(2):
        functional.linear(torch.zeros(5, 3), torch.zeros(2, 3))
        with pytest.raises(TypeCheckError):
            functional.linear(torch.zeros(5, 3), torch.zeros(3, 2))
