"""Compile kernels to object files, with Numba and LLVM.

Numba compiles a function of one number, the address of the arguments (`basic.common.native.kernel`): it reads them and
calls the kernel. The object file also holds all kernels that this one calls, and nothing of Numba.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as cgutils
from numba.core.codegen import CPUCodeLibrary as Library
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUContext
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np import arrayobj

from basic.common.errors import DependencyError
from basic.common.native.object_files import ENTRY, METHOD

_I64 = ir.IntType(64)

# `_nrt` (undocumented) switches off reference counting of arrays. Kernels create no arrays, and the counting was
# twelve calls in a function that merges a pre-token, a third of the training time. Wrappers are for calls from Python.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_NUMBERS = {"i": types.int64, "d": types.float64}
_dispatchers: list[Any] = []  # their types have weak references to them


def function_type(kernel: Any) -> Any:
    """The Numba type of a kernel, as another kernel sees it."""
    options = dict(kernel.options)
    separate = options.pop("separate", False)
    dispatcher: Any = numba.njit(**_OPTIONS, **options)(kernel.function)
    if separate:
        dispatcher._compiler._customize_flags = lambda flags: setattr(flags, "noalias", True) or flags
    _dispatchers.append(dispatcher)
    return types.Dispatcher(dispatcher)


def instruction_type(generator: Any) -> Any:
    """The Numba type of an instruction (`kernels/instructions.py`), as a kernel sees it."""
    context = cpu_target.typing_context
    made = intrinsic(generator)
    context.refresh()
    return context.resolve_value_type(made)


def c_function_type(name: str, num_arguments: int) -> Any:
    """The Numba type of a C function of integers and addresses."""
    return types.ExternalFunction(name, types.int64(*[types.int64] * num_arguments))


def compile_kernel(kernel: Any, signature: Sequence[str]) -> bytes:
    """Compile a kernel for arguments of some types; returns the object file.

    Raises:
        DependencyError: Numba is told not to compile anything.
    """
    if numba.config.DISABLE_JIT:  # ty: ignore[missing-attribute]
        raise DependencyError("NUMBA_DISABLE_JIT is set, so Numba compiles no kernel; unset it")
    argument_types = _numba_types(list(signature))
    read_arguments = _reader(argument_types)

    def call(words):
        return _as_int64(kernel(*read_arguments(words)))

    dispatcher = numba.njit(**_OPTIONS)(call)
    with _only_to_object_code():
        dispatcher.compile((types.int64,))
        (compiled,) = dispatcher.overloads.values()
        library = compiled.library
        library.finalize()  # links all that it calls
    machine = _target_machine()
    of_numba, library._codegen._tm = library._codegen._tm, machine
    library._optimize_final_module()
    library._codegen._tm = of_numba
    module = llvm.parse_assembly(_entry_module(compiled.fndesc.llvm_func_name))
    module.link_in(library._final_module, preserve=True)
    return machine.emit_object(module)


def _target_machine() -> llvm.TargetMachine:
    """This processor. LLVM avoids vectors of 512 bits, with which the first processors that had them became slower."""
    features = llvm.get_host_cpu_features()
    wide = ",-prefer-256-bit" if features.get("avx512f") else ""
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten() + wide, opt=3, reloc="pic", codemodel="small"
    )


@contextlib.contextmanager
def _only_to_object_code() -> Generator[None]:
    """While Numba compiles: leave kernels that others call as they are, neither optimized nor executable.

    Numba would optimize each kernel, and again as a part of each that calls it: 40 % of the time.
    """
    with global_compiler_lock:
        before = CPUContext.get_executable, Library._optimize_final_module, Library._finalize_final_module
        # Any built-in function, another one for each kernel.
        CPUContext.get_executable = lambda self, library, fndesc, env: [].append
        Library._optimize_final_module = lambda self: None
        Library._finalize_final_module = lambda self: setattr(self, "_finalized", True)
        try:
            yield
        finally:
            CPUContext.get_executable, Library._optimize_final_module, Library._finalize_final_module = before


def _entry_module(function_name: str) -> str:
    """The functions `ENTRIES`, which call a function of Numba's: its result is in memory, and its status always 0."""
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    pointer = ir.IntType(8).as_pointer()
    function = ir.Function(
        module, ir.FunctionType(ir.IntType(32), [_I64.as_pointer(), pointer.as_pointer(), _I64]), function_name
    )
    entry = ir.Function(module, ir.FunctionType(_I64, [_I64]), ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    result, error = builder.alloca(_I64), builder.alloca(pointer)
    builder.call(function, [result, error, entry.args[0]])
    builder.ret(builder.load(result))
    # Called as a method of a Python integer, the address of the arguments: the method's argument becomes the first one.
    to_address = ir.Function(module, ir.FunctionType(_I64, [_I64]), "PyLong_AsVoidPtr")
    method = ir.Function(module, ir.FunctionType(_I64, [_I64, _I64]), METHOD)
    builder = ir.IRBuilder(method.append_basic_block())
    address = builder.call(to_address, [method.args[0]])
    builder.store(method.args[1], builder.inttoptr(address, _I64.as_pointer()))
    builder.ret(builder.call(entry, [address]))
    return str(module)


def _numba_types(signature: list[str]) -> list[Any]:
    """The types of arguments; takes them from the front of the list, up to the end of the tuple."""
    result: list[Any] = []
    while signature and (text := signature.pop(0)) != ")":
        if text in _NUMBERS:
            result.append(_NUMBERS[text])
        elif text == "(":
            result.append(types.BaseTuple.from_types(_numba_types(signature)))
        else:
            dtype, ndim, access = text.split()
            result.append(types.Array(numba.from_dtype(np.dtype(dtype)), int(ndim), "C", readonly=access == "r"))
    return result


def _reader(argument_types: list[Any]) -> Any:
    """An instruction that makes the arguments from the numbers at an address."""
    all_types = types.BaseTuple.from_types(argument_types)

    def generate(context, builder, signature, arguments):
        address = builder.inttoptr(arguments[0], _I64.as_pointer())
        position = 0

        def next_word():
            nonlocal position
            position += 1
            return builder.load(builder.gep(address, [ir.Constant(_I64, position - 1)]))

        def make(numba_type):
            if isinstance(numba_type, types.BaseTuple):
                return context.make_tuple(builder, numba_type, [make(item) for item in numba_type])
            if numba_type == types.int64:
                return next_word()
            if numba_type == types.float64:
                return builder.bitcast(next_word(), ir.DoubleType())
            element = context.get_data_type(numba_type.dtype)
            size = ir.Constant(_I64, context.get_abi_sizeof(element))
            data = builder.inttoptr(next_word(), element.as_pointer())
            shape = [next_word() for _ in range(numba_type.ndim)]
            strides = [size]
            for length in shape[:0:-1]:
                strides.insert(0, builder.mul(strides[0], length))
            array = context.make_array(numba_type)(context, builder)
            arrayobj.populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
            return array._getvalue()

        return make(all_types)

    def type_and_code(typing_context, words):
        return all_types(types.int64), generate

    return intrinsic(type_and_code)


def as_int64(typing_context, value):
    """What a kernel returns as an int64; 0 for None."""

    def generate(context, builder, signature, arguments):
        if value == types.none:
            return ir.Constant(_I64, 0)
        return context.cast(builder, arguments[0], value, types.int64)

    return types.int64(value), generate


_as_int64: Any = intrinsic(as_int64)
