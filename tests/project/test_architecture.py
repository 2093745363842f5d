"""Where things are, and which way imports go: the layout as a test, so that it stays a map."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BASIC = sorted((REPOSITORY / "basic").rglob("*.py"))
# Benchmarks run us beside the peers, and scratch work is nobody's business.
LOCAL = [
    path
    for path in sorted((REPOSITORY / "local").rglob("*.py"))
    if path.relative_to(REPOSITORY).parts[1] not in ("bench", "scratch")
]

# What each module or folder directly under basic/ may import of ours, besides what is in the same folder.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "bpe": set(),
    "transformer": set(),
    "bytes_utils": {"common"},
    "tokens": {"common"},
    "pretokenization": {"bpe", "common"},
    "model": {"common", "transformer"},
    "Tokenizer": {"bpe", "bytes_utils", "common", "pretokenization", "tokens"},
    "corpus": {"bpe", "bytes_utils", "common", "pretokenization"},
    "train_bpe": {"bpe", "common", "corpus", "pretokenization"},
    "encoding": {"Tokenizer", "bpe", "common", "corpus", "tokens"},
    "generation": {"common", "model", "transformer"},
    "training": {"common", "generation", "model", "tokens", "transformer"},
    "formats": {"Tokenizer", "bpe", "bytes_utils", "common", "model", "pretokenization", "training"},
    "analysis": {"Tokenizer", "common", "generation", "model", "tokens", "training", "transformer"},
}
MAY_IMPORT["assignment_question"] = set(MAY_IMPORT)

# These hand names on to users; our own modules import from where a thing is defined.
FACES = {"basic.training", "basic.generation", "basic.formats"}

# Two walls. Text becomes tokens without torch; training never reaches the tokenizer.
TEXT_TO_TOKENS = (
    *("basic.bytes_utils", "basic.pretokenization", "basic.train_bpe", "basic.Tokenizer", "basic.encoding"),
    *("basic.common", "basic.bpe", "basic.corpus", "basic.tokens"),
    *("basic.formats.tokenizer_json", "basic.formats.tiktoken_ranks", "basic.formats.equivalent_merges"),
)
TOKENIZERS = ("basic.Tokenizer", "basic.pretokenization", "basic.train_bpe", "basic.bpe", "basic.corpus")

# Packages that only some modules may import.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": (
        *("basic.model", "basic.transformer", "basic.generation", "basic.training", "basic.assignment_question"),
        *("basic.formats.export_llama", "basic.formats.import_model", "basic.formats.llama_names"),
        *("basic.analysis.accounting", "basic.analysis.evaluation", "basic.analysis.playground"),
        *("basic.analysis.report", "basic.analysis.sweep"),
    ),
    "safetensors": ("basic.training.checkpoints.file", "basic.formats.export_llama", "basic.formats.import_model"),
    "numba": ("basic.bpe.kernels.instructions",),
    "llvmlite": ("basic.bpe.kernels.instructions",),
    "triton": ("basic.transformer.kernels", "basic.generation.decode_kernels", "basic.generation.decoder"),
    "matplotlib": ("basic.analysis.plotting",),
    "starlette": ("basic.analysis.playground_server",),
    "anyio": ("basic.analysis.playground_server",),
    "distributed": ("basic.corpus.work_folder",),
    "fsspec": ("basic.corpus.sources",),
    "aiohttp": ("basic.corpus.sources",),
    "wandb": ("basic.training.records.trackers",),
    "tensorboard": ("basic.training.records.trackers",),
}

MOST_ENTRIES = 10
NOT_COUNTED = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}


def imports(path: Path) -> Iterator[str]:
    """Every name that a file imports, wherever it does, also for type checkers only: `from a.b import c` is a.b.c."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{full_module(node)}.{alias.name}" for alias in node.names)


def full_module(node: ast.ImportFrom) -> str:
    """The x of `from x import ...`; relative imports, which our modules do not use, count as ours."""
    return ".".join(part for part in ("basic" if node.level else None, node.module) if part)


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def module_of(path: Path) -> str:
    """basic/bpe/arrays.py is basic.bpe.arrays, basic/bpe/__init__.py is basic.bpe."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in BASIC}


def is_within(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@cache
def our_imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports."""
    found = set()
    for imported in imports(MODULES[module]):
        parts = imported.split(".")
        if parts[0] == "basic":
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            found.add(next(prefix for prefix in prefixes if prefix in MODULES))
    return frozenset(found)


def reached_from(modules: set[str]) -> dict[str, list[str]]:
    """All modules that these lead to, each with the way there."""
    ways = {module: [module] for module in sorted(modules)}
    waiting = list(ways)
    while waiting:
        module = waiting.pop()
        for imported in our_imports(module) - ways.keys():
            ways[imported] = [*ways[module], imported]
            waiting.append(imported)
    return ways


def circle_through(module: str) -> list[str] | None:
    """A way along imports from a module back to itself."""
    for imported in sorted(our_imports(module)):
        way = reached_from({imported}).get(module)
        if way is not None:
            return [module, *way]
    return None


@pytest.mark.parametrize("module", [module for module in MODULES if module != "basic"])
def test_imports_go_one_way(module: str) -> None:
    top = module.split(".")[1]
    assert top in MAY_IMPORT, (
        f"basic/{top} is not in the layout: put the module into one of the folders {', '.join(sorted(MAY_IMPORT))}, or "
        "give it a row in MAY_IMPORT and in the README's tree"
    )
    allowed = MAY_IMPORT[top] | {top}
    for imported in sorted(our_imports(module)):
        assert imported != "basic" or module == "basic", f"{name(MODULES[module])} imports a name that does not exist"
        assert imported.split(".")[1] in allowed, (
            f"{name(MODULES[module])} imports {imported}, but {top} may import only {', '.join(sorted(allowed))}: pass "
            "what it needs as an argument, or move the code that needs it up to a module that may import both"
        )
        assert imported not in FACES or module in FACES, (
            f"{name(MODULES[module])} imports from {imported}/__init__.py, which is for users: import from the module "
            "that defines the name"
        )


def test_imports_make_no_circle() -> None:
    circles = {" -> ".join(circle) for module in MODULES if (circle := circle_through(module))}
    assert not circles, (
        f"imports go in a circle (lazy ones count): {min(circles, key=len)}; move what both need into a third module"
    )


@pytest.mark.parametrize("module", [module for module in MODULES if is_within(module, *TEXT_TO_TOKENS)])
def test_text_to_tokens_never_reaches_torch(module: str) -> None:
    for reached, way in reached_from({module}).items():
        assert not any(is_within(imported, "torch") for imported in imports(MODULES[reached])), (
            f"text becomes tokens without torch, but {' -> '.join(way)} imports it"
        )


def test_training_never_reaches_the_tokenizer() -> None:
    for reached, way in reached_from({module for module in MODULES if is_within(module, "basic.training")}).items():
        assert not is_within(reached, *TOKENIZERS), (
            f"training takes token ids and a tokenizer that it is given, but {' -> '.join(way)} imports one"
        )


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_imported_where_they_belong(module: str) -> None:
    packages = {imported.split(".")[0] for imported in imports(MODULES[module])}
    for package, homes in ONLY_IN.items():
        assert package not in packages or is_within(module, *homes), (
            f"{name(MODULES[module])} imports {package}, which only {', '.join(homes)} may: call a function there"
        )


def test_imports_are_absolute() -> None:
    for path in BASIC:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{name(path)}, line {node.lineno}: write the whole path, from basic.... import ..."
            )


FOLDERS = sorted({path.parent for path in BASIC} | {REPOSITORY / "basic" / "analysis" / "pages"})


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_no_folder_has_more_than_ten_entries(folder: Path) -> None:
    entries = sorted(path.name for path in folder.iterdir() if path.name not in NOT_COUNTED)
    if folder == REPOSITORY / "basic":
        entries = [entry for entry in entries if (folder / entry).is_dir()]
        tops = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert tops | set(entries) == set(MAY_IMPORT), (
            "the files and folders on top of basic/ are those of the README's tree: put a new module into a folder"
        )
    assert len(entries) <= MOST_ENTRIES, (
        f"{name(folder)} has {len(entries)} entries, at most {MOST_ENTRIES} fit on a map: {', '.join(entries)}; merge "
        "two that change together, or move some that belong together into a folder of their own"
    )


def test_packages_hold_only_a_docstring() -> None:
    for path in BASIC:
        if path.name == "__init__.py" and module_of(path) not in FACES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{name(path)} needs a docstring that says what the folder is for"
            assert len(tree.body) == 1, f"{name(path)} holds code: only {', '.join(sorted(FACES))} hand names on"


def test_no_names_differ_by_case_alone() -> None:
    """Tokenizer.py and tokenizer.py are one file on some file systems."""
    names = [str(path.relative_to(REPOSITORY)).lower() for path in BASIC]
    folders = [str(folder.relative_to(REPOSITORY)).lower() for folder in FOLDERS]
    stems = [stem.removesuffix(".py") for stem in names] + folders
    assert sorted(set(stems)) == sorted(stems)


@pytest.mark.parametrize(
    "folder", ["common", "bpe", "corpus", "tokens", "training", "generation", "formats", "analysis"]
)
def test_tests_mirror_the_packages(folder: str) -> None:
    assert (REPOSITORY / "basic" / folder / "__init__.py").is_file()
    assert list((REPOSITORY / "tests" / folder).glob("test_*.py")), f"tests/{folder} holds the tests of basic/{folder}"


@pytest.mark.parametrize("path", BASIC + LOCAL, ids=name)
def test_all_that_is_imported_is_declared(path: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    declared = [line for lines in (project["dependencies"], *extras) for line in lines]
    packages = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in declared}
    packages |= {"basic", "triton", "llvmlite"}  # these come with torch and numba
    packages |= {"compression"}  # and this with Python 3.14
    packages |= sys.stdlib_module_names
    assert {module.split(".")[0] for module in imports(path)} <= packages


def test_adapters_can_be_copied_alone() -> None:
    packages = {module.split(".")[0] for module in imports(REPOSITORY / "tests" / "adapters.py")}
    assert packages <= {"basic", "torch", "numpy", "jaxtyping"} | sys.stdlib_module_names
    assert not re.search(r"^\s*from \.", (REPOSITORY / "tests" / "adapters.py").read_text(encoding="utf-8"), re.M)


def test_text_to_tokens_loads_neither_torch_nor_numba() -> None:
    """As a process sees it: numba is imported when a kernel is needed, torch not at all."""
    lines = ["import importlib, sys"]
    for module in MODULES:
        if is_within(module, *TEXT_TO_TOKENS) and not is_within(module, "basic.bpe.kernels", "basic.bpe.__main__"):
            lines.append(f"importlib.import_module('{module}')")
            lines.append(f"assert not {{'torch', 'numba'}} & sys.modules.keys(), '{module} loads torch or numba'")
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("face", sorted(FACES))
def test_faces_hand_on_names(face: str) -> None:
    """What other people's scripts import by short paths."""
    expected = {
        "basic.training": "train load_run TrainConfig RunConfig DataConfig read_metrics",
        "basic.generation": "generate complete stream",
        "basic.formats": "save_tokenizer_json save_tiktoken load_tiktoken export_hf import_hf import_pt",
    }
    program = f"from {face} import {', '.join(expected[face].split())}"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
