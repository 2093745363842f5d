"""JSON of a wrong shape in a checkpoint, with a right checksum, is one line that names the file and the key."""

import json
from typing import Any

import pytest
import torch

from basic.common.errors import DamagedFileError
from basic.common.files import with_checksum
from basic.training.checkpoints.file import StagedCheckpoint, load_checkpoint, read_document, write_staged_checkpoint
from basic.training.checkpoints.sharded import METADATA_NAME, read_sharded_checkpoint

GOOD: dict[str, Any] = dict(version=2, iteration=3, model={}, model_metadata=None, optimizer=None, extra={})
DOCUMENTS = [
    ([1], r"is not a JSON object, but \[1\]"),
    ({}, "has no 'version'"),
    ({**GOOD, "version": 1}, "its version is 1, this library reads version 2"),
    ({**GOOD, "version": "2"}, "has '2' as 'version', which must be an integer"),
    ({**GOOD, "model": [1]}, r"has \[1\] as 'model', which must be an object"),
    ({**GOOD, "iteration": "3"}, "has '3' as 'iteration', which must be an integer"),
    ({**GOOD, "optimizer": []}, r"has \[\] as 'optimizer', which must be an object or null"),
    ({**GOOD, "optimizer_class": 3}, "has 3 as 'optimizer_class', which must be a string or null"),
]


def write_folder(folder, **changes: Any) -> None:
    metadata = {"version": 1, "checkpoint": json.dumps(GOOD), "files": {}, **changes}
    folder.mkdir()
    (folder / METADATA_NAME).write_text(json.dumps(with_checksum(metadata, "sha256")))


@pytest.mark.parametrize(("document", "message"), DOCUMENTS, ids=lambda value: str(value)[:20])
def test_a_document_of_a_wrong_shape(document, message, tmp_path):
    path, folder = tmp_path / "a.safetensors", tmp_path / "step_00000003"
    write_staged_checkpoint(StagedCheckpoint(json.dumps(document), {}), path)
    write_folder(folder, checkpoint=json.dumps(document))
    for read, source in (
        (lambda: load_checkpoint(path, torch.nn.Identity()), path),
        (lambda: read_document(path), path),
        (lambda: read_sharded_checkpoint(folder), folder),
    ):
        with pytest.raises(DamagedFileError, match=f"{source.name} is not a complete checkpoint .*{message}"):
            read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": [1]}, r"has \[1\] as 'files', which must be an object"),
        ({"files": {"../a": "0"}}, r"'\.\./a' is not a file of it with a checksum"),
        ({"files": {"a": 0}}, "'a' is not a file of it with a checksum"),
        ({"checkpoint": GOOD}, "as 'checkpoint', which must be a string"),
    ],
)
def test_metadata_of_a_wrong_shape(changes, message, tmp_path):
    write_folder(tmp_path / "step_00000003", **changes)
    with pytest.raises(DamagedFileError, match=message):
        read_sharded_checkpoint(tmp_path / "step_00000003")
