"""The notebooks run, and their stored outputs are those of a fresh run.

The tests run them in this process, with less data and fewer steps, and compare the outputs of all cells that have no
tag. Outputs of cells with the tag `varies` (texts of a model, times) only have to be of the same kinds; so do, in these
short runs, those with the tag `approximate` (losses).

`uv run python -m tests.project.test_notebooks` runs them in full and stores their outputs; with `--check` it compares
them instead, numbers of `approximate` cells within a tenth.
"""

from __future__ import annotations

import ast
import base64
import io
import math
import re
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "local").glob("*.ipynb"))
SHORT = {
    "ablation": "NUM_STORIES, STEPS, SEEDS = 120, 2, (0, 1)",
    "own_text": "TEXT, MINUTES, NUM_STORIES = Path('my.txt'), 1e-3, 60",
    "tour": "NUM_STORIES, STEPS, NUM_SAMPLES = 480, 4, 3",
}
MAX_BYTES = 300_000
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")

Outputs = list[tuple[str, str]]  # kinds and texts; of a picture, without its content


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def stored_outputs(cell: Any) -> Outputs:
    found: Outputs = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((output.name, output.text))
        else:
            found += _kinds(output.data)
    return found


def _kinds(data: dict[str, str]) -> Outputs:
    """A picture or a page without its plain text, which has an address in memory."""
    rich = [kind for kind in ("image/png", "text/html") if kind in data]
    return [(kind, data[kind] if kind == "text/html" else "") for kind in rich] or [("text/plain", data["text/plain"])]


def differences(name: str, cell: Any, fresh: Outputs, *, is_full: bool) -> list[str]:
    """What is different in the outputs of a cell."""
    stored, tags = stored_outputs(cell), cell.metadata.get("tags", [])
    kinds, fresh_kinds = [kind for kind, _ in stored], [kind for kind, _ in fresh]
    where = f"{name}, cell {cell.id}"
    if kinds != fresh_kinds:
        return [f"{where} has outputs of the kinds {kinds}, a fresh run {fresh_kinds}"]
    if "varies" in tags or ("approximate" in tags and not is_full):
        return []
    wrong = []
    for (_, before), (_, now) in zip(stored, fresh, strict=True):
        same = before == now
        if "approximate" in tags:
            numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(text)] for text in (before, now)]
            same = len(numbers[0]) == len(numbers[1]) and all(
                math.isclose(*pair, rel_tol=0.1) for pair in zip(*numbers, strict=True)
            )
        if not same:
            wrong.append(f"{where} has the output\n{before}\na fresh run\n{now}")
    return wrong


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_outputs_are_those_stored(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    threads, names = torch.get_num_threads(), {"__name__": "__main__"}
    wrong: list[str] = []
    with mpl.rc_context({"backend": "agg"}):
        for cell in code_cells(path):
            source = SHORT[path.stem] if "parameters" in cell.metadata.get("tags", []) else cell.source
            wrong += differences(path.stem, cell, run_cell(source, f"{path.name}, {cell.id}", names), is_full=False)
    torch.set_num_threads(threads)
    assert not wrong, "\n".join([*wrong, "to store fresh outputs: uv run python -m tests.project.test_notebooks"])


def run_cell(source: str, name: str, names: dict[str, Any]) -> Outputs:
    """Run a cell as IPython does: the value of a last expression is an output, and so are figures."""
    *body, last = ast.parse(source, name).body
    shown = last if isinstance(last, ast.Expr) and not source.rstrip().endswith(";") else None
    printed, found = io.StringIO(), []
    with redirect_stdout(printed):
        exec(compile(ast.Module(body if shown else [*body, last], []), name, "exec"), names)
        value = eval(compile(ast.Expression(shown.value), name, "eval"), names) if shown else None
    if printed.getvalue():
        found.append(("stdout", printed.getvalue()))
    if value is not None:
        found += _kinds(DisplayFormatter().format(value)[0])
    for figure in map(plt.figure, plt.get_fignums()):
        figure.canvas.draw()
        found.append(("image/png", ""))
    plt.close("all")
    return found


def test_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHORT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_complete_and_small(path):
    assert path.stat().st_size < MAX_BYTES
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code_cells(path)) == 1
    assert any(cell.outputs for cell in code_cells(path))
    text = path.read_text(encoding="utf-8")
    assert "## Exercises" in text
    assert "## Solutions" in text
    assert '"output_type": "error"' not in text
    for private in (str(Path.home()), tempfile.gettempdir()):
        assert f"{private}/" not in text


def test_a_changed_output_is_found():
    cell = code_cells(NOTEBOOKS[0])[0]
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="loss 1.00\n")]
    assert differences("a", cell, [("stdout", "loss 1.01\n")], is_full=False)
    assert differences("a", cell, [], is_full=False)
    cell.metadata["tags"] = ["approximate"]
    assert not differences("a", cell, [("stdout", "loss 1.01\n")], is_full=True)
    assert differences("a", cell, [("stdout", "loss 1.20\n")], is_full=True)
    assert not differences("a", cell, [("stdout", "loss 1.20\n")], is_full=False)


def run_in_full(path: Path) -> Any:
    """Run a notebook with a kernel of its own, in an empty folder."""
    from nbclient import NotebookClient
    from PIL import Image

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": folder}})
        client.coalesce_streams = True
        client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("execution_count" if output.output_type != "execute_result" else "", None)
            if output.output_type == "execute_result":
                output.execution_count = None
            if "image/png" in output.get("data", {}):
                picture, small = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))), io.BytesIO()
                picture.convert("RGB").quantize(64).save(small, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return notebook


def main() -> None:
    names = [argument for argument in sys.argv[1:] if argument != "--check"]
    wrong = []
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        print(f"running {path}", flush=True)
        notebook = run_in_full(path)
        if "--check" in sys.argv:
            fresh = [stored_outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
            for cell, outputs in zip(code_cells(path), fresh, strict=True):
                wrong += differences(path.stem, cell, outputs, is_full=True)
        else:
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
