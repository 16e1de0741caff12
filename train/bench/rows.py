"""Rows of times and memory: measured beside one another, and printed."""

from rich.console import Console
from rich.table import Table

from kernels.bench import timing


def measured(case, small, repeats):
    """Rows of time and memory for one case; the first form is the subject."""
    compiled, memory = {}, {}
    for form, (function, arguments) in case(small).items():
        call, _, memory[form] = timing.compile_function(function, arguments)
        compiled[form] = (call, arguments)
    times = timing.measure(compiled, repeats)
    return [
        {"form": form, "temporary_bytes": memory[form], **timing.summary(times[form])}
        for form in compiled
    ]


def show(console, title, rows):
    table = Table("form", "ms (quartiles)", "time ratio", "temp MB", "memory ratio")
    table.title = title
    subject = rows[0]
    for row in rows:
        low, high = row["quartiles_s"]
        table.add_row(
            row["form"],
            f"{1e3 * row['median_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
            f"{row['median_s'] / subject['median_s']:.2f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes'] / max(subject['temporary_bytes'], 1):.1f}",
        )
    console.print(table)


def show_rows(console: Console, rows, column, value, title):
    """A line per form, a column per frames or context."""
    table = Table(title=title)
    table.add_column("form")
    columns = sorted({row[column] for row in rows})
    for number in columns:
        table.add_column(f"{column} {number}", justify="right")
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = {row[column]: value(row) for row in rows if row["form"] == form}
        table.add_row(form, *(cells[number] for number in columns))
    console.print(table)
