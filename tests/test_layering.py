"""Imports point inward: kernels <- ssm <- layers <- train; configs are plain data.

Inside of a ring no import leads back, and a room is entered only from where ROOMS says.
"""

import ast
import contextlib
import graphlib
import importlib
import re
import subprocess
import sys
import textwrap
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
# Room -> who may import what lies in it, apart from itself: modules, and rooms or rings
# with all that lies in them. Tests and notebooks may import everything.
ROOMS = {
    "kernels.cauchy": {"kernels.__init__", "ssm.dplr"},
    "kernels.chunked_scan": {"kernels.__init__"},
    "kernels.fft_conv": {"kernels.__init__"},
    "kernels.linear_scan": {"kernels.__init__", "kernels.selective_scan"},
    "kernels.selective_scan": {"kernels.__init__"},
    "kernels.short_conv": {"kernels.__init__"},
    "kernels.vandermonde": {"kernels.__init__"},
    "kernels.check": {"kernels.bench", "layers.laws", "train"},
    "kernels.bench": {"train.bench"},
    "layers.models": {"layers.__init__", "layers.laws", "train"},
    "layers.frames": {"layers.__init__", "layers.models", "train"},
    "layers.laws": {"layers.__init__", "layers.models.table", "layers.rounding"},
    "train.data": {"train"},
    "train.draw": {"train.endings", "train.report", "train.video"},
    "train.report": {"train.endings", "train.main"},
    "train.video": {
        "train.endings",
        "train.rollout",
        "train.tokenize",
        "train.reproduce",
    },
    "train.reproduce": {"train.baseline"},
    "train.bench": set(),
    "train.plan": set(),
}
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


class Sources:
    """The modules of the rings below a folder, `__init__` by its name too, and which of
    each other they import, also inside functions."""

    def __init__(self, root: Path = ROOT, rings=RINGS):
        paths = [path for ring in rings for path in (root / ring).rglob("*.py")]
        self.trees = {
            ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(
                path.read_text()
            )
            for path in paths
        }
        self.imports = {module: self._imported(module) for module in self.trees}

    def _imported(self, module: str) -> set[str]:
        found = set()
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                found |= {self._module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {self._origin(node.module, a.name) for a in node.names}
        return found - {None, module}

    def _module(self, name: str) -> str | None:
        names = (name, f"{name}.__init__")
        return next((name for name in names if name in self.trees), None)

    def _origin(self, package: str, name: str) -> str | None:
        """Where `from package import name` looks: a name that the package's own
        `__init__` has from elsewhere hides a module that is called so."""
        inside, start = self._module(f"{package}.{name}"), f"{package}.__init__"
        if inside is None or start not in self.trees:
            return inside or self._module(package)
        given = {
            f"{node.module}.{alias.name}"
            for node in self.trees[start].body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if (alias.asname or alias.name) == name
        }
        return start if given - {f"{package}.{name}"} else inside

    def circle(self, ring: str) -> list[str] | None:
        """Modules of a ring each of which imports the next, from one back to itself."""
        graph = {
            module: {name for name in imported if _within(name, ring)}
            for module, imported in self.imports.items()
            if _within(module, ring)
        }
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            return error.args[1][::-1]
        return None

    def intruders(self, room: str, allowed: set[str]) -> dict[str, set[str]]:
        """Who imports what of a room without being allowed to."""
        entered = {
            module: {name for name in imported if _within(name, room)}
            for module, imported in self.imports.items()
            if not any(_within(module, place) for place in {room, *allowed})
        }
        return {module: names for module, names in entered.items() if names}


def _within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


@pytest.fixture(scope="module")
def sources():
    return Sources()


@pytest.mark.parametrize("ring", RINGS)
def test_no_import_leads_back(ring, sources):
    assert sources.circle(ring) is None


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_entered_only_as_the_table_says(room, sources):
    assert any(_within(module, room) for module in sources.trees), "no such room"
    assert sources.intruders(room, ROOMS[room]) == {}
    for place in ROOMS[room]:  # no line of the table is out of date
        users = [module for module in sources.trees if _within(module, place)]
        entered = set().union(*(sources.imports[module] for module in users))
        assert any(_within(name, room) for name in entered), place


def test_every_room_is_in_the_table():
    # of the rings that have a room there
    for ring in {room.split(".")[0] for room in ROOMS}:
        folders = {path.parent.name for path in (ROOT / ring).glob("*/__init__.py")}
        assert {f"{ring}.{folder}" for folder in folders} <= {*ROOMS}


def test_what_these_laws_see(tmp_path):
    for name, text in {
        "ring/__init__.py": "from ring.room import room",
        "ring/outer.py": "from ring import room",  # the function, by way of __init__
        "ring/inner.py": "from ring.room import part",
        "ring/room/__init__.py": "from ring.room import part\nroom = part",
        "ring/room/part.py": "import numpy",
        "ring/a.py": "def f():\n    from ring import b",
        "ring/b.py": "import ring.c",
        "ring/c.py": "import ring.room.part",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sources = Sources(tmp_path, ["ring"])
    assert sources.imports["ring.outer"] == {"ring.__init__"}
    assert sources.intruders("ring.room", {"ring.__init__", "ring.c"}) == {
        "ring.inner": {"ring.room.part"}
    }
    assert sources.circle("ring") is None
    (tmp_path / "ring/c.py").write_text("def f():\n    from ring.a import f")
    circle = Sources(tmp_path, ["ring"]).circle("ring")
    assert len(circle) == 4 and {*circle} == {"ring.a", "ring.b", "ring.c"}


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


def programs(path: Path):
    """The strings of a file that are programs with imports: tests start such."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and "import " in text:
            with contextlib.suppress(SyntaxError, UnicodeEncodeError):
                tree = ast.parse(textwrap.dedent(text))
                yield from (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))


def test_programs_in_strings_import_what_there_is():
    # no tool that renames a module sees them
    invented = {ROOT / "tests/test_layering.py", ROOT / "tests/test_package.py"}
    files = [path for ring in (*RINGS, "tests") for path in (ROOT / ring).rglob("*.py")]
    seen = 0
    for path in {*files} - invented:
        for node in programs(path):
            if node.module.split(".")[0] in RINGS:
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    seen += 1
                    if not hasattr(module, name):
                        importlib.import_module(f"{node.module}.{name}")
    assert seen > 10


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
