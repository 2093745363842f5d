"""Build the site of the documentation in runs/site/html: `uv run --group docs docs/site/build.py`.

Its pages are those of docs/, the README and other pages outside docs/, and one for each module of basic/, made from the
docstrings. A link without a target, a name that does not exist and a docstring that cannot be read are errors.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import tomli_w

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "local/experiments/README.md": "experiments.md",
    "local/bench/README.md": "benchmarks/scripts.md",
}
"""Pages outside docs/: path in the repository, and on the site."""

LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
NAME = re.compile(r"(?<![`\[])`(basic(?:\.\w+)+)`(?![`\]])")
LATE = "\n[](){#basic.training.train_text}\n`train_text`: [basic.commands.own_text.train_text][], imported when used.\n"


def main() -> None:
    folder = REPOSITORY / "runs" / "site"
    shutil.rmtree(folder, ignore_errors=True)
    write_pages(folder / "docs")
    config = tomllib.loads((REPOSITORY / "docs/site/zensical.toml").read_text(encoding="utf-8"))
    fill_navigation(config["project"])
    config["project"]["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(REPOSITORY)]
    (folder / "zensical.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(built.stdout)
    # "griffe: " begins what is wrong in a docstring, which is no warning to the strict mode.
    sys.exit(built.returncode or "griffe: " in built.stdout)


def modules() -> dict[str, str]:
    """The page on the site of each module's file."""
    pages = {}
    for path in sorted((REPOSITORY / "basic").rglob("*.py")):
        page = path.relative_to(REPOSITORY / "basic").with_suffix(".md")
        page = page.with_name("index.md") if page.name == "__init__.md" else page
        pages[path.relative_to(REPOSITORY).as_posix()] = f"reference/{page.as_posix()}"
    return pages


def write_pages(docs: Path) -> None:
    """Copy the pages, with links that fit the site, and write those of the reference."""
    shutil.copytree(REPOSITORY / "docs", docs, ignore=shutil.ignore_patterns("*.py", "*.toml"))
    for path in sorted([*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / source for source in PAGES)]):
        source = path.relative_to(REPOSITORY).as_posix()
        target = docs / address(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(for_site(path.read_text(encoding="utf-8"), source, docs), encoding="utf-8")
    for source, page in modules().items():
        name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        (docs / page).parent.mkdir(parents=True, exist_ok=True)
        content = f"---\ntitle: {name}\n---\n::: {name}\n{LATE if name == 'basic.training' else ''}"
        (docs / page).write_text(content, encoding="utf-8")


def for_site(text: str, source: str, docs: Path) -> str:
    """A page with links to pages of the site; other files of the repository that it links to are copied."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if not (REPOSITORY / path).is_file():
            return match[0]
        if not (docs / address(path)).exists() and not path.endswith((".md", ".py")):
            (docs / address(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / path, docs / address(path))
        return posixpath.relpath(address(path), posixpath.dirname(address(source)) or ".") + (match[2] or "")

    text = LINK.sub(link, text)
    return text if source == "CHANGELOG.md" else NAME.sub(r"[`\1`][\1]", text)  # a change may name what is gone


def address(path: str) -> str:
    """Where a file of the repository is on the site."""
    return PAGES.get(path) or modules().get(path) or path.removeprefix("docs/")


def fill_navigation(project: dict[str, Any]) -> None:
    """Fill the empty sections: all modules, and all pages of a folder of docs/."""
    for section in project["nav"]:
        ((title, entries),) = section.items()
        if title == "Reference":
            section[title] = tree(sorted(modules().values(), key=lambda page: (page.count("/"), page)))
        elif not entries:
            folder = REPOSITORY / "docs" / title.lower()
            names = sorted(path.name for path in folder.glob("*.md"))
            names += [PurePosixPath(page).name for page in PAGES.values() if page.startswith(f"{folder.name}/")]
            names.sort(key=lambda name: name != "README.md")
            section[title] = [f"{folder.name}/{name}" for name in names]


def tree(pages: list[str]) -> list[Any]:
    """The navigation of the reference: the modules of a package, then the packages in it."""
    root: list[Any] = []
    sections = {"reference": root}
    for page in pages:
        folder, name = posixpath.split(page)
        if folder not in sections:
            sections[folder] = []
            sections[posixpath.dirname(folder)].append({posixpath.basename(folder): sections[folder]})
        sections[folder].append(page if name == "index.md" else {name.removesuffix(".md"): page})
    return root


if __name__ == "__main__":
    main()
