"""Functions over arrays that run as machine code, and how Python calls them.

    @kernel                          a plain function over arrays and numbers
    def add_one(numbers, count): ...

    add_one(array, 3)                compiled for these types once on a machine, then loaded from a file

A call writes the arguments into an array of 64-bit numbers, the address and the shape of each array among them, and
passes its address: one argument, however many arrays there are. Numba's own call checks and unpacks each array (3
microseconds for twenty arrays), and its import takes half a second. It runs without the interpreter's lock.

Several threads may run one call: those of OpenMP, which torch has started already. Each of them takes items until there
are none left (`take_items`), so that results do not depend on their number.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable
from functools import cache, cached_property
from struct import Struct
from types import FunctionType
from typing import Any, ClassVar

import numpy as np

from basic.common.native import object_files

# The type of an argument, as text: "i" for an integer, "d" for a float, "u1 2 r" for a read-only array of uint8 of two
# dimensions, "(" and ")" around those of a tuple.
Signature = tuple[str, ...]

_call_type = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_compile_lock = threading.RLock()
_INT64, _DOUBLE = Struct("<q"), Struct("<d")
# bfloat16, which NumPy and Numba do not have, is the upper half of a float32.
_TENSOR_TYPES = {"torch.float32": "f4", "torch.int64": "i8", "torch.bfloat16": "u2"}
_tensor_signatures: dict[tuple[Any, int], str] = {}  # by dtype and number of dimensions


class Kernel:
    """A function over arrays and numbers that runs as machine code.

    Kernels may call each other; the machine code of a kernel contains that of all kernels it calls.

    Args:
        function: takes contiguous arrays, tensors as arrays, numbers and tuples of these; returns an integer or None.
        options: for the compiler, `numba.njit`.
    """

    def __init__(self, function: FunctionType, options: dict[str, Any]) -> None:
        self.function, self.options, self.__doc__ = function, options, function.__doc__
        self._entries: dict[Signature, dict[str, int]] = {}

    def __call__(self, *arguments: Any, num_threads: int = 1) -> Any:
        """Call the machine code; returns what the function returns, 0 for None or with several threads."""
        signature: list[str] = []
        words: list[int] = []
        for argument in arguments:
            _append(argument, signature, words)
        entry = self.entries(tuple(signature))[object_files.ENTRY]
        address = ctypes.addressof(block := (ctypes.c_int64 * len(words))(*words))
        result = _call_type(entry)(address) if num_threads == 1 else _call_in_threads(entry, address, num_threads)
        del block  # the arguments, until here
        return result

    def entries(self, signature: Signature) -> dict[str, int]:
        """The functions for arguments of these types (`object_files.ENTRIES`), from memory, a file or the compiler."""
        return self._entries.get(signature) or self._load(signature)

    def _load(self, signature: Signature) -> dict[str, int]:
        with _compile_lock:
            if signature not in self._entries:
                digest = hashlib.sha256(" ".join(signature).encode()).hexdigest()[:12]
                name = f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}.{digest}.o"
                data = object_files.read_object(name)
                if data is None:
                    from basic.common.native.compiler import compile_kernel

                    data = compile_kernel(self, signature)
                    object_files.write_object(name, data)
                self._entries[signature] = object_files.load_object(data)
            return self._entries[signature]

    @cached_property
    def _numba_type_(self) -> Any:
        """What Numba asks of a global name in a kernel that it compiles: here, a function to compile as well."""
        from basic.common.native.compiler import function_type

        return function_type(self)


@cache
def _run_in_threads() -> Any:
    """GNU's OpenMP, which runs a function of one address in several threads; None on other systems."""
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None


def _call_in_threads(entry: int, address: int, num_threads: int) -> int:
    """Call the function at an address with the address of its arguments in each of several threads; returns 0."""
    if (run_in_threads := _run_in_threads()) is None:
        return _call_type(entry)(address)  # which takes all items itself
    run_in_threads(ctypes.c_void_p(entry), ctypes.c_void_p(address), num_threads, 0)
    return 0


def kernel(function: Any) -> Kernel:
    """Make a function over arrays and numbers a kernel, which is compiled when it is first called.

    It runs without the interpreter's lock, so threads run in parallel. Divisions are not checked.
    """
    return Kernel(function, {})


def inlined_kernel(function: Any) -> Kernel:
    """`kernel` for a small function with many arrays: it is inlined, because passing an array copies seven numbers.

    To apply merges to a new pre-token took 0.88 microseconds without inlining, and takes 0.57 with it.
    """
    return Kernel(function, {"forceinline": True})


class PreparedCall:
    """A kernel with its arguments, for many calls that change few of them.

    Attributes:
        words: the arguments as 64-bit numbers; of an array its address, then its shape.
        first_words: the index in `words` of each argument, by name.
    """

    def __init__(self, kernel: Kernel, *arguments: Any) -> None:
        names = kernel.function.__code__.co_varnames
        self._arguments = dict(zip(names, arguments, strict=False))  # keeps the arrays in memory
        self._signatures: dict[str, list[str]] = {}
        self.first_words: dict[str, int] = {}
        words: list[int] = []
        for name, argument in self._arguments.items():
            self._signatures[name], self.first_words[name] = [], len(words)
            _append(argument, self._signatures[name], words)
        self.words = (ctypes.c_int64 * len(words))(*words)
        self.address = ctypes.addressof(self.words)
        entries = kernel.entries(tuple(text for texts in self._signatures.values() for text in texts))
        self._address_of_entry, self._method = entries[object_files.ENTRY], entries[object_files.METHOD]
        self._entry = _call_type(self._address_of_entry)

    def __call__(self, num_threads: int = 1) -> int:
        """Call the kernel; see `Kernel.__call__`."""
        if num_threads == 1:
            return self._entry(self.address)
        return _call_in_threads(self._address_of_entry, self.address, num_threads)

    def set(self, **arguments: Any) -> None:
        """Replace some arguments by others of the same types."""
        for name, argument in arguments.items():
            signature: list[str] = []
            words: list[int] = []
            _append(argument, signature, words)
            assert signature == self._signatures[name], f"{name} is {signature}, not {self._signatures[name]}"
            first = self.first_words[name]
            self.words[first : first + len(words)] = words
            self._arguments[name] = argument

    def as_function(self) -> Callable[[Any], Any]:
        """A built-in function of one argument that calls the kernel, in 0.05 microseconds.

        The kernel gets the address of the argument as its first argument. It returns the address of a new object, or 0
        after it has raised an exception. It keeps the interpreter's lock, so it must be short.

        This prepared call must exist as long as the function.
        """
        definition = _MethodDefinition(b"kernel", self._method, _ONE_ARGUMENT, None)
        _definitions.append(definition)
        return _new_function(ctypes.byref(definition), self.address, None)


class _MethodDefinition(ctypes.Structure):
    """PyMethodDef of Python's C interface."""

    _fields_: ClassVar = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_ONE_ARGUMENT = 8  # METH_O
_definitions: list[_MethodDefinition] = []  # functions have pointers to them
_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.restype, _new_function.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)


def functions_are_safe() -> bool:
    """Whether `PreparedCall.as_function` may be used: threads would call one at the same time without the lock."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def _append(argument: Any, signature: list[str], words: list[int]) -> None:
    """Append the types and the numbers of an argument."""
    if hasattr(argument, "data_ptr"):  # a tensor of torch, which this package does not import
        assert argument.is_contiguous(), "kernels take contiguous tensors"
        shape, dtype = argument.shape, argument.dtype
        key = dtype, len(shape)
        if key not in _tensor_signatures:
            _tensor_signatures[key] = f"{_TENSOR_TYPES[str(dtype)]} {len(shape)} w"
        signature.append(_tensor_signatures[key])
        words += (argument.data_ptr(), *shape)
    elif isinstance(argument, np.ndarray):
        interface = argument.__array_interface__
        address, is_readonly = interface["data"]
        assert argument.flags.c_contiguous, "kernels take contiguous arrays"
        signature.append(f"{interface['typestr'][1:]} {argument.ndim} {'r' if is_readonly else 'w'}")
        words += (address, *argument.shape)
    elif isinstance(argument, tuple):
        signature.append("(")
        for item in argument:
            _append(item, signature, words)
        signature.append(")")
    elif isinstance(argument, float):
        signature.append("d")
        words.append(_INT64.unpack(_DOUBLE.pack(argument))[0])
    else:
        signature.append("i")
        words.append(int(argument))
