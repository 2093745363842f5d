"""What happens to long runs: they are stopped, killed, run out of disk and memory, and meet numbers that are none."""

import hashlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import basic.training.loop
from basic.common.config_files import save_config
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.opening import open_tokens
from basic.training import saving
from basic.training.checkpoints import background
from basic.training.checkpoints.file import load_checkpoint, read_checkpoint, read_extra, save_checkpoint
from basic.training.loop import train
from basic.training.records.metrics import read_metrics, read_records
from basic.training.run_folder import checkpoint_paths, load_run
from basic.training.step import TrainStep
from tests.helpers.fault_tools import TRAIN, VALID, configuration, poison

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_ALONE = """
import sys, torch
torch.set_num_threads(2)
from pathlib import Path
from basic.common.config_files import load_config
from basic.training.settings import RunConfig
from basic.training.loop import train
from tests.helpers.fault_tools import TRAIN, VALID
for line in sys.argv[1:]:
    config, folder, resume = line.split(":")
    train(load_config(config, RunConfig), TRAIN, VALID, folder, resume=resume == "resume")
"""


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint_paths(run_dir)]


# --- Going on exactly -----------------------------------------------------------------------------------------


def test_ten_steps_and_ten_in_a_new_process_are_twenty_to_the_last_bit(tmp_path):
    """Weights, moments, step counts, learning rates and random state, on two threads."""
    kinds: dict[str, dict] = {"plain": {}, "accumulated": {"gradient_accumulation": 4}, "compiled": {"compile": True}}
    if not any(os.access(f"{folder}/c++", os.X_OK) for folder in os.get_exec_path()):
        print("torch.compile on a CPU needs a C++ compiler, and there is no c++ here: left out")
        del kinds["compiled"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}

    def run_alone(name: str, resume: str) -> None:
        runs = [f"{tmp_path / kind}.toml:{tmp_path / kind / name}:{resume}" for kind in kinds]
        command = [sys.executable, "-c", RUN_ALONE, *runs]
        subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, capture_output=True)

    for kind, settings in kinds.items():
        config = configuration(**settings, checkpoint_interval=10, eval_interval=0, checkpoints_kept=9)
        if kind == "compiled":  # compiling takes time
            config = replace(config, model=replace(config.model, num_layers=1))
        save_config(config, tmp_path / f"{kind}.toml")
    run_alone("whole", "begin")
    for kind in kinds:
        (tmp_path / kind / "parts" / "checkpoints").mkdir(parents=True)
        for name in ("config.toml", "environment.json", "checkpoints/step_00000010.safetensors"):
            (tmp_path / kind / "parts" / name).write_bytes((tmp_path / kind / "whole" / name).read_bytes())
    run_alone("parts", "resume")
    for kind in kinds:
        straight, resumed = (
            read_checkpoint(tmp_path / kind / name / "checkpoints" / "step_00000020.safetensors")
            for name in ("whole", "parts")
        )
        assert straight.tensors.keys() == resumed.tensors.keys()
        assert all(torch.equal(straight.tensors[name], resumed.tensors[name]) for name in straight.tensors), kind
        assert any(name.startswith("optimizer.") for name in straight.tensors)
        for checkpoint in (straight, resumed):
            del checkpoint.document["extra"]["wall_s"]
        assert straight.document == resumed.document


def test_other_data_is_refused_and_another_number_of_threads_is_told(tmp_path, capsys):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"begun with other train_tokens \(2,000 tokens of an array\) than these"):
        train(configuration(steps=4), VALID, VALID, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    record["starts"][0]["threads"] = 77
    (tmp_path / "run" / "environment.json").write_text(json.dumps(record))
    train(configuration(steps=4), TRAIN, VALID, tmp_path / "run", resume=True)
    assert "begun with threads 77, and goes on with 1; set OMP_NUM_THREADS=77" in capsys.readouterr().err
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["code"]["version"] or starts[1]["code"]["commit"]


def test_a_run_that_was_killed_goes_on_and_loses_nothing_it_had_acknowledged(tmp_path):
    script = "import sys; from pathlib import Path; from tests.helpers.fault_tools import *\n"
    script += "print(kill_at_random_moments(Path(sys.argv[1]), 4, 0))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'invalid': 0" in done.stdout
    assert "'step': 0" not in done.stdout


def test_an_invalid_newest_checkpoint_is_told_and_the_one_before_is_taken(tmp_path, capsys):
    config = configuration(steps=4, checkpoint_interval=2, eval_interval=0)
    train(config, TRAIN, VALID, tmp_path / "run")
    expected = checkpoint_paths(tmp_path / "run")[-1].read_bytes()
    damaged = bytearray(expected)
    damaged[len(damaged) // 2] ^= 1
    checkpoint_paths(tmp_path / "run")[-1].write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"step_00000004.* is not a whole checkpoint"):
        assert load_run(tmp_path / "run").step == 2
    train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    assert "step_00000004.safetensors is not a whole checkpoint" in capsys.readouterr().err
    tensors = safetensors.torch.load(checkpoint_paths(tmp_path / "run")[-1].read_bytes())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in safetensors.torch.load(expected).items())
    for path in checkpoint_paths(tmp_path / "run"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 .* is whole"), pytest.warns(UserWarning, match="whole"):
        load_run(tmp_path / "run")


# --- Stopping -------------------------------------------------------------------------------------------------


def signal_in_step(monkeypatch, number: int, signals: list[signal.Signals]) -> None:
    real, steps = TrainStep.__call__, []

    def take_step(*arguments):
        steps.append(None)
        if len(steps) == number:
            for one in signals:
                os.kill(os.getpid(), one)
        return real(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", take_step)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, which):
    before = signal.getsignal(which)
    config = configuration(steps=6, eval_interval=0)
    train(config, TRAIN, VALID, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, [which])
        with pytest.raises(KeyboardInterrupt, match=rf"after step 3 by {which.name}, .* --resume {tmp_path / 'run'}$"):
            train(config, TRAIN, VALID, tmp_path / "run")
    assert names(tmp_path / "run") == ["step_00000003.safetensors"]
    train(config, TRAIN, VALID, tmp_path / "run", resume=True)
    whole, run = (read_checkpoint(checkpoint_paths(tmp_path / name)[-1]).tensors for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    assert signal.getsignal(which) is before


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    script = """
import os, signal, sys
from basic.common.stop_signals import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received is signal.SIGINT
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert "SIGINT: finishing this step and saving; once more to exit at once" in done.stderr


# --- What is kept ---------------------------------------------------------------------------------------------


def test_the_newest_the_best_and_milestones_are_kept(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.0])
    monkeypatch.setattr(basic.training.loop, "mean_loss", lambda *arguments: next(losses))
    monkeypatch.setattr(background.BackgroundSaver, "busy", False)
    config = configuration(checkpoint_interval=3, eval_interval=4, milestone_interval=6, checkpoint_minutes=0)
    train(config, TRAIN, VALID, tmp_path / "run")
    assert [int(name[5:13]) for name in names(tmp_path / "run")] == [6, 8, 12, 18, 20]
    saved = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "checkpoint")]
    assert saved == [3, 4, 6, 8, 9, 12, 15, 18, 20]


def test_wall_time_makes_a_checkpoint_due(tmp_path):
    config = configuration(steps=4, checkpoint_interval=0, eval_interval=0, checkpoint_minutes=1e-9)
    train(config, TRAIN, VALID, tmp_path / "run")
    assert len(read_records(tmp_path / "run" / "metrics.jsonl", "checkpoint")) > 1
    train(replace(config, train=replace(config.train, checkpoint_minutes=0)), TRAIN, VALID, tmp_path / "other")
    assert len(read_records(tmp_path / "other" / "metrics.jsonl", "checkpoint")) == 1


def test_what_is_saved_in_the_background_is_the_state_of_its_step(tmp_path, monkeypatch):
    """The thread is held until training is far ahead; what it writes must not have moved."""
    go, real = threading.Event(), background.write_snapshot

    def late(snapshot, path):
        if "00000002" in str(path):
            go.wait(20)
        real(snapshot, path)

    real_step, steps = TrainStep.__call__, []

    def take_step(*arguments):
        steps.append(None)
        if len(steps) == 5:
            go.set()
        return real_step(*arguments)

    settings = {"checkpoint_interval": 2, "eval_interval": 0, "checkpoints_kept": 9}
    train(configuration(steps=6, **settings), TRAIN, VALID, tmp_path / "plain")
    monkeypatch.setattr(background, "write_snapshot", late)
    monkeypatch.setattr(TrainStep, "__call__", take_step)
    train(configuration(steps=6, **settings), TRAIN, VALID, tmp_path / "late")
    two = [read_checkpoint(tmp_path / name / "checkpoints" / "step_00000002.safetensors") for name in ("plain", "late")]
    assert all(torch.equal(tensor, two[1].tensors[name]) for name, tensor in two[0].tensors.items())


def test_a_mistake_in_the_background_thread_is_raised(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(background, "write_snapshot", fail)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        train(configuration(checkpoint_interval=2), TRAIN, VALID, tmp_path / "run")


# --- Disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace", "write"])
def test_a_failing_disk_is_a_warning_and_is_tried_again(tmp_path, monkeypatch, capsys, function):
    """It fails for the second checkpoint; the run goes on, the first one stays, and a later one is saved."""
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    monkeypatch.setattr(background.BackgroundSaver, "busy", False)
    owner = safetensors.torch if function == "write" else os
    name = "save_file" if function == "write" else function
    real, calls, kept = getattr(owner, name), [], []

    def fail(*arguments):
        is_checkpoint = function == "fsync" or "step_" in str(arguments)
        if is_checkpoint and "save" in threading.current_thread().name:
            calls.append(None)
            if len(calls) in (4, 5) if function == "fsync" else len(calls) == 2:
                kept.extend(names(tmp_path / "run"))
                raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(owner, name, fail)
    train(configuration(steps=8, checkpoint_interval=3, eval_interval=0), TRAIN, VALID, tmp_path / "run")
    assert (
        "could not be saved ([Errno 28] No space left on device); those before are untouched" in capsys.readouterr().err
    )
    assert "step_00000003.safetensors" in kept
    assert names(tmp_path / "run")[-1] == "step_00000008.safetensors"
    assert all(read_checkpoint(path).part("iteration") for path in checkpoint_paths(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error_that_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(
        basic.training.loop, "start_folder", lambda run_dir, *_, **__: (run_dir / "checkpoints").mkdir(parents=True)
    )
    monkeypatch.setattr(basic.training.loop, "add_start", lambda *_: None)
    with pytest.raises(OSError, match=r"step 2 could not be saved in 6 tries; make room on the disk"):
        train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    assert capsys.readouterr().err.count("could not be saved") == 6
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_files_that_may_not_grow(tmp_path):
    """The limit of a process's files, which the kernel enforces as a full disk would."""
    model = torch.nn.Linear(200, 200)
    save_checkpoint(model, None, 1, tmp_path / "c")
    before = hashlib.sha256((tmp_path / "c").read_bytes()).hexdigest()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(model, None, 2, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert hashlib.sha256((tmp_path / "c").read_bytes()).hexdigest() == before
    assert os.listdir(tmp_path) == ["c"]


# --- Numbers that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_the_run_soon_and_nothing_is_saved(tmp_path, monkeypatch, value):
    steps = poison(monkeypatch, set(range(7, 99)), value)
    config = configuration(checkpoint_interval=6, log_interval=0, eval_interval=0, steps=60, seed=5)
    with pytest.raises(FloatingPointError, match=r"step 7 gave the loss (nan|inf) .* at the learning rate 0.00.*lower"):
        train(config, TRAIN, VALID, tmp_path / "run")
    assert 7 <= len(steps) < 17
    assert names(tmp_path / "run") == ["step_00000006.safetensors"]
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")
    generator = np.random.default_rng([5, 6])
    assert record["row_starts"] == generator.integers(len(TRAIN) - 32, size=16).tolist()
    assert (record["step"], record["loss"]) == (7, str(value))


def test_steps_that_are_not_finite_are_left_out_up_to_a_number_of_them(tmp_path, monkeypatch, capsys):
    settings = {"steps": 12, "on_nonfinite": "skip", "max_nonfinite_steps": 2, "eval_interval": 0}
    states = []
    real = TrainStep.__call__

    def take_step(step, *arguments):
        result = real(step, *arguments)
        states.append(
            [p.detach().clone() for p in step.parameters] + [s["step"] for s in step.optimizer.state.values()]
        )
        return result

    poison(monkeypatch, {4, 5}, math.nan)
    monkeypatch.setattr(TrainStep, "__call__", take_step)
    train(configuration(**settings), TRAIN, VALID, tmp_path / "run")
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(states[2], states[4], strict=True))
    assert not torch.equal(states[4][0], states[5][0])
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "nonfinite")] == [4, 5]
    assert all(math.isfinite(r["gradient_norm"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert "skipped, number 2 of at most 2 such steps" in capsys.readouterr().err
    assert read_extra(checkpoint_paths(tmp_path / "run")[-1])["nonfinite_steps"] == 2
    poison(monkeypatch, {1}, math.nan)  # the count is the run's, not the process's
    longer = {**settings, "steps": 16}
    with pytest.raises(FloatingPointError, match=r"step 13 gave .* max_nonfinite_steps above 2"):
        train(configuration(**longer), TRAIN, VALID, tmp_path / "run", resume=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), None])
def test_out_of_memory_says_what_was_tried_and_what_to_lower(tmp_path, monkeypatch, error):
    def step(*arguments):
        if error is not None:
            raise error
        torch.empty(1 << 62, dtype=torch.uint8)

    monkeypatch.setattr(TrainStep, "__call__", step)
    expected = r"batch_size = 16, gradient_accumulation = 1, context_length = 32; try gradient_accumulation = 2 for"
    with pytest.raises(MemoryError, match=expected):
        train(configuration(), TRAIN, VALID, tmp_path / "run")


# --- Damaged and hostile files --------------------------------------------------------------------------------


def damaged(content: bytes, flips: int):
    """The content cut at every 4 KiB, and with single bits turned over at random."""
    yield from (content[:length] for length in range(0, len(content), 4096))
    dice = random.Random(0)
    for _ in range(flips):
        changed = bytearray(content)
        changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        yield bytes(changed)


def test_damage_to_a_checkpoint_is_always_found(tmp_path):
    model = torch.nn.Linear(50, 60)
    save_checkpoint(model, None, 1, tmp_path / "c")
    for content in damaged((tmp_path / "c").read_bytes(), int(os.environ.get("FLIPS", "100"))):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load_checkpoint(tmp_path / "c", model)
    header = (tmp_path / "c").read_bytes()
    assert len(header) > 10_000


def test_damage_to_a_token_file_is_always_found(tmp_path):
    with TokenFileWriter(tmp_path / "t.bin", vocab_size=40) as writer:
        writer.write(TRAIN.repeat(4))
    for content in damaged((tmp_path / "t.bin").read_bytes(), int(os.environ.get("FLIPS", "100"))):
        (tmp_path / "t.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.bin has"):
            open_tokens(tmp_path / "t.bin", verify=True)


def sealed(header: object, data: bytes = b"") -> bytes:
    """A file with this header whose checksum is right: made with intent, not by an accident."""
    text = json.dumps(header, separators=(",", ":")).encode() if not isinstance(header, bytes) else header
    content = len(text).to_bytes(8, "little") + text + data
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def hostile(document: dict, tensor: dict | None = None, data: bytes = bytes(8)) -> bytes:
    whole = {"version": 2, "iteration": 1, "model": {}, "model_metadata": None, "optimizer": None, "extra": {}}
    metadata = {"format": "pt", "checkpoint": json.dumps({**whole, **document}), "sha256": "0" * 64}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **(tensor or {})}
    return sealed({"__metadata__": metadata, "t": entry}, data)


HOSTILE = {
    "length beyond the file": b"\xff" * 8 + b"{}",
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + bytes(1000),
    "deep nesting": sealed(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"a":' + b"[" * 90_000),
    "offsets beyond the data": hostile({}, {"data_offsets": [0, 1 << 60]}),
    "offsets that run backwards": hostile({}, {"data_offsets": [8, 0]}),
    "a shape that overflows": hostile({}, {"shape": [1 << 62, 1 << 62]}),
    "negative shape": hostile({}, {"shape": [-2]}),
    "unknown dtype": hostile({}, {"dtype": "PICKLE"}),
    "data that no tensor covers": hostile({}, None, bytes(16)),
    "deep document": sealed({"__metadata__": {"checkpoint": "[" * 50_000, "sha256": "0" * 64}}),
    "a document that is a list": sealed({"__metadata__": {"checkpoint": "[]", "sha256": "0" * 64}}),
    "a view beyond its tensor": hostile({"model": {"t": {"$tensor": "t", "view": ["float32", [1 << 40], [1], 0]}}}),
    "a view before its tensor": hostile({"model": {"t": {"$tensor": "t", "view": ["float32", [2], [1], -2]}}}),
    "a view by strides": hostile({"model": {"t": {"$tensor": "t", "view": ["float32", [2, 2], [1 << 62, 9], 0]}}}),
    "a view of another kind": hostile({"model": {"t": {"$tensor": "t", "view": ["os.system", [2], [1], 0]}}}),
    "a tensor that is not there": hostile({"model": {"t": {"$tensor": "../../etc/passwd"}}}),
    "an unknown type": hostile({"model": {"$eval": "__import__('os').mkdir('trap')"}}),
    "keys that cannot be keys": hostile({"model": {"$dict": [[[1], 2]]}}),
    "pairs that are none": hostile({"model": {"$dict": [1, 2]}}),
    "an integer that is none": hostile({"iteration": {"$int": {"a": 1}}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Path("c").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        load_checkpoint("c", model)
    assert os.listdir() == ["c"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pickle_in_a_runs_folder_is_refused_without_running(tmp_path):
    train(configuration(steps=2), TRAIN, VALID, tmp_path / "run")
    trap = tmp_path / "trap"

    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save({"model": Exploit()}, tmp_path / "run" / "checkpoints" / "step_00000009.safetensors")
    with pytest.warns(UserWarning, match="loading a pickle can run code"):
        assert load_run(tmp_path / "run").step == 2
    assert not trap.exists()
