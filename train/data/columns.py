"""Sequences from a Parquet file, one per row.

Its columns are called as the keys of an NPZ, lists where the NPZ has an axis of tokens
(they may differ in length), or lists of lists for channels. Or they are numbers in
time order, called as one likes, the last one being the target, as in a CSV.
"""

import re
from collections.abc import Sequence

import numpy as np

from train import settings
from train.data import tables
from train.data.source_file import File

INDEX = r"__index_level_\d+__"  # of pandas
WORDS = r"(large_)?string(_view)?|dictionary<values=(large_)?string.*"


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
            metadata = file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            size = max(size, 8 * metadata.num_rows * metadata.num_columns)
            settings.check_memory(source.key, size, f"{source.path}, unpacked,")
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{source.path}: not a readable Parquet file ({reason})"
        ) from error
    # What pandas keeps of the index of a frame that was filtered is no data.
    indices = [
        field.name
        for field in table.schema
        if re.fullmatch(INDEX, field.name) and not _is_moment(field)
    ]
    return table.drop_columns(indices) if indices else table


def _refuse_moments(source: File, table) -> None:
    """Raises a `ValueError` for a table that has a column of dates."""
    for column, field in enumerate(table.schema):
        words = re.fullmatch(WORDS, str(field.type)) and tables.are_dates(
            table.column(column).to_pylist()
        )
        if _is_moment(field) or words:
            raise tables.forecasting(source, column, field.name)


def _is_moment(field) -> bool:
    return str(field.type).startswith(("timestamp", "date", "time"))


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
