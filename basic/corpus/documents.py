"""Documents of JSON lines and of Parquet tables: the text of each line and of each row.

A field is a key, or keys with dots between them: "data.text" is the field "text" in the object "data", unless there is
a key "data.text".
"""

from __future__ import annotations

import codecs
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from basic.common.errors import DamagedFileError, InvalidInputError, how_to_install, utf8_error
from basic.corpus.files import BLOCK_BYTES, ContentReader
from basic.corpus.text_formats import JSON_LINES, check_head
from basic.pretokenization import replace_surrogates

MAX_LINE_BYTES = 1 << 28  # of JSON lines; a line needs several times its size in memory
MAX_BAD_LINES_AT_START = 1000
_ROWS_AT_A_TIME = 256


class BadLines:
    """What happens to lines or rows that have no text: the first one raises its error, or they are left out.

    If a source begins with a thousand of them and nothing else, that is an error too: the field is probably wrong.

    Args:
        on_skip: called with the error of each that is left out; None raises the error.

    Attributes:
        has_documents: whether the source has a line or a row with a text; readers set it.
    """

    def __init__(self, on_skip: Callable[[InvalidInputError], object] | None) -> None:
        self._on_skip, self._num_skipped, self.has_documents = on_skip, 0, False

    def add(self, error: InvalidInputError) -> None:
        """Raise the error of a line, or leave the line out."""
        if self._on_skip is None:
            raise error
        self._num_skipped += 1
        if self._num_skipped == MAX_BAD_LINES_AT_START and not self.has_documents:
            raise InvalidInputError(f"none of the first {self._num_skipped:,} lines or rows has a text: {error}")
        self._on_skip(error)


class SkippedLines:
    """The lines and rows that were left out because `on_bad_line` is "skip"; a call adds one."""

    def __init__(self) -> None:
        self._record: dict[str, Any] = {"skipped": 0}

    def __call__(self, error: InvalidInputError) -> None:
        self._record.setdefault("first_skipped", str(error))
        self._record["skipped"] += 1

    def as_record(self) -> dict[str, Any]:
        """Their number and the message of the first one, as JSON values."""
        return dict(self._record)


def warn_of_skipped(records: Iterable[Mapping[str, Any]]) -> None:
    """Report all lines and rows that were left out, from the records of `SkippedLines`."""
    records = [record for record in records if record.get("skipped")]
    if records:
        num_skipped = sum(record["skipped"] for record in records)
        first = records[0].get("first_skipped", "not recorded")  # a damaged record spoils only this report
        warnings.warn(f"lines or rows skipped: {num_skipped:,}; the first: {first}", stacklevel=3)


def read_json_lines(file: ContentReader, field: str, suffix: str, *, errors: str, bad_lines: BadLines) -> Iterator[str]:
    """Read the documents of JSON lines. In memory is the longest line.

    Args:
        suffix: the end of its name, without that of a compression.
        errors: "strict", or "replace" for U+FFFD instead of bytes that are not UTF-8.
        bad_lines: what happens to a line that is too long or no JSON object with a string under the field.

    Raises:
        InvalidInputError: a line is bad (see `BadLines`), or the file holds something else.
        DamagedFileError: the file is damaged.
    """
    remedy = ""
    if suffix == ".json":
        remedy = "; a .json file must have one object a line (`jq -c` writes such lines); plain text is named .txt"
    elif suffix not in JSON_LINES.suffixes:
        remedy = "; the file begins like JSON lines; plain text is named .txt"
    for number, offset, line in read_lines(file, bad_lines):
        if not line.strip():
            continue
        name = f"{file.name}, line {number}"
        try:
            document = parse_json_line(line, field, name, offset, errors=errors, remedy=remedy)
        except InvalidInputError as error:
            bad_lines.add(error)
        else:
            bad_lines.has_documents = True
            yield document


def read_lines(file: ContentReader, bad_lines: BadLines) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file, each with its number and its byte offset; without a byte order mark."""
    number, offset = 0, file.offset
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            check_head(file.name, line, JSON_LINES.suffixes[0])
        if len(line) > MAX_LINE_BYTES:
            bad_lines.add(
                InvalidInputError(
                    f"{file.name!r}, line {number} (from byte offset {offset} on) is longer than "
                    f"{MAX_LINE_BYTES} bytes, the limit for one document; divide the document into several"
                )
            )
            while line and not line.endswith(b"\n"):  # the rest of the line
                line = file.readline(BLOCK_BYTES)
        else:
            start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            yield number, offset + start, line[start:] if start else line
        offset = file.offset


def parse_json_line(line: bytes, field: str, name: str, offset: int, *, errors: str, remedy: str = "") -> str:
    """Return the document of a line of JSON lines.

    Args:
        errors: "strict", or "replace" for U+FFFD instead of bytes that are not UTF-8.
        remedy: the end of the message for what is no JSON object.

    Raises:
        InvalidInputError: the line is not JSON, or has no string under the field.
    """
    position = f"{name!r} (from byte offset {offset} on)"
    try:
        record = json.loads(line.decode(errors=errors))
    except UnicodeDecodeError as error:
        raise utf8_error(name, offset + error.start, line[error.start], error.reason) from None
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{position} is not JSON: {error}{remedy}") from None
    if not isinstance(record, dict):
        raise InvalidInputError(f"{position} is no JSON object, but {record!r:.40}{remedy}")
    values = _values_at(record, field)
    text = next((value for value in values if isinstance(value, str)), None)
    if text is None:
        has = f"has {json.dumps(values[0]):.40} as {field!r}" if values else f"has no field {field!r}"
        allowed = f"one of its strings, {fields}" if (fields := _string_fields(record)) else "a string, and it has none"
        raise InvalidInputError(f"{position} {has}; the field must be {allowed}")
    return replace_surrogates(text)  # "\ud800" is valid JSON, but not a character


def _values_at(record: dict[str, Any], field: str) -> list[Any]:
    """The values that a field can mean, that of the longest key first."""
    values = [record[field]] if field in record else []
    for end in range(len(field) - 1, -1, -1):
        if field[end] == "." and isinstance(inner := record.get(field[:end]), dict):
            values += _values_at(inner, field[end + 1 :])
    return values


def _string_fields(record: dict[str, Any], prefix: str = "") -> list[str]:
    fields = [prefix + key for key, value in record.items() if isinstance(value, str)]
    for key, value in record.items():
        if isinstance(value, dict) and prefix.count(".") < 2:
            fields += _string_fields(value, f"{prefix}{key}.")
    return fields


def read_parquet(file: Any, name: str, field: str, *, errors: str, bad_lines: BadLines) -> Iterator[str]:
    """Read the documents of a Parquet table. In memory are some rows of one column, however large a row group is.

    Args:
        file: open for reading, in binary, at any offset.
        field: of the document: a column, also inside of structs.

    Raises:
        InvalidInputError: pyarrow is not installed, no column of texts has this name, or a row is bad.
        DamagedFileError: the file is not a Parquet table.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        install = how_to_install("formats", "pyarrow")
        raise InvalidInputError(f"{name!r} is a Parquet table, which needs pyarrow; {install}") from None
    try:
        # By default a row group's part of the column is read at once.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
        path = _column_path(table.schema_arrow, field, name)
        number = 0
        for batch in table.iter_batches(_ROWS_AT_A_TIME, columns=[".".join(path)], use_threads=False):
            column = batch.column(path[0])
            for key in path[1:]:
                column = pyarrow.compute.struct_field(column, key)  # ty: ignore[missing-attribute]
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                number += 1
                try:
                    document = _decode_row(value, field, f"{name}, row {number}", errors)
                except InvalidInputError as error:
                    bad_lines.add(error)
                else:
                    bad_lines.has_documents = True
                    yield document
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the network
        raise DamagedFileError(f"{name!r} is no Parquet table, or is damaged: {error}") from None


def _decode_row(value: bytes | None, field: str, name: str, errors: str) -> str:
    if value is None:
        raise InvalidInputError(f"{name!r} has no text as {field!r}, but null")
    try:
        return value.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise utf8_error(name, error.start, value[error.start], error.reason) from None


def _column_path(schema: Any, field: str, name: str) -> list[str]:
    """The names of the column with the texts, from outside in."""
    texts = [path for path, column in _columns(schema) if _is_text(column)]
    for path in sorted(texts, key=len):  # a name with dots before names with dots between them
        if ".".join(path) == field:
            return path
    columns = {".".join(path): column for path, column in _columns(schema)}
    has = f"has {columns[field]} in the column {field!r}" if field in columns else f"has no column {field!r}"
    raise InvalidInputError(
        f"{name!r} {has}; the field must be one of its columns of texts, {list(map('.'.join, texts))}"
    )


def _columns(fields: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """The path and the type of each column, and of those inside of structs."""
    for column in fields:
        path = (*prefix, column.name)
        yield list(path), column.type
        if str(column.type).startswith("struct<"):
            yield from _columns(column.type, path)


def _is_text(column: Any) -> bool:
    value_type = getattr(column, "value_type", None) if str(column).startswith("dictionary<") else column
    return str(value_type) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
