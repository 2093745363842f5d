"""Processor instructions and C functions for kernels: what they generate, and what several packages use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


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
