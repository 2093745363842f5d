"""Muon against a plain reference that computes every matrix by itself, from its singular values, in float64."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from basic.model import AdamW
from basic.transformer.muon import Muon, orthogonalize, polynomials
from tests.helpers.model_tools import set_gradients

SHAPES = [(6, 6), (6, 6), (9, 4), (4, 9), (1, 5), (9, 4)]
SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9, "normalization_beta": 0.8}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def matrices(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


class PlainMuon:
    """One matrix, step by step as in the papers; the singular value decomposition replaces matrix polynomials."""

    def __init__(self, weight: Tensor, **settings: Any):
        self.weight = weight.detach().clone()
        self.settings: dict[str, Any] = (
            {"normalization": "rows", "cautious": True, "update_scale": "shape"} | SETTINGS | settings
        )
        self.momentum, self.second = torch.zeros_like(self.weight), 0.0

    def step(self, gradient: Tensor) -> None:
        settings, (rows, columns) = self.settings, self.weight.shape
        mu = settings["momentum"]
        self.momentum = mu * self.momentum + (1 - mu) * gradient
        direction = (1 - mu) * gradient + mu * self.momentum
        u, s, v = torch.linalg.svd(direction / direction.norm() / 1.01, full_matrices=False)
        for a, b, c in polynomials(settings.get("orthogonalization", "polar_express"), settings.get("iterations", 5)):
            s = a * s + b * s**3 + c * s**5
        update = u @ torch.diag(s) @ v
        if settings["normalization"] != "none":
            axis = 0 if settings["normalization"] == "long_side" and columns > rows else 1
            beta, norm = settings["normalization_beta"], update.norm()
            self.second = beta * self.second + (1 - beta) * update.square().mean(axis, keepdim=True)
            update = update / self.second.sqrt()
            update *= norm / update.norm()
        scale = math.sqrt(max(1, rows / columns))
        if settings["update_scale"] == "rms":
            scale = 0.2 * math.sqrt(max(rows, columns))
        decay = self.weight.clone()
        if settings["cautious"]:
            decay[update * self.weight < 0] = 0
        self.weight -= settings["lr"] * (scale * update + settings["weight_decay"] * decay)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "none", "cautious": False},
        {"normalization": "long_side", "update_scale": "rms"},
        {"orthogonalization": "newton_schulz", "iterations": 3, "momentum": 0.0},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str)
def test_muon_is_the_plain_one(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    ours = matrices(dtype)
    plain = [PlainMuon(parameter.double(), **changes) for parameter in ours]
    optimizer = Muon([{"params": ours, "rule": "muon"}], **{**SETTINGS, **changes})
    for _ in range(6):
        set_gradients(ours)
        optimizer.step()
        for parameter, each in zip(ours, plain, strict=True):
            assert parameter.grad is not None
            each.step(parameter.grad.double())
            assert_close(parameter.double(), each.weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(40, 40), (64, 16), (16, 64)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values from a thousandth of the norm on become about 1; the vectors stay those of the matrix."""
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-2.3, 0, min(shape), dtype=torch.float64)
    matrix = (u * values / values.norm()) @ v
    result = u.mT @ orthogonalize(matrix, polynomials("polar_express", 6)) @ v.mT
    assert_close(result.diagonal(), torch.ones_like(values), rtol=0, atol=0.03)
    assert (result - torch.diag(result.diagonal())).abs().max() < 1e-10
    assert orthogonalize(torch.zeros(3, 5), polynomials("polar_express", 5)).abs().max() == 0


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (30, 45)])
def test_small_singular_values_follow_the_polynomials(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-2.9, 0, min(shape), dtype=torch.float64)
    expected = values / values.norm() / 1.01
    for a, b, c in polynomials("polar_express", 5):
        expected = a * expected + b * expected**3 + c * expected**5
    result = orthogonalize(((u * values) @ v).float(), polynomials("polar_express", 5)).double()
    assert_close(u.mT @ result @ v.mT, torch.diag(expected), rtol=0, atol=1e-3)


def test_polynomials_are_the_best_ones() -> None:
    """Four alternating errors of the same size at the ends and extrema; the published Newton-Schulz for comparison."""
    (a, b, c) = polynomials("polar_express", 1)[0]
    x = torch.linspace(0.024, 1, 100_001, dtype=torch.float64)
    errors = (a * x + b * x**3 + c * x**5) * 2 / (a + b + c + a * 0.024 + b * 0.024**3 + c * 0.024**5) - 1
    extrema = [errors[0], errors[:40_000].max(), errors[20_000:].min(), errors[-1]]
    assert_close(torch.stack(extrema).abs(), errors[0].abs().expand(4), rtol=1e-6, atol=0)
    assert polynomials("newton_schulz", 2) == ((3.4445, -4.7750, 2.0315),) * 2
    values = torch.logspace(-3, 0, 1000, dtype=torch.float64)
    deviation = {}
    for name in ("polar_express", "newton_schulz"):
        y = values
        for a, b, c in polynomials(name, 5):
            y = a * y + b * y**3 + c * y**5
        deviation[name] = (y - 1).abs().max()
    assert deviation["polar_express"] < 0.2 < 0.3 < deviation["newton_schulz"]


def test_other_groups_follow_adamw() -> None:
    ours, peers = matrices(), matrices()
    with torch.no_grad():
        for peer, our in zip(peers, ours, strict=True):
            peer.copy_(our)
    own = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0}
    groups = [{"params": []}, {"params": ours[:2], "rule": "muon"}, {"params": ours[2:], "rule": "adamw", **own}]
    optimizer = Muon(groups, **SETTINGS)
    adamw, muon = AdamW(peers[2:], **own), Muon(peers[:2], **SETTINGS)  # matrices alone need no rule
    for _ in range(4):
        set_gradients(ours, peers)
        for each in (optimizer, adamw, muon):
            each.step()
    assert_close(ours, peers, rtol=0, atol=0)


def test_numbers_on_the_device_and_copies() -> None:
    """As a training step gives them: rate and momentum as tensors, gradients of half-precision copies, a factor."""
    ours, peers = matrices(torch.float32), matrices(torch.float32)
    with torch.no_grad():
        for peer, our in zip(peers, ours, strict=True):
            peer.copy_(our)
    copies: dict[Tensor, Tensor] = {weight: Parameter(weight.detach().bfloat16()) for weight in ours[:3]}
    optimizer = Muon([{"params": ours, "rule": "muon"}], **SETTINGS)
    plain = Muon([{"params": peers, "rule": "muon"}], **SETTINGS)
    for step in range(3):
        optimizer.param_groups[0] |= {"lr": torch.tensor(0.1 / (step + 1)), "momentum": torch.tensor(0.8)}
        plain.param_groups[0] |= {"lr": 0.1 / (step + 1), "momentum": 0.8}
        for our, peer in zip(ours, peers, strict=True):
            holder = copies.get(our, our)
            holder.grad = torch.randn_like(holder)
            peer.grad = holder.grad.float() * 0.3
        optimizer.step(gradient_factor=torch.tensor(0.3), copies=copies)
        plain.step()
        assert_close(ours, peers, rtol=1e-5, atol=1e-6)
        for weight, low in copies.items():
            assert torch.equal(low, weight.bfloat16())


def test_a_factor_that_is_not_finite_changes_nothing() -> None:
    ours = matrices(torch.float32)
    optimizer = Muon([{"params": ours[:5]}, {"params": ours[5:], "rule": "adamw"}], **SETTINGS)
    for bad in (False, True):  # at first no state, then some
        before = copy.deepcopy((ours, optimizer.state_dict()["state"])) if bad else ([w.clone() for w in ours], None)
        set_gradients(ours)
        for parameter in ours:
            assert parameter.grad is not None
            parameter.grad[0, 0] = math.inf
        optimizer.step(gradient_factor=torch.tensor(math.nan))
        for now, old in zip(ours, before[0], strict=True):
            assert torch.equal(now, old)
        if bad:
            assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
        set_gradients(ours)
        optimizer.step()


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_that_share_the_work_do_what_one_does(size: int) -> None:
    """Ranks as threads that meet at a barrier; there are fewer matrices of some shapes than ranks."""
    one = matrices()
    ranks = [[Parameter(weight.detach().clone()) for weight in one] for _ in range(size)]
    barrier, sent, orthogonalized = threading.Barrier(size), [torch.empty(0)] * size, [0] * size

    def step(rank: int) -> None:
        def all_gather(own: Tensor) -> Tensor:
            sent[rank] = own
            orthogonalized[rank] += len(own)
            barrier.wait(10)
            joined = torch.cat(sent)
            barrier.wait(10)
            return joined

        optimizer = Muon([{"params": ranks[rank], "rule": "muon"}], **SETTINGS)
        optimizer.share_work(rank, size, all_gather)
        optimizer.step()

    set_gradients(one, *ranks)
    Muon([{"params": one, "rule": "muon"}], **SETTINGS).step()
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(step, range(size)))
    for weights in ranks:
        assert_close(weights, one, rtol=1e-9, atol=1e-9)
    assert max(orthogonalized) == 4  # of six matrices in four shapes: two squares, two tall ones, one wide, one row


@pytest.mark.parametrize(("rows", "size"), [(5, 4), (6, 2), (3, 4), (1, 2)])
def test_shards_of_rows_are_joined(rows: int, size: int) -> None:
    whole = torch.arange(2.0 * rows * 3).reshape(2, rows, 3)
    shards = list(whole.chunk(size, 1))
    shards += [whole[:, :0]] * (size - len(shards))
    optimizers = [Muon([Parameter(torch.ones(2, 2))]) for _ in shards]
    padded: list[torch.Tensor] = []
    for rank, (optimizer, shard) in enumerate(zip(optimizers, shards, strict=True)):
        optimizer.share_work(rank, size, lambda own: padded.append(own) or own.repeat(size, 1, 1))
        optimizer._join_rows(shard, rows)
        assert torch.equal(whole[:, optimizer._own_rows(rows)], shard)
    optimizers[0].share_work(0, size, lambda own: torch.cat(padded))
    assert torch.equal(optimizers[0]._join_rows(shards[0], rows), whole)


def test_a_loaded_state_continues_exactly() -> None:
    ours = matrices(torch.float32)
    optimizer = Muon([{"params": ours, "rule": "muon"}], **SETTINGS)
    for _ in range(3):
        set_gradients(ours)
        optimizer.step()
    again = [Parameter(parameter.detach().clone()) for parameter in ours]
    resumed = Muon([{"params": again, "rule": "muon"}])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        set_gradients(ours, again)
        optimizer.step()
        resumed.step()
    assert_close(again, ours, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0"),
        ({"rule": "sgd"}, "rule must be one of adamw, muon, got 'sgd'"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"normalization": "columns"}, "normalization must be one of none, rows, long_side"),
        ({"params": [Parameter(torch.ones(3))]}, r"orthogonalizes matrices, got a parameter of shape \(3,\)"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    optimizer = Muon([{"params": matrices(), "rule": "muon"}])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": matrices(), "rule": "muon", **changes})
    assert len(optimizer.param_groups) == 1
