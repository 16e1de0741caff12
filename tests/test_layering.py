"""Imports point inward: kernels <- ssm <- layers <- train; configs are plain data."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "ssm": {"ssm", "kernels"},
    "layers": {"layers", "ssm", "kernels"},
    "train": {"train", "layers", "ssm", "kernels", "configs"},
}
# What a ring may take from outside (rich prints the tables of `python -m ...`); None:
# anything.
PEERS = {  # of kernels.bench, where they are installed
    "accelerated_scan", "causal_conv1d", "fla", "flashfftconv", "mamba_ssm", "torch",
}  # fmt: skip
MAY_USE = {
    "kernels": {
        "jax",
        "numpy",
        "scipy",
        "jax_triton",
        "triton",
        "rich",
        "matplotlib",
        *PEERS,
    },
    "ssm": {"jax", "numpy", "scipy"},
    "layers": {"jax", "numpy", "flax", "rich"},
    "train": None,
}
RINGS = tuple(MAY_IMPORT)
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".ipynb", ".cfg", ".json", ""}


def modules(path: Path) -> set[str]:
    """All absolute modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in modules(path)}


@pytest.mark.parametrize("ring", RINGS)
def test_imports_point_inward(ring):
    files = sorted((ROOT / ring).rglob("*.py"))
    assert files
    known = {*RINGS, "configs", "notebooks", "tests"}
    for path in files:
        imported = packages(path)
        assert imported & known <= MAY_IMPORT[ring], path
        if MAY_USE[ring] is not None:
            outside = imported - known - sys.stdlib_module_names
            assert outside <= MAY_USE[ring], path


def test_configs_are_plain_data():
    files = sorted((ROOT / "configs").glob("*.py"))
    assert files
    for path in files:
        assert packages(path) <= {"ml_collections", "configs"}, path
        own = {m for m in modules(path) if m.startswith("configs.")}
        assert all(m.startswith("configs.common") for m in own), path


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    path_of_a_machine = re.compile(rb"(?<![\w.])/(root|home|work|mnt|Users)/")
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix in TEXT:
            match = path_of_a_machine.search(path.read_bytes())
            assert match is None, f"{name}: {match.group()}"
