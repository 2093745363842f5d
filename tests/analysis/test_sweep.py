"""Sweeps: which runs a file asks for, and that each is trained once, whatever happens meanwhile."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import basic.analysis.sweep
from basic.analysis.evaluation import score_tokens
from basic.analysis.sweep import Data, Outcome, outcome_table, plot_sweep, read_sweep, run_sweep
from basic.common.config_files import load_config, save_config
from basic.model import ModelConfig
from basic.training.run_folder import load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((REPOSITORY / "local" / "experiments").glob("*.toml"))
TOKENS = np.random.default_rng(0).integers(11, size=400).astype(np.uint16)
BASE = RunConfig(
    model=ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2),
    train=TrainConfig(steps=3, batch_size=2, log_interval=1, eval_interval=0, eval_batches=1, device="cpu"),
)


def plan(folder: Path, text: str, **options: Any) -> dict[str, RunConfig]:
    """The runs of a sweep's file with this text, beside base.toml."""
    save_config(BASE, folder / "base.toml")
    (folder / "sweep.toml").write_text('config = "base.toml"\n' + text)
    return {run.name: run.config for run in read_sweep(folder / "sweep.toml", **options)}


# --- Plans ----------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination(tmp_path):
    runs = plan(tmp_path, "[grid]\ntrain.max_learning_rate = [1e-2, 0.5]\ntrain.seed=[3]\nmodel.norm = ['pre', 'none']")
    assert list(runs) == [
        f"max_learning_rate={rate},seed=3,norm={norm}" for rate in ("0.01", "0.5") for norm in ("pre", "none")
    ]
    config = runs["max_learning_rate=0.5,seed=3,norm=none"]
    assert (config.train.max_learning_rate, config.model.norm, config.train.seed) == (0.5, "none", 3)
    assert (config.train.steps, config.model.d_model) == (3, 8)


def test_variants_change_several_settings_together_and_go_before_the_grid(tmp_path):
    text = """
        settings.train.weight_decay = 0.5
        grid.train.max_learning_rate = [0.01]
        variants = [
            { name = "plain" },
            { train.batch_size = 4, train.steps = 7 },
            { name = "slow", train.max_learning_rate = 0.001 , train.weight_decay = 0.25 },
        ]
    """
    runs = plan(tmp_path, text)
    assert [
        (name, config.train.batch_size, config.train.steps, config.train.max_learning_rate, config.train.weight_decay)
        for name, config in runs.items()
    ] == [
        ("plain,max_learning_rate=0.01", 2, 3, 0.01, 0.5),
        ("batch_size=4,steps=7,max_learning_rate=0.01", 4, 7, 0.01, 0.5),
        ("slow", 2, 3, 0.001, 0.25),
    ]


def test_without_grid_or_variants_there_is_one_run(tmp_path):
    assert plan(tmp_path, "") == {"only": BASE}


def test_the_small_edition_takes_the_place_of_what_it_names(tmp_path):
    text = "settings.train.seed = 5\ngrid.train.steps = [10, 20]\n[small]\ngrid.train.steps = [1]\n"
    assert [config.train.steps for config in plan(tmp_path, text).values()] == [10, 20]
    (config,) = plan(tmp_path, text, small=True).values()
    assert (config.train.steps, config.train.seed) == (1, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grit.train.steps = [1]", "unknown key 'grit'; the keys here are config, settings, grid, variants, small"),
        ("[small]\ngrit = 1", "unknown key 'grit'"),
        ("grid.train.step = [1]", "unknown key 'train.step'; the keys here are steps, "),
        ("grid.train.steps = 3", "grid.train.steps must be a list of values to try, got 3"),
        ("grid.train.steps = []", "grid.train.steps must be a list of values"),
        ("grid.train.steps = ['a']", "train.steps must be an integer, got 'a'"),
        ("grid.train.steps = [0]", "steps must be at least 1, got 0"),
        ("grid.train.steps = [1, 1]", "would be called 'steps=1'"),
        ("variants = [{ name = '../x' }]", "would be called '../x'"),
        ("grid = [", "sweep.toml: "),
    ],
)
def test_a_plan_that_cannot_be_is_named_with_its_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"sweep\.toml: ") as caught:
        plan(tmp_path, text)
    assert message in str(caught.value)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"there is no \[small\] edition here; leave --small out"):
        plan(tmp_path, "", small=True)
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(ValueError, match="the key 'config' is missing"):
        read_sweep(tmp_path / "other.toml")
    (tmp_path / "other.toml").write_text("config = 'none.toml'")
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        read_sweep(tmp_path / "other.toml")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_experiments_are_those_of_the_handout(path, small):
    configs = [run.config for run in read_sweep(path, small=small)]
    assert len(configs) >= 8
    tokens = {config.train.steps * config.train.batch_size for config in configs}
    assert max(tokens) < 1.03 * min(tokens)  # as many tokens for each run, or they could not be compared
    models = {(config.model.norm, config.model.positions, config.model.ffn) for config in configs}
    if path.stem == "ablations":
        usual = ("pre", "rope", "swiglu")
        assert models == {
            usual,
            ("none", *usual[1:]),
            ("post", *usual[1:]),
            ("pre", "none", "swiglu"),
            (*usual[:2], "silu"),
        }
        widths = {config.model.d_ff for config in configs if config.model.ffn == "silu"}
        assert widths == {4 * configs[0].model.d_model}
    else:
        assert len(models) == 1


# --- Runs -----------------------------------------------------------------------------------------------------


def open_data(config: DataConfig) -> Data:
    return Data(TOKENS, TOKENS[:100], None)


RATES = "settings.train.min_learning_rate = 0.0\ngrid.train.max_learning_rate = [1e-2, 1e3]\ngrid.model.norm = ['none']"


def sweep(folder: Path, text: str = RATES, **options: Any) -> tuple[list[Outcome], list[str]]:
    plan(folder, text)
    told: list[str] = []
    runs = read_sweep(folder / "sweep.toml")
    return run_sweep(runs, folder / "runs", open_data, report=told.append, **options), told


def test_a_run_that_diverges_is_a_row_of_the_table(tmp_path):
    text = RATES.replace("1e-2, 1e3", "1e-2, 1e30, 2e-2")
    outcomes, told = sweep(tmp_path, text)
    good, bad, after = outcomes
    run = load_run(tmp_path / "runs" / good.name, device="cpu")
    assert good.loss == score_tokens(run.model, TOKENS[:100]).loss
    assert good.tokens == 3 * 2 * 8
    assert bad.loss is None
    assert bad.remark.startswith("diverged: step ")
    assert "\n" not in bad.remark
    assert after.loss is not None
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table == outcome_table(outcomes)
    assert f"| max_learning_rate=1e+30,norm=none | – | – | {bad.tokens:,} | 0 s | diverged: step " in table
    assert [line.split(" ")[0] for line in told] == ["1/3", "2/3", "3/3"]

    runs = read_sweep(tmp_path / "sweep.toml")
    picture = plot_sweep(runs, tmp_path / "runs")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot_sweep(runs, tmp_path / "elsewhere") is None


def test_runs_that_have_ended_are_not_trained_again(tmp_path, monkeypatch):
    text = RATES.replace("1e3", "1e30")
    first, _ = sweep(tmp_path, text)
    monkeypatch.setattr(basic.analysis.sweep, "train", None)
    again, told = sweep(tmp_path, text)
    assert again == first
    assert all(" (known)" in line for line in told)


def test_an_interrupted_run_goes_on_and_the_sweep_with_it(tmp_path, monkeypatch):
    text = "settings.train.checkpoint_interval = 1\ngrid.train.seed = [1, 2]"
    real, calls = basic.analysis.sweep.train, []

    def interrupted(config, *arguments, **settings):
        """Stops the second run behind its second step, as a kill would."""
        calls.append(settings["resume"])
        if config.train.seed == 2 and len(calls) == 2:
            from dataclasses import replace

            real(replace(config, train=replace(config.train, steps=2)), *arguments, **settings)
            save_config(config, arguments[2] / "config.toml")
            raise KeyboardInterrupt
        return real(config, *arguments, **settings)

    monkeypatch.setattr(basic.analysis.sweep, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, text)
    assert (tmp_path / "runs" / "table.md").read_text().count("\n") == 3
    outcomes, _ = sweep(tmp_path, text)
    assert calls == [False, False, True]
    assert all(outcome.loss is not None for outcome in outcomes)
    assert load_run(tmp_path / "runs" / "seed=2", device="cpu").step == 3


def test_a_run_without_any_checkpoint_begins_anew(tmp_path):
    run_dir = tmp_path / "runs" / "only"
    run_dir.mkdir(parents=True)
    save_config(BASE, run_dir / "config.toml")
    (outcome,), _ = sweep(tmp_path, "")
    assert outcome.loss is not None


def test_too_little_memory_is_a_row_too(tmp_path, monkeypatch):
    def train(*arguments, **settings):
        raise MemoryError("batch_size=2 and context_length=8 need too much; lower one of them")

    monkeypatch.setattr(basic.analysis.sweep, "train", train)
    (outcome,), _ = sweep(tmp_path, "")
    assert (outcome.loss, outcome.tokens) == (None, 0)
    assert outcome.remark == "out of memory: batch_size=2 and context_length=8 need too much"


def test_a_loss_above_that_of_guessing_is_remarked(tmp_path):
    (outcome,), _ = sweep(tmp_path, "grid.train.max_learning_rate = [3.0]\nsettings.train.warmup_steps = 0")
    assert outcome.loss is not None
    assert outcome.loss > math.log(11)
    assert outcome.remark == "worse than knowing nothing"


def test_a_folder_with_another_configuration_is_refused_before_anything_is_trained(tmp_path):
    sweep(tmp_path, "grid.train.seed = [1]")
    with pytest.raises(ValueError, match=r"seed=1 holds a run with train\.steps = 3, but now 4 is asked for"):
        sweep(tmp_path, "settings.train.steps = 4\ngrid.train.seed = [0, 1]")
    assert not (tmp_path / "runs" / "seed=0").exists()
    assert load_config(tmp_path / "runs" / "seed=1" / "config.toml", RunConfig).train.steps == 3


def test_data_are_opened_once_for_runs_that_share_them_and_not_for_known_ones(tmp_path):
    plan(tmp_path, "grid.data.train_tokens = ['a', 'b']\ngrid.train.seed = [1, 2]")
    opened = []
    runs = read_sweep(tmp_path / "sweep.toml")
    for _ in range(2):
        run_sweep(runs, tmp_path / "runs", lambda data: opened.append(data.train_tokens) or open_data(data))
    assert opened == ["a", "b"]


def test_the_best_run_is_in_bold():
    outcomes = [
        Outcome(name="a", loss=2.0, tokens=1000, wall_s=1.4),
        Outcome(name="b", loss=1.0, tokens=1000, wall_s=1.6),
        Outcome(name="c", loss=None, tokens=0, wall_s=0.0, remark="diverged"),
    ]
    assert outcome_table(outcomes).splitlines()[2:] == [
        "| a | 2.000 | 7.389 | 1,000 | 1 s | |",
        "| b | **1.000** | 2.718 | 1,000 | 2 s | |",
        "| c | – | – | 0 | 0 s | diverged |",
    ]
    assert json.loads(json.dumps(outcomes[0].__dict__))["name"] == "a"
