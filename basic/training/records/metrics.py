"""Reading a run's metrics.jsonl."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The training records of a metrics log, oldest first; the log's other records have a kind."""
    return read_records(path, None)


def read_records(path: str | os.PathLike, kind: str | None) -> list[dict[str, Any]]:
    """The records of one kind in a metrics log, oldest first.

    Args:
        kind: "evaluation", "sample", "checkpoint" or "nonfinite"; None for the training records.
    """
    return [record for record in read_all_records(path) if record.get("kind") == kind]


def read_all_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a metrics log; lines that a crash or a full disk cut off are left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
