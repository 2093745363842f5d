"""Damaged files and files of an attacker: checkpoints, token files, configurations and records."""

import hashlib
import json
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.opening import open_tokens
from basic.training.checkpoints.file import load_checkpoint, read_checkpoint, save_checkpoint, write_checkpoint
from basic.training.checkpoints.of_run import checkpoint_paths
from basic.training.loop import train
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run, load_run_config
from tests.helpers.fault_tools import TRAIN, VALID, configuration


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
