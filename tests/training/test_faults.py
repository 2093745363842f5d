"""Faults in a run: it is stopped or killed, disks and memory are full, files are damaged, losses are not finite."""

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from basic.bpe.stream_decoder import StreamDecoder
from basic.common.config_files import save_config
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import sha256_of_file
from basic.model import TransformerLM
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.opening import open_tokens
from basic.training.checkpoints.file import load_checkpoint, read_checkpoint, save_checkpoint, write_checkpoint
from basic.training.loop import make_optimizer, train
from basic.training.records.log import NullLog
from basic.training.records.metrics import read_all_records, read_metrics, read_records
from basic.training.run_folder import checkpoint_paths, load_run, load_run_config, open_checkpoint
from basic.training.saving import RETRY_S, CheckpointManager, RunProgress
from basic.training.step import TrainStep
from tests.helpers.fault_tools import TRAIN, VALID, configuration, exit_status, poisoned_step, run_in_fork

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


def checkpoint_names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint_paths(run_dir)]


# --- Resuming -------------------------------------------------------------------------------------------------


def test_a_run_resumed_in_a_new_process_equals_an_uninterrupted_one_to_the_last_bit(tmp_path):
    """Weights, moments, step counts, learning rates and random state, on two threads."""
    kinds: dict[str, dict] = {"plain": {}, "accumulated": {"gradient_accumulation": 4}, "compiled": {"compile": True}}
    if not any(os.access(f"{folder}/c++", os.X_OK) for folder in os.get_exec_path()):
        print("torch.compile on a CPU needs a C++ compiler, and there is no c++ here: left out")
        del kinds["compiled"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}

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
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
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

    class Tokenizer:
        vocab_size, special_token_ids = 40, {"<|endoftext|>": 0}

        def encode(self, text):
            return [0]

        def decode(self, ids):
            return " ".join(map(str, ids))

        def stream_decoder(self):
            return StreamDecoder(lambda ids: self.decode(ids).encode())

        def save(self, directory):
            Path(directory).mkdir()

    settings = {
        "sample_interval": 2,
        "sample_tokens": 3,
        "checkpoint_interval": 3,
        "eval_interval": 0,
        "keep_best": False,
    }
    config, tokenizer = configuration(steps=8, **settings), Tokenizer()
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


# --- Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(tmp_path, number):
    class InterruptedStep(TrainStep):
        count = 0

        def __call__(self, batch, *scheduled, **options):
            InterruptedStep.count += 1
            if InterruptedStep.count == 3:
                signal.raise_signal(number)
            return super().__call__(batch, *scheduled, **options)

    before = signal.getsignal(number)
    config = configuration(steps=6, eval_interval=0)
    train(config, TRAIN, VALID, tmp_path / "uninterrupted")
    message = rf"after step 3 by {number.name}, .* --resume {re.escape(str(tmp_path / 'run'))}$"
    with pytest.raises(KeyboardInterrupt, match=message):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=InterruptedStep)
    assert checkpoint_names(tmp_path / "run") == ["step_00000003.safetensors"]
    train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    expected, tensors = (
        read_checkpoint(checkpoint_paths(tmp_path / name)[-1]).tensors for name in ("uninterrupted", "run")
    )
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_at_once():
    program = """
import signal
from basic.common.stop_signals import StopSignals
with StopSignals() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.received is signal.SIGINT
    signal.raise_signal(signal.SIGTERM)
    print("still running")
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (128 + signal.SIGTERM, "")
    assert "SIGINT: finishing this step and saving; once more to exit at once" in finished.stderr


# --- When checkpoints are saved, and which are kept -------------------------------------------------------------


class RecordingLog(NullLog):
    def __init__(self):
        self.records: list[Any] = []
        self.messages: list[str] = []

    def write(self, record):
        self.records.append(record)

    def print_message(self, text):
        self.messages.append(text)


def save_checkpoints(
    run_dir: Path, valid_losses: dict[int, float] | None = None, *, retry_s: float = RETRY_S, **settings: Any
) -> RecordingLog:
    """Save the checkpoints of a run without training; each save has finished before the next step."""
    (run_dir / "checkpoints").mkdir(parents=True)
    config, log = configuration(**settings), RecordingLog()
    model = TransformerLM(config.model)
    optimizer = make_optimizer(model, config.train)
    with CheckpointManager(run_dir, config.train, log, retry_s=retry_s) as checkpoints:
        for step in range(1, config.train.steps + 1):
            valid_loss, is_last = (valid_losses or {}).get(step), step == config.train.steps
            if checkpoints.is_due(step, valid_loss) or is_last:
                progress = RunProgress(step)
                checkpoints.save(model, optimizer, progress, valid_loss=valid_loss, is_last=is_last)
            while checkpoints.saver.is_busy:
                time.sleep(0.001)
    return log


def test_the_newest_the_best_and_milestones_are_kept(tmp_path):
    settings = {"checkpoint_interval": 3, "milestone_interval": 6, "checkpoint_minutes": 0}
    log = save_checkpoints(tmp_path / "run", {4: 3.0, 8: 1.0, 12: 2.0, 16: 2.5, 20: 2.0}, **settings)
    assert [int(name[5:13]) for name in checkpoint_names(tmp_path / "run")] == [6, 8, 12, 18, 20]
    saved = [record["step"] for record in log.records if record["kind"] == "checkpoint"]
    assert saved == [3, 4, 6, 8, 9, 12, 15, 18, 20]


def test_a_damaged_newest_checkpoint_does_not_cost_the_new_ones(tmp_path):
    config = configuration(steps=8, checkpoint_interval=2, checkpoints_kept=1, eval_interval=0, keep_best=False)
    with pytest.raises(FloatingPointError):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=poisoned_step({3}, math.nan))
    (tmp_path / "run" / "checkpoints" / "step_00000009.safetensors").write_bytes(b"damaged")
    one_more = replace(config, train=replace(config.train, steps=4))
    model = train(one_more, TRAIN, VALID, tmp_path / "run", resume=True).model.state_dict()
    assert checkpoint_names(tmp_path / "run") == ["step_00000004.safetensors"]
    loaded = load_run(tmp_path / "run", device="cpu").model.state_dict()
    assert all(torch.equal(model[name], weight) for name, weight in loaded.items())
    aside = tmp_path / "run" / "checkpoints" / "set_aside_step_00000009.safetensors"
    assert aside.read_bytes() == b"damaged"


def test_the_best_checkpoint_is_known_without_the_log(tmp_path):
    """A power cut may take the log; the loss of each checkpoint is in the checkpoint."""
    losses = {2: 1.0, 4: 2.0}
    save_checkpoints(tmp_path / "run", losses, steps=4, checkpoint_interval=0, checkpoints_kept=1)
    assert checkpoint_names(tmp_path / "run") == ["step_00000002.safetensors", "step_00000004.safetensors"]
    config = configuration(checkpoint_interval=0, checkpoints_kept=1)
    model = TransformerLM(config.model)
    with CheckpointManager(tmp_path / "run", config.train, NullLog()) as checkpoints:
        assert not checkpoints.is_due(6, 1.5)
        checkpoints.save(model, make_optimizer(model, config.train), RunProgress(6), valid_loss=3.0, is_last=True)
    assert checkpoint_names(tmp_path / "run") == ["step_00000002.safetensors", "step_00000006.safetensors"]


def test_the_log_is_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    """A power cut keeps what was synchronized: at each checkpoint's rename, that includes all records before it."""
    log, synchronized, at_checkpoint = tmp_path / "run" / "metrics.jsonl", [0], []
    fsync, replace_file = os.fsync, os.replace

    def record_fsync(descriptor):
        fsync(descriptor)
        if log.exists() and os.path.samestat(os.fstat(descriptor), os.stat(log)):
            synchronized[0] = log.read_text().count('"train_loss"')

    def record_replace(source, target):
        if "step_" in os.path.basename(target):
            at_checkpoint.append((int(Path(target).stem[5:]), synchronized[0]))
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    train(configuration(steps=6, checkpoint_interval=3, eval_interval=0), TRAIN, VALID, tmp_path / "run")
    assert [step for step, _ in at_checkpoint] == [3, 6]
    assert all(count >= step for step, count in at_checkpoint)


def test_wall_time_makes_a_checkpoint_due(tmp_path):
    config = configuration(steps=4, checkpoint_interval=0, eval_interval=0, checkpoint_minutes=1e-9)
    train(config, TRAIN, VALID, tmp_path / "run")
    assert len(read_records(tmp_path / "run" / "metrics.jsonl", "checkpoint")) > 1
    train(replace(config, train=replace(config.train, checkpoint_minutes=0)), TRAIN, VALID, tmp_path / "other")
    assert len(read_records(tmp_path / "other" / "metrics.jsonl", "checkpoint")) == 1


def test_a_checkpoint_written_in_the_background_has_the_state_of_its_step(tmp_path, monkeypatch):
    """The thread waits until training is several steps further, and must not write the later weights."""
    may_write, save_file = threading.Event(), safetensors.torch.save_file

    def save_file_late(tensors, path, metadata):
        if "step_00000002" in str(path):
            may_write.wait(20)
        save_file(tensors, path, metadata)

    class ReleasingStep(TrainStep):
        count = 0

        def __call__(self, batch, *scheduled, **options):
            ReleasingStep.count += 1
            if ReleasingStep.count == 5:
                may_write.set()
            return super().__call__(batch, *scheduled, **options)

    config = configuration(steps=6, checkpoint_interval=2, eval_interval=0, checkpoints_kept=9)
    train(config, TRAIN, VALID, tmp_path / "plain")
    monkeypatch.setattr(safetensors.torch, "save_file", save_file_late)
    train(config, TRAIN, VALID, tmp_path / "late", make_step=ReleasingStep)
    plain, late = (
        read_checkpoint(tmp_path / name / "checkpoints" / "step_00000002.safetensors") for name in ("plain", "late")
    )
    assert all(torch.equal(tensor, late.tensors[name]) for name, tensor in plain.tensors.items())


def test_a_bug_in_the_background_thread_is_raised(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train(configuration(checkpoint_interval=2), TRAIN, VALID, tmp_path / "run")


# --- Disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace", "save_file"])
def test_a_failing_disk_is_a_warning_and_the_save_is_tried_again(tmp_path, monkeypatch, function):
    """The second checkpoint fails; the first one stays, and a later one is saved."""
    owner = safetensors.torch if function == "save_file" else os
    original, calls, remaining = getattr(owner, function), [], []

    def fail(*arguments):
        is_checkpoint = function == "fsync" or "step_" in str(arguments)
        if is_checkpoint and "save" in threading.current_thread().name:
            calls.append(None)
            if len(calls) in (4, 5) if function == "fsync" else len(calls) == 2:
                remaining.extend(checkpoint_names(tmp_path / "run"))
                raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(owner, function, fail)
    log = save_checkpoints(tmp_path / "run", retry_s=0.0, steps=8, checkpoint_interval=3)
    assert "could not be saved ([Errno 28] No space left on device); earlier checkpoints are" in log.messages[0]
    assert "step_00000003.safetensors" in remaining
    assert checkpoint_names(tmp_path / "run")[-1] == "step_00000008.safetensors"
    assert all(read_checkpoint(path).entry("iteration") for path in checkpoint_paths(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_training_continues_when_the_disk_fails(tmp_path, monkeypatch, capsys):
    original = os.replace

    def fail(source, target):
        if "step_00000003" in str(target):
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", fail)
    train(configuration(steps=8, checkpoint_interval=3, eval_interval=0), TRAIN, VALID, tmp_path / "run")
    assert "the checkpoint of step 3 could not be saved ([Errno 28] No space" in capsys.readouterr().err
    assert checkpoint_names(tmp_path / "run")[-1] == "step_00000008.safetensors"


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config, log = configuration(), RecordingLog()
    model = TransformerLM(config.model)
    optimizer = make_optimizer(model, config.train)
    checkpoints = CheckpointManager(tmp_path / "run", config.train, log, retry_s=0.0)
    could_not_be_saved = pytest.raises(OSError, match=r"step 2 could not be saved in 6 tries; make room on the disk")
    with checkpoints, could_not_be_saved:
        checkpoints.save(model, optimizer, RunProgress(2), is_last=True)
    assert len(log.messages) == 6
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_limit_on_the_size_of_files(tmp_path):
    """The kernel enforces the limit like a full disk."""
    resource = pytest.importorskip("resource", reason="this platform does not limit the size of files")
    model = torch.nn.Linear(200, 200)
    save_checkpoint(model, None, 1, tmp_path / "c")
    before = sha256_of_file(tmp_path / "c")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(model, None, 2, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sha256_of_file(tmp_path / "c") == before
    assert os.listdir(tmp_path) == ["c"]


# --- Losses that are not finite, and memory -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_step_stops_the_run_soon_and_nothing_is_saved(tmp_path, value):
    step = poisoned_step(range(7, 99), value)
    config = configuration(checkpoint_interval=6, log_interval=0, eval_interval=0, steps=60, seed=5)
    with pytest.raises(FloatingPointError, match=r"step 7 gave the loss (nan|inf) .* at the learning rate 0.00.*lower"):
        train(config, TRAIN, VALID, tmp_path / "run", make_step=step)
    assert 7 <= step.count < 17
    assert checkpoint_names(tmp_path / "run") == ["step_00000006.safetensors"]
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")
    generator = np.random.default_rng([5, 6])
    assert record["row_starts"] == generator.integers(len(TRAIN) - 32, size=16).tolist()
    assert (record["step"], record["loss"]) == (7, str(value))


def test_nonfinite_steps_are_skipped_up_to_a_maximum(tmp_path, capsys):
    settings = {"steps": 12, "on_nonfinite": "skip", "max_nonfinite_steps": 2, "eval_interval": 0}
    states = []  # after each step

    class RecordingStep(poisoned_step({4, 5}, math.nan)):
        def __call__(self, batch, *scheduled, **options):
            result = super().__call__(batch, *scheduled, **options)
            weights = [parameter.detach().clone() for parameter in self.parameters]
            states.append(weights + [state["step"] for state in self.optimizer.state.values()])
            return result

    train(configuration(**settings), TRAIN, VALID, tmp_path / "run", make_step=RecordingStep)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(states[2], states[4], strict=True))
    assert not torch.equal(states[4][0], states[5][0])
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")] == [4, 5]
    assert all(math.isfinite(r["gradient_norm"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert "skipped, number 2 of at most 2" in capsys.readouterr().err
    assert read_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).entry("extra")["nonfinite_steps"] == 2
    longer = configuration(**{**settings, "steps": 16})
    options: dict[str, Any] = {"resume": True, "make_step": poisoned_step({1}, math.nan)}
    with pytest.raises(FloatingPointError, match=r"step 13 gave .* max_nonfinite_steps above 2"):
        train(longer, TRAIN, VALID, tmp_path / "run", **options)  # the count continues after a resume


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), None])
def test_out_of_memory_says_what_was_tried_and_what_to_lower(tmp_path, error):
    class FailingStep(TrainStep):
        def __call__(self, batch, *scheduled, **options):
            if error is not None:
                raise error
            return torch.empty(1 << 62, dtype=torch.uint8), torch.zeros(())

    expected = r"batch_size = 16, gradient_accumulation = 1, context_length = 32; try gradient_accumulation = 2 for"
    with pytest.raises(MemoryError, match=expected):
        train(configuration(), TRAIN, VALID, tmp_path / "run", make_step=FailingStep)


# --- Damaged and hostile files --------------------------------------------------------------------------------


def damaged_copies(content: bytes, flips: int):
    """The content truncated at every 4 KiB, and with single bits flipped at random."""
    yield from (content[:length] for length in range(0, len(content), 4096))
    generator = random.Random(0)
    for _ in range(flips):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        yield bytes(changed)


def test_damage_to_a_checkpoint_is_always_found(tmp_path):
    model = torch.nn.Linear(50, 60)
    save_checkpoint(model, None, 1, tmp_path / "c")
    for content in damaged_copies((tmp_path / "c").read_bytes(), int(os.environ.get("FLIPS", "100"))):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(DamagedFileError, match="not a complete checkpoint"):
            load_checkpoint(tmp_path / "c", model)
    assert len(content) > 10_000  # several truncations were tried


def test_damage_to_a_token_file_is_always_found(tmp_path):
    with TokenFileWriter(tmp_path / "t.bin", vocab_size=40) as writer:
        writer.write(TRAIN.repeat(4))
    for content in damaged_copies((tmp_path / "t.bin").read_bytes(), int(os.environ.get("FLIPS", "100"))):
        (tmp_path / "t.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.bin has"):
            open_tokens(tmp_path / "t.bin", verify=True)


def test_damage_to_a_configuration_is_always_found(tmp_path):
    """A byte of it decides what the model is; an edited configuration is accepted when its checksum is deleted."""
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    content = path.read_bytes()
    for damaged in damaged_copies(content, int(os.environ.get("FLIPS", "100"))):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"config\.toml has changed .* delete .*checksums\.json"):
            load_run_config(tmp_path / "run")
    path.write_bytes(content.replace(b"seed = 0", b"seed = 5"))
    with pytest.raises(DamagedFileError, match=r"config\.toml has changed"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "checksums.json").unlink()
    assert load_run(tmp_path / "run").config.train.seed == 5


def test_damage_to_the_metrics_is_always_found(tmp_path):
    train(configuration(steps=6, eval_interval=3), TRAIN, VALID, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    content, records = path.read_bytes(), read_all_records(path)
    for damaged in damaged_copies(content, int(os.environ.get("FLIPS", "100"))):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_all_records(path)
        assert all(record in records for record in found)
        # Cut at the end of a line, a file is that of a process that was killed there.
        assert len(found) == len(records) or caught or content.startswith(damaged)
    path.write_bytes(content)
    assert read_all_records(path) == records


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": "one"}', '{"step": -1}', '{"step": true}', '{"step": 1.5}', "{}", "[]", "7", "[" * 100_000),
        *('{"step": 1, "wall_s": "x"}', '{"step": 1, "kind": 3}', '{"step": 1, "tokens": []}', "\xff\xfe"),
    ],
)
def test_lines_of_a_wrong_shape_in_the_metrics_are_left_out_with_a_warning(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: lines .* are left out: 2 \(1 of 3\)"):
        assert read_all_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"starts": 1}', '{"starts": [1]}', '{"starts": [{}]}', "[" * 100_000),
        *('{"starts": [{"train_tokens": {}, "valid_tokens": {}, "tokenizer_fingerprint": null}]}', "{"),
    ],
)
def test_an_environment_of_a_wrong_shape_is_an_error_that_names_the_file(tmp_path, content):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"environment\.json"):
        train(configuration(steps=4), TRAIN, VALID, tmp_path / "run", resume=True)


@pytest.mark.parametrize("version", ["this", "0.1.0"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**9), ("context_length", 10**15), ("vocab_size", 10**12), ("d_model", 2**40), ("d_ff", 10**30)],
)
def test_sizes_are_compared_with_the_checkpoint_before_a_model_is_built(tmp_path, key, value, version):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    (tmp_path / "run" / "checksums.json").unlink()
    config_path, checkpoint_path = tmp_path / "run" / "config.toml", checkpoint_paths(tmp_path / "run")[0]
    text = config_path.read_text()
    config_path.write_text(re.sub(rf"^{key} = \d+$", f"{key} = {value}", text, flags=re.MULTILINE))
    assert config_path.read_text() != text
    if version == "0.1.0":
        checkpoint = read_checkpoint(checkpoint_path)
        del checkpoint.document["extra"]["model"]
        write_checkpoint(checkpoint, checkpoint_path)
    with pytest.raises(InvalidInputError) as caught:
        load_run(tmp_path / "run")
    if version == "this":
        assert f"was saved with model.{key} = " in str(caught.value)


def with_checksum(header: object, data: bytes = b"") -> bytes:
    """A file with this header and a correct checksum: an attack, not an accident."""
    text = json.dumps(header, separators=(",", ":")).encode() if not isinstance(header, bytes) else header
    content = len(text).to_bytes(8, "little") + text + data
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def hostile_file(document: dict, tensor: dict | None = None, data: bytes = bytes(8)) -> bytes:
    template = {"version": 2, "iteration": 1, "model": {}, "model_metadata": None, "optimizer": None, "extra": {}}
    metadata = {"format": "pt", "checkpoint": json.dumps({**template, **document}), "sha256": "0" * 64}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **(tensor or {})}
    return with_checksum({"__metadata__": metadata, "t": entry}, data)


def hostile_view(*view: Any) -> bytes:
    return hostile_file({"model": {"t": {"$tensor": "t", "view": view}}})


HOSTILE = {
    "length beyond the file": b"\xff" * 8 + b"{}",
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + bytes(1000),
    "deep nesting": with_checksum(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"a":' + b"[" * 90_000),
    "offsets beyond the data": hostile_file({}, {"data_offsets": [0, 1 << 60]}),
    "offsets that run backwards": hostile_file({}, {"data_offsets": [8, 0]}),
    "a shape that overflows": hostile_file({}, {"shape": [1 << 62, 1 << 62]}),
    "negative shape": hostile_file({}, {"shape": [-2]}),
    "unknown dtype": hostile_file({}, {"dtype": "PICKLE"}),
    "data that no tensor covers": hostile_file({}, None, bytes(16)),
    "deep document": with_checksum({"__metadata__": {"checkpoint": "[" * 50_000, "sha256": "0" * 64}}),
    "a document that is a list": with_checksum({"__metadata__": {"checkpoint": "[]", "sha256": "0" * 64}}),
    "a view beyond its tensor": hostile_view("float32", [1 << 40], [1], 0),
    "a view before its tensor": hostile_view("float32", [2], [1], -2),
    "a view by strides": hostile_view("float32", [2, 2], [1 << 62, 9], 0),
    "a view of another kind": hostile_view("os.system", [2], [1], 0),
    "a tensor that is not there": hostile_file({"model": {"t": {"$tensor": "../../etc/passwd"}}}),
    "an unknown type": hostile_file({"model": {"$eval": "__import__('os').mkdir('trap')"}}),
    "keys that cannot be keys": hostile_file({"model": {"$dict": [[[1], 2]]}}),
    "pairs that are none": hostile_file({"model": {"$dict": [1, 2]}}),
    "an integer that is none": hostile_file({"iteration": {"$int": {"a": 1}}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Path("c").write_bytes(content)
    with pytest.raises(DamagedFileError, match="is not a complete checkpoint"):
        load_checkpoint("c", model)
    assert os.listdir() == ["c"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pickle_in_a_run_folder_is_refused_without_running(tmp_path):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    trap = tmp_path / "trap"

    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save({"model": Exploit()}, tmp_path / "run" / "checkpoints" / "step_00000009.safetensors")
    with pytest.warns(UserWarning, match="loading a pickle can run code"):
        assert load_run(tmp_path / "run").step == 2
    assert not trap.exists()
