"""A run is resumed, or started again in a folder that is not empty."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from basic.common.config_files import save_config
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.encoding import encode_files
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.training.checkpoints.file import read_checkpoint, save_checkpoint, write_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths, open_checkpoint
from basic.training.loop import train
from basic.training.records.environment import describe_environment
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run
from basic.training.step import TrainStep
from tests.helpers.fault_tools import TRAIN, VALID, VOCAB, checkpoint_names, configuration, poisoned_step
from tests.helpers.forks import exit_status, run_in_fork
from tests.helpers.number_tokenizer import NumberTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_PROGRAM = """
import json, sys, torch
torch.set_num_threads(2)
from pathlib import Path
from basic.common.config_files import load_config
from basic.training.settings import RunConfig
from basic.training.loop import train
from tests.helpers.fault_tools import TRAIN, VALID
for config, folder, resume in json.loads(sys.argv[1]):
    train(load_config(config, RunConfig), TRAIN, VALID, folder, resume=resume)
"""


# --- Resuming -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_resumed_in_a_new_process_equals_an_uninterrupted_one_to_the_last_bit(tmp_path):
    """Weights, moments, step counts, learning rates and random state, on two threads."""
    kinds: dict[str, dict] = {"plain": {}, "accumulated": {"gradient_accumulation": 4}, "compiled": {"compile": True}}
    if not any(os.access(f"{folder}/c++", os.X_OK) for folder in os.get_exec_path()):
        print("torch.compile on a CPU needs a C++ compiler, and there is no c++ here: left out")
        del kinds["compiled"]
    # torch.compile shall neither start processes that compile, nor try which vector instructions the compiler knows.
    compiling = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    environment = {**os.environ, **compiling, "OMP_NUM_THREADS": "2"}

    def train_in_a_process(name: str, resume: bool) -> None:
        runs = [[f"{tmp_path / kind}.toml", str(tmp_path / kind / name), resume] for kind in kinds]
        command = [sys.executable, "-c", TRAIN_PROGRAM, json.dumps(runs)]
        subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, capture_output=True)

    for kind, settings in kinds.items():
        config = configuration(**settings, checkpoint_interval=10, eval_interval=0, checkpoints_kept=9)
        if kind == "compiled":  # one layer compiles faster
            config = replace(config, model=replace(config.model, num_layers=1))
        save_config(config, tmp_path / f"{kind}.toml")
    train_in_a_process("uninterrupted", resume=False)
    for kind in kinds:
        (tmp_path / kind / "resumed" / "checkpoints").mkdir(parents=True)
        for name in ("config.toml", "environment.json", "checkpoints/step_00000010.safetensors"):
            (tmp_path / kind / "resumed" / name).write_bytes((tmp_path / kind / "uninterrupted" / name).read_bytes())
    train_in_a_process("resumed", resume=True)
    for kind in kinds:
        uninterrupted, resumed = (
            read_checkpoint(tmp_path / kind / name / "checkpoints" / "step_00000020.safetensors")
            for name in ("uninterrupted", "resumed")
        )
        assert uninterrupted.tensors.keys() == resumed.tensors.keys()
        assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in uninterrupted.tensors.items()), kind
        assert any(name.startswith("optimizer.") for name in uninterrupted.tensors)
        for checkpoint in (uninterrupted, resumed):
            del checkpoint.document["extra"]["wall_s"]
        assert uninterrupted.document == resumed.document


def test_scales_of_fp8_are_saved_and_a_resumed_run_gets_them(tmp_path):
    """A stub of a step in fp8, which a CPU has not; tests/interpreted/check_kernels.py has the steps."""
    given: list[Any] = []

    class Fp8Step(TrainStep):
        @property
        def fp8_scales(self):
            return {"layers.0.ffn.w2": [2.0**-100, 64.0, 2.0**100]}

        @fp8_scales.setter
        def fp8_scales(self, scales):
            given.append(scales)

    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run", make_step=Fp8Step)
    train(configuration(steps=4), TRAIN, VALID, tmp_path / "run", make_step=Fp8Step, resume=True)
    assert given == [None, {"layers.0.ffn.w2": [2.0**-100, 64.0, 2.0**100]}]
    train(configuration(steps=6), TRAIN, VALID, tmp_path / "run", resume=True)  # in another precision
    train(configuration(steps=8), TRAIN, VALID, tmp_path / "run", make_step=Fp8Step, resume=True)
    assert given[2:] == [None]


def test_other_data_is_refused_and_another_number_of_threads_is_reported(tmp_path, capsys):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = r"started with other train_tokens \(2,000 tokens of an array\) than these"
    with pytest.raises(InvalidInputError, match=message):
        train(configuration(steps=4), VALID, VALID, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    record["starts"][0]["threads"] = 77
    del record["checksum"]
    (tmp_path / "run" / "environment.json").write_text(json.dumps(record))
    train(configuration(steps=4), TRAIN, VALID, tmp_path / "run", resume=True)
    assert "started with threads 77 and is resumed with 1; set OMP_NUM_THREADS=77" in capsys.readouterr().err
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["code"]["version"] or starts[1]["code"]["commit"]


def test_an_environment_names_a_dataset_wherever_the_run_was_started(tmp_path, monkeypatch):
    """As it names a token file; a relative name is one in the run folder."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("some text")
    encode_files(Tokenizer({byte: bytes([byte]) for byte in range(256)}, []), "text", "data")
    tokens, device = open_tokens("data"), torch.device("cpu")
    for run_dir, path in (("run", tmp_path.resolve() / "data" / "index.json"), ("data", "index.json")):
        environment = describe_environment(Path(run_dir), tokens, tokens, None, device)
        assert environment["train_tokens"]["path"] == str(path)


def test_damage_to_an_environment_is_found(tmp_path):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"cores": ', b'"cores": 1'))
    with pytest.raises(DamagedFileError, match=r"environment\.json' has changed since it was written"):
        train(configuration(steps=4), TRAIN, VALID, tmp_path / "run", resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
def test_a_killed_run_resumes_and_loses_no_checkpoint_that_it_has_logged(tmp_path):
    program = "import sys; from pathlib import Path; from tests.helpers.fault_tools import kill_at_random_times\n"
    program += "print(kill_at_random_times(Path(sys.argv[1]), 4, 0))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "'incomplete': 0" in finished.stdout
    assert "'step': 0" not in finished.stdout


def test_what_killed_saves_leave_is_removed_by_the_next_one_or_when_the_run_is_resumed(tmp_path):
    run_dir, model = tmp_path / "run", torch.nn.Linear(2, 2)
    train(configuration(steps=2), TRAIN, VALID, run_dir)
    (path,) = checkpoint_paths(run_dir)

    def write_and_end(tensors, file, metadata):
        (Path(file).parent / ".tmpAbCdEf").touch()  # as safetensors does
        os._exit(9)

    def save_and_end(target: Path) -> None:
        safetensors.torch.save_file = write_and_end  # ty: ignore[invalid-assignment]
        save_checkpoint(model, None, 0, target)

    for target in (path, path.with_name("step_00000099.safetensors")):
        assert exit_status(run_in_fork(save_and_end, target)) == 9
        assert len(list(path.parent.iterdir())) > 1
        if target == path:
            write_checkpoint(read_checkpoint(path), path)
        else:
            train(configuration(steps=4, checkpoints_kept=1, keep_best=False), TRAIN, VALID, run_dir, resume=True)
        assert len(list(path.parent.iterdir())) == 1, target


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, capsys):
    config = configuration(steps=4, checkpoint_interval=2, eval_interval=0)
    train(config, TRAIN, VALID, tmp_path / "run")
    newest = checkpoint_paths(tmp_path / "run")[-1]
    expected = newest.read_bytes()
    damaged = bytearray(expected)
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"step_00000004.* is not a complete checkpoint"):
        assert load_run(tmp_path / "run").step == 2
    train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    assert "step_00000004.safetensors is not a complete checkpoint" in capsys.readouterr().err
    tensors = safetensors.torch.load(newest.read_bytes())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in safetensors.torch.load(expected).items())
    for path in checkpoint_paths(tmp_path / "run"):
        path.write_bytes(b"")
    none_is_complete = pytest.raises(DamagedFileError, match=r"none of the 2 .* is complete")
    with none_is_complete, pytest.warns(UserWarning, match="is not a complete checkpoint"):
        load_run(tmp_path / "run")


def test_a_run_is_written_by_one_process(tmp_path):
    """While a run trains, it can neither be resumed, nor overwritten, nor be started a second time."""
    config = configuration(steps=2, eval_interval=0)
    refused = []

    class Step(TrainStep):
        def __call__(self, batch, *scheduled, **others):
            if not refused:
                before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
                choices: list[dict[str, Any]] = [{"resume": True}, {"overwrite": True}, {}]
                for options in choices:
                    with pytest.raises(BlockingIOError, match=rf"run is being written by process {os.getpid()} on "):
                        train(config, TRAIN, VALID, tmp_path / "run", **options)
                    refused.append(options)
                assert {path: path.read_bytes() for path in before} == before
            return super().__call__(batch, *scheduled, **others)

    train(config, TRAIN, VALID, tmp_path / "run", make_step=Step)
    assert len(refused) == 3
    train(replace(config, train=replace(config.train, steps=3)), TRAIN, VALID, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / ".basic.lock").exists()


def test_changed_settings_of_a_resumed_run_are_reported_and_used(tmp_path, capsys):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    train(configuration(steps=4, seed=7, beta2=0.5), TRAIN, VALID, tmp_path / "run", resume=True)
    message = (
        "is resumed with other settings than before: train.steps = 4 instead of 2, train.beta2 = 0.5 instead of 0.95, "
        "train.seed = 7 instead of 0\n"
    )
    assert message in capsys.readouterr().err
    groups = open_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).entry("optimizer")["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.5)] * 2


def test_resuming_rewinds_the_samples_as_it_rewinds_the_metrics(tmp_path):
    """Samples at steps 2, 4, 6, a checkpoint at 3: the samples after it are written once."""

    settings = dict(sample_interval=2, sample_tokens=3, checkpoint_interval=3, eval_interval=0, keep_best=False)
    config, tokenizer = configuration(steps=8, **settings), NumberTokenizer(VOCAB)
    train(config, TRAIN, VALID, tmp_path / "uninterrupted", tokenizer=tokenizer)
    expected = (tmp_path / "uninterrupted" / "samples.txt").read_text()
    assert re.findall(r"--- step (\d+) ---", expected) == ["2", "4", "6", "8"]
    with pytest.raises(FloatingPointError):
        train(config, TRAIN, VALID, tmp_path / "run", tokenizer=tokenizer, make_step=poisoned_step({7}, math.nan))
    for path in checkpoint_paths(tmp_path / "run"):
        if path.name != "step_00000003.safetensors":
            path.unlink()
    assert "--- step 6 ---" in (tmp_path / "run" / "samples.txt").read_text()
    train(config, TRAIN, VALID, tmp_path / "run", tokenizer=tokenizer, resume=True)
    assert (tmp_path / "run" / "samples.txt").read_text() == expected
    # The text of somebody else, such as that of the quickstart, stays.
    (tmp_path / "run" / "samples.txt").write_text("mine\n")
    longer = replace(config, train=replace(config.train, steps=9, sample_interval=0))
    train(longer, TRAIN, VALID, tmp_path / "run", tokenizer=tokenizer, resume=True)
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("mine\n--- step 9 ---")


# --- Starting again -------------------------------------------------------------------------------------------


def test_a_run_without_a_step_may_be_started_again(tmp_path):
    class FailingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            raise OSError("there is no compiler")

    config = configuration(steps=3)
    with pytest.raises(OSError, match="there is no compiler"):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=FailingStep)
    train(config, TRAIN, VALID, tmp_path / "run")
    assert load_run(tmp_path / "run").step == 3
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]) == 1
    with pytest.raises(FileExistsError, match="already contains a run"):
        train(config, TRAIN, VALID, tmp_path / "run")


@pytest.mark.parametrize("removed", range(1, 8))
def test_a_process_killed_while_it_overwrites_a_run_leaves_a_run_to_overwrite(tmp_path, monkeypatch, removed):
    train(configuration(steps=8, checkpoint_interval=4), TRAIN, VALID, tmp_path / "run")
    original, calls = Path.unlink, []

    def unlink(path, *arguments, **options):
        calls.append(path)
        if len(calls) == removed:
            raise KeyboardInterrupt
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        train(configuration(steps=2), TRAIN, VALID, tmp_path / "run", overwrite=True)
    monkeypatch.undo()
    new = train(configuration(steps=2, seed=3), TRAIN, VALID, tmp_path / "run", overwrite=True).model.state_dict()
    loaded = load_run(tmp_path / "run", device="cpu")
    assert loaded.step == 2
    assert all(torch.equal(new[name], weight) for name, weight in loaded.model.state_dict().items())
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_checkpoints_and_records_without_a_configuration_are_set_aside_by_a_new_run(tmp_path):
    train(configuration(steps=8), TRAIN, VALID, tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.warns(UserWarning, match="belongs to no run; it is now set_aside_"):
        train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    assert load_run(tmp_path / "run").step == 2
    assert checkpoint_names(tmp_path / "run") == ["step_00000002.safetensors"]
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    aside = {path.name for path in (tmp_path / "run").rglob("set_aside_*")}
    assert aside == {f"set_aside_{name}" for name in ("step_00000008.safetensors", "metrics.jsonl", "environment.json")}


def test_the_folder_of_a_run_is_moved_while_it_trains(tmp_path, capsys):
    class Step(TrainStep):
        count = 0

        def __call__(self, batch, *scheduled, **options):
            Step.count += 1
            if Step.count == 2:
                (tmp_path / "run").rename(tmp_path / "moved")
            return super().__call__(batch, *scheduled, **options)

    model = train(configuration(steps=3, eval_interval=0), TRAIN, VALID, tmp_path / "run", make_step=Step).model
    folder = tmp_path / "run" / "checkpoints"
    assert f"was moved or removed; checkpoints are now written to a new folder, {folder}: " in capsys.readouterr().err
    (folder / "step_00000003.safetensors").rename(tmp_path / "moved" / "checkpoints" / "step_00000003.safetensors")
    loaded = load_run(tmp_path / "moved", device="cpu").model.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())
