"""For all tests: annotated shapes are checked at run time, Hypothesis is repeatable, real data is optional."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Tests run in parallel: waiting threads must not occupy the cores, also in processes that tests start. OpenMP reads
# this variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

from basic.bpe import loading

# An int is accepted for a float, as everywhere in Python; jaxtyping's pytest option has no setting for this.
beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A check of arguments and results by beartype, done once for all calls to which it gives the same answer.

    A check takes longer than most computations of the tests, and its answer depends on types, shapes and dtypes alone.
    """
    check, passed = beartyped(function), set()

    def check_once(*args: Any, **kwargs: Any) -> Any:
        kinds = kind_of(args), kind_of(tuple(kwargs.items()))
        if UNKNOWN in kinds or kinds not in passed:
            check(*args, **kwargs)
            passed.add(kinds)

    return check_once


UNKNOWN = "depends on the content"


def kind_of(value: Any) -> Any:
    """What the annotation of a value can depend on; UNKNOWN for containers other than tuples."""
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype
    if isinstance(value, tuple):
        kinds = tuple(map(kind_of, value))
        return UNKNOWN if UNKNOWN in kinds else kinds
    if isinstance(value, str):
        return value  # which Literal compares
    return UNKNOWN if isinstance(value, Iterable) else type(value)


CHECKED_MODULES = (
    *("model", "transformer.functional", "transformer.optimizer", "training.batches"),
    *("generation.sampling", "generation.text", "analysis.evaluation"),
)
install_import_hook([f"basic.{module}" for module in CHECKED_MODULES], f"{__name__}.typechecked")

# The tensors of the tests are so small that a second thread does not help.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first: the others run beside them, and at the end no process waits for a long one."""
    items.sort(key=lambda item: not (item.get_closest_marker("long") or item.path.suffix == ".ipynb"))


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The path of a file of real data; skips the test if the file does not exist."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{name}, which does not exist")
    return path


@pytest.fixture
def plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable compiled kernels, also if an earlier test has loaded them."""
    monkeypatch.setattr(loading, "kernels_pay_off", lambda *arguments, **options: False)
