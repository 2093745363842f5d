"""Configurations to TOML and back, and errors for wrong files."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from basic.common.config_files import from_table, load_config, save_config, to_table
from basic.common.errors import InvalidConfigError
from basic.model import ModelConfig
from basic.training.settings import DataConfig, RunConfig, TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "local" / "configs"
MODEL = ModelConfig(vocab_size=100, context_length=16, d_model=32, num_layers=2, num_heads=4)


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ValueError(f"ratio must be at least 0, got {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    limit: int | None = None
    on: bool = False
    inner: Inner = field(default_factory=lambda: Inner(name="none"))


def load(tmp_path: Path, text: str | bytes) -> Outer:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, Outer)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(model=MODEL, train=TrainConfig(steps=1)),
        RunConfig(
            model=replace(MODEL, norm="post", positions="none", ffn="silu", tied_embeddings=True, d_ff=7),
            train=TrainConfig(steps=9, eps=1e-12, rows="documents", precision="bfloat16", compile=True),
            data=DataConfig(train_tokens='C:\\a "b"\t', valid_tokens="ü\n日本", tokenizer="'"),
        ),
        Outer(count=-1, limit=4, on=True, inner=Inner(name="", ratio=1e300, kind="b")),
        Outer(count=1, limit=None),
    ],
    ids=["run with defaults", "run with other values", "without None", "with None"],
)
def test_a_saved_configuration_loads_equal(tmp_path, config):
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml", type(config)) == config


def test_a_table_has_derived_values_and_no_none(tmp_path):
    assert to_table(RunConfig(model=MODEL, train=TrainConfig(steps=1)))["model"]["d_ff"] == 64
    assert to_table(Outer(count=1)) == {"count": 1, "on": False, "inner": {"name": "none", "ratio": 0.5, "kind": "a"}}


def test_an_integer_is_accepted_for_a_float(tmp_path):
    ratio = load(tmp_path, 'count = 1\n[inner]\nname = "x"\nratio = 2').inner.ratio
    assert ratio == 2.0
    assert type(ratio) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont = 1", "unknown key 'cuont'; the keys here are count, limit, on, inner"),
        ("count = 1\n[inner]\nnam = 'x'", "unknown key 'inner.nam'; the keys here are name, ratio, kind"),
        ("count = 1\n[iner]\nname = 'x'", "unknown key 'iner'; the keys here are count, limit, on, inner"),
        ("on = true", "the key 'count' is missing, and it has no default"),
        ("count = 1\n[inner]\nratio = 1.0", "the key 'inner.name' is missing"),
        ("count = 1.0", "count must be an integer, got float: 1.0"),
        ("count = " + "[" * 100_000, "maximum recursion depth exceeded"),
        ("count = true", "count must be an integer, got bool: True"),
        ("count = '1'", "count must be an integer, got str: '1'"),
        ("count = 1\nlimit = 'none'", "limit must be an integer, got str: 'none'"),
        ("count = 1\non = 1", "on must be true or false, got int: 1"),
        ("count = 1\ninner = 1", "inner must be a table with the keys name, ratio, kind, got int: 1"),
        ("count = 1\n[inner]\nname = 1", "inner.name must be a string in quotes, got int: 1"),
        ("count = 1\n[inner]\nname = 'x'\nratio = '1'", "inner.ratio must be a number, got str: '1'"),
        ("count = 1\n[inner]\nname = 'x'\nratio = true", "inner.ratio must be a number, got bool: True"),
        ("count = 1\n[inner]\nname = 'x'\nkind = 'c'", "inner.kind must be one of a, b, got 'c'"),
        ("count = 1\n[inner]\nname = 'x'\nratio = -1", "ratio must be at least 0, got -1"),
        ("count = \n", "Invalid value (at line 1, column 9)"),
        (b"count = 1 # \xff", "'utf-8' codec can't decode byte 0xff in position 12"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_file_and_the_key(tmp_path, text, message):
    with pytest.raises(InvalidConfigError, match=re.escape(f"{tmp_path / 'config.toml'}: {message}")):
        load(tmp_path, text)


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert load(tmp_path, b"\xef\xbb\xbfcount = 1\r\n").count == 1


def test_a_wrong_table_without_a_file_is_an_error_too():
    for table in ({"name": 1}, {"name": "x", "ratio": -1.0}, {"nam": "x"}, {}):
        with pytest.raises(InvalidConfigError):
            from_table(Inner, table)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml", Outer)


def test_saving_replaces_the_file_only_when_it_is_complete(tmp_path):
    save_config(Outer(count=1), tmp_path / "config.toml")
    with pytest.raises(TypeError):
        save_config(Outer(count=object()), tmp_path / "config.toml")  # ty: ignore[invalid-argument-type]
    assert load_config(tmp_path / "config.toml", Outer) == Outer(count=1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("name", "vocab_size", "num_tokens"),
    [
        ("tinystories", 10_000, 327_680_000),
        ("tinystories_low_resource", 10_000, 40_960_000),
        ("openwebtext", 32_000, 327_680_000),
    ],
)
def test_the_runs_of_the_assignment_have_its_sizes(name, vocab_size, num_tokens):
    config = load_config(CONFIGS / f"{name}.toml", RunConfig)
    assert config.model == ModelConfig(
        vocab_size=vocab_size,
        context_length=256,
        d_model=512,
        d_ff=1344,
        num_layers=4,
        num_heads=16,
        rope_theta=10_000.0,
    )
    assert config.train.steps * config.train.batch_size * config.model.context_length == num_tokens
    assert all((config.data.train_tokens, config.data.valid_tokens, config.data.tokenizer))


def test_the_configuration_of_the_quickstart_loads():
    config = load_config(CONFIGS / "quickstart.toml", RunConfig)
    assert (config.model.context_length, config.train.batch_size, config.train.rows) == (128, 16, "documents")


def test_the_leaderboard_keeps_its_rules():
    config = load_config(CONFIGS / "leaderboard.toml", RunConfig)
    assert (config.model.vocab_size, config.model.context_length, config.train.minutes) == (32_000, 512, 45)
    assert "openwebtext" in config.data.train_tokens


def test_all_configurations_are_tested():
    names = {path.stem for path in CONFIGS.iterdir()}
    # small.toml is tested with the sweeps.
    assert names == {"leaderboard", "openwebtext", "quickstart", "small", "tinystories", "tinystories_low_resource"}
