"""What changes the weights: AdamW, gradient clipping and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from basic.transformer.kernels import dispatch


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: of a sharded one its part, which shares its memory; else all of it."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class _Part(NamedTuple):
    """What a step is made of: a parameter, its gradient here, and the copy that follows it."""

    parameter: Tensor
    gradient: Tensor
    copy: Tensor | None

    @property
    def kernel_covers(self) -> bool:
        parameter = local_part(self.parameter)
        return (
            dispatch.available_on(parameter.device)
            and parameter.dtype == torch.float32
            and parameter.is_contiguous()
            and self.gradient.is_contiguous()
        )


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Args:
        params: parameters, or groups of them as dictionaries with their own settings.
        lr: step size (learning rate), >= 0.
        betas: decay rates of the running means of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment after its bias correction, as PyTorch does; >= 0.
        weight_decay: the fraction lr * weight_decay of each weight is removed before the step; >= 0.

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
        """Take in more parameters; the constructor comes here too, with each of its groups."""
        settings = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not settings[name] >= 0:
                raise ValueError(f"AdamW's {name} must be a number >= 0, got {settings[name]}")
        betas = settings["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
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
        """Change every parameter that has a gradient by one step.

        On a GPU, float32 parameters are stepped by a kernel, one pass each, without waiting for the device; the
        learning rate of a group may then be a tensor there.

        Args:
            closure: if given, called first with gradients on; it shall compute the gradients and return the loss.
            gradient_factor: a number on the parameters' device that every gradient is multiplied by on the way (see
                `clipping_factor`); if it is NaN, nothing changes.
            copies: of some parameters, in another precision, with which a model has computed instead of them: it is
                their gradients that count, and they follow their parameters.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        copies = copies or {}
        for group in self.param_groups:
            parts = [
                _Part(parameter, local_part(gradient), copies.get(parameter))
                for parameter in group["params"]
                if (gradient := copies.get(parameter, parameter).grad) is not None
            ]
            for part in parts:
                self._start(part)
            if all(part.kernel_covers for part in parts):
                # Those with copies apart, because a kernel takes gradients of one precision.
                for has_copy in (True, False):
                    some = [part for part in parts if (part.copy is not None) == has_copy]
                    if some:
                        self._update_on_device(some, group, gradient_factor)
            elif gradient_factor is None or gradient_factor.isfinite():
                for part in parts:
                    self._update(part, gradient_factor, group)
        return loss

    def _start(self, part: _Part) -> None:
        parameter = part.parameter
        if not self.state[parameter]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device) if part.kernel_covers else 0,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _update_on_device(self, parts: list[_Part], group: dict[str, Any], gradient_factor: Tensor | None) -> None:
        from basic.transformer.kernels.adamw import step_parameters

        device = parts[0].parameter.device
        states = [self.state[part.parameter] for part in parts]
        for state in states:  # one that was saved on a CPU counts in Python
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)
        factor = torch.ones((), device=device) if gradient_factor is None else gradient_factor
        torch._foreach_add_([state["step"] for state in states], [factor.isfinite().float()] * len(states))
        steps = torch.stack([state["step"] for state in states]).double()
        beta1, beta2 = group["betas"]
        scalars = torch.empty((len(states), 4), device=device)
        scalars[:, 0] = group["lr"]
        scalars[:, 1] = factor
        scalars[:, 2] = 1 - beta1**steps
        scalars[:, 3] = 1 - beta2**steps
        step_parameters(
            [local_part(part.parameter) for part in parts],
            [part.gradient for part in parts],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [part.copy for part in parts if part.copy is not None],
            scalars, beta1, beta2, group["eps"], group["weight_decay"])  # fmt: skip

    def _update(self, part: _Part, gradient_factor: Tensor | None, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[part.parameter]
        state["step"] += 1
        step = int(state["step"])
        first, second = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])

        parameter = local_part(part.parameter)
        gradient = part.gradient.to(parameter.dtype)
        if gradient_factor is not None:
            gradient = gradient * gradient_factor
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Both moments start at zero, so their early values are too small by these factors.
        first_correction = 1 - beta1**step
        second_correction = 1 - beta2**step
        denominator = second.sqrt().div_(math.sqrt(second_correction)).add_(group["eps"])
        parameter.addcdiv_(first, denominator, value=-group["lr"] / first_correction)
        if part.copy is not None:
            part.copy.copy_(parameter)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Parameter], max_l2_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients in place so that their joint L2 norm is at most `max_l2_norm`.

    Args:
        parameters: those without a gradient are skipped; a one-shot iterator works.
        max_l2_norm: >= 0; infinity leaves the gradients alone.

    Returns:
        The norm before clipping, on the gradients' device, so that nothing waits for it.

    Raises:
        ValueError: `max_l2_norm` is negative or NaN.

    Source: handout, "Gradient clipping"; Pascanu et al. 2013, algorithm 1.
    """
    if not max_l2_norm >= 0:
        raise ValueError(f"max_l2_norm must be a number >= 0, got {max_l2_norm}")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm, factor = clipping_factor([gradients], max_l2_norm)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm


def clipping_factor(
    groups: Iterable[list[Tensor]], max_l2_norm: float, add_up: Callable[[Tensor], Tensor] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The joint L2 norm of gradients, and what to multiply them by so that it is at most `max_l2_norm`.

    Args:
        groups: of gradients; those of one are read before the next is asked for.
        add_up: adds the squares up over all processes, where each has a part of the gradients.
    """
    norms = [norm for gradients in groups for norm in _norms(gradients)]
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
    norm = (squares if add_up is None else add_up(squares)).sqrt()
    # Never asked whether it is needed: that would wait for the device.
    return norm, (max_l2_norm / (norm + 1e-6)).clamp(max=1)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """The norm of each, in float32 at least: squares of half-precision numbers overflow."""
    norms = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(same, dtype=torch.promote_types(dtype, torch.float32))  # many in one launch
    return norms


def cosine_schedule(
    iteration: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    cosine_cycle_iters: int,
) -> float:
    """The learning rate at an iteration: linear warm-up from 0, half a cosine down to the minimum, the minimum.

    Args:
        iteration: counted from 0.
        max_learning_rate: reached at `warmup_iters`.
        min_learning_rate: reached at `cosine_cycle_iters` and kept from there on.
        warmup_iters: length of the warm-up; 0 for none.
        cosine_cycle_iters: iteration at which the cosine ends, counted from 0 too (not from the warm-up).

    Source: handout, "Learning rate scheduling"; Loshchilov and Hutter 2016 (SGDR), eq. 5.
    """
    if iteration < warmup_iters:
        return iteration / warmup_iters * max_learning_rate
    if iteration >= cosine_cycle_iters:
        return min_learning_rate
    progress = (iteration - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + (1 + math.cos(math.pi * progress)) / 2 * (max_learning_rate - min_learning_rate)
