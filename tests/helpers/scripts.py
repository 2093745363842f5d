"""The scripts of local/, run in the test's process."""

import runpy
import sys
from pathlib import Path

LOCAL = Path(__file__).resolve().parents[2] / "local"


def run_script(monkeypatch, name: str, *arguments: object) -> None:
    """Do what `python local/NAME.py ARGUMENTS` does, in this process."""
    path = str(LOCAL / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(path, run_name="__main__")
