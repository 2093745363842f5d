"""When checkpoints are saved, which are kept, and what a disk that fails does to them."""

import math
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from basic.common.files import sha256_of_file
from basic.model import TransformerLM
from basic.training.checkpoints.file import read_checkpoint, save_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.loop import make_optimizer, train
from basic.training.records.log import NullLog
from basic.training.records.metrics import read_records
from basic.training.run_folder import load_run
from basic.training.saving import RETRY_S, CheckpointManager, RunProgress
from basic.training.step import TrainStep
from tests.helpers.fault_tools import TRAIN, VALID, checkpoint_names, configuration, poisoned_step

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


def test_a_milestone_is_saved_though_another_checkpoint_is_still_being_written(tmp_path, monkeypatch):
    """At a later step it would be no milestone."""
    may_write, save_file = threading.Event(), safetensors.torch.save_file

    def save_late(*arguments):
        may_write.wait(20)
        save_file(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", save_late)
    config = configuration(checkpoint_interval=1, milestone_interval=3, checkpoints_kept=1)
    model = TransformerLM(config.model)
    save = partial(CheckpointManager.save, model=model, optimizer=make_optimizer(model, config.train))
    with CheckpointManager(tmp_path, config.train, NullLog()) as checkpoints:
        save(checkpoints, progress=RunProgress(1))
        assert not checkpoints.is_due(2, None)
        assert checkpoints.is_due(3, None)
        may_write.set()
        save(checkpoints, progress=RunProgress(3))
        save(checkpoints, progress=RunProgress(4))
    assert checkpoint_names(tmp_path) == ["step_00000003.safetensors", "step_00000004.safetensors"]


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
