"""What was compiled for a target: its file, and the table that a reader sees.

`kernels/results/compiled/<target>.json` has
    format     1
    target     its name
    made       when, in UTC
    versions   of Python and the packages that make the machine code
    begun      programs whose compilation has begun, and how often without an end
    rows       a list of `ahead.Row`

A row stays as long as the sources of its operation and the versions are the same, so a
run that was ended goes on where it was. Where the sources have changed, it stays if
they still give the compiler the same program.
"""

import concurrent.futures
import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

from kernels.check import ahead, certificate, peers
from kernels.check.ahead import Program, Row
from kernels.check.cases import OPERATIONS
from kernels.check.targets import Target
from kernels.dispatch import OnPlatform

FORMAT = certificate.FORMAT
FOLDER = certificate.HERE / "results" / "compiled"
PAGE = certificate.HERE / "results" / "README.md"
PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-nvcc"),
}
# Compilers work outside Python's lock, but where Triton keeps what it has compiled is a
# setting of the process.
AT_ONCE = {"tpu": 2, "gpu": 1}
DEATHS = 2  # of the process while it compiled a program, before that counts as failed


def path(target: Target) -> Path:
    """Of the file of a target: in this repository, or below the working directory
    where there is only the package."""
    folder = FOLDER if PAGE.exists() else Path("runs", "kernels", "compiled")
    return folder / f"{target.name.replace(':', '-')}.json"


def versions(target: Target) -> dict[str, str | None]:
    """Of Python and of all that compiles for a target."""
    found = certificate.versions()
    for name in PACKAGES[target.platform]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def stored(target: Target, place: Path) -> tuple[dict, list[Row], dict[str, int]]:
    """Versions, rows and begun of the file of a target.

    Raises:
        ValueError: it is no such file.
    """
    try:
        found = json.loads(place.read_text())
        if found["format"] != FORMAT or found["target"] != target.name:
            raise ValueError(f"format {found['format']}, target {found['target']}")
        rows = [Row(**row) for row in found["rows"]]
        begun = {str(key): int(n) for key, n in found["begun"].items()}
        return dict(found["versions"]), rows, begun
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{place} must be a table of {target.name} that this command wrote, got "
            f"{type(problem).__name__}: {problem}"
        ) from problem


class File:
    """The rows of a target, and where they are kept: None keeps them nowhere.

    Raises:
        ValueError: the file there is none of this format.
    """

    def __init__(self, target: Target, place: Path | None):
        self.target, self.place = target, place
        self._lock = threading.Lock()
        self.rows: dict[tuple, Row] = {}
        self.begun: dict[str, int] = {}
        self.versions = versions(target)
        if place is not None and place.exists():
            made_by, rows, begun = stored(target, place)
            if made_by == self.versions:
                self.rows, self.begun = {row.key: row for row in rows}, begun

    def begin(self, row: Row) -> None:
        """Notes that a program is being compiled."""
        name = " / ".join(row.key)
        with self._lock:
            self.begun[name] = self.begun.get(name, 0) + 1
            self._write()

    def died(self, row: Row) -> bool:
        """Whether this process died too often while it compiled that."""
        return self.begun.get(" / ".join(row.key), 0) >= DEATHS

    def add(self, row: Row) -> None:
        """Keeps the row of a program that was compiled."""
        with self._lock:
            self.begun.pop(" / ".join(row.key), None)
            self.rows[row.key] = row
            self._write()

    def keep(self, rows: Iterable[Row]) -> None:
        """Forgets all rows but these, and what was begun."""
        with self._lock:
            self.rows, self.begun = {row.key: row for row in rows}, {}
            self._write()

    def interrupted(self) -> None:
        """What is being compiled ends with this process, and not through its fault."""
        with self._lock:
            self.begun.clear()
            self._write()

    def _write(self) -> None:
        if self.place is None:
            return
        certificate.write(
            self.place,
            {
                "target": self.target.name,
                "versions": self.versions,
                "begun": self.begun,
                "rows": [
                    row.as_json() for row in sorted(self.rows.values(), key=ahead.order)
                ],
            },
        )


def run(
    file: File,
    programs: Sequence[Program],
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The rows of the programs, compiled where the file has them not."""
    waiting = []
    for program in programs:
        row = program.row
        if file.died(row):
            reason = f"the process died {DEATHS} times while it compiled this"
            file.add(ahead.failed(row, reason))
        elif row.key not in file.rows:
            waiting.append(program)
    done = len(programs) - len(waiting)
    before = {row.subject: row for row in file.rows.values()}

    def compiled(program):
        file.begin(program.row)
        known = before.get(program.row.subject)
        return ahead.compile_row(file.target, program, known)

    with concurrent.futures.ThreadPoolExecutor(
        AT_ONCE[file.target.platform]
    ) as executor:
        try:
            for job in concurrent.futures.as_completed(
                [executor.submit(compiled, program) for program in waiting]
            ):
                row, done = job.result(), done + 1
                file.add(row)
                what = row.op, row.backend, row.dtype, row.size, row.part, row.verdict
                progress(
                    f"{file.target.name}: {done} of {len(programs)}: {' '.join(what)}"
                )
        except KeyboardInterrupt:
            file.interrupted()
            raise
        finally:
            executor.shutdown(cancel_futures=True)
    return [file.rows[program.row.key] for program in programs]


# For a reader.


def megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def lines(rows: Iterable[Row]) -> list[str]:
    """One for everything that is not as it should be, or was not taken."""
    found = {}
    for row in rows:
        if row.verdict != "compiled":
            subject = row.op, row.backend, row.dtype, row.verdict, row.reason
            found.setdefault(subject, []).append(f"{row.size}: {row.case}, {row.part}")
    return [
        f"{verdict}: {op}, backend {backend}, {dtype} ({cases[0]}"
        + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
        + f"): {reason}"
        for (op, backend, dtype, verdict, reason), cases in found.items()
    ]


HEADER = (
    "operation", "backend", "case", "dtype", "seconds", "arguments + outputs",
    "temporaries", "moved", "fast memory or registers",
)  # fmt: skip


def table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """HEADER's columns at benchmark size without options: every variant of a kernel,
    the first of every other backend; forward / with the gradient where there are two
    figures, bytes in MB."""
    found = {}
    for row in rows:
        operation = OPERATIONS[row.op]
        variant, _, options = row.case.partition(", L=")
        shown = isinstance(operation.backends[row.backend], OnPlatform)
        shown = shown or variant == operation.variants[0]
        if row.size == "benchmark" and "," not in options and shown:
            pair = found.setdefault((row.op, row.backend, row.case, row.dtype), {})
            pair[row.part] = row
    return [_line(key, pair) for key, pair in found.items() if len(pair) == 2]


PEER_HEADER = (
    "operation", "variant", "sizes", "arguments + outputs", "temporaries, ours",
    "temporaries, theirs", "package",
)  # fmt: skip


def beside_peers(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """PEER_HEADER's columns of the work in `peers`, forward / with all gradients, in
    MiB; ours by the first backend that takes it."""
    found = {}
    for row in rows:
        if row.size == "peer" and row.verdict == "compiled":
            variant = row.case.partition(", L=")[0]
            found.setdefault((row.op, variant), {}).setdefault(row.part, row)
    return [
        _beside(work, *(found[work.op, work.variant][part] for part in ahead.PASSES))
        for work in peers.WORK
        if {*found.get((work.op, work.variant), ())} == {*ahead.PASSES}
    ]


def _beside(work, forward, both):
    def mebibytes(count):
        return f"{count / 2**20:.0f}"

    sizes = " ".join(f"{name}{size}" for name, size in work.sizes.items())
    ours = f"{mebibytes(forward.temporaries)} / {mebibytes(both.temporaries)}"
    return (
        work.op,
        work.variant,
        f"L{peers.LENGTH} {sizes}, {peers.DTYPE}",
        f"{mebibytes(forward.arguments)} + {mebibytes(forward.outputs)}",
        f"{ours} ({forward.backend})",
        f"{work.forward} / {work.gradient}",
        work.package,
    )


def _line(key, pair):
    forward, both = (pair[part] for part in ahead.PASSES)
    if forward.verdict == both.verdict == "not taken":
        return (*key, "not taken", *["-"] * (len(HEADER) - 5))

    def two(name, shown=megabytes):
        return " / ".join(
            shown(getattr(row, name)) if row.verdict == "compiled" else row.verdict
            for row in (forward, both)
        )

    size = (forward.arguments or 0) + (forward.outputs or 0)
    return (
        *key,
        two("seconds", lambda x: f"{x:.1f}"),
        megabytes(size),
        two("temporaries"),
        two("moved") if forward.moved is not None else "-",
        _fast(forward, both),
    )


def _fast(forward, both):
    if both.vmem is not None:
        return " / ".join(
            f"{(row.vmem or 0) / 2**20:.1f} MiB" for row in (forward, both)
        )
    if both.registers is not None:
        return f"{both.registers}, {both.spilled_bytes} B spilled"
    return "-"


BEGIN, END = "<!-- compiled:begin -->", "<!-- compiled:end -->"


def write_page(targets: Iterable[Target], place: Path = PAGE) -> None:
    """Puts the tables of the targets that have a file between BEGIN and END of a page,
    where there is one.

    Raises:
        ValueError: the page has no such place.
    """
    if not place.exists():
        return
    text = place.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{place} must have {BEGIN} and {END}")
    parts = [
        _section(target, *stored(target, path(target))[:2])
        for target in targets
        if path(target).exists()
    ]
    certificate.replace(place, f"{before}{begin}\n{''.join(parts)}{end}{after}")


def _section(target, made_by, rows):
    versions = ", ".join(f"{name} {x}" for name, x in made_by.items() if x)
    rows = sorted(rows, key=ahead.order)
    text = f"### {target.name}\n\n{versions}\n\n{_markdown(HEADER, table(rows))}\n\n"
    if beside := beside_peers(rows):
        text += f"{BESIDE}\n\n{_markdown(PEER_HEADER, beside)}\n\n"
    return text


BESIDE = """The same work by other packages, compiled ahead of time for the same device
(`kernels/check/peers.py`): temporaries in MiB, forward / with all gradients."""


def _markdown(header, lines):
    body = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)
