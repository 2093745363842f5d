"""Compile the kernels with Numba, and give them processor instructions that NumPy has no name for.

The kernels read eight bytes at a time, count trailing zeros, and prefetch memory. Each of these is one processor
instruction; the functions here generate it. The processor must be little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

U64 = np.uint64
_config: Any = numba.config


def _sources_hash() -> str:
    """Identifies the kernels. Numba checks only the file of a function, not those of the functions that it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """The folder in which compiled kernels are kept for later processes, or None if no folder is writable.

    The candidates are the user's choice for Numba, the folder of this file, and the user's folder for caches. (Numba's
    own search fails if none of them is writable, and takes an empty XDG_CACHE_HOME for the current folder.)
    """
    candidates = [_config.CACHE_DIR, Path(__file__).with_name("__pycache__"), os.environ.get("XDG_CACHE_HOME")]
    with contextlib.suppress(RuntimeError):  # no home folder
        candidates.append(Path.home() / ".cache")
    return first_writable_folder(candidates)


def first_writable_folder(candidates: Iterable[str | Path | None]) -> Path | None:
    """A subfolder for these kernels in the first candidate that is an absolute path and writable, else None."""
    for candidate in candidates:
        if not candidate or not Path(candidate).is_absolute():
            continue
        path = Path(candidate) / "basic_kernels" / _sources_hash()
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
    print("basic: no folder for compiled kernels is writable (set NUMBA_CACHE_DIR): they are not kept", file=sys.stderr)
    return None


@contextlib.contextmanager
def _numba_cache(folder: Path) -> Generator[None]:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function over arrays and numbers at its first call, or load it from the cache.

    It runs without the interpreter's lock, so threads run in parallel. Divisions are not checked.
    """
    return compile_function(function, cache_folder(), **options)


def compile_function(function: Callable[..., Any], folder: Path | None, **options: Any) -> Callable[..., Any]:
    """`kernel` with an explicit cache folder; None for no cache."""
    # `_nrt` (undocumented) switches off reference counting of arrays. Kernels create no arrays, and the counting was
    # twelve calls in a function that merges a pre-token, a third of the training time.
    options |= {"nogil": True, "error_model": "numpy", "_nrt": False}
    if folder is None:
        return njit(**options)(function)
    with _numba_cache(folder):
        return njit(cache=True, **options)(function)


def inlined_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for a small function with many arrays: it is inlined, because passing an array copies seven numbers.

    To apply merges to a new pre-token took 0.88 microseconds without inlining, and takes 0.57 with it.
    """
    return kernel(function, forceinline=True)


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a code generator callable from kernels, which call it with values instead of types."""
    return intrinsic(function)


def readonly(array: np.ndarray) -> np.ndarray:
    """A read-only view.

    Numba sees it as another type than a writable array. Input bytes are always read-only, so that each kernel is
    compiled once.
    """
    view = array.view()
    view.flags.writeable = False
    return view


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@_instruction
def load8(typing_context, array, index):
    """Load array[index : index + 8] of a uint8 array as one uint64, without a bounds check."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.uint64), generate


@_instruction
def store8(typing_context, array, index, value):
    """Store the eight bytes of a uint64 in an integer array, from element `index` on, without a bounds check."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@_instruction
def prefetch(typing_context, array, index):
    """Prefetch the cache line of an element, so that a later access does not wait for memory."""

    def generate(context, builder, signature, arguments):
        byte_pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte_pointer], ir.FunctionType(ir.VoidType(), [byte_pointer, number, number, number])
        )
        address = builder.bitcast(_address(context, builder, signature.args[0], *arguments), byte_pointer)
        read, keep, data = ir.Constant(number, 0), ir.Constant(number, 3), ir.Constant(number, 1)
        builder.call(function, [address, read, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@_instruction
def trailing_zeros(typing_context, value):
    """The number of zero bits below the lowest one bit of a uint64; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_instruction
def count_ones(typing_context, value):
    """The number of one bits of a uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@_instruction
def at_least_64(typing_context, array, index, bound):
    """A bit for each element of array[index : index + 64] (uint16): whether it is at least `bound` (uint16)."""

    def generate(context, builder, signature, arguments):
        vector, number = ir.VectorType(ir.IntType(16), 64), ir.IntType(32)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, arguments[2], ir.Constant(number, 0))
        lanes = ir.Constant(ir.VectorType(number, 64), [0] * 64)
        bounds = builder.shuffle_vector(first, undefined, lanes)
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=2)
        return builder.bitcast(builder.icmp_unsigned(">=", numbers, bounds), ir.IntType(64))

    return types.uint64(array, types.uint64, types.uint16), generate


@_instruction
def smallest16(typing_context, array, index):
    """The minimum of array[index : index + 16] of an int32 array."""

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(32), ir.VectorType(ir.IntType(32), 16)
        address = _address(context, builder, signature.args[0], *arguments)
        reduce = builder.module.declare_intrinsic(
            "llvm.vector.reduce.smin.v16i32", fnty=ir.FunctionType(number, [vector])
        )
        return builder.call(reduce, [builder.load(builder.bitcast(address, vector.as_pointer()), align=4)])

    return types.int32(array, types.uint64), generate


@_instruction
def low_bits_where(typing_context, array, index, high_bits, shift):
    """The low `shift` bits of the number in array[index : index + 8] (uint64) whose other bits equal `high_bits`.

    Returns 0 if there is no such number; there must not be two.
    """

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), 8)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=8)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)

        def broadcast(value):
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)

        shifts = broadcast(arguments[3])
        equal = builder.icmp_unsigned("==", builder.lshr(numbers, shifts), broadcast(arguments[2]))
        low = builder.xor(numbers, builder.shl(builder.lshr(numbers, shifts), shifts))
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.or.v8i64", fnty=ir.FunctionType(number, [vector]))
        return builder.call(reduce, [builder.select(equal, low, ir.Constant(vector, [0] * 8))])

    return types.uint64(array, types.uint64, types.uint64, types.uint64), generate
