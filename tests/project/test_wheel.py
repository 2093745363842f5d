"""The package as an sdist and as a wheel, and the wheel installed in its own environment."""

import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
import tarfile
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
from basic.analysis.report import report_page
model = TransformerLM(ModelConfig(vocab_size=262, context_length=8, d_model=16, num_layers=1, num_heads=2))
print(version("basic"), model.num_parameters, callable(report_page))
"""


def run(*command: str | Path, cwd: Path) -> str:
    process = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build a package")


@needs_uv
def test_only_the_package_is_packed_from_a_folder_with_texts_and_models(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "basic", source / "basic", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    packed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    for name in ("my.txt", "my_llama/model.safetensors", "basic/my.txt", "basic/analysis/my_llama/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("mine")
    run("uv", "build", "--sdist", "--out-dir", tmp_path, source, cwd=tmp_path)
    run("uv", "build", "--wheel", "--out-dir", tmp_path, source, cwd=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names - {"PKG-INFO", ".gitignore"} == packed
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in packed if name.startswith("basic/")}


@needs_uv
def test_a_wheel_works_in_its_own_environment(tmp_path):
    run("uv", "build", "--wheel", "--out-dir", tmp_path, REPOSITORY, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    pages = {
        f"basic/analysis/pages/{page}.{suffix}" for page in ("report", "playground") for suffix in ("html", "css", "js")
    }
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
    version, parameters, has_report = run(python, "-I", "-c", PROGRAM, cwd=tmp_path).split()
    assert version == importlib.metadata.version("basic")
    assert int(parameters) > 0
    assert has_report == "True"
