"""Small modules with an optimizer, and the comparison of all state; a pickle that runs code."""

import os

import torch
from torch import nn


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


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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


def trained_net():
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer
