"""What the scripts write: an output is new, or ours and replaced on request, or refused before any work."""

import json
import os
import shutil
from pathlib import Path

import pytest

from basic.common.errors import InvalidInputError
from basic.common.files import _UNFINISHED
from basic.encoding import encode_file, encode_files
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from tests.helpers.forks import is_killed, kill_this_process
from tests.helpers.scripts import run_script
from tests.project.test_scripts import REPOSITORY, files

WRITTEN = REPOSITORY / "tests" / "fixtures" / "written_by_0_1_0"
BYTES = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
THEIRS = b'{"text": "my only copy"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(monkeypatch, message: str, *arguments: str) -> None:
    """The script ends with this one line, and changes nothing."""
    before = files(Path())
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run_script(monkeypatch, *arguments)
    assert files(Path()) == before


# --- Token files and datasets -------------------------------------------------------------------------------------


def test_an_input_is_never_replaced_by_a_sidecar():
    Path("train.json").write_bytes(THEIRS)
    Path("link.jsonl").symlink_to("train.json")
    for source in ("train.json", "link.jsonl", "*.json"):
        with pytest.raises(InvalidInputError, match=r"train\.json', the sidecar of a token file .*, is also an input"):
            encode_file(BYTES, source, "train.bin")
    assert files(Path()) == {"train.json": THEIRS, "link.jsonl": THEIRS}


@pytest.mark.parametrize("name", ["new.bin", "new.json"])
def test_a_token_file_replaces_only_a_token_file(name):
    Path("a.txt").write_text("abc")
    Path(name).write_bytes(THEIRS)
    with pytest.raises(FileExistsError, match=rf"'{name}' exists and is not .* that this library wrote"):
        encode_file(BYTES, "a.txt", "new.bin")
    assert files(Path()) == {"a.txt": b"abc", name: THEIRS}
    Path(name).unlink()
    for text in ("abc", "defg"):
        Path("a.txt").write_text(text)
        encode_file(BYTES, "a.txt", "new.bin")
        assert BYTES.decode(open_tokens("new.bin", verify=True)) == text
    with pytest.raises(FileExistsError, match=r"'new\.bin' already exists"):
        encode_file(BYTES, "a.txt", "new.bin", overwrite=False)


@pytest.mark.parametrize(
    "name", ["index.json", "000000.json", "000000.bin", "manifest.jsonl", "tokenizer/vocab.json", "tokenizer"]
)
@pytest.mark.parametrize("start_over", [False, True])
def test_a_dataset_replaces_nothing_of_others(name, start_over):
    Path("a.txt").write_text("abc")
    path = Path("data") / name
    path.parent.mkdir(parents=True)
    path.write_bytes(THEIRS)
    with pytest.raises(OSError, match=rf"({path.name}|tokenizer)'( exists and)? is"):
        encode_files(BYTES, "a.txt", "data", start_over=start_over)
    assert files(Path()) == {"a.txt": b"abc", str(path): THEIRS}


def test_a_dataset_does_not_replace_another_tokenizer():
    Path("a.txt").write_text("abc")
    Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|x|>"]).save("data/tokenizer")
    before = files(Path())
    with pytest.raises(FileExistsError, match="tokenizer' exists and is not"):
        encode_files(BYTES, "a.txt", "data")
    assert files(Path()) == before


def test_starting_over_leaves_the_files_of_others():
    Path("a.txt").write_text("abc")
    encode_files(BYTES, "a.txt", "data")
    theirs = {name: b"mine" for name in ("000000.txt", "notes.md", "x.tmp", ".x.tmp")}
    for name, content in theirs.items():
        (Path("data") / name).write_bytes(content)
    Path("a.txt").write_text("abcd")
    encode_files(BYTES, "a.txt", "data", start_over=True)
    assert len(open_tokens("data")) == 4
    assert theirs.items() <= files(Path("data")).items()


def test_an_input_inside_the_dataset_is_not_replaced():
    (Path("data")).mkdir()
    Path("data/000000.json").write_bytes(THEIRS)
    with pytest.raises(InvalidInputError, match=r"000000\.json', a file of a token dataset .*, is also an input"):
        encode_files(BYTES, "data/000000.json", "data")
    assert files(Path()) == {"data/000000.json": THEIRS}


def test_an_output_that_is_a_link_is_written_through():
    Path("a.txt").write_text("abc")
    Path("store").mkdir()
    Path("new.bin").symlink_to("store/new.bin")
    Path("new.json").symlink_to("store/new.json")
    encode_file(BYTES, "a.txt", "new.bin")
    assert Path("new.bin").is_symlink()
    assert BYTES.decode(open_tokens("store/new.bin", verify=True)) == "abc"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_encoding_leaves_nothing_after_the_next_one():
    Path("a.txt").write_text("abc " * 10)
    BYTES.save("tokenizer")

    def encode(stop: int) -> None:
        remaining = [None] * stop

        def replace(source, target):
            if not remaining:
                kill_this_process()
            remaining.pop()
            os.rename(source, target)

        os.replace = replace  # in a fork of this process  # ty: ignore[invalid-assignment]
        encode_file(BYTES, "a.txt", "a.bin")

    for first in ("", "abc"):
        for stop in (0, 1):
            for path in (Path("a.bin"), Path("a.json")):
                path.unlink(missing_ok=True)
            if first:
                encode_file(BYTES, "a.txt", "a.bin")
            assert is_killed(encode, stop)
            assert any(path.name.endswith(".tmp") for path in Path().iterdir())
            encode_file(BYTES, "a.txt", "a.bin")
            assert sorted(path.name for path in Path().iterdir()) == ["a.bin", "a.json", "a.txt", "tokenizer"]
            assert BYTES.decode(open_tokens("a.bin", verify=True)) == "abc " * 10


@pytest.mark.parametrize("name", ["a.bin", "data"])
def test_a_full_disk_leaves_the_earlier_files(name):
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    encode = encode_file if name == "a.bin" else encode_files
    Path("a.txt").write_text("abc")
    encode(BYTES, "a.txt", name)
    Path("b.txt").write_text("abc" * 10_000)
    before = files(Path())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            encode(BYTES, "b.txt", name if name == "a.bin" else "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = files(Path())
    assert before.items() <= after.items()
    assert not [path for path in after if path.endswith((".tmp", ".next"))]
    if name == "data":
        encode(BYTES, "b.txt", "new")  # resumes
        assert len(open_tokens("new", verify=True)) == 30_000


# --- Scripts ------------------------------------------------------------------------------------------------------


def test_tokenizers_and_token_files_are_replaced_on_request(monkeypatch):
    Path("a.txt").write_text("abc abc abd")
    run_script(monkeypatch, "train_bpe", "a.txt", "--vocab-size", "258", "--output", "tok")
    encode = ("encode", "a.txt", "a.bin", "--tokenizer", "tok")
    run_script(monkeypatch, *encode)
    train = ("train_bpe", "a.txt", "--vocab-size", "260", "--output", "tok")
    refused(monkeypatch, r"'tok/vocab\.json' already exists; choose another name, or replace it with --ov", *train)
    refused(monkeypatch, r"'a\.bin' already exists; choose another name, or replace it with --overwrite", *encode)
    run_script(monkeypatch, *train, "--overwrite")
    assert Tokenizer.load("tok").vocab_size == 260
    run_script(monkeypatch, *encode, "--overwrite")
    assert open_tokens("a.bin", made_by=Tokenizer.load("tok").fingerprint) is not None


def test_another_kind_of_output_is_refused_before_the_work(monkeypatch):
    Path("a.txt").write_text("abc")
    BYTES.save("tok")
    Path("e.bin").mkdir()
    run = str(WRITTEN / "run")
    for name in ("basic.training.run_folder.load_run", "basic.train_bpe.train_bpe"):
        monkeypatch.setattr(name, lambda *arguments, **options: pytest.fail("it has begun to work"))
    not_a_file = "is a folder, but a file is to be written"
    refused(monkeypatch, rf"'e\.bin' {not_a_file}", "encode", "a.txt", "e.bin", "--tokenizer=tok")
    refused(monkeypatch, rf"'e\.bin' {not_a_file}", "export", run, "e.bin", "--to", "tiktoken")
    refused(monkeypatch, rf"'tok' {not_a_file}", "report", run, "--output=tok")
    refused(monkeypatch, rf"'tok' {not_a_file}", "plot", run, "--output=tok")
    refused(monkeypatch, r".*a\.txt' is a file", "train_bpe", "a.txt", "--output=a.txt")
    refused(monkeypatch, r"'a\.txt' is a file, but a folder is to be written", "export", run, "a.txt")
    refused(monkeypatch, "'tok' already exists", "import", run, "--output=tok")


def test_pictures_and_reports_are_replaced_on_request(monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(WRITTEN / "run", name)
    for script, name in (("plot", "loss.png"), ("report", "report.html")):
        run_script(monkeypatch, script, "a")
        run = ("a",) if script == "plot" else ("a", f"--output=a/{name}")  # every run leaves a report.html of its own
        message = rf"'a/{name}' already exists; choose another name, or replace it with --overwrite"
        refused(monkeypatch, message, script, *run)
        run_script(monkeypatch, script, "a", "--overwrite")
        Path("a", name).write_bytes(THEIRS)
        message = rf"'a/{name}' exists and is not a (picture|report) that this library wrote"
        refused(monkeypatch, message, script, "a", "--overwrite")
        Path("a", name).unlink()


def test_several_runs_have_a_picture_of_their_own(monkeypatch):
    for name in ("a", "b", "c", "d", "e"):
        shutil.copytree(WRITTEN / "run", name)
    before = files(Path())
    run_script(monkeypatch, "plot", "a", "b")
    run_script(monkeypatch, "plot", *"abcde")
    assert files(Path()).keys() - before.keys() == {"losses_of_a_b.png", "losses_of_a_b_c_and_2_more.png"}
    assert before.items() <= files(Path()).items()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_plot_leaves_the_earlier_picture(monkeypatch):
    """The picture is written under another name; the next plot removes what a killed one left."""
    output = Path("loss.png")
    plot = ("plot", str(WRITTEN / "run"), "--output", str(output), "--overwrite")
    run_script(monkeypatch, *plot)
    picture = output.read_bytes()

    def plot_and_die() -> None:
        os.fsync = kill_this_process  # ty: ignore[invalid-assignment]
        run_script(monkeypatch, *plot)

    assert is_killed(plot_and_die)
    assert output.read_bytes() == picture
    assert len(list(Path().iterdir())) == 3  # a temporary file and a lock, whose process has died
    run_script(monkeypatch, *plot)
    assert [path.name for path in Path().iterdir()] == [output.name]


def test_an_export_and_an_import_are_refused_before_the_work_and_replace_nothing(monkeypatch):
    run = str(WRITTEN / "run")
    Path("mine").write_bytes(THEIRS)
    for command in (("export", run, "mine", "--to", "tiktoken"), ("import", run, "--output", "mine")):
        refused(monkeypatch, "'mine' (already exists|is a file, but a folder)", *command)
    refused(monkeypatch, r"a\.gguf is the name of a \.gguf file.* add --to gguf", "export", run, "a.gguf")
    run_script(monkeypatch, "export", run, "llama")
    refused(monkeypatch, "'llama' already exists", "export", run, "llama")
    refused(monkeypatch, "'llama', a run to be written, is also an input", "import", "llama", "--output", "llama")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("script", ["export", "report"])
def test_what_a_killed_script_left_is_cleared_by_the_next(script, monkeypatch):
    run = str(WRITTEN / "run")
    command = (script, run, "new") if script == "export" else (script, run, "--output", "new")

    def run_and_die() -> None:
        monkeypatch.setattr("basic.common.files.sync_file", kill_this_process)
        run_script(monkeypatch, *command)

    before = {path.name for path in Path().iterdir()}
    assert is_killed(run_and_die)
    assert len({path.name for path in Path().iterdir()}) == len(before) + 2  # a temporary file or folder, and a lock
    run_script(monkeypatch, *command)
    assert {path.name for path in Path().iterdir()} == before | {"new"}


def test_a_consolidated_checkpoint_is_replaced_on_request(monkeypatch):
    shutil.copytree(WRITTEN / "sharded_run", "run")
    run_script(monkeypatch, "consolidate", "run", "out.safetensors")
    refused(monkeypatch, r"'out\.safetensors' already exists", "consolidate", "run", "out.safetensors")
    run_script(monkeypatch, "consolidate", "run", "out.safetensors", "--overwrite")
    Path("theirs.safetensors").write_bytes(THEIRS)
    message = r"'theirs\.safetensors' exists and is not a checkpoint that this library wrote"
    refused(monkeypatch, message, "consolidate", "run", "theirs.safetensors", "--overwrite")


def test_what_a_process_left_that_died_between_the_two_files_is_encoded_again():
    Path("a.txt").write_text("abc")
    Path("new.json").write_text(json.dumps(_UNFINISHED))
    Path("new.bin").write_bytes(b"abc")
    encode_file(BYTES, "a.txt", "new.bin", overwrite=False)
    assert BYTES.decode(open_tokens("new.bin", verify=True)) == "abc"
