"""What `local/train.py` reports for wrong configurations and data: one line with the remedy; nothing is written."""

import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from tests.helpers.scripts import run_script

GOOD = """
[model]
vocab_size = 40
context_length = 8
d_model = 16
num_layers = 1
num_heads = 2

[train]
steps = 2
batch_size = 4
eval_batches = 1
device = "cpu"

[data]
train_tokens = "train.bin"
valid_tokens = "valid.bin"
"""


def write_tokens(name: str, ids: np.ndarray, vocab_size: int = 40) -> None:
    with TokenFileWriter(name, vocab_size) as writer:
        writer.write(ids)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.bin", "valid.bin"):
        write_tokens(name, np.arange(400) % 40)


def error_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return the error of training; it must be one line, and the run folder must not exist."""
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "train", "--config", "run.toml", "--output", "run", *arguments)
    message = ended.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    assert not Path("run/config.toml").exists()
    return message


CONFIGURATIONS = {
    "not TOML": (lambda good: good.replace("[model]", "[model"), r"run\.toml"),
    "not UTF-8": (lambda good: good.replace("vocab_size", "vocab\udcff"), r"run\.toml"),
    "an unknown key": (lambda good: good.replace("d_model", "d_mdoel"), "d_mdoel.*d_model"),
    "a missing key": (lambda good: good.replace("d_model = 16", ""), "d_model"),
    "a text for a number": (lambda good: good.replace("steps = 2", 'steps = "2"'), "steps must be an integer"),
    "no step at all": (lambda good: good.replace("steps = 2", "steps = 0"), "steps must be at least 1, got 0"),
    "heads that do not divide": (lambda good: good.replace("num_heads = 2", "num_heads = 3"), "num_heads=3"),
    "an unknown choice": (lambda good: good.replace("steps = 2", 'steps = 2\non_nonfinite = "ignore"'), "stop.*skip"),
    "an unknown device": (lambda good: good.replace('"cpu"', '"abacus"'), "abacus.*use cpu or auto"),
    "a device without numbers": (lambda good: good.replace('"cpu"', '"meta"'), "meta.*use cpu or auto"),
    "an unknown tracker": (lambda good: good.replace("steps = 2", 'steps = 2\ntrackers = ["x"]'), "wandb"),
    "no checkpoint kept": (lambda good: good.replace("steps = 2", "steps = 2\ncheckpoints_kept = 0"), "at least 1"),
    "micro-batches that do not divide": (
        lambda good: good.replace("steps = 2", "steps = 2\ngradient_accumulation = 3"),
        "batch_size=4 must be divisible by gradient_accumulation=3",
    ),
    "documents without a tokenizer": (
        lambda good: good.replace("steps = 2", 'steps = 2\nrows = "documents"'),
        "needs a tokenizer",
    ),
    "a seed of 65 bits": (lambda good: good.replace("steps = 2", f"steps = 2\nseed = {2**64}"), r"below 2\*\*64"),
    "no data": (lambda good: good.replace('"train.bin"', '""'), r"train_tokens is not set; .*encode\.py"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_wrong_configuration_is_one_line(monkeypatch, name):
    change, expected = CONFIGURATIONS[name]
    Path("run.toml").write_text(change(GOOD), encoding="utf-8", errors="surrogateescape")
    assert re.search(expected, error_of(monkeypatch))


def truncate() -> None:
    Path("train.bin").write_bytes(Path("train.bin").read_bytes()[:-2])


def overwrite(start: int, data: bytes) -> None:
    with open("train.bin", "r+b") as file:
        file.seek(start)
        file.write(data)


DATA: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: Path("train.bin").unlink(), r"train\.bin"),
    "without its sidecar": (lambda: Path("train.json").unlink(), "dtype"),
    "shorter than its sidecar says": (truncate, "400"),
    "with a sidecar that is not JSON": (lambda: Path("train.json").write_text("{"), r"train\.json"),
    "with a sidecar of other fields": (lambda: Path("train.json").write_text('{"a": 1}'), r"train\.json"),
    "of a larger vocabulary": (lambda: write_tokens("train.bin", np.arange(100), 100), "99.*vocab_size"),
    "too short for a sequence": (lambda: write_tokens("train.bin", np.arange(5)), "context_length"),
    "empty": (lambda: write_tokens("train.bin", np.arange(0)), "0"),
    "a folder": (lambda: (Path("train.bin").unlink(), Path("train.bin").mkdir()), r"train\.bin"),
    "a text": (lambda: (shutil.copy("run.toml", "train.bin"), Path("train.json").unlink()), "is a text.*encode"),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data_is_one_line(monkeypatch, name):
    change, expected = DATA[name]
    Path("run.toml").write_text(GOOD)
    change()
    assert re.search(expected, error_of(monkeypatch))


def test_a_context_longer_than_the_text_is_refused_before_steps_are_timed(monkeypatch, capsys):
    Path("run.toml").write_text(GOOD)
    sizes = ("--context-length", "100000", "--steps", "1000000")
    assert "context_length=100000 needs at least 100001" in error_of(monkeypatch, *sizes)
    assert "timing" not in capsys.readouterr().err


def test_token_files_without_a_sidecar_need_a_dtype(monkeypatch):
    Path("run.toml").write_text(GOOD)
    for name in ("train", "valid"):
        Path(f"{name}.json").unlink()
    assert "dtype" in error_of(monkeypatch)
    run_script(monkeypatch, "train", "--config", "run.toml", "--output", "run", "--dtype", "uint16")
    assert list(Path("run/checkpoints").glob("*.safetensors"))


def test_a_wrong_dtype_and_a_damaged_environment_are_one_line(monkeypatch):
    Path("run.toml").write_text(GOOD)
    assert "dtype='int7' is not a type" in error_of(monkeypatch, "--dtype", "int7")
    run_script(monkeypatch, "train", "--config", "run.toml", "--output", "run")
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"starts": [{}]}', "does not describe"),
    ):
        Path("run/environment.json").write_text(content)
        with pytest.raises(SystemExit, match=f"error: .*environment.json.* {message}"):
            run_script(monkeypatch, "train", "--resume", "run", "--steps", 3)


def test_verify_finds_a_changed_byte(monkeypatch):
    Path("run.toml").write_text(GOOD)
    overwrite(0, b"\1")
    assert "the data has changed since it was written; make the token file again" in error_of(monkeypatch, "--verify")


def test_compiling_without_a_compiler_is_one_line_and_the_folder_can_be_used(monkeypatch):
    from torch._inductor import config, cpp_builder

    Path("run.toml").write_text(GOOD)
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path("cache").resolve()))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    cpp_builder.cpp_compiler_search.cache_clear()
    arguments = ["--config", "run.toml", "--output", "run"]
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "train", *arguments, "--compile")
    assert re.fullmatch(
        r"error: compiling failed \(.*No working C\+\+ compiler.*\); install gcc and g\+\+, or train on the CPU .*",
        str(ended.value.code),
    )
    run_script(monkeypatch, "train", *arguments)
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_00000002.safetensors"]


def test_a_tracker_without_a_key_is_one_line_and_the_folder_can_be_used(monkeypatch):
    def init(**settings: object) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

    wandb = types.ModuleType("wandb")
    wandb.__dict__.update(init=init, Html=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Path("run.toml").write_text(GOOD)
    arguments = ["--config", "run.toml", "--output", "run"]
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "train", *arguments, "--trackers", "wandb")
    assert ended.value.code == (
        "error: the tracker wandb failed (api_key not configured (no-tty).); log in (`wandb login`), work without a "
        "network (WANDB_MODE=offline), or leave the tracker out"
    )
    run_script(monkeypatch, "train", *arguments)
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_00000002.safetensors"]


def test_a_tokenizer_of_a_run_and_a_folder_inside_of_a_run(monkeypatch):
    Path("run.toml").write_text(GOOD)
    Tokenizer({i: bytes([i]) for i in range(39)}, [], ["<|endoftext|>"]).save("tok")
    arguments = ["--config", "run.toml", "--output", "first", "--tokenizer"]
    run_script(monkeypatch, "train", *arguments, "tok")
    run_script(monkeypatch, "train", *arguments[:3], "second", "--tokenizer", "first")
    assert Tokenizer.load("second/tokenizer").fingerprint == Tokenizer.load("tok").fingerprint
    for script in ("evaluate", "generate", "report", "plot"):
        with pytest.raises(SystemExit) as ended:
            run_script(monkeypatch, script, "first/checkpoints")
        message = str(ended.value.code)
        assert message.startswith("error: first/checkpoints is not a run: it has no config.toml; did you mean the run")
        assert message.endswith("/first?")
    Path("runs").mkdir()
    Path("first").rename("runs/first")
    for wrong in ("first", "runs"):
        with pytest.raises(SystemExit, match=rf"error: {wrong} is not a run: .*did you mean the run runs/first\?"):
            run_script(monkeypatch, "generate", wrong)
