"""docs/notebook.md: ten things a student tries, each in at most three lines, run in their order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from basic.commands import own_text
from basic.commands.prepare_text import prepare_text
from basic.corpus.stories.grammar import stories
from basic.model import ModelConfig
from basic.training.loop import train
from basic.training.settings import DataConfig, RunConfig, TrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notebook.md"
START, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


class FakePandas(ModuleType):
    """Records what becomes a data frame, and what is plotted."""

    def __init__(self) -> None:
        super().__init__("pandas")
        self.plotted: list[Any] = []

    def DataFrame(self, records: list[dict[str, Any]]) -> Any:
        columns = {key for record in records for key in record}
        return SimpleNamespace(plot=lambda x, y: self.plotted.append((len(records), {x, *y} <= columns)))


def test_there_are_ten_and_each_is_at_most_three_lines():
    assert len(BLOCKS) == 10
    assert all(len(list(filter(None, block.splitlines()))) <= 3 for block in BLOCKS)


def test_all_of_them_run_and_do_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("<|endoftext|>".join(story.text for story in stories(0, 200)))
    prepared = prepare_text(["my.txt"], Path("data"), vocab_size=300)
    paths = {name: str(prepared.folder / f"{name[:5]}.bin") for name in ("train_tokens", "valid_tokens")}
    config = RunConfig(
        model=ModelConfig(vocab_size=300, context_length=64, d_model=16, num_layers=2, num_heads=2),
        train=TrainConfig(steps=4, batch_size=4, eval_batches=1, device="cpu", sample_tokens=4),
        data=DataConfig(tokenizer=str(prepared.folder / "tokenizer"), **paths),
    )
    train(config, prepared.train_tokens, prepared.valid_tokens, "runs/my", tokenizer=prepared.tokenizer)
    monkeypatch.setattr(own_text, "time_steps", lambda config, device: (1.0, config))
    monkeypatch.setattr(own_text, "matmul_flops_per_s", lambda device: 1.0)
    monkeypatch.setattr(own_text, "most_epochs", lambda parameters_per_token: 0)
    pandas, shown = FakePandas(), []
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    names: dict[str, Any] = {}
    printed = []
    for block in (START, *BLOCKS):
        exec(block, names)
        names["plt"] = SimpleNamespace(matshow=shown.append)
        printed.append(capsys.readouterr().out)

    length = len(prepared.tokenizer.encode("There once was a little girl"))
    assert names["maps"].shape == (2, 2, length, length)
    assert torch.equal(shown[0], names["maps"][0, 0])
    assert len(printed[2].splitlines()) == length - 1
    assert names["losses"].mean().item() == pytest.approx(np.log(300), rel=0.2)
    assert names["ids"].shape == (1, length + 20)
    assert all((Path("runs") / name / "checkpoints").is_dir() for name in ("sgd", "linear", "digits", "own"))
    assert len(names["seen"]) == 4
    assert "nats; it cannot be below 2.30" in printed[6]
    assert names["digits_run"].step == 4
    assert (Path("runs/digits/checkpoints") / "step_00000009.safetensors").is_file()
    assert pandas.plotted == [(3, True)] or pandas.plotted == [(2, True)]
    assert printed[9].startswith(f"{names['model'].num_parameters}\n")
    assert printed[10].strip()
