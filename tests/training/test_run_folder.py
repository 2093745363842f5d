"""Loading a run folder, and the errors if that is not possible."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from basic.common.config_files import save_config
from basic.common.errors import InvalidConfigError, InvalidInputError, NotARunError
from basic.model import ModelConfig, TransformerLM
from basic.training.checkpoints.file import save_checkpoint
from basic.training.parallel.devices import activation_dtype, check_precision, choose_device
from basic.training.records.metrics import read_metrics
from basic.training.run_folder import create_run_folder, load_run
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from basic.transformer.kernels import dispatch

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=1, num_heads=2, norm="post"),
    train=TrainConfig(steps=7, device="cpu"),
    data=DataConfig(train_tokens="somewhere/train.bin"),
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with three checkpoints, the newest with the model of seed 3."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    save_config(CONFIG, folder / "config.toml")
    for seed, step in ((1, 9), (2, 80), (3, 100)):
        torch.manual_seed(seed)
        save_checkpoint(TransformerLM(CONFIG.model), None, step, folder / "checkpoints" / f"step_{step:08}.safetensors")
    return folder


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_00000100.safetensors"


def test_load_run_returns_the_newest_model_its_configuration_and_step(run_dir):
    run = load_run(str(run_dir), device="cpu")
    torch.manual_seed(3)
    expected = TransformerLM(CONFIG.model)
    assert (run.config, run.step, run.tokenizer_path) == (CONFIG, 100, None)
    assert not run.model.training
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(run.model(ids), expected(ids))
    assert run.model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_load_run_returns_the_path_of_the_tokenizer(run_dir):
    (run_dir / "tokenizer").mkdir()
    assert load_run(run_dir).tokenizer_path == run_dir / "tokenizer"


def test_a_moved_run_loads(run_dir, tmp_path):
    run_dir.rename(tmp_path / "elsewhere")
    assert load_run(tmp_path / "elsewhere").step == 100


@pytest.mark.parametrize("missing", ["folder", "configuration"])
def test_a_folder_that_is_not_a_run(run_dir, missing):
    (run_dir / "config.toml").unlink()
    path = run_dir / "nowhere" if missing == "folder" else run_dir
    with pytest.raises(NotARunError, match=re.escape(f"{path} is not a run: it has no config.toml")):
        load_run(path)


def test_a_run_without_a_checkpoint(run_dir):
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(NotARunError, match="checkpoints has no checkpoint"):
        load_run(run_dir)


def test_a_configuration_with_an_unknown_key(run_dir):
    text = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(text.replace("d_model", "d_mdoel"))
    with pytest.raises(
        InvalidConfigError, match=r"config\.toml: unknown key 'model\.d_mdoel'; the keys here are vocab_size, "
    ):
        load_run(run_dir)


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_truncated_checkpoint_is_named_and_the_previous_one_is_loaded(run_dir, num_bytes):
    newest(run_dir).write_bytes(newest(run_dir).read_bytes()[:num_bytes])
    with pytest.warns(UserWarning, match=r"step_00000100\.safetensors is not a complete checkpoint"):
        assert load_run(run_dir).step == 80


@pytest.mark.parametrize(
    ("old", "new", "key", "shapes"),
    [
        ("vocab_size = 11", "vocab_size = 12", "token_embeddings.weight", ["(11, 16)", "(12, 16)"]),
        ("d_ff = 64", "d_ff = 128", "layers.0.ffn.w1.weight", ["(64, 16)", "(128, 16)"]),
        ("num_layers = 1", "num_layers = 2", "layers.1.ln1.weight", ["(16,)"]),
        ('norm = "post"', 'norm = "none"', "layers.0.ln1.weight", ["(16,)"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_with_key_and_shapes(run_dir, old, new, key, shapes):
    text = (run_dir / "config.toml").read_text()
    assert text.count(old) == 1
    (run_dir / "config.toml").write_text(text.replace(old, new))
    with pytest.raises(InvalidInputError, match=r"does not fit the model.*" + re.escape(repr(key))) as caught:
        load_run(run_dir)
    assert all(shape in str(caught.value) for shape in shapes)


def test_devices_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == best
    with pytest.raises(InvalidConfigError, match=r"device 'abacus' cannot be used here \(.*\); use cpu or auto"):
        choose_device("abacus")
    with pytest.raises(InvalidConfigError, match="device 'cuda:99' cannot be used here"):
        choose_device("cuda:99")


def test_fp8_is_refused_where_it_cannot_be_trained(monkeypatch):
    config = replace(CONFIG, train=replace(CONFIG.train, precision="fp8", batch_size=2))
    check_precision(CONFIG, torch.device("cpu"))
    with pytest.raises(InvalidConfigError, match=r'"fp8" needs a GPU that multiplies in 8 bits .*, got cpu; .*"auto"'):
        check_precision(config, torch.device("cpu"))
    # A run that was trained elsewhere can be used here.
    assert activation_dtype(config.train, torch.device("cpu")) == torch.float32
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InvalidConfigError, match="got an old GPU"):
        check_precision(config, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with dispatch.use_operators(None), pytest.raises(InvalidConfigError, match="needs Triton"):
        check_precision(config, cuda)
    with dispatch.use_operators(object()):
        with pytest.raises(InvalidConfigError, match="divisible by 16, got 8 for the tokens of a micro-batch"):
            check_precision(config, cuda, num_ranks=2)
        with pytest.raises(InvalidConfigError, match='needs parallel = "replicated", got "sharded"'):
            check_precision(replace(config, train=replace(config.train, parallel="sharded")), cuda, num_ranks=2)
        check_precision(config, cuda)
        with pytest.raises(InvalidConfigError, match="divisible by 16, got 8 for num_kv_heads x head size"):
            check_precision(replace(config, model=replace(CONFIG.model, num_kv_heads=1)), cuda)


def test_prompts_start_with_the_separator_only_if_all_training_sequences_did(run_dir):
    run = load_run(run_dir)
    assert run.with_document_start("Once") == "Once"
    documents = run._replace(config=replace(CONFIG, train=replace(CONFIG.train, rows="documents")))
    assert documents.with_document_start("Once") == "<|endoftext|>Once"
    assert documents.with_document_start("<|endoftext|>Once") == "<|endoftext|>Once"


def test_incomplete_lines_of_the_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": 2.25}\n{"step": 3, "tra')
    with pytest.warns(
        UserWarning, match=r"metrics\.jsonl: lines that are incomplete or damaged are left out: 3 \(1 of 3"
    ):
        assert read_metrics(path) == [{"step": 1, "train_loss": 2.5}, {"step": 2, "train_loss": 2.25}]
    path.write_text("")
    assert read_metrics(path) == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "missing.jsonl")


def test_a_configuration_of_somebody_else_is_not_replaced(tmp_path):
    run_dir = tmp_path / "mine"
    (run_dir / "tokenizer").mkdir(parents=True)
    files = {"config.toml": "[other]\nx = 1\n", "samples.txt": "mine\n", "tokenizer/notes.txt": "mine\n"}
    for name, text in files.items():
        (run_dir / name).write_text(text)
    config = RunConfig(
        model=ModelConfig(vocab_size=11, context_length=6, d_model=8, num_layers=1, num_heads=2),
        train=TrainConfig(steps=1),
    )
    with pytest.raises(FileExistsError, match="already contains a run"):
        create_run_folder(run_dir, config, None)
    assert {name: (run_dir / name).read_text() for name in files} == files
    create_run_folder(run_dir, config, None, overwrite=True)
    create_run_folder(run_dir, config, None)  # a run without a step
