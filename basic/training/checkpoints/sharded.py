"""Checkpoints of a sharded model: a folder into which every rank writes its shards.

    step_00001000/checkpoint.json                      plain values, and the checksums of the other files
                  shard-00001-model-....safetensors    shards of rank 0, and so on

torch.distributed.checkpoint writes and reads the shards, as safetensors under flat names. checkpoint.json contains the
JSON document of `basic.training.checkpoints.file`, with the same tensor names. So any number of ranks can read both
forms. The folder gets its name when all files are complete, so a folder without a temporary name is a complete
checkpoint.
"""

from __future__ import annotations

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
from torch.nn import Module
from torch.optim import Optimizer

from basic.common.errors import DamagedFileError
from basic.common.files import load_object, sha256_of_file, sync_file, sync_folder, with_checksum
from basic.training.checkpoints.file import Checkpoint, parse_document
from basic.training.checkpoints.state import (
    check_model_state,
    check_optimizer_state,
    collect_state,
    load_optimizer_state,
)
from basic.training.checkpoints.tensor_tree import flatten_tree, tensor_names
from basic.training.parallel.world import World
from basic.transformer.optimizer import local_shard

METADATA_NAME = "checkpoint.json"
_VERSION = 1  # of METADATA_NAME
_METADATA_TYPES = {"version": int, "checkpoint": str, "files": dict, "sha256": str}
# While a file is serialized, no other Python code runs in its process, so files must be small.
_MAX_FILE_BYTES = 256 << 20


# --- Saving ------------------------------------------------------------------------------------------------------


class StagedShards(NamedTuple):
    """What this rank writes: the JSON document, its tensors and shards in CPU memory by name, and the DTensors that
    the shards belong to."""

    document: str
    tensors: dict[str, Tensor]
    dtensors: dict[str, Tensor]


def stage_shards(
    model: Module,
    optimizer: Optimizer,
    iteration: int,
    *,
    extra: dict | None = None,
    to_host: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> StagedShards:
    """Collect this rank's shards of a checkpoint in CPU memory, to be written later.

    Args:
        model, optimizer, iteration, extra, to_host: as for `file.stage_checkpoint`, also the errors raised.
    """
    dtensors: dict[str, Tensor] = {}

    def local_shards(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: local_shards(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, Tensor) and local_shard(value) is not value:
            dtensors[path] = value
            return local_shard(value).detach()
        return value

    tree = collect_state(model, optimizer, iteration, extra)
    for key in ("model", "optimizer"):
        tree[key] = local_shards(tree[key], key)
    document, tensors = flatten_tree(tree, to_host)
    return StagedShards(json.dumps(document), tensors, dtensors)


def write_shards(staged: StagedShards, path: str | os.PathLike, world: World) -> None:
    """Write a checkpoint folder together with all other ranks; an existing checkpoint at `path` is replaced.

    Raises:
        OSError: a disk is full, or fails otherwise, on any rank; nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _on_all_ranks(world, lambda: _make_empty_folder(temporary) if world.is_rank_0 else None)
        _write_tensors(staged, temporary, world)
        digests: dict[str, str] = {}
        for rank_digests in _on_all_ranks(world, lambda: _sync_files(temporary, world.rank)):
            digests |= rank_digests
        _on_all_ranks(world, lambda: _commit(staged.document, digests, temporary, target) if world.is_rank_0 else None)
    except BaseException:
        if world.is_rank_0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_tensors(staged: StagedShards, folder: Path, world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = {}
    for name, tensor in staged.tensors.items():
        dtensor: Any = staged.dtensors.get(name)
        state[name] = tensor
        if dtensor is not None:
            shape = {"shape": dtensor.shape, "stride": dtensor.stride()}
            state[name] = DTensor.from_local(tensor, world.cpu_mesh, dtensor.placements, run_check=False, **shape)
    writer = dcp.HuggingFaceStorageWriter(str(folder), _file_numbers(staged.tensors), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, process_group=world.checkpoint_group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"rank {rank}: {cause}") from error
        raise


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, into which each tensor is written."""
    numbers, number, size_bytes = {}, 1, 0
    for name, tensor in tensors.items():
        if size_bytes and size_bytes + tensor.nbytes > _MAX_FILE_BYTES:
            number, size_bytes = number + 1, 0
        numbers[name] = number
        size_bytes += tensor.nbytes
    return numbers


def _make_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left behind by a killed process
    folder.mkdir()


def _sync_files(folder: Path, rank: int) -> dict[str, str]:
    """Force this rank's shard files to the disk; return their checksums by name."""
    digests = {}
    for path in sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        sync_file(path)
        digests[path.name] = sha256_of_file(path)
    return digests


def _commit(document: str, digests: dict[str, str], temporary: Path, target: Path) -> None:
    """Write the metadata file, and rename the folder to its final name."""
    metadata = with_checksum({"version": _VERSION, "checkpoint": document, "files": digests}, "sha256")
    (temporary / METADATA_NAME).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    sync_file(temporary / METADATA_NAME)
    sync_folder(temporary)
    remove_checkpoint(target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def _on_all_ranks(world: World, work: Callable[[], Any]) -> list[Any]:
    """Call a function on every rank and return the results by rank; an OSError on one rank is raised on all."""
    try:
        own_outcome = {"value": work()}
    except OSError as error:
        own_outcome = {"error": (error.errno, f"rank {world.rank}: {error}")}
    outcomes = world.all_gather(own_outcome)
    for outcome in outcomes:
        if "error" in outcome:
            raise OSError(*outcome["error"])
    return [outcome["value"] for outcome in outcomes]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint of either form, if it exists.

    A folder is renamed first: if the process is killed meanwhile, the rest does not look like a checkpoint.
    """
    if path.is_dir():
        renamed = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(renamed, ignore_errors=True)
        os.rename(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- Loading -----------------------------------------------------------------------------------------------------


def read_sharded_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint folder and verify the checksums of all files.

    Returns:
        The same as `read_checkpoint` for one file. The tensors are complete, and read when the first of them is used.

    Raises:
        FileNotFoundError: the folder does not exist.
        DamagedFileError: the folder is not a complete checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {str(folder)!r}")
    try:
        metadata = load_object(folder / METADATA_NAME, _METADATA_TYPES)
        if metadata["version"] != _VERSION:
            raise ValueError(f"its version is {metadata['version']}, this library reads version {_VERSION}")
        if metadata != with_checksum(metadata, "sha256"):
            raise ValueError(f"the contents of {METADATA_NAME} do not match their checksum")
        for name, digest in metadata["files"].items():
            if Path(name).name != name or not isinstance(digest, str):
                raise ValueError(f"{name!r} is not a file of it with a checksum")
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if sha256_of_file(folder / name) != digest:
                raise ValueError(f"the contents of {name} do not match their checksum")
        document = parse_document(metadata["checkpoint"])
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            f"{folder} is not a complete checkpoint ({type(error).__name__}: {error}): it is incomplete or damaged; "
            "use an earlier checkpoint"
        ) from error
    return Checkpoint(folder, document, _FullTensors(folder))


def read_sharded_document(folder: Path) -> dict[str, Any]:
    """Read the JSON document of a checkpoint folder, without verifying checksums.

    Raises:
        DamagedFileError: the folder has no such document.
    """
    try:
        return parse_document(load_object(folder / METADATA_NAME, _METADATA_TYPES)["checkpoint"])
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{folder} is not a complete checkpoint ({type(error).__name__}: {error})") from error


class _FullTensors(Mapping[str, Tensor]):
    """The complete tensors of a checkpoint folder, on the CPU; all are read when the first one is requested."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in _read_shapes(self.folder).items()}
        _read_tensors(tensors, self.folder)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def load_sharded_state(checkpoint: Checkpoint, model: Module, optimizer: Optimizer, world: World) -> int:
    """Load a checkpoint of either form into a sharded model and its optimizer; each rank reads its own shards.

    Returns:
        The saved iteration.

    Raises:
        InvalidInputError: the checkpoint does not fit; the message names the first difference, and nothing has changed.
    """
    document, folder = checkpoint.document, Path(str(checkpoint.src))
    description = without_values(checkpoint)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in description.tensors.items()}
    check_model_state(model, description.entry("model"))
    check_optimizer_state(optimizer, description.entry("optimizer"), document.get("optimizer_class"))
    own_state, targets = model.state_dict(), {}
    for key, name in tensor_names(document["model"]).items():
        targets.setdefault(name, own_state[key])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, (shape, dtype) in shapes.items():
        match name.split("."):
            case ["optimizer", "state", number, _] if shape == parameters[int(number)].shape:
                targets[name] = torch.zeros_like(parameters[int(number)], dtype=dtype, requires_grad=False)
            case ["model", *_]:
                pass
            case _:
                targets[name] = torch.empty(shape, dtype=dtype)
    if folder.is_dir():
        _read_tensors(targets, folder)
    else:
        for name, target in targets.items():
            _copy_local_shard(checkpoint.tensors[name], target, world)
    load_optimizer_state(optimizer, checkpoint._replace(tensors=targets).entry("optimizer"))
    return document["iteration"]


def without_values(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of either form whose tensors are on the meta device: shapes and dtypes, which are soon read."""
    folder = Path(str(checkpoint.src))
    if folder.is_dir():
        shapes = _read_shapes(folder)
    else:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    return checkpoint._replace(tensors=tensors)


@torch.no_grad()
def _copy_local_shard(full: Tensor, target: Tensor, world: World) -> None:
    shard = local_shard(target)
    if shard is target:
        shard.copy_(full)
    elif shard.numel():
        shard.copy_(full.chunk(world.size)[world.rank])


def _read_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shapes and dtypes of the complete tensors in a checkpoint folder."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}  # ty: ignore


def _read_tensors(targets: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place from a checkpoint folder; of a DTensor, only the shard of this rank."""
    import torch.distributed.checkpoint as dcp

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads on its own
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
