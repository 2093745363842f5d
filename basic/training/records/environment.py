"""The code, environment and data of a run, saved at every start in environment.json and compared on resuming."""

from __future__ import annotations

import hashlib
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

from basic.common.errors import DamagedFileError, InvalidInputError, WrongTokenizerError
from basic.common.files import load_object, with_checksum, write_json
from basic.tokens.index import Tokens
from basic.tokens.opening import mapped_file, open_mask

_PACKAGE = Path(__file__).parents[2]
_FILE_NAME = "environment.json"

# Tokens are fingerprinted by evenly spaced chunks, which takes milliseconds for a file of any size.
_NUM_CHUNKS, _CHUNK_TOKENS = 64, 4096


def describe_environment(
    run_dir: Path,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: Any,
    device: torch.device,
    processes: int = 1,
) -> dict[str, Any]:
    """Collect everything outside the configuration that can change a run's results, as JSON values.

    Args:
        run_dir: token files in it are named relative to it, so that it may be moved.
        tokenizer: None, or any object; its `fingerprint` is saved if it has one.
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
        "train_tokens": _describe_tokens(train_tokens, run_dir),
        "valid_tokens": _describe_tokens(valid_tokens, run_dir),
    }


def read_environments(run_dir: Path) -> list[dict[str, Any]]:
    """Read the environments of all starts of a run, oldest first; empty if the run has no such file.

    Raises:
        DamagedFileError: the file cannot be read.
    """
    path = run_dir / _FILE_NAME
    starts = load_object(path, {"starts": list})["starts"] if path.is_file() else []
    if not all(map(_is_environment, starts)):
        raise DamagedFileError(
            f"{path} is damaged: it does not describe the starts of a run; restore it from a copy, or remove it to "
            "resume without a comparison of the data"
        )
    return starts


def _is_environment(start: Any) -> bool:
    """Whether a value has what `check_environment` compares."""
    if not isinstance(start, dict) or "tokenizer_fingerprint" not in start:
        return False
    tokens = (start.get("train_tokens"), start.get("valid_tokens"))
    return all(isinstance(each, dict) and type(each.get("count")) is int and "fingerprint" in each for each in tokens)


def append_environment(run_dir: Path, environment: dict[str, Any], step: int) -> None:
    """Save the environment of a start, with the number of steps done before it."""
    content = {"starts": [*read_environments(run_dir), {"step": step, **environment}]}
    write_json(run_dir / _FILE_NAME, with_checksum(content), indent=2)


def check_environment(run_dir: Path, environment: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Compare an environment with that of the run's first start, and warn if results may differ.

    Raises:
        InvalidInputError: the run was started with other tokens.
        WrongTokenizerError: the run was started with another tokenizer.
    """
    environments = read_environments(run_dir)
    if not environments:
        return
    first = environments[0]
    for name in ("train_tokens", "valid_tokens"):
        if first[name]["fingerprint"] != environment[name]["fingerprint"]:
            raise InvalidInputError(
                f"{run_dir} was started with other {name} ({_summary(first[name])}) than these "
                f"({_summary(environment[name])}); resume it with its own tokens, or train on these in another folder"
            )
    check_run_tokenizer(run_dir, environment["tokenizer_fingerprint"])
    for name, consequence in (
        ("threads", f"set OMP_NUM_THREADS={first.get('threads')} for bitwise equal results"),
        ("processes", "the results will differ in their last bits from those of an uninterrupted run"),
        ("device", "the results will differ slightly from those of an uninterrupted run"),
        ("torch", "the results may differ slightly from those of an uninterrupted run"),
    ):
        before = first.get(name, 1)  # earlier versions always had one process and did not save the number
        if before != environment[name]:
            warn(
                f"warning: {run_dir} was started with {name} {before} and is resumed with {environment[name]}; "
                f"{consequence}"
            )


def check_run_tokenizer(run_dir: Path, fingerprint: str | None) -> None:
    """Check that a tokenizer is the one with which a run was started.

    Args:
        fingerprint: of the tokenizer; None for no check, as for a run that does not know its own.

    Raises:
        WrongTokenizerError: it is another one, or its files were changed.
    """
    for start in read_environments(run_dir)[:1]:
        expected = start["tokenizer_fingerprint"]
        if None not in (expected, fingerprint) and expected != fingerprint:
            raise WrongTokenizerError(
                f"{run_dir} was started with another tokenizer (fingerprint {expected}) than this one ({fingerprint}); "
                f"use its own, in {run_dir / 'tokenizer'}, or restore that from a copy"
            )


def _describe_tokens(tokens: Tokens, run_dir: Path) -> dict[str, Any]:
    """Return where tokens come from, and a fingerprint of a sample of them."""
    path, info = mapped_file(tokens)
    mask = open_mask(tokens) if info is None else None  # of a part of a file
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(0, len(tokens) - _CHUNK_TOKENS), _NUM_CHUNKS, dtype=np.int64):
        digest.update(tokens[start : start + _CHUNK_TOKENS].astype("<i8").tobytes())
        if mask is not None:
            digest.update(mask[start : start + _CHUNK_TOKENS].tobytes())
        if len(tokens) <= _CHUNK_TOKENS:
            break
    if info is not None and info.mask_sha256 is not None:
        digest.update(info.mask_sha256.encode())
    if path is not None:
        path, folder = path.resolve(), run_dir.resolve()  # a dataset is named as it was given
        path = path.relative_to(folder) if path.is_relative_to(folder) else path
    return {
        "path": None if path is None else str(path),
        "count": len(tokens),
        "fingerprint": digest.hexdigest(),
        "sha256": None if info is None else info.sha256,
    }


def _summary(tokens: dict[str, Any]) -> str:
    return f"{tokens['count']:,} tokens of {tokens.get('path') or 'an array'}"


def _code_version() -> dict[str, Any]:
    """Return the package's version, and its git commit and whether files were changed since, if git tracks it."""
    try:
        package = version("basic")
    except PackageNotFoundError:  # not installed, only on the path
        package = None
    if not _git("ls-files", "--error-unmatch", "__init__.py"):
        return {"version": package, "commit": None, "changed": None}
    return {
        "version": package,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", ".")),
    }


def _git(*arguments: str) -> str:
    """Run git in the package's folder; return "" if there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
