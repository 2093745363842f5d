"""The training and the validation text: nothing is lost, and nothing is in both."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from basic.common.errors import InvalidInputError
from basic.corpus.stories.grammar import stories, story_nats
from basic.corpus.train_valid import split_text, write_stories

END = "<|endoftext|>"


def split(tmp_path, text: str | bytes, **settings) -> tuple[bytes, bytes]:
    """Split a text; check that the two files together are the text."""
    data = text.encode() if isinstance(text, str) else text
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))
    (tmp_path / "source.txt").write_bytes(data)
    split_text(tmp_path / "source.txt", tmp_path, **settings)
    train, valid = (tmp_path / "train.txt").read_bytes(), (tmp_path / "valid.txt").read_bytes()
    assert train + valid == data
    return train, valid


# --- Stories --------------------------------------------------------------------------------------------------


def test_stories_are_written_with_separators_and_the_validation_stories_are_unseen(tmp_path):
    returned = write_stories(tmp_path, 50, 20, seed=3, separator="<END>")
    train, valid = ((tmp_path / name).read_text().split("<END>") for name in ("train.txt", "valid.txt"))
    assert train == [*(story.text for story in stories(6, 50)), ""]
    assert valid == [*(story.text for story in returned), ""]
    assert len(returned) == 20
    assert not set(train) & {story.text for story in returned}
    assert all(story.nats == pytest.approx(story_nats(story.text)) for story in returned)


def test_a_story_of_the_training_text_is_not_used_for_validation(tmp_path):
    first, second, third, fourth = stories(0, 4)
    samples = {0: [first, second], 1: [second, third, first, fourth]}
    assert write_stories(tmp_path, 2, 2, sample=lambda seed, count: iter(samples[seed])) == [third, fourth]


def test_seeds_decide_the_stories(tmp_path):
    def texts(seed):
        folder = tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        write_stories(folder, 5, 5, seed=seed)
        return (folder / "train.txt").read_text() + (folder / "valid.txt").read_text()

    zero, one = texts(0), texts(1)
    assert texts(0) == zero != one
    # No seed trains on the validation stories of another.
    assert not set(zero.split(END)[:-1]) & set(one.split(END)[:-1])


# --- Texts ----------------------------------------------------------------------------------------------------


def test_a_text_is_split_after_a_separator(tmp_path):
    documents = [f"Document {number}\nof two lines.{END}" for number in range(100)]
    train, valid = split(tmp_path, "".join(documents))
    assert train.decode() == "".join(documents[:91])  # the first 91 end after nine tenths of the bytes
    assert valid.decode() == "".join(documents[91:])
    train, valid = split(tmp_path, "".join(documents), valid_fraction=0.5)
    assert valid.startswith(b"Document 51\n")


@pytest.mark.parametrize(("edge", "name"), [("\n", "line"), (" ", "word")])
def test_a_text_without_separators_is_split_after_a_line_or_a_word(tmp_path, edge, name):
    train, valid = split(tmp_path, "".join(f"{name}{number:03}{edge}" for number in range(200)))
    assert train.decode().endswith(f"{name}180{edge}")
    assert valid.decode().startswith(f"{name}181{edge}")


@pytest.mark.parametrize("tail", [END, f"{END}\n", f"{END} the end"])
def test_a_separator_near_the_end_is_ignored(tmp_path, tail):
    train, valid = split(tmp_path, "One long document, line by line.\n" * 500 + tail)
    assert train.endswith(b"line.\n")
    assert len(valid) > 0.09 * len(train + valid)


@pytest.mark.parametrize("length", range(30, 40))
def test_a_character_of_several_bytes_is_not_split(tmp_path, length):
    train, valid = split(tmp_path, ("x" * (length % 4) + "日😀é" * length))
    assert train.decode() + valid.decode()  # both are UTF-8
    assert len(train) > len(valid) > 0


def test_bytes_are_copied_as_they_are(tmp_path):
    split(tmp_path, b"\xef\xbb\xbfa line\r\n\xff\x00\r" * 100)
    train, valid = split(tmp_path, b"0123456\n" * 400_000)  # more than one block of the copy
    assert (len(train), len(valid)) == (2_880_000 + 8, 320_000 - 8)


def test_an_empty_or_missing_text_is_an_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InvalidInputError, match=r"empty\.txt is empty"):
        split_text(tmp_path / "empty.txt", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        split_text(tmp_path / "missing.txt", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("valid_fraction", [0.0, 1.0, -0.5, 10])
def test_a_fraction_out_of_range_is_an_error(tmp_path, valid_fraction):
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(InvalidInputError, match="valid_fraction must be between 0 and 1"):
        split_text(tmp_path / "text.txt", tmp_path, valid_fraction=valid_fraction)


@pytest.mark.parametrize("name", ["train.txt", "valid.txt"])
def test_another_text_is_not_replaced(name, tmp_path):
    """The same text may be written again, as after an interruption."""
    (tmp_path / "a.jsonl").write_text('{"text": "one two three four five"}\n' * 5)
    writers = [lambda: write_stories(tmp_path, 5, 2), lambda: split_text(tmp_path / "a.jsonl", tmp_path)]
    for write in writers:
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} exists and holds another text"):
            write()
        assert (tmp_path / name).read_text() == "mine"
        for path in tmp_path.glob("*.txt"):
            path.unlink()
        write()
        write()
        for path in tmp_path.glob("*.txt"):
            path.unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three four five"}\n' * 5)
    program = (
        "import os, sys; from basic.corpus.train_valid import as_plain_file\n"
        "with as_plain_file(sys.argv[1], sys.argv[2]): os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.jsonl"), str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    split_text(tmp_path / "a.jsonl", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "train.txt", "valid.txt"}
