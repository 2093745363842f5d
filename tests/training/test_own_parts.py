"""An optimizer, a schedule and a function for each step of the user's own, given to `train`."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from typing import Any

import pytest
import torch

from basic.common.errors import InvalidInputError
from basic.training.checkpoints.file import load_checkpoint, stage_checkpoint, write_staged_checkpoint
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.transformer.optimizer import AdamW
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


def test_our_adamw_of_ones_own_has_a_scheduled_weight_decay(tmp_path):
    config = configuration(weight_decay_schedule="linear", checkpoint_interval=4)
    settings = config.train

    def make(model, weight_decay: float = settings.weight_decay) -> AdamW:
        betas = settings.beta1, settings.beta2
        return AdamW(model.parameters(), betas=betas, eps=settings.eps, weight_decay=weight_decay)

    train(config, TRAIN, VALID, tmp_path / "built-in")
    train(config, TRAIN, VALID, tmp_path / "entire", optimizer=make)
    failure, parts = step_that_fails(7, OverflowError("power failure")), tmp_path / "parts"
    with pytest.raises(OverflowError):
        train(config, TRAIN, VALID, parts, optimizer=make, make_step=failure)
    shutil.copytree(parts, tmp_path / "changed")
    train(config, TRAIN, VALID, parts, optimizer=make, resume=True)
    stronger = partial(make, weight_decay=9.0)
    train(config, TRAIN, VALID, tmp_path / "changed", optimizer=stronger, resume=True)
    name = "model.lm_head.weight"
    weight = saved(tmp_path / "built-in", 8)[name]
    assert torch.equal(saved(tmp_path / "entire", 8)[name], weight)
    assert torch.equal(saved(parts, 8)[name], weight)
    assert not torch.equal(saved(tmp_path / "changed", 8)[name], weight)


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
    with pytest.raises(InvalidInputError, match=r"LBFGS computes the loss itself, .*'closure'.*; use an optimizer"):
        train(
            configuration(), TRAIN, VALID, tmp_path / "l", optimizer=lambda model: torch.optim.LBFGS(model.parameters())
        )
    with pytest.raises(InvalidInputError, match="resumed and overwritten"):
        train(configuration(), TRAIN, VALID, tmp_path / "run", optimizer=momentum, resume=True, overwrite=True)


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def torch_adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def our_adamw(model) -> torch.optim.Optimizer:
    return AdamW(model.parameters())


OTHERS = [
    (momentum, torch_adamw, "CountingSGD", "torch.AdamW"),
    (momentum, None, "CountingSGD", "basic.AdamW"),
    (sgd, torch_adamw, "torch.SGD", "torch.AdamW"),
    (our_adamw, sgd, "basic.AdamW", "torch.SGD"),
    (torch_adamw, our_adamw, "torch.AdamW", "basic.AdamW"),
]


@pytest.mark.parametrize(("first", "second", "saved_class", "own_class"), OTHERS)
def test_a_run_is_not_resumed_with_another_optimizer(tmp_path, first, second, saved_class, own_class):
    config, folder = configuration(checkpoint_interval=4), tmp_path / "run"
    step_fails = step_that_fails(7, OverflowError("power failure"))
    with pytest.raises(OverflowError):
        train(config, TRAIN, VALID, folder, optimizer=first, make_step=step_fails)
    message = rf"it has the state of {saved_class}, but this is {own_class}; .*the optimizer that it began with"
    with pytest.raises(InvalidInputError, match=message):
        train(config, TRAIN, VALID, folder, optimizer=second, resume=True)
    assert train(config, TRAIN, VALID, folder, optimizer=first, resume=True).step == 8


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (momentum, torch_adamw, "torch.AdamW needs 'betas', but the saved state, .*, has lr, momentum"),
        (our_adamw, sgd, "torch.SGD needs 'momentum', .* has lr, betas, eps"),
        (our_adamw, our_adamw, None),
        (torch_adamw, torch_adamw, None),
        (momentum, sgd, None),
    ],
)
def test_a_checkpoint_that_does_not_name_its_optimizer_is_known_by_its_settings(first, second, message):
    """As those of version 0.1.0."""
    model = torch.nn.Linear(2, 2)
    staged, file = stage_checkpoint(model, first(model), 3), io.BytesIO()
    document = json.loads(staged.document)
    del document["optimizer_class"]
    write_staged_checkpoint(staged._replace(document=json.dumps(document)), file)
    file.seek(0)
    if message is None:
        assert load_checkpoint(file, model, second(model)) == 3
        return
    with pytest.raises(InvalidInputError, match=message):
        load_checkpoint(file, model, second(model))
