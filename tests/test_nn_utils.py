"""Softmax, cross-entropy and gradient clipping against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter
from torch.testing import assert_close

from basic.transformer import functional
from basic.transformer.functional import cross_entropy, token_losses
from basic.transformer.optimizer import clip_gradients

from .adapters import run_cross_entropy, run_gradient_clipping, run_softmax

# Every result is compared with float64 on the same inputs; in bfloat16 only the result is rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
scales = pytest.mark.parametrize("scale", [1.0, 1000.0, 1e30])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- softmax


@every_dtype
@scales
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 0), ((3, 5), 0), ((2, 3, 5), 1), ((2, 3, 5), -1), ((), 0), ((3, 0), 1), ((0, 5), 1)],
    ids=str,
)
def test_softmax_is_torchs(dtype: torch.dtype, scale: float, shape: tuple[int, ...], dim: int) -> None:
    x = (scale * torch.randn(shape)).to(dtype)
    actual = run_softmax(x, dim)
    assert actual.dtype == dtype
    assert_close(actual.double(), F.softmax(x.double(), dim), rtol=TOLERANCE[dtype], atol=1e-12)


def test_softmax_sums_many_small_numbers_exactly() -> None:
    probabilities = run_softmax(torch.zeros(4096, dtype=torch.bfloat16), 0)
    assert_close(probabilities, torch.full((4096,), 1 / 4096, dtype=torch.bfloat16), rtol=0, atol=0)


def test_softmax_of_minus_infinity_is_zero() -> None:
    x = torch.tensor([0.0, -math.inf, math.log(3)])
    assert_close(run_softmax(x, 0), torch.tensor([0.25, 0.0, 0.75]))


def test_softmax_has_the_gradient_of_finite_differences() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run_softmax(x, 0), x)
    equal = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)  # the maximum is not unique
    assert torch.autograd.gradcheck(lambda x: run_softmax(x, 1), equal)


# ---- cross-entropy


@every_dtype
@scales
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_cross_entropy_is_torchs(dtype: torch.dtype, scale: float, leading: tuple[int, ...]) -> None:
    logits = (scale * torch.randn(*leading, 7)).to(dtype)
    targets = torch.randint(7, leading)
    actual = run_cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.double().reshape(-1, 7), targets.reshape(-1))
    assert actual.dtype == dtype
    assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_cross_entropy_has_torchs_gradient(scale: float) -> None:
    logits, targets = scale * torch.randn(4, 7), torch.randint(7, (4,))
    logits[0] = 0  # the maximum is not unique
    gradients = []
    for loss in (run_cross_entropy, F.cross_entropy):
        leaf = logits.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(leaf, targets), leaf)
    assert_close(*gradients)


def test_cross_entropy_of_a_certain_and_of_an_impossible_target() -> None:
    logits = torch.tensor([[0.0, -1000.0, -math.inf]])
    assert run_cross_entropy(logits, torch.tensor([0])) == 0
    assert run_cross_entropy(logits, torch.tensor([1])) == 1000
    assert run_cross_entropy(logits, torch.tensor([2])) == math.inf


@every_dtype
def test_token_losses_are_torchs(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 3, 7).to(dtype), torch.randint(7, (2, 3))
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)  # bfloat16 would round to eighths
    assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad_target", [-101, -1, 7])
def test_targets_outside_the_vocabulary_are_refused(bad_target: int) -> None:
    with pytest.raises(IndexError, match=rf"target {bad_target} at position 1 is outside 0 \.\. 6 \(vocab_size=7\)"):
        run_cross_entropy(torch.randn(2, 7), torch.tensor([0, bad_target]))


@pytest.mark.parametrize("bad_target", [-101, -1, 7])
def test_without_a_check_a_bad_target_gives_nan(monkeypatch: pytest.MonkeyPatch, bad_target: int) -> None:
    """As on a GPU, where a check would wait for the device."""
    monkeypatch.setattr(functional, "check_range", lambda *arguments, **options: False)
    assert run_cross_entropy(torch.randn(2, 7), torch.tensor([0, bad_target])).isnan()


@every_dtype
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_targets_are_torchs(dtype: torch.dtype, ignore_index: int) -> None:
    logits, targets = torch.randn(2, 5, 7).to(dtype), torch.randint(7, (2, 5))
    targets[0, 1:4] = ignore_index
    results = []
    for loss, leaf in ((cross_entropy, logits), (F.cross_entropy, logits.double())):
        leaf = leaf.detach().requires_grad_()
        value = loss(leaf.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
        results.append((value.double(), *torch.autograd.grad(value, leaf)))
    assert_close(results[0][0], results[1][0], rtol=TOLERANCE[dtype], atol=0)
    assert_close(results[0][1].double(), results[1][1], rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype] / 100)


def test_the_mean_is_exactly_the_mean_if_no_target_is_ignored() -> None:
    for rows in range(1, 100):  # the product of 49 and its rounded reciprocal is not 1
        logits, targets = torch.randn(rows, 3), torch.randint(3, (rows,))
        assert cross_entropy(logits, targets) == token_losses(logits, targets).mean()


def test_the_mean_over_no_target_is_nan_as_torchs() -> None:
    logits, targets = torch.randn(2, 7), torch.full((2,), -100)
    assert run_cross_entropy(logits, targets).isnan()
    assert F.cross_entropy(logits, targets).isnan()


def test_losses_of_tokens_ignore_nothing() -> None:
    with pytest.raises(IndexError, match=r"target -100 at position 0 is outside 0 \.\. 6 \(vocab_size=7\)$"):
        token_losses(torch.randn(2, 7), torch.tensor([-100, 1]))


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), (2, 4), (2, 3, 1)])
def test_each_row_of_logits_needs_its_target(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one target for each row .* shape \(2, 3, 7\)"):
        run_cross_entropy(torch.randn(2, 3, 7), torch.zeros(shape, dtype=torch.int64))


# ---- gradient clipping


def parameters_with_gradients(*dtypes: torch.dtype | None, scale: float = 1.0) -> list[Parameter]:
    """Parameters of different shapes, for None without a gradient."""
    parameters = []
    for index, dtype in enumerate(dtypes):
        parameter = Parameter(torch.randn(index + 2, 3).to(dtype or torch.float32))
        if dtype is not None:
            parameter.grad = (scale * torch.randn(index + 2, 3)).to(dtype)
        parameters.append(parameter)
    return parameters


def joint_norm(parameters: list[Parameter]) -> float:
    return math.hypot(*(p.grad.double().norm().item() for p in parameters if p.grad is not None))


MIXES = [
    [torch.float32, torch.float32],
    [torch.float64],
    [torch.bfloat16, torch.bfloat16],
    [None, torch.float32, None, torch.float64, torch.bfloat16],
]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("max_l2_norm", [0.0, 1e-3, 1.0, 1e6, math.inf])
def test_clipping_multiplies_by_the_contracts_factor(dtypes: list[torch.dtype | None], max_l2_norm: float) -> None:
    parameters = parameters_with_gradients(*dtypes)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    norm = joint_norm(parameters)
    run_gradient_clipping(iter(parameters), max_l2_norm)
    factor = min(1.0, max_l2_norm / (norm + 1e-6))
    for parameter, old in zip(parameters, before, strict=True):
        assert (parameter.grad is None) == (old is None)
        if parameter.grad is not None and old is not None:
            assert parameter.grad.dtype == old.dtype
            assert_close(parameter.grad, (old.double() * factor).to(old.dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
def test_clipping_is_torchs(scale: float) -> None:
    ours = parameters_with_gradients(torch.float32, None, torch.float32, scale=scale)
    theirs = [Parameter(p.detach().clone()) for p in ours]
    for mine, their in zip(ours, theirs, strict=True):
        their.grad = None if mine.grad is None else mine.grad.clone()
    norm = clip_gradients(ours, 0.5)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5))
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (their.grad is None)
        if mine.grad is not None:
            assert_close(mine.grad, their.grad)


def test_clipping_changes_the_gradient_in_place() -> None:
    [parameter] = parameters_with_gradients(torch.float32)
    gradient = parameter.grad
    run_gradient_clipping([parameter], 0.01)
    assert parameter.grad is gradient
    assert joint_norm([parameter]) == pytest.approx(0.01, rel=1e-4)


def test_clipping_does_not_overflow_in_float16() -> None:
    parameter = Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 1000.0, dtype=torch.float16)
    assert clip_gradients([parameter], 1.0) == 2000
    assert_close(parameter.grad, torch.full((4,), 0.5, dtype=torch.float16))


def test_clipping_one_parameter() -> None:
    """A tensor can be iterated over, but its rows have no gradient."""
    [parameter] = parameters_with_gradients(torch.float32, scale=100)
    before = joint_norm([parameter])
    assert clip_gradients(parameter, 0.5).item() == pytest.approx(before)
    assert joint_norm([parameter]) == pytest.approx(0.5)


def test_clipping_no_gradients_is_no_error() -> None:
    assert clip_gradients([], 1.0) == 0
    assert clip_gradients(parameters_with_gradients(None), 1.0) == 0


@pytest.mark.parametrize("max_l2_norm", [-1.0, math.nan])
def test_clipping_refuses_an_invalid_norm(max_l2_norm: float) -> None:
    [parameter] = parameters_with_gradients(torch.float32)
    with pytest.raises(ValueError, match=f"max_l2_norm must be a number >= 0, got {max_l2_norm}"):
        run_gradient_clipping([parameter], max_l2_norm)
