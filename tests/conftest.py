"""For all tests: annotated shapes are checked at run time, Hypothesis is repeatable, real data is optional."""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

# Tests run in parallel: waiting threads must not occupy the cores, also in processes that tests start. OpenMP reads
# this variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Messages name commands as the user types them: with `uv run` if that started the process.
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)

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

    def check_once(*args: Any, **kwargs: Any) -> None:
        kinds = kinds_of((*kwargs, *args, *kwargs.values()))
        if kinds is None or kinds not in passed:
            check(*args, **kwargs)
            passed.add(kinds)

    return check_once


def kinds_of(values: Iterable[Any]) -> tuple[Any, ...] | None:
    """What annotations of these values can depend on; None if it is the content of a container."""
    kinds = []
    for value in values:
        kind: Any = type(value)
        if isinstance(value, torch.Tensor):
            kinds += kind, value.shape, value.dtype
        elif kind is str:
            kinds.append(value)  # which Literal compares
        elif kind is tuple:
            kinds.append(kinds_of(value))
            if kinds[-1] is None:
                return None
        elif is_container(kind):
            return None
        else:
            kinds.append(kind)
    return tuple(kinds)


@cache
def is_container(kind: type) -> bool:
    return issubclass(kind, Iterable)


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
    items.sort(key=lambda item: not item.get_closest_marker("long"))


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


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """GPT-2's tokenizer, through the adapters."""
    from basic.bytes_utils import load_merges, load_vocab
    from tests.adapters import get_tokenizer

    vocab, merges = shared_data("gpt2_vocab.json"), shared_data("gpt2_merges.txt")
    return get_tokenizer(load_vocab(vocab), load_merges(merges), ["<|endoftext|>"])


@pytest.fixture(scope="module")
def ours() -> Any:
    """A small tokenizer trained on the project's own sample."""
    from tests.adapters import get_tokenizer, run_train_bpe
    from tests.fixtures.make_tokenizer_fixtures import SAMPLE

    special_tokens = ["<|endoftext|>", "<| a break |>"]
    return get_tokenizer(*run_train_bpe(SAMPLE, 500, special_tokens), special_tokens)
