"""AdamW and the learning-rate schedule against torch's own and against the formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import jaxtyping
import pytest
import torch
from torch.nn import Parameter
from torch.testing import assert_close

from tests.helpers.model_tools import set_gradients

from .adapters import get_adamw_cls, run_get_lr_cosine_schedule

AdamW: Any = get_adamw_cls()
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.randn(3, 4, dtype=dtype)), Parameter(torch.randn(5, dtype=dtype))]


def copies(dtype: torch.dtype = torch.float64) -> tuple[list[Parameter], list[Parameter]]:
    ours = parameters(dtype)
    return ours, [Parameter(parameter.detach().clone()) for parameter in ours]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.0)}, {"eps": 0.1}, {"lr": 0.0}, {"betas": (0.9, 0.999)}],
    ids=str,
)
def test_adamw_is_torchs(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    ours, theirs = copies(dtype)
    settings = SETTINGS | changes
    optimizers = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(50):
        set_gradients(ours, theirs, scale=10.0 ** (step % 5 - 3))
        for optimizer in optimizers:
            optimizer.step()
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_defaults_are_torchs() -> None:
    ours, theirs = AdamW(parameters()).defaults, torch.optim.AdamW(parameters()).defaults
    assert ours == {name: theirs[name] for name in ("lr", "betas", "eps", "weight_decay")}


def test_adamw_of_several_groups_with_changing_rates_is_torchs() -> None:
    ours, theirs = copies()
    optimizers = [
        cls([{"params": [p[0]], "weight_decay": 0.0}, {"params": [p[1]], "lr": 0.2, "betas": (0.5, 0.6)}], **SETTINGS)
        for cls, p in ((AdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(20):
        set_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parameters_without_a_gradient_do_not_change() -> None:
    """They do not decay, and their step does not count, as in torch. Each parameter lacks a gradient in turn."""
    ours, theirs = copies()
    optimizers = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(9):
        set_gradients(ours, theirs)
        for same in (ours, theirs):
            same[step % 2].grad = None
        before = ours[step % 2].detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_close(ours[step % 2].detach(), before, rtol=0, atol=0)
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_step_returns_what_its_closure_computed_with_gradients() -> None:
    ours, theirs = copies()
    optimizers: list[Any] = [AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)]
    assert optimizers[0].step() is None
    for _ in range(5):
        losses = []
        for optimizer, same in zip(optimizers, (ours, theirs), strict=True):

            def closure(optimizer: torch.optim.Optimizer = optimizer, same: list[Parameter] = same) -> torch.Tensor:
                optimizer.zero_grad()
                loss = torch.stack([parameter.square().sum() for parameter in same]).sum()
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_loaded_state_continues_exactly() -> None:
    ours = parameters()
    optimizer = AdamW(ours, **SETTINGS)
    for _ in range(3):
        set_gradients(ours)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    again = [Parameter(parameter.detach().clone()) for parameter in ours]
    resumed = AdamW(again, lr=123.0)
    resumed.load_state_dict(state)
    for _ in range(3):
        set_gradients(ours, again)
        optimizer.step()
        resumed.step()
    assert_close(again, ours, rtol=0, atol=0)
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1e-3}, "lr must be a number >= 0, got -0.001"),
        ({"lr": math.nan}, "lr must be a number >= 0, got nan"),
        ({"eps": -1e-8}, "eps must be a number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\), got \(0.9, -0.1\)"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_also_in_a_group(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **SETTINGS | changes)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": parameters(), **changes}], **SETTINGS)
    optimizer = AdamW(parameters(), **SETTINGS)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **changes})
    assert len(optimizer.param_groups) == 1


# ---- the learning-rate schedule


@pytest.mark.parametrize(
    ("warmup", "cycle", "expected"),
    [
        (4, 12, {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 6: 0.1 + 0.9 * (2 + 2**0.5) / 4, 8: 0.55, 12: 0.1, 13: 0.1}),
        (0, 8, {0: 1.0, 4: 0.55, 8: 0.1, 1000: 0.1}),
        (5, 5, {0: 0.0, 4: 0.8, 5: 0.1, 6: 0.1}),
        (0, 0, {0: 0.1, 1: 0.1}),
        (1, 2, {0: 0.0, 1: 1.0, 2: 0.1}),
    ],
    ids=str,
)
def test_schedule_at_its_corners(warmup: int, cycle: int, expected: dict[int, float]) -> None:
    rates = {it: run_get_lr_cosine_schedule(it, 1.0, 0.1, warmup, cycle) for it in expected}
    assert rates == pytest.approx(expected, abs=1e-12)
    assert all(type(rate) is float for rate in rates.values())


def test_a_schedule_of_something_else_than_numbers_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose check comes first in the tests
    with pytest.raises(TypeError, match="the arguments of a schedule must be numbers, got str: '3'"):
        run_get_lr_cosine_schedule("3", 1.0, 0.1, 4, 12)  # ty: ignore[invalid-argument-type]


def test_schedule_follows_torchs() -> None:
    """torch's annealing has no warm-up, so the test adds it."""
    parameter = Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.02)
    for iteration in range(7, 27):
        assert run_get_lr_cosine_schedule(iteration, 0.3, 0.02, 7, 27) == pytest.approx(annealing.get_last_lr()[0])
        optimizer.step()
        annealing.step()
    assert [run_get_lr_cosine_schedule(it, 0.3, 0.02, 7, 27) for it in range(7)] == pytest.approx(
        [0.3 * it / 7 for it in range(7)]
    )
