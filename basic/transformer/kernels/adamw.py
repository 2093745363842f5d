"""AdamW in Triton: one pass over parameters, gradients and both moments, for many parameters in one launch.

Everything that changes from step to step (learning rate, step count, clipping factor) is read from device memory, so
that the CPU waits for nothing and a recorded CUDA graph can be replayed. With one launch per parameter, the launches
took 1/12 of a small model's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

# Numbers per block, and blocks per program: finding its tensor costs a program as much as some blocks do.
_BLOCK, _BLOCKS = 2048, 2
# Per launch: addresses are arguments of the kernel, and every program searches them.
_MAX_TENSORS = 16
# Of the numbers of programs: Triton compiles a kernel again where an integer is 1, or not divisible by 16.
_UNIT = tl.constexpr(16)


@triton.jit
def select(choices, which):
    """choices[which] of a tuple, where `which` is known only at run time."""
    selected = choices[0]
    for i in tl.static_range(1, len(choices)):
        selected = tl.where(which == i, choices[i], selected)
    return selected


@triton.jit
def _step(PARAMETERS, GRADIENTS, FIRSTS, SECONDS, COPIES, SCALARS, sizes, ends, beta1, beta2, eps,
          HAVE_COPIES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    which, previous_end = 0, 0
    for i in tl.static_range(len(sizes) - 1):
        which += (program * _UNIT >= ends[i]).to(tl.int32)
        previous_end = tl.where(program * _UNIT >= ends[i], ends[i], previous_end)
    SCALARS += 5 * which
    learning_rate, factor = tl.load(SCALARS), tl.load(SCALARS + 1)
    first_correction, second_correction = tl.load(SCALARS + 2), tl.load(SCALARS + 3)
    decay = tl.load(SCALARS + 4)
    PARAMETER, GRADIENT = select(PARAMETERS, which), select(GRADIENTS, which)
    FIRST, SECOND, COPY = select(FIRSTS, which), select(SECONDS, which), select(COPIES, which)
    # A NaN factor comes from a loss or gradient that is not finite: change nothing.
    size = tl.where(factor == factor, select(sizes, which), 0)
    start = (program - previous_end // _UNIT).to(tl.int64) * BLOCKS * BLOCK
    for block in range(BLOCKS):
        offsets = start + block * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        parameter = tl.load(PARAMETER + offsets, mask=mask)
        gradient = tl.load(GRADIENT + offsets, mask=mask).to(tl.float32) * factor
        first = tl.load(FIRST + offsets, mask=mask)
        second = tl.load(SECOND + offsets, mask=mask)
        parameter *= 1 - decay
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        denominator = tl.sqrt(second / second_correction) + eps
        parameter -= learning_rate / first_correction * first / denominator
        tl.store(PARAMETER + offsets, parameter, mask=mask)
        tl.store(FIRST + offsets, first, mask=mask)
        tl.store(SECOND + offsets, second, mask=mask)
        if HAVE_COPIES:
            tl.store(COPY + offsets, parameter.to(COPY.dtype.element_ty), mask=mask)


def step_parameters(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor],
    copies: Sequence[Tensor], scalars: Tensor, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Update parameters and their moments in place.

    Args:
        parameters, firsts, seconds: contiguous float32 tensors of the same shapes; the moments of the gradients.
        gradients: of the same shapes, contiguous, all of one dtype.
        copies: of the parameters in another dtype, updated too; contiguous, all of one dtype; or empty.
        scalars: float32 (parameters, 5): learning rate, factor of the gradient (NaN to change nothing), the bias
            corrections of the two moments, 1 - beta ** step, and learning rate times weight decay.
    """
    columns = parameters, gradients, firsts, seconds, copies or parameters
    for start in range(0, len(parameters), _MAX_TENSORS):
        chunk = slice(start, start + _MAX_TENSORS)
        sizes = [parameter.numel() for parameter in parameters[chunk]]
        # Empty tensors at the end: the kernel is compiled for a number of tensors.
        missing = _MAX_TENSORS - len(sizes)
        sizes += [0] * missing
        addresses = [(*tensors[chunk], *[tensors[-1]] * missing) for tensors in columns]
        ends = list(accumulate(triton.cdiv(size, _BLOCKS * _BLOCK) * _UNIT.value for size in sizes))
        _step[(ends[-1] // _UNIT.value,)](
            *addresses, scalars[chunk], tuple(sizes), tuple(ends), beta1, beta2, eps,
            HAVE_COPIES=len(copies) > 0, BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=8)  # fmt: skip
