"""Runs that begin with the weights of another model, and checkpoints that are asked for by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from basic.common.errors import InvalidConfigError, InvalidInputError, NotARunError, WrongTokenizerError
from basic.formats.export_model import export_hf
from basic.formats.initial_model import open_initial_model
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from basic.training.loop import train
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run, load_run_config
from basic.training.settings import RunConfig
from tests.helpers.fault_tools import TRAIN, VALID, configuration
from tests.helpers.scripts import run_script

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(40)}, [], pattern=r"[\s\S]")


def weights(model: TransformerLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    config = configuration(steps=6, eval_interval=2, checkpoint_interval=2, checkpoints_kept=9)
    train(config, TRAIN, VALID, folder, tokenizer=TOKENIZER)
    return folder


def test_a_checkpoint_is_loaded_by_its_step_or_as_the_best(base):
    losses = {r["step"]: r["valid_loss"] for r in read_metrics(base / "metrics.jsonl") if "valid_loss" in r}
    assert sorted(losses) == [2, 4, 6]
    runs = {step: load_run(base, checkpoint=step, device="cpu") for step in losses}
    assert [run.step for run in runs.values()] == [2, 4, 6]
    assert not torch.equal(runs[2].model.lm_head.weight, runs[4].model.lm_head.weight)
    assert load_run(base, checkpoint="best", device="cpu").step == min(losses, key=lambda step: losses[step])
    assert load_run(base, device="cpu").step == load_run(base, checkpoint="last", device="cpu").step == 6
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; give one of 2, 4, 6, or leave it out"):
        load_run(base, checkpoint=3, device="cpu")
    with pytest.raises(InvalidInputError, match="must be a step, 'best' or 'last', got 'final'"):
        load_run(base, checkpoint="final", device="cpu")  # ty: ignore[invalid-argument-type]


def test_without_evaluations_there_is_no_best_checkpoint(tmp_path):
    path = tmp_path / "run"
    train(configuration(steps=1, warmup_steps=0), TRAIN, VALID, path)
    best = path / "checkpoints" / "step_00000001.safetensors"
    load_run(path, checkpoint="best", device="cpu")  # the last step is evaluated
    best.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint whose validation loss was measured; give one of none"):
        load_run(path, checkpoint="best", device="cpu")


def test_a_run_begins_with_the_weights_but_not_with_the_optimizer(base, tmp_path):
    initial = open_initial_model(base)
    assert initial.source == str(base / "checkpoints" / "step_00000006.safetensors")
    config = initial.run_config()
    assert (config.model, config.train.init_from) == (load_run_config(base).model, initial.source)
    # Without a learning rate, and without decay, the first step keeps the weights.
    settings = replace(config.train, steps=1, max_learning_rate=0.0, min_learning_rate=0.0, batch_size=4, device="cpu")
    config = replace(config, train=settings)
    run = train(config, TRAIN, VALID, tmp_path / "run", tokenizer=TOKENIZER, init_from=initial.model)
    for name, tensor in weights(run.model).items():
        assert torch.equal(tensor, initial.model.state_dict()[name]), name
    assert load_run_config(tmp_path / "run").train.init_from == initial.source
    # A step equals the first one of a new optimizer, with the schedule at its beginning.
    trained = train(configuration(steps=3), TRAIN, VALID, tmp_path / "a", init_from=load_run(base, device="cpu").model)
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[0]["step"] == 1
    again = train(configuration(steps=3), TRAIN, VALID, tmp_path / "b", init_from=load_run(base, device="cpu").model)
    other = train(configuration(steps=3), TRAIN, VALID, tmp_path / "c")
    assert torch.equal(trained.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(trained.model.lm_head.weight, other.model.lm_head.weight)


def test_the_context_may_be_another_and_nothing_else_of_the_model(base, tmp_path):
    initial = open_initial_model(base / "checkpoints" / "step_00000002.safetensors")
    assert torch.equal(initial.model.lm_head.weight, load_run(base, checkpoint=2, device="cpu").model.lm_head.weight)
    config = configuration(steps=1, warmup_steps=0)
    shorter = replace(config, model=replace(config.model, context_length=5))
    run = train(shorter, TRAIN, VALID, tmp_path / "run", init_from=initial.model)
    assert run.model.config.context_length == 5
    wider = replace(config, model=replace(config.model, d_ff=8))
    with pytest.raises(InvalidConfigError, match=r"was made with model.d_ff = \d+, but this run has 8; leave the"):
        train(wider, TRAIN, VALID, tmp_path / "wider", init_from=initial.model)
    assert not (tmp_path / "wider").exists()


def test_a_stopped_run_that_has_no_checkpoint_needs_its_source_again(base, tmp_path):
    initial = open_initial_model(base)
    config = replace(configuration(steps=3), train=replace(configuration(steps=3).train, init_from=initial.source))
    expected = train(config, TRAIN, VALID, tmp_path / "run", init_from=initial.model)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(InvalidInputError, match=r"begins with the weights of .*; give init_from"):
        train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    resumed = train(config, TRAIN, VALID, tmp_path / "run", resume=True, init_from=initial.model)
    assert torch.equal(resumed.model.lm_head.weight, expected.model.lm_head.weight)


def test_a_configuration_file_may_leave_out_what_the_source_has(base, tmp_path):
    path = tmp_path / "fine.toml"
    path.write_text("[train]\nsteps = 7\nbatch_size = 2\n[model]\ncontext_length = 4\n")
    config = open_initial_model(base).run_config(path)
    assert (config.train.steps, config.train.batch_size, config.model.context_length) == (7, 2, 4)
    assert config.model.vocab_size == configuration(steps=1).model.vocab_size
    assert config.data.tokenizer == str(base / "tokenizer")


@pytest.mark.parametrize("name", ["model", "train", "data"])
def test_a_configuration_file_with_a_number_in_place_of_a_table_is_refused(base, tmp_path, name):
    path = tmp_path / "fine.toml"
    path.write_text(f"{name} = 3\n" + "[train]\nsteps = 7\n" * (name != "train"))
    with pytest.raises(InvalidConfigError, match=rf"fine.toml: {name} must be a table with the keys .*, got int: 3"):
        open_initial_model(base).run_config(path)


def test_another_tokenizer_is_refused(base):
    initial = open_initial_model(base)
    initial.check_tokenizer(TOKENIZER)
    initial.check_tokenizer(None)
    with pytest.raises(WrongTokenizerError, match="was trained with another tokenizer than that of this run"):
        initial.check_tokenizer(Tokenizer({i: bytes([i]) for i in range(39)}, [], pattern=r"[\s\S]"))


def test_a_model_of_transformers_begins_a_run(base, tmp_path):
    export_hf(load_run(base, device="cpu").model, tmp_path / "hf")
    initial = open_initial_model(tmp_path / "hf")
    for name, tensor in weights(initial.model).items():
        assert torch.equal(tensor, load_run(base, device="cpu").model.state_dict()[name]), name
    assert initial.source == str(tmp_path / "hf")
    assert isinstance(initial.run_config(), RunConfig)


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run, checkpoint or model"):
        open_initial_model(tmp_path / "none")
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidInputError, match="is no run, checkpoint of a run, or model folder"):
        open_initial_model(tmp_path / "file")
    with pytest.raises((NotARunError, FileNotFoundError)):
        open_initial_model(tmp_path)


def test_the_script_begins_with_another_runs_weights_and_resumes(base, tmp_path, monkeypatch, capsys):
    for name, tokens in (("train", TRAIN), ("valid", VALID)):
        with TokenFileWriter(tmp_path / f"{name}.bin", 40) as writer:
            writer.write(tokens)
    data = ["--train-tokens", tmp_path / "train.bin", "--valid-tokens", tmp_path / "valid.bin"]
    options = ["--output", tmp_path / "run", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    run_script(monkeypatch, "train", "--init-from", base, *data, *options)
    config = load_run_config(tmp_path / "run")
    assert config.train.init_from == str(base / "checkpoints" / "step_00000006.safetensors")
    assert (config.train.max_learning_rate, config.train.steps) == (1e-4, 2)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    run_script(monkeypatch, "train", "--resume", tmp_path / "run")
    before = load_run(base, device="cpu").model.lm_head.weight
    after = load_run(tmp_path / "run", device="cpu").model.lm_head.weight
    assert 0 < (after - before).abs().max() < 1e-3
    with pytest.raises(SystemExit, match="leave --init-from out"):
        run_script(monkeypatch, "train", "--resume", tmp_path / "run", "--init-from", base)
