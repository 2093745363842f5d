"""Runs that are stopped, resumed, continued with other settings, or end after a time."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from basic.common.config_files import load_config
from basic.common.errors import InvalidConfigError, InvalidInputError, NotARunError
from basic.model import ModelConfig
from basic.training.batches import document_starts
from basic.training.loop import train
from basic.training.records.meter import TimeBudget
from basic.training.records.metrics import read_metrics
from basic.training.settings import MuonConfig, RunConfig
from basic.training.step import TrainStep
from tests.helpers.number_tokenizer import END, NumberTokenizer
from tests.training.test_loop import (
    CONTEXT,
    MEMORY,
    MODEL,
    MODERN,
    TRAIN,
    VALID,
    VOCAB,
    configuration,
    contents,
    saved,
    step_that_fails,
)

# --- Stopping and resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": "windows"},
        {"rows": "documents"},
        {"rows": "shuffled", "optimizer": "muon", "weight_decay_schedule": "linear", "schedule": "trapezoid"},
        MODERN["train"] | {"warmup_steps": None},
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(tmp_path, settings):
    config = configuration(**{**settings, "steps": 8, "batch_size": 4, "checkpoint_interval": 4, "eval_interval": 4})
    if "embedding_rate_factor" in settings:  # the modern recipe
        config = replace(config, model=replace(ModelConfig(**MODERN["model"]), context_length=16))
    train(config, TRAIN, VALID, tmp_path / "uninterrupted", tokenizer=NumberTokenizer(VOCAB))

    failing = step_that_fails(7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config, TRAIN, VALID, tmp_path / "stopped", tokenizer=NumberTokenizer(VOCAB), make_step=failing)
    log = tmp_path / "stopped" / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(log)] == [1, 2, 3, 4, 5, 6]
    with open(log, "a") as file:
        file.write('{"step": 7, "tok')  # what a crash in the middle of a line leaves
    torch.manual_seed(99)
    with pytest.warns(
        UserWarning, match=r"stopped/metrics\.jsonl: lines that are incomplete or damaged .*: 9 \(1 of 9"
    ):
        run = train(config, TRAIN, VALID, tmp_path / "stopped", tokenizer=NumberTokenizer(VOCAB), resume=True)

    assert run.step == 8
    expected, resumed = saved(tmp_path / "uninterrupted", 8), saved(tmp_path / "stopped", 8)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    assert len(expected) >= len(list(run.model.parameters())) * 3  # the optimizer's moments are included
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("uninterrupted", "stopped")]
    assert [record["step"] for record in records[1]] == list(range(1, 9))
    for one, other in zip(*records, strict=True):
        measured = dict.fromkeys(("wall_s", "tokens_per_s", *MEMORY), 0)
        assert one | measured == other | measured
    walls = [record["wall_s"] for record in records[1]]
    assert walls == sorted(walls)


def test_a_finished_run_can_be_resumed_with_more_steps(tmp_path):
    train(configuration(steps=4), TRAIN, VALID, tmp_path / "run")
    longer = configuration(steps=6)
    assert train(longer, TRAIN, VALID, tmp_path / "run", resume=True).step == 6
    assert load_config(tmp_path / "run" / "config.toml", RunConfig) == longer
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (4, InvalidInputError, r"run is finished: it has done its 4 steps; to train .* \(--resume .*run --steps 8\)"),
        (3, InvalidConfigError, r"run has done 4 steps, so it cannot be resumed with steps = 3; give more"),
    ],
)
def test_a_run_cannot_be_resumed_to_as_many_or_fewer_steps_and_is_unchanged(tmp_path, steps, error, message):
    train(configuration(steps=4), TRAIN, VALID, tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        train(configuration(steps=steps), TRAIN, VALID, tmp_path / "run", resume=True)
    assert contents(tmp_path) == before


def test_with_another_batch_size_documents_that_were_not_seen_are_next(tmp_path):
    """The rest of the epoch is seen once, whatever the batch size; all tokens are counted."""
    seen = []

    class RecordingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            seen.extend(map(tuple, batch[0].tolist()))
            return super().__call__(batch, *scheduled, **options)

    options: dict[str, Any] = {"tokenizer": NumberTokenizer(VOCAB), "make_step": RecordingStep}
    config = configuration(rows="documents", steps=5, batch_size=8)
    train(config, TRAIN, VALID, tmp_path / "run", **options)
    for steps, batch_size in ((9, 3), (16, 1)):
        changed = replace(config, train=replace(config.train, steps=steps, batch_size=batch_size))
        train(changed, TRAIN, VALID, tmp_path / "run", resume=True, **options)
    starts = document_starts(TRAIN, END, CONTEXT)
    assert len(seen) == 5 * 8 + 4 * 3 + 7 * 1 == len(starts)
    assert sorted(seen) == sorted(tuple(TRAIN[start : start + CONTEXT].tolist()) for start in starts)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["tokens"] // CONTEXT for record in records] == [8, 16, 24, 32, 40, 43, 46, 49, 52, *range(53, 60)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps": 50, "warmup_steps": 100},
            "the warm-up of 100 steps does not fit into steps = 50, .* --warmup-steps 5,",
        ),
        ({"steps": 4, "warmup_steps": 4}, "the warm-up of 4 steps does not fit into steps = 4, "),
        ({"steps": 4, "warmup_share": 1.0}, "the warm-up of 4 steps does not fit into steps = 4, "),
        (
            {"schedule": "trapezoid", "warmup_steps": 4, "decay_steps": 5},
            "a warm-up of 4 steps and a decay of 5 do not fit into steps = 8",
        ),
    ],
    ids=str,
)
def test_a_warm_up_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, settings, message):
    if "warmup_share" in settings:
        settings = {"warmup_steps": None, **settings}
    with pytest.raises(InvalidConfigError, match=message):
        train(configuration(**settings), TRAIN, VALID, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_steps": None, "steps": 50}, {5: 1.0, 50: 0.1}),
        ({"warmup_steps": None, "steps": 101}, {1: 0.01, 100: 1.0, 101: 0.1}),
        ({"warmup_steps": None, "warmup_share": 0.2, "steps": 50}, {1: 0.1, 10: 1.0, 30: 0.55, 50: 0.1}),
        ({"schedule": "trapezoid", "steps": 40}, {2: 2 / 3, 3: 1.0, 20: 1.0, 30: 0.55, 39: 0.145, 40: 0.1}),
        ({"schedule": "trapezoid", "steps": 40, "decay_steps": 4}, {36: 1.0, 38: 0.55, 40: 0.1}),
        ({"schedule": "trapezoid", "steps": 40, "decay_share": 0.0}, {1: 1 / 3, 4: 1.0, 40: 1.0}),
    ],
    ids=str,
)
def test_schedules_at_their_corners(settings, expected):
    config = configuration(max_learning_rate=1.0, min_learning_rate=0.1, **settings).train
    config.check_schedule()
    assert {step: config.scheduled(step)["learning_rate"] for step in expected} == pytest.approx(expected)


def test_momentum_and_weight_decay_follow_their_schedules():
    muon = MuonConfig(momentum=0.9, first_momentum=0.8, momentum_warmup_steps=4)
    config = configuration(optimizer="muon", muon=muon, weight_decay_schedule="linear").train
    numbers = [config.scheduled(step) for step in (1, 2, 4, 8)]
    assert [each["momentum"] for each in numbers] == pytest.approx([0.825, 0.85, 0.9, 0.9])
    assert [each["weight_decay_factor"] for each in numbers] == pytest.approx([0.875, 0.75, 0.5, 0.0])
    assert configuration().train.scheduled(1).keys() == {"learning_rate"}


@pytest.mark.parametrize(("step_s", "overhead", "expected"), [(0.5, 0.0, 216), (0.5, 0.25, 176), (5.0, 0.0, 36)])
def test_steps_are_planned_after_the_first_timed_ones(step_s, overhead, expected):
    """The first eight steps take a minute more than the others; 100 s are left after the first sixteen."""
    meter: Any = SimpleNamespace(step=0, device=torch.device("cpu"), wall_s=lambda: wall_s)
    budget = TimeBudget(60 + 16 * step_s + 100, meter, overhead)
    wall_s, plans = 60.0, []
    while not any(plans):
        meter.step += 1
        wall_s += step_s
        plans.append(budget.plan())
    assert len(plans) == 16
    assert plans[-1] == expected


def test_too_short_a_time_ends_with_the_next_step():
    meter: Any = SimpleNamespace(step=3, device=torch.device("cpu"), wall_s=lambda: 61.0)
    assert TimeBudget(60, meter).plan() == 4


def test_a_run_in_minutes_saves_its_number_of_steps_and_keeps_it(tmp_path, monkeypatch):
    """The schedule ends with the run, also with one that is stopped and resumed."""
    monkeypatch.setattr(TimeBudget, "plan", lambda budget: 24 if budget.meter.step == 16 else 0)
    config = configuration(steps=0, minutes=30.0, checkpoint_interval=4, eval_interval=0)
    with pytest.raises(KeyboardInterrupt):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=step_that_fails(22, KeyboardInterrupt()))
    planned = load_config(tmp_path / "run" / "config.toml", RunConfig)
    assert planned == replace(config, train=replace(config.train, steps=24))
    run = train(planned, TRAIN, VALID, tmp_path / "run", resume=True)
    assert (run.step, run.config) == (24, planned)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3:16] == pytest.approx([1e-2] * 13)  # until the number of steps is known
    assert rates[16:] == pytest.approx([planned.train.scheduled(step)["learning_rate"] for step in range(17, 25)])
    assert rates[-1] == pytest.approx(1e-3)


def test_a_run_in_minutes_that_was_stopped_before_it_was_planned_is_planned_when_it_is_resumed(tmp_path):
    config = configuration(steps=0, minutes=1 / 60, checkpoint_interval=2, eval_interval=0, warmup_steps=None)
    with pytest.raises(KeyboardInterrupt):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=step_that_fails(5, KeyboardInterrupt()))
    assert load_config(tmp_path / "run" / "config.toml", RunConfig) == config
    run = train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    assert run.step == run.config.train.steps > 5
    assert load_config(tmp_path / "run" / "config.toml", RunConfig) == run.config


def test_a_run_cannot_be_resumed_with_another_model(tmp_path):
    config = configuration(steps=2)
    train(config, TRAIN, VALID, tmp_path / "run")
    for name, before, after in (("num_heads", 2, 4), ("num_kv_heads", None, 1)):  # num_heads does not change any shape
        other = replace(config, model=replace(MODEL, **{name: after}))
        with pytest.raises(
            InvalidConfigError, match=rf"started with model.{name} = {before}, but is to be resumed with {after}"
        ):
            train(other, TRAIN, VALID, tmp_path / "run", resume=True)
    with pytest.raises(InvalidConfigError, match="started with optimizer = adamw, whose state muon cannot continue"):
        train(configuration(steps=4, optimizer="muon"), TRAIN, VALID, tmp_path / "run", resume=True)
    assert load_config(tmp_path / "run" / "config.toml", RunConfig) == config


def test_nothing_to_resume(tmp_path):
    with pytest.raises(NotARunError, match=r"missing is not a run: it has no config\.toml; start one"):
        train(configuration(), TRAIN, VALID, tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()


def test_a_run_without_a_checkpoint_starts_again(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError):
        train(configuration(), TRAIN, VALID, tmp_path / "run", make_step=step_that_fails(3, ZeroDivisionError()))
    train(configuration(), TRAIN, VALID, tmp_path / "run", resume=True)
    assert "run has no checkpoint yet; it starts again at its first step" in capsys.readouterr().err
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_a_far_too_high_learning_rate_raises_floating_point_error(tmp_path):
    with pytest.raises(FloatingPointError):
        train(configuration(max_learning_rate=1e30, steps=20), TRAIN, VALID, tmp_path / "run")
    assert all(math.isfinite(record["train_loss"]) for record in read_metrics(tmp_path / "run" / "metrics.jsonl"))
