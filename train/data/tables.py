"""Sequences from a table of comma-separated values, one per row.

A row has the numbers of a sequence in time order and then, as the last cell that is
not empty, its target: a number, or the name of its class. Rows may differ in length;
short ones are padded on the right. The first row is a header where

- none of the cells before its last one is a number,
- or its last one is a word and those of all other rows are numbers,
- or it counts its columns, 0, 1, 2, ..., and its last is a word that no other row has
  (which is how pandas writes columns that have no names).
"""

import csv
import math
import re
from collections.abc import Sequence

import numpy as np

from train.data import cast
from train.data.source_file import File

# Every form has a separator that no number has, so that 1949.01 and 20160701 are none.
DATE = re.compile(
    r"""\s*(
        YYYY (?P<after>[-/.]) MM (?P=after) DD ([T ]+ HOUR)?
      | DD (?P<between>[-/.]) (DD|MM) (?P=between) YYYY ([T ]+ HOUR)?
      | DD / DD / \d\d ([ ]+ HOUR)?
      | YYYY [-/] MM | MM [-/] YYYY                                # 1949-01, 01/1949
      | (WEEKDAY,?[ ]+)? DD [- /.]+ NAME [- /.,]+ (YYYY|\d\d) ([T ]+ HOUR)?
      | (WEEKDAY,?[ ]+)? NAME [- ] DD,? [ ]+ YYYY ([ ]+ HOUR)?     # Jul 1, 2016
      | YYYY [- /]? NAME ([- /]? DD)? ([ ]+ HOUR)?
      | NAME [- /.']+ (YYYY|\d\d)                                  # Jan-49
      | YYYY MM DD T HOUR                                          # 20160701T0000Z
      | YYYY -? (W\d\d (-?\d)? | Q[1-4])
      | HOUR
    )\s*""".replace(
        "WEEKDAY", r"(mon|tues?|wed(nes)?|thu(rs?)?|fri|sat(ur)?|sun)(day)?"
    )
    .replace(
        "NAME",
        r"(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|"
        r"sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?)",
    )
    .replace(
        "HOUR",
        r"([01]?\d|2[0-4]) (:[0-5]\d | (?<=T\d\d)[0-5]\d) (:?[0-6]\d([.,]\d+)?)?"
        r"[ ]* ([ap]\.?m\.?)? [ ]* (Z|UTC|GMT|[+-]\d\d(:?\d\d)?)?",
    )
    .replace("YYYY", r"(1[5-9]|2\d)\d\d")
    .replace("MM", r"(1[0-2]|0?[1-9])")
    .replace("DD", r"(3[01]|[12]\d|0?[1-9])(st|nd|rd|th)?"),
    re.VERBOSE | re.IGNORECASE,
)
LONGEST_DATE = 50  # characters: "Wednesday, 30 September 2026 12:00:00.000000 +00:00"
BAD_DATES = 0.1  # share of cells in a column of dates that may be none
SAMPLE = 32  # rows that tell which columns to look at

ALIKE = 0.8  # correlation from which on neighbours are moments of one series
FEWEST = 30  # rows that tell

Cells = list[str]


def read_csv(source: File) -> dict[str, np.ndarray]:
    """inputs, targets and lengths of a CSV file.

    Raises:
        ValueError: names the row and the column, what stands there and what may.
    """
    lines = _lines(source)
    # What stands last is a target, whose words may look like times: 16:9, 2016Q1.
    _refuse_dates(source, [(line, cells[:-1]) for line, cells in lines])
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
    lines = []
    try:
        with open(source.path, newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                while cells and not cells[-1].strip():
                    cells.pop()
                if cells:
                    lines.append((line, cells))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source.path}: not a UTF-8 CSV file ({error})") from error
    return lines


def _is_header(lines: list[tuple[int, Cells]]) -> bool:
    (*inputs, target), others = lines[0][1], [cells for _, cells in lines[1:]]
    if any(cell.strip() for cell in inputs) and not any(map(_is_number, inputs)):
        return True
    if _is_number(target):
        return False
    if others and all(_is_number(cells[-1]) for cells in others):
        return True
    counted = [cell.strip() for cell in inputs] == [*map(str, range(len(inputs)))]
    alone = all(cells[-1].strip() != target.strip() for cells in others)
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
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    for column in range(max(map(len, rows), default=0)):
        dates = sum(map(_is_date, _column(sample, column)))
        if 2 * dates > len(sample) and are_dates(_column(rows, column)):
            name = lines[0][1][column : column + 1] if len(lines) > 1 else []
            raise forecasting(source, column, "".join(name))


def _column(rows: Sequence[Cells], column: int) -> list[str]:
    """The cells of a column, "" where a row is shorter."""
    return [cells[column] if len(cells) > column else "" for cells in rows]


def _is_date(cell: str | None) -> bool:
    if cell is None or _is_number(cell):  # which is fast
        return False
    cell = cell.strip()
    return len(cell) <= LONGEST_DATE and DATE.fullmatch(cell) is not None


def are_dates(cells: Sequence[str | None]) -> bool:
    """Whether nearly all cells of a column are dates: one may always be none, and of
    many some, as cells are empty, damaged or a note."""
    others = len(cells) - sum(map(_is_date, cells))
    return others <= max(1, BAD_DATES * len(cells)) and 2 * others < len(cells)


def forecasting(source: File, column: int, name: str) -> ValueError:
    """What is said of a file whose column holds dates."""
    called = f" ({name.strip()[:40]})" if name and not _is_date(name) else ""
    return ValueError(
        f"{source.path}: column {column + 1}{called} holds dates: this is a "
        "forecasting file, a table with one moment per row, and is not read yet; "
        "sequences must stand one per row, numbers in time order and then the target"
    )


def _sequence(source: File, line: int, cells: Cells, target: bool = True) -> list:
    if not target and not _is_number(cells[-1]):
        raise source.error(
            f"row {line}, column {len(cells)}",
            f"is {cells[-1][:40]!r}; it must be a number: what is asked about has no "
            "target, leave that column out",
        )
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


def is_one_series(inputs: np.ndarray, targets: np.ndarray) -> bool:
    """Whether the rows of a table [n, L] with targets [n] look like the moments of one
    series: each is much like the row before, and more so than the cells of one row are
    like one another."""
    if len(inputs) < FEWEST or inputs.ndim != 2:
        return False
    numbers = targets.dtype.kind in "biuf" and targets.ndim == 1
    columns = np.column_stack([inputs, targets] if numbers else [inputs])
    columns = columns[:, (columns != columns[0]).any(axis=0)]
    if not columns.size:
        return False
    centred = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    neighbours = (centred[1:] * centred[:-1]).mean(axis=0)
    if np.median(neighbours) < ALIKE:
        return False
    down = np.abs(np.diff(inputs, axis=0)).mean()
    across = np.abs(np.diff(inputs, axis=1)).mean() if inputs.shape[1] > 1 else np.inf
    return bool(down < across)
