"""The package as an sdist and as a wheel, and the wheel installed in its own environment."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from importlib.metadata import version
from pathlib import Path
import basic
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe
assert sys.prefix in basic.__file__, basic.__file__
assert (Path(basic.__file__).parent / "py.typed").is_file()
Path("text.txt").write_text("the cat and the hat " * 50)
tokenizer = Tokenizer(*train_bpe("text.txt", 262, ["<|end|>"]), ["<|end|>"])
assert tokenizer.decode(tokenizer.encode("the cat<|end|>")) == "the cat<|end|>"
assert not {"torch", "numba"} & set(sys.modules), "importing the tokenizer must load neither"
from basic.model import ModelConfig, TransformerLM
from basic.analysis.report.page import report_page
model = TransformerLM(ModelConfig(vocab_size=262, context_length=8, d_model=16, num_layers=1, num_heads=2))
assert basic.__version__ == version("basic")
print(version("basic"), model.num_parameters, callable(report_page))
"""


def run(*command: str | Path, cwd: Path) -> str:
    process = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build a package")


# What is for the work on the project alone.
NOT_PACKED = (".ci/", ".github/", ".editorconfig", ".gitignore", ".pre-commit-config.yaml", "Makefile")
NOT_PACKED += ("requirements.lock", "tests/fixtures/.gitattributes")
PRIVATE = (
    *("my.txt", "my_llama/model.safetensors", "basic/my.txt", "basic/analysis/my_llama/config.json", "data/train.bin"),
    *("runs/my/config.toml", "local/scratch/try.py", "local/configs/my.toml", "local/bench/results.json"),
    *(
        "local/experiments/my.toml",
        "local/my.ipynb",
        "tests/fixtures/my.txt",
        "tests/my.json",
        "docs/notes.txt",
        ".env",
    ),
)


@needs_uv
def test_only_what_is_tracked_is_packed_from_a_folder_with_texts_and_models(tmp_path):
    tracked = run("git", "ls-files", cwd=REPOSITORY).splitlines()
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    for name in PRIVATE:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("mine")
    run("uv", "build", "--out-dir", tmp_path, source, cwd=tmp_path)  # the wheel is made from the sdist
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()} - {"PKG-INFO", ".gitignore"}
    assert names == {name for name in tracked if not name.startswith(NOT_PACKED)}, "change the list in pyproject.toml"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    included = {f"basic/{name}" for name in tracked if name.startswith("local/") and name.endswith((".toml", ".ipynb"))}
    assert names == included | {name for name in tracked if name.startswith("basic/")}


def test_the_pinned_requirements_have_checksums_and_no_address():
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith(" ")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)? \\?", pin) for pin in pins)
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines if line.startswith(" "))
    pinned = {pin.partition("==")[0] for pin in pins}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[^\w.-]", line)[0].split(">")[0].replace(".", "-") for line in project["dependencies"]}
    assert needed <= pinned


@needs_uv
def test_a_wheel_works_in_its_own_environment(tmp_path):
    run("uv", "build", "--wheel", "--out-dir", tmp_path, REPOSITORY, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    pages = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "basic/analysis/pages").iterdir()}
    assert pages | {"basic/py.typed"} <= set(names)
    assert all(name.startswith(("basic/", "basic-")) for name in names)

    run("uv", "venv", "--quiet", "own", cwd=tmp_path)
    python = tmp_path / "own" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run("uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel, cwd=tmp_path)
    # The dependencies come from this environment, because downloading them would take gigabytes. It is last on the
    # path, and its .pth files, which lead to this repository, are not read.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    line = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    (Path(site) / "dependencies.pth").write_text(line)
    command = python.with_name("basic.exe" if os.name == "nt" else "basic")
    assert run(command, "--version", cwd=tmp_path).strip() == f"basic {importlib.metadata.version('basic')}"
    assert "train-bpe" in run(command, "--help", cwd=tmp_path)
    assert "  max_learning_rate=0.0003" in run(command, "sweep", "learning_rate", "--plan", cwd=tmp_path).splitlines()
    version, parameters, has_report = run(python, "-I", "-c", PROGRAM, cwd=tmp_path).split()
    assert version == importlib.metadata.version("basic")
    assert int(parameters) > 0
    assert has_report == "True"
