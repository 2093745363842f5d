"""Checkpoints as one safetensors file: written atomically, verified before they are loaded, and free of pickle.

A checkpoint is an ordinary safetensors file. The tensors of the model have their state-dict keys after `model.`, so
that any safetensors tool can read the weights. Those of the optimizer begin with `optimizer.`, and those of the
caller's own data with `extra.`. The metadata has three strings: `format` is "pt" (other tools expect this of PyTorch
tensors), `checkpoint` is a JSON document, and `sha256` is the hexadecimal digest of the complete file, header and data,
computed with 64 zeros in place of the digest. The document is

    {"version": 2, "iteration": ..., "model": ..., "model_metadata": ..., "optimizer": ..., "optimizer_class": ...,
     "extra": ...}

where the optimizer's class is a name (earlier versions did not save it), and the others after the iteration are trees
of tensors and plain values, encoded by `basic.training.checkpoints.tensor_tree`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import atomic_paths, difference_from_object, open_file, sha256_of_file, temporary_folder
from basic.training.checkpoints.state import (
    VERSION,
    check_model_state,
    check_optimizer_state,
    collect_state,
    load_model_state,
    load_optimizer_state,
    rename_wrapped_keys,
)
from basic.training.checkpoints.tensor_tree import flatten_tree, type_name, unflatten_tree

PathOrFile = str | os.PathLike | BinaryIO | IO[bytes]

# The limit of safetensors for the header, which includes the metadata.
_HEADER_LIMIT_BYTES = 100_000_000

# What precedes the digest in the header. Quotes inside a JSON string are escaped, so this can only be the key itself.
_DIGEST_KEY, _ZERO_DIGEST = b'"sha256":"', "0" * 64

# The keys of the document and the types of their values in JSON; trees have other types, too.
_DOCUMENT_TYPES = {
    "version": int,
    "iteration": int,
    "model": dict,
    "optimizer": (dict, type(None)),
    "optimizer_class": (str, type(None)),
}

# What a malformed file or document can raise while it is parsed.
_PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


# --- Saving ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: Module, optimizer: Optimizer | None, iteration: int, out: PathOrFile, *, extra: dict | None = None
) -> None:
    """Save everything that training needs to resume.

    A path is replaced only by a complete file; after an error the old file is unchanged. Writing to a path copies a CPU
    tensor only if it is not contiguous. Writing to a file object needs memory for one copy of the complete checkpoint.

    Args:
        optimizer: any optimizer, or None to save the model alone.
        out: path, or binary file object, which is written from its position.
        extra: data of the caller, such as configuration or random states: a tree of tensors and plain values.

    Raises:
        TypeError: a value is neither a dense tensor in memory nor of a plain type (exactly None, bool, int, float, str,
            list, tuple, dict or OrderedDict); the message has its path, and nothing is written.
        InvalidInputError: the plain values are too large for the header of a safetensors file.
        OSError: the disk is full, or fails otherwise.

    Source: assignment, section "Training loop", checkpointing.
    """
    write_staged_checkpoint(stage_checkpoint(model, optimizer, iteration, extra=extra), out)


class StagedCheckpoint(NamedTuple):
    """The content of a checkpoint in CPU memory: the JSON document, and contiguous tensors by name."""

    document: str
    tensors: dict[str, Tensor]


def stage_checkpoint(
    model: Module,
    optimizer: Optimizer | None,
    iteration: int,
    *,
    extra: dict | None = None,
    to_host: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> StagedCheckpoint:
    """Collect the content of a checkpoint in CPU memory, to be written later.

    Args:
        model, optimizer, iteration, extra: as for `save_checkpoint`, also the errors raised.
        to_host: maps a contiguous tensor to the CPU tensor that is written. If it always copies, training may continue
            before the checkpoint is written.
    """
    document, tensors = flatten_tree(collect_state(model, optimizer, iteration, extra), to_host)
    return StagedCheckpoint(json.dumps(document), tensors)


def write_staged_checkpoint(staged: StagedCheckpoint, out: PathOrFile) -> None:
    """Write a checkpoint file, as described for `save_checkpoint`.

    Raises:
        InvalidInputError: the document is too large for the header of a safetensors file.
        OSError: the disk is full, or fails otherwise.
    """
    metadata = {"format": "pt", "checkpoint": staged.document, "sha256": _ZERO_DIGEST}
    try:
        if isinstance(out, (str, os.PathLike)):
            with atomic_paths(out) as (temporary,), temporary_folder(out) as folder:
                written = folder / "checkpoint"
                # First safetensors writes a file with a random name, which a killed process leaves.
                save_safetensors(staged.tensors, written, metadata)
                os.rename(written, temporary)
                digest = sha256_of_file(temporary)
                with open(temporary, "r+b") as file:
                    file.seek(_digest_offset(_read_header(file)[0]))
                    file.write(digest.encode())
        else:
            content = bytearray(safetensors.torch.save(staged.tensors, metadata))
            offset = _digest_offset(content)
            content[offset : offset + len(_ZERO_DIGEST)] = hashlib.sha256(content).hexdigest().encode()
            written = out.write(content)
            while written is not None and written < len(content):  # an unbuffered file may write less than asked
                written += out.write(memoryview(content)[written:])
    except SafetensorError as error:
        raise InvalidInputError(f"the checkpoint does not fit into a safetensors file: {error}") from error


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a new safetensors file that others may read as they may read any new file.

    Raises:
        SafetensorError: the metadata are too large.
        OSError: the disk is full, or fails otherwise.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files that only their owner can read
    with disk_errors():
        safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


@contextmanager
def disk_errors() -> Generator[None]:
    """Raise the errors of a disk, which safetensors reports in an error of its own, as an OSError."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"I/O error.*\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), f"{os.strerror(int(number[1]))} while weights were written") from error
        raise


# --- Loading -----------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A complete and undamaged checkpoint that has been read."""

    src: PathOrFile
    document: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def entry(self, key: str) -> Any:
        """The iteration, model, model_metadata, optimizer or extra, with copies of its tensors.

        Raises:
            DamagedFileError: the document is malformed.
        """
        try:
            return unflatten_tree(self.document[key], self.tensors)
        except _PARSE_ERRORS as error:
            raise _damaged(self.src, error) from error


def load_checkpoint(src: PathOrFile, model: Module, optimizer: Optimizer | None = None) -> int:
    """Load a checkpoint into a model and an optimizer; after an error both are unchanged.

    Tensors are read on the CPU and copied to the devices of the model. Afterwards both state dicts equal the saved
    ones, dtypes included. The random state does not change. Beside the model, a path needs memory for one copy of the
    tensors, a file object for two.

    Args:
        src: path, or binary file object, which is read from its position to the end of the checkpoint.
        model: built like the saved one, compiled or not; changed in place.
        optimizer: likewise; None ignores the saved optimizer.

    Returns:
        The saved iteration.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: the file is not a complete checkpoint.
        InvalidInputError: the checkpoint does not fit; the message names the first difference.
    """
    return load_state(read_checkpoint(src), model, optimizer)


def load_state(checkpoint: Checkpoint, model: Module, optimizer: Optimizer | None = None) -> int:
    """Load a checkpoint that has been read into a model and an optimizer, as `load_checkpoint` does."""
    iteration = checkpoint.entry("iteration")
    model_state = OrderedDict(checkpoint.entry("model"))
    # The format versions of the modules: without them, a module may convert its state as if from an old version.
    model_state._metadata = checkpoint.entry("model_metadata")  # ty: ignore[missing-attribute]
    rename_wrapped_keys(model, model_state)
    check_model_state(model, model_state)
    if optimizer is not None:
        optimizer_state = checkpoint.entry("optimizer")
        check_optimizer_state(optimizer, optimizer_state, checkpoint.document.get("optimizer_class"))
        load_optimizer_state(optimizer, optimizer_state)
    load_model_state(model, model_state)
    return iteration


def write_checkpoint(checkpoint: Checkpoint, out: PathOrFile) -> None:
    """Write a checkpoint that has been read, such as a sharded one, as one file."""
    write_staged_checkpoint(StagedCheckpoint(json.dumps(checkpoint.document), dict(checkpoint.tensors)), out)


def read_checkpoint(src: PathOrFile) -> Checkpoint:
    """Open a checkpoint and verify its checksum.

    The tensors of a path are views of the file and are read when they are used.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: the file is not a complete checkpoint.
    """
    try:
        if isinstance(src, (str, os.PathLike)):
            if not os.path.isfile(src):
                raise FileNotFoundError(f"there is no checkpoint file {os.fspath(src)!r}")
            with open_file(src) as file:
                stated_digest, digest = _digests(file)
            with safe_open(src, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        else:
            content = _read_stream(src)
            stated_digest, digest = _digests(io.BytesIO(content))
            tensors = safetensors.torch.load(content)
            metadata = _read_header(io.BytesIO(content))[1].get("__metadata__", {})
            del content
        document = parse_document(metadata["checkpoint"])
        if stated_digest != digest:
            raise ValueError("its contents do not match their checksum")
    except (SafetensorError, *_PARSE_ERRORS) as error:
        raise _damaged(src, error) from error
    return Checkpoint(src, document, tensors)


def read_document(path: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON document of a checkpoint file from its header, without verifying the checksum.

    Raises:
        DamagedFileError: the file has no such header.
    """
    try:
        with open_file(path) as file:
            return parse_document(_read_header(file)[1]["__metadata__"]["checkpoint"])
    except _PARSE_ERRORS as error:
        raise _damaged(path, error) from error


def parse_document(content: str) -> dict[str, Any]:
    """Parse the JSON document of a checkpoint, and check its keys.

    Raises:
        ValueError, TypeError, RecursionError: it is not such a document.
    """
    document = json.loads(content)
    if (problem := difference_from_object(document, {"version": int})) is None:
        if document["version"] != VERSION:
            raise ValueError(f"its version is {document['version']}, this library reads version {VERSION}")
        checked = {"optimizer_class": None, **document}
        if isinstance(document.get("iteration"), dict):  # an integer of more than 64 bits
            checked["iteration"] = unflatten_tree(document["iteration"], {})
        problem = difference_from_object(checked, _DOCUMENT_TYPES)
    if problem is not None:
        raise ValueError(f"its document {problem}")
    return document


def _damaged(src: PathOrFile, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{src} is not a complete checkpoint ({type(error).__name__}: {error}): it is incomplete, damaged or written "
        "by another program; use an earlier checkpoint, or save it again with save_checkpoint (a file of torch.save is "
        "never opened, because loading a pickle can run code)"
    )


# --- The bytes of a safetensors file -----------------------------------------------------------------------------


def _digest_offset(header: bytes | bytearray) -> int:
    return header.index(_DIGEST_KEY) + len(_DIGEST_KEY)


def _digests(file: BinaryIO) -> tuple[str, str]:
    """The SHA-256 that a file states, and the SHA-256 that it has, computed with zeros in place of the stated one."""
    header, _ = _read_header(file)
    offset = _digest_offset(header)
    end = offset + len(_ZERO_DIGEST)
    digest = hashlib.sha256(header[:offset] + _ZERO_DIGEST.encode() + header[end:])
    while block := file.read(1 << 20):
        digest.update(block)
    return header[offset:end].decode(), digest.hexdigest()


def _read_header(src: BinaryIO | IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, with the 8 bytes of its length, and its JSON content."""
    length = _read_exactly(src, 8)
    header = _read_exactly(src, min(int.from_bytes(length, "little"), _HEADER_LIMIT_BYTES))
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise TypeError(f"its header is a {type_name(type(entries))}")
    return length + header, entries


def _read_stream(src: BinaryIO | IO[bytes]) -> bytes:
    """The bytes of the safetensors file that begins at the position of a file object.

    safetensors reads paths and byte strings only. The header says where the file ends.
    """
    header, entries = _read_header(src)
    end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    return header + _read_exactly(src, end)


def _read_exactly(src: BinaryIO | IO[bytes], count: int) -> bytes:
    content = b""
    while len(content) < count:
        block = src.read(count - len(content))  # an unbuffered file may return less than asked
        if not isinstance(block, bytes):
            raise TypeError(f"it gives {type(block).__name__}, not bytes; open it with mode 'rb'")
        if not block:
            raise ValueError(f"it ends {count - len(content)} bytes too early")
        content = block if not content else content + block
    return content
