"""What all tests share: annotated shapes are checked, examples are the same every time, real data is optional."""

import os
from pathlib import Path

# Tests run side by side: threads that wait for each other, also those of the processes that tests start, shall leave
# the cores to others. torch's threads learn it when they are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

from basic.bpe import loading

# An int may stand for a float, as everywhere in Python; jaxtyping's pytest option cannot be told that.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
CHECKED_MODULES = (
    *("model", "transformer.functional", "transformer.optimizer", "training.batches"),
    *("generation.sampling", "generation.text", "analysis.evaluation"),
)
install_import_hook([f"basic.{module}" for module in CHECKED_MODULES], f"{__name__}.typechecked")


# The tests' tensors are so small that a second thread only waits for the first.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The path of a file of real input; skips the test, saying so, where it is absent."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{name}, which is not here")
    return path


@pytest.fixture
def plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels, also where an earlier test has loaded them; they have tests of their own."""
    monkeypatch.setattr(loading, "kernels_pay_off", lambda *arguments, **options: False)
