"""Checkpoints: any module and optimizer are loaded exactly as they were saved, or not changed at all."""

import io
import json
import os
import pickle
import random
from collections import OrderedDict, defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.training.checkpoints.file import load_checkpoint, read_checkpoint, save_checkpoint

from .adapters import get_adamw_cls, run_load_checkpoint, run_save_checkpoint


def assert_same(actual, expected, path="state"):
    """Equal in value, Python type, dtype and shape, at all levels; NaN equals NaN."""
    assert type(actual) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), path
        assert actual.requires_grad == expected.requires_grad, path
        assert as_bytes(actual) == as_bytes(expected), path
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in actual] == [(type(key), key) for key in expected], path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(expected, float):
        assert repr(actual) == repr(expected), path  # -0.0 differs from 0.0, and NaN equals NaN
    else:
        assert actual == expected, path


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_round_trip(make_model, make_optimizer, prepare):
    """Save a prepared pair, load it into a fresh one by path and by file object, and compare all state."""
    model = make_model()
    optimizer = make_optimizer(model)
    prepare(model, optimizer)
    file = io.BytesIO()
    run_save_checkpoint(model=model, optimizer=optimizer, iteration=17, out=file)
    file.seek(0)
    other_model = make_model()
    other_optimizer = make_optimizer(other_model)
    assert run_load_checkpoint(src=file, model=other_model, optimizer=other_optimizer) == 17
    assert_same(dict(other_model.state_dict()), dict(model.state_dict()), "model")
    assert_same(other_optimizer.state_dict(), optimizer.state_dict(), "optimizer")
    return other_model, other_optimizer


def make_net():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def train(model, optimizer, steps=3):
    for step in range(steps):
        x = torch.linspace(-1, 1 + step, 12).reshape(4, 3).to(next(model.parameters()).dtype)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.fixture
def trained():
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer


OPTIMIZERS = {
    "none yet": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "adamw with a tensor as rate": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2)),
    "our adamw": lambda model: get_adamw_cls()(model.parameters(), lr=1e-2),  # ty: ignore[missing-argument, unknown-argument]
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters()),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3),
    "named": lambda model: torch.optim.AdamW(model.named_parameters()),
    "two groups": lambda model: torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "betas": (0.5, 0.6)}]
    ),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_resumed_training_equals_uninterrupted_training(make_optimizer):
    torch.manual_seed(0)
    model = make_net()
    optimizer = make_optimizer(model)
    train(model, optimizer)
    initial = {key: value.clone() for key, value in model.state_dict().items()}

    def make_model():
        fresh = make_net()
        fresh.load_state_dict(initial)
        return fresh

    resumed, resumed_optimizer = assert_round_trip(make_model, make_optimizer, train)
    uninterrupted = make_model()
    uninterrupted_optimizer = make_optimizer(uninterrupted)
    train(uninterrupted, uninterrupted_optimizer)
    train(uninterrupted, uninterrupted_optimizer)
    train(resumed, resumed_optimizer)
    assert_same(dict(resumed.state_dict()), dict(uninterrupted.state_dict()))
    assert_same(resumed_optimizer.state_dict(), uninterrupted_optimizer.state_dict())


class OddOptimizer(torch.optim.Optimizer):
    """Has state that torch's own loading would change: strings, integer tensors, moments wider than the parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": torch.tensor(0.5), "schedule": ("cosine", [1, 1.0, True], {3: None})})

    def fill(self):
        for group in self.param_groups:
            group["window"] = (torch.arange(3), None)
            for p in group["params"]:
                shared = torch.arange(24, dtype=torch.float32).reshape(4, 6)
                self.state[p] = {
                    "moment": torch.full_like(p, 1 / 3, dtype=torch.float32),
                    "wide": torch.full_like(p, 1 / 3, dtype=torch.float64),
                    "step": 3,
                    "count": torch.tensor(2**40 + 1),
                    "mask": torch.tensor([True, False]),
                    "phase": torch.tensor([1 + 2j], dtype=torch.complex128),
                    "empty": torch.zeros(0, 3),
                    "name": "moment\0 of \ud83d\ude00",
                    "history": [torch.ones(2, dtype=torch.int8), None, (torch.zeros(()), "x")],
                    "numbers": (1, 1.0, True, -0.0, float("nan"), float("-inf"), 10**5000, -(2**63) - 1),
                    "keys": {1: "one", "1": "text", (1, ("a",)): [], None: {}, 2.5: (), False: "no", "$tuple": []},
                    "ordered": OrderedDict([("b", 1), ("a", OrderedDict())]),
                    "views": [shared, shared.T, shared[1:3, ::2], shared[2]],
                    "parameter": nn.Parameter(torch.ones(2)),
                    "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
                    "tracked": torch.ones(2, requires_grad=True),
                }
        other = {"text": "abc", "tensor": torch.arange(3)}
        self.state["not a parameter"] = other  # ty: ignore[invalid-assignment]


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unusual_optimizer_state_is_loaded_exactly(dtype):
    assert_round_trip(
        lambda: nn.Linear(3, 2).to(dtype),
        lambda model: OddOptimizer(model.parameters()),
        lambda model, optimizer: optimizer.fill(),
    )


class PackedOptimizer(torch.optim.SGD):
    """Saves its state in another form than it has in memory."""

    def state_dict(self):
        packed = super().state_dict()
        state = {key: {"half": value["momentum_buffer"].half()} for key, value in packed["state"].items()}
        return {"state": state, "param_groups": packed["param_groups"], "note": "halved"}

    def load_state_dict(self, state_dict):
        state = {key: {"momentum_buffer": value["half"].float()} for key, value in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})


def test_an_optimizer_with_its_own_format():
    _, optimizer = assert_round_trip(
        make_net, lambda model: PackedOptimizer(model.parameters(), lr=0.1, momentum=0.9), train
    )
    assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


class OddModule(nn.Module):
    """Every dtype, every kind of storage layout, and state that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))
        self.tied = self.weight
        self.transposed = nn.Parameter(torch.zeros(5, 3).T)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("scalar", torch.zeros(()))
        self.register_buffer("empty", torch.zeros(0, 7))
        self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3))
        self.register_buffer("rows", self.weight.detach()[1:3])
        self.register_buffer("column", self.weight.detach()[:, 2])
        self.register_buffer("forgotten", torch.zeros(3), persistent=False)
        for dtype in DTYPES:
            self.register_buffer(str(dtype).replace(".", "_"), torch.zeros(2, 3, dtype=dtype))
        self.note = None

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state

    def fill(self):
        generator = torch.Generator().manual_seed(1)
        for tensor in self.state_dict().values():
            if isinstance(tensor, torch.Tensor) and tensor.is_contiguous():
                raw = tensor.detach().reshape(-1).view(torch.uint8)
                raw.random_(0, 2 if tensor.dtype is torch.bool else 256, generator=generator)
        with torch.no_grad():
            self.transposed.normal_(generator=generator)
        self.expanded = torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3)
        self.note = {"seen": (3, [torch.arange(2)]), 5: None}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_an_unusual_module_is_loaded_exactly():
    model, _ = assert_round_trip(
        OddModule, lambda model: torch.optim.SGD(model.parameters(), lr=1), lambda model, _: model.fill()
    )
    assert model.tied is model.weight
    assert model.rows.data_ptr() == model.weight[1:].data_ptr()


class Versioned(nn.Module):
    """In version 1 its weight was stored negated; state without a version is treated as version 1."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # ty: ignore
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = -state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize(
    "make_model",
    [
        Versioned,
        lambda: nn.LSTM(2, 3, num_layers=2),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    ],
)
def test_modules_of_torch(make_model):
    assert_round_trip(make_model, lambda model: torch.optim.AdamW(model.parameters()), lambda model, optimizer: None)


def test_a_lazy_module_takes_its_shape_from_the_checkpoint(tmp_path):
    model = nn.LazyLinear(2)
    model(torch.zeros(1, 3))
    save_checkpoint(model, None, 0, tmp_path / "c")
    fresh = nn.LazyLinear(2)
    load_checkpoint(tmp_path / "c", fresh)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("iteration", [0, 1, 2**70, np.int64(5)])
def test_the_iteration(trained, tmp_path, iteration):
    run_save_checkpoint(*trained, iteration, tmp_path / "c")
    loaded = run_load_checkpoint(tmp_path / "c", *trained)
    assert (type(loaded), loaded) == (int, iteration)


@pytest.mark.parametrize("name", ["c.pt", "c.pkl", "c.json", "c", "c.npy", "c.safetensors"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_the_extension_means_nothing(trained, tmp_path, name, kind):
    run_save_checkpoint(*trained, 3, kind(tmp_path / name))
    assert os.listdir(tmp_path) == [name]
    assert run_load_checkpoint(kind(tmp_path / name), *trained) == 3


def test_model_alone(trained, tmp_path):
    model, optimizer = trained
    save_checkpoint(model, None, 5, tmp_path / "model")
    save_checkpoint(model, optimizer, 6, tmp_path / "both")
    for name, iteration in (("model", 5), ("both", 6)):
        fresh = make_net()
        assert load_checkpoint(tmp_path / name, fresh) == iteration
        assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    with pytest.raises(InvalidInputError, match="saved without an optimizer; load it with optimizer=None"):
        load_checkpoint(tmp_path / "model", model, optimizer)


# --- The file --------------------------------------------------------------------------------------------------


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


# --- Values that cannot be saved -------------------------------------------------------------------------------


class Colour(IntEnum):
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
    "Colour": lambda: Colour.RED,
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


@pytest.mark.parametrize("key", [torch.zeros(1), Colour.RED, (1, frozenset())])
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


# --- Files that cannot be loaded -------------------------------------------------------------------------------


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


class Exploit:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_without_running(trained, tmp_path):
    trap = tmp_path / "the pickle ran"
    archive = io.BytesIO()
    torch.save({"model": Exploit(trap)}, archive)
    for content in (pickle.dumps(Exploit(trap)), pickle.dumps(Exploit(trap), protocol=0), archive.getvalue()):
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


# --- Checkpoints that do not fit -------------------------------------------------------------------------------


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


# --- Extra -----------------------------------------------------------------------------------------------------


def test_extra(trained, tmp_path):
    extra = {"config": {"d_model": 64, "betas": (0.9, 0.95)}, "torch_rng": torch.get_rng_state()}
    save_checkpoint(*trained, 3, tmp_path / "with", extra=extra)
    save_checkpoint(*trained, 3, tmp_path / "without")
    assert_same(read_checkpoint(tmp_path / "with").entry("extra"), extra)
    assert read_checkpoint(tmp_path / "without").entry("extra") == {}
    assert load_checkpoint(tmp_path / "with", *trained) == 3
    with open(tmp_path / "with", "rb") as file:
        assert_same(read_checkpoint(file).entry("extra"), extra)


plain_keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda keys: st.tuples(keys, keys),
    max_leaves=3,
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda values: (
        st.lists(values, max_size=4)
        | st.lists(values, max_size=4).map(tuple)
        | st.dictionaries(plain_keys, values, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "$int", "$tensor", ""]), values).map(OrderedDict)
        | st.dictionaries(st.sampled_from(["a", "$int", "$tensor", ""]), values)
    ),
    max_leaves=12,
)


@given(plain_values)
def test_plain_values_keep_their_types(value):
    file = io.BytesIO()
    save_checkpoint(nn.Identity(), None, 0, file, extra={"value": value})
    file.seek(0)
    assert_same(read_checkpoint(file).entry("extra"), {"value": value})


# Wrappers


class Wrapper(nn.Module):
    """What torch.compile ("_orig_mod") and DistributedDataParallel ("module") do to the names of parameters."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def small_model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


WRAPPERS = {
    "compiled": lambda model: Wrapper("_orig_mod", model),
    "distributed": lambda model: Wrapper("module", model),
    "compiled and distributed": lambda model: Wrapper("module", Wrapper("_orig_mod", model)),
    "distributed and compiled": lambda model: Wrapper("_orig_mod", Wrapper("module", model)),
    "a compiled part": lambda model: nn.Sequential(Wrapper("_orig_mod", model[0]), model[1]),
    "plain": lambda model: model,
}


@pytest.mark.parametrize("saved_as", WRAPPERS)
@pytest.mark.parametrize("loaded_as", WRAPPERS)
def test_a_wrapper_does_not_matter(tmp_path, saved_as, loaded_as):
    torch.manual_seed(0)
    ours, theirs = small_model(), small_model()
    saved, loaded = WRAPPERS[saved_as](ours), WRAPPERS[loaded_as](theirs)
    run_save_checkpoint(saved, torch.optim.SGD(saved.parameters()), 5, tmp_path / "checkpoint")
    assert run_load_checkpoint(tmp_path / "checkpoint", loaded, torch.optim.SGD(loaded.parameters())) == 5
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_a_name_like_that_of_a_wrapper_is_kept(tmp_path):
    """Two names that differ in a wrapper's alone cannot be told apart without it."""
    torch.manual_seed(0)
    ours, theirs = (nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)}) for _ in range(2))
    run_save_checkpoint(ours, torch.optim.SGD(ours.parameters()), 5, tmp_path / "checkpoint")
    run_load_checkpoint(tmp_path / "checkpoint", theirs, torch.optim.SGD(theirs.parameters()))
    assert all(map(torch.equal, theirs.state_dict().values(), ours.state_dict().values()))
    with pytest.raises(InvalidInputError, match=r"it has no 'weight'"):
        run_load_checkpoint(tmp_path / "checkpoint", nn.Linear(2, 2), torch.optim.SGD(theirs.parameters()))
