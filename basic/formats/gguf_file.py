"""GGUF files, read and written by the `gguf` package: fields, and tensors of any type as float32."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from basic.common.errors import DamagedFileError, InvalidInputError, how_to_install
from basic.common.files import check_regular_file, open_file

MAGIC = b"GGUF"


def load_gguf_package() -> ModuleType:
    """Import the `gguf` package.

    Raises:
        InvalidInputError: it is not installed.
    """
    try:
        import gguf  # imported late: it is an extra
    except ImportError as error:
        raise InvalidInputError(f"GGUF files need the package gguf; {how_to_install('formats', 'gguf')}") from error
    return gguf


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a file that begins as a GGUF file does."""
    if not os.path.isfile(path):
        return False
    with open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


class GGUFFile:
    """An open GGUF file.

    Args:
        path: of the file; a model in several files cannot be read.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is incomplete.
        InvalidInputError: the `gguf` package is missing, or the model is in several files.
    """

    def __init__(self, path: str | os.PathLike):
        check_regular_file(path)
        self.path, self._gguf = Path(path), load_gguf_package()
        try:
            self._reader = self._gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError, AttributeError, MemoryError) as error:
            raise DamagedFileError(f"{path} is not a complete GGUF file ({error}); download it again") from error
        self.names = [tensor.name for tensor in self._reader.tensors]
        self.fields: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        if self.fields.get("split.count", 1) > 1:
            raise InvalidInputError(
                f"{path} is one of {self.fields['split.count']} files of a model (split.count); join them with "
                "llama-gguf-split --merge"
            )

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield tensors as float32, one in memory at a time.

        Raises:
            InvalidInputError: the `gguf` package cannot dequantize a tensor's type.
        """
        wanted = None if names is None else {*names}
        for tensor in self._reader.tensors:
            if wanted is None or tensor.name in wanted:
                try:
                    values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                except NotImplementedError as error:
                    raise InvalidInputError(
                        f"{self.path} has {tensor.name!r} of type {tensor.tensor_type.name}, which cannot be read"
                    ) from error
                yield tensor.name, np.require(values, np.float32, "W")  # a copy, where it is the file itself


def write_gguf(
    path: str | os.PathLike,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    matrix_type: str,
) -> None:
    """Write a GGUF file.

    Args:
        fields: name to value; integers, floats, strings, booleans and lists of them.
        tensors: names and float32 arrays. Vectors are written as float32; so are all tensors with "F32".
        matrix_type: "F32", "F16", "BF16" or "Q8_0". A matrix whose rows cannot be divided into blocks of 32 numbers is
            written as F16 in place of Q8_0.
    """
    gguf = load_gguf_package()
    kinds, file_types = gguf.GGMLQuantizationType, gguf.LlamaFileType
    file_type = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[matrix_type]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=False)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_types[file_type])
    for name, value in fields.items():
        _add_field(writer, name, value)
    for name, values in tensors:
        kind = kinds[matrix_type] if values.ndim > 1 else kinds.F32
        if kind == kinds.Q8_0 and values.shape[-1] % 32:
            kind = kinds.F16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_field(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
