"""AdamW in Triton: one pass over parameters, their gradients and their two moments, many parameters in one launch.

All that changes from step to step (learning rate, step count, clipping factor, whether the step counts at all) is read
from memory on the device, so that nobody waits for it and a recorded CUDA graph can be replayed.

A small model has more parameters than it has work for a GPU: a launch for each took a twelfth of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

# Numbers a block, and blocks a program: finding its tensor costs a program as much as some blocks do.
_BLOCK, _BLOCKS = 2048, 2
# Addresses are arguments of the launch, and every program looks through them.
_MOST_TENSORS = 16


@triton.jit
def _pick(choices, which):
    """choices[which] of a tuple, where `which` is known only while the program runs."""
    picked = choices[0]
    for i in tl.static_range(1, len(choices)):
        picked = tl.where(which == i, choices[i], picked)
    return picked


@triton.jit
def _step(PARAMETERS, GRADIENTS, FIRSTS, SECONDS, COPIES, SCALARS, sizes, last_programs, beta1, beta2, eps,
          weight_decay, HAVE_COPIES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    which, before = 0, 0
    for i in tl.static_range(len(sizes) - 1):
        which += (program >= last_programs[i]).to(tl.int32)
        before = tl.where(program >= last_programs[i], last_programs[i], before)
    SCALARS += 4 * which
    learning_rate, factor = tl.load(SCALARS), tl.load(SCALARS + 1)
    first_correction, second_correction = tl.load(SCALARS + 2), tl.load(SCALARS + 3)
    PARAMETER, GRADIENT = _pick(PARAMETERS, which), _pick(GRADIENTS, which)
    FIRST, SECOND, COPY = _pick(FIRSTS, which), _pick(SECONDS, which), _pick(COPIES, which)
    # A factor that is not a number, from a loss or gradient that is not finite, lets the step touch nothing.
    size = tl.where(factor == factor, _pick(sizes, which), 0)
    start = (program - before).to(tl.int64) * BLOCKS * BLOCK
    for block in range(BLOCKS):
        places = start + block * BLOCK + tl.arange(0, BLOCK)
        mask = places < size
        parameter = tl.load(PARAMETER + places, mask=mask)
        gradient = tl.load(GRADIENT + places, mask=mask).to(tl.float32) * factor
        first = tl.load(FIRST + places, mask=mask)
        second = tl.load(SECOND + places, mask=mask)
        parameter *= 1 - learning_rate * weight_decay
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        denominator = tl.sqrt(second / second_correction) + eps
        parameter -= learning_rate / first_correction * first / denominator
        tl.store(PARAMETER + places, parameter, mask=mask)
        tl.store(FIRST + places, first, mask=mask)
        tl.store(SECOND + places, second, mask=mask)
        if HAVE_COPIES:
            tl.store(COPY + places, parameter.to(COPY.dtype.element_ty), mask=mask)


def step_parameters(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor],
    copies: Sequence[Tensor], scalars: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change parameters and their moments in place.

    Args:
        parameters, firsts, seconds: contiguous float32, of the same shapes.
        gradients: the same shapes, contiguous, all of one precision.
        copies: what the parameters are copied to afterwards, contiguous, all of one precision; or none.
        scalars: float32 (parameters, 4): learning rate, factor on the gradient (NaN to leave everything as it is), and
            the corrections of the two moments, 1 - beta ** step.
    """
    for start in range(0, len(parameters), _MOST_TENSORS):
        some = slice(start, start + _MOST_TENSORS)
        sizes = [parameter.numel() for parameter in parameters[some]]
        last_programs = list(accumulate(triton.cdiv(size, _BLOCKS * _BLOCK) for size in sizes))
        _step[(last_programs[-1],)](
            tuple(parameters[some]), tuple(gradients[some]), tuple(firsts[some]), tuple(seconds[some]),
            tuple((copies or parameters)[some]), scalars[some], tuple(sizes), tuple(last_programs), beta1, beta2, eps,
            weight_decay, HAVE_COPIES=len(copies) > 0, BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=8)  # fmt: skip
