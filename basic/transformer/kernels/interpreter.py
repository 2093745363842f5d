"""What all Triton kernels share: matrix multiplication that Triton's interpreter gets right, and a constant."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
"""exp(x) = exp2(LOG2_E * x); the hardware's own exponential is exp2."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""With TRITON_INTERPRET=1, kernels run as Python on the CPU; tests without a GPU use it."""
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulator=None):
    """a @ b, added to the accumulator, in float32."""
    if _UPCAST:  # the interpreter multiplies tiles in half precision wrongly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
