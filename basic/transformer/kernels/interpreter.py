"""What all Triton kernels share: matrix products that Triton's interpreter gets right too."""

from __future__ import annotations

import triton
import triton.language as tl

# With TRITON_INTERPRET=1 kernels run as Python on the CPU. That is how they are tested without a GPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulator=None):
    """a @ b in float32; the interpreter's products of half-precision tiles are wrong unless widened first."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
