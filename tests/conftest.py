"""For all tests: annotated shapes are checked at run time, Hypothesis is repeatable, real data is optional."""

import os
from pathlib import Path

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
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
CHECKED_MODULES = (
    *("model", "transformer.functional", "transformer.optimizer", "training.batches"),
    *("generation.sampling", "generation.text", "analysis.evaluation"),
)
install_import_hook([f"basic.{module}" for module in CHECKED_MODULES], f"{__name__}.typechecked")

# The tensors of the tests are so small that a second thread does not help.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

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
