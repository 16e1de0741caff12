"""python -m kernels.check: every backend against its definition, on this machine.

Values, final state, transition and the gradient by every argument, against
`reference.py` in float64 on the same numbers, within the limits of
`kernels/tolerance.py`. By default every two of variant, length, initial state, reset,
reverse and dtype are tried together, which takes about 10 minutes on two CPU cores;
--quick tries one of each, about 1 minute; --full all combinations, at lengths of 4096
and more too, hours.

    python -m kernels.check [--op NAME ...] [--backend NAME ...] [--dtype NAME ...]
                            [--full | --quick] [--out FILE.json]
                            [--compile TARGET ...]

How a backend was tried is said in the table and in the certificate:
    run          computed on this device, as it is when it is chosen
    interpreted  computed on the CPU, Pallas in interpret mode and Triton in Triton's
                 interpreter (a process of its own, at short lengths)
    lowered      lowered for a TPU, forward and backward, at real sizes; not run
    compiled     compiled to machine code for sm_80 or sm_90 at real sizes; not run. The
                 figures are the largest of all kernels.

--compile has the compilers of accelerators that need not be here (libtpu, JAX's plugin
for CUDA; `make compiled` gets them) compile every operation instead, forward and
gradient, in float32 and bfloat16, and says how long that takes and how many bytes it
needs. What they refuse, what does not fit into fast memory and what spills registers
fails. The tables are kernels/results/compiled/<target>.json and in
kernels/results/README.md; what stands there of the same sources is not compiled again.
--quick compiles our own kernels at one size, all of them, and writes nothing.

The certificate goes to --out, or, when everything was checked, to
runs/kernels/<device kind>.json, where `python -m train.main` finds it and leaves out of
the default choice what failed. The exit code is 1 where something failed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels import compat
from kernels.check import ahead, certificate, compiled, targets
from kernels.check.cases import DTYPES, OPERATIONS
from kernels.check.conformance import Row, Worst, run
from kernels.check.targets import TARGETS

SHOWN = 5  # failures of one row


def table(rows: Iterable[Row]) -> Table:
    """A line per row, grouped by operation."""
    sheet = Table(title="largest error over largest value, and its limit")
    for name in ("operation", "backend", "how", "dtype", "cases", "values", "gradients",
                 "kernels", "verdict"):  # fmt: skip
        sheet.add_column(name, no_wrap=name in ("operation", "backend", "dtype"))
    before = None
    for row in rows:
        if row.op != before:
            sheet.add_section()
        verdict = row.verdict
        if row.failures:
            verdict = "[red]FAILED[/red]"
        elif row.cases and row.not_taken:
            verdict += f", {len(row.not_taken)} not taken"
        sheet.add_row(
            row.op if row.op != before else "",
            row.backend,
            row.how,
            row.dtype,
            str(row.cases),
            _shown(row.value),
            escape(_shown(row.gradient, named=True)),
            escape(_kernels(row.kernels)),
            verdict,
        )
        before = row.op
    return sheet


def _shown(worst: Worst | None, named: bool = False) -> str:
    if worst is None:
        return "-"
    text = f"{worst.error:.1e} / {worst.limit:.0e}"
    return f"{text} ({worst.name})" if named else text


def _kernels(kernels: list[dict]) -> str:
    if not kernels:
        return "-"
    if "registers" not in kernels[0]:
        return "forward {}, backward {}".format(
            max(k["forward"] for k in kernels),
            max(k["both_passes"] - k["forward"] for k in kernels),
        )
    maxima = {
        name: max(kernel[name] for kernel in kernels)
        for name in ("registers", "spilled_bytes", "shared_bytes")
    }
    return (
        f"{maxima['registers']} registers, {maxima['spilled_bytes']} B spilled, "
        f"{maxima['shared_bytes']} B shared"
    )


def reasons(rows: Iterable[Row]) -> list[str]:
    """One line for every reason why something was not tried, with a case."""
    lines = {}
    for row in rows:
        for text in row.not_taken:
            case, _, reason = text.partition(": ")
            lines.setdefault((row.op, row.backend, row.how, reason), case)
    return [
        f"not run: {op}, backend {backend} ({how}; {case}): {reason}"
        for (op, backend, how, reason), case in lines.items()
    ]


def failures(rows: Iterable[Row]) -> list[str]:
    """A line per failure, the first SHOWN of each row."""
    lines = []
    for row in rows:
        start = f"FAILED: {row.op}, backend {row.backend}, {row.dtype} ({row.how}): "
        lines += [start + failure for failure in row.failures[:SHOWN]]
        if len(row.failures) > SHOWN:
            lines.append(f"{start}and {len(row.failures) - SHOWN} more")
    return lines


def contents(rows: Sequence[Row], coverage: str) -> dict:
    """What the certificate says; see `certificate`."""
    folders = {row.op: OPERATIONS[row.op].folder for row in rows}
    return {
        "coverage": coverage,
        "device": certificate.device(),
        "versions": certificate.versions(),
        "sources": {
            op: certificate.source_hash(folder) for op, folder in folders.items()
        },
        "results": [row.as_json() for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see above. The exit code is 1 where something failed."""
    options = _parse(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    if options.compile:
        return _compile(console, options)
    operations = [OPERATIONS[name] for name in options.op]
    coverage = "quick" if options.quick else "full" if options.full else "default"
    device = certificate.device()
    console.print(f"{device['kind']} ({device['driver']}), jax {jax.__version__}")
    with console.status("") as status:
        rows = run(operations, options.backend, options.dtype, coverage, status.update)
    console.print(table(rows))
    for line in [*reasons(rows), *failures(rows)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.out is None:
        print("no certificate of a part; --out FILE writes one all the same")
    else:
        label = f"{coverage}, part" if options.part else coverage
        certificate.write(options.out, contents(rows, label))
        print(f"certificate: {options.out}")
    return int(any(row.failures for row in rows))


def _compile(console, options) -> int:
    """--compile; the exit code is 1 where something failed."""
    failed = 0
    for target in options.compile:
        if reason := target.missing():
            print(f"not here: {reason}")
        else:
            failed += _compile_for(target, console, options)
    if not (options.part or options.quick or options.out):
        compiled.write_page(TARGETS.values())
    return int(failed > 0)


def _compile_for(target, console, options) -> int:
    """How many programs failed."""
    operations = [OPERATIONS[name] for name in options.op]
    programs = ahead.programs(
        target, operations, options.backend, options.dtype, options.quick
    )
    kept = None if options.quick else compiled.path(target)
    try:
        file = compiled.File(target, options.out or kept)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    start = time.perf_counter()
    with console.status("") as status:
        # whoever reads a file while an hour passes sees how far it is
        tell = status.update if console.is_terminal else print
        rows = compiled.run(file, list(programs), tell)
    if not (options.part or options.quick):
        file.keep(rows)
    sheet = Table(*compiled.HEADER, title=target.name)
    for line in compiled.table(rows):
        sheet.add_row(*line)
    console.print(sheet)
    if beside := compiled.beside_peers(rows):
        sheet = Table(*compiled.PEER_HEADER, title="temporaries in MiB, beside peers")
        for line in beside:
            sheet.add_row(*line)
        console.print(sheet)
    for line in compiled.lines(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed, seconds = sum(row.bad for row in rows), time.perf_counter() - start
    print(f"{target.name}: {len(rows)} programs, {failed} failed, {seconds:.0f} s")
    if file.place is not None:
        print(f"table: {file.place}")
    return failed


def _parse(argv):
    backends = list(dict.fromkeys(b for o in OPERATIONS.values() for b in o.backends))
    parser = argparse.ArgumentParser(
        prog="python -m kernels.check",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for flag, names, text in (
        ("op", list(OPERATIONS), "only these operations"),
        ("backend", backends, "only these backends"),
        ("dtype", DTYPES, "only these dtypes"),
    ):
        parser.add_argument(
            f"--{flag}", nargs="+", action="extend", choices=names, metavar="NAME",
            help=f"{text}: {', '.join(names)}",
        )  # fmt: skip
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--full", action="store_true", help="all combinations: hours")
    how_much.add_argument(
        "--quick", action="store_true", help="one case of each: 1 minute"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where the certificate goes"
    )
    parser.add_argument(
        "--compile", nargs="+", choices=list(TARGETS), metavar="TARGET", default=[],
        help=f"for accelerators that need not be here: {', '.join(TARGETS)}",
    )  # fmt: skip
    options = parser.parse_args(argv)
    options.compile = [TARGETS[name] for name in dict.fromkeys(options.compile)]
    options.part = bool(options.op or options.backend or options.dtype)
    dtypes = list(DTYPES)
    if options.compile:
        _check_compile(parser, options)
        targets.prepare()
        dtypes = list(ahead.DTYPES)
    elif compat.platform() == "tpu":
        dtypes.remove("float64")  # a TPU has none
    for flag, default in (("op", OPERATIONS), ("backend", backends), ("dtype", dtypes)):
        values = getattr(options, flag)
        setattr(options, flag, list(dict.fromkeys(values or default)))
    available = sorted({name for op in options.op for name in OPERATIONS[op].backends})
    if not {*available} & {*options.backend}:
        parser.error(
            f"argument --backend: {', '.join(options.op)} has {', '.join(available)}, "
            f"not {', '.join(options.backend)}"
        )
    if options.out is None and not (options.part or options.quick or options.compile):
        options.out = certificate.default_path()
    if options.out is not None and (reason := certificate.obstacle(options.out)):
        parser.error(f"argument --out: {reason}")
    try:
        jax.devices("cpu")
    except RuntimeError:
        parser.error(
            "JAX_PLATFORMS must leave the CPU, where the definitions are computed, "
            f"such as cuda,cpu; got {os.environ.get('JAX_PLATFORMS')}"
        )
    return options


def _check_compile(parser, options):
    if options.full:
        parser.error("argument --full: not with --compile")
    if "float64" in (options.dtype or ()):
        parser.error("argument --dtype: --compile takes float32 and bfloat16")
    if options.out is not None and len(options.compile) > 1:
        parser.error("argument --out: one file, and --compile names several targets")
    if all(reasons := [target.missing() for target in options.compile]):
        parser.error(f"argument --compile: {'; '.join(reasons)}")


if __name__ == "__main__":
    sys.exit(main())
