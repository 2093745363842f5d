"""The log of a run: its file on a full disk, its line in a terminal and elsewhere, its trackers."""

import builtins
import contextlib
import errno
import io
import json
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import basic.training.records.log
from basic.analysis import accounting
from basic.model import ModelConfig, TransformerLM
from basic.training import devices
from basic.training.records.log import RunLog
from basic.training.records.trackers import check_trackers, named, open_trackers

CPU = torch.device("cpu")


def make_log(
    run_dir: Path, *, total_steps: int = 100, first_step: int = 0, progress: bool = False, **options: Any
) -> RunLog:
    options = {"tokens_a_step": 512, "flops_a_token": 1e6, "device": CPU} | options
    return RunLog(run_dir, total_steps=total_steps, first_step=first_step, progress=progress, **options)


def record(step: int, **more) -> dict:
    return {"step": step, "tokens": 512 * step, "train_loss": 8 / step, "tokens_per_s": 34120.0, **more}


def lines(run_dir: Path) -> list:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]


# --- The file -------------------------------------------------------------------------------------------------


def test_every_record_is_in_the_file_at_once_and_behind_what_was_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with make_log(tmp_path, first_step=1) as log:
        log.write(record(2))
        assert lines(tmp_path) == [{"step": 1}, record(2)]
        log.write({"kind": "sample", "step": 2, "text": 'Zoë said\n"</script>"'})
        assert lines(tmp_path)[2] == {"kind": "sample", "step": 2, "text": 'Zoë said\n"</script>"'}


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    with make_log(tmp_path) as log:
        log.write({"kind": "nonfinite", "step": 3, "loss": float("nan"), "gradient_norm": float("-inf"), "rows": [1]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"kind": "nonfinite", "step": 3, "loss": null, "gradient_norm": null, "rows": [1]}\n'


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes; like the real one, it takes what fits and fails at the next."""

    room_bytes = 0

    def write(self, data) -> int:
        if not FullDisk.room_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: FullDisk.room_bytes]
        FullDisk.room_bytes -= len(part)
        return super().write(part)

    def truncate(self, size=None) -> int:
        before = self.seek(0, io.SEEK_END)
        FullDisk.room_bytes += before - super().truncate(size)
        return self.tell()


@pytest.fixture
def full_disk(monkeypatch) -> type[FullDisk]:
    monkeypatch.setattr(
        basic.training.records.log, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False
    )
    FullDisk.room_bytes = 0
    return FullDisk


def test_a_full_disk_costs_a_warning_and_no_line(tmp_path, capsys, full_disk):
    size_bytes = len(json.dumps(record(1))) + 1
    full_disk.room_bytes = size_bytes + 20
    with make_log(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write(record(step))
            # Never a half line, nor one behind a gap.
            assert lines(tmp_path) == [record(1)]
        assert full_disk.room_bytes == 20
        warnings = capsys.readouterr().err
        assert warnings.count("\n") == 1
        assert re.search(r"warning: .*metrics\.jsonl cannot be written \(.*No space left on device\)", warnings)
        full_disk.room_bytes = 10_000
        log.write(record(5))
        assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4, 5)]
        full_disk.room_bytes = 0
        log.write(record(6))
        assert "cannot be written" in capsys.readouterr().err
        full_disk.room_bytes = 10_000
    assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4, 5, 6)]
    assert capsys.readouterr().err == ""


def test_of_the_lines_that_waited_as_many_are_saved_as_there_is_room_for(tmp_path, full_disk):
    with make_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(record(step))
        full_disk.room_bytes = 2 * (len(json.dumps(record(1))) + 20)
        log.write(record(4))
        assert lines(tmp_path) == [record(1), record(2)]
        full_disk.room_bytes = 10_000
    assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4)]


def test_an_output_on_the_full_disk_does_not_end_the_run_either(tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(FullDisk(tmp_path / "log.txt", "w"), write_through=True))
    with make_log(tmp_path, progress=True) as log:
        log.write(record(1))
        log.message("a message")
        full_disk.room_bytes = 10_000
    assert lines(tmp_path) == [record(1)]


def test_lines_lost_in_the_end_are_counted(tmp_path, capsys, full_disk):
    with make_log(tmp_path) as log:
        log.write(record(1))
        log.write(record(2))
    assert "warning: the last 2 lines" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


# --- The terminal ---------------------------------------------------------------------------------------------


def test_without_progress_nothing_is_printed_but_messages(tmp_path, capsys):
    with make_log(tmp_path) as log:
        log.write(record(1))
        log.step(1)
        log.message("a message")
    assert capsys.readouterr() == ("", "a message\n")


def test_where_nobody_watches_lines_are_few_and_whole(tmp_path, capsys, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(basic.training.records.log.time, "monotonic", lambda: now_s)
    with make_log(tmp_path, first_step=20, progress=True) as log:
        for step in range(21, 101):
            now_s += 0.5
            log.step(step)
            log.write(record(step, **({"valid_loss": 2.5} if step == 100 else {})))
            log.write({"kind": "checkpoint", "step": step})
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    header, *shown = err.splitlines()
    assert header == f"training in {tmp_path}: steps 21 to 100 of 512 tokens each, on cpu"
    assert shown == [
        "step 21/100: loss 0.381, 34.1k tokens/s, 00:39 left",
        "step 41/100: loss 0.195, 34.1k tokens/s, 00:29 left",
        "step 61/100: loss 0.131, 34.1k tokens/s, 00:19 left",
        "step 81/100: loss 0.099, 34.1k tokens/s, 00:09 left",
        "step 100/100: loss 0.080, validation 2.500, 34.1k tokens/s, 00:00 left",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal of a size, and returns one that reads what was written there."""
    termios = pytest.importorskip("termios", reason="needs Unix terminals")
    controller, user = os.openpty()

    def read() -> str:
        os.close(user)
        parts = []
        with contextlib.suppress(OSError):  # which is how a terminal ends whose user has gone
            while part := os.read(controller, 1 << 16):
                parts.append(part)
        return b"".join(parts).decode().replace("\r\n", "\n")

    def make(lines: int, columns: int) -> Callable[[], str]:
        termios.tcsetwinsize(user, (lines, columns))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.FileIO(user, "w", closefd=False), line_buffering=True))
        return read

    yield make
    os.close(controller)


def test_in_a_terminal_one_line_lives_and_messages_stand_above_it(tmp_path, terminal, monkeypatch):
    written = terminal(40, 120)
    monkeypatch.setattr(accounting.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda")
    with make_log(tmp_path, progress=True, device=gpu, flops_a_token=0.25 * 989e12 / 34120) as log:
        log.step(10)
        log.write(record(10, valid_loss=2.5))
        log.message("a checkpoint was saved")
        log.step(40)
        log.write(record(40))
    text = written()
    assert "on NVIDIA H200\n" in text
    assert "a checkpoint was saved\n" in text
    assert text.count("\n") == 3  # the header, the message, and the end of the live line
    last = text.split("\r")[-1]
    assert re.fullmatch(
        r"training 40/100 \|.{20}\| \d\d:\d\d left, loss 0.200, validation 2.500, 34.1k tokens/s, 25.0% MFU *\n", last
    )


def test_in_a_terminal_of_unknown_size_there_are_lines(tmp_path, terminal):
    written = terminal(0, 0)
    with make_log(tmp_path, progress=True) as log:
        log.write(record(10))
    assert "step 10/100: loss 0.800, 34.1k tokens/s, " in written()


def test_training_costs_six_operations_a_weight_and_token_and_attention_over_half_the_context():
    config = ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=3, num_heads=2, d_ff=24)
    weights = 3 * (4 * 16 * 16 + 3 * 16 * 24) + 11 * 16
    expected = 6 * weights + 3 * 3 * (2 * 2 * 8 * 16) / 2
    assert devices.training_flops_a_token(TransformerLM(config)) == expected
    tied = replace(config, tied_embeddings=True)
    assert devices.training_flops_a_token(TransformerLM(tied)) == expected


def test_the_peak_is_known_of_known_gpus_only(monkeypatch):
    assert devices.peak_bf16_flops(CPU) is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100", None), ("Tesla T4", None)):
        monkeypatch.setattr(accounting.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert devices.peak_bf16_flops(torch.device("cuda", 1)) == peak


# --- Trackers -------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """As much of the package as is used, with a memory."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0
        self.Html = lambda text: f"html:{text}"

    def init(self, **options):
        self.inits.append(options)
        return types.SimpleNamespace(
            id=options["id"] or f"id{len(self.inits)}", log=self.logged.append, finish=self.finish,
            define_metric=lambda *arguments, **options: None,
        )  # fmt: skip

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_record_and_a_resumed_run_goes_on_with_its_own(tmp_path, wandb):
    table = {"train": {"steps": 100}}
    with make_log(tmp_path, trackers=["wandb"], config_table=table) as log:
        log.write(record(1))
        log.write({"kind": "sample", "step": 1, "text": "a < b"})
    with make_log(tmp_path, trackers=["wandb"], first_step=1) as log:
        log.write({"kind": "evaluation", "step": 2, "valid_loss": 2.5, "loss": float("nan")})
    with make_log(tmp_path, trackers=["wandb"]):
        pass
    assert wandb.inits[0]["config"] == table
    assert wandb.inits[0]["name"] == tmp_path.name
    assert [options["id"] for options in wandb.inits] == [None, "id1", None]
    assert wandb.logged == [
        record(1),
        {"step": 1, "sample/text": "html:<pre style='white-space: pre-wrap'>a &lt; b</pre>"},
        {"step": 2, "evaluation/valid_loss": 2.5},
    ]
    assert wandb.finished == 3


def test_tensorboard_has_the_same_names(tmp_path):
    reader = "tensorboard.backend.event_processing.event_accumulator"
    EventAccumulator = pytest.importorskip(reader, reason="the tensorboard extra is not installed").EventAccumulator
    records = [record(step) for step in (1, 2)] + [{"kind": "sample", "step": 2, "text": "one\ntwo"}]
    with make_log(tmp_path, trackers=["tensorboard"], config_table={"train": {"steps": 7}}) as log:
        for one in records:
            log.write(one)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    numbers = [(key, one["step"], value) for one in records[:2] for key, value in named(one).items()]
    found = [(key, event.step, event.value) for key in events.Tags()["scalars"] for event in events.Scalars(key)]
    for (key, step, value), (found_key, found_step, found_value) in zip(sorted(numbers), sorted(found), strict=True):
        assert (key, step) == (found_key, found_step)
        assert value == pytest.approx(found_value)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts == {"sample/text/text_summary": "    one\n    two", "config/text_summary": "    train.steps = 7"}


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path, wandb, capsys, monkeypatch):
    def fail(*arguments):
        raise ConnectionError("no server")

    with make_log(tmp_path, trackers=["wandb"]) as log:
        tracker: Any = log._trackers[0]
        monkeypatch.setattr(tracker.run, "log", fail)
        log.write(record(1))
        log.write(record(2))
    assert capsys.readouterr().err == "warning: the tracker Wandb is given up: no server\n"
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_remedy_before_anything_is_made(tmp_path, monkeypatch, name):
    real = builtins.__import__

    def importer(module, *arguments):
        if name in module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", importer)
    with pytest.raises(ValueError, match=f"needs the package of that name.*No module named.*uv run --extra {name} "):
        check_trackers([name])
    with pytest.raises(ValueError, match=f"uv run --extra {name} "), make_log(tmp_path, trackers=[name]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unknown_trackers_are_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="there is no tracker 'mlflow'; choose from wandb, tensorboard"):
        open_trackers(["mlflow"], tmp_path)
