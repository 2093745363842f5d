"""Reading the records of a run's metrics.jsonl."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the training records of a metrics.jsonl, oldest first: those without a "kind"."""
    return read_records(path, None)


def read_records(path: str | os.PathLike, kind: str | None) -> list[dict[str, Any]]:
    """Read the records of one kind, oldest first.

    Args:
        kind: "evaluation", "sample", "checkpoint" or "nonfinite"; None for training records.
    """
    return [record for record in read_all_records(path) if record.get("kind") == kind]


def read_all_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read all records, oldest first, without lines that a crash or a full disk left incomplete."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
