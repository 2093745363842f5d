"""`basic train --recipe`: the recipe's settings are the defaults of a configuration and of the options."""

from __future__ import annotations

import pytest

from basic.commands.train import parse
from basic.common.config_files import from_table
from basic.common.errors import InvalidConfigError, InvalidInputError
from basic.training.recipes import recipe_settings
from basic.training.settings import RunConfig


def parsed(*arguments: str) -> RunConfig:
    return parse([*arguments, "--train-tokens", "t.bin"])[0].run


def test_a_depth_sets_everything():
    run = parsed("--recipe", "modern", "--depth", "3", "--vocab-size", "500")
    assert run.model == from_table(RunConfig, recipe_settings("modern", vocab_size=500, depth=3)).model
    assert run.train == from_table(RunConfig, recipe_settings("modern", vocab_size=500, depth=3)).train
    assert run.data.train_tokens == "t.bin"


def test_options_and_a_configuration_override_the_recipe(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[model]\nvocab_size = 300\ncontext_length = 64\n[train]\nsteps = 7\nwarmup_steps = 2\n")
    options, _ = parse(["--recipe", "modern", "--depth", "2", "--config", str(path), "--beta1", "0.7"])
    model, train = options.run.model, options.run.train
    assert (model.vocab_size, model.context_length, model.ffn, model.num_layers) == (300, 64, "relu2", 2)
    assert (train.steps, train.warmup_steps, train.warmup_share) == (7, 2, None)
    assert (train.beta1, train.optimizer) == (0.7, "muon")
    assert str(options.output) == "runs/my"


def test_without_a_gpu_the_handouts_batches_are_smaller():
    run = parsed("--recipe", "handout", "--depth", "1", "--vocab-size", "500", "--device", "cpu")
    assert (run.train.batch_size, run.train.max_learning_rate) == (32, 1e-3)


def test_a_warm_up_in_steps_replaces_that_of_the_recipe():
    run = parsed("--recipe", "handout", "--depth", "1", "--vocab-size", "500", "--warmup-steps", "7")
    assert (run.train.warmup_steps, run.train.warmup_share) == (7, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = 4", "train must be a table of settings, got 4"),
        ("model = []", r"model must be a table of settings, got \[\]"),
        ("[model]\nvocab_size = 'many'", "model.vocab_size must be an integer, got str: 'many'"),
        ("[train]\nminutes = 'ten'", "train.minutes must be a number, got str: 'ten'"),
        ("[train]\ndevice = 4", "train.device must be a string in quotes, got int: 4"),
    ],
)
def test_a_wrong_configuration_is_named(text, message, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfigError, match=message):
        parse(["--recipe", "modern", "--vocab-size" if "vocab" not in text else "--beta1", "1", "--config", str(path)])


def test_minutes_choose_the_depth_of_this_machine(monkeypatch):
    monkeypatch.setattr("basic.training.parallel.devices.matmul_flops_per_s", lambda device: 1e12)
    run = parsed("--recipe", "modern", "--minutes", "2", "--vocab-size", "500", "--device", "cpu")
    assert run.train.minutes == 2
    assert run.train.steps == 0
    assert run.model.num_layers > 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInputError, match="give --depth"):
        parsed("--recipe", "modern", "--minutes", "2", "--vocab-size", "500")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("--recipe modern --vocab-size 500", InvalidConfigError, "needs a depth"),
        ("--recipe modern --depth 2", InvalidConfigError, "give --tokenizer or --vocab-size"),
        ("--recipe classic --depth 2 --vocab-size 500", InvalidConfigError, "handout or modern, got 'classic'"),
        ("--depth 2 --config small", InvalidInputError, "give --recipe too"),
        ("--recipe modern --resume runs/my", InvalidInputError, "leave --recipe out"),
    ],
)
def test_wrong_uses_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        parse(arguments.split())
