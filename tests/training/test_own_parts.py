"""An optimizer, a schedule and a function for each step of the user's own, given to `train`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from basic.common.errors import InvalidInputError
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from tests.training.test_loop import TRAIN, VALID, configuration, saved, step_that_fails


class CountingSGD(torch.optim.SGD):
    """SGD that keeps state in its groups too, as schedule-free optimizers do: the rate falls with its own steps."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"]
        return super().step(closure)


def momentum(model) -> CountingSGD:
    return CountingSGD(model.parameters(), lr=0.1, momentum=0.9)


def test_pytorchs_adamw_gives_the_weights_of_ours(tmp_path):
    config = configuration(max_gradient_norm=0.5)
    settings = config.train
    ours = train(config, TRAIN, VALID, tmp_path / "ours").model

    def make(model) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.1
        )

    theirs = train(config, TRAIN, VALID, tmp_path / "theirs", optimizer=make).model
    for expected, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_own_parts_resumes_bit_for_bit_and_keeps_its_log(tmp_path):
    config = configuration(checkpoint_interval=4)
    losses: dict[str, list[Any]] = {"entire": [], "parts": []}

    def start(name: str, **options: Any) -> None:
        def on_step(step: int, loss: torch.Tensor, model: torch.nn.Module) -> None:
            losses[name].append((step, loss.item()))

        own: dict[str, Any] = {"optimizer": momentum, "schedule": lambda step: 0.1 / step, "on_step": on_step}
        train(config, TRAIN, VALID, tmp_path / name, **own, **options)

    start("entire")
    with pytest.raises(OverflowError):
        start("parts", make_step=step_that_fails(7, OverflowError("power failure")))
    start("parts", resume=True)
    assert [step for step, _ in losses["parts"]] == [*range(1, 7), *range(5, 9)]
    assert losses["parts"][:4] + losses["parts"][6:] == losses["entire"]
    for name, weight in saved(tmp_path / "entire", 8).items():
        assert torch.equal(saved(tmp_path / "parts", 8)[name], weight), name
    records = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [record["learning_rate"] for record in records] == pytest.approx([0.1 / step for step in range(1, 9)])
    assert [record["train_loss"] for record in records] == [loss for _, loss in losses["entire"]]


def test_groups_keep_their_factor_and_steps_that_are_not_finite_are_left_out(tmp_path):
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def make(model) -> torch.optim.Optimizer:
        first, *others = model.parameters()
        return Recording([{"params": [first], "rate_factor": 0.5}, {"params": others}], lr=1.0)

    def poison(step: int, loss: torch.Tensor, model: torch.nn.Module) -> None:
        weights = next(model.parameters())
        with torch.no_grad():
            weights += torch.nan if step == 2 else 0

    config = configuration(steps=2)
    train(config, TRAIN, VALID, tmp_path / "run", optimizer=make, schedule=lambda step: 0.25 * step)
    assert rates == [[0.125, 0.25], [0.25, 0.5]]
    rates.clear()
    with pytest.raises(FloatingPointError):
        train(configuration(steps=4), TRAIN, VALID, tmp_path / "nan", optimizer=make, on_step=poison)
    assert len(rates) == 2


def test_what_is_no_optimizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="optimizer must be a Optimizer, got"):
        train(configuration(), TRAIN, VALID, tmp_path / "run", optimizer=lambda model: 3)  # ty: ignore
    with pytest.raises(InvalidInputError, match="resumed and overwritten"):
        train(configuration(), TRAIN, VALID, tmp_path / "run", optimizer=momentum, resume=True, overwrite=True)
