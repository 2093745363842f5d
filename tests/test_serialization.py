"""Checkpoints: any module and optimizer are loaded exactly as they were saved, or not changed at all."""

import io
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from basic.common.errors import InvalidInputError
from basic.training.checkpoints.file import load_checkpoint, read_checkpoint, save_checkpoint
from tests.adapters import get_adamw_cls, run_load_checkpoint, run_save_checkpoint
from tests.helpers.checkpoint_tools import OddModule, assert_same, make_net, train, trained_net


@pytest.fixture
def trained():
    return trained_net()


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


# --- Extra ----------------------------------------------------------------------------------------------------


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
