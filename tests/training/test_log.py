"""The log of a run: metrics.jsonl on a full disk, progress in a terminal and elsewhere, trackers."""

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

from basic.common.config_files import to_table
from basic.common.errors import InvalidConfigError
from basic.model import ModelConfig, TransformerLM
from basic.training.parallel.devices import PEAK_BF16_FLOPS, training_flops_per_token
from basic.training.records.log import RunLog
from basic.training.records.metrics import encode_record
from basic.training.records.trackers import check_trackers, tracker_values
from basic.training.settings import RunConfig, TrainConfig


def configuration(*trackers: Any) -> RunConfig:
    model = ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=1, num_heads=2)
    return RunConfig(model=model, train=TrainConfig(steps=100, batch_size=64, trackers=trackers))


@pytest.fixture(autouse=True)
def kernels_are_compiled(monkeypatch):
    monkeypatch.setattr("basic.training.records.log.has_objects", lambda module: True)


def make_log(run_dir: Path, config: RunConfig | None = None, *, first_step: int = 0, **options: Any) -> RunLog:
    options = {"flops_per_token": 1e6, "device_name": "cpu"} | options
    return RunLog(run_dir, config or configuration(), first_step=first_step, **options)


def record(step: int, **more) -> dict:
    return {"step": step, "tokens": 512 * step, "train_loss": 8 / step, "tokens_per_s": 34120.0, **more}


def lines(run_dir: Path) -> list:
    """The records, without the checksums of their lines."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "crc32"} for record in records]


# --- The file -------------------------------------------------------------------------------------------------


def test_records_are_appended_and_written_at_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with make_log(tmp_path, first_step=1) as log:
        log.write(record(2))
        assert lines(tmp_path) == [{"step": 1}, record(2)]
        log.write({"kind": "sample", "step": 2, "text": 'Zoë said\n"</script>"'})
        assert lines(tmp_path)[2] == {"kind": "sample", "step": 2, "text": 'Zoë said\n"</script>"'}


def test_nonfinite_numbers_are_written_as_null(tmp_path):
    with make_log(tmp_path) as log:
        log.write({"kind": "nonfinite", "step": 3, "loss": float("nan"), "gradient_norm": float("-inf"), "rows": [1]})
    assert lines(tmp_path) == [{"kind": "nonfinite", "step": 3, "loss": None, "gradient_norm": None, "rows": [1]}]


class FullDisk(io.FileIO):
    """A file on a disk with few free bytes. Like a real one, it writes what fits and fails at the next call."""

    free_bytes = 0

    def write(self, data) -> int:
        if not FullDisk.free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: FullDisk.free_bytes]
        FullDisk.free_bytes -= len(data)
        return super().write(data)

    def truncate(self, size=None) -> int:
        before = self.seek(0, io.SEEK_END)
        FullDisk.free_bytes += before - super().truncate(size)
        return self.tell()


@pytest.fixture
def full_disk(monkeypatch) -> type[FullDisk]:
    real = builtins.open

    def open_file(path, mode="r", *arguments, **options):
        return FullDisk(path, mode) if mode == "ab" else real(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_file)
    FullDisk.free_bytes = 0
    return FullDisk


def test_a_full_disk_causes_one_warning_and_loses_no_line(tmp_path, capsys, full_disk):
    size_bytes = len(encode_record(record(1)))
    full_disk.free_bytes = size_bytes + 20
    with make_log(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write(record(step))
            # There is never an incomplete or a missing line.
            assert lines(tmp_path) == [record(1)]
        assert full_disk.free_bytes == 20
        warnings = capsys.readouterr().err
        assert warnings.count("\n") == 1
        assert re.search(r"warning: .*metrics\.jsonl cannot be written \(.*No space left on device\)", warnings)
        full_disk.free_bytes = 10_000
        log.write(record(5))
        assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4, 5)]
        full_disk.free_bytes = 0
        log.write(record(6))
        assert "cannot be written" in capsys.readouterr().err
        full_disk.free_bytes = 10_000
    assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4, 5, 6)]
    assert capsys.readouterr().err == ""


def test_as_many_kept_lines_are_written_as_fit(tmp_path, full_disk):
    with make_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(record(step))
        full_disk.free_bytes = 2 * len(encode_record(record(1))) + 20
        log.write(record(4))
        assert lines(tmp_path) == [record(1), record(2)]
        full_disk.free_bytes = 10_000
    assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4)]


def test_stderr_on_the_full_disk_does_not_end_the_run(tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(FullDisk(tmp_path / "log.txt", "w"), write_through=True))
    with make_log(tmp_path, progress=True) as log:
        log.write(record(1))
        log.print_message("a message")
        full_disk.free_bytes = 10_000
    assert lines(tmp_path) == [record(1)]


def test_lines_that_are_lost_at_the_end_are_counted(tmp_path, capsys, full_disk):
    with make_log(tmp_path) as log:
        log.write(record(1))
        log.write(record(2))
    assert "warning: the last 2 lines" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


# --- The terminal ---------------------------------------------------------------------------------------------


def test_what_the_first_step_compiles_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("basic.training.records.log.has_objects", lambda module: False)
    with make_log(tmp_path, progress=True):
        pass
    _, line = capsys.readouterr().err.splitlines()
    assert line == "the first step compiles kernels, once on this machine, which no speed includes"


def test_without_progress_only_messages_are_printed(tmp_path, capsys):
    with make_log(tmp_path) as log:
        log.write(record(1))
        log.update_progress(1)
        log.print_message("a message")
    assert capsys.readouterr() == ("", "a message\n")


def test_outside_a_terminal_there_is_a_line_every_ten_seconds(tmp_path, capsys):
    now_s = 0.0
    with make_log(tmp_path, first_step=20, progress=True, clock=lambda: now_s) as log:
        for step in range(21, 101):
            now_s += 0.5
            log.update_progress(step)
            log.write(record(step, **({"valid_loss": 2.5} if step == 100 else {})))
            log.write({"kind": "checkpoint", "step": step})
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    header, *shown = err.splitlines()
    assert header == f"training in {tmp_path}: steps 21 to 100, 512 tokens each, on cpu"
    assert shown == [
        "step 21/100: loss 0.381, 34.1k tokens/s",  # the first step may compile: its time says nothing of the others
        "step 41/100: loss 0.195, 34.1k tokens/s, 00:29 left",
        "step 61/100: loss 0.131, 34.1k tokens/s, 00:19 left",
        "step 81/100: loss 0.099, 34.1k tokens/s, 00:09 left",
        "step 100/100: loss 0.080, validation 2.500, 34.1k tokens/s, 00:00 left",
    ]


def test_outside_a_terminal_slow_steps_show_their_loss_before_the_first_record(tmp_path, capsys):
    now_s = 0.0
    with make_log(tmp_path, progress=True, clock=lambda: now_s) as log:
        for step in range(1, 4):
            now_s += 8
            log.update_progress(step, loss=4 / step)
        now_s = 5000.0
        log.update_progress(4, loss=1.0)
        now_s += 99  # less than a fiftieth of the time since the start
        log.update_progress(5, loss=1.0)
    steps = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert steps == ["step 1/100: loss 4.000", "step 3/100: loss 1.333", "step 4/100: loss 1.000"]


def test_the_mean_of_an_interval_is_told_from_the_loss_of_a_step(tmp_path, capsys):
    now_s = 0.0
    with make_log(tmp_path, progress=True, clock=lambda: now_s) as log:
        for step in (*range(1, 11), 12):
            now_s += 15
            log.update_progress(step, loss=1.0)
            if step % 10 == 0:
                now_s += 15
                log.write(record(step) | {"train_loss": 3.0})
    steps = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert steps[-3:] == ["step 10/100: loss 1.000", "step 10/100: mean loss 3.000", "step 12/100: loss 1.000"]


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal of this size, and returns a function that reads its output."""
    termios = pytest.importorskip("termios", reason="needs Unix terminals")
    controller, user = os.openpty()

    def read() -> str:
        os.close(user)
        output = b""
        with contextlib.suppress(OSError):  # raised at the end of a closed terminal
            while block := os.read(controller, 1 << 16):
                output += block
        return output.decode().replace("\r\n", "\n")

    def make(lines: int, columns: int) -> Callable[[], str]:
        termios.tcsetwinsize(user, (lines, columns))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.FileIO(user, "w", closefd=False), line_buffering=True))
        return read

    yield make
    os.close(controller)


def test_a_terminal_has_one_live_line_with_messages_above_it(tmp_path, terminal):
    written = terminal(40, 120)
    flops_per_token = 0.25 * 989e12 / 34120
    with make_log(tmp_path, progress=True, device_name="NVIDIA H200", flops_per_token=flops_per_token) as log:
        log.update_progress(10)
        log.write(record(10, valid_loss=2.5))
        log.print_message("a checkpoint was saved")
        log.update_progress(40)
        log.write(record(40))
    text = written()
    assert "on NVIDIA H200\n" in text
    assert "a checkpoint was saved\n" in text
    assert text.count("\n") == 4  # the header, that steps are tuned, the message, and the end of the live line
    last = text.split("\r")[-1]
    assert re.fullmatch(
        r"training 40/100 \|.{20}\| \d\d:\d\d left, loss 0.200, validation 2.500, 34.1k tokens/s, 25.0% MFU *\n", last
    )


def test_a_foreign_warning_is_a_line_above_the_live_line(tmp_path, terminal):
    written = terminal(24, 100)
    with make_log(tmp_path, progress=True) as log:
        log.update_progress(1, loss=2.5)
        print("somebody's warning", file=sys.stderr)
        log.update_progress(2, loss=2.25)
    text = written()
    assert "loss 2.250" in text
    before, after = text.split("somebody's warning\n")
    assert before.endswith("\r")  # the live line was erased
    assert after.startswith("\r") or after.startswith("training 1/100")


def test_a_terminal_of_unknown_size_gets_lines(tmp_path, terminal):
    written = terminal(0, 0)
    with make_log(tmp_path, progress=True) as log:
        log.write(record(10))
    assert "step 10/100: mean loss 0.800, 34.1k tokens/s, " in written()


def test_training_flops_are_six_per_weight_and_attention_over_half_the_context():
    config = ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=3, num_heads=2, d_ff=24)
    weights = 3 * (4 * 16 * 16 + 3 * 16 * 24) + 11 * 16
    expected = 6 * weights + 3 * 3 * (2 * 2 * 8 * 16) / 2
    assert training_flops_per_token(TransformerLM(config)) == expected
    tied = replace(config, tied_embeddings=True)
    assert training_flops_per_token(TransformerLM(tied)) == expected


@pytest.mark.parametrize(
    ("name", "num_processes", "mfu"),
    [("NVIDIA H100 80GB HBM3", 1, "50.0% MFU"), ("NVIDIA H100 80GB HBM3", 2, "25.0% MFU"), ("Tesla T4", 1, None)],
)
def test_mfu_is_shown_for_known_gpus_only(tmp_path, capsys, name, num_processes, mfu):
    options: dict[str, Any] = {"device_name": name, "num_processes": num_processes, "progress": True}
    flops_per_token = 0.5 * PEAK_BF16_FLOPS["NVIDIA H100 80GB HBM3"] / 34120
    with make_log(tmp_path, flops_per_token=flops_per_token, **options) as log:
        log.write(record(1))
    shown = capsys.readouterr().err.splitlines()[-1]
    assert (mfu in shown) if mfu else ("MFU" not in shown)


# --- Trackers -------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """The functions of wandb that are used; they record their calls."""

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


def test_wandb_gets_every_record_and_a_resumed_run_continues_the_old_one(tmp_path, wandb):
    config = configuration("wandb")
    with make_log(tmp_path, config) as log:
        log.write(record(1))
        log.write({"kind": "sample", "step": 1, "text": "a < b"})
    with make_log(tmp_path, config, first_step=1) as log:
        log.write({"kind": "evaluation", "step": 2, "valid_loss": 2.5, "loss": float("nan")})
    with make_log(tmp_path, config):
        pass
    assert wandb.inits[0]["config"] == to_table(config)
    assert wandb.inits[0]["name"] == tmp_path.name
    assert [options["id"] for options in wandb.inits] == [None, "id1", None]
    assert wandb.logged == [
        record(1),
        {"step": 1, "sample/text": "html:<pre style='white-space: pre-wrap'>a &lt; b</pre>"},
        {"step": 2, "evaluation/valid_loss": 2.5},
    ]
    assert wandb.finished == 3


def test_tensorboard_gets_the_same_names(tmp_path):
    reader = "tensorboard.backend.event_processing.event_accumulator"
    EventAccumulator = pytest.importorskip(reader, reason="the tensorboard extra is not installed").EventAccumulator
    records = [record(step) for step in (1, 2)] + [{"kind": "sample", "step": 2, "text": "one\ntwo"}]
    with make_log(tmp_path, configuration("tensorboard")) as log:
        for each in records:
            log.write(each)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(key, each["step"], value) for each in records[:2] for key, value in tracker_values(each).items()]
    logged = [(key, event.step, event.value) for key in events.Tags()["scalars"] for event in events.Scalars(key)]
    for (key, step, value), (logged_key, logged_step, logged_value) in zip(
        sorted(expected), sorted(logged), strict=True
    ):
        assert (key, step) == (logged_key, logged_step)
        assert value == pytest.approx(logged_value)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts.keys() == {"sample/text/text_summary", "config/text_summary"}
    assert texts["sample/text/text_summary"] == "    one\n    two"
    assert "    train.steps = 100" in texts["config/text_summary"].split("\n")


def test_a_tracker_that_fails_is_dropped_and_the_run_continues(tmp_path, wandb, capsys, monkeypatch):
    def fail(*arguments):
        raise ConnectionError("no server")

    with make_log(tmp_path, configuration("wandb")) as log:
        tracker: Any = log._trackers[0]
        monkeypatch.setattr(tracker.run, "log", fail)
        log.write(record(1))
        log.write(record(2))
    assert capsys.readouterr().err == "warning: the tracker Wandb failed and gets no more records: no server\n"
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(monkeypatch, name):
    real = builtins.__import__

    def importer(module, *arguments):
        if name in module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", importer)
    with pytest.raises(
        InvalidConfigError, match=f"needs the package of that name.*No module named.*uv run --extra {name} "
    ):
        check_trackers([name])
