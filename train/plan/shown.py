"""A plan as a reader sees it, on a terminal."""

from collections.abc import Iterator

from rich.table import Table

from train.plan.figures import Plan, gigabytes

# JAX's own share of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another.
GPU_SHARE = 0.75


def tables(plan: Plan) -> Iterator[Table]:
    """The tables of a plan; of what was refused only what is known."""
    yield _pairs("step", _of_step(plan))
    yield _pairs("memory of one device", _of_memory(plan))
    if plan.seconds is None or plan.refused:
        return
    yield _exchanges(plan)
    yield _kernels(plan)


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    sheet = Table(title=title, show_header=False, title_justify="left")
    sheet.add_column(no_wrap=True)
    sheet.add_column()
    for name, value in rows:
        sheet.add_row(name, value)
    return sheet


def _of_step(plan: Plan) -> list[tuple[str, str]]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = [
        ("layer", plan.model),
        ("parameters", f"{plan.parameters:,}"),
        ("devices", f"{plan.devices} x {plan.kind}"),
        ("mesh", mesh),
        ("batch", f"{plan.batch} rows"),
    ]
    if plan.seconds is not None:
        rows.append(("compiled in", f"{plan.seconds:.1f} s"))
    if plan.products is not None:
        said = "matrix products, convolutions and transforms of all devices, as written"
        rows.append(("FLOPs per step", f"{plan.products:.3g} ({said})"))
    once = ", of every loop one run" if plan.loops else ""
    for name, count in (("FLOPs", plan.flops), ("bytes moved", plan.moved)):
        if count is not None:
            said = f"of one device, by {plan.costs_from}{once}"
            rows.append((f"{name}, counted", f"{count:.3g} ({said})"))
    return rows


def _of_memory(plan: Plan) -> list[tuple[str, str]]:
    rows = [(name, gigabytes(size)) for name, size in plan.held.items()]
    if plan.arguments is not None:
        padding = plan.arguments - sum(plan.held.values())
        rows.append(("together, as laid out", gigabytes(plan.arguments)))
        if padding < 0:  # what the step does not read is left out
            rows[-1] = ("together, without what is not read", rows[-1][1])
        rows.append(("temporaries", gigabytes(plan.temporaries)))
        if plan.activations is not None:
            said = f"at most {gigabytes(plan.activations)}"
            rows.append(("  of them activations, kept for the backward pass", said))
            said = f"at most {gigabytes(plan.held.get('parameters', 0))}"
            rows.append(("  of them gradients", said))
        rows.append(("outputs in no argument's place", gigabytes(plan.outputs)))
        rows.append(("program", gigabytes(plan.program)))
    if plan.needed is not None:
        rows.append(("needed", gigabytes(plan.needed)))
    if plan.memory is not None:
        rows.append(("there is", gigabytes(plan.memory)))
    if plan.free is not None:
        rows.append(("free", gigabytes(plan.free)))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.refused:
        verdict += f": {plan.refused}"
    return [*rows, ("verdict", verdict)]


def _exchanges(plan: Plan) -> Table:
    sheet = Table(title="collectives, of one device", title_justify="left")
    for name in ("kind", "in the program", "per step", "bytes per step", "largest"):
        sheet.add_column(name)
    for kind, found in plan.exchanged().items():
        least = "" if found["exact"] else "at least "
        most = next(one for one in plan.collectives if one.kind == kind)
        sheet.add_row(
            kind,
            str(found["count"]),
            f"{least}{found['runs']}",
            f"{least}{gigabytes(found['bytes'])}",
            f"{gigabytes(most.size)} x {most.runs.count}",
        )
    if not plan.collectives:
        sheet.add_row("none", "0", "0", gigabytes(0), "-")
    return sheet


def _kernels(plan: Plan) -> Table:
    sheet = Table(title="kernels", title_justify="left")
    for name in ("operation", "backend", "why"):
        sheet.add_column(name)
    for op, (backend, why) in sorted(plan.kernels.items()):
        sheet.add_row(op, backend, why)
    return sheet


def lines(plan: Plan) -> list[str]:
    """What else there is to say of a plan, under its tables."""
    found = []
    if plan.calls:
        runs = plan.called().count
        exact = "" if plan.called().exact else "at least "
        found.append(
            f"calls of our kernels: {len(plan.calls)} in the program, {exact}{runs} in "
            "a step; what happens inside is in no count of the compiler"
        )
    elif not plan.refused and plan.seconds is not None:
        found.append("calls of our kernels: none")
    if not plan.fits:
        return found
    gpu = plan.memory is not None and plan.machine.startswith("gpu:")
    if gpu and plan.needed > GPU_SHARE * plan.memory:
        found.append(
            f"JAX takes {GPU_SHARE:.0%} of a GPU's memory by default: set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION to more"
        )
    return found
