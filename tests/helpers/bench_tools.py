"""The scripts of local/bench as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def bench_script(name: str) -> Any:
    """Import local/bench/NAME.py, which is in no package."""
    path = Path(__file__).resolve().parents[2] / "local" / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
