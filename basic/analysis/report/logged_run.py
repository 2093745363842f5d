"""What a run has left in its folder, read for a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from basic.tokens.info import TokenFileInfo
from basic.tokens.opening import find_info
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run_config
from basic.training.settings import RunConfig

X_AXES = {"step": "steps", "tokens": "tokens", "wall_s": "time"}


class LoggedRun(NamedTuple):
    """What a run has left in its folder."""

    folder: Path
    config: RunConfig
    records: list[dict[str, Any]]
    training: list[dict[str, Any]]
    """The training records that can be shown: a damaged one may have lost its position."""
    validation: TokenFileInfo | None

    @classmethod
    def read(cls, folder: Path) -> LoggedRun:
        config, records = load_run_config(folder), read_all_records(folder / "metrics.jsonl")
        training = [record for record in records if "kind" not in record and None not in map(record.get, X_AXES)]
        return cls(folder, config, records, training, token_file_info(config.data.valid_tokens, folder))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def skipped(self) -> list[int]:
        """Steps without an update."""
        return [record["step"] for record in self.records if record.get("kind") == "nonfinite"]


def token_file_info(path: str, run_dir: Path) -> TokenFileInfo | None:
    """Read the sidecar of a token file at its path in the configuration, or else in the run's folder."""
    for candidate in (Path(path), run_dir / Path(path).name) if path else ():
        if (info := find_info(candidate)) is not None:
            return info
    return None
