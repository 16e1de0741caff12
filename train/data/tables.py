"""Sequences from tables: one per row of a CSV or Parquet file.

CSV, separated by commas: the numbers of a sequence in time order and then, as the last
cell that is not empty, its target: a number, or the name of its class. Rows may differ
in length; short ones are padded on the right. The first row is a header where

- none of the cells before its last one is a number,
- or its last one is a word and those of all other rows are numbers,
- or it counts its columns, 0, 1, 2, ..., and its last is a word that no other row has
  (which is how pandas writes columns that have no names).

Parquet: columns that are called as the keys of an NPZ, lists where the NPZ has an axis
of tokens (they may differ in length); or columns of numbers in time order, the last
one being the target, as in a CSV.
"""

import csv
import math
import re
from collections.abc import Sequence

import numpy as np

from train import settings
from train.data import cast
from train.data.source_file import File

DATE = re.compile(
    r"\s*\d{4}([-/])\d{1,2}\1\d{1,2}"
    r"([T ]\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?\s*(Z|[+-]\d{2}:?\d{2})?)?\s*"
)

INDEX = r"__index_level_\d+__"

Cells = list[str]


def read_csv(source: File) -> dict[str, np.ndarray]:
    """inputs, targets and lengths of a CSV file.

    Raises:
        ValueError: names the row and the column, what stands there and what may.
    """
    lines = _lines(source)
    _refuse_dates(source, lines)
    if lines and _is_header(lines):
        del lines[0]
    if not lines:
        raise ValueError(f"{source.path}: has no sequence")
    rows = [_sequence(source, line, cells[:-1]) for line, cells in lines]
    return _padded(rows) | {"targets": _targets(source, lines)}


def read_csv_inputs(source: File) -> dict[str, np.ndarray]:
    """inputs and lengths of a CSV file whose rows have no target; its first row is a
    header where none of its cells is a number.

    Raises:
        ValueError: as `read_csv`.
    """
    lines = _lines(source)
    _refuse_dates(source, lines)
    if lines and not any(map(_is_number, lines[0][1])):
        del lines[0]
    if not lines:
        raise ValueError(f"{source.path}: has no sequence")
    return _padded([_sequence(source, *line, target=False) for line in lines])


def _lines(source: File) -> list[tuple[int, Cells]]:
    """(row number from 1, cells up to the last that is not empty), empty rows left
    out."""
    found = []
    try:
        with open(source.path, newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                while cells and not cells[-1].strip():
                    cells.pop()
                if cells:
                    found.append((line, cells))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source.path}: not a UTF-8 CSV file ({error})") from error
    return found


def _is_header(lines: list[tuple[int, Cells]]) -> bool:
    (*inputs, target), rest = lines[0][1], [cells for _, cells in lines[1:]]
    if any(cell.strip() for cell in inputs) and not any(map(_is_number, inputs)):
        return True
    if _is_number(target):
        return False
    if rest and all(_is_number(cells[-1]) for cells in rest):
        return True
    counted = [cell.strip() for cell in inputs] == [*map(str, range(len(inputs)))]
    alone = all(cells[-1].strip() != target.strip() for cells in rest)
    return len(inputs) > 1 and counted and alone


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_dates(source: File, lines: list[tuple[int, Cells]]) -> None:
    """Raises a `ValueError` for a file that has a column of dates."""
    rows = [cells for _, cells in lines[1:]] or [cells for _, cells in lines]
    for column in range(max(map(len, rows), default=0)):
        if all(len(cells) > column and DATE.fullmatch(cells[column]) for cells in rows):
            name = lines[0][1][column : column + 1] if len(lines) > 1 else []
            raise _forecasting(source, column, "".join(name))


def _forecasting(source: File, column: int, name: str) -> ValueError:
    called = f" ({name.strip()[:40]})" if name and not DATE.fullmatch(name) else ""
    return ValueError(
        f"{source.path}: column {column + 1}{called} holds dates: this is a "
        "forecasting file, a table with one moment per row, and is not read yet; "
        "sequences must stand one per row, numbers in time order and then the target"
    )


def _sequence(source: File, line: int, cells: Cells, target: bool = True) -> list:
    numbers = [_number(source, line, i, cell) for i, cell in enumerate(cells)]
    while numbers and numbers[-1] is None:  # a spreadsheet's filling
        numbers.pop()
    if None in numbers:
        raise source.error(
            f"row {line}, column {numbers.index(None) + 1}",
            "is empty inside the sequence; it must be a number",
        )
    if not numbers:
        before = " before its target (cells are separated by commas)" if target else ""
        raise source.error(f"row {line}", f"needs at least one input{before}")
    return numbers


def _padded(rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    lengths = np.array([len(row) for row in rows])
    inputs = np.zeros((len(rows), lengths.max()))
    for row, numbers in zip(inputs, rows, strict=True):
        row[: len(numbers)] = numbers
    return {"inputs": inputs, "lengths": lengths}


def _targets(source: File, lines: list[tuple[int, Cells]]) -> np.ndarray:
    """Classes by name where the first one is a word; else numbers, integers where all
    are written so."""
    first, written = lines[0][0], [cells[-1].strip() for _, cells in lines]
    places = [f"row {line}, column {len(cells)}" for line, cells in lines]
    if not _is_number(written[0]):
        for place, cell in zip(places, written, strict=True):
            if _is_number(cell):
                raise source.error(
                    place,
                    f"is {cell[:40]}; the target of row {first} is a word, and so must "
                    "all be",
                )
        return np.array(written)
    targets = []
    for (line, cells), place in zip(lines, places, strict=True):
        if not _is_number(cells[-1]):
            raise source.error(
                place,
                f"is {cells[-1][:40]!r}; it must be a number, as the target of row "
                f"{first} is",
            )
        targets.append(_number(source, line, len(cells) - 1, cells[-1]))
    targets = np.array(targets)
    if not all(cell.lstrip("+-").isdigit() for cell in written):
        return targets
    large = np.flatnonzero(abs(targets) > cast.MOST)
    if len(large):
        raise source.error(
            places[large[0]],
            f"is {targets[large[0]]:.0f}; a whole number as target must be at most "
            f"{cast.MOST}, and one that is to be regressed must have a decimal point",
        )
    return targets.astype(np.int64)


def _number(source: File, line: int, column: int, cell: str) -> float | None:
    if not cell.strip():
        return None
    where = f"row {line}, column {column + 1}"
    try:
        number = float(cell)
    except ValueError:
        raise source.error(where, f"is {cell[:40]!r}; it must be a number") from None
    if not math.isfinite(number):
        raise source.error(where, f"is {cell.strip()[:40]}; it must be a finite number")
    if abs(number) > cast.LARGEST:
        raise source.error(
            where,
            f"is {cell.strip()[:40]}; it must be a number of float32, up to "
            f"{cast.LARGEST:.3g}",
        )
    return number


def read_parquet(
    source: File, keys: Sequence[str], targets: bool = True
) -> dict[str, np.ndarray]:
    """The arrays of a Parquet file, by key.

    Args:
        source: of the file.
        keys: the names of columns that are read as an NPZ's.
        targets: whether the last of columns that are called otherwise is the target.

    Raises:
        ValueError: names the column, what it has and what it must have; or pyarrow is
            not installed.
    """
    table = _table(source)
    names = table.column_names
    if not table.num_rows or not names:
        raise ValueError(f"{source.path}: has no sequence")
    _refuse_moments(source, table)
    if "inputs" in names:
        unknown = [name for name in names if name not in keys]
        if unknown:
            raise source.error(
                f"column {unknown[0]!r}", f"is not known; those are {', '.join(keys)}"
            )
        return _columns(source, table)
    if targets and len(names) < 2:
        raise source.error(
            f"column {names[0]!r}",
            "is the only one; a table has numbers in time order and then the target, "
            "or the columns inputs and targets",
        )
    raw, inputs = {}, names
    if targets:
        *inputs, last = names
        raw["targets"] = _flat(source, last, table.column(last).combine_chunks())
    for name in inputs:
        kind = str(table.schema.field(name).type)
        if not kind.startswith(("int", "uint", "float", "double", "half", "bool")):
            raise source.error(
                f"column {name!r}",
                f"is of type {kind}; every column before the last must be numbers in "
                "time order, or the columns be called inputs (lists) and targets",
            )
    columns = [_flat(source, n, table.column(n).combine_chunks()) for n in inputs]
    raw["inputs"] = np.stack([column.astype(np.float64) for column in columns], 1)
    return raw


def _table(source: File):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{source.path}: reading Parquet needs pyarrow, which is not installed: "
            "pip install pyarrow (the extra data has it)"
        ) from error
    try:
        with parquet.ParquetFile(source.path) as file:
            found = file.metadata
            groups = [found.row_group(i) for i in range(found.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            size = max(size, 8 * found.num_rows * found.num_columns)
            settings.check_memory("data.path", size, f"{source.path}, unpacked,")
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{source.path}: not a readable Parquet file ({said})"
        ) from error
    # What pandas keeps of the index of a frame that was filtered is no data.
    indices = [n for n in table.column_names if re.fullmatch(INDEX, n)]
    return table.drop_columns(indices) if indices else table


def _refuse_moments(source: File, table) -> None:
    """Raises a `ValueError` for a table that has a column of dates."""
    for column, field in enumerate(table.schema):
        kind = str(field.type)
        words = kind in ("string", "large_string") and not any(
            text is None or not DATE.fullmatch(text)
            for text in table.column(column).to_pylist()
        )
        if kind.startswith(("timestamp", "date")) or words:
            raise _forecasting(source, column, field.name)


def _columns(source: File, table) -> dict[str, np.ndarray]:
    """The columns of a table by name, lists padded to the longest of "inputs"."""
    raw, lengths = {}, None
    for name in ["inputs", *(n for n in table.column_names if n != "inputs")]:
        column = table.column(name).combine_chunks()
        if "list" not in str(column.type):
            if name == "inputs":
                raise source.error(
                    "column 'inputs'", f"is of type {column.type}; it must have lists"
                )
            raw[name] = _flat(source, name, column)
            continue
        values, counts = _lists(source, name, column)
        if lengths is None:
            lengths = counts
        if (counts != lengths).any():
            row = int(np.argmax(counts != lengths))
            wide = values.ndim == 1 and len({*counts.tolist()}) == 1
            if name == "targets" and wide:  # K numbers to regress per sequence
                raw[name] = values.reshape(len(counts), counts[0])
                continue
            raise source.error(
                f"column {name!r}",
                f"has {counts[row]} values in row {row + 1}, where inputs has "
                f"{lengths[row]}",
            )
        shape = (len(lengths), int(lengths.max()), *values.shape[1:])
        array = np.zeros(shape, values.dtype)
        array[np.arange(shape[1]) < lengths[:, None]] = values
        raw[name] = array
    if lengths.min() < lengths.max() and not {"lengths", "mask"} & {*raw}:
        raw["lengths"] = lengths
    return raw


def _lists(source: File, name: str, column) -> tuple[np.ndarray, np.ndarray]:
    """The values of all lists one after another, [total] or [total, C] for lists of
    lists, and how many each has."""
    from pyarrow import compute

    if column.null_count:
        raise source.error(f"column {name!r}", "has rows without a list")
    counts = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    inner = column.flatten()
    if "list" not in str(inner.type):
        return _flat(source, name, inner), counts.astype(np.int64)
    values, widths = _lists(source, name, inner)
    if len({*widths.tolist()}) > 1 or values.ndim > 1:
        raise source.error(
            f"column {name!r}",
            "has lists within lists of several lengths; every token must have as many "
            "channels",
        )
    return values.reshape(len(widths), -1), counts.astype(np.int64)


def _flat(source: File, name: str, column) -> np.ndarray:
    """A column of plain values."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise source.error(f"column {name!r}", f"is empty at value {row + 1}")
    kind = str(column.type)
    if kind.startswith("dictionary"):
        return _flat(source, name, column.dictionary_decode())
    if kind in ("string", "large_string", "string_view"):
        return np.array(column.to_pylist(), dtype=str)
    return column.to_numpy(zero_copy_only=False)
