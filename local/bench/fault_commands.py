"""The commands that faults.py disturbs: how they run, what they write, and the results of undisturbed runs."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork


import numpy as np
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: here once for all forks

import basic
import basic.analysis.plotting
import basic.analysis.report.page
import basic.analysis.sweep
import basic.commands.quickstart
import basic.training.saving
from basic.bpe.patterns.automaton import compile_splits
from basic.common.files import sha256_of_file
from basic.common.native import object_files
from basic.common.native.cache_files import kept_arrays
from basic.common.native.kernel import Kernel
from basic.pretokenization import GPT2_PATTERN
from basic.Tokenizer import Tokenizer
from basic.training.checkpoints.of_run import checkpoint_paths, open_checkpoint
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run

REPOSITORY = Path(basic.__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TOKENIZERS = ("tokenizer", "cl100k", "settings")
END, BYTES = "<|endoftext|>", {byte: bytes([byte]) for byte in range(256)}
CONFIG = """
[model]
vocab_size = 400
context_length = 16
d_model = 16
num_layers = 2
num_heads = 2
[train]
steps = 30
batch_size = 4
warmup_steps = 3
log_interval = 1
eval_interval = 5
eval_batches = 1
sample_interval = 10
sample_tokens = 8
checkpoint_interval = 2
device = "cpu"
[data]
train_tokens = "given/train.bin"
valid_tokens = "given/train.bin"
tokenizer = "given/tokenizer"
"""


class Command(NamedTuple):
    """A command that writes, with paths in the folder of a try, where given/ has its inputs."""

    line: str
    resume: str = ""
    """What resumes it once its folder has a run; by default the same command."""
    old: str = ""
    """A command that wrote the same output before; it is to be replaced."""


COMMANDS = {
    "train": Command("train --config given/run.toml --output out", resume="train --resume out"),
    "sweep": Command("sweep given/sweep.toml --output out"),
    "encode file": Command("encode given/text.txt tokens.bin --tokenizer given/tokenizer"),
    "encode folder": Command("encode given/text.txt out --tokenizer given/tokenizer --shard-bytes 6000"),
    "train_bpe": Command(
        "train_bpe given/text.txt --vocab-size 400 --work work --output out",
        old="train_bpe given/text.txt --vocab-size 300 --output out",
    ),
    "export hf": Command("export given/run out"),
    "export tiktoken": Command("export given/run out.tiktoken --to tiktoken"),
    "import": Command("import given/hf --output out"),
    "consolidate": Command("consolidate given/sharded out.safetensors"),
    "report": Command("report given/run --output out.html", old="report given/older --output out.html"),
    "plot": Command("plot given/run --output out.png", old="plot given/older --output out.png"),
    "quickstart": Command("quickstart --vocab-size 300 --steps 3 --output out"),
}  # fmt: skip


# --- Running a script ----------------------------------------------------------------------------------------------


class Child:
    """A script that runs in a fork, with its output in pipes."""

    def __init__(self, line: list[str], folder: Path, *, file_bytes: int | None = None, **environment: str) -> None:
        self.streams = [os.pipe(), os.pipe()]
        for _, end in self.streams:
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.started_s = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.chdir(folder)
            os.environ.update(environment)
            for number, (_, end) in enumerate(self.streams, 1):
                os.dup2(end, number)
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            os._exit(_run_script(line))
        for _, end in self.streams:
            os.close(end)

    def kill(self, *, workers: bool) -> None:
        (os.killpg if workers else os.kill)(self.pid, signal.SIGKILL)

    def wait(self, limit_s: float = 40) -> str:
        """Wait for the end, and return "ok", "one line", "killed", "hung", or the error."""
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0 and time.monotonic() - self.started_s < limit_s:
            time.sleep(0.002)
        self.seconds = time.monotonic() - self.started_s
        if ended[0] == 0:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler prints where it hangs
            time.sleep(0.5)
            self.kill(workers=True)
            ended = os.waitpid(self.pid, 0)
        self.output, self.errors = (_read_now(end) for end, _ in self.streams)
        code = os.waitstatus_to_exitcode(ended[1])
        if self.seconds >= limit_s:
            return "hung: " + " | ".join(line.strip() for line in self.errors.splitlines() if " File " in line)[:500]
        lines = [line for line in self.errors.splitlines() if line.strip()]
        errors = [line for line in lines if "error: " in line[:7] or line.startswith("Traceback")]
        if code == 0:
            return "ok" if "Traceback" not in self.errors else "traceback: " + " | ".join(lines[-3:])
        if code == -signal.SIGKILL:
            return "killed"
        is_line = len(errors) == 1 and lines[-1].startswith("error: ")
        return "one line" if is_line else f"traceback: {code}: " + " | ".join(lines[-3:])[-400:]


def _run_script(line: list[str]) -> int:
    sys.argv, code = [str(REPOSITORY / "local" / f"{line[0]}.py"), *line[1:]], 0
    faulthandler.enable(2, all_threads=False)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    basic.commands.quickstart.TRAIN_STORIES, basic.commands.quickstart.VALID_STORIES = 300, 40
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return int(code)


def _read_now(end: int) -> str:
    os.set_blocking(end, False)
    content = b""
    with suppress(BlockingIOError):  # workers of a killed process may hold the other end
        while block := os.read(end, 1 << 16):
            content += block
    os.close(end)
    return content.decode(errors="replace")


def run(line: str, folder: Path, **how: Any) -> Child:
    child = Child(line.split(), folder, **how)
    if (result := child.wait()) != "ok":
        raise RuntimeError(f"{line}: {result}: {child.errors[-2000:]}")
    return child


def next_line(command: Command, folder: Path) -> str:
    """The command that a user gives after an interruption."""
    if command.resume and (folder / "out" / "config.toml").exists():
        return command.resume
    return command.line + " --overwrite" * bool(command.old)


# --- What a folder holds ------------------------------------------------------------------------------------------


def content_of(folder: Path) -> dict[str, Any]:
    """The content of every file that was written in the folder of a try, without times."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    found = {str(path.relative_to(folder)): path for path in paths}
    # Which checkpoints before the last one are left depends on how fast the disk is.
    old = {path for path in found.values() if (path.parent.name, path.suffix) == ("checkpoints", ".safetensors")}
    old -= {max(path for path in old if path.parent == folder) for folder in {path.parent for path in old}}
    with_times = ("environment.json", "report.html")
    left_out = {path for path in found.values() if path.name in with_times} | old
    return {name: _content(path) for name, path in sorted(found.items()) if path not in left_out}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors" and path.stem.startswith(("step_", "out")):
        return checkpoint_content(path)
    if path.name == "metrics.jsonl":
        keys = ("step", "kind", "tokens", "train_loss", "valid_loss", "learning_rate", "gradient_norm", "text")
        records = [record for record in read_all_records(path) if record.get("kind") != "checkpoint"]
        return [[record.get(key) for key in keys] for record in records]
    if path.name == "manifest.jsonl":
        return sorted(set(path.read_text().splitlines()))
    if path.name == "loss.png":  # shows times
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    if path.name == "outcome.json":
        return json.loads(path.read_text())["loss"]
    if path.name == "table.md":
        return [row.split("|")[1:4] for row in path.read_text().splitlines()]
    return sha256_of_file(path)


def checkpoint_content(path: Path) -> tuple:
    checkpoint = open_checkpoint(path)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in sorted(checkpoint.tensors.items())}
    return checkpoint.entry("iteration"), hash(tuple(tensors.items())), str(checkpoint.document["model"])


def remains(content: dict[str, Any]) -> list[str]:
    hidden = (".tmp", ".next", ".partial", ".basic.lock")
    return [name for name in content if any(name.endswith(end) or f"{end}/" in name for end in hidden)]


def differences(content: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in content.keys() | expected.keys() if content.get(name) != expected.get(name))


def lost(folder: Path, allowed: list[dict[str, Any]], output: str) -> Iterator[str]:
    """What was acknowledged and is not there, or is there and does not load."""
    for metrics in folder.rglob("metrics.jsonl"):
        with warnings.catch_warnings():  # the last line may be incomplete
            warnings.simplefilter("ignore")
            saved = [record["step"] for record in read_all_records(metrics) if record.get("kind") == "checkpoint"]
        steps = [checkpoint_content(path)[0] for path in checkpoint_paths(metrics.parent)]
        if saved and max(steps, default=-1) < max(saved):
            yield f"checkpoint {max(saved)} of {steps}"
        if steps and load_run(metrics.parent, device="cpu").step != max(steps):
            yield "load_run loads an older checkpoint"
    for manifest in folder.rglob("manifest.jsonl"):
        for line in manifest.read_text().splitlines():
            record = json.loads(line) if line.endswith("}") else {}
            if "file" in record and sha256_of_file(manifest.parent / record["file"]) != record["sha256"]:
                yield f"{record['file']} of the manifest"
    for tokenizer in {path.parent for path in folder.rglob("vocab.json")}:
        Tokenizer.load(tokenizer)
    content = content_of(folder)
    if any(word in output for word in ("saved as", "saved in", "wrote out")) and differences(content, allowed[0]):
        yield f"said to be written: {differences(content, allowed[0])}"
    for name in ("out.html", "out.png", "out.tiktoken", "out.safetensors", "tokens.bin", "out/model.safetensors"):
        if name in content and content[name] not in [each.get(name) for each in allowed]:
            yield f"{name} is neither the old one nor the new one"


# --- Tries --------------------------------------------------------------------------------------------------------


class Tries:
    """The commands with the results of undisturbed runs, and the problems found."""

    def __init__(self, folder: Path, seed: int, only: tuple[str, ...]) -> None:
        self.folder, self.only, self.random, self.problems = folder, only, random.Random(seed), Counter[str]()
        torch.set_num_threads(1)
        # Otherwise a run waits a minute for room on the disk.
        basic.training.saving.CheckpointManager.__init__.__kwdefaults__["retry_s"] = 0.1
        self.given = prepare(folder / "given")
        self.expected: dict[str, dict[str, Any]] = {}
        self.old: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.largest_bytes: dict[str, int] = {}

    def commands(self) -> Iterator[tuple[str, Command]]:
        for name, command in COMMANDS.items():
            if self.only and name not in self.only:
                continue
            if name not in self.expected:
                try:
                    for _ in range(2):  # the second time, everything is in the caches
                        folder = self.new_folder(command)
                        self.old[name] = content_of(folder)
                        self.seconds[name] = run(next_line(command, folder), folder).seconds
                except RuntimeError as error:
                    self.problem(f"undisturbed, {name}", str(error)[-400:])
                    continue
                self.expected[name] = content_of(folder)
                self.largest_bytes[name] = max((folder / path).stat().st_size for path in self.expected[name])
            yield name, command

    def new_folder(self, command: Command) -> Path:
        folder = self.folder / "try"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "given").symlink_to(self.given)
        if command.old:
            run(command.old, folder)
        return folder

    def problem(self, where: str, what: object) -> str:
        self.problems[text := f"{where}: {what}"[:700]] += 1
        if self.problems[text] == 1:
            print("   PROBLEM", text, flush=True)
        return "problem"

    def finish(self, name: str, command: Command, folder: Path, where: str, *, again: bool = True) -> None:
        """Run the command to its end, and compare the result with that of an undisturbed run."""
        if again:
            child = Child(next_line(command, folder).split(), folder)
            # It may be finished already, which is refused in one line.
            if (result := child.wait()) not in ("ok", "one line"):
                self.problem(where, f"again: {result}")
        content = content_of(folder)
        if left := remains(content):
            self.problem(where, f"left {[self.without_numbers(each) for each in left]}")
        if different := [each for each in differences(content, self.expected[name]) if each not in left]:
            self.problem(where, f"differs: {different}, {child.errors[-200:] if again else ''}")

    @staticmethod
    def without_numbers(name: str) -> str:
        return "".join("#" if character.isdigit() else character for character in name)


# --- Preparation --------------------------------------------------------------------------------------------------


def _first(numbers: Any) -> int:
    return numbers[0]


def prepare(given: Path) -> Path:
    """Make the inputs of all commands, and an example of each kind of file."""
    given.mkdir()
    text = (SHARED / "tinystories_2MiB.txt").read_bytes()[:60_000].decode(errors="ignore")
    (given / "text.txt").write_text(text[:40_000], encoding="utf-8")
    (given / "run.toml").write_text(CONFIG)
    sweep = 'config = "run.toml"\n[settings]\ntrain.steps = 12\n[grid]\ntrain.max_learning_rate = [1e-3, 1e-2]\n'
    (given / "sweep.toml").write_text(sweep)
    lines = """train_bpe given/text.txt --vocab-size 400 --output given/tokenizer
        train_bpe given/text.txt --vocab-size 300 --output given/unused --work given/work
        encode given/text.txt given/train.bin --tokenizer given/tokenizer
        encode given/text.txt given/dataset --tokenizer given/tokenizer --shard-bytes 6000
        train --config given/run.toml --output given/run
        train --config given/run.toml --output given/older --steps 5
        export given/run given/hf
        export given/run given/ranks.tiktoken --to tiktoken""".splitlines()
    for line in lines:
        run(line.strip(), given.parent)
    plain = Tokenizer.load(given / "tokenizer")
    Tokenizer(plain.vocab, plain.merges, [END], pattern="cl100k").save(given / "cl100k")
    document = json.loads((given / "hf" / "tokenizer.json").read_text())
    document["normalizer"], document["model"]["ignore_merges"] = {"type": "NFC"}, True
    (given / "settings.json").write_text(json.dumps(document))
    Tokenizer.load(given / "settings.json").save(given / "settings")
    (given / "cache").mkdir()
    automaton = compile_splits(GPT2_PATTERN.splits)
    kept_arrays(given / "cache" / "pattern", automaton._asdict)
    Kernel(_first, {})(np.arange(3))
    shutil.copy(next(object_files.cache_folder().glob("*._first.*.o")), given / "cache" / "kernel")
    shutil.copy(checkpoint_paths(given / "run")[-1], given / "last.safetensors")
    ranks = [
        Child(
            ["train", "--config", "given/run.toml", "--output", "given/shards", "--parallel", "sharded"], given.parent,
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(20_000 + os.getpid() % 20_000), GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2)
    ]  # fmt: skip
    if (results := [rank.wait() for rank in ranks]) != ["ok", "ok"]:
        raise RuntimeError(f"the sharded run: {results}: {ranks[0].errors[-2000:]}")
    shutil.copytree(checkpoint_paths(given / "shards")[-1], given / "sharded")
    return given
