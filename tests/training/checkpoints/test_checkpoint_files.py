"""The file of a checkpoint: what is in it, and what cannot be saved, loaded or fitted to a model."""

import io
import json
import os
import pickle
import random
from collections import defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.training.checkpoints.file import load_checkpoint, save_checkpoint
from tests.adapters import run_load_checkpoint, run_save_checkpoint
from tests.helpers.checkpoint_tools import Bomb, OddModule, assert_same, make_net, trained_net


@pytest.fixture
def trained():
    return trained_net()


# --- The file -------------------------------------------------------------------------------------------------


def test_other_programs_can_read_the_weights_by_name(trained, tmp_path):
    model, optimizer = trained
    run_save_checkpoint(model, optimizer, 3, tmp_path / "c.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "c.safetensors")
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    assert_same(dict(sorted(weights.items())), dict(sorted(model.state_dict().items())))
    assert_same(tensors["optimizer.state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    with safetensors.safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        document = json.loads(file.metadata()["checkpoint"])
    assert document["iteration"] == 3
    assert document["model"]["0.weight"] == {"$tensor": "model.0.weight"}


def test_the_file_has_the_permissions_of_any_new_file(trained, tmp_path):
    run_save_checkpoint(*trained, 3, tmp_path / "c")
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_shared_memory_is_stored_once(tmp_path):
    def size_bytes(**buffers):
        model = nn.Module()
        for name, tensor in buffers.items():
            model.register_buffer(name, tensor)
        save_checkpoint(model, None, 0, tmp_path / "c")
        return (tmp_path / "c").stat().st_size

    big = torch.zeros(100, 100)
    alone = size_bytes(a=big)
    assert size_bytes(a=big, b=big, c=big.T, d=big[1:], e=big.view(torch.int32)[:, 3]) < alone + 1500
    assert size_bytes(a=big[:2]) < 2500  # a small slice of a large tensor is stored without the rest


def test_several_checkpoints_in_one_file_object(trained):
    """Writing starts at the position of the file object, and reading stops at the end of the checkpoint."""
    model, optimizer = trained
    file = io.BytesIO(b"head")
    file.seek(4)
    for iteration in (1, 2):
        run_save_checkpoint(model, optimizer, iteration, file)
    file.write(b"tail")
    assert file.getvalue().startswith(b"head")
    file.seek(4)
    assert [run_load_checkpoint(file, model, optimizer) for _ in range(2)] == [1, 2]
    assert file.read() == b"tail"


@pytest.mark.parametrize("buffering", [-1, 0])
def test_opened_files(trained, tmp_path, buffering):
    with open(tmp_path / "c", "wb", buffering=buffering) as file:
        run_save_checkpoint(*trained, 4, file)
    with open(tmp_path / "c", "rb", buffering=buffering) as file:
        assert run_load_checkpoint(file, *trained) == 4


class SlowFile(io.BytesIO):
    """Reads and writes at most 100 bytes at a time, as raw files and pipes may."""

    def write(self, buffer, /):
        return super().write(memoryview(buffer)[:100])

    def read(self, size=-1, /):
        return super().read(min(size or 0, 100))


def test_files_that_read_and_write_few_bytes_at_a_time(trained):
    file = SlowFile()
    run_save_checkpoint(*trained, 4, file)
    file.seek(0)
    assert run_load_checkpoint(file, *trained) == 4


def test_text_files_are_refused(trained):
    with pytest.raises(TypeError):
        run_save_checkpoint(*trained, 4, io.StringIO())  # ty: ignore[invalid-argument-type]
    with pytest.raises(DamagedFileError, match="gives str, not bytes; open it with mode 'rb'"):
        run_load_checkpoint(io.StringIO("a" * 100), *trained)  # ty: ignore[invalid-argument-type]


def test_loaded_tensors_do_not_depend_on_the_file(trained, tmp_path):
    """Tensors are read from a memory-mapped file, and must be copies once they are loaded."""
    model, optimizer = trained
    run_save_checkpoint(model, optimizer, 4, tmp_path / "c")
    fresh = make_net()
    fresh_optimizer = torch.optim.AdamW(fresh.parameters())
    run_load_checkpoint(tmp_path / "c", fresh, fresh_optimizer)
    with open(tmp_path / "c", "r+b") as file:
        file.write(b"\xff" * (tmp_path / "c").stat().st_size)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert_same(fresh_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_checkpoint(trained, tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("No space left on device")

    run_save_checkpoint(*trained, 1, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space"):
            run_save_checkpoint(*trained, 2, tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert run_load_checkpoint(tmp_path / "c", *trained) == 1


def test_a_missing_folder_is_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent' does not exist"):
        run_save_checkpoint(*trained, 1, tmp_path / "absent" / "c")


def test_loading_does_not_change_the_random_states(trained, tmp_path):
    run_save_checkpoint(*trained, 1, tmp_path / "c")

    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    before = states()
    run_load_checkpoint(tmp_path / "c", *trained)
    assert states() == before


# --- Values that cannot be saved ------------------------------------------------------------------------------


class Color(IntEnum):
    RED = 1


class TensorSubclass(torch.Tensor):
    """Represents all tensor subclasses."""


Point = namedtuple("Point", "x y")


def print_nothing():
    pass


UNSAVABLE = {
    "builtins.set": lambda: {1},
    "builtins.bytes": lambda: b"raw",
    "builtins.complex": lambda: 1j,
    "builtins.object": object,
    "builtins.function": lambda: print_nothing,
    "builtins.type": lambda: int,
    "numpy.float64": lambda: np.float64(1.5),
    "numpy.ndarray": lambda: np.zeros(2),
    "collections.defaultdict": lambda: defaultdict(list),
    "Color": lambda: Color.RED,
    "Point": lambda: Point(1, 2),
    "torch.dtype": lambda: torch.float32,
    "meta": lambda: torch.zeros(2, device="meta"),
    "torch.sparse_coo": lambda: torch.eye(2).to_sparse(),
    "torch.sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "torch.qint8": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "TensorSubclass": lambda: torch.ones(2).as_subclass(TensorSubclass),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("name", "make_value"), UNSAVABLE.items(), ids=UNSAVABLE.keys())
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [0, (value,)], lambda value: {3: value}])
def test_values_that_cannot_be_saved_are_named(trained, tmp_path, name, make_value, wrap):
    model, optimizer = trained
    run_save_checkpoint(model, optimizer, 1, tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    next(iter(optimizer.state.values()))["foo"] = wrap(make_value())
    file = io.BytesIO()
    for out in (tmp_path / "c", file):
        with pytest.raises(TypeError, match=rf"optimizer\.state\.0\.foo(\..*)? is a .*{name}.* cannot be saved"):
            run_save_checkpoint(model, optimizer, 2, out)
    assert os.listdir(tmp_path) == ["c"]
    assert (tmp_path / "c").read_bytes() == before
    assert file.getvalue() == b""


@pytest.mark.parametrize("key", [torch.zeros(1), Color.RED, (1, frozenset())])
def test_keys_that_cannot_be_saved_are_named(trained, key):
    model, optimizer = trained
    optimizer.param_groups[0]["table"] = {key: 1}
    with pytest.raises(TypeError, match=r"optimizer\.param_groups\.0\.table .*key.* cannot be saved"):
        run_save_checkpoint(model, optimizer, 1, io.BytesIO())


def test_module_state_that_cannot_be_saved_is_named(trained):
    model = OddModule()
    model.note = {"when": object()}
    with pytest.raises(TypeError, match=r"model\._extra_state\.when is a builtins\.object"):
        run_save_checkpoint(model, trained[1], 1, io.BytesIO())
    with pytest.raises(TypeError, match=r"model.weight is a .*meta"):
        run_save_checkpoint(nn.Linear(2, 2, device="meta"), trained[1], 1, io.BytesIO())
    with pytest.raises(TypeError, match=r"model.weight is a .*UninitializedParameter"):
        run_save_checkpoint(nn.LazyLinear(2), trained[1], 1, io.BytesIO())


def test_metadata_that_is_too_large(trained):
    with pytest.raises(InvalidInputError, match="does not fit into a safetensors file"):
        save_checkpoint(*trained, 1, io.BytesIO(), extra={"text": "x" * 100_000_001})


# --- Files that cannot be loaded ------------------------------------------------------------------------------


def assert_refused(content, trained, tmp_path):
    """Refused by path and as a file object; the model and the optimizer do not change."""
    before = pickle.dumps([each.state_dict() for each in trained])
    (tmp_path / "bad").write_bytes(content)
    for src in (tmp_path / "bad", io.BytesIO(content)):
        with pytest.raises(DamagedFileError, match=r"is not a complete checkpoint .* use an earlier checkpoint"):
            run_load_checkpoint(src, *trained)
    assert pickle.dumps([each.state_dict() for each in trained]) == before


def test_a_missing_file(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*absent"):
        run_load_checkpoint(tmp_path / "absent", *trained)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        run_load_checkpoint(tmp_path, *trained)


def test_truncation_anywhere(trained, tmp_path):
    file = io.BytesIO()
    run_save_checkpoint(*trained, 1, file)
    content = file.getvalue()
    header_end = 8 + int.from_bytes(content[:8], "little")
    lengths = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(content) - 1}
    for length in lengths | set(range(0, len(content), 61)):
        assert_refused(content[:length], trained, tmp_path)


def test_damage_anywhere():
    """One changed bit in any tensor or in the document is detected."""
    model = nn.Linear(3, 2)
    file = io.BytesIO()
    save_checkpoint(model, None, 1, file)
    content = file.getvalue()
    header_end = 8 + int.from_bytes(content[:8], "little")
    document = content.index(b"version")
    for offset in [*range(header_end, len(content)), *range(document, document + 100, 7)]:
        damaged = bytearray(content)
        damaged[offset] ^= 4
        with pytest.raises(DamagedFileError, match="not a complete checkpoint"):
            load_checkpoint(io.BytesIO(damaged), model)


def test_bytes_after_the_end(trained, tmp_path):
    run_save_checkpoint(*trained, 1, tmp_path / "c")
    with open(tmp_path / "c", "ab") as file:
        file.write(b"more")
    with pytest.raises(DamagedFileError, match="not a complete checkpoint"):
        run_load_checkpoint(tmp_path / "c", *trained)


def test_a_pickle_is_refused_without_running(trained, tmp_path):
    trap = tmp_path / "the pickle ran"
    archive = io.BytesIO()
    torch.save({"model": Bomb(trap)}, archive)
    for content in (pickle.dumps(Bomb(trap)), pickle.dumps(Bomb(trap), protocol=0), archive.getvalue()):
        assert_refused(content, trained, tmp_path)
    assert not trap.exists()


FOREIGN = {
    "text": b"Once upon a time, there was a little girl named Lily.\n" * 9,
    "json": json.dumps({"checkpoint": 1}).encode(),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "no header": (2).to_bytes(8, "little") + b"{}",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "weights": safetensors.torch.save({"weight": torch.zeros(2)}),
    "weights of transformers": safetensors.torch.save({"weight": torch.zeros(2)}, {"format": "pt"}),
    "another checkpoint": safetensors.torch.save({"a": torch.zeros(2)}, {"checkpoint": "x", "sha256": "0"}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files(content, trained, tmp_path):
    assert_refused(content, trained, tmp_path)


# --- Checkpoints that do not fit ------------------------------------------------------------------------------


UNFIT = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)),
        r"'2.weight' is float32 of shape \(2, 5\) in the checkpoint, but float32 of shape \(4, 5\) in the model",
    ),
    "first difference": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)),
        r"'0.weight' is float32 of shape \(5, 3\) .* \(5, 4\)",
    ),
    "dtype": (
        lambda: make_net().to(torch.bfloat16),
        r"'0.weight' is float32 of shape \(5, 3\) in the checkpoint, but bfloat16 of shape \(5, 3\)",
    ),
    "missing": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2), nn.Linear(2, 1)),
        r"it has no '3.weight' \(float32 of shape \(1, 2\) in the model\)",
    ),
    "unexpected": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False)),
        r"the model, which has no '2.bias' \(float32 of shape \(2,\) in the checkpoint\)",
    ),
    "meta": (lambda: make_net().to("meta"), "'0.weight' of the model is on the meta device .* to_empty"),
}


@pytest.mark.parametrize(("make_model", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_model_that_does_not_fit(trained, tmp_path, make_model, message):
    run_save_checkpoint(*trained, 1, tmp_path / "c")
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [str(model.state_dict()), str(optimizer.state_dict())]
    with pytest.raises(InvalidInputError, match=message):
        run_load_checkpoint(tmp_path / "c", model, optimizer)
    assert [str(model.state_dict()), str(optimizer.state_dict())] == before


def test_an_optimizer_that_does_not_fit(trained, tmp_path):
    run_save_checkpoint(*trained, 1, tmp_path / "c")
    model = make_net()
    before = str(model.state_dict())
    one_layer = torch.optim.AdamW(model[0].parameters())
    two_groups = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1:].parameters()}])
    for optimizer, sizes in ((one_layer, r"\[2\]"), (two_groups, r"\[2, 4\]")):
        with pytest.raises(InvalidInputError, match=rf"groups have \[6\] parameters, those of the optimizer {sizes}"):
            run_load_checkpoint(tmp_path / "c", model, optimizer)
        assert optimizer.state_dict()["state"] == {}
    assert str(model.state_dict()) == before
