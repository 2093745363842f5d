"""Merge the newest sharded checkpoint of a run into one file: `basic consolidate runs/my`.

Training with --parallel sharded writes each checkpoint as a folder (step_00001000/). All commands read such
folders. Other programs need one file (step_00001000.safetensors).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    source: tyro.conf.Positional[Path]
    """Run folder, or the folder of one checkpoint."""
    output: tyro.conf.Positional[Path | None] = None
    """File to write; None: the checkpoint folder's path with .safetensors at its end."""
    overwrite: bool = False
    """Replace the checkpoint file that exists."""


def main(options: Options) -> None:
    from basic.common.folder_lock import FolderLock
    from basic.common.outputs import Output, reserved_outputs
    from basic.training.checkpoints.file import write_checkpoint
    from basic.training.checkpoints.of_run import checkpoint_paths
    from basic.training.checkpoints.sharded import read_sharded_checkpoint

    is_run = (options.source / "config.toml").is_file()
    folders = [path for path in checkpoint_paths(options.source) if path.is_dir()] if is_run else [options.source]
    if not folders:
        raise FileNotFoundError(f"{options.source / 'checkpoints'} has no sharded checkpoint (a folder step_*)")
    output = options.output or folders[-1].with_name(folders[-1].name + ".safetensors")
    run_dir = output.parent.parent
    # In a run folder, the file is a checkpoint, so a process that trains this run must not be removing old ones.
    with (
        reserved_outputs([Output(output, "a checkpoint", is_checkpoint)], overwrite=options.overwrite),
        FolderLock(run_dir) if (run_dir / "config.toml").is_file() else nullcontext(),
    ):
        write_checkpoint(read_sharded_checkpoint(folders[-1]), output)
    print(f"wrote {output} ({output.stat().st_size / 1e6:,.1f} MB) from {folders[-1]}")


def is_checkpoint(path: Path) -> bool:
    from basic.training.checkpoints.file import read_checkpoint

    return bool(read_checkpoint(path))  # raises if it is none
