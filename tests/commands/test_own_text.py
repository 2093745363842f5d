"""A text becomes documents for training and validation, a tokenizer, token files, and a run of fitting size."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from basic.__main__ import main
from basic.commands import own_text
from basic.commands import prepare_text as module
from basic.commands.prepare_text import END, PreparedText, prepare_text
from basic.common import command_line
from basic.common.errors import InvalidInputError
from basic.corpus.sources import TextSource
from basic.corpus.stories.grammar import stories
from basic.formats import export_hf
from basic.model import ModelConfig, TransformerLM
from basic.training import load_run, train_text
from basic.training.recipes import flops_per_token, most_epochs, num_matrix_parameters
from basic.training.settings import RunConfig, TrainConfig
from tests.helpers.number_tokenizer import NumberTokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with 40 files of a story each, a hidden one, and my.txt with all of them."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "many" / "more").mkdir(parents=True)
    all_stories = [story.text for story in stories(3, 40)]
    for number, story in enumerate(all_stories):
        (folder / "many" / ("more" if number % 2 else "") / f"{number:02}.txt").write_text(story)
    (folder / "many" / ".hidden").write_bytes(b"\xff")
    (folder / "my.txt").write_text(END.join(all_stories))
    return folder


def documents(path: Path) -> list[str]:
    return [document for document in path.read_text().split(END) if document]


def test_a_folder_is_split_into_whole_documents(texts, tmp_path):
    prepared = prepare_text([str(texts / "many")], tmp_path / "data", valid_fraction=0.2)
    train, valid = (documents(prepared.folder / f"{split}.txt") for split in ("train", "valid"))
    assert len(valid) == 8
    assert sorted(train + valid) == sorted(story.text for story in stories(3, 40))
    assert prepared.tokenizer.vocab_size == 512
    assert prepared.tokenizer.decode(prepared.valid_tokens).split(END)[:-1] == valid
    assert {path.name for path in (tmp_path / "data").iterdir()} == {prepared.folder.name}
    assert re.fullmatch(r"many-[0-9a-f]{8}", prepared.folder.name)


def test_a_later_call_uses_the_files_again_unless_the_text_or_a_setting_differs(texts, tmp_path):
    copy = tmp_path / "my.txt"
    copy.write_bytes((texts / "my.txt").read_bytes())
    first = prepare_text([str(copy)], tmp_path, vocab_size=300)
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = prepare_text([str(copy)], tmp_path, vocab_size=300)
    assert (first.was_there, again.was_there, again.folder) == (False, True, first.folder)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == times
    assert len(documents(first.folder / "train.txt")) + len(documents(first.folder / "valid.txt")) == 40
    assert prepare_text([str(copy)], tmp_path, vocab_size=301).folder != first.folder
    copy.write_text(copy.read_text() + " And so on.")
    assert not prepare_text([str(copy)], tmp_path, vocab_size=300).was_there


def test_the_same_bytes_in_another_format_are_another_text(tmp_path):
    lines = "".join(json.dumps({"text": f"{number} apples"}) + "\n" for number in range(300))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(lines)
    prepared = [prepare_text([str(tmp_path / name)], tmp_path / "data") for name in ("a.txt", "a.jsonl")]
    assert not prepared[1].was_there
    assert ['{"text"' in (each.folder / "train.txt").read_text() for each in prepared] == [True, False]


@pytest.mark.parametrize(("fraction", "num_valid"), [(0.5, 10), (0.4, 8), (0.3, 6), (0.15, 3), (0.07, 1)])
def test_the_share_of_the_documents_is_the_given_one(tmp_path, fraction, num_valid):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"text number {number} " * 20)
    prepared = prepare_text([str(tmp_path / "*.txt")], tmp_path / "data", valid_fraction=fraction)
    assert len(documents(prepared.folder / "valid.txt")) == num_valid
    assert len(documents(prepared.folder / "train.txt")) == 20 - num_valid


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 14, 100])
def test_a_long_document_is_not_searched_again_with_every_chunk(monkeypatch, chunk):
    searched_again = []

    class Chunk(str):
        def __radd__(self, before: str) -> str:
            searched_again.append(len(before))
            return "".join([before, self])

    text = f"<|endof{END}a{END} {END}{'long <|endoftext ' * 99}{END}{END}b<|{END[:-1]}"
    parts = [Chunk(text[start : start + chunk]) for start in range(0, len(text), chunk)]
    monkeypatch.setattr(module, "read_text", lambda source: parts)
    source = TextSource("a.txt")
    assert list(module._documents([source, source])) == 2 * [each for each in text.split(END) if each.strip()]
    assert max(searched_again) < len(END)


def test_a_text_that_is_given_twice_is_read_once(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(texts / "many")
    (tmp_path / "link").symlink_to(texts / "many" / "more")
    inputs = ["more/*.txt", "more", str(texts / "many"), str(tmp_path / "link")]
    prepared = prepare_text(inputs, tmp_path / "data", valid_fraction=0.2)
    both = [document for split in ("train", "valid") for document in documents(prepared.folder / f"{split}.txt")]
    assert sorted(both) == sorted(story.text for story in stories(3, 40))


def test_few_files_are_split_inside_the_last_one(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"a line of {name}\n" * 200)
    prepared = prepare_text([str(tmp_path / "*.txt")], tmp_path / "data")
    train, valid = ((prepared.folder / f"{split}.txt").read_text() for split in ("train", "valid"))
    assert train + valid == "a line of a\n" * 200 + END + "a line of b\n" * 200 + END
    assert 0 < len(valid) < 0.12 * len(train + valid)


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for given, message in (("-", "'-' is no local file"), (str(tmp_path / "empty"), "has no files")):
        with pytest.raises(InvalidInputError, match=message):
            prepare_text([given], tmp_path / "data")
    with pytest.raises(InvalidInputError, match="valid_fraction must be above 0 and at most"):
        prepare_text(["my.txt"], tmp_path / "data", valid_fraction=1.0)
    for missing in ("missing.txt", ""):
        with pytest.raises(FileNotFoundError, match=f"there is no file '{missing}'"):
            prepare_text([missing], tmp_path / "data")
    (tmp_path / "latin.txt").write_bytes(b"a line\n" * 100 + "na\u00efve".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"latin\.txt' is not valid UTF-8 at byte offset 702"):
        prepare_text([str(tmp_path / "latin.txt")], tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def quick(monkeypatch) -> list[RunConfig]:
    """Steps are said to take a second on a slow machine; the configurations that were timed."""
    timed: list[RunConfig] = []

    def time_steps(config: RunConfig, device: torch.device) -> tuple[float, RunConfig]:
        timed.append(config)
        return 0.01 * config.model.num_layers**4, config

    monkeypatch.setattr(own_text, "time_steps", time_steps)
    monkeypatch.setattr(own_text, "matmul_flops_per_s", lambda device: 1e12)
    return timed


def test_the_measured_time_of_steps_decides_the_depth(texts, tmp_path, quick, monkeypatch):
    prepared = prepare_text([str(texts / "my.txt")], tmp_path)
    monkeypatch.setattr(own_text, "most_parameters", lambda num_tokens: math.inf)
    monkeypatch.setattr(own_text, "USUAL_EPOCHS", 10**9)
    monkeypatch.setattr(own_text, "most_epochs", lambda parameters_per_token: 1e9)
    config, line = own_text.choose(prepared, 60, "cpu", depth=None, seed=1)
    depths = [timed.model.num_layers for timed in quick]
    assert depths == sorted(set(depths), reverse=True)
    assert len(depths) > 1
    model, settings = config.model, config.train
    assert model.num_layers == depths[-1]
    assert model.vocab_size == prepared.tokenizer.vocab_size
    assert (settings.steps, settings.minutes, settings.seed) == (0, 60, 1)
    assert f"{model.num_layers} blocks of {model.d_model} features" in line
    assert f"{settings.batch_size} sequences of {model.context_length} tokens a step" in line


@pytest.mark.parametrize(("minutes", "batch_size"), [(2, 4), (10, 8), (60, 32)])
def test_the_handout_takes_smaller_steps_in_a_short_time(texts, tmp_path, monkeypatch, minutes, batch_size):
    monkeypatch.setattr(own_text, "time_steps", lambda config, device: (0.02 * config.train.batch_size, config))
    monkeypatch.setattr(own_text, "most_epochs", lambda parameters_per_token: 1e9)
    prepared = prepare_text([str(texts / "my.txt")], tmp_path)
    config, line = own_text.choose(prepared, minutes, "cpu", depth=1, seed=0, recipe="handout")
    assert config.model.context_length * config.train.batch_size == 256 * batch_size
    assert f"; {config.train.batch_size} sequences of" in line
    modern = own_text.choose(prepared, minutes, "cpu", depth=2, seed=0)[0]
    assert modern.model.context_length * modern.train.batch_size == 512 * 2**2


def test_a_short_text_gets_a_small_model_and_few_steps(texts, tmp_path, quick):
    prepared = prepare_text([str(texts / "my.txt")], tmp_path)
    config, line = own_text.choose(prepared, 60, "cpu", depth=None, seed=0)
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    assert config.model.num_layers == 1
    epochs = tokens / len(prepared.train_tokens)
    assert 6 < epochs <= 1.05 * most_epochs(num_matrix_parameters(config.model) / len(prepared.train_tokens)) < 10
    assert config.model.context_length < len(prepared.valid_tokens)
    assert "more would only learn it by heart" in line
    assert (config.train.dropout, config.train.weight_decay, config.train.head_weight_decay) == (0.3, 0.6, 0.2)
    assert line.endswith(f"dropout 0.3, because the text is seen {epochs:.1f} times")
    chosen = [
        own_text.choose(prepared, minutes, "cpu", depth=1, seed=0, recipe=recipe)[0].train.dropout
        for minutes, recipe in ((60, "handout"), (1e-4, "modern"))
    ]
    assert chosen == [0, 0]


def test_a_long_text_and_much_time_get_a_large_model_and_many_steps(monkeypatch):
    """Depth, sequences a step, steps, epochs and dropout for 64 MB of books: docs/modern_recipe.md."""

    def time_steps(config: RunConfig, device: torch.device) -> tuple[float, RunConfig]:
        tokens = config.train.batch_size * config.model.context_length
        return tokens * flops_per_token(config.model) / 4e14, config

    monkeypatch.setattr(own_text, "time_steps", time_steps)
    monkeypatch.setattr(own_text, "matmul_flops_per_s", lambda device: 7e14)
    tokenizer: Any = NumberTokenizer(32_768)
    books = PreparedText(Path("books"), tokenizer, range(14_800_000), range(500_000), False)
    chosen = {}
    for seconds in (6, 18, 60, 180, 600, 6000):
        config = own_text.choose(books, seconds / 60, "cpu", depth=None, seed=0)[0]
        model, train = config.model, config.train
        steps = train.steps or seconds / time_steps(config, torch.device("cpu"))[0]
        epochs = steps * train.batch_size * model.context_length / len(books.train_tokens)
        chosen[seconds] = model.num_layers, train.batch_size, round(steps), round(epochs, 1), train.dropout
    assert chosen == {
        6: (4, 16, 4049, 2.2, 0.1),
        18: (6, 36, 2670, 3.3, 0.1),
        60: (8, 32, 2739, 6.1, 0.2),
        180: (13, 42, 1964, 5.7, 0.3),
        600: (20, 50, 1730, 6.0, 0.3),
        6000: (20, 50, 1919, 6.6, 0.3),
    }


def test_too_short_a_text_is_an_error(tmp_path, quick):
    (tmp_path / "short.txt").write_text("a few words only")
    with pytest.raises(InvalidInputError, match=r"the text is too short: 4 tokens .* at least 16 each"):
        train_text(tmp_path / "short.txt", tmp_path / "run", data=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_basic_train_with_a_text_leaves_a_complete_run(texts, tmp_path, quick, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smaller = own_text._configure

    def configure(*arguments, **options) -> RunConfig:
        config = smaller(*arguments, **options)
        model = replace(config.model, d_model=16, num_heads=1, context_length=16)
        return replace(config, model=model, train=replace(config.train, batch_size=2, sample_tokens=8))

    monkeypatch.setattr(own_text, "_configure", configure)
    monkeypatch.setattr(own_text, "most_epochs", lambda parameters_per_token: 0)
    command = ["basic", "train", "--text", str(texts / "many"), "--minutes", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--vocab-size", "30000"])
    main()
    printed = capsys.readouterr().out
    assert re.search(r"^text .* tokens for training", printed)
    assert re.search(r"vocabulary [0-9,]+ \(for 30,000 the text has too few pairs\), written to ", printed)
    assert "sample 2: " in printed
    assert "next: `basic generate runs/many`" in printed
    run = load_run("runs/many", device="cpu")
    assert run.step == 20
    assert {path.name for path in Path("runs/many").iterdir()} >= {"report.html", "samples.txt", "tokenizer"}
    assert run.tokenizer.encode(run.complete("Once", 5, seed=0)) is not None
    assert [len(run.tokenizer.encode(text)) for text in run.complete(["", "a"], 0)] == [0, 0]
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(SystemExit, match="runs/many already contains a run; add --overwrite to replace it"):
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "3"], "--batch-size is no option with --text, .* `basic train --text TEXT --help`"),
        (["--config=x"], "--config is no option with --text"),
        (["--recipe", "other"], "invalid choice 'other'"),
        (["--nothing"], "For full helptext, run basic train --text TEXT --help"),
        (["--depth", "65"], "depth must be from 1 to 64 blocks, got 65"),  # there is no my.txt: it is not read first
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--device", "other"], "other"),
    ],
)
def test_options_that_a_text_does_not_take(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["basic", "train", "--text", "my.txt", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert re.search(message, str(caught.value.code) + capsys.readouterr().err)


def test_several_processes_do_not_train_on_a_text_side_by_side(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["basic", "train", "--text", str(texts / "my.txt")])
    with pytest.raises(SystemExit, match="several processes cannot choose the settings for a text"):
        main()
    assert not any(tmp_path.iterdir())


def test_a_wrong_name_of_a_text_is_said_before_a_run_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "text").mkdir(parents=True)
    (tmp_path / "runs" / "text" / "config.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no file 'missing\.txt'"):
        own_text.train_text("missing.txt")


def test_no_text_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["basic", "train", "--text"])
    with pytest.raises(SystemExit, match="error: there is no text; give a file"):
        main()


def test_a_run_of_the_handout_can_be_exported_as_a_llama(texts, tmp_path, quick, monkeypatch):
    prepared = prepare_text([str(texts / "my.txt")], tmp_path)
    config, _ = own_text.choose(prepared, 60, "cpu", depth=1, seed=1, recipe="handout")
    assert (config.model.ffn, config.train.optimizer) == ("swiglu", "adamw")
    assert config.train.batch_size * config.model.context_length == 4 * 256  # of 32 * 256, for a text this short
    assert config.train.max_learning_rate == 1e-3
    export_hf(TransformerLM(config.model), tmp_path / "llama", prepared.tokenizer)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_long_job_says_how_long_it_takes(monkeypatch, capsys):
    model = ModelConfig(vocab_size=300, context_length=64, d_model=64, num_layers=2, num_heads=2)
    config = RunConfig(model=model, train=TrainConfig(steps=100_000, batch_size=32, eval_interval=0, compile=True))
    asked, step_s = [], {2: 0.02, 32: 0.1}
    monkeypatch.setattr(own_text, "time_steps", lambda config, device: (step_s[config.train.batch_size], config))
    monkeypatch.setattr(command_line, "confirm_start", asked.append)
    own_text.announce(config, 100_000, torch.device("cpu"))
    assert asked == [pytest.approx(10_000)]
    step_s[2] = 1.0  # a complete step takes too long to be timed
    own_text.announce(config, 100_000, torch.device("cpu"))
    own_text.announce(config, 10, torch.device("cpu"))
    assert asked == [pytest.approx(10_000), pytest.approx(1_600_000)]
    printed = capsys.readouterr().err
    assert [line for line in printed.splitlines() if not line.startswith("timing some steps")] == [
        "the run will take about 2.8 hours on this machine (cpu), less with its compiled model",
        "the run will take about 444.4 hours on this machine (cpu), less with its compiled model",
    ]
    evaluated = replace(config, train=replace(config.train, eval_interval=10, eval_batches=3))
    own_text.announce(evaluated, 100_000, torch.device("cpu"))  # 3 forward passes, a third of a step each
    assert asked[-1] == pytest.approx(1.1 * asked[-2])
