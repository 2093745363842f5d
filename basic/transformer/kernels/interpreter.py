"""What all Triton kernels share: operations that Triton's interpreter gets right, and a constant."""

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


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32, within 1e-6 of it, with the GPU's approximate instructions."""
    if _UPCAST:
        return tl.sigmoid(x)
    # Triton's own takes three times as many: for numbers that are too small to be normal, and a division.
    code: tl.constexpr = (
        "{.reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, t;}"
    )
    return tl.inline_asm_elementwise(code, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def to_float8(x, dtype: tl.constexpr):
    """float32 rounded to 8 bits; what is larger than the dtype's largest number becomes that number."""
    if _UPCAST:  # the interpreter only cuts off, in its own way: round here
        IS_E5: tl.constexpr = dtype == tl.float8e5
        MANTISSA: tl.constexpr = 2 if IS_E5 else 3
        SMALLEST: tl.constexpr = 2.0**-16 if IS_E5 else 2.0**-9
        LARGEST: tl.constexpr = 57344.0 if IS_E5 else 448.0
        NAN: tl.constexpr = 0x7FE00000 if IS_E5 else 0x7FF00000
        is_number, is_normal = x == x, tl.abs(x) >= SMALLEST * 2**MANTISSA
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << (22 - MANTISSA)) - 1 + ((bits >> (23 - MANTISSA)) & 1)
        normal = (bits >> (23 - MANTISSA) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
        subnormal = (x + 3 * 2.0**22 * SMALLEST) - 3 * 2.0**22 * SMALLEST
        x = tl.where(is_normal, normal, subnormal)
        x = tl.where(is_number, x, tl.full(x.shape, NAN, tl.int32).to(tl.float32, bitcast=True))
        return x.to(dtype)
    # Four at a time, into a register of their own. Triton's conversion gives two, in half a register; where they are
    # stored in two layouts, ptxas 12.8 reads that half before it is written.
    KIND: tl.constexpr = "e5m2" if dtype == tl.float8e5 else "e4m3"
    CONVERT: tl.constexpr = "cvt.rn.satfinite." + KIND + "x2.f32"
    code: tl.constexpr = "{.reg .b16 a, b; " + CONVERT + " a, $2, $1; " + CONVERT + " b, $4, $3; mov.b32 $0, {a, b};}"
    return tl.inline_asm_elementwise(code, "=r,f,f,f,f", [x], tl.int8, True, 4).to(dtype, bitcast=True)


@triton.jit
def to_be_transposed(y, dtype: tl.constexpr):
    """A tile of 8 bits as it is, by way of 16 bits, for which the GPU has an instruction that transposes.

    The compiler puts the change of layout between these and float32; bytes it would store one by one.
    """
    if _UPCAST:
        return y
    CONVERT: tl.constexpr = "cvt.rn.f16x2." + ("e5m2" if dtype == tl.float8e5 else "e4m3") + "x2"
    code: tl.constexpr = "{.reg .b16 a, b; mov.b32 {a, b}, $2; " + CONVERT + " $0, a; " + CONVERT + " $1, b;}"
    y = tl.inline_asm_elementwise(code, "=r,=r,r", [y.to(tl.int8, bitcast=True)], tl.float16, True, 4)
    return to_float8(y.to(tl.float32), dtype)
