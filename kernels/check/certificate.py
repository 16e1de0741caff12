"""What a certificate of the check says: this device, these sources, the results.

It is JSON:
    format     1
    made       when, in UTC
    coverage   "quick", "default" or "full", with ", part" where not all was asked for
    device     kind, platform, driver
    versions   of Python and the packages that make the machine code
    sources    operation -> sha256 of its sources
    results    a list of `conformance.Row` with its verdict: "passed", "failed" or
               "not run"

`device`, `versions` and `sources` say for what the results hold. `train.exclusions`
reads it.
"""

import ast
import datetime
import functools
import hashlib
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import jax

FORMAT = 1
HERE = Path(__file__).parents[1]  # kernels/
PACKAGES = ("jax", "jaxlib", "triton", "jax-triton")
DRIVER = Path("/proc/driver/nvidia/version")


def default_path() -> Path:
    """runs/kernels/<device kind>.json, below the working directory."""
    name = re.sub(r"[^\w.-]+", "_", device()["kind"])
    return Path("runs", "kernels", f"{name}.json")


def device() -> dict[str, str]:
    """Kind, platform and driver of the first device."""
    first = jax.devices()[0]
    driver = first.client.platform_version.replace("\n", ", ")
    if first.platform == "gpu" and DRIVER.exists():
        driver += ", " + DRIVER.read_text().splitlines()[0]
    return {"kind": first.device_kind, "platform": first.platform, "driver": driver}


def versions() -> dict[str, str | None]:
    """Of Python and of PACKAGES; None for what is not installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def source_hash(folder: str) -> str:
    """sha256 of the files of kernels/<folder> and of all kernel files they import."""
    digest = hashlib.sha256()
    for path in _closure(sorted((HERE / folder).glob("*.py"))):
        digest.update(f"{path.relative_to(HERE)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def write(path: Path, contents: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"format": FORMAT, "made": date, **contents}, indent=1)
    replace(path, text + "\n")


def replace(path: Path, text: str) -> None:
    """Gives a file its text, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def obstacle(path: Path) -> str | None:
    """Why no file can be written there, for who is about to work for its contents."""
    if path.is_dir():
        return f"must be a file, got folder {path}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as problem:
        return str(problem)
    if path.exists() and not os.access(path, os.W_OK):
        return f"must be a file that can be written, got {path}"
    return None


def _closure(paths: list[Path]) -> list[Path]:
    closure = set(paths)
    waiting = list(paths)
    while waiting:
        new = set(_imported(waiting.pop())) - closure
        closure |= new
        waiting += new
    return sorted(closure)


def _imported(path: Path) -> list[Path]:
    """The kernel files that a file imports, all of a folder where it imports one:
    backends are imported only when they are called."""
    files = []
    for part in _parts(path.read_text()):
        if (HERE / part).is_dir():
            files += (HERE / part).glob("*.py")
        else:  # a module, or a name that kernels/__init__.py has from anywhere
            module = HERE / f"{part}.py"
            files.append(module if module.exists() else HERE / "__init__.py")
    return files


@functools.cache
def _parts(source: str) -> set[str]:
    """What stands after "kernels." in the imports of a source."""
    start = __package__.removesuffix("check")  # also inside another package
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    internal = (name.removeprefix(start) for name in names if name.startswith(start))
    return {name.split(".")[0] for name in internal}
