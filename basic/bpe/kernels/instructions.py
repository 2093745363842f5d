"""Processor instructions that NumPy has no name for, and Python's C interface, for the kernels.

The kernels read eight bytes at a time, count trailing zeros, and prefetch memory. Each of these is one processor
instruction; the functions here generate it. The processor must be little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from basic.common.native.instructions import array_at, broadcast, c_function, instruction, ir, prefetch_line, types

U64 = np.uint64


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


@instruction
def load8(typing_context, array, index):
    """Load array[index : index + 8] of a uint8 array as one uint64, without a bounds check."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.uint64), generate


@instruction
def store8(typing_context, array, index, value):
    """Store the eight bytes of a uint64 in an integer array, from element `index` on, without a bounds check."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@instruction
def load_address(typing_context, address):
    """Load the 64-bit number at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


@instruction
def address_of(typing_context, array):
    """The address of an array's first element."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), generate


@instruction
def bytes_at(typing_context, address, length):
    """The bytes at an address as a read-only array."""
    return array_at(types.Array(types.uint8, 1, "C", readonly=True))


@instruction
def writable_bytes_at(typing_context, address, length):
    """The bytes at an address as an array."""
    return array_at(types.Array(types.uint8, 1, "C"))


@instruction
def int32s_at(typing_context, address, length):
    """The int32 numbers at an address as an array."""
    return array_at(types.Array(types.int32, 1, "C"))


@instruction
def prefetch(typing_context, array, index):
    """Prefetch the cache line of an element, so that a later access does not wait for memory."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        prefetch_line(builder, builder.bitcast(address, ir.IntType(8).as_pointer()), 3)
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@instruction
def trailing_zeros(typing_context, value):
    """The number of zero bits below the lowest one bit of a uint64; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@instruction
def count_ones(typing_context, value):
    """The number of one bits of a uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@instruction
def at_least_64(typing_context, array, index, bound):
    """A bit for each element of array[index : index + 64] (uint16): whether it is at least `bound` (uint16)."""

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(16), 64)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        bounds = broadcast(builder, arguments[2], 64)
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=2)
        return builder.bitcast(builder.icmp_unsigned(">=", numbers, bounds), ir.IntType(64))

    return types.uint64(array, types.uint64, types.uint16), generate


@instruction
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


@instruction
def low_bits_where(typing_context, array, index, high_bits, shift):
    """The low `shift` bits of the number in array[index : index + 8] (uint64) whose other bits equal `high_bits`.

    Returns 0 if there is no such number; there must not be two.
    """

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), 8)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        numbers = builder.load(builder.bitcast(address, vector.as_pointer()), align=8)
        shifts = broadcast(builder, arguments[3], 8)
        equal = builder.icmp_unsigned("==", builder.lshr(numbers, shifts), broadcast(builder, arguments[2], 8))
        low = builder.xor(numbers, builder.shl(builder.lshr(numbers, shifts), shifts))
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.or.v8i64", fnty=ir.FunctionType(number, [vector]))
        return builder.call(reduce, [builder.select(equal, low, ir.Constant(vector, [0] * 8))])

    return types.uint64(array, types.uint64, types.uint64, types.uint64), generate


# Python's C interface. An object is its address; 0 means that an exception was raised. All are in the stable ABI.
list_size, list_item = c_function("PyList_Size", 1), c_function("PyList_GetItem", 2)
new_list, set_list_item = c_function("PyList_New", 1), c_function("PyList_SetItem", 3)
as_integer, new_integer = c_function("PyLong_AsLongLong", 1), c_function("PyLong_FromLongLong", 1)
new_bytes, bytes_address = c_function("PyBytes_FromStringAndSize", 2), c_function("PyBytes_AsString", 1)
string_length, string_as_utf8 = c_function("PyUnicode_GetLength", 1), c_function("PyUnicode_AsUTF8AndSize", 2)
allocate, free = c_function("PyMem_Malloc", 1), c_function("PyMem_Free", 1)
clear_error, release = c_function("PyErr_Clear", 0), c_function("Py_DecRef", 1)
TYPE_OFFSET = object.__basicsize__ - 8  # where an object has the address of its type
