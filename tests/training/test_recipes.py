"""Recipes: settings that follow from a depth or from minutes, by the rules that they state."""

from __future__ import annotations

import math

import pytest
import torch

from basic.common.config_files import from_table, load_config, save_config
from basic.common.errors import InvalidConfigError
from basic.model import ModelConfig, TransformerLM
from basic.training.parallel.devices import matmul_flops_per_s, training_flops_per_token
from basic.training.recipes import depth_for, num_matrix_parameters, recipe_settings, training_flops
from basic.training.settings import RunConfig


@pytest.mark.parametrize("name", ["handout", "modern"])
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 20])
def test_every_depth_is_a_run_that_can_be_saved(name, depth, tmp_path):
    config = from_table(RunConfig, recipe_settings(name, vocab_size=500, depth=depth))
    config.train.check_schedule()
    assert config.model.num_layers == depth
    assert config.train.steps > 0
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml", RunConfig) == config


@pytest.mark.parametrize(("name", "has_gpu"), [("tinystories", True), ("tinystories_low_resource", False)])
def test_handout_at_depth_4_is_the_assignments_run(name, has_gpu):
    assignment = load_config(f"local/configs/{name}.toml", RunConfig)
    config = from_table(RunConfig, recipe_settings("handout", vocab_size=10_000, depth=4, has_gpu=has_gpu))
    assert config.model == assignment.model
    names = ("steps", "batch_size", "max_learning_rate", "min_learning_rate", "optimizer", "rows")
    for name in (*names, "total_warmup_steps") if has_gpu else names:
        assert getattr(config.train, name) == getattr(assignment.train, name), name


@pytest.mark.parametrize(
    ("depth", "head_size", "windows"), [(7, 64, {None}), (8, 128, {256, None}), (9, 64, {256, None})]
)
def test_deep_models_have_windows_and_larger_heads(depth, head_size, windows):
    config = ModelConfig(**recipe_settings("modern", vocab_size=500, depth=depth)["model"])
    assert config.d_head == head_size
    assert {config.window(layer) for layer in range(depth)} == windows
    assert config.window(3) is None


def test_minutes_set_the_depth_and_leave_the_steps_open():
    speed = 1e12
    config = from_table(RunConfig, recipe_settings("modern", vocab_size=500, minutes=2, matmul_flops_per_s=speed))
    assert config.train.minutes == 2
    assert config.train.steps == 0
    depth = config.model.num_layers
    assert training_flops("modern", 500, depth) <= 0.4 * 120 * speed < training_flops("modern", 500, depth + 1)
    with_depth = recipe_settings("modern", vocab_size=500, minutes=2, depth=depth)
    assert from_table(RunConfig, with_depth) == config


def test_depth_grows_with_the_compute():
    depths = [depth_for("modern", 32_768, flops) for flops in (0, 1e12, 1e14, 1e16, 1e18, 1e30)]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] == 64


@pytest.mark.parametrize("depth", [2, 8])  # without windows and with them
def test_operations_are_those_of_the_model(depth):
    tables = recipe_settings("modern", vocab_size=300, depth=depth)
    config = ModelConfig(**tables["model"])
    with torch.device("meta"):
        model = TransformerLM(config)
    ends = model.token_embeddings.weight.numel()
    gains = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert num_matrix_parameters(config) == model.num_parameters - ends - gains
    tokens = tables["train"]["steps"] * tables["train"]["batch_size"] * config.context_length
    assert math.isclose(training_flops("modern", 300, depth), tokens * training_flops_per_token(model))


def test_speed_of_the_device_is_positive():
    assert matmul_flops_per_s(torch.device("cpu")) > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a depth"),
        ({"depth": 0}, "from 1 to 64"),
        ({"depth": 65}, "from 1 to 64"),
        ({"minutes": 0.0}, "above 0"),
    ],
)
def test_wrong_budgets_are_refused(arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        recipe_settings("modern", vocab_size=500, **arguments)
    with pytest.raises(InvalidConfigError, match="handout or modern"):
        recipe_settings("classic", vocab_size=500, depth=2)  # ty: ignore[invalid-argument-type]
