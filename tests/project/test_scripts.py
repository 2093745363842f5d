"""The scripts in local/: help texts, errors in one line, and the complete path from a text to generated text."""

import ast
import dataclasses
import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from basic.__main__ import COMMANDS, main
from basic.common import command_line
from basic.common.config_files import load_config, save_config
from basic.common.folder_lock import FolderLock
from basic.corpus.stories.grammar import stories
from basic.model import ModelConfig
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens, read_info
from basic.training.records.environment import read_environments
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from tests.helpers.scripts import run_script

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (REPOSITORY / "local").glob("*.py"))
END = "<|endoftext|>"


def script(name: str) -> ModuleType:
    """The module of the command that local/NAME.py starts."""
    return importlib.import_module("basic." + COMMANDS[name.replace("_", "-")][0])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text(num_documents: int) -> str:
    """Documents of a few repeated words, which a tokenizer and a model can learn."""
    words = ["the", "cat", "a", "dog", "sees", "likes", "Tom", "Lily", "and", "one", "day"]
    documents = np.random.default_rng(0).choice(words, (num_documents, 30))
    return "".join(" ".join(document) + f".\n{END}\n" for document in documents)


# --- Help texts -----------------------------------------------------------------------------------------------


def field_docstrings(path: Path, cls: str) -> dict[str, str]:
    """The docstring of each field of a dataclass, from its source."""
    module = ast.parse(path.read_text())
    (body,) = (node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == cls)
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{cls}.{ast.unparse(field.target)} has no docstring"
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option_and_its_default(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, name, "--help")
    assert caught.value.code == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    source = REPOSITORY / "local" / "picture.py" if name == "picture" else Path(str(script(name).__file__))
    expected = field_docstrings(source, "Options")
    if name == "train":
        del expected["run"]
        for module, cls in (
            ("transformer/configuration", "ModelConfig"),
            ("training/settings", "TrainConfig"),
            ("training/settings", "DataConfig"),
        ):
            expected |= field_docstrings(REPOSITORY / "basic" / f"{module}.py", cls)
        assert expected.pop("muon") in shown  # a group of options
        expected |= field_docstrings(REPOSITORY / "basic" / "training" / "settings.py", "MuonConfig")
    if name in ("train_bpe", "encode"):
        expected |= field_docstrings(REPOSITORY / "basic" / "corpus" / "text_formats.py", "DocumentOptions")
    if name == "generate":
        assert expected.pop("sampling")
        expected |= field_docstrings(REPOSITORY / "basic" / "generation" / "sampling.py", "Sampling")
    for option, docstring in expected.items():
        # tyro adds the default, or that the option is required.
        assert re.search(re.escape(command_line.as_started(docstring)) + r" \((default: |required)", shown), option
    if name in ("quickstart", "train", "generate"):
        assert "--seed" in shown
        assert "--device" in shown


def test_every_command_has_a_script_and_the_list_of_commands_is_fast():
    scripts = {name.replace("-", "_") for name in COMMANDS} - {"questions"}  # python -m basic.assignment_question
    assert scripts | {"picture"} == set(SCRIPTS)
    program = "import sys; sys.argv = ['basic', '--help']; from basic.__main__ import main; main()"
    program += "; assert not {'tyro', 'numpy', 'torch'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} +\w", done.stdout, re.M) for name in COMMANDS)


def test_help_does_not_load_torch():
    """Loading it takes longer than everything else that a help text needs."""
    program = f"""
import sys
from contextlib import suppress
from basic.__main__ import main
for name in {sorted(COMMANDS.keys() - {"generate"})}:
    sys.argv = ["basic", name, "--help"]
    with suppress(SystemExit):
        main()
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_messages_and_help_name_the_way_the_user_started(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for start, shown in ((["/bin/basic"], "basic"), (["/lib/basic/__main__.py"], "python -m basic")):
        monkeypatch.setattr(sys, "argv", [*start, "train", "--help"])
        with pytest.raises(SystemExit, match="0"):
            main()
        printed = " ".join(capsys.readouterr().out.split())
        assert f"usage: {shown} train " in printed
        assert f"`{shown} train --config tinystories`" in printed
        monkeypatch.setattr(
            sys, "argv", [*start, "train", "--config", "small", "--train-tokens", "x.bin", "--tokenizer="]
        )
        with pytest.raises(SystemExit, match=f"there is no token file 'x.bin'; `{shown} encode` makes one"):
            main()
    monkeypatch.setattr(sys, "argv", ["basic", "trian"])
    with pytest.raises(SystemExit, match="error: there is no command 'trian'; the commands are quickstart, train-bpe"):
        main()


# --- Errors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(text(20))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--output", "foreign"], "foreign holds other files than a quickstart's; give another folder"),
        (["train", "--config", "missing.toml"], "there is no configuration 'missing.toml'; give a TOML file"),
        (["train"], "give --text TEXT, --config FILE, --recipe NAME, --init-from MODEL or --resume FOLDER; got none"),
        (["train", "--confg", "run.toml"], "or --resume FOLDER; got --confg run.toml"),
        (
            ["train", "--config", "unknown.toml"],
            "unknown.toml: unknown key 'modle'; the keys here are model, train, data",
        ),
        (
            ["train", "--config", "run.toml"],
            "data.valid_tokens is not set; give a token file made by `local/encode.py`",
        ),
        (["train", "--config", "run.toml", "--valid-tokens", "no.bin"], "there is no token file 'x.bin'"),
        (["generate", "foreign"], "foreign is not a run: it has no config.toml"),
        (["plot", "foreign"], "foreign is not a run: it has no config.toml"),
        (["report", "foreign"], "foreign is not a run: it has no config.toml"),
        (["plot", "corpus.txt"], "corpus.txt is not a run: it has no config.toml"),
        (["plot"], "no run given; name at least one folder"),
        (["export", "foreign", "out"], "foreign is not a run: it has no config.toml"),
        (["import", "missing", "--output", "run"], "no file or folder 'missing'; give a model's folder or"),
        (
            ["import", "foreign", "--output", "run"],
            "foreign is not a model folder of transformers: it has no config.json",
        ),
        (
            ["import", "corpus.txt", "--output", "run"],
            "a file, and not a GGUF file; if it is a state dict written by torch.save, add --unpickle",
        ),
        (
            ["import", "corpus.txt", "--output", "run", "--unpickle", "--config", "run.toml"],
            "corpus.txt is damaged, or holds more than tensors and plain containers",
        ),
        (["train_bpe", "missing.txt"], "missing.txt"),
        (["train_bpe", "corpus.txt", "--vocab-size", "256"], "256"),
        (["train_bpe", "corpus.txt", "--special-tokens", ""], "special token"),
        (["train_bpe", "corpus.txt", "--special-tokens", "<s>", "<s>"], "<s>"),
        (["train_bpe", "invalid.txt"], "at byte offset 36 "),
        (["train_bpe", "corpus.txt", "--scheduler", "nonsense"], "'nonsense' is not an address such as tcp://"),
        (["encode", "corpus.txt", "out.bin", "--tokenizer", "foreign"], "foreign"),
        (["sweep", "list.toml"], "list.toml: a table of settings is needed, got [1]"),
        (["sweep", "unknown.toml"], "unknown.toml: unknown key 'modle'"),
        (["sweep", "run.toml"], "run.toml: unknown key 'model'"),
        (["sweep", "number.toml"], "number.toml: the key 'config' is missing or no string: the path of"),
        (["sweep", "number.toml", "--small"], "number.toml: there is no [small] table"),
        (["playground", "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["consolidate", "foreign"], "foreign"),
    ],
)
def test_an_error_is_one_line_and_changes_no_file(arguments, message, tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("invalid.txt").write_bytes(b"a text of one line, and then a byte \xff that is not UTF-8\n" * 100)
    Path("foreign").mkdir()
    Path("foreign/letter.txt").write_text("mine")
    Path("unknown.toml").write_text("[modle]\n")
    Path("number.toml").write_text("config = 1\n")
    Path("list.toml").write_text('config = "run.toml"\nsettings = [1]\n')
    model = ModelConfig(vocab_size=300, context_length=8, d_model=16, num_layers=1, num_heads=2)
    save_config(RunConfig(model=model, train=TrainConfig(steps=1), data=DataConfig(train_tokens="x.bin")), "run.toml")
    before = files(tmp_path)

    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, *arguments)
    assert isinstance(caught.value.code, str)  # Python prints it and exits with status 1
    assert caught.value.code.startswith("error: ")
    assert message in caught.value.code
    assert "\n" not in caught.value.code
    partial = {name: content for name, content in files(tmp_path).items() if ".partial/" not in name}
    assert partial == before


def test_an_error_has_status_1_and_no_traceback(tmp_path):
    command = [sys.executable, REPOSITORY / "local" / "train_bpe.py", "missing.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*missing\.txt.*\n", done.stderr)


# --- Quickstart -----------------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(monkeypatch) -> Any:
    """The script with a smaller model and fewer stories."""
    module: Any = script("quickstart")
    configure = module.configure

    def smaller(*arguments) -> RunConfig:
        config = configure(*arguments)
        model = dataclasses.replace(config.model, d_model=16, num_layers=1, num_heads=2, d_ff=32)
        train = dataclasses.replace(config.train, batch_size=4, eval_batches=2, log_interval=2, sample_tokens=8)
        return dataclasses.replace(config, model=model, train=train)

    monkeypatch.setattr(module, "configure", smaller)
    monkeypatch.setattr(module, "TRAIN_STORIES", 300)
    monkeypatch.setattr(module, "VALID_STORIES", 40)
    return module


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """A picture takes longer than everything else that such a small quickstart does."""
    monkeypatch.setattr("basic.analysis.plotting.plot_losses", lambda runs, path, **options: Path(path).touch())


QUICKSTART_FILES = {
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens.json"),
    *("train.txt", "train.bin", "train.json", "valid.txt", "valid.bin", "valid.json"),
    *("config.toml", "environment.json", "metrics.jsonl", "loss.png", "samples.txt"),
    *("checksums.json", "tokenizer/checksums.json", "report.html"),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"device": "abacus"}, "'abacus' cannot be used")],
)
def test_quickstart_says_what_is_wrong_before_it_draws_stories(quickstart, monkeypatch, tmp_path, wrong, message):
    drawn = []
    monkeypatch.setattr("basic.corpus.train_valid.write_stories", lambda *args, **options: drawn.append(args))
    with pytest.raises(ValueError, match=message):
        quickstart.main(quickstart.Options(output=tmp_path / "quickstart", **wrong))
    assert not drawn


def test_quickstart_writes_all_files_and_sets_an_earlier_result_aside(quickstart, tmp_path, capsys):
    output = tmp_path / "runs" / "quick"
    options = quickstart.Options(output=output, vocab_size=300, steps=4, device="cpu")
    quickstart.main(options)
    printed, progress = capsys.readouterr()
    assert "training: steps 1 to 4, " in progress  # without its temporary folder

    assert files(output).keys() == QUICKSTART_FILES | {"checkpoints/step_00000004.safetensors"}
    tokenizer = Tokenizer.load(output / "tokenizer")
    for split in ("train", "valid"):
        encoded = tokenizer.encode((output / f"{split}.txt").read_text())
        assert open_tokens(output / f"{split}.bin", verify=True).tolist() == encoded
    run = load_run(output)
    assert (run.step, run.tokenizer_path) == (4, output / "tokenizer")
    assert Path(run.config.data.train_tokens) == output / "train.bin"
    assert read_environments(output)[0]["train_tokens"]["path"] == "train.bin"
    loss, info = read_metrics(output / "metrics.jsonl")[-1]["valid_loss"], read_info(output / "valid.bin")
    bits_per_byte = loss / np.log(2) * info.count / info.source_bytes
    assert f"validation loss {loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte" in printed
    assert len(re.findall(r"^sample \d: ", printed, re.MULTILINE)) == 2
    assert f"wrote {output}: " in printed

    (output / "notes.txt").write_text("mine")
    before = files(output)
    quickstart.main(dataclasses.replace(options, steps=3))
    assert files(output).keys() == QUICKSTART_FILES | {"checkpoints/step_00000003.safetensors"}
    assert files(output.parent / "set_aside_quick") == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["quick", "set_aside_quick"]

    with FolderLock(output), pytest.raises(BlockingIOError):  # somebody resumes the run
        quickstart.main(options)
    output.rename(output.with_name("precious"))  # now a run on the data of another folder, as one of `basic train` is
    before = files(output.parent)
    with pytest.raises(FileExistsError, match=r"precious holds other files than a quickstart's"):
        quickstart.main(dataclasses.replace(options, output=output.with_name("precious")))
    assert files(output.parent) == before


@pytest.mark.usefixtures("without_pictures")
def test_quickstart_compares_the_loss_with_the_entropy_of_validation_stories(quickstart, tmp_path, capsys):
    output = tmp_path / "run"
    quickstart.main(quickstart.Options(output=output, vocab_size=1000, steps=2, seed=5, device="cpu"))
    printed = capsys.readouterr().out
    assert load_run(output).config.train.rows == "documents"
    learned, unseen = ((output / name).read_text().split(END)[:-1] for name in ("train.txt", "valid.txt"))
    assert (len(learned), len(unseen)) == (300, 40)

    tokenizer = Tokenizer.load(output / "tokenizer")
    known = {story.text: story.nats for story in stories(11, 60)}
    nats = [known[story] for story in unseen if len(tokenizer.encode(story)) < 128]
    exact = sum(nats) / len(nats)
    assert re.search(rf"^{len(nats)}(| of 40) unseen documents", printed, re.MULTILINE)
    figures = re.search(
        r" exact information +([\d.]+)\n"
        r" +this model +([\d.]+) +\(\+([\d.]+)%\)\n"
        r" +a bigram model +([\d.]+) +\(\+([\d.]+)%\)\n",
        printed,
    )
    assert figures is not None
    shown, model, model_excess, bigram, bigram_excess = map(float, figures.groups())
    assert shown == pytest.approx(exact, abs=0.006)
    assert model / exact - 1 == pytest.approx(model_excess / 100, abs=0.002)
    assert bigram / exact - 1 == pytest.approx(bigram_excess / 100, abs=0.002)
    assert 1.2 * exact < bigram < model  # after two steps the model is worse than the bigram model


@pytest.mark.usefixtures("without_pictures")
def test_quickstart_works_when_no_story_fits_into_the_context(quickstart, tmp_path, capsys):
    quickstart.main(quickstart.Options(output=tmp_path / "run", vocab_size=262, steps=1, device="cpu"))
    assert "no document fits into the context" in capsys.readouterr().out
    assert load_run(tmp_path / "run").step == 1


# --- Step by step ---------------------------------------------------------------------------------------------


def test_all_scripts_from_text_to_generated_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(text(100))
    Path("valid.txt").write_text(text(10))
    run_script(monkeypatch, "train_bpe", "train.txt", "--vocab-size", "290", "--output", "tokenizer")
    for split in ("train", "valid"):
        run_script(monkeypatch, "encode", f"{split}.txt", f"data/{split}.bin", "--tokenizer", "tokenizer")
    tokenizer = Tokenizer.load("tokenizer")
    assert tokenizer.vocab_size == 290
    assert tokenizer.decode(open_tokens("data/valid.bin", verify=True).tolist()) == Path("valid.txt").read_text()

    model = ModelConfig(vocab_size=320, context_length=16, d_model=16, num_layers=1, num_heads=2)
    data = DataConfig(train_tokens="data/train.bin", valid_tokens="data/valid.bin", tokenizer="tokenizer")
    train = TrainConfig(steps=2, batch_size=4, eval_batches=1, log_interval=1, device="cpu")
    save_config(RunConfig(model=model, train=train, data=data), "small.toml")
    overrides = ("--steps", "3", "--seed", "7", "--num-heads", "4")
    capsys.readouterr()
    run_script(monkeypatch, "train", "--config", "small.toml", *overrides)
    note = "note: vocab_size=320 is 30 more than the tokenizer has tokens; they are never used\n"
    assert capsys.readouterr().err.count(note) == 1
    run = load_run("runs/small")
    assert run.step == 3
    assert run.config == RunConfig(
        model=dataclasses.replace(model, num_heads=4), train=dataclasses.replace(train, steps=3, seed=7), data=data
    )
    assert load_config("runs/small/config.toml", RunConfig) == run.config

    with pytest.raises(SystemExit, match="error: runs/small already contains a run"):
        run_script(monkeypatch, "train", "--config=small.toml")
    with pytest.raises(SystemExit, match="error: runs/small is finished: it has done its 3 steps; to train it longer"):
        run_script(monkeypatch, "train", "--resume", "runs/small")
    run_script(monkeypatch, "train", "--resume", "runs/small", "--steps", "5")
    assert [record["step"] for record in read_metrics("runs/small/metrics.jsonl")] == [1, 2, 3, 4, 5]
    shutil.rmtree("runs/small/checkpoints")  # as after a kill before the first line of the log
    Path("runs/small/metrics.jsonl").unlink()
    run_script(monkeypatch, "train", "--resume", "runs/small")
    assert load_run("runs/small").step == 5
    run_script(monkeypatch, "train", "--config", "small.toml", "--overwrite", "--tokenizer", "")
    assert load_run("runs/small").step == 2
    assert load_run("runs/small").tokenizer_path is None
    with pytest.raises(SystemExit, match="error: the run has no tokenizer/ folder"):
        run_script(monkeypatch, "generate", "runs/small")

    Path("other.txt").write_text(text(100).upper())
    run_script(monkeypatch, "train_bpe", "other.txt", "--vocab-size", "290", "--output", "other")
    with pytest.raises(SystemExit, match=r"error: data/train\.bin was made by another tokenizer"):
        run_script(monkeypatch, "train", "--config", "small.toml", "--tokenizer", "other", "--output", "runs/other")
    assert not Path("runs/other").exists()
    run_script(monkeypatch, "train", "--config", "small.toml", "--output", "runs/other")

    capsys.readouterr()
    generate = ("generate", "runs/other", "--prompt", "the cat", "--num-samples", "2", "--max-tokens", "6")
    run_script(monkeypatch, *generate, "--seed", "1", "--device", "cpu")
    first = capsys.readouterr().out
    assert len(re.findall("^the cat", first, re.MULTILINE)) == 2
    run_script(monkeypatch, *generate, "--seed", "1")
    assert capsys.readouterr().out == first
    run_script(monkeypatch, *generate, "--temperature", "0", "--top-p", "None")
    greedy = capsys.readouterr().out.split("the cat")
    assert greedy[1].strip() == greedy[2].strip()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    run_script(monkeypatch, "generate", "runs/other", "--max-tokens", "6")
    assert END not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: the prompt '' encodes to no token"):
        run_script(monkeypatch, "generate", "runs/other", "--prompt", "")

    run_script(monkeypatch, "export", "runs/other", "--to", "hf", "exported/llama")
    assert "wrote exported/llama: checksums.json, config.json, " in capsys.readouterr().out
    run_script(monkeypatch, "import", "exported/llama", "--output", "runs/back")
    assert re.search("wrote runs/back, a model with [0-9,]+ parameters", capsys.readouterr().out)
    run_script(monkeypatch, "generate", "runs/back", *generate[2:], "--seed", "1")
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit, match="error: 'exported/llama' already exists"):
        run_script(monkeypatch, "export", "runs/other", "exported/llama")
    run_script(monkeypatch, "export", "runs/other", "--to", "tiktoken", "ours.tiktoken")
    assert f"special_tokens={{{END!r}: 0}}" in capsys.readouterr().out
    assert len(Path("ours.tiktoken").read_text().splitlines()) == 289

    run_script(monkeypatch, "plot", "runs/small", "runs/other", "--output", "both.png")
    run_script(monkeypatch, "plot", "runs/other")
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("both.png", "runs/other/loss.png"))
    assert json.loads(Path("data/train.json").read_text())["tokenizer_fingerprint"] == tokenizer.fingerprint
