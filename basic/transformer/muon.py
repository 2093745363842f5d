"""Muon: the momentum of each matrix is orthogonalized before it is subtracted; other parameters follow AdamW.

The update of a matrix is the nearest matrix whose singular values are all 1. A gradient has a few large singular values
and many small ones, so a plain step moves the weights in few directions; an orthogonal one moves them equally in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from basic.transformer.functional import at_least_float32
from basic.transformer.kernels import dispatch
from basic.transformer.optimizer import AdamW, Update, local_shard

_MAX_STACKED = 1 << 26
"""Numbers of matrices of one shape that are updated together: more would need more memory and not be faster."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's polynomial: its slope at 0 is steep, and it takes singular values to about 0.7 .. 1.2, not to 1."""
_SMALLEST_SINGULAR_VALUE = 1e-3
"""Smallest singular value, relative to the Frobenius norm, that Polar Express is made for."""
_CUSHION, _SAFETY = 0.024, 1.01
"""Limits of Polar Express in bfloat16: how uneven a polynomial may be, and how far rounding may leave the interval."""

CHOICES = {
    "rule": ("adamw", "muon"),
    "orthogonalization": ("polar_express", "newton_schulz"),
    "normalization": ("none", "rows", "long_side"),
    "update_scale": ("shape", "rms"),
}


class Muon(AdamW):
    """Muon for matrices, and AdamW for the groups of parameters with `rule="adamw"`.

    A step of a matrix, with the gradient g and the momentum m:

        m = momentum * m + (1 - momentum) * g
        o = orthogonalize((1 - momentum) * g + momentum * m)                   # Nesterov's momentum
        o = o / root of the running mean of each row's mean square, with the norm of o       # normalization
        w = w - lr * scale * o - lr * weight_decay * w where o * w >= 0        # cautious decay

    Args:
        params: matrices, or groups of parameters as dictionaries with their own settings, `rule` among them.
        lr, betas, eps, weight_decay: as for AdamW; Muon has no betas.
        rule: of the groups that do not say it: "muon", for matrices, or "adamw".
        momentum: Muon: decay rate of the running mean of the gradient, in [0, 1).
        orthogonalization: Muon: the polynomials that take the singular values to 1.
        iterations: Muon: number of these polynomials, >= 1.
        normalization: Muon: "rows" divides each row of the update by the root of a running mean of its mean square;
            "long_side" does so with the columns of a matrix that has more columns than rows; "none" does not.
        normalization_beta: Muon: decay rate of that running mean, in [0, 1).
        cautious: Muon: only weights that the update moves towards 0 decay.
        update_scale: Muon: factor of the update. "shape" is sqrt(max(1, rows / columns)); "rms" is
            0.2 sqrt(max(rows, columns)), for learning rates like AdamW's.

    Raises:
        ValueError: a setting is out of its range, or a parameter with the rule "muon" is not a matrix.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Li et al. 2025, "NorMuon"
    (normalization); Chen et al. 2025, "Cautious Weight Decay"; Liu et al. 2025, "Muon is Scalable for LLM Training"
    (the scale "rms").
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rule: str = "muon",
        momentum: float = 0.95,
        orthogonalization: str = "polar_express",
        iterations: int = 5,
        normalization: str = "rows",
        normalization_beta: float = 0.95,
        cautious: bool = True,
        update_scale: str = "shape",
    ):
        defaults: dict[str, Any] = {"rule": rule, "momentum": momentum, "orthogonalization": orthogonalization}
        defaults |= {"iterations": iterations, "normalization": normalization, "cautious": cautious}
        defaults |= {"normalization_beta": normalization_beta, "update_scale": update_scale}
        self._own_defaults = defaults
        self._ranks: tuple[int, int, Callable[[Tensor], Tensor]] = 0, 1, lambda own: own
        super().__init__(params, lr, betas, eps, weight_decay)

    def share_work(self, rank: int, size: int, all_gather: Callable[[Tensor], Tensor]) -> None:
        """Let each of several ranks orthogonalize its share of the matrices and send the result to the others.

        The ranks have the same parameters and gradients, or shards of their rows (FSDP2); then they send those first.

        Args:
            rank, size: of this process, and of all.
            all_gather: joins the tensors of all ranks, of equal shapes, along their first dimension, by rank.
        """
        self._ranks = rank, size, all_gather

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the constructor calls this for each of its groups."""
        settings: dict[str, Any] = {**self._own_defaults, **param_group}
        for name, choices in CHOICES.items():
            if settings[name] not in choices:
                raise ValueError(f"Muon's {name} must be one of {', '.join(choices)}, got {settings[name]!r}")
        for name in ("momentum", "normalization_beta"):
            if not 0 <= settings[name] < 1:
                raise ValueError(f"Muon's {name} must be a number in [0, 1), got {settings[name]}")
        if not settings["iterations"] >= 1:
            raise ValueError(f"Muon's iterations must be at least 1, got {settings['iterations']}")
        super().add_param_group(settings)
        if settings["rule"] == "muon":
            for parameter in self.param_groups[-1]["params"]:
                if parameter.ndim != 2:
                    self.param_groups.pop()
                    raise ValueError(
                        f"Muon orthogonalizes matrices, got a parameter of shape {tuple(parameter.shape)}; put it into "
                        'a group with rule="adamw"'
                    )

    def _update_group(self, updates: list[Update], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        if group["rule"] == "adamw":
            super()._update_group(updates, group, gradient_factor)
            return
        for stack in _stacks(updates):
            for update in stack:
                self._initialize_matrix(update, group)
            self._update_matrices(stack, group, gradient_factor)

    def _initialize_matrix(self, update: Update, group: dict[str, Any]) -> None:
        state = self.state[update.parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(update.parameter)
        if group["normalization"] != "none" and "mean_squares" not in state:
            # Of the whole matrix on every rank, also if the matrix is sharded.
            size = update.parameter.shape[_normalized_axis(update, group)]
            state["mean_squares"] = local_shard(update.parameter).new_zeros(size)

    def _update_matrices(self, updates: list[Update], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        """Update matrices of one shape; nothing waits for the device, so that a CUDA graph can be captured."""
        weights = [local_shard(update.parameter.detach()) for update in updates]
        gradients = [update.gradient for update in updates]
        copies = [update.copy.detach() for update in updates if update.copy is not None]  # of all, or of none
        states = [self.state[update.parameter] for update in updates]
        (rows, columns), dtype = updates[0].parameter.shape, weights[0].dtype
        is_sharded = local_shard(updates[0].parameter) is not updates[0].parameter
        factor = weights[0].new_ones(()) if gradient_factor is None else gradient_factor.to(dtype)
        # 1, or 0 after a gradient that is not finite: then every number below is such that nothing changes.
        active = factor.isfinite().to(dtype)
        keep = 1 - active * (1 - group["momentum"])
        weight = factor.nan_to_num(0, 0, 0) * (1 - keep)
        kernels: Any = _PLAIN
        if all(update.uses_kernel for update in updates) and weights[0].numel():
            from basic.transformer.kernels import muon as kernels  # imported late: it needs Triton

        momenta = [local_shard(state["momentum"]) for state in states]
        low = torch.bfloat16 if weights[0].is_cuda or weights[0].is_meta else dtype
        directions = kernels.step_momenta(gradients, momenta, weight, keep, low)
        if is_sharded:
            directions = self._join_rows(directions, rows)
        updated = self._orthogonalize(directions, polynomials(group["orthogonalization"], group["iterations"]))
        axis, scales = _normalized_axis(updates[0], group), None
        if group["normalization"] != "none":
            scales = _normalize(updated, axis, states, active * (1 - group["normalization_beta"]))
        scale = max(1, rows / columns) ** 0.5 if group["update_scale"] == "shape" else 0.2 * max(rows, columns) ** 0.5
        if is_sharded:
            own = self._own_rows(rows)
            updated = updated[:, own].contiguous()
            scales = scales[:, own].contiguous() if scales is not None and axis == 0 else scales
        rate = group["lr"] * active
        rates = rate * scale, rate * group["weight_decay"]
        kernels.step_weights(weights, copies, updated, scales, axis, *rates, cautious=group["cautious"])

    def _orthogonalize(self, directions: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        rank, size, all_gather = self._ranks
        if size == 1:
            return orthogonalize(directions, coefficients)
        # Every rank has the same number, the last ones with matrices of zeros.
        count = -(-len(directions) // size)
        own = directions.new_zeros(count, *directions.shape[1:])
        share = directions[rank * count : (rank + 1) * count]
        own[: len(share)] = share
        return all_gather(orthogonalize(own, coefficients).contiguous())[: len(directions)]

    def _own_rows(self, rows: int) -> slice:
        """Those of a sharded matrix that this rank has; FSDP2 gives the last ranks fewer, or none."""
        rank, size, _ = self._ranks
        count = -(-rows // size)
        return slice(min(rank * count, rows), min((rank + 1) * count, rows))

    def _join_rows(self, shards: Tensor, rows: int) -> Tensor:
        """Matrices (n, rows, columns) from each rank's rows of all of them."""
        _, size, all_gather = self._ranks
        padded = shards.new_zeros(len(shards), -(-rows // size), shards.shape[2])
        padded[:, : shards.shape[1]] = shards
        return rearrange(all_gather(padded), "(rank n) row column -> n (rank row) column", rank=size)[:, :rows]


def step_momenta(
    gradients: list[Tensor], momenta: list[Tensor], weight: Tensor, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """Update momenta in place, and return Nesterov's directions, stacked.

    Args:
        gradients, momenta: of the same shape.
        weight: of the gradients, a scalar on their device; 0 also for those that are not finite.
        keep: factor of the momenta, a scalar.
        dtype: of the result.
    """
    stacked = torch.stack(gradients).to(momenta[0].dtype)
    stacked = torch.where(weight != 0, stacked * weight, 0)
    torch._foreach_mul_(momenta, keep)
    torch._foreach_add_(momenta, stacked.unbind())
    return stacked.addcmul_(torch.stack(momenta), keep).to(dtype)


def step_weights(
    weights: list[Tensor], copies: list[Tensor], updates: Tensor, scales: Tensor | None, axis: int,
    update_rate: Tensor, decay_rate: Tensor, *, cautious: bool,
) -> None:  # fmt: skip
    """Subtract updates and decay from weights in place.

    Args:
        weights: of one shape.
        copies: of the weights in another dtype, written too; or empty.
        updates: (matrix, rows, columns).
        scales: (matrix, rows), or (matrix, columns) if the axis is 1: factors of the updates; None for none.
        update_rate, decay_rate: scalars on the device, factors of the updates and of the weights that decay.
        cautious: only weights that the update moves towards 0 decay.
    """
    factors = update_rate if scales is None else scales.unsqueeze(2 - axis) * update_rate
    stacked, steps = torch.stack(weights), updates.to(weights[0].dtype) * factors
    # Not `where`, which takes four times as long on a CPU where the mask is random.
    decayed = stacked * (steps * stacked >= 0) if cautious else stacked
    torch._foreach_sub_(weights, steps.addcmul_(decayed, decay_rate).unbind())
    if copies:
        torch._foreach_copy_(copies, weights)


_PLAIN = SimpleNamespace(step_momenta=step_momenta, step_weights=step_weights)
"""What `basic.transformer.kernels.muon` replaces on a GPU."""


def _normalize(updates: Tensor, axis: int, states: Sequence[dict[str, Tensor]], weight: Tensor) -> Tensor:
    """The factors that divide the rows (axis 0) or columns (1) of updates by their running root mean squares.

    They keep the norm of each matrix. The running means get the weight of the new ones.
    """
    means = torch.stack([state["mean_squares"] for state in states])
    squares = torch.linalg.vector_norm(updates, dim=2 - axis, dtype=means.dtype).square() / updates.shape[2 - axis]
    means = means.lerp(squares, weight)
    torch._foreach_copy_([state["mean_squares"] for state in states], means.unbind())
    scales = 1 / (means.sqrt() + 1e-8)
    new_squares = (squares * scales.square()).sum(1, keepdim=True)
    return scales * (squares.sum(1, keepdim=True) / (new_squares + 1e-30)).sqrt()


def _stacks(updates: list[Update]) -> Iterator[list[Update]]:
    """Updates of matrices of the same kind, as many as are updated together."""

    def kind(update: Update) -> tuple:
        parameter, gradient = update.parameter, update.gradient
        return parameter.shape, parameter.dtype, parameter.device, gradient.dtype, update.copy is None

    for same in dict.fromkeys(map(kind, updates)):
        stack = [update for update in updates if kind(update) == same]
        size = max(1, _MAX_STACKED // stack[0].parameter.numel())
        yield from (stack[start : start + size] for start in range(0, len(stack), size))


def _normalized_axis(update: Update, group: dict[str, Any]) -> int:
    rows, columns = update.parameter.shape
    return 1 if group["normalization"] == "long_side" and columns > rows else 0


def orthogonalize(
    matrices: Float[Tensor, " ... rows columns"], coefficients: Sequence[tuple[float, float, float]]
) -> Float[Tensor, " ... rows columns"]:
    """Apply odd polynomials to the singular values of matrices, one after the other; the vectors stay the same.

    The polynomial a x + b x^3 + c x^5 of a matrix X is a X + (b A + c A^2) X with A = X X^T, so it needs only matrix
    multiplications.

    Args:
        matrices: each is divided by its Frobenius norm first; one of zeros stays so.
        coefficients: (a, b, c) of each polynomial, as from `polynomials`.

    Returns:
        bfloat16 on a GPU, where the multiplications are fastest in it and the error does not matter; else the dtype of
        the matrices.

    Source: Jordan et al. 2024 (Newton-Schulz); Amsel et al. 2025, "The Polar Express", algorithm 1.
    """
    x = matrices.bfloat16() if matrices.is_cuda or matrices.is_meta else matrices
    x = x.reshape(-1, *x.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    products = factors = spare = None  # memory that each iteration uses again
    for iteration, polynomial in enumerate(coefficients):
        # X X^T or, if it is smaller, X^T X, which gives the same polynomial.
        products, scales = dispatch.symmetric_product(x.mT if is_tall else x, out=products), None
        if iteration == 0:
            # X is divided by its Frobenius norm, the root of the trace: the first polynomial does it.
            traces = at_least_float32(products.diagonal(dim1=-2, dim2=-1)).sum(-1)
            scales = 1 / (traces.sqrt() * _SAFETY + 1e-18)  # its square is finite in float32
        factors = dispatch.symmetric_product(products, polynomial, scales, out=factors)
        new = torch.bmm(*((x, factors) if is_tall else (factors, x)), out=spare)
        x, spare = new, x if iteration else None  # the first x is the caller's
    return x.reshape(matrices.shape)


@cache
def polynomials(name: str, iterations: int) -> tuple[tuple[float, float, float], ...]:
    """The coefficients (a, b, c) of the polynomials a x + b x^3 + c x^5 that take singular values in (0, 1] to 1.

    Args:
        name: "newton_schulz" for one polynomial in every iteration; "polar_express" for polynomials each of which is
            the best one for the interval that the earlier ones leave.
    """
    if name == "newton_schulz":
        return (_NEWTON_SCHULZ,) * iterations
    found, low, high = [], _SMALLEST_SINGULAR_VALUE, 1.0
    for iteration in range(iterations):
        a, b, c = _best_polynomial(max(low, _CUSHION * high), high)
        # With the cushion, the values at the ends of the interval are not equally far from 1: center them.
        low, high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        center = 2 / (low + high)
        a, b, c, low = a * center, b * center, c * center, low * center
        high = 2 - low
        # Rounding takes some values above the interval, where the polynomial grows fast; the last one may not shrink.
        safety = _SAFETY if iteration < iterations - 1 else 1.0
        found.append((a / safety, b / safety**3, c / safety**5))
    return tuple(found)


def _best_polynomial(low: float, high: float) -> tuple[float, float, float]:
    """The odd polynomial of degree 5 that is closest to 1 on an interval, by the Remez algorithm.

    Its error is largest, with alternating signs, at the ends of the interval and at two extrema between them.
    """
    if low > 0.99999 * high:  # too narrow to find extrema: the limit
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [low + (high - low) / 4, low + 3 * (high - low) / 4]
    for _ in range(30):  # converges quadratically; from any interval above, 10 are enough
        points = np.array([low, *inner, high])
        equations = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
        a, b, c, _ = np.linalg.solve(equations, np.ones(4)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return a, b, c
