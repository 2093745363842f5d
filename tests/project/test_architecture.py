"""The layout of the packages: what may import what, no import circles, and at most ten entries a folder."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BASIC = sorted((REPOSITORY / "basic").rglob("*.py"))
# Without the benchmarks, which also import other programs.
LOCAL = [
    path
    for path in sorted((REPOSITORY / "local").rglob("*.py"))
    if path.relative_to(REPOSITORY).parts[1] not in ("bench", "scratch")
]

# The modules and folders of basic/ that each of them may import, besides its own folder.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "bpe": {"common"},
    "transformer": {"common"},
    "bytes_utils": {"common"},
    "tokens": {"common"},
    "pretokenization": {"bpe", "common"},
    "model": {"common", "transformer"},
    "tokenizer_files": {"bpe", "bytes_utils", "common", "pretokenization"},
    "Tokenizer": {"bpe", "bytes_utils", "common", "pretokenization", "tokenizer_files", "tokens"},
    "corpus": {"bpe", "bytes_utils", "common", "pretokenization"},
    "train_bpe": {"bpe", "common", "corpus", "pretokenization"},
    "encoding": {"Tokenizer", "bpe", "common", "corpus", "tokens"},
    "generation": {"common", "model", "transformer"},
    "training": {"common", "generation", "model", "tokens", "transformer"},
    "formats": {
        *("Tokenizer", "bytes_utils", "chat", "common", "model", "pretokenization", "tokenizer_files"),
        *("training", "transformer"),
    },
    "analysis": {"Tokenizer", "chat", "common", "generation", "model", "tokens", "training", "transformer"},
}
MAY_IMPORT["chat"] = {"Tokenizer", "common", "corpus", "encoding", "tokenizer_files", "tokens"}
MAY_IMPORT["assignment_question"] = set(MAY_IMPORT)
# The commands: an eleventh folder, because they are the only modules that may import everything.
MAY_IMPORT["commands"] = set(MAY_IMPORT)

# The public names that these packages re-export. Our own modules import from the module that defines a name.
PUBLIC_NAMES = {
    "basic.training": "train train_text load_run TrainConfig RunConfig DataConfig read_metrics",
    "basic.generation": "generate complete stream",
    "basic.formats": "save_tokenizer_json save_tiktoken load_tiktoken export_hf export_gguf "
    "import_hf import_run import_pt load_model",
}

# Text to tokens never imports torch, and training never imports the tokenizer, directly or indirectly.
TEXT_TO_TOKENS = (
    *("basic.bytes_utils", "basic.pretokenization", "basic.train_bpe", "basic.Tokenizer", "basic.encoding"),
    *("basic.chat", "basic.common", "basic.bpe", "basic.corpus", "basic.tokens", "basic.tokenizer_files"),
    *("basic.formats.tokenizers", "basic.formats.gguf_tokenizer"),
)
TOKENIZERS = ("basic.Tokenizer", "basic.pretokenization", "basic.train_bpe", "basic.bpe", "basic.corpus")

# Third-party packages that only these modules may import.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": (
        *("basic.model", "basic.transformer", "basic.generation", "basic.training", "basic.assignment_question"),
        *("basic.formats.export_model", "basic.formats.import_model", "basic.formats.hf_names"),
        "basic.formats.gguf_names",
        *(
            "basic.analysis.accounting",
            "basic.analysis.attention",
            "basic.analysis.evaluation",
            "basic.analysis.playground",
        ),
        *("basic.analysis.report", "basic.analysis.sweep", "basic.commands"),
    ),
    "safetensors": ("basic.training.checkpoints.file", "basic.formats.export_model", "basic.formats.import_model"),
    "numba": ("basic.common.native.compiler",),
    "llvmlite": ("basic.common.native.compiler", "basic.common.native.object_files"),
    "triton": ("basic.transformer.kernels", "basic.generation.decode_kernels", "basic.generation.gpu_decoder"),
    "matplotlib": ("basic.analysis.plotting", "basic.analysis.sweep_plot"),
    "starlette": ("basic.analysis.playground",),
    "anyio": ("basic.analysis.playground",),
    "distributed": ("basic.corpus.work_folder",),
    "fsspec": ("basic.corpus.files",),
    "aiohttp": ("basic.corpus.files",),
    "pyarrow": ("basic.corpus.documents",),
    "gguf": ("basic.formats.gguf_file",),
    "jinja2": ("basic.chat",),
    "wandb": ("basic.training.records.trackers",),
    "tensorboard": ("basic.training.records.trackers",),
}

MAX_ENTRIES = 10
NOT_COUNTED = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}


def imports(path: Path) -> list[str]:
    """The full name of every import, also in functions and for type checkers: `from a import b` is a.b."""
    return imports_of(path.read_text(encoding="utf-8"))


@cache
def imports_of(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{full_module(node)}.{alias.name}" for alias in node.names]
    return found


def full_module(node: ast.ImportFrom) -> str:
    """The x of `from x import ...`; relative imports, which our modules do not use, count as ours."""
    return ".".join(name for name in ("basic" if node.level else None, node.module) if name)


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def is_within(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


class SourceTree:
    """The modules of a folder `basic` and what they import of each other.

    Attributes:
        modules: the path of each module, by its dotted name; basic/bpe/__init__.py is basic.bpe.
        our_imports: the modules of the tree that each module imports.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Path] = {}
        for path in sorted((root / "basic").rglob("*.py")):
            names = path.relative_to(root).with_suffix("").parts
            self.modules[".".join(names[:-1] if names[-1] == "__init__" else names)] = path

    @cached_property
    def our_imports(self) -> dict[str, set[str]]:
        return {module: self._imports_of(path) for module, path in self.modules.items()}

    def _imports_of(self, path: Path) -> set[str]:
        found = set()
        for imported in imports(path):
            names = imported.split(".")
            if names[0] == "basic":
                prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
                found.add(next(prefix for prefix in prefixes if prefix in self.modules))
        return found

    def name(self, module: str) -> str:
        return self.modules[module].relative_to(self.root).as_posix()

    def import_pairs(self) -> list[tuple[str, str]]:
        """Every module with each module that it imports."""
        return [(module, imported) for module in self.modules for imported in sorted(self.our_imports[module])]

    def paths_from(self, modules: set[str]) -> dict[str, list[str]]:
        """All modules that these import, directly or indirectly, each with a chain of imports that leads to it."""
        paths = {module: [module] for module in sorted(modules)}
        pending = list(paths)
        while pending:
            module = pending.pop()
            for imported in sorted(self.our_imports[module] - paths.keys()):
                paths[imported] = [*paths[module], imported]
                pending.append(imported)
        return paths

    def folders(self) -> list[Path]:
        return sorted({path.parent for path in (self.root / "basic").rglob("*") if "__pycache__" not in path.parts})


TREE = SourceTree(REPOSITORY)


def wrong_imports(tree: SourceTree) -> list[str]:
    """Imports that MAY_IMPORT does not allow."""
    errors = []
    for module, imported in tree.import_pairs():
        folder = module.partition(".")[2].partition(".")[0]
        if folder not in MAY_IMPORT:
            continue  # layout_errors reports it
        allowed = MAY_IMPORT[folder] | {folder}
        if imported == "basic":
            errors.append(f"{tree.name(module)} imports a name that does not exist in basic/")
        elif imported.split(".")[1] not in allowed:
            errors.append(
                f"{tree.name(module)} imports {imported}, but {folder} may import only {', '.join(sorted(allowed))}: "
                "pass what it needs as an argument, or move the code to a module that may import both"
            )
        elif imported in PUBLIC_NAMES and module not in PUBLIC_NAMES:
            errors.append(
                f"{tree.name(module)} imports from {imported}/__init__.py, which is for users: import from the module "
                "that defines the name"
            )
    return sorted(errors)


def import_circles(tree: SourceTree) -> list[str]:
    """Chains of imports that lead from a module back to itself, the shortest first."""
    circles = set()
    for module, imported in tree.import_pairs():
        if chain := tree.paths_from({imported}).get(module):
            circles.add(" -> ".join([module, *chain]))
    return [
        f"import circle (lazy imports count): {circle}; move what both modules need into a third one"
        for circle in sorted(circles, key=lambda circle: (len(circle), circle))
    ]


def layout_errors(tree: SourceTree) -> list[str]:
    """Folders with too many entries, and entries of basic/ that the layout does not have."""
    errors = []
    for folder in tree.folders():
        entries = {path.name for path in folder.iterdir()} - NOT_COUNTED
        if folder == tree.root / "basic":
            for entry in sorted({entry.removesuffix(".py") for entry in entries} ^ MAY_IMPORT.keys()):
                errors.append(
                    f"basic/{entry} must be both in the tree and in MAY_IMPORT: move a new module into one of the "
                    "folders, or change MAY_IMPORT and the tree in README.md"
                )
        elif len(entries) > MAX_ENTRIES:
            errors.append(
                f"{folder.relative_to(tree.root).as_posix()} has {len(entries)} entries, at most {MAX_ENTRIES} are "
                f"allowed: {', '.join(sorted(entries))}; merge two that change together, or move some into a new folder"
            )
    return errors


def test_imports_go_in_one_direction() -> None:
    assert not (errors := wrong_imports(TREE)), "\n".join(errors)


def test_there_is_no_import_circle() -> None:
    assert not (errors := import_circles(TREE)), "\n".join(errors)


def test_folders_have_at_most_ten_entries() -> None:
    assert not (errors := layout_errors(TREE)), "\n".join(errors)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of basic/ to plant a fault in."""
    shutil.copytree(REPOSITORY / "basic", tmp_path / "basic", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def new_errors(check: Callable[[SourceTree], list[str]], planted: Path) -> list[str]:
    """The errors that were planted, without those of the tree itself, which other tests report."""
    return [error for error in check(SourceTree(planted)) if error not in check(TREE)]


def add_line(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")


def test_a_wrong_import_is_found(planted: Path) -> None:
    add_line(planted / "basic/tokens/info.py", "def lazy():\n    from basic.bpe import arrays")
    add_line(planted / "basic/analysis/sweep.py", "from basic.training import train")
    to_public, to_bpe = new_errors(wrong_imports, planted)
    assert to_bpe.startswith(
        "basic/tokens/info.py imports basic.bpe.arrays, but tokens may import only common, tokens: "
    )
    assert to_public.startswith("basic/analysis/sweep.py imports from basic.training/__init__.py, which is for users: ")


def test_an_import_circle_is_found(planted: Path) -> None:
    add_line(
        planted / "basic/common/errors.py", "if TYPE_CHECKING:\n    from basic.common.config_files import load_config"
    )
    errors = new_errors(import_circles, planted)
    assert "basic.common.errors -> basic.common.config_files -> basic.common.errors; move what" in errors[0]


def test_an_eleventh_entry_is_found(planted: Path) -> None:
    num_entries = len({path.name for path in (planted / "basic/common").iterdir()} - NOT_COUNTED)
    for number in range(MAX_ENTRIES - num_entries):
        (planted / f"basic/common/extra_{number}.py").touch()
    assert new_errors(layout_errors, planted) == []
    (planted / "basic/common/eleventh.py").touch()
    (planted / "basic/utils.py").touch()
    at_top, in_folder = new_errors(layout_errors, planted)
    assert at_top.startswith("basic/utils must be both in the tree and in MAY_IMPORT: move a new module into one of ")
    assert in_folder.startswith("basic/common has 11 entries, at most 10 are allowed: ")


@pytest.mark.parametrize("module", [module for module in TREE.modules if is_within(module, *TEXT_TO_TOKENS)])
def test_text_to_tokens_never_imports_torch(module: str) -> None:
    for reached, chain in TREE.paths_from({module}).items():
        assert not any(is_within(imported, "torch") for imported in imports(TREE.modules[reached])), (
            f"text to tokens must not import torch, but {' -> '.join(chain)} does: move what needs torch to a package "
            "that reads token files, such as basic/training"
        )


def test_training_never_imports_the_tokenizer() -> None:
    for reached, chain in TREE.paths_from(
        {module for module in TREE.modules if is_within(module, "basic.training")}
    ).items():
        assert not is_within(reached, *TOKENIZERS), (
            f"training must not import a tokenizer, but {' -> '.join(chain)} does: take token ids or a tokenizer as "
            "arguments, or move the code to a script"
        )


@pytest.mark.parametrize("module", TREE.modules)
def test_third_party_packages_are_imported_in_few_modules(module: str) -> None:
    packages = {imported.split(".")[0] for imported in imports(TREE.modules[module])}
    for package, importers in ONLY_IN.items():
        assert package not in packages or is_within(module, *importers), (
            f"{TREE.name(module)} imports {package}, but only {', '.join(importers)} may: call a function there"
        )


def test_imports_are_absolute() -> None:
    for path in BASIC:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{relative(path)}, line {node.lineno}: write the full path, from basic.... import ..."
            )


def test_init_files_have_only_a_docstring() -> None:
    for module, path in TREE.modules.items():
        if path.name == "__init__.py" and module not in (*PUBLIC_NAMES, "basic"):  # basic has its version
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{relative(path)} needs a docstring that says what the folder is for"
            assert len(tree.body) == 1, f"{relative(path)} has code: only {', '.join(PUBLIC_NAMES)} re-export names"


def test_no_names_differ_by_case_alone() -> None:
    """Tokenizer.py and tokenizer.py are one file on some file systems."""
    names = [relative(path).removesuffix(".py").lower() for path in BASIC]
    names += [relative(folder).lower() for folder in TREE.folders()]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    "folder",
    [
        *("common", "bpe", "corpus", "tokens", "tokenizer_files"),
        *("training", "generation", "formats", "analysis", "commands"),
    ],
)
def test_tests_mirror_the_packages(folder: str) -> None:
    assert (REPOSITORY / "basic" / folder / "__init__.py").is_file()
    assert list((REPOSITORY / "tests" / folder).glob("test_*.py")), f"tests/{folder} needs the tests of basic/{folder}"


@pytest.mark.parametrize("path", BASIC + LOCAL, ids=relative)
def test_every_imported_package_is_declared(path: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    declared = [line for lines in (project["dependencies"], *extras) for line in lines]
    packages = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in declared}
    packages |= {"basic", "triton", "llvmlite"}  # triton and llvmlite come with torch and numba
    packages |= sys.stdlib_module_names | {"compression"}  # compression comes with Python 3.14
    missing = {module.split(".")[0] for module in imports(path)} - packages
    assert not missing, f"{relative(path)} imports {missing}: add it to the dependencies in pyproject.toml"


# These read their own files, or the system's.
OPENS_FILES = (
    "assignment_question.py",
    "common/native/cache_files.py",
    "bpe/loading.py",
    "common/native/object_files.py",
    "bpe/patterns/tables.py",
    "common/files.py",
)


@pytest.mark.parametrize("path", BASIC, ids=relative)
def test_files_of_users_are_opened_by_one_function(path: Path) -> None:
    """`open_file` and `read_file` of common/files.py refuse pipes and devices, where a reader would wait."""
    if relative(path).endswith(OPENS_FILES):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            is_read = ".read_bytes()" in call or (call.startswith("open(") and "'rb'" in call)
            assert not is_read, f"{relative(path)}, line {node.lineno}: use open_file or read_file"


def test_adapters_can_be_copied_alone() -> None:
    packages = {module.split(".")[0] for module in imports(REPOSITORY / "tests" / "adapters.py")}
    assert packages <= {"basic", "torch", "numpy", "jaxtyping"} | sys.stdlib_module_names
    assert not re.search(r"^\s*from \.", (REPOSITORY / "tests" / "adapters.py").read_text(encoding="utf-8"), re.M)


def test_text_to_tokens_loads_neither_torch_nor_numba_nor_tqdm() -> None:
    """In a real process: importing these modules loads none; only the compiler of kernels loads numba."""
    lines = ["import importlib, sys"]
    for module in TREE.modules:
        if is_within(module, *TEXT_TO_TOKENS) and not is_within(
            module, "basic.common.native.compiler", "basic.bpe.__main__"
        ):
            lines.append(f"importlib.import_module('{module}')")
            lines.append(f"assert not {{'torch', 'numba', 'tqdm'}} & sys.modules.keys(), '{module}'")
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_settings_and_commands_load_no_torch() -> None:
    """So `--help` and an error in an option come at once."""
    modules = ["basic.training", "basic.training.settings", "basic.generation", "basic.generation.settings"]
    modules += [
        f"basic.commands.{name}" for name in ("train", "generate", "encode", "train_bpe", "sweep", "quickstart")
    ]
    program = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_can_be_imported() -> None:
    program = "\n".join(f"from {package} import {', '.join(names.split())}" for package, names in PUBLIC_NAMES.items())
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
