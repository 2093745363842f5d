"""What the kernels need from the machine that NumPy has no name for, and the decorator that compiles them.

The kernels look at eight bytes at a time, count trailing zeros, and ask for memory ahead of its use. Each of these is
one processor instruction; Numba reaches them through the functions here. Machines are taken to be little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Generator
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


def _version() -> str:
    """Other kernels, another folder: Numba looks only at the file of a function, not at those that it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """A folder in which the compiled kernels can stay for the next process, or None.

    The user's choice for Numba, else beside this file, else the user's folder for caches. Numba's own search raises
    where it finds none, and takes an empty XDG_CACHE_HOME for the current folder.
    """
    folders = [_config.CACHE_DIR, Path(__file__).with_name("__pycache__"), os.environ.get("XDG_CACHE_HOME")]
    with contextlib.suppress(RuntimeError):  # no home
        folders.append(Path.home() / ".cache")
    for folder in folders:
        if not folder or not Path(folder).is_absolute():
            continue
        path = Path(folder) / "basic_kernels" / _version()
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
    print("basic: no folder for compiled kernels is writable (set NUMBA_CACHE_DIR): they are not kept", file=sys.stderr)
    return None


@contextlib.contextmanager
def _numba_uses(folder: Path) -> Generator[None]:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function over arrays and numbers when it is first called, or load it from the cache.

    It runs without the interpreter's lock, so that threads run side by side; divisions are not checked.
    """
    folder = cache_folder()
    # Without Numba's counting of references to arrays (which its documentation does not tell how to do): kernels make
    # none, and it was twelve calls in a function that merges a word, a third of the time of training.
    options |= {"nogil": True, "error_model": "numpy", "_nrt": False}
    if folder is None:
        return njit(**options)(function)
    with _numba_uses(folder):
        return njit(cache=True, **options)(function)


def inlined_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a small function with many arrays, each of which is seven numbers to be handed over.

    Where new words are merged, that took as long as the work: 0.88 microseconds a word, 0.57 without.
    """
    return kernel(function, forceinline=True)


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """What generates the code of an instruction; kernels call it with values instead of types."""
    return intrinsic(function)


def readonly(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written. To Numba it is another type, so bytes to be read are always given like this:
    otherwise each kernel would be compiled twice."""
    view = array.view()
    view.flags.writeable = False
    return view


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@_instruction
def load8(typing_context, array, index):
    """The eight bytes of a uint8 array from `index` on, as one uint64; nothing checks that they are there."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.uint64), generate


@_instruction
def store8(typing_context, array, index, value):
    """Write the eight bytes of a uint64 to an array of integers from element `index` on, unchecked."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@_instruction
def prefetch(typing_context, array, index):
    """Ask for the cache line of an element, which a later access then need not wait for."""

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
    """How many bits below the lowest one of a uint64 are zero; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_instruction
def count_ones(typing_context, value):
    """How many bits of a uint64 are one."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@_instruction
def smallest16(typing_context, array, index):
    """The smallest of sixteen numbers of an int32 array, those from `index` on."""

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
    """Of eight numbers of a uint64 array, those from `index` on, the low `shift` bits of the one with these high bits.

    Returns 0 where there is none; there must not be two.
    """

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), 8)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=8)
        places = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)

        def everywhere(value):
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), places)

        shifts = everywhere(arguments[3])
        equal = builder.icmp_unsigned("==", builder.lshr(numbers, shifts), everywhere(arguments[2]))
        low = builder.xor(numbers, builder.shl(builder.lshr(numbers, shifts), shifts))
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.or.v8i64", fnty=ir.FunctionType(number, [vector]))
        return builder.call(reduce, [builder.select(equal, low, ir.Constant(vector, [0] * 8))])

    return types.uint64(array, types.uint64, types.uint64, types.uint64), generate
