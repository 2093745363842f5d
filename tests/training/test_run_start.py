"""What the start of a run finds in its folder: tokenizers and files of others, and a log that lost its end."""

import sys
import types

import pytest

from basic.Tokenizer import Tokenizer
from basic.training.loop import train
from basic.training.records.trackers import open_trackers
from basic.training.run_folder import create_run_folder, load_run
from tests.helpers.fault_tools import TRAIN, VALID, configuration
from tests.helpers.tokenizer_tools import BYTES

A, B = (Tokenizer(BYTES, [], [text]) for text in ("<|a|>", "<|b|>"))
CONFIG = configuration(steps=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwriting_replaces_the_tokenizer_and_keeps_the_files_of_others(tmp_path):
    create_run_folder(tmp_path, CONFIG, A)
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    create_run_folder(tmp_path, CONFIG, B, overwrite=True)
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint == B.fingerprint
    assert contents(tmp_path / "tokenizer")["notes.txt"] == b"mine"
    with pytest.warns(UserWarning, match=r"tokenizer has files that are not the run's; it is now set_aside_tokenizer"):
        create_run_folder(tmp_path, CONFIG, None, overwrite=True)
    assert contents(tmp_path / "set_aside_tokenizer") == {"notes.txt": b"mine"}
    create_run_folder(tmp_path, CONFIG, A, overwrite=True)
    create_run_folder(tmp_path, CONFIG, None, overwrite=True)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_another_tokenizer_is_not_replaced_by_that_of_a_new_run(is_link, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if is_link:
        (run_dir / "tokenizer").symlink_to(tmp_path / "mine")
    A.save(run_dir / "tokenizer")
    before = contents(run_dir / "tokenizer")
    with pytest.raises(FileExistsError, match="tokenizer holds another tokenizer than that of this run"):
        create_run_folder(run_dir, CONFIG, B)
    assert contents(run_dir / "tokenizer") == before
    assert list(run_dir.iterdir()) == [run_dir / "tokenizer"]
    create_run_folder(run_dir, CONFIG, A)  # the same one


def test_a_log_that_lost_its_last_lines_is_reported(tmp_path, capsys):
    train(configuration(steps=3), TRAIN, VALID, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    capsys.readouterr()
    train(configuration(steps=4), TRAIN, VALID, tmp_path, resume=True)
    assert "they are lost" not in capsys.readouterr().err
    metrics.write_bytes(lines[0])
    train(configuration(steps=5), TRAIN, VALID, tmp_path, resume=True)
    assert "metrics.jsonl ends at step 1, but had records up to step 4 when" in capsys.readouterr().err


def test_a_tokenizer_without_the_end_of_text_gives_no_samples_and_no_error(tmp_path, capsys):
    lacks_bytes = Tokenizer({0: b"a", 1: b"b"}, [])
    run = train(configuration(steps=1, warmup_steps=0), TRAIN, VALID, tmp_path, tokenizer=lacks_bytes)
    assert run.step == 1
    assert load_run(tmp_path, device="cpu").step == 1
    assert "there will be no samples, because the tokenizer cannot encode end_of_text = '<|endoftext|>'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "samples.txt").exists()


@pytest.mark.parametrize("first_step", [0, 7])
def test_tensorboard_drops_what_comes_after_the_first_step(first_step, tmp_path, monkeypatch):
    purged = []

    class Writer:
        def __init__(self, folder, purge_step):
            purged.append(purge_step)

        def add_text(self, *arguments):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    open_trackers(["tensorboard"], tmp_path, first_step=first_step)
    assert purged == [first_step + 1]
