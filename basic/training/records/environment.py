"""What a run was made with: code, environment and data, written down at every start and compared when it goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basic.common.files import atomic_write
from basic.tokens.index import Tokens
from basic.tokens.opening import mapped_file

_PACKAGE = Path(__file__).parents[2]
RECORD_NAME = "environment.json"

# Pieces of the tokens that their fingerprint is taken from, spread evenly: some milliseconds, whatever the file's size.
_PIECES, _PIECE_TOKENS = 64, 4096


def describe_start(
    train_tokens: np.ndarray, valid_tokens: np.ndarray, tokenizer: Any, device: torch.device, processes: int = 1
) -> dict[str, Any]:
    """Everything around a run that could make it another one, as plain values.

    Args:
        tokenizer: with a `fingerprint`, or not, or None.
        processes: that train together.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "code": _code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "tokenizer_fingerprint": getattr(tokenizer, "fingerprint", None),
        "train_tokens": describe_tokens(train_tokens),
        "valid_tokens": describe_tokens(valid_tokens),
    }


def read_starts(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """What `describe_start` said at every start of a run, the first one first; empty where nothing was written."""
    path = Path(run_dir) / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []


def add_start(run_dir: Path, start: dict[str, Any], step: int) -> None:
    """Write a start down beside the earlier ones, with the number of steps done before."""
    content = {"starts": [*read_starts(run_dir), {"step": step, **start}]}
    with atomic_write(run_dir / RECORD_NAME) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def check_start(run_dir: Path, start: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Compare a start with the first one of the run: other data is an error, another environment a warning.

    Raises:
        ValueError: the run was begun with other tokens or another tokenizer.
    """
    starts = read_starts(run_dir)
    if not starts:
        return
    first = starts[0]
    for name in ("train_tokens", "valid_tokens"):
        if first[name]["fingerprint"] != start[name]["fingerprint"]:
            raise ValueError(
                f"{run_dir} was begun with other {name} ({_where(first[name])}) than these ({_where(start[name])}); "
                "resume it with the tokens it had, or train on these in another folder"
            )
    fingerprints = first["tokenizer_fingerprint"], start["tokenizer_fingerprint"]
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        raise ValueError(
            f"{run_dir} was begun with another tokenizer (fingerprint {fingerprints[0]}) than this one "
            f"({fingerprints[1]}); resume it with its own, in {run_dir / 'tokenizer'}"
        )
    for name, remedy in (
        ("threads", f"set OMP_NUM_THREADS={first['threads']} for the same numbers to the last bit"),
        ("processes", "its numbers will differ in their last bits from those of a run that never stopped"),
        ("device", "its numbers will differ a little from those of a run that never stopped"),
        ("torch", "its numbers may differ a little from those of a run that never stopped"),
    ):
        before = first.get(name, 1)  # earlier versions had one process and did not say so
        if before != start[name]:
            warn(f"warning: {run_dir} was begun with {name} {before}, and goes on with {start[name]}; {remedy}")


def describe_tokens(tokens: Tokens) -> dict[str, Any]:
    """Where tokens come from, and a fingerprint of what they are, which reads little of them."""
    path, info = mapped_file(tokens)
    digest = hashlib.sha256(str(len(tokens)).encode())
    for begin in np.linspace(0, max(0, len(tokens) - _PIECE_TOKENS), _PIECES, dtype=np.int64):
        digest.update(tokens[begin : begin + _PIECE_TOKENS].astype("<i8").tobytes())
        if len(tokens) <= _PIECE_TOKENS:
            break
    return {
        "path": None if path is None else str(path),
        "count": len(tokens),
        "fingerprint": digest.hexdigest(),
        "sha256": None if info is None else info.sha256,
    }


def _where(tokens: dict[str, Any]) -> str:
    return f"{tokens['count']:,} tokens of {tokens['path'] or 'an array'}"


def _code_version() -> dict[str, Any]:
    """The package's version and, where its files belong to a git repository, the commit, and whether they differ."""
    try:
        package = version("basic")
    except PackageNotFoundError:  # only on the path
        package = None
    if not _git("ls-files", "--error-unmatch", "__init__.py"):
        return {"version": package, "commit": None, "changed": None}
    return {
        "version": package,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", ".")),
    }


def _git(*arguments: str) -> str:
    """What git says about the package's folder; empty where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
