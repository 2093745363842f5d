"""AdamW, gradient clipping and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from basic.transformer.kernels import dispatch


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a sharded tensor in this process, which shares its memory; any other tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class Update(NamedTuple):
    """A parameter to update, its local gradient, and its copy in another dtype, if it has one."""

    parameter: Tensor
    gradient: Tensor
    copy: Tensor | None

    @property
    def uses_kernel(self) -> bool:
        return dispatch.supports_adamw(local_shard(self.parameter), self.gradient)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Args:
        params: parameters, or groups of them as dictionaries with their own settings.
        lr: learning rate, >= 0.
        betas: decay rates of the running means of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment after its bias correction, as in PyTorch; >= 0.
        weight_decay: each weight is multiplied by 1 - lr * weight_decay before the step; >= 0.

    Raises:
        ValueError: a setting is out of its range.

    Source: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", algorithm 2; Kingma and Ba
    2014, algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the constructor calls this for each of its groups."""
        settings = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not isinstance(settings[name], float | int | Tensor) or not settings[name] >= 0:
                raise ValueError(f"AdamW's {name} must be a number >= 0, got {settings[name]!r}")
        betas = settings["betas"]
        are_two = isinstance(betas, tuple | list) and len(betas) == 2
        if not are_two or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW's betas must be two numbers in [0, 1), got {betas}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradient_factor: Tensor | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        On a GPU, a kernel updates the float32 parameters without waiting for the device; the learning rate and the
        weight decay of a group may then be tensors on the device.

        Args:
            closure: called first, with gradients enabled; computes the gradients and returns the loss.
            gradient_factor: a scalar on the parameters' device by which every gradient is multiplied (see
                `clipping_factor`); NaN: no parameter changes.
            copies: of some parameters in another dtype, which the model computes with. Their gradients are used, and
                they are updated together with their parameters.

        Returns:
            The result of the closure, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        copies = copies or {}
        for group in self.param_groups:
            updates = [
                Update(parameter, local_shard(gradient), copies.get(parameter))
                for parameter in group["params"]
                if (gradient := copies.get(parameter, parameter).grad) is not None
            ]
            self._update_group(updates, group, gradient_factor)
        return loss

    def _update_group(self, updates: list[Update], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        for update in updates:
            self._initialize(update)
        if all(update.uses_kernel for update in updates):
            # A kernel launch needs gradients of one dtype, so parameters with copies have their own.
            for has_copy in (True, False):
                selected = [update for update in updates if (update.copy is not None) == has_copy]
                if selected:
                    self._update_with_kernel(selected, group, gradient_factor)
        elif gradient_factor is None or gradient_factor.isfinite():
            self._update_plainly(updates, group, gradient_factor)

    def _initialize(self, update: Update) -> None:
        parameter = update.parameter
        if not self.state[parameter]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device) if update.uses_kernel else 0,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _update_with_kernel(self, updates: list[Update], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        from basic.transformer.kernels.adamw import step_parameters  # imported late: it needs Triton

        device = updates[0].parameter.device
        states = [self.state[update.parameter] for update in updates]
        for state in states:  # an int if it was saved on a CPU
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)
        factor = torch.ones((), device=device) if gradient_factor is None else gradient_factor
        torch._foreach_add_([state["step"] for state in states], [factor.isfinite().float()] * len(states))
        steps = torch.stack([state["step"] for state in states]).double()
        beta1, beta2 = group["betas"]
        scalars = torch.empty((len(states), 5), device=device)
        scalars[:, 0] = group["lr"]
        scalars[:, 1] = factor
        scalars[:, 2] = 1 - beta1**steps
        scalars[:, 3] = 1 - beta2**steps
        scalars[:, 4] = group["lr"] * group["weight_decay"]
        step_parameters(
            [local_shard(update.parameter) for update in updates],
            [update.gradient for update in updates],
            [local_shard(state["exp_avg"]) for state in states],
            [local_shard(state["exp_avg_sq"]) for state in states],
            [update.copy for update in updates if update.copy is not None],
            scalars, beta1, beta2, group["eps"])  # fmt: skip

    def _update_plainly(self, updates: list[Update], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        """The update in torch's operations, or in the kernel for a CPU."""
        beta1, beta2 = map(float, group["betas"])
        learning_rate, factor = float(group["lr"]), 1.0 if gradient_factor is None else float(gradient_factor)
        tensors, rates, root_factors = [], [], []
        for update in updates:
            state, parameter = self.state[update.parameter], local_shard(update.parameter).detach()
            state["step"] += 1
            moments = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"])
            tensors.append((parameter, update.gradient.to(parameter.dtype), *moments))
            # Bias correction: both moments start at zero, so their early values are too small by these factors.
            rates.append(learning_rate / (1 - beta1 ** int(state["step"])))
            root_factors.append((1 - beta2 ** int(state["step"])) ** -0.5)
        keep = 1 - learning_rate * float(group["weight_decay"])
        dispatch.step_adamw(tensors, rates, root_factors, factor, keep, beta1, beta2, float(group["eps"]))
        for update, (parameter, *_) in zip(updates, tensors, strict=True):
            if update.copy is not None:
                update.copy.detach().copy_(parameter)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor] | Tensor, max_l2_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients in place so that their joint L2 norm is at most `max_l2_norm`.

    Args:
        parameters: those without a gradient are skipped; a one-shot iterator works, and a single parameter.
        max_l2_norm: >= 0; infinity for no clipping.

    Returns:
        The norm before clipping, on the gradients' device, so that the CPU does not wait for it.

    Raises:
        TypeError: a parameter is not a tensor.
        ValueError: `max_l2_norm` is negative or NaN.

    Source: assignment, "Gradient clipping"; Pascanu et al. 2013, algorithm 1.
    """
    if not isinstance(max_l2_norm, float | int) or not max_l2_norm >= 0:
        raise ValueError(f"max_l2_norm must be a number >= 0, got {max_l2_norm!r}")
    # A tensor can be iterated over too, but its rows have no gradient.
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters must be tensors, got {parameter!r:.40}; of a dictionary pass its values()")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm, factor = clipping_factor([gradients], max_l2_norm)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm


def clipping_factor(
    groups: Iterable[list[Tensor]], max_l2_norm: float, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The joint L2 norm of gradients, and the factor that reduces it to at most `max_l2_norm`.

    Args:
        groups: of gradients; a group is read before the next one is requested.
        all_reduce: adds up the squared norm over all processes, if each has a shard of the gradients.
    """
    norms = [norm for gradients in groups for norm in _norms(gradients)]
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
    norm = (squares if all_reduce is None else all_reduce(squares)).sqrt()
    # No branch on whether clipping is needed: it would wait for the device.
    return norm, (max_l2_norm / (norm + 1e-6)).clamp(max=1)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """The norm of each gradient, in at least float32, because squares overflow in float16."""
    norms = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(same, dtype=torch.promote_types(dtype, torch.float32))  # many per kernel launch
    return norms


def _check_numbers(*values: float) -> None:
    for value in values:
        if not isinstance(value, Real):
            raise TypeError(f"the arguments of a schedule must be numbers, got {type(value).__name__}: {value!r:.80}")


def cosine_schedule(
    iteration: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """The learning rate of an iteration: linear warm-up from 0, then cosine decay to the minimum, then the minimum.

    Args:
        iteration: counted from 0.
        max_learning_rate: reached at iteration `warmup_iters`.
        min_learning_rate: from iteration `cosine_cycle_iters` on.
        warmup_iters: length of the warm-up; 0 for none.
        cosine_cycle_iters: iteration at which the cosine ends, counted from 0, warm-up included.

    Raises:
        TypeError: an argument is not a number.

    Source: assignment, "Learning rate scheduling"; Loshchilov and Hutter 2016 (SGDR), eq. 5.
    """
    _check_numbers(iteration, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)
    if iteration < warmup_iters:
        return iteration / warmup_iters * max_learning_rate
    if iteration >= cosine_cycle_iters:
        return min_learning_rate
    progress = (iteration - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + (1 + math.cos(math.pi * progress)) / 2 * (max_learning_rate - min_learning_rate)


def trapezoid_schedule(
    iteration: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    decay_iters: int,
    total_iters: int,
) -> float:
    """The learning rate of an iteration: linear warm-up from 0, then constant, then linear decay to the minimum.

    Args:
        iteration: counted from 0.
        max_learning_rate: from iteration `warmup_iters` until the decay begins.
        min_learning_rate: from iteration `total_iters` on.
        warmup_iters: length of the warm-up; 0 for none.
        decay_iters: length of the decay, which ends at `total_iters`; 0 for none.
        total_iters: length of the run.

    Raises:
        TypeError: an argument is not a number.

    Source: Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", eq. 1.
    """
    _check_numbers(iteration, max_learning_rate, min_learning_rate, warmup_iters, decay_iters, total_iters)
    if iteration < warmup_iters:
        return iteration / warmup_iters * max_learning_rate
    if decay_iters == 0:
        return max_learning_rate
    remaining = min(max((total_iters - iteration) / decay_iters, 0.0), 1.0)
    return min_learning_rate + remaining * (max_learning_rate - min_learning_rate)
