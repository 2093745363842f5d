"""The scripts that use a trained model: generate.py, evaluate.py and sweep.py."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from basic.analysis.evaluation import evaluate_tokens
from basic.analysis.sweep import SweepData
from basic.chat import ChatFormat
from basic.encoding import encode_file
from basic.generation.continuation import generate
from basic.generation.text import complete
from basic.model import ModelConfig
from basic.Tokenizer import Tokenizer
from basic.training.loop import train
from basic.training.run_folder import load_run, load_run_config, save_run_config
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from tests.helpers.scripts import run_script
from tests.project.test_scripts import REPOSITORY, script

END = "<|endoftext|>"
BYTES = Tokenizer({i: bytes([i]) for i in range(256)}, [], [END], kernels=False)
TEXT = "the cat sees the dog. naïve 日本\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of two steps whose token ids are bytes, and files to evaluate it on."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    encode_file(BYTES, folder / "text.txt", folder / "text.bin")
    encode_file(
        Tokenizer({i: bytes([i]) for i in range(256)}, [], kernels=False), folder / "text.txt", folder / "other.bin"
    )
    np.save(folder / "text.npy", np.array(BYTES.encode(TEXT), np.uint16))
    config = RunConfig(
        model=ModelConfig(vocab_size=257, context_length=16, d_model=16, num_layers=1, num_heads=2),
        train=TrainConfig(steps=2, batch_size=2, eval_batches=1, log_interval=1, device="cpu"),
        data=DataConfig(valid_tokens=str(folder / "text.bin")),
    )
    tokens = np.array(BYTES.encode(TEXT), np.uint16)
    train(config, tokens, tokens, folder / "run", tokenizer=BYTES)
    return folder


# --- generate -------------------------------------------------------------------------------------------------


def generate_output(capsys, monkeypatch, folder: Path, *arguments: str | Path) -> str:
    capsys.readouterr()
    run_script(monkeypatch, "generate", folder / "run", "--device", "cpu", "--max-tokens", "20", *arguments)
    return capsys.readouterr().out


def test_a_wrong_number_of_tokens_is_refused_before_the_prompt_is_shown(folder, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="error: --max-tokens must be at least 0, got -1"):
        generate_output(capsys, monkeypatch, folder, "--prompt", "the cat", "--max-tokens", "-1")
    with pytest.raises(SystemExit, match="error: --num-samples must be at least 1, got 0"):
        generate_output(capsys, monkeypatch, folder, "--prompt", "the cat", "--num-samples", "0")
    assert capsys.readouterr().out == ""


def test_a_prompt_comes_from_an_option_a_file_or_standard_input(folder, capsys, monkeypatch):
    run = load_run(folder / "run", device="cpu")
    (expected,) = complete(run.model, BYTES, ["the cat"], 20, temperature=0)
    greedy = ("--temperature", "0")
    assert generate_output(capsys, monkeypatch, folder, "--prompt", "the cat", *greedy) == f"the cat{expected}\n\n"
    (folder / "prompt.txt").write_text("\ufeffthe cat\n", encoding="utf-8")
    assert generate_output(capsys, monkeypatch, folder, "--prompt-file", folder / "prompt.txt", *greedy) == (
        f"the cat{expected}\n\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffthe cat\n"))
    assert generate_output(capsys, monkeypatch, folder, *greedy) == f"the cat{expected}\n\n"
    with pytest.raises(SystemExit, match="error: --prompt and --prompt-file are both given"):
        generate_output(capsys, monkeypatch, folder, "--prompt", "a", "--prompt-file", folder / "prompt.txt")
    (folder / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match=r"error: .*prompt\.txt is not UTF-8 text: .* position 3"):
        generate_output(capsys, monkeypatch, folder, "--prompt-file", folder / "prompt.txt")


def test_samples_differ_and_repeat_with_the_seed(folder, capsys, monkeypatch):
    drawn = ("--prompt", "the", "--num-samples", "3", "--seed", "4", "--top-k", "9")
    text = generate_output(capsys, monkeypatch, folder, *drawn)
    assert text.count("the") >= 3
    assert text == generate_output(capsys, monkeypatch, folder, *drawn)
    run = load_run(folder / "run", device="cpu")
    samples = complete(run.model, BYTES, ["the"], 20, num_samples=3, top_k=9, top_p=0.95, seed=4)
    assert len(set(samples)) == 3
    assert text == "".join(f"the{sample}\n\n" for sample in samples)


def test_a_chat_remembers_the_conversation_until_it_does_not_fit(capsys):
    prompts = []

    def answer(prompt: str) -> list[str]:
        prompts.append(prompt)
        return ["I ", f"say {len(prompts)}."]

    talk = script("generate").talk
    talk(ChatFormat(BYTES), ["a", "bb", "c"], answer, "be", 1000)
    first = "System:\nbe\n\nUser:\na\n\nAssistant:\n"
    second = f"{first}I say 1.{END}\n\nUser:\nbb\n\nAssistant:\n"
    third = f"System:\nbe\n\nUser:\nbb\n\nAssistant:\nI say 2.{END}\n\nUser:\nc\n\nAssistant:\n"
    longer = second + f"I say 2.{END}\n\nUser:\nc\n\nAssistant:\n"
    assert prompts == [first, second, longer]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("I say 1.\n\nI say 2.\n\nI say 3.\n\n", "")
    prompts.clear()
    talk(ChatFormat(BYTES), ["a", "bb", "c"], answer, "be", 80)
    assert prompts == [first, second, third]
    assert capsys.readouterr().err.count("the oldest messages are forgotten") == 1


def test_special_tokens_do_not_end_a_chat(capsys):
    prompts = []

    def answer(prompt: str) -> list[str]:
        prompts.append(prompt)
        return ["o", END, "k"]

    script("generate").talk(ChatFormat(BYTES), ["a", f"b{END}", "c"], answer, None, 1000)
    assert prompts[1:] == [f"User:\na\n\nAssistant:\nok{END}\n\nUser:\nc\n\nAssistant:\n"]
    assert capsys.readouterr().err.startswith(f"error: message 2 has the special token '{END}'")


def test_the_script_talks(folder, capsys, monkeypatch):
    run = load_run(folder / "run", device="cpu")
    prompt = ChatFormat(BYTES).prompt([{"role": "user", "content": "a"}])
    (expected,) = complete(run.model, BYTES, [prompt], 20, temperature=0)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert generate_output(capsys, monkeypatch, folder, "--chat", "--temperature", "0") == f"{expected}\n\n"
    assert generate_output(capsys, monkeypatch, folder, "--chat", "--prompt", "a", "--temperature", "0") == (
        f"{expected}\n\n"
    )


def test_the_script_lists_log_probabilities(folder, capsys, monkeypatch):
    run = load_run(folder / "run", device="cpu")
    prompt = BYTES.encode(run.with_document_start("a"))
    (ids,), (logarithms,) = generate(run.model, [prompt], 20, temperature=0, log_probabilities=True, end_id=256)
    options = ("--prompt", "a", "--temperature", "0", "--log-probabilities")
    assert generate_output(capsys, monkeypatch, folder, *options) == "".join(
        f"{logarithm:10.4f}  {BYTES.decode([token_id])!r}\n"
        for token_id, logarithm in zip(ids, logarithms, strict=True)
    )
    with pytest.raises(SystemExit, match="leave --chat and --stop out"):
        generate_output(capsys, monkeypatch, folder, *options, "--stop", "b")


def test_a_checkpoint_is_chosen_by_its_step(folder, capsys, monkeypatch):
    step = load_run(folder / "run", device="cpu").step
    newest = generate_output(capsys, monkeypatch, folder, "--prompt", "a", "--temperature", "0")
    options = ("--prompt", "a", "--temperature", "0", "--checkpoint")
    assert generate_output(capsys, monkeypatch, folder, *options, str(step)) == newest
    assert generate_output(capsys, monkeypatch, folder, *options, "best") == newest
    assert generate_output(capsys, monkeypatch, folder, *options, "last") == newest
    with pytest.raises(SystemExit, match="has no checkpoint of step 999"):
        generate_output(capsys, monkeypatch, folder, *options, "999")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_script_asks_for_prompts_until_ctrl_d(folder, capsys, monkeypatch):
    typed = iter(["the cat", "", "a dog"])

    def answer(question: str) -> str:
        assert question == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    out = generate_output(capsys, monkeypatch, folder, "--temperature", "0")
    run = load_run(folder / "run", device="cpu")
    continued = complete(run.model, BYTES, ["the cat", END, "a dog"], 20, temperature=0)
    assert out == "".join(f"{a}{b}\n\n" for a, b in zip(["the cat", "", "a dog"], continued, strict=True))


def test_control_characters_of_a_model_do_not_reach_a_terminal(folder, capsys, monkeypatch):
    arguments = ("--prompt", "a\x1b]52;", "--max-tokens", "300", "--seed", "0", "--top-p", "1")
    sent = generate_output(capsys, monkeypatch, folder, *arguments)
    assert re.findall("[\x00-\x08\x0b-\x1f]", sent.removeprefix("a\x1b]52;")), "the model generates control characters"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    generate_output(capsys, monkeypatch, folder, *arguments)
    shown = terminal.getvalue()
    assert shown == re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: rf"\x{ord(match[0]):02x}", sent)
    assert shown.startswith("a\\x1b]52;")


def test_a_prompt_starts_a_document_if_training_sequences_do(folder, capsys, monkeypatch):
    config = load_run_config(folder / "run")
    save_run_config(
        folder / "run", dataclasses.replace(config, train=dataclasses.replace(config.train, rows="documents"))
    )
    try:
        run = load_run(folder / "run", device="cpu")
        assert run.config.train.rows == "documents"
        (continued,) = complete(run.model, BYTES, [END + "the cat"], 20, temperature=0)
        for prompt in ("the cat", END + "the cat"):
            out = generate_output(capsys, monkeypatch, folder, "--temperature", "0", "--prompt", prompt)
            assert out == f"the cat{continued}\n\n"
    finally:
        save_run_config(folder / "run", config)


def test_ctrl_c_ends_without_a_traceback(folder):
    command = [sys.executable, REPOSITORY / "local" / "generate.py", folder / "run", "--prompt", "the"]
    process = subprocess.Popen(
        [*command, "--num-samples", "1000000", "--temperature", "2", "--device", "cpu"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell ignores SIGINT for background processes, and child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.read(20).startswith(b"the")  # it shows tokens as they are generated
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")


# --- evaluate -------------------------------------------------------------------------------------------------


def evaluated(capsys, monkeypatch, folder: Path, *arguments: str | Path) -> list[float]:
    capsys.readouterr()
    run_script(monkeypatch, "evaluate", folder / "run", *arguments, "--device", "cpu")
    found = re.search(
        r"loss +([\d.]+) nats per token\nperplexity +([\d.]+)\nbits per byte +(?:([\d.]+)|unknown)",
        capsys.readouterr().out,
    )
    assert found is not None
    return [float(number) for number in found.groups() if number is not None]


def test_tokens_and_text_give_the_same_numbers(folder, capsys, monkeypatch):
    run = load_run(folder / "run", device="cpu")
    score = evaluate_tokens(run.model, np.array(BYTES.encode(TEXT)), prefix_token_id=256)
    bits = score.bits_per_byte(len(TEXT.encode()))
    expected = [pytest.approx(number, abs=1e-4) for number in (score.loss, score.perplexity, bits)]
    assert evaluated(capsys, monkeypatch, folder) == expected
    assert evaluated(capsys, monkeypatch, folder, folder / "text.bin", "--batch-size", "3") == expected
    assert evaluated(capsys, monkeypatch, folder, folder / "text.txt", "--checkpoint", "best") == expected
    assert (
        evaluated(capsys, monkeypatch, folder, folder / "text.npy") == expected[:2]
    )  # the size of the text is unknown
    assert evaluated(capsys, monkeypatch, folder, "--stride", "16") != expected


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("other.bin", "was made by another tokenizer than that of the model"),
        ("missing.txt", "there is no file"),
        ("invalid.txt", "invalid.txt' is not valid UTF-8 at byte offset 2"),
        ("empty.txt", "there is nothing to score in 0 tokens"),
    ],
)
def test_a_file_that_cannot_be_evaluated_is_named(folder, capsys, monkeypatch, file, message):
    (folder / "invalid.txt").write_bytes(b"ab\xff")
    (folder / "empty.txt").touch()
    with pytest.raises(SystemExit, match="error: ") as caught:
        run_script(monkeypatch, "evaluate", folder / "run", folder / file, "--device", "cpu")
    assert message in str(caught.value.code)


def test_a_run_without_validation_tokens_asks_for_a_file(folder, monkeypatch):
    run = folder / "imported"
    run.mkdir()
    save_run_config(run, dataclasses.replace(load_run_config(folder / "run"), data=DataConfig()))
    (run / "checkpoints").symlink_to(folder / "run" / "checkpoints")
    with pytest.raises(SystemExit, match="imported names no validation tokens; give a token file or a text after"):
        run_script(monkeypatch, "evaluate", run, "--device", "cpu")


# --- sweep ----------------------------------------------------------------------------------------------------


def test_a_small_sweep_generates_its_stories_once_and_writes_a_table_and_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = script("sweep")
    made, make_stories = [], module.make_stories

    def fewer(folder: Path) -> None:
        made.append(folder)
        make_stories(folder, num_train=200, num_valid=5, vocab_size=300)

    monkeypatch.setattr(module, "make_stories", fewer)
    Path("tiny.toml").write_text(
        f"""config = "{REPOSITORY}/local/configs/small.toml"
        settings.train.max_learning_rate = 0.001
        [small]
        settings.model.d_model = 8
        settings.train = {{ steps = 2, warmup_steps = 0, device = "cpu", eval_batches = 1 }}
        grid.train.seed = [1, 2]
        """
    )
    options = module.Options(sweeps=(Path("tiny.toml"),), small=True)
    module.main(options)
    first = capsys.readouterr().out
    assert {path.parent.name for path in Path("runs/tiny_small").glob("*/outcome.json")} == {"seed=1", "seed=2"}
    assert Path("runs/tiny_small/table.md").read_text() in first
    assert Path("runs/tiny_small/loss.png").read_bytes().startswith(b"\x89PNG")
    module.main(options)
    assert capsys.readouterr().out.count("(finished earlier)") == 2
    assert made == [Path("data/small_stories")]
    data = module.open_data(load_run("runs/tiny_small/seed=1", device="cpu").config.data)
    assert isinstance(data, SweepData)
    assert data.tokenizer.vocab_size == 300


def test_plan_only_prints_the_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_script(monkeypatch, "sweep", REPOSITORY / "local" / "experiments" / "learning_rate.toml", "--small", "--plan")
    assert capsys.readouterr().out.splitlines()[:2] == ["learning_rate", "  max_learning_rate=0.0003"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="error: no sweep given"):
        run_script(monkeypatch, "sweep")
