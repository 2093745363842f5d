"""Keep the machine code of kernels in files, and load it without the compiler.

Numba and LLVM take half a second to import, so they only compile. What they compile is kept as object files, as every
compiler writes them. On Linux (x86-64) this module puts such a file into memory itself, which takes a fraction of a
millisecond; elsewhere LLVM's own linker does it (`llvmlite.binding`).

Source: System V ABI, AMD64 supplement, section 4.4 (relocation); ELF-64 object file format, version 1.5.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from basic.common.native.cache_files import read_checked, write_checked

# The functions of an object file (`basic.common.native.compiler`).
ENTRIES = ENTRY, METHOD = "basic_kernel", "basic_method"

_FILE_HEADER, _SECTION, _SYMBOL, _RELOCATION = (
    Struct("<16sHHIQQQIHHHHHH"),
    Struct("<IIQQQQIIQQ"),
    Struct("<IBBHQQ"),
    Struct("<QQq"),
)
_RELOCATABLE, _X86_64 = 1, 62  # the kind of file and the machine
_SYMBOL_TABLE, _RELOCATIONS, _NO_BITS, _ALLOCATED = 2, 4, 8, 2
_UNDEFINED = 0
_ABSOLUTE_64, _RELATIVE_32, _CALL_32 = 1, 2, 4
# jmp [rip + 0], followed by the address: a call reaches 2 GB, and the C library may be farther away.
_FAR_JUMP = b"\xff\x25\x00\x00\x00\x00"
_FAR_JUMP_BYTES = 16

_loaded: list[object] = []  # memory with machine code, which is never freed


class UnsupportedObjectError(Exception):
    """An object file that only LLVM's linker can load."""


def load_object(data: bytes) -> dict[str, int]:
    """Put an object file into memory; returns the addresses of its functions `ENTRIES`."""
    try:
        return _link(data)
    except (UnsupportedObjectError, OSError, AttributeError):  # another system, or it forbids to execute our memory
        return _load_with_llvm(data)


def _link(data: bytes) -> dict[str, int]:
    """Copy the sections of an object file into memory, and fill in the addresses where they refer to each other."""
    if sys.platform != "linux" or data[:6] != b"\x7fELF\x02\x01":
        raise UnsupportedObjectError
    header = _FILE_HEADER.unpack_from(data)
    if header[1:3] != (_RELOCATABLE, _X86_64):
        raise UnsupportedObjectError
    sections = [_Section(*_SECTION.unpack_from(data, header[6] + i * _SECTION.size)) for i in range(header[12])]
    offsets, size = {}, 0
    for number, section in enumerate(sections):
        if section.flags & _ALLOCATED:
            offsets[number] = -(-size // max(section.alignment, 1)) * max(section.alignment, 1)
            size = offsets[number] + section.size
    symbols = list(_symbols(data, sections))
    externals = [symbol for symbol in symbols[1:] if symbol.section == _UNDEFINED]
    jumps = -(-size // _FAR_JUMP_BYTES) * _FAR_JUMP_BYTES  # after the sections
    memory = mmap.mmap(-1, jumps + (len(externals) + 1) * _FAR_JUMP_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for number, offset in offsets.items():
        memory[offset : offset + sections[number].size] = sections[number].content(data)
    addresses = {
        symbol.number: base + offsets[symbol.section] + symbol.value for symbol in symbols if symbol.section in offsets
    }
    for position, symbol in enumerate(externals):
        at = jumps + position * _FAR_JUMP_BYTES
        jump = _FAR_JUMP + _address_of(symbol.name).to_bytes(8, "little")
        memory[at : at + len(jump)] = jump
        addresses[symbol.number] = base + at
    for section in sections:
        if section.kind == _RELOCATIONS and section.target in offsets:
            _relocate(memory, base, offsets[section.target], section.content(data), addresses)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    if mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory with machine code is not allowed")
    _loaded.append(memory)
    return {symbol.name: addresses[symbol.number] for symbol in symbols if symbol.name in ENTRIES}


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    start: int
    size: int
    link: int
    target: int
    alignment: int
    entry_size: int

    def content(self, data: bytes) -> bytes:
        return bytes(self.size) if self.kind == _NO_BITS else data[self.start : self.start + self.size]


class _Symbol(NamedTuple):
    number: int
    name: str
    section: int
    value: int


def _symbols(data: bytes, sections: list[_Section]) -> Iterator[_Symbol]:
    table = next(section for section in sections if section.kind == _SYMBOL_TABLE)
    names = sections[table.link].content(data)
    for number, (name, _, _, section, value, _) in enumerate(_SYMBOL.iter_unpack(table.content(data))):
        yield _Symbol(number, names[name : names.index(b"\0", name)].decode(), section, value)


def _relocate(memory: mmap.mmap, base: int, section: int, relocations: bytes, addresses: dict[int, int]) -> None:
    """Write the addresses of symbols into the section at an offset.

    Args:
        base: the address of the memory.
        addresses: of the symbols, by number.
    """
    for offset, info, addend in _RELOCATION.iter_unpack(relocations):
        at, kind, symbol = section + offset, info & 0xFFFFFFFF, info >> 32
        if symbol not in addresses:
            raise UnsupportedObjectError
        value = addresses[symbol] + addend
        if kind in (_RELATIVE_32, _CALL_32):
            memory[at : at + 4] = (value - base - at).to_bytes(4, "little", signed=True)
        elif kind == _ABSOLUTE_64:
            memory[at : at + 8] = value.to_bytes(8, "little")
        else:
            raise UnsupportedObjectError


def _address_of(name: str) -> int:
    """The address of a function of the C library or of Python's C interface."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


def _load_with_llvm(data: bytes) -> dict[str, int]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    _loaded.append(engine)
    return {name: engine.get_function_address(name) for name in ENTRIES}


@cache
def processor() -> str:
    """What the machine code depends on: the system, the kind of processor and its instructions.

    A home folder may be shared by machines with different processors.
    """
    names = [sys.platform, os.uname().machine if hasattr(os, "uname") else ""]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 14).split("\n\n")[0]
        names += [
            line for line in first.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))
        ]
    except OSError:
        import llvmlite.binding as llvm

        names += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    return "\n".join(names)


def _sources() -> dict[Path, int]:
    """The files that the machine code depends on, and when each was changed."""
    folder = Path(__file__).parents[2]
    patterns = "common/native/*.py", "bpe/kernels/**/*.py", "bpe/patterns/automaton.py", "transformer/cpu/*kernels.py"
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return {path: path.stat().st_mtime_ns for path in paths}


# Machine code of sources that were replaced since (an update, a branch) does not fit the modules in memory.
_SOURCES_AT_IMPORT = _sources()


def _version() -> str:
    """Identifies the machine code: its sources and the processor."""
    content = b"".join(path.read_bytes() for path in _sources()) + processor().encode()
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """The folder in which compiled kernels are kept for later processes, or None if no folder is writable.

    The candidates are the user's choice for Numba, the folder of this file, and the user's folder for caches. An empty
    XDG_CACHE_HOME does not mean the current folder.
    """
    candidates = [os.environ.get("NUMBA_CACHE_DIR"), Path(__file__).with_name("__pycache__")]
    candidates.append(os.environ.get("XDG_CACHE_HOME"))
    with contextlib.suppress(RuntimeError):  # no home folder
        candidates.append(Path.home() / ".cache")
    return first_writable_folder(candidates)


def first_writable_folder(candidates: Iterable[str | Path | None]) -> Path | None:
    """A subfolder for these kernels in the first candidate that is an absolute path and writable, else None."""
    for candidate in candidates:
        if not candidate or not Path(candidate).is_absolute():
            continue
        path = Path(candidate) / "basic_kernels" / _version()
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK | os.X_OK):
                return path
    print("basic: no folder for compiled kernels is writable (set NUMBA_CACHE_DIR): they are not kept", file=sys.stderr)
    return None


def read_object(name: str) -> bytes | None:
    """An object file that `write_object` wrote; None if there is none, or it is damaged."""
    path = _path_of(name)
    return None if path is None else read_checked(path)


def write_object(name: str, data: bytes) -> None:
    """Keep an object file, if there is a folder for it."""
    if (path := _path_of(name)) is not None:
        write_checked(path, data)


def has_objects(module: str) -> bool:
    """Whether there are object files of the kernels of a module, by its last name: else its first calls compile."""
    folder = cache_folder()
    return folder is not None and any(folder.glob(f"{module}.*.o"))


def _path_of(name: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None or _sources() != _SOURCES_AT_IMPORT else folder / name
