"""The table of docs/plan.md: every workload on every machine, from files that are kept.

`train/plan/results/<machine>.json` has
    format     1
    machine    its name
    versions   of Python and of all that compiled
    rows       workload -> its plans: as it is, and where that does not fit, the one
               after the change that was found, see `figures.Plan`
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from kernels.check import compiled, targets
from train import files
from train.plan.figures import gigabytes
from train.plan.remedies import said
from train.plan.workloads import WORKLOADS, get

FORMAT = 1
MACHINES = [*dict.fromkeys(m for work in WORKLOADS.values() for m in work.machines)]
FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
BEGIN, END = "<!-- plans:begin -->", "<!-- plans:end -->"
HEADER = (
    "workload", "parameters", "global batch", "changed", "state and batch",
    "temporaries", "needed of", "collectives of a step", "kernels called", "compiled",
)  # fmt: skip


def make(names: Iterable[str] = (), machines: Iterable[str] = ()) -> int:
    """Plans workloads, by default all, on those machines whose compilers are here, each
    in a process of its own, keeps them and writes the page; 1 if one failed.

    Raises:
        ValueError: an unknown workload; no page or no compiler is here.
    """
    names = [*names] or [*WORKLOADS]
    for name in names:
        get(name)
    if not PAGE.exists():
        raise ValueError(f"--table needs the repository, whose {PAGE} is not there")
    here, failed = 0, 0
    for machine in [*machines] or MACHINES:
        target = targets.find(machine)
        if reason := target.missing():
            print(f"not here: {reason}", flush=True)
            continue
        here += 1
        for name in (name for name in names if machine in get(name).machines):
            plans = _planned(name, machine)
            failed += plans is None
            if plans is not None:
                keep(machine, name, plans, compiled.versions(target))
                PAGE.write_text(written(PAGE.read_text(), FOLDER))
    if not here:
        raise ValueError("--table needs a compiler, which `make compiled` gets")
    print(f"page: {PAGE}")
    return int(failed > 0)


def _planned(name: str, machine: str) -> list[dict] | None:
    """The summaries of a workload's plans; None if they could not be made."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        command = [sys.executable, "-m", __package__, f"--workload={name}"]
        command += [f"--target={machine}", f"--json={file}"]
        done = subprocess.run(command)
        if not file.exists():
            print(f"{machine}: {name} failed with exit code {done.returncode}")
            return None
        return [_summary(plan) for plan in json.loads(file.read_text())]


def _summary(plan: Mapping) -> dict:
    """A plan without its single collectives and calls, of which there are hundreds."""
    left_out = ("collectives", "calls")
    return {key: value for key, value in plan.items() if key not in left_out}


def keep(machine: str, name: str, plans: list[dict], versions: Mapping) -> None:
    """Puts a workload's plans into the file of a machine; what other versions have made
    goes."""
    place = path(machine)
    stored = files.read_json(place) or {}
    rows = stored.get("rows", {}) if stored.get("versions") == versions else {}
    rows[name] = plans
    rows = {name: rows[name] for name in WORKLOADS if name in rows}
    content = dict(format=FORMAT, machine=machine, versions=versions, rows=rows)
    place.parent.mkdir(exist_ok=True)
    files.write_atomically(place, json.dumps(content, indent=1) + "\n")


def path(machine: str, folder: Path | None = None) -> Path:
    """Of the file of a machine."""
    return (folder or FOLDER) / f"{machine.replace(':', '-')}.json"


def written(text: str, folder: Path) -> str:
    """The page with its tables as the files in a folder have them.

    Raises:
        ValueError: it has no place for them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have {BEGIN} and {END}")
    stored = [files.read_json(path(machine, folder)) for machine in MACHINES]
    sections = [_section(content) for content in stored if content]
    sections = sections or ["No workload has been planned yet.\n"]
    return f"{before}{begin}\n{''.join(sections)}{end}{after}"


def _section(content: Mapping) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v)
    text = f"### {content['machine']}\n\n{versions}\n\n"
    by_devices: dict[int, list] = {}
    for name, plans in content["rows"].items():
        lines = by_devices.setdefault(get(name).sequence, [])
        lines.append(_line(name, plans[-1]))
    for devices, lines in sorted(by_devices.items()):
        if devices > 1:
            text += f"Every sequence over {devices} devices (`mesh.sequence`):\n\n"
        rows = [HEADER, ["---"] * len(HEADER), *lines]
        text += "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n"
    return text


def _line(name: str, plan: Mapping) -> tuple[str, ...]:
    def size(key):
        return "-" if plan[key] is None else gigabytes(plan[key])

    changes = said(plan["changes"]).replace("--config.", "")
    exchanged = [
        f"{kind} x {found['runs']}{'' if found['exact'] else ' at least'}, "
        f"{gigabytes(found['bytes'])}"
        for kind, found in plan["exchanged"].items()
    ]
    called = f"{plan['calls_in_program']} ({plan['calls_per_step']} times)"
    verdict = f"{size('needed')} of {size('memory')}"
    return (
        WORKLOADS[name].title,
        f"{plan['parameters'] / 1e6:.1f} M",
        str(plan["batch"]),
        f"`{changes}`" if changes else "-",
        gigabytes(sum(plan["held"].values())),
        size("temporaries"),
        verdict if plan["fits"] else f"does not fit: {verdict}",
        "; ".join(exchanged) or "none",
        called if plan["calls_in_program"] else "none",
        "-" if plan["seconds"] is None else f"{plan['seconds']:.0f} s",
    )
