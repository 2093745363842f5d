"""local/bench/fixed_compute.py in a tiny size: its lines, its token files, and that nothing of the warm-up remains."""

from __future__ import annotations

import json
import lzma
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from basic.tokens.opening import open_tokens, read_info
from basic.transformer.muon import Muon
from tests.helpers.bench_tools import bench_script


@pytest.fixture(scope="module")
def script() -> Any:
    return bench_script("fixed_compute")


def test_recipes_train_for_a_fixed_time(script, tmp_path, monkeypatch, capsys):
    words = np.random.default_rng(0).choice(["the", "whale", "sea", "of", "and", "a ship\n"], 6000)
    text = " ".join(words.tolist()).encode()
    for name, content in (("books_train", text), ("books_valid", text[:5000])):
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(content))
    arguments = (
        "--small --minutes 0.003 --depth 1 --width 16 --context 16 --batch-tokens 64 --vocab-size 270 --device cpu"
    )
    arguments += (
        f" --recipe adamw muon --set max_learning_rate=0.005 muon.iterations=3 --work {tmp_path} --text {tmp_path}"
    )
    monkeypatch.setattr(sys, "argv", ["fixed_compute.py", *arguments.split()])
    script.main()
    printed = capsys.readouterr()
    adamw, muon = map(json.loads, printed.out.splitlines())
    assert (adamw["recipe"], muon["recipe"]) == ("adamw", "muon")
    for line in (adamw, muon):
        assert 0 < line["same_books"] < 4
        assert line["optimizer_share"] > 0
        assert line["steps"] > 0
        assert line["tokens_per_s"] > 0
    warned = [f"the text {line['epochs']:g} times" for line in (adamw, muon) if line["epochs"] > script.MAX_EPOCHS]
    assert all(words in line for words, line in zip(warned, printed.err.splitlines(), strict=True))
    # No byte of the text is lost, and none is in both files.
    infos = [read_info(tmp_path / "small" / f"{name}.bin") for name in ("train", "same_books")]
    separators = len("<|endoftext|>") * (2 * script.HELD_BACK_BLOCKS - 2)
    assert sum(info.source_bytes or 0 for info in infos) == len(text) + separators
    assert 0.02 < infos[1].count / infos[0].count < 0.05
    assert open_tokens(tmp_path / "small" / "train.bin").max() < 270


def test_a_run_that_sees_its_text_too_often_is_warned_about(script, tmp_path, monkeypatch, capsys):
    results = iter([{"epochs": 2.0}, {"epochs": 5.6}])
    monkeypatch.setattr(script, "make_tokens", lambda *arguments: None)
    monkeypatch.setattr(script, "run", lambda *arguments: next(results))
    monkeypatch.setattr(sys, "argv", ["fixed_compute.py", "--recipe", "adamw", "muon", "--device", "cpu"])
    script.main()
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    (warning,) = printed.err.splitlines()
    assert "5.6 times" in warning
    assert "--minutes 0.36" in warning


def test_settings_of_all_recipes_are_valid(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fixed_compute.py"])
    options = script.parse()
    for recipe in script.RECIPES:
        config = script.run_config(recipe, ["weight_decay=0.3", "muon.momentum=0.9", "model.num_heads=4"], options)
        settings = config.train
        settings.check_schedule()
        assert settings.weight_decay == 0.3
        assert settings.muon.momentum == 0.9
        assert (config.model.num_heads, config.model.d_model) == (4, 512)
        assert settings.scheduled(script.STEPS)["learning_rate"] == 0


def test_the_state_of_the_warm_up_is_forgotten(script):
    weights = [Parameter(torch.randn(4, 6)), Parameter(torch.randn(6))]
    before = [weight.detach().clone() for weight in weights]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "rule": "adamw"}]
    optimizer, fresh = Muon(groups, weight_decay=0.1), Muon([{**group} for group in groups], weight_decay=0.1)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    script.forget(optimizer)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    results = []
    for each in (optimizer, fresh):
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)
        for group in each.param_groups:
            group["lr"] = 0.1
        each.step()
        results.append([weight.detach().clone() for weight in weights])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
