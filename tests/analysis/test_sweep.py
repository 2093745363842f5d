"""Sweeps: the runs that a file describes, and that each is trained once, also after an interruption."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basic.analysis.evaluation import evaluate_tokens
from basic.analysis.plotting import plot_losses
from basic.analysis.sweep import RunResult, SweepData, plot_sweep, read_sweep, result_table, run_sweep
from basic.common.config_files import load_config, save_config
from basic.common.errors import DamagedFileError, InvalidConfigError
from basic.model import ModelConfig
from basic.training.loop import train
from basic.training.recipes import flops_per_token
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run, save_run_config
from basic.training.settings import DataConfig, RunConfig, TrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((REPOSITORY / "local" / "experiments").glob("*.toml"))
TOKENS = np.random.default_rng(0).integers(11, size=400).astype(np.uint16)
BASE = RunConfig(
    model=ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2),
    train=TrainConfig(steps=3, batch_size=2, log_interval=1, eval_interval=0, eval_batches=1, device="cpu"),
)


def read_runs(folder: Path, text: str, **options: Any) -> dict[str, RunConfig]:
    """Write a sweep file with this text beside base.toml, and read its runs."""
    save_config(BASE, folder / "base.toml")
    (folder / "sweep.toml").write_text('config = "base.toml"\n' + text)
    return {run.name: run.config for run in read_sweep(folder / "sweep.toml", **options)}


# --- Sweep files ----------------------------------------------------------------------------------------------


def test_grid_gives_every_combination(tmp_path):
    runs = read_runs(
        tmp_path, "[grid]\ntrain.max_learning_rate = [1e-2, 0.5]\ntrain.seed=[3]\nmodel.norm = ['pre', 'none']"
    )
    assert list(runs) == [
        f"max_learning_rate={rate},seed=3,norm={norm}" for rate in ("0.01", "0.5") for norm in ("pre", "none")
    ]
    config = runs["max_learning_rate=0.5,seed=3,norm=none"]
    assert (config.train.max_learning_rate, config.model.norm, config.train.seed) == (0.5, "none", 3)
    assert (config.train.steps, config.model.d_model) == (3, 8)


def test_variants_change_several_settings_and_override_the_grid(tmp_path):
    text = """
        settings.train.weight_decay = 0.5
        grid.train.max_learning_rate = [0.01]
        variants = [
            { name = "plain" },
            { train.batch_size = 4, train.steps = 7 },
            { name = "slow", train.max_learning_rate = 0.001 , train.weight_decay = 0.25 },
        ]
    """
    runs = read_runs(tmp_path, text)
    assert [
        (name, config.train.batch_size, config.train.steps, config.train.max_learning_rate, config.train.weight_decay)
        for name, config in runs.items()
    ] == [
        ("plain,max_learning_rate=0.01", 2, 3, 0.01, 0.5),
        ("batch_size=4,steps=7,max_learning_rate=0.01", 4, 7, 0.01, 0.5),
        ("slow", 2, 3, 0.001, 0.25),
    ]


def test_one_run_without_grid_and_variants(tmp_path):
    assert read_runs(tmp_path, "") == {"only": BASE}


def test_small_table_replaces_the_keys_it_has(tmp_path):
    text = "settings.train.seed = 5\ngrid.train.steps = [10, 20]\n[small]\ngrid.train.steps = [1]\n"
    assert [config.train.steps for config in read_runs(tmp_path, text).values()] == [10, 20]
    (config,) = read_runs(tmp_path, text, small=True).values()
    assert (config.train.steps, config.train.seed) == (1, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grit.train.steps = [1]", "unknown key 'grit'; the keys here are config, settings, grid, variants, small"),
        ("[small]\ngrit = 1", "unknown key 'grit'"),
        ("grid.train.step = [1]", "unknown key 'train.step'; the keys here are steps, "),
        ("grid.train.steps = 3", "grid.train.steps must be a list of values to try, got 3"),
        ("grid.train.steps = []", "grid.train.steps must be a list of values"),
        ("grid.train.steps = ['a']", "train.steps must be an integer, got str: 'a'"),
        ("grid.train.steps = [0]", "steps must be at least 1, got 0"),
        ("grid.train.steps = [1, 1]", "two runs would be called 'steps=1'"),
        ("variants = [{ name = '../x' }]", "a run would be called '../x', which cannot name a folder"),
        ("grid = [", "sweep.toml: "),
    ],
)
def test_invalid_sweep_file_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(InvalidConfigError, match=r"sweep\.toml: ") as caught:
        read_runs(tmp_path, text)
    assert message in str(caught.value)


def test_missing_keys_and_files_are_errors(tmp_path):
    with pytest.raises(InvalidConfigError, match=r"there is no \[small\] table; omit --small"):
        read_runs(tmp_path, "", small=True)
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(InvalidConfigError, match="the key 'config' is missing"):
        read_sweep(tmp_path / "other.toml")
    (tmp_path / "other.toml").write_text("config = 'none.toml'")
    message = r"there is no sweep '.*absent\.toml'; give a TOML file, or the name of an included"
    with pytest.raises(FileNotFoundError, match=message):
        read_sweep(tmp_path / "absent.toml")
    with pytest.raises(FileNotFoundError, match=r"there is no configuration '.*none\.toml'; give"):
        read_sweep(tmp_path / "other.toml")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_of_the_repository_match_the_assignment(path, small):
    runs = read_sweep(path, small=small)
    configs = [run.config for run in runs]
    assert len(configs) >= 8
    if path.stem == "isoflop":  # equal computes instead, which are in the names
        for run in runs:
            tokens = run.config.train.steps * run.config.train.batch_size * run.config.model.context_length
            assert tokens * flops_per_token(run.config.model) == pytest.approx(float(run.name.split()[1]), rel=0.06)
        return
    tokens = {config.train.steps * config.train.batch_size for config in configs}
    assert max(tokens) < 1.03 * min(tokens)  # equal token budgets make runs comparable
    models = {(config.model.norm, config.model.positions, config.model.ffn) for config in configs}
    if path.stem == "ablations":
        baseline = ("pre", "rope", "swiglu")
        assert models == {
            baseline,
            ("none", *baseline[1:]),
            ("post", *baseline[1:]),
            ("pre", "none", "swiglu"),
            (*baseline[:2], "silu"),
        }
        widths = {config.model.d_ff for config in configs if config.model.ffn == "silu"}
        assert widths == {4 * configs[0].model.d_model}
    elif path.stem != "architecture":
        assert len(models) == 1


# --- Runs -----------------------------------------------------------------------------------------------------


def open_data(config: DataConfig) -> SweepData:
    return SweepData(TOKENS, TOKENS[:100], None)


RATES = "settings.train.min_learning_rate = 0.0\ngrid.train.max_learning_rate = [1e-2, 1e3]\ngrid.model.norm = ['none']"


def sweep(folder: Path, text: str = RATES, **options: Any) -> tuple[list[RunResult], list[str]]:
    read_runs(folder, text)
    lines: list[str] = []
    runs = read_sweep(folder / "sweep.toml")
    return run_sweep(runs, folder / "runs", open_data, report=lines.append, **options), lines


def test_diverged_run_has_a_row_in_the_table(tmp_path):
    text = RATES.replace("1e-2, 1e3", "1e-2, 1e30, 2e-2")
    results, lines = sweep(tmp_path, text)
    good, bad, after = results
    run = load_run(tmp_path / "runs" / good.name, device="cpu")
    assert good.loss == evaluate_tokens(run.model, TOKENS[:100]).loss
    assert good.tokens == 3 * 2 * 8
    assert bad.loss is None
    assert bad.remark.startswith("diverged: step ")
    assert "\n" not in bad.remark
    assert after.loss is not None
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table == result_table(results)
    assert f"| max_learning_rate=1e+30,norm=none | – | – | {bad.tokens:,} | 0 s | diverged: step " in table
    assert [line.split(" ")[0] for line in lines] == ["1/3", "2/3", "3/3"]

    runs = read_sweep(tmp_path / "sweep.toml")
    picture = plot_sweep(runs, tmp_path / "runs")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot_sweep(runs, tmp_path / "elsewhere") is None


def test_finished_runs_are_not_trained_again(tmp_path):
    text = RATES.replace("1e3", "1e30")
    first, _ = sweep(tmp_path, text)
    again, lines = sweep(tmp_path, text, train=None)
    assert again == first
    assert all(" (finished earlier)" in line for line in lines)


def test_interrupted_sweep_resumes_the_run_and_continues(tmp_path):
    text = "settings.train.checkpoint_interval = 1\ngrid.train.seed = [1, 2]"
    calls = []

    def interrupted(config, *arguments, **settings):
        """Stop the second run after its second step, as a signal would."""
        calls.append(settings["resume"])
        if config.train.seed == 2 and len(calls) == 2:
            from dataclasses import replace

            train(replace(config, train=replace(config.train, steps=2)), *arguments, **settings)
            save_run_config(arguments[2], config)
            raise KeyboardInterrupt
        return train(config, *arguments, **settings)

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, text, train=interrupted)
    assert (tmp_path / "runs" / "table.md").read_text().count("\n") == 3
    results, _ = sweep(tmp_path, text, train=interrupted)
    assert calls == [False, False, True]
    assert all(result.loss is not None for result in results)
    assert load_run(tmp_path / "runs" / "seed=2", device="cpu").step == 3


def test_run_without_checkpoint_starts_again(tmp_path):
    run_dir = tmp_path / "runs" / "only"
    run_dir.mkdir(parents=True)
    save_config(BASE, run_dir / "config.toml")
    (result,), _ = sweep(tmp_path, "")
    assert result.loss is not None


def test_a_sweep_is_trained_by_one_process(tmp_path):
    def train_and_start_again(*arguments, **settings):
        with pytest.raises(BlockingIOError, match=r"runs is being written by process"):
            sweep(tmp_path, "")
        return train(*arguments, **settings)

    (result,), _ = sweep(tmp_path, "", train=train_and_start_again)
    assert result.loss is not None


def test_a_run_that_was_trained_to_its_end_is_only_evaluated(tmp_path):
    """As after a kill between the last step and the evaluation."""
    (first,), _ = sweep(tmp_path, "")
    (tmp_path / "runs" / "only" / "outcome.json").unlink()
    (again,), _ = sweep(tmp_path, "", train=None)
    assert again == first


@pytest.mark.parametrize("name", ["table.md", "loss.png"])
def test_files_of_somebody_else_are_not_replaced(tmp_path, name):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name}' exists and is not "):
        sweep(tmp_path, "", train=None)
    assert (tmp_path / "runs" / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "x", "loss": "1", "tokens": 1, "wall_s": 1.0}'])
def test_a_damaged_result_is_an_error_that_names_the_file(tmp_path, content):
    sweep(tmp_path, "")
    (tmp_path / "runs" / "only" / "outcome.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"outcome\.json"):
        sweep(tmp_path, "", train=None)


def test_the_table_says_which_loss_it_has_and_the_picture_too(tmp_path):
    results, _ = sweep(tmp_path, "")
    assert result_table(results).startswith("| run | loss on all validation tokens (nats per token) | perplexity |")
    runs = read_sweep(tmp_path / "sweep.toml")
    records = read_metrics(tmp_path / "runs" / runs[0].name / "metrics.jsonl")
    plot_losses({"only": records}, tmp_path / "loss.svg", floor_nats=1.0, end_nats=1.25)
    texts = (tmp_path / "loss.svg").read_text()
    assert "validation loss: of sampled sequences (`basic evaluate` and sweeps score every token)" in texts
    assert "entropy of the source, per token of whole documents: 1.000" in texts
    assert "the model at the end, per token of whole documents: 1.250" in texts


def test_out_of_memory_is_a_result(tmp_path):
    def fail(*arguments, **settings):
        raise MemoryError("batch_size=2 and context_length=8 need too much; lower one of them")

    (result,), _ = sweep(tmp_path, "", train=fail)
    assert (result.loss, result.tokens) == (None, 0)
    assert result.remark == "out of memory: batch_size=2 and context_length=8 need too much"


def test_loss_above_log_vocab_size_gets_a_remark(tmp_path):
    (result,), _ = sweep(tmp_path, "grid.train.max_learning_rate = [3.0]\nsettings.train.warmup_steps = 0")
    assert result.loss is not None
    assert result.loss > math.log(11)
    assert result.remark == "worse than knowing nothing"


def test_folder_with_another_configuration_is_an_error_before_training(tmp_path):
    sweep(tmp_path, "grid.train.seed = [1]")
    with pytest.raises(InvalidConfigError, match=r"seed=1 holds a run with train\.steps = 3, but .* train\.steps = 4"):
        sweep(tmp_path, "settings.train.steps = 4\ngrid.train.seed = [0, 1]")
    assert not (tmp_path / "runs" / "seed=0").exists()
    assert load_config(tmp_path / "runs" / "seed=1" / "config.toml", RunConfig).train.steps == 3


def test_data_is_opened_once_for_runs_that_share_it_and_not_for_finished_runs(tmp_path):
    read_runs(tmp_path, "grid.data.train_tokens = ['a', 'b']\ngrid.train.seed = [1, 2]")
    opened = []
    runs = read_sweep(tmp_path / "sweep.toml")
    for _ in range(2):
        run_sweep(runs, tmp_path / "runs", lambda data: opened.append(data.train_tokens) or open_data(data))
    assert opened == ["a", "b"]


def test_best_run_is_bold():
    results = [
        RunResult(name="a", loss=2.0, tokens=1000, wall_s=1.4),
        RunResult(name="b", loss=1.0, tokens=1000, wall_s=1.6),
        RunResult(name="c", loss=None, tokens=0, wall_s=0.0, remark="diverged"),
    ]
    assert result_table(results).splitlines()[2:] == [
        "| a | 2.000 | 7.389 | 1,000 | 1 s | |",
        "| b | **1.000** | 2.718 | 1,000 | 2 s | |",
        "| c | – | – | 0 | 0 s | diverged |",
    ]
    assert json.loads(json.dumps(results[0].__dict__))["name"] == "a"
