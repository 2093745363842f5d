"""Files that version 0.1.0 wrote (tests/fixtures/make_written_by_0_1_0.py) open with the code of today."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basic.common.errors import InvalidInputError
from basic.common.folder_lock import FolderLock
from basic.encoding import encode_files
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe
from basic.training import load_run, read_metrics
from tests.helpers.scripts import run_script
from tests.project.test_scripts import REPOSITORY

WRITTEN = REPOSITORY / "tests" / "fixtures" / "written_by_0_1_0"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>"]
VOCAB_SIZE, SHARD_BYTES = 320, 6000


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the files in the current folder: they name each other by relative paths."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids_sha256(ids: Any) -> str:
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


def manifest(work: Path) -> list[str]:
    return (work / "manifest.jsonl").read_text(encoding="utf-8").splitlines()


def without_checksum(path: Path) -> dict[str, Any]:
    """A sidecar or an index; those of 0.1.0 have no checksum."""
    return {key: value for key, value in json.loads(path.read_bytes()).items() if key != "checksum"}


def move_to_this_text(work: Path, made_today: Path) -> None:
    """Make a work folder belong to stories.txt of the current folder.

    A work folder identifies its inputs by a SHA-256 of their absolute paths and modification times, which no checkout
    preserves. Everything else that it says about the work must equal what today's code says.
    """
    lines, today = manifest(work), json.loads(manifest(made_today)[0])
    then = json.loads(lines[0])
    then["work"]["input_sha256"] = today["work"]["input_sha256"]
    assert today["work"].pop("shard boundaries")  # not known then
    assert then == today
    # No newline at the end: an interrupted process has left half a line there.
    (work / "manifest.jsonl").write_bytes("\n".join([json.dumps(then), *lines[1:]]).encode())


# --- Tokenizers and tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_cl100k"])
def test_a_tokenizer_gives_the_same_ids(name):
    tokenizer = Tokenizer.load(WRITTEN / name)
    text = (WRITTEN / "stories.txt").read_bytes().decode()
    if name == "tokenizer_cl100k":
        text = text.replace(" ", "\t")  # its training text; there, pre-tokens begin with a tab
        assert tokenizer.pattern is not None
    assert list(tokenizer.special_token_ids) == SPECIAL_TOKENS
    assert tokenizer.fingerprint == EXPECTED["fingerprint"][name]
    ids = tokenizer.encode(text)
    assert ids_sha256(ids) == EXPECTED["ids_sha256"][name]
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_is_saved_as_it_was(tmp_path):
    for name in ("tokenizer", "tokenizer_cl100k"):
        Tokenizer.load(WRITTEN / name).save(tmp_path / name)
        saved = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "checksums.json"}
        assert saved == {path.name: path.read_bytes() for path in (WRITTEN / name).iterdir()}


@pytest.mark.parametrize("name", ["tokens.bin", "dataset"])
def test_tokens_are_the_same(name):
    tokens = open_tokens(WRITTEN / name, verify=True, made_by=EXPECTED["fingerprint"]["tokenizer"])
    assert ids_sha256(tokens[:]) == EXPECTED["tokens_sha256"][name]
    with pytest.raises(ValueError, match="another tokenizer"):
        open_tokens(WRITTEN / name, made_by=EXPECTED["fingerprint"]["tokenizer_cl100k"])


def test_encoding_makes_the_same_token_file(folder, monkeypatch):
    run_script(monkeypatch, "encode", "stories.txt", "today.bin", "--tokenizer", "tokenizer")
    assert Path("today.bin").read_bytes() == Path("tokens.bin").read_bytes()
    assert without_checksum(Path("today.json")) == without_checksum(Path("tokens.json"))


# --- Runs -----------------------------------------------------------------------------------------------------


def weights_sha256(run: Path) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(load_run(run, device="cpu").model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["run", "sharded_run"])
def test_a_run_has_the_same_weights(name):
    run = load_run(WRITTEN / name, device="cpu")
    assert run.step == 4
    assert run.tokenizer_path == WRITTEN / name / "tokenizer"
    assert weights_sha256(WRITTEN / name) == EXPECTED["weights_sha256"][name]
    losses = [record["train_loss"] for record in read_metrics(WRITTEN / name / "metrics.jsonl")]
    # Two processes add up in another order than one process.
    assert losses == (EXPECTED["losses"] if name == "run" else pytest.approx(EXPECTED["losses"], rel=1e-6))


def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(folder):
    newest = folder / "run" / "checkpoints" / "step_00000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="step_00000004"):
        assert load_run("run", device="cpu").step == 2


@pytest.mark.parametrize("name", ["run", "sharded_run"])
def test_a_run_is_resumed(name, folder, monkeypatch):
    """Up to step 8, with the losses of 0.1.0, to a tolerance: on another processor their last bits differ."""
    run_script(monkeypatch, "train", "--resume", name, "--steps", "8")
    records = read_metrics(folder / name / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["train_loss"] for record in records] == pytest.approx(EXPECTED["resumed_losses"], rel=1e-5)
    assert load_run(name, device="cpu").step == 8
    starts = json.loads((folder / name / "environment.json").read_bytes())["starts"]
    assert [start["step"] for start in starts] == [0, 4]


def test_a_sharded_checkpoint_is_not_consolidated_into_a_run_that_is_written(folder, monkeypatch):
    before = sorted(path.name for path in (folder / "sharded_run" / "checkpoints").iterdir())
    with FolderLock("sharded_run"), pytest.raises(SystemExit, match="error: sharded_run is being written by process"):
        run_script(monkeypatch, "consolidate", "sharded_run")
    assert sorted(path.name for path in (folder / "sharded_run" / "checkpoints").iterdir()) == before
    with FolderLock("sharded_run"):
        run_script(monkeypatch, "consolidate", "sharded_run", "elsewhere.safetensors")
    run_script(monkeypatch, "consolidate", "sharded_run")
    name = "step_00000004.safetensors"
    assert sorted(path.name for path in (folder / "sharded_run" / "checkpoints").iterdir()) == [*before, name]


def test_a_tokenizer_that_is_not_the_runs_own_is_refused(folder, monkeypatch):
    """The tokenizers of 0.1.0 have no checksums, but the run knows the fingerprint of its own."""
    commands = [("evaluate", "run"), ("generate", "run", "--prompt", "a", "--max-tokens", "1"), ("export", "run", "hf")]
    run_script(monkeypatch, "evaluate", "run", "--device", "cpu")
    merges = folder / "run" / "tokenizer" / "merges.txt"
    merges.write_bytes(b"".join(merges.read_bytes().splitlines(keepends=True)[:-1]))
    for command in commands:
        with pytest.raises(
            SystemExit, match=r"error: run was started with another tokenizer .* restore that from a copy"
        ):
            run_script(monkeypatch, *command)
    with pytest.raises(SystemExit, match="was made by another tokenizer"):  # the tokens say so first
        run_script(monkeypatch, "train", "--resume", "run", "--steps", "8")


# --- Work folders -------------------------------------------------------------------------------------------------


def test_unfinished_counts_of_other_shards_are_made_anew_on_request(folder):
    """0.1.0 divided a text at fewer positions: today's shards would overlap its own, or leave text out."""
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "special_tokens": SPECIAL_TOKENS, "shard_bytes": SHARD_BYTES}
    expected = train_bpe("stories.txt", work_folder="made_today", **options)
    move_to_this_text(folder / "counts_unfinished", folder / "made_today")
    with pytest.raises(InvalidInputError, match=r"other work, with other shard boundaries; .* start_over=True"):
        train_bpe("stories.txt", work_folder="counts_unfinished", **options)
    assert train_bpe("stories.txt", work_folder="counts_unfinished", start_over=True, **options) == expected
    tokenizer = Tokenizer.load("tokenizer")
    assert (tokenizer.vocab, tokenizer.merges) == expected


def test_an_unfinished_dataset_of_other_shards_is_made_anew_on_request(folder):
    tokenizer = Tokenizer.load("tokenizer")
    encode_files(tokenizer, "stories.txt", "made_today", shard_bytes=SHARD_BYTES)
    move_to_this_text(folder / "dataset_unfinished", folder / "made_today")
    with pytest.raises(InvalidInputError, match="other work, with other shard boundaries"):
        encode_files(tokenizer, "stories.txt", "dataset_unfinished", shard_bytes=SHARD_BYTES)
    encode_files(tokenizer, "stories.txt", "dataset_unfinished", shard_bytes=SHARD_BYTES, start_over=True)
    assert np.array_equal(open_tokens("dataset_unfinished")[:], open_tokens("dataset")[:])
