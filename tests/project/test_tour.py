"""The notebook is stored without outputs. Another test runs it (nbmake, see pyproject.toml)."""

import json
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "local").glob("*.ipynb"))


def test_plain_pytest_runs_every_notebook():
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"][
        "ini_options"
    ]
    assert "--nbmake" in options["addopts"].split()
    assert NOTEBOOKS
    assert {str(path.relative_to(REPOSITORY)) for path in NOTEBOOKS} <= set(options["testpaths"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(notebook["cells"]):
        assert cell.get("outputs", []) == [], f"cell {number} has outputs; clear them before committing"
        assert cell.get("execution_count") is None, f"cell {number} has been run; clear its outputs before committing"
        assert cell["metadata"] == {}, f"cell {number} has metadata: {cell['metadata']}"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
