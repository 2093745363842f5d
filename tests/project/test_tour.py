"""The notebook is stored without outputs, and all of it runs."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "local").glob("*.ipynb"))
SHORTER = {"steps=320,": "steps=40,", "(folder, 8000, 300,": "(folder, 1000, 100,"}


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, monkeypatch, capsys):
    """With an eighth of its data and training steps, and in this process."""
    monkeypatch.setattr(plt, "show", lambda *arguments: None)
    sources = ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"]
    for number, shorter in SHORTER.items():
        assert sum(number in source for source in sources) == 1
        sources = [source.replace(number, shorter) for source in sources]
    names: dict[str, object] = {"__name__": "__main__"}
    with mpl.rc_context({"backend": "agg"}):
        for number, source in enumerate(sources):
            code = compile(source, f"{path.name}, code cell {number}", "exec")
            exec(code, names)
            for figure in map(plt.figure, plt.get_fignums()):  # as at the end of a cell
                figure.canvas.draw()
            plt.close("all")
    assert "of the text was followed" in capsys.readouterr().out


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["tour.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    for number, cell in enumerate(cells_of(path)):
        assert cell.get("outputs", []) == [], f"cell {number} has outputs; clear them before committing"
        assert cell.get("execution_count") is None, f"cell {number} has been run; clear its outputs before committing"
        assert cell["metadata"] == {}, f"cell {number} has metadata: {cell['metadata']}"
    assert set(json.loads(path.read_text(encoding="utf-8"))["metadata"]) == {"kernelspec", "language_info"}
