"""The lines of a run's metrics.jsonl: one record each, as JSON, with a checksum as its last key.

    {"step": 50, "tokens": 819200, ..., "crc32": "5f3a0c71"}

The checksum is the CRC-32 of the line without that key, in hexadecimal. A file in which no line has one, such as one
of an earlier version, is accepted.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basic.common.errors import InvalidInputError
from basic.common.files import open_file

_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')
_INTEGERS = ("step", "tokens")
_NUMBERS = (
    *("wall_s", "train_loss", "valid_loss", "learning_rate", "gradient_norm", "tokens_per_s", "save_s"),
    *("cpu_memory_bytes", "gpu_memory_bytes"),
)
_MAX_SHOWN_LINES = 5


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record, with its newline; the record has at least one key."""
    line = json.dumps(record, ensure_ascii=False).encode()
    return line[:-1] + f', "crc32": "{zlib.crc32(line):08x}"}}\n'.encode()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the training records of a metrics.jsonl, oldest first: those without a "kind"."""
    return read_records(path, None)


def logged_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the training records of a run, oldest first; none if it has not begun its log."""
    path = run_dir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def read_records(path: str | os.PathLike, kind: str | None) -> list[dict[str, Any]]:
    """Read the records of one kind, oldest first.

    Args:
        kind: "evaluation", "sample", "checkpoint", "nonfinite" or "source"; None for training records.
    """
    return [record for record in read_all_records(path) if record.get("kind") == kind]


def read_all_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read all records, oldest first.

    Lines that a crash or a full disk left incomplete, and damaged ones, are left out, and a warning names them.
    """
    with open_file(path) as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    has_checksums = any(_CHECKSUM.search(line) for _, line in lines)
    records, damaged = [], []
    for number, line in lines:
        record = _decode_record(line, has_checksums)
        damaged.append(number) if record is None else records.append(record)
    if damaged:
        shown = ", ".join(map(str, damaged[:_MAX_SHOWN_LINES])) + ", ..." * (len(damaged) > _MAX_SHOWN_LINES)
        warnings.warn(
            f"{os.fspath(path)}: lines that are incomplete or damaged are left out: {shown} "
            f"({len(damaged)} of {len(damaged) + len(records)})",
            stacklevel=2,
        )
    return records


def final_loss(logs: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
    """The loss of a model at its end in nats per token of whole documents, like the entropy of its source.

    None for several runs, without such a record, and if the run was resumed after it.
    """
    records = logs[0] if len(logs) == 1 else []
    at_end = [record for record in records if record.get("step") == records[-1].get("step")]
    return _number_of_source(at_end, "loss_nats")


def _number_of_source(records: Iterable[Mapping[str, Any]], name: str) -> float | None:
    found = [record.get(name) for record in records if record.get("kind") == "source"]
    return float(found[-1]) if found and isinstance(found[-1], int | float) and math.isfinite(found[-1]) else None


def entropy_to_draw(given: float | None, logs: Iterable[Iterable[Mapping[str, Any]]]) -> float | None:
    """The entropy in nats per token for a picture of runs: the given one, or else that of the source of all of them.

    Raises:
        InvalidInputError: the given one is not a positive number.
    """
    if given is None:
        known = {_number_of_source(log, "entropy_nats") for log in logs}
        return known.pop() if len(known) == 1 else None
    if not 0 < given < math.inf:
        raise InvalidInputError(f"the entropy must be above 0 nats per token, got {given:g}; leave it out for no line")
    return given


def describe_lost_records(path: Path, state: Any) -> str | None:
    """Say what a log lacks, if it ends before the last record that it had when a checkpoint was saved.

    Args:
        state: the extra data of the checkpoint; earlier versions did not save the step.
    """
    logged = state.get("logged_step") if isinstance(state, dict) else None
    last = max((record["step"] for record in read_all_records(path)), default=0) if path.exists() else 0
    if not isinstance(logged, int) or last >= logged:
        return None
    return (
        f"warning: {path} ends at step {last:,}, but had records up to step {logged:,} when the checkpoint was saved; "
        "they are lost, and the curves will have a gap"
    )


def _decode_record(line: bytes, has_checksum: bool) -> dict[str, Any] | None:
    """Return the record of a line, without its checksum; None if the line is damaged."""
    if has_checksum:
        if (match := _CHECKSUM.search(line)) is None:
            return None
        line = line[: match.start()] + b"}"
        if zlib.crc32(line) != int(match[1], 16):
            return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _has_expected_types(record) else None


def _has_expected_types(record: dict[str, Any]) -> bool:
    """Whether the values that this library computes with are what they should be; all but the step may be missing."""
    integers = all(type(record[key]) is int and 0 <= record[key] < 2**63 for key in _INTEGERS if key in record)
    # A record of a step that is not finite has its numbers as text, "nan".
    also = (str,) if record.get("kind") == "nonfinite" else (type(None),)
    numbers = all(_is_finite(record[key]) or isinstance(record[key], also) for key in _NUMBERS if key in record)
    return "step" in record and integers and numbers and isinstance(record.get("kind", ""), str)


def _is_finite(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))
