"""Checkpoints of a sharded model: a folder into which every process writes its part, there whole or not at all.

    step_00001000/checkpoint.json                 what is no tensor, and the checksums of the other files
                  shard-00001-model-....safetensors    the parts of the first process, and so on

The parts are written and read by torch.distributed.checkpoint, as safetensors under flat names. The rest is the same
JSON document that a checkpoint in one file has (`basic.training.checkpoints.file`), with the same names of tensors. So
either form can be read where the other was written, by any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basic.common.files import sync_file, sync_folder
from basic.training.checkpoints.file import Checkpoint, check_model, check_optimizer, checkpoint_tree, load_optimizer
from basic.training.checkpoints.tensor_tree import pack, stored_names, unpack
from basic.training.parallel.world import World
from basic.transformer.optimizer import local_part

DOCUMENT_NAME = "checkpoint.json"
_VERSION = 1
# While a file is put together nothing else of Python runs in its process, so that files shall not be long.
_FILE_BYTES = 256 << 20


class Parts(NamedTuple):
    """What this process writes: the JSON document, its parts on the CPU by name, and the tensors they are parts of."""

    document: str
    tensors: dict[str, Tensor]
    wholes: dict[str, Tensor]


def take_parts(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    *,
    extra: dict | None = None,
    to_host: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Parts:
    """All that this process has of a checkpoint, to be written later; as `file.take_snapshot`."""
    wholes: dict[str, Tensor] = {}

    def parts_of(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: parts_of(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, Tensor) and local_part(value) is not value:
            wholes[path] = value
            return local_part(value).detach()
        return value

    tree = checkpoint_tree(model, optimizer, iteration, extra)
    for name in ("model", "optimizer"):
        tree[name] = parts_of(tree[name], name)
    node, tensors = pack(tree, to_host)
    return Parts(json.dumps(node), tensors, wholes)


def write_parts(parts: Parts, path: str | os.PathLike, world: World) -> None:
    """Write a checkpoint's folder together with all other processes; what stood there is replaced.

    Raises:
        OSError: a disk is full, or fails otherwise, in any of the processes; nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _together(world, lambda: _make_anew(temporary) if world.is_first else None)
        _write_tensors(parts, temporary, world)
        files: dict[str, str] = {}
        for some in _together(world, lambda: _finish_files(temporary, world.rank)):
            files |= some
        _together(world, lambda: _complete(parts.document, files, temporary, target) if world.is_first else None)
    except BaseException:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_tensors(parts: Parts, folder: Path, world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = {}
    for name, tensor in parts.tensors.items():
        whole: Any = parts.wholes.get(name)
        state[name] = tensor
        if whole is not None:
            shape = {"shape": whole.shape, "stride": whole.stride()}
            state[name] = DTensor.from_local(tensor, world.host_mesh, whole.placements, run_check=False, **shape)
    writer = dcp.HuggingFaceStorageWriter(str(folder), _files_of(parts.tensors), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, process_group=world.saving_group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"rank {rank}: {cause}") from error
        raise


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, into which each tensor goes."""
    numbers, number, size_bytes = {}, 1, 0
    for name, tensor in tensors.items():
        if size_bytes and size_bytes + tensor.nbytes > _FILE_BYTES:
            number, size_bytes = number + 1, 0
        numbers[name] = number
        size_bytes += tensor.nbytes
    return numbers


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()


def _finish_files(folder: Path, rank: int) -> dict[str, str]:
    """Force this process's files to the disk; return their checksums."""
    digests = {}
    for path in sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        sync_file(path)
        digests[path.name] = _digest(path)
    return digests


def _complete(document: str, files: dict[str, str], temporary: Path, target: Path) -> None:
    """Write the document, which says that all is there, and give the folder its name."""
    content = {"version": _VERSION, "checkpoint": document, "files": files}
    content["sha256"] = _digest_of_content(content)
    (temporary / DOCUMENT_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync_file(temporary / DOCUMENT_NAME)
    sync_folder(temporary)
    remove_checkpoint(target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def _together(world: World, work: Callable[[], Any]) -> list[Any]:
    """Do something in every process, and return what came of it in each; if it failed in one, it fails in all."""
    try:
        mine = {"value": work()}
    except OSError as error:
        mine = {"error": (error.errno, f"rank {world.rank}: {error}")}
    told = world.told_by_all(mine)
    for outcome in told:
        if "error" in outcome:
            raise OSError(*outcome["error"])
    return [outcome["value"] for outcome in told]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint of either form; whoever is killed in the middle leaves none that looks like one."""
    if path.is_dir():
        leftover = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(leftover, ignore_errors=True)
        os.rename(path, leftover)
        path = leftover
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_parts(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint's folder and make sure that all is there, unchanged.

    Returns:
        What `read_checkpoint` gives of one file. Its tensors are whole, and read when the first of them is used.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no whole checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {str(folder)!r}")
    try:
        content = json.loads((folder / DOCUMENT_NAME).read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {content['version']}, this library reads version {_VERSION}")
        if content["sha256"] != _digest_of_content(content):
            raise ValueError(f"the contents of {DOCUMENT_NAME} do not match their checksum")
        for name, digest in content["files"].items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if _digest(folder / name) != digest:
                raise ValueError(f"the contents of {name} do not match their checksum")
        document = json.loads(content["checkpoint"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder} is not a whole checkpoint ({type(error).__name__}: {error}): it is incomplete or damaged; use "
            "an earlier checkpoint"
        ) from error
    return Checkpoint(folder, document, _WholeTensors(folder))


class _WholeTensors(Mapping[str, Tensor]):
    """All tensors of a folder, put together on the CPU when the first of them is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _sizes(self.folder).items()}
        _load(tensors, self.folder)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def restore_parts(
    checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> int:
    """Put a checkpoint of either form into a sharded model and its optimizer; each process reads its own part.

    Returns:
        The iteration that was saved.

    Raises:
        ValueError: the checkpoint does not fit; the first difference is named, and nothing has changed.
    """
    document, folder = checkpoint.document, Path(str(checkpoint.src))
    if folder.is_dir():
        sizes = _sizes(folder)
    else:
        sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    # What was saved, without its numbers, is enough to see whether it fits.
    shapes = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}
    check_model(model, unpack(document["model"], shapes))
    own, targets = model.state_dict(), {}
    for key, name in stored_names(document["model"]).items():
        targets.setdefault(name, own[key])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, (size, dtype) in sizes.items():
        match name.split("."):
            case ["optimizer", "state", number, _] if size == parameters[int(number)].shape:
                targets[name] = torch.zeros_like(parameters[int(number)], dtype=dtype, requires_grad=False)
            case ["model", *_]:
                pass
            case _:
                targets[name] = torch.empty(size, dtype=dtype)
    if folder.is_dir():
        _load(targets, folder)
    else:
        for name, target in targets.items():
            _own_part(checkpoint.tensors[name], target, world)
    saved_optimizer = unpack(document["optimizer"], targets)
    check_optimizer(optimizer, saved_optimizer)
    load_optimizer(optimizer, saved_optimizer)
    return document["iteration"]


@torch.no_grad()
def _own_part(whole: Tensor, target: Tensor, world: World) -> None:
    part = local_part(target)
    if part is target:
        part.copy_(whole)
    elif part.numel():
        part.copy_(whole.chunk(world.size)[world.rank])


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    import torch.distributed.checkpoint as dcp

    described = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in described.items()}  # ty: ignore


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place; of those that are sharded, what lies in this process."""
    import torch.distributed.checkpoint as dcp

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_content(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
