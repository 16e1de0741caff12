"""Leaves out of the default choice what `python -m kernels.check` found wrong here.

The first process reads the certificate and decides, all others follow, so that all
compile the same program. The kernels themselves read nothing.
"""

import json
from pathlib import Path

import jax

from kernels import exclude
from kernels.check import certificate
from kernels.check.cases import OPERATIONS
from train import processes


def apply(path: str | Path | None = None) -> None:
    """Excludes the backends that failed on this device with these sources.

    Says in a line what it excludes, and what of the certificate it ignores because it
    was made on another device, with other versions, or of other sources.

    Args:
        path: of the certificate; None takes that of `certificate.default_path()`, if
            there is one.

    Raises:
        ValueError: there is no such file, or it is no certificate.
    """
    with processes.agreed():
        decision = decide(path) if jax.process_index() == 0 else None
    decision = processes.from_the_first(decision)
    for line in decision["lines"]:
        print(line, flush=True)
    for op, backend, reason in decision["exclude"]:
        exclude(op, backend, reason)


def decide(path: str | Path | None) -> dict[str, list]:
    """{"lines": what there is to say, "exclude": (operation, backend, reason)}."""
    place = Path(certificate.default_path() if path is None else path)
    if not place.is_file():
        if path is None:
            return {"lines": [], "exclude": []}
        raise ValueError(
            "--certificate must be a file that python -m kernels.check wrote, got "
            f"{place}"
        )
    contents = read(place)
    start, advice = f"certificate {place}", "python -m kernels.check makes a new one"
    differences = [
        f"{key} {recorded.get(key)} there, {value} here"
        for recorded, current in (
            (contents["device"], certificate.device()),
            (contents["versions"], certificate.versions()),
        )
        for key, value in current.items()
        if recorded.get(key) != value
    ]
    if differences:
        line = f"{start} is ignored ({'; '.join(differences)}); {advice}"
        return {"lines": [line], "exclude": []}
    changed = {
        op for op, digest in contents["sources"].items() if digest != _digest(op)
    }
    failed: dict[tuple[str, str], list] = {}
    for row in contents["results"]:
        # what was only interpreted or compiled was tried for another device
        if row["verdict"] == "failed" and row["how"] == "run":
            failed.setdefault((row["op"], row["backend"]), []).append(row)
    lines = []
    if changed:
        names = ", ".join(sorted(changed))
        lines.append(f"{start} is ignored for {names} (other sources); {advice}")
    exclusions = []
    for (op, backend), rows in failed.items():
        if op not in changed:
            row = rows[0]
            reason = f"failed in {row['dtype']} ({row['failures'][0]}), {start}"
            exclusions.append((op, backend, reason))
            lines.append(f"{op}: backend {backend} is left out: {reason}")
    return {"lines": lines, "exclude": exclusions}


def read(path: Path) -> dict:
    """A certificate whose structure is what `kernels.check.certificate` says."""
    try:
        contents = json.loads(path.read_text())
        if contents["format"] != certificate.FORMAT:
            raise ValueError(f"format {contents['format']}, not {certificate.FORMAT}")
        for key in ("device", "versions", "sources"):
            if not isinstance(contents[key], dict):
                raise TypeError(f"{key} is no object")
        for row in contents["results"]:
            texts = [row[key] for key in ("op", "backend", "how", "dtype", "verdict")]
            if row["verdict"] == "failed":
                texts.append(row["failures"][0])
            if row["op"] not in contents["sources"]:
                raise ValueError(f"sources has no {row['op']}")
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("an entry of results is no text")
    except (ValueError, TypeError, LookupError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} is no certificate of python -m kernels.check "
            f"({type(error).__name__}: {error})"
        ) from None
    return contents


def _digest(op: str) -> str | None:
    operation = OPERATIONS.get(op)
    return operation and certificate.source_hash(operation.folder)
