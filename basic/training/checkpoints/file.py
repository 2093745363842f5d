"""Checkpoints: model and optimizer in one safetensors file, loaded whole or not at all, never running code.

A checkpoint is an ordinary safetensors file. The model's tensors stand under their state-dict keys after
`model.`, so that any safetensors tool can read the weights; the optimizer's under `optimizer.`, a caller's own
under `extra.`. The metadata has three strings: `format` is "pt" (what other tools expect of tensors from
PyTorch), `checkpoint` is a JSON document, and `sha256` the hexadecimal digest of the whole file, header and data, with
zeros in the place of these 64 digits. The document is

    {"version": 2, "iteration": ..., "model": ..., "model_metadata": ..., "optimizer": ..., "extra": ...}

where the last four are trees of tensors and plain values; `basic.training.checkpoints.tensor_tree` says how they are
written as JSON.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import operator
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from basic.common.files import atomic_paths
from basic.training.checkpoints.tensor_tree import dtype_name, pack, type_name, unpack

Source = str | os.PathLike | BinaryIO | IO[bytes]

_VERSION = 2

# safetensors reads no longer header, and the metadata are part of it.
_HEADER_LIMIT_BYTES = 100_000_000

# Where a header has the digest. A quote inside a JSON text has a backslash before it, so this is the key itself.
_DIGEST_KEY, _NO_DIGEST = b'"sha256":"', "0" * 64


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    out: Source,
    *,
    extra: dict | None = None,
) -> None:
    """Write everything that training needs to go on from here.

    A path is replaced only by a complete file; a failure of any kind leaves what was there. No tensor on the CPU
    is copied on the way to a path unless it is not contiguous; on the way to a file object there is one copy of
    the whole checkpoint in memory.

    Args:
        model: any module.
        optimizer: any optimizer, or None to save the model alone.
        iteration: number of steps done.
        out: path, or a binary file object that is written to at its position.
        extra: more of the caller's: a tree of tensors and plain values, such as configuration, random states.

    Raises:
        TypeError: something in the trees is neither a dense tensor in memory nor of a plain type (exactly None,
            bool, int, float, str, list, tuple, dict or OrderedDict); it is named, and nothing is written.

    Source: assignment, section "Training loop", checkpointing.
    """
    write_snapshot(take_snapshot(model, optimizer, iteration, extra=extra), out)


class Snapshot(NamedTuple):
    """What a checkpoint's file is made of: the JSON document, and the contiguous CPU tensors by name."""

    document: str
    tensors: dict[str, Tensor]


def take_snapshot(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    *,
    extra: dict | None = None,
    to_host: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Snapshot:
    """All that a checkpoint holds, to be written later.

    Args:
        model, optimizer, iteration, extra, and Raises: as for `save_checkpoint`.
        to_host: makes of a contiguous tensor the one on the CPU that is written; where it copies, training may go on
            before that.
    """
    node, tensors = pack(checkpoint_tree(model, optimizer, iteration, extra), to_host)
    return Snapshot(json.dumps(node), tensors)


def checkpoint_tree(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, iteration: int, extra: dict | None
) -> dict[str, Any]:
    """What the document of a checkpoint is made of, with the tensors themselves."""
    model_state = model.state_dict()
    return {
        "version": _VERSION,
        "iteration": operator.index(iteration),
        "model": dict(model_state),
        "model_metadata": getattr(model_state, "_metadata", None),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "extra": {} if extra is None else extra,
    }


def write_snapshot(snapshot: Snapshot, out: Source) -> None:
    """Write the file of a checkpoint; `save_checkpoint` says how.

    Raises:
        OSError: the disk is full, or fails otherwise.
        ValueError: the document is longer than the format allows.
    """
    document, tensors = snapshot
    metadata = {"format": "pt", "checkpoint": document, "sha256": _NO_DIGEST}
    try:
        if isinstance(out, (str, os.PathLike)):
            with atomic_paths(out) as (temporary,):
                temporary.touch()
                mode = temporary.stat().st_mode  # safetensors would leave a file that only its owner can read
                safetensors.torch.save_file(tensors, temporary, metadata)
                temporary.chmod(mode)
                with open(temporary, "r+b") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    file.seek(0)
                    file.seek(_digest_place(_read_header(file)[0]))
                    file.write(digest.encode())
        else:
            content = bytearray(safetensors.torch.save(tensors, metadata))
            place = _digest_place(content)
            content[place : place + len(_NO_DIGEST)] = hashlib.sha256(content).hexdigest().encode()
            written = out.write(content)
            while written is not None and written < len(content):  # an unbuffered file may take less than all
                written += out.write(memoryview(content)[written:])
    except SafetensorError as error:
        if number := re.search(r"I/O error.*\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), f"{os.strerror(int(number[1]))} while a checkpoint was written") from error
        raise ValueError(f"the checkpoint does not fit into a safetensors file: {error}") from error


def load_checkpoint(
    src: Source,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Put a checkpoint into `model` and `optimizer`; all of it, or after an error nothing.

    Tensors are read on the CPU and go to the devices of the model; both state dicts are then equal to the saved
    ones, dtypes included. The random state is not touched. Beside the model there is one copy of the tensors in
    memory, of a file object two.

    Args:
        src: path, or a binary file object that is read from its position up to the end of the checkpoint.
        model: as it was built for the saved one; changed in place.
        optimizer: likewise; None leaves the saved optimizer aside.

    Returns:
        The iteration that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole checkpoint, or does not fit; the first difference is named.
    """
    return restore(read_checkpoint(src), model, optimizer)


def read_extra(src: Source) -> dict:
    """What was given as `extra` when the checkpoint was saved; {} where nothing was.

    Args and Raises: as for `load_checkpoint`.
    """
    return read_checkpoint(src).part("extra")


class Checkpoint(NamedTuple):
    """A checkpoint that has been read and is whole."""

    src: Source
    document: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, name: str) -> Any:
        """The iteration, model, model_metadata, optimizer or extra, in memory of its own.

        Raises:
            ValueError: a description of it has been forged.
        """
        try:
            return unpack(self.document[name], self.tensors)
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _not_whole(self.src, error) from error


def write_checkpoint(checkpoint: Checkpoint, out: Source) -> None:
    """Write a checkpoint that has been read, such as that of a sharded model, as one file."""
    write_snapshot(Snapshot(json.dumps(checkpoint.document), dict(checkpoint.tensors)), out)


def restore(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Put a checkpoint that has been read into model and optimizer, as `load_checkpoint` does."""
    iteration = checkpoint.part("iteration")
    model_state = OrderedDict(checkpoint.part("model"))
    # The versions of the modules' formats: without them a module may take its state for that of an old version.
    model_state._metadata = checkpoint.part("model_metadata")  # ty: ignore[missing-attribute]
    check_model(model, model_state)
    if optimizer is not None:
        optimizer_state = checkpoint.part("optimizer")
        check_optimizer(optimizer, optimizer_state)
        load_optimizer(optimizer, optimizer_state)
    _unfold(model)
    model.load_state_dict(model_state)
    return iteration


# --- Files -----------------------------------------------------------------------------------------------------


def read_checkpoint(src: Source) -> Checkpoint:
    """Open a checkpoint and make sure that all is there, unchanged.

    The tensors of a path are views of the file, read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole checkpoint.
    """
    try:
        if isinstance(src, (str, os.PathLike)):
            if not os.path.isfile(src):
                raise FileNotFoundError(f"there is no checkpoint file {os.fspath(src)!r}")
            with open(src, "rb") as file:
                digest, actual = _digests(file)
            with safe_open(src, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        else:
            content = _read_stream(src)
            digest, actual = _digests(io.BytesIO(content))
            tensors = safetensors.torch.load(content)
            metadata = _read_header(io.BytesIO(content))[1].get("__metadata__", {})
            del content
        document = json.loads(metadata["checkpoint"])
        if document["version"] != _VERSION:
            raise ValueError(f"its version is {document['version']}, this library reads version {_VERSION}")
        if digest != actual:
            raise ValueError("its contents do not match their checksum")
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _not_whole(src, error) from error
    return Checkpoint(src, document, tensors)


def _not_whole(src: Source, error: Exception) -> ValueError:
    return ValueError(
        f"{src} is not a whole checkpoint ({type(error).__name__}: {error}): it is incomplete, damaged or the "
        "work of another program; use an earlier checkpoint, or save it again with save_checkpoint (a file of "
        "torch.save is never opened, because loading a pickle can run code)"
    )


def _digest_place(header: bytes | bytearray) -> int:
    return header.index(_DIGEST_KEY) + len(_DIGEST_KEY)


def _digests(file: BinaryIO) -> tuple[str, str]:
    """The SHA-256 that a file claims to have, and the one that it has with zeros in the place of that claim."""
    header, _ = _read_header(file)
    place = _digest_place(header)
    end = place + len(_NO_DIGEST)
    digest = hashlib.sha256(header[:place] + _NO_DIGEST.encode() + header[end:])
    while piece := file.read(1 << 20):
        digest.update(piece)
    return header[place:end].decode(), digest.hexdigest()


def _read_header(src: BinaryIO | IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file with the length before it, and what it says."""
    length = _read_exactly(src, 8)
    header = _read_exactly(src, min(int.from_bytes(length, "little"), _HEADER_LIMIT_BYTES))
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise TypeError(f"its header is a {type_name(type(entries))}")
    return length + header, entries


def _read_stream(src: BinaryIO | IO[bytes]) -> bytes:
    """The bytes of a safetensors file that begins at the position of a file object.

    safetensors reads files by path or whole strings of bytes, and the header alone tells where this one ends.
    """
    header, entries = _read_header(src)
    end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    return header + _read_exactly(src, end)


def _read_exactly(src: BinaryIO | IO[bytes], count: int) -> bytes:
    content = b""
    while len(content) < count:
        piece = src.read(count - len(content))  # an unbuffered file may give less than it has
        if not isinstance(piece, bytes):
            raise TypeError(f"it gives {type(piece).__name__}, not bytes; open it with mode 'rb'")
        if not piece:
            raise ValueError(f"it ends {count - len(content)} bytes too early")
        content = piece if not content else content + piece
    return content


# --- What a checkpoint must fit --------------------------------------------------------------------------------


def check_model(model: torch.nn.Module, saved: dict[str, Any]) -> None:
    """Raise ValueError with the first key in which a module differs from its saved state."""
    own = model.state_dict()
    for key, mine in own.items():
        if key not in saved:
            raise ValueError(
                f"the checkpoint does not fit the model: it has no {key!r} ({_described(mine)} in the model); build "
                "the model as it was saved"
            )
        theirs = saved[key]
        if key.endswith("_extra_state") or not isinstance(mine, Tensor) or _is_lazy(mine):
            continue  # the module alone knows what fits here
        if not isinstance(theirs, Tensor) or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            raise ValueError(
                f"the checkpoint does not fit the model: {key!r} is {_described(theirs)} in the checkpoint, but "
                f"{_described(mine)} in the model; build the model as it was saved, in its dtype"
            )
        if mine.is_meta:
            raise ValueError(f"{key!r} of the model is on the meta device and has no memory; use to_empty first")
    for key in saved:
        if key not in own:
            raise ValueError(
                f"the checkpoint does not fit the model, which has no {key!r} ({_described(saved[key])} in the "
                "checkpoint); build the model as it was saved"
            )


def _unfold(model: torch.nn.Module) -> None:
    """Give expanded tensors memory for each of their elements: torch refuses to load into them as they are."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not _is_lazy(tensor) and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            tensor.data = tensor.data.clone()


def _is_lazy(tensor: Tensor) -> bool:
    """Whether it is a parameter of a lazy module, which has no shape yet and takes that of what is loaded."""
    return hasattr(type(tensor), "materialize")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type_name(type(value))}"
    return f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None) -> None:
    """Raise ValueError if the saved optimizer had other groups of parameters."""
    if saved is None:
        raise ValueError("the checkpoint was saved without an optimizer; load it with optimizer=None")
    theirs = [len(group["params"]) for group in saved.get("param_groups", [])]
    mine = [len(group["params"]) for group in optimizer.state_dict().get("param_groups", [])]
    if theirs != mine:
        raise ValueError(
            f"the checkpoint does not fit the optimizer: its parameter groups have {theirs} parameters, those of the "
            f"optimizer {mine}; build the optimizer as it was saved"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer and undo what torch does to it on the way.

    `Optimizer.load_state_dict` casts every state tensor but `step` to the dtype of its parameter, integers and the
    float32 moments of bfloat16 parameters among them, and takes strings for sequences. Its devices are right.
    """
    groups = saved.get("param_groups", [])
    for own, group in zip(optimizer.param_groups, groups, strict=False):
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
                group[key] = value.to(own[key].device)
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict().get("state", {})
    ids = itertools.chain.from_iterable(group["params"] for group in groups)
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, parameter in zip(ids, parameters, strict=False):
        # An optimizer that saves its state in another form than it keeps it in can alone restore it.
        if key in saved["state"] and key in loaded and loaded[key] is optimizer.state.get(parameter):
            optimizer.state[parameter] = _exactly(saved["state"][key], loaded[key])


def _exactly(saved: Any, loaded: Any) -> Any:
    """`saved`, with its tensors on the devices of those in `loaded`; these themselves where their dtype is right."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if saved.dtype == loaded.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return type(saved)((key, _exactly(value, loaded.get(key))) for key, value in saved.items())
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)):
        return type(saved)(_exactly(*pair) for pair in zip(saved, loaded, strict=True))
    return saved
