"""The Markdown pages: links have a target, named files exist, and the README's line counts are true.

`uv run python -m tests.project.test_docs` updates the line counts.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted(REPOSITORY.glob("docs/**/*.md")), *sorted(REPOSITORY.glob("local/**/README.md"))]

FOLDERS = ("basic", "local", "tests", "docs", ".ci", ".github")  # data/ and runs/ are made by the user
SOURCES = {
    f"/{path.relative_to(REPOSITORY).as_posix()}"
    for folder in ("basic", "local", "tests")
    for path in (REPOSITORY / folder).rglob("*.py")
}

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
# A file of the repository where no backticks mark it, as in a command.
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*\.\w+")

READING_ORDER = re.compile(r"^\| *\| *file *\| *lines *\|.*\n\|[-:| ]+\|\n((?:\|.*\n?)*)", re.MULTILINE)
ROW = re.compile(r"\| *(\d+) *\| *\[`([^`]+)`\]\(([^)]+)\) *\| *(\d+) *\|")


def broken_links(page: Path) -> list[str]:
    """The targets of relative links that do not exist."""
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if ":" not in target]
    return [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]


def missing_files(page: Path) -> list[str]:
    """The named files and folders of the repository that do not exist; a `*` stands for any name.

    A path begins at the repository's top folder. A Python file may also be named by the end of its path.
    """
    text = page.read_text(encoding="utf-8")
    code = {span for span in CODE.findall(text) if PATH.fullmatch(span)}
    full = {*FILE.findall(text), *(span for span in code if "/" in span and span.split("/")[0] in FOLDERS)}
    missing = {path for path in full if not any(REPOSITORY.glob(path.rstrip("/")))}
    ends = {span for span in code - full if span.endswith(".py") and "*" not in span}
    missing |= {end for end in ends if not any(source.endswith(f"/{end}") for source in SOURCES)}
    return sorted(missing)


def reading_order_errors(text: str) -> list[str]:
    """What is wrong in tables with the header `| | file | lines | ... |`: their numbers, links and line counts."""
    errors = []
    tables = [table.splitlines() for table in READING_ORDER.findall(text)]
    for number, row in (pair for table in tables for pair in enumerate(table, 1)):
        if not (match := ROW.match(row)):
            errors.append(f"{row!r} must look like | {number} | [`path`](path) | lines | what it holds |")
            continue
        position, name, target, lines = match.groups()
        if int(position) != number:
            errors.append(f"{name}: the row's number is {position}, must be {number}")
        if name != target or not (REPOSITORY / target).is_file():
            errors.append(f"{name}: the link must lead to this file, got {target!r}")
        elif int(lines) != (actual := num_lines(REPOSITORY / target)):
            errors.append(f"{name}: the table says {lines} lines, write {actual}")
    return errors if all(tables) and tables else [*errors, "no table with the header | | file | lines | ... | and rows"]


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def with_line_counts(text: str) -> str:
    """The text with the true line counts in its tables of files."""
    cell = re.compile(r"(\| *\[`([^`]+)`\]\(\2\) *\| *)\d+(?= *\|)")
    return cell.sub(lambda match: f"{match[1]}{num_lines(REPOSITORY / match[2])}", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_and_named_files_exist(page):
    assert not (broken := broken_links(page)), f"links without a target: {broken}"
    assert not (missing := missing_files(page)), f"files that do not exist: {missing}"


@pytest.mark.parametrize(("page", "most"), [(README, 160), (CONTRIBUTING, 110)], ids=["README.md", "CONTRIBUTING.md"])
def test_a_page_stays_short(page, most):
    lines = num_lines(page)
    assert lines <= most, f"{page.name} has {lines} lines, at most {most} are allowed: move details to docs/"


def missing_names(text: str) -> list[str]:
    """The names of basic/ in a page, in backticks or imported by an example, that do not exist."""
    names = {span for span in CODE.findall(text) if re.fullmatch(r"basic(\.\w+)+", span)}
    names |= {
        f"{module}.{name}"
        for module, imported in re.findall(r"^ *(?:>>> )?from (basic[\w.]*) import ([\w, ]+)", text, re.MULTILINE)
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|$)", imported.strip())
    }
    missing = []
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_names_in_a_page_exist(page):
    assert not (missing := missing_names(page.read_text(encoding="utf-8"))), f"names that do not exist: {missing}"


def test_missing_names_are_found():
    text = "`basic.model.Linear` `basic.model.Nope`\n    from basic.training import train, gone\n"
    assert missing_names(text) == ["basic.model.Nope", "basic.training.gone"]
    handout = (REPOSITORY / "docs" / "handout.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`basic\.[\w.]+`", handout)) > 30


PUBLIC = ["basic.model", "basic.Tokenizer", "basic.train_bpe", "basic.encoding", "basic.chat", "basic.pretokenization"]
PUBLIC += ["basic.bytes_utils", "basic.training", "basic.generation", "basic.formats"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_have_a_docstring(name):
    names: dict[str, object] = {}
    exec(f"from {name} import *", names)
    module = importlib.import_module(name)
    assert set(module.__all__) == names.keys() - {"__builtins__"}
    assert set(module.__all__) <= set(dir(module)), "tab completion does not offer a name"
    assert [each for each in module.__all__ if callable(names[each]) and not names[each].__doc__] == []


def test_line_counts_in_the_readme_are_true():
    errors = reading_order_errors(README.read_text(encoding="utf-8"))
    assert not errors, "README.md (python -m tests.project.test_docs updates counts):\n" + "\n".join(errors)


def test_wrong_references_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[a](page.md#top) [b](gone.md) ![c](gone.svg) [d](https://example.org/x)\n"
        "`basic/model.py` `basic/gone.py` `model.py` `gone.py` `data/train.bin` `tests/gpu/` `tests/gone/` `x.y`\n"
        "    uv run local/train.py --config local/configs/gone.toml local/experiments/*.toml local/gone/*.toml\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["gone.md", "gone.svg"]
    assert missing_files(page) == [
        *("basic/gone.py", "gone.py", "local/configs/gone.toml", "local/gone/*.toml", "tests/gone/")
    ]


def test_wrong_line_counts_are_found():
    header, path = "| | file | lines | holds |\n|---|---|---|---|\n", "basic/model.py"
    lines = num_lines(REPOSITORY / path)
    row = "| {} | [`{}`]({}) | {} | the Transformer |\n"
    right = "text\n\n" + header + row.format(1, path, path, lines)
    assert reading_order_errors(right) == reading_order_errors(right + "\ntext\n") == []
    assert with_line_counts("text\n\n" + header + row.format(1, path, path, 0)) == right
    assert "no table" in reading_order_errors("| | file | holds |\n|---|---|---|\n" + row)[0]
    assert "no table" in reading_order_errors(right + "\n" + header + "text\n")[0]
    assert "must look like" in reading_order_errors(header + "| 1 | basic/model.py | 5 | the Transformer |\n")[0]
    for number, target, count, error in [
        (1, path, lines + 1, f"{path}: the table says {lines + 1} lines, write {lines}"),
        (2, path, lines, f"{path}: the row's number is 2, must be 1"),
        (1, "basic/gone.py", lines, f"{path}: the link must lead to this file, got 'basic/gone.py'"),
    ]:
        wrong = header + row.format(number, path, target, count)
        assert reading_order_errors(wrong) == reading_order_errors(right + "\n" + wrong) == [error]


if __name__ == "__main__":
    README.write_text(with_line_counts(README.read_text(encoding="utf-8")), encoding="utf-8")
