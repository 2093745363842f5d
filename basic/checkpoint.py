"""Checkpoints: model and optimizer in one safetensors file, loaded whole or not at all, never running code.

A checkpoint is an ordinary safetensors file. The model's tensors stand under their state-dict keys after
`model.`, so that any safetensors tool can read the weights; the optimizer's under `optimizer.`, a caller's own
under `extra.`. The metadata has three strings: `format` is "pt" (what other tools expect of tensors from
PyTorch), `checkpoint` is a JSON document, and `sha256` the digest of that document and of all tensors. The
document is

    {"version": 1, "iteration": ..., "model": ..., "model_metadata": ..., "optimizer": ..., "extra": ...}

where the last four are trees of tensors and plain values; `basic.state_tree` says how they are written as JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from collections import OrderedDict
from typing import IO, Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from basic.atomic_file import atomic_paths
from basic.state_tree import dtype_name, pack, type_name, unpack

_VERSION = 1

# safetensors reads no longer header, and the metadata are part of it.
_HEADER_LIMIT_BYTES = 100_000_000


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    out: str | os.PathLike | BinaryIO | IO[bytes],
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
    model_state = model.state_dict()
    tree = {
        "version": _VERSION,
        "iteration": operator.index(iteration),
        "model": dict(model_state),
        "model_metadata": getattr(model_state, "_metadata", None),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "extra": {} if extra is None else extra,
    }
    document, tensors = pack(tree)
    text = json.dumps(document)
    metadata = {"format": "pt", "checkpoint": text, "sha256": _digest(text, tensors)}
    try:
        if isinstance(out, (str, os.PathLike)):
            with atomic_paths(out) as (temporary,):
                temporary.touch()
                mode = temporary.stat().st_mode  # safetensors would leave a file that only its owner can read
                safetensors.torch.save_file(tensors, temporary, metadata)
                temporary.chmod(mode)
        else:
            content = safetensors.torch.save(tensors, metadata)
            written = out.write(content)
            while written is not None and written < len(content):  # an unbuffered file may take less than all
                written += out.write(memoryview(content)[written:])
    except SafetensorError as error:
        raise ValueError(f"the checkpoint does not fit into a safetensors file: {error}") from error


def load_checkpoint(
    src: str | os.PathLike | BinaryIO | IO[bytes],
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
    document, tensors = _read(src)
    model_state = OrderedDict(unpack(document["model"], tensors))
    # The versions of the modules' formats: without them a module may take its state for that of an old version.
    model_state._metadata = unpack(document["model_metadata"], tensors)  # ty: ignore[missing-attribute]
    _check_model(model, model_state)
    if optimizer is not None:
        optimizer_state = unpack(document["optimizer"], tensors)
        _check_optimizer(optimizer, optimizer_state)
        _load_optimizer(optimizer, optimizer_state)
    _unfold(model)
    model.load_state_dict(model_state)
    return unpack(document["iteration"], tensors)


def read_extra(src: str | os.PathLike | BinaryIO | IO[bytes]) -> dict:
    """What was given as `extra` when the checkpoint was saved; {} where nothing was.

    Args and Raises: as for `load_checkpoint`.
    """
    document, tensors = _read(src)
    return unpack(document["extra"], tensors)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the document and, by ascending name, of each tensor's "name dtype shape" and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- Files -----------------------------------------------------------------------------------------------------


def _read(src: str | os.PathLike | BinaryIO | IO[bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document of a checkpoint and its tensors by name, after checking that all is there.

    The tensors of a path are views of the file, read when they are used.
    """
    try:
        if isinstance(src, (str, os.PathLike)):
            if not os.path.isfile(src):
                raise FileNotFoundError(f"there is no checkpoint file {os.fspath(src)!r}")
            with safe_open(src, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        else:
            metadata, content = _read_stream(src)
            tensors = safetensors.torch.load(content)
            del content
        text = metadata["checkpoint"]
        if metadata["sha256"] != _digest(text, tensors):
            raise ValueError("its contents do not match their checksum")
        document = json.loads(text)
        if document["version"] != _VERSION:
            raise ValueError(f"its version is {document['version']}, this library reads version {_VERSION}")
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{src} is not a whole checkpoint ({type(error).__name__}: {error}): it is incomplete, damaged or the "
            "work of another program; use an earlier checkpoint, or save it again with save_checkpoint (a file of "
            "torch.save is never opened, because loading a pickle can run code)"
        ) from error
    return document, tensors


def _read_stream(src: BinaryIO | IO[bytes]) -> tuple[dict[str, str], bytes]:
    """The metadata and the bytes of a safetensors file that begins at the position of a file object.

    safetensors reads files by path or whole strings of bytes, and the header alone tells where this one ends.
    """
    length = _read_exactly(src, 8)
    header = _read_exactly(src, min(int.from_bytes(length, "little"), _HEADER_LIMIT_BYTES))
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return metadata, b"".join([length, header, _read_exactly(src, end)])


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


def _check_model(model: torch.nn.Module, saved: dict[str, Any]) -> None:
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


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None) -> None:
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


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
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
