"""python -m kernels.bench: speed and memory beside plain JAX and what the hardware
allows, on this device.

    python -m kernels.bench [--op NAME ...] [--device cpu|gpu|tpu] [--dtype bfloat16]
        [--lengths 1024,16384,...|none] [--out FILE.json] [--repeats N] [--small]

Every case is one operation at one size. The operation and its baselines are compiled,
then called in turn, repeat after repeat, so that a busy machine slows all of them
alike; the table gives medians with quartiles and their ratios. On an accelerator every
backend that can run has its own row, and so have public PyTorch kernels that are
installed beside it. Floors (the bytes that must move over the copy bandwidth, the FLOPs
over the matmul rate) are measured in the same run. Memory is XLA's own count of
temporaries.

Then every case is swept over lengths with the same number of entries at each: fewer
rows for longer sequences, then fewer channels. A form that would need more than half of
the memory, or took longer than --limit seconds at the length before, is left out, and
the table says so; one that takes so long is timed once. The figures go to FILE.json and
a picture of the sweep to FILE.png.

On Linux the C library gives large buffers back after every call, and each new one costs
page faults. Here it keeps them (`kernels.allocator`), unless MALLOC_ARENA_MAX or a like
variable is set, which speeds everything up, the plain forms most.
"""

import argparse
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kernels import allocator, dispatch
from kernels.bench import peers, plot, timing
from kernels.bench.cases import WORKLOADS, Workload
from kernels.check import certificate
from kernels.check.cases import OPERATIONS

LENGTHS = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]
KINDS = ("forward", "forward+backward")


def forms_of(case: Workload, size: dict, arguments) -> dict:
    """Name -> function; the first is the operation with its default backend."""
    forms = case.forms(size)
    subject, *plain = forms.items()
    if jax.default_backend() == "cpu":
        return forms
    backends = {
        f"{case.op} [{name}]": _on_backend(subject[1], case.op, name)
        for name, module in OPERATIONS[case.op].backends.items()
        if name != "reference" and not dispatch.elsewhere(module)
    }
    usable = {k: f for k, f in backends.items() if _traces(f, arguments)}
    return {subject[0]: subject[1], **usable, **dict(plain)}


def _on_backend(function, op, name):
    def run(*arguments):
        with dispatch.prefer(**{op: name}):
            return function(*arguments)

    return run


def _traces(function, arguments) -> bool:
    try:
        jax.eval_shape(function, *arguments)
    except ValueError:  # the backend cannot take these arguments
        return False
    return True


def run_case(
    case: Workload, size: dict, options, floor: dict, too_slow=()
) -> list[dict]:
    """A row per form, forward and with gradients; a form in `too_slow` is not run."""
    arguments = jax.device_put(
        _cast(case.make(size, np.random.default_rng(0)), options)
    )
    forms = forms_of(case, size, arguments)
    subject = next(iter(forms))
    result = jax.eval_shape(forms[subject], *arguments)
    cotangent = jnp.ones(result.shape, result.dtype)
    floor_s = least_seconds(case, size, arguments, cotangent, floor)
    rows = []
    for kind in KINDS:
        backward = kind == "forward+backward"
        inputs = (cotangent, *arguments) if backward else tuple(arguments)
        functions, by_form = {}, {}
        for name, form in forms.items():
            by_form[name] = {
                "op": case.op,
                "case": case.name,
                "size": size,
                "kind": kind,
                "form": name,
                "subject": name == subject,
                "floor_s": floor_s * (3 if backward else 1),
            }
            if name in too_slow:
                by_form[name]["left_out"] = (
                    f"over {options.limit} s at the length before"
                )
                continue
            try:
                compiled, seconds, temporary = timing.compile_function(
                    timing.with_gradients(form) if backward else form, inputs
                )
            except jax.errors.JaxRuntimeError as error:
                by_form[name]["left_out"] = str(error).splitlines()[0][:80]
                continue
            by_form[name] |= {"compile_s": seconds, "temporary_bytes": temporary}
            if temporary > timing.memory() / 2:
                by_form[name]["left_out"] = f"needs {temporary / 2**30:.0f} GiB"
            else:
                functions[name] = (compiled, inputs)
        timings = timing.measure(functions, options.repeats, options.limit)
        for name, times in timings.items():
            by_form[name] |= timing.summary(times)
        rows += by_form.values()
    return rows + peer_rows(case, arguments, options, rows)


def _cast(arguments, options):
    return jax.tree.map(
        lambda x: x.astype(jnp.dtype(options.dtype)) if x.dtype == np.float32 else x,
        arguments,
    )


def least_seconds(case, size, arguments, cotangent, floor) -> float:
    """What the hardware allows: the bytes that must move, or the FLOPs."""
    traffic = sum(x.nbytes for x in arguments) + cotangent.nbytes
    return max(
        traffic / floor["copy_bytes_per_s"],
        case.flops(size) / floor["matmul_flop_per_s"],
    )


def peer_rows(case, arguments, options, rows) -> list[dict]:
    """A row per installed peer, forward and with gradients."""
    records = []
    for peer in peers.installed(case.op, case.name):
        for kind, figures in peers.measure(peer, arguments, options.repeats).items():
            like = next(row for row in rows if row["kind"] == (kind or KINDS[0]))
            row = {k: like[k] for k in ("op", "case", "size", "kind", "floor_s")}
            row |= {"form": peer.name, "subject": False}
            if "failed" in figures:
                row["left_out"] = figures["failed"].splitlines()[0][:80]
            else:
                row["temporary_bytes"] = figures["temporary_bytes"]
                row |= timing.summary(figures["times_s"])
            records.append(row)
    return records


def compile_times(case: Workload, size: dict) -> dict[str, float]:
    """Seconds to compile both passes at L / 4 and at L: the program is one size."""
    seconds = {}
    for length in (size["L"] // 4, size["L"]):
        scaled = size | {"L": length}
        arrays = case.make(scaled, np.random.default_rng(0))
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        form = next(iter(case.forms(scaled).values()))
        result = jax.eval_shape(form, *arguments)
        _, seconds[f"L={length}"], _ = timing.compile_function(
            timing.with_gradients(form), (result, *arguments)
        )
    return seconds


def sweep(case: Workload, options, floor: dict) -> list[dict]:
    """Rows at every length; what was slow at one is not run at the next."""
    rows, too_slow = [], set()
    for length in options.lengths:
        size = case.at_length(length, options.small)
        new_rows = run_case(case, size, options, floor, too_slow)
        too_slow |= {
            row["form"] for row in new_rows if row.get("median_s", 0) > options.limit
        }
        rows += new_rows
    return rows


def table(rows: list[dict], title: str) -> Table:
    """Medians with quartiles, and the ratios of each form to its subject."""
    sheet = Table(title=title)
    for name in ("operation", "size", "pass", "form", "ms (quartiles)", "time ratio",
                 "temp MB", "temp ratio", "x floor"):  # fmt: skip
        sheet.add_column(name, no_wrap=name not in ("operation", "ms (quartiles)"))
    subjects = {_place(row): row for row in rows if row["subject"]}
    for row in sorted(rows, key=lambda row: list(subjects).index(_place(row))):
        subject = subjects[_place(row)]
        if row is subject:
            sheet.add_section()
        size = " ".join(f"{k}{v}" for k, v in row["size"].items())
        names = [f"{row['op']}: {row['case']}", size, row["kind"]]
        first = names if row is subject else ["", "", row["kind"]]
        sheet.add_row(*first, row["form"], *_figures(row, subject))
    return sheet


def _place(row):
    return row["op"], row["case"], str(row["size"]), row["kind"]


def _figures(row, subject) -> list[str]:
    if "left_out" in row:
        return [row["left_out"]]
    low, high = row["quartiles_s"]
    memory, base = row["temporary_bytes"], max(subject.get("temporary_bytes", 1), 1)
    ratio = row["median_s"] / subject["median_s"] if "median_s" in subject else None
    return [
        f"{1e3 * row['median_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
        "" if ratio is None else f"{ratio:.2f}",
        f"{memory / 1e6:.1f}",
        f"{memory / base:.1f}",
        f"{row['median_s'] / row['floor_s']:.1f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; see above."""
    options = _options(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 180
    floor = timing.floors(options.small, options.dtype)
    title = (
        f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {options.dtype}, "
        f"jax {jax.__version__}; copy {floor['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matmul {floor['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s"
    )
    console.print(title)
    cases = [case for case in WORKLOADS if not options.op or case.op in options.op]
    figures = {"rows": [], "compile_s": {}, "sweep": []}
    header = timing.environment() | {"dtype": options.dtype, "floors": floor}
    out = options.out
    for case in cases:
        size = case.small if options.small else case.size
        rows = run_case(case, size, options, floor)
        console.print(table(rows, "ratios are to the first form"))
        figures["rows"] += rows
        name = f"{case.op}: {case.name}"
        figures["compile_s"][name] = seconds = compile_times(case, size)
        listed = ", ".join(f"{length}: {s:.2f} s" for length, s in seconds.items())
        console.print(f"compile forward+backward, {listed}")
        if options.lengths:
            rows = sweep(case, options, floor)
            console.print(table(rows, "the same number of entries at every length"))
            figures["sweep"] += rows
        write(out, header | figures)  # a later case may end the process
    console.print(f"figures: {out}")
    if figures["sweep"]:
        plot.write(figures["sweep"], title, out.with_suffix(".png"))
        console.print(f"picture: {out.with_suffix('.png')}")
    return 0


def write(out: Path, figures: dict) -> None:
    """Puts the figures in the place of what stands in the file, or leaves that."""
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1))
    partial.replace(out)


def _default_out() -> Path:
    kind = re.sub(r"[^\w.-]+", "-", jax.devices()[0].device_kind)
    return Path("runs", "kernels", f"bench-{kind}.json")


def _options(argv):
    parser = _parser()
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"argument --repeats: must be >= 1, got {options.repeats}")
    if not 0 < options.limit < math.inf:
        parser.error(f"argument --limit: must be a number > 0, got {options.limit}")
    if options.lengths is None:
        options.lengths = [] if options.small else LENGTHS
    else:
        options.lengths = _lengths(parser, options.lengths)
    if options.device:
        _use(parser, options.device)
    options.out = options.out or _default_out()
    if options.out.suffix != ".json":
        parser.error(f"argument --out: must end in .json, got {options.out}")
    if reason := certificate.obstacle(options.out):
        parser.error(f"argument --out: {reason}")
    return options


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    ops = sorted({case.op for case in WORKLOADS})
    text = f"only these operations: {', '.join(ops)}"
    add("--op", choices=ops, nargs="+", metavar="NAME", help=text)
    platforms, dtypes = ("cpu", "gpu", "tpu"), ("float32", "bfloat16")
    add("--device", choices=platforms, metavar="NAME", help="cpu, gpu or tpu")
    add(
        "--dtype",
        choices=dtypes,
        default="float32",
        metavar="NAME",
        help="of the inputs: float32 (default) or bfloat16",
    )
    text = "of the sweep, such as 1024,65536; none leaves it out"
    add("--lengths", metavar="L,L,...", help=text)
    text = "no longer sequences for a form that took longer (2)"
    add("--limit", type=float, default=2, metavar="SECONDS", help=text)
    add("--out", type=Path, metavar="FILE.json", help="figures, and FILE.png beside")
    add("--repeats", type=int, default=7, metavar="N", help="of every timing (7)")
    add("--small", action="store_true", help="small sizes, no sweep")
    return parser


def _lengths(parser, text: str) -> list[int]:
    if text == "none":
        return []
    numbers = [int(n) for n in text.split(",") if re.fullmatch("[0-9]+", n)]
    if len(numbers) != text.count(",") + 1 or min(numbers) < 1:
        parser.error(
            "argument --lengths: must be none or numbers >= 1 such as 1024,65536, got "
            f"{text!r}"
        )
    return sorted(numbers)


def _use(parser, platform: str) -> None:
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platform)
    try:
        jax.devices(platform)
    except RuntimeError as problem:
        jax.config.update("jax_platforms", before)
        reason = str(problem).splitlines()[0]
        parser.error(f"argument --device: there is no {platform} here ({reason})")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    raise SystemExit(main())
