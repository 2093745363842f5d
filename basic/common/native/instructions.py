"""Processor instructions and C functions for kernels: what they generate, and what several packages use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from basic.common.native.object_files import processor


class _ModuleOfCompiler:
    """A module that the compiler imports, which is done when one of its names is used: only compiling needs Numba."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        from basic.common.native import compiler

        return getattr(getattr(compiler, self._name), name)


ir: Any = _ModuleOfCompiler("ir")
types: Any = _ModuleOfCompiler("types")
arrayobj: Any = _ModuleOfCompiler("arrayobj")
cgutils: Any = _ModuleOfCompiler("cgutils")


class Instruction:
    """Makes a code generator callable from kernels, which call it with values instead of types."""

    def __init__(self, generator: Callable[..., Any]) -> None:
        self._generator, self.__doc__ = generator, generator.__doc__

    @cached_property
    def _numba_type_(self) -> Any:
        from basic.common.native.compiler import instruction_type

        return instruction_type(self._generator)


instruction: Any = Instruction
"""`Instruction` as a decorator: type checkers take its result for the function that kernels see."""


class CFunction:
    """A function of Python's C interface, of integers and addresses; kernels call it with the interpreter's lock."""

    def __init__(self, name: str, num_arguments: int) -> None:
        self._name, self._num_arguments = name, num_arguments

    @cached_property
    def _numba_type_(self) -> Any:
        from basic.common.native.compiler import c_function_type

        return c_function_type(self._name, self._num_arguments)


c_function: Any = CFunction


def array_at(array_type: Any) -> Any:
    """The type and the code of an array whose elements are at an address."""

    def generate(context, builder, signature, arguments):
        element = context.get_data_type(array_type.dtype)
        size = ir.Constant(ir.IntType(64), context.get_abi_sizeof(element))
        array = context.make_array(array_type)(context, builder)
        data = builder.inttoptr(arguments[0], element.as_pointer())
        arrayobj.populate_array(array, data=data, shape=[arguments[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return array_type(types.int64, types.int64), generate


@instruction
def float32s_at(typing_context, address, length):
    """The float32 numbers at an address as an array."""
    return array_at(types.Array(types.float32, 1, "C"))


@instruction
def take_items(typing_context, counter, amount):
    """Add an amount to counter[0] and return its value before, so that of several threads each gets other items."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, arguments[1], "monotonic")

    return types.int64(counter, types.int64), generate


@instruction
def larger(typing_context, first, second):
    """The maximum of two float32 numbers, either of them if one is NaN: so a loop over it becomes vector code."""

    def generate(context, builder, signature, arguments):
        number = ir.FloatType()
        function_type = ir.FunctionType(number, [number, number])
        maximum = builder.module.declare_intrinsic("llvm.maxnum.f32", fnty=function_type)
        return builder.call(maximum, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


def broadcast(builder: Any, value: Any, lanes: int) -> Any:
    """Generate a vector all of whose numbers are a value."""
    undefined, number = ir.VectorType(value.type, lanes)(ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, value, number(0))
    return builder.shuffle_vector(first, undefined, ir.VectorType(number, lanes)(None))


TILE_ROWS, TILE_COLUMNS = (8, 32) if "avx512f" in processor() else (4, 16)
"""Of what `add_product` computes: as many sums as the registers of the processor hold."""


@instruction
def add_product(typing_context, a, b, c, inner, keeps):
    """Write A B for the first TILE_ROWS rows of a and TILE_COLUMNS columns of b, or add it to c if `keeps` is not 0.

    The sums stay in registers: a step adds the product of a column of a and a row of b. The numbers of a row of b and
    of c are neighbors in memory; a may be transposed. A matrix multiplication calls this for each tile of its result.

    Args:
        a, b, c: float32 arrays of two dimensions, of which the tiles are read and written whole.
        inner: number of columns of a and of rows of b.

    Source: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 6.
    """

    def generate(context, builder, signature, arguments):
        a, b, c = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in range(3))
        number, index = ir.FloatType(), ir.IntType(64)
        vector = ir.VectorType(number, TILE_COLUMNS)

        def address(array, row, column, kind):
            row_bytes, column_bytes = cgutils.unpack_tuple(builder, array.strides)
            offset = builder.add(builder.mul(row_bytes, row), builder.mul(column_bytes, column))
            return builder.bitcast(cgutils.pointer_add(builder, array.data, offset), kind.as_pointer())

        results = [address(c, index(row), index(0), vector) for row in range(TILE_ROWS)]
        keeps = cgutils.is_not_null(builder, arguments[4])
        sums = [
            cgutils.alloca_once_value(builder, builder.select(keeps, builder.load(result, align=4), vector(None)))
            for result in results
        ]
        with cgutils.for_range(builder, arguments[3]) as loop:
            line = builder.load(address(b, loop.index, index(0), vector), align=4)
            for row, total in enumerate(sums):
                factor = broadcast(builder, builder.load(address(a, index(row), loop.index, number)), TILE_COLUMNS)
                product = builder.fmul(factor, line, flags=("contract",))
                builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)
        for result, total in zip(results, sums, strict=True):
            builder.store(builder.load(total), result, align=4)
        return context.get_dummy_value()

    return types.none(a, b, c, inner, keeps), generate


def prefetch_line(builder: Any, address: Any, locality: int) -> None:
    """Generate the request of the cache line at an address, a pointer to bytes, for reading; it never fails.

    Args:
        locality: how near to the core it is wanted: 3 in the first-level cache, 2 in the second.
    """
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], function_type)
    builder.call(prefetch, [address, number(0), number(locality), number(1)])  # to read it, and as data


_LANES = 16  # of a vector; LLVM splits it where the processor's are shorter
# How far ahead of the weights that are multiplied others are requested. Without, a core reads 8 to 11 GB/s instead of
# 15; from 4 to 32 KB all are equal.
_BYTES_AHEAD = 4096


@instruction
def dot_products(typing_context, rows, weights):
    """For each of some rows, a tuple of arrays of float32, the sum of its products with the weights, as a tuple.

    The weights, which are expected in memory and not in a cache, are float32, or uint16: the upper halves of float32
    numbers whose lower halves are 0 (bfloat16). The sums are those of the same numbers as float32, to the last bit.
    """
    count, halves = len(rows), weights.dtype == types.uint16

    def generate(context, builder, signature, arguments):
        def several(number, lanes):
            return ir.VectorType(number, lanes) if lanes > 1 else number

        def load(data, index, lanes, number, num_bytes):
            address = builder.bitcast(builder.gep(data, [index]), several(number, lanes).as_pointer())
            return builder.load(address, align=num_bytes)

        def load_weights(index, lanes):
            if not halves:
                return load(data, index, lanes, real, 4)
            wide = builder.zext(load(data, index, lanes, ir.IntType(16), 2), several(i32, lanes))
            shift = ir.Constant(several(i32, lanes), [16] * lanes if lanes > 1 else 16)
            return builder.bitcast(builder.shl(wide, shift), several(real, lanes))

        def declare(name, result, *arguments):
            return builder.module.declare_intrinsic(f"llvm.{name}", fnty=ir.FunctionType(result, arguments))

        def add_products(index, lanes, sums):
            weight, number = load_weights(index, lanes), several(real, lanes)
            multiply_add = declare(f"fmuladd.{f'v{lanes}' * (lanes > 1)}f32", number, number, number, number)
            for x, total in zip(xs, sums, strict=True):
                factors = weight, load(x, index, lanes, real, 4)
                builder.store(builder.call(multiply_add, [*factors, builder.load(total)]), total)

        real, i32, i64, byte = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        add_lanes = declare(f"vector.reduce.fadd.v{_LANES}f32", real, real, several(real, _LANES))
        array = context.make_array(weights)(context, builder, arguments[1])
        data, length = array.data, builder.extract_value(array.shape, 0)
        row_values = [builder.extract_value(arguments[0], number) for number in range(count)]
        xs = [context.make_array(rows.dtype)(context, builder, value).data for value in row_values]
        # Two vectors of sums for each row: a core adds to one while it still adds to the other.
        zero, step = ir.Constant(several(real, _LANES), [0.0] * _LANES), 2 * _LANES
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in xs] for _ in range(2)]
        end = builder.and_(length, i64(-step))
        with cgutils.for_range_slice(builder, i64(0), end, i64(step)) as (index, _):
            here = builder.bitcast(builder.gep(data, [index]), byte)
            for ahead in range(_BYTES_AHEAD, _BYTES_AHEAD + step * (2 if halves else 4), 64):
                prefetch_line(builder, builder.gep(here, [i64(ahead)]), 2)
            for half, totals in enumerate(sums):
                add_products(builder.add(index, i64(half * _LANES)), _LANES, totals)
        results = []
        for first, second in zip(*sums, strict=True):
            lanes = builder.fadd(builder.load(first), builder.load(second))
            total = builder.call(add_lanes, [ir.Constant(real, 0.0), lanes], fastmath=("reassoc",))
            results.append(cgutils.alloca_once_value(builder, total))
        with cgutils.for_range_slice(builder, end, length, i64(1)) as (index, _):
            add_products(index, 1, results)
        return context.make_tuple(builder, signature.return_type, [builder.load(result) for result in results])

    return types.UniTuple(types.float32, count)(rows, weights), generate
