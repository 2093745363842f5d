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


TILE_ROWS, TILE_COLUMNS = (8, 32) if "avx512f" in processor() else (4, 16)
"""Of what `add_product` computes: as many sums as the registers of the processor hold."""


@instruction
def add_product(typing_context, a, b, c, inner, keeps):
    """Write A B for the first TILE_ROWS rows of a and TILE_COLUMNS columns of b, or add it to c if `keeps` is not 0.

    The sums stay in registers: a step adds the product of a column of a and a row of b. The numbers of a row of b and
    of c are neighbours in memory; a may be transposed. A matrix multiplication calls this for each tile of its result.

    Args:
        a, b, c: float32 arrays of two dimensions, of which the tiles are read and written whole.
        inner: number of columns of a and of rows of b.

    Source: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 6.
    """

    def generate(context, builder, signature, arguments):
        a, b, c = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in range(3))
        number, index = ir.FloatType(), ir.IntType(64)
        vector, zeros = ir.VectorType(number, TILE_COLUMNS), ir.VectorType(ir.IntType(32), TILE_COLUMNS)(None)

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
                factor = builder.load(address(a, index(row), loop.index, number))
                factor = builder.insert_element(vector(ir.Undefined), factor, ir.IntType(32)(0))
                factor = builder.shuffle_vector(factor, vector(ir.Undefined), zeros)
                product = builder.fmul(factor, line, flags=("contract",))
                builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)
        for result, total in zip(results, sums, strict=True):
            builder.store(builder.load(total), result, align=4)
        return context.get_dummy_value()

    return types.none(a, b, c, inner, keeps), generate
