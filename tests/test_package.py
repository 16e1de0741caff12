"""The wheel: one package from the sources of the repository, and what it declares."""

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs import common

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = ("train", "data", "notebooks", "test")  # by `make`


def _load(path: Path):
    """A module of the repository that is on no path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hatch_build = _load(ROOT / "hatch_build.py")
FOLDERS = hatch_build.FOLDERS
MODULES = {"kernels.check", "kernels.scan", "kernels.scan.triton", "train.main"}


# The rewrite.


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from layers import S5", "from ssmax.layers import S5"),
        ("from  train.data import x", "from  ssmax.train.data import x"),
        (
            "from kernels.a import (\n    b,\n)",
            "from ssmax.kernels.a import (\n    b,\n)",
        ),
        ("def f():\n    import kernels", "def f():\n    from ssmax import kernels"),
        ("import kernels as k", "import ssmax.kernels as k"),
        ("import os, layers.s5 as a", "import os, ssmax.layers.s5 as a"),
        ("é = 1; from ssm import é", "é = 1; from ssmax.ssm import é"),
        ("a('kernels.scan.triton')", "a('ssmax.kernels.scan.triton')"),
        ('{"train.main": "x"}', '{"ssmax.train.main": "x"}'),
        ('x.startswith("kernels.")', 'x.startswith("ssmax.kernels.")'),
        ("'''python -m train.main'''", "'''python -m ssmax.train.main'''"),
        ("'-m\\n    layers.laws --all'", "'-m\\n    layers.laws --all'"),
        ('f"{a} python -m kernels.check"', 'f"{a} python -m ssmax.kernels.check"'),
        ('# python -m layers.laws\n"""a"""', '# python -m ssmax.layers.laws\n"""a"""'),
        # What is none of ours, or no name of a module.
        ("from layersy import S5", "from layersy import S5"),
        ("import training, ssmax", "import training, ssmax"),
        ("train = layers.train(kernels)", "train = layers.train(kernels)"),
        ("data['train'], 'layers', 'configs'", "data['train'], 'layers', 'configs'"),
        ("'train.steps', 'kernels.nowhere'", "'train.steps', 'kernels.nowhere'"),
        ("'see train.main for it'", "'see train.main for it'"),
        ("'python -m training'", "'python -m training'"),
    ],
)
def test_a_source_becomes_one_of_the_package(source, wanted):
    assert hatch_build.rewritten(source, MODULES) == wanted


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import layers.s5", "line 1: must be `from ... import ...` or"),
        ("\nimport os, kernels", "line 2: must be .*got `import kernels`"),
        (
            "x = 'train.' 'main'",
            "line 1: the name of a module must be one plain string",
        ),
        ("x = u'train.main'", "line 1: the name of a module must be one plain string"),
    ],
)
def test_what_cannot_be_rewritten_where_it_stands_is_refused(source, says):
    with pytest.raises(ValueError, match=says):
        hatch_build.rewritten(source, MODULES)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package as a folder, not installed."""
    place = tmp_path_factory.mktemp("package") / "ssmax"
    hatch_build.assemble(ROOT, place, "1.2.3")
    return place


def test_the_package_has_all_files_and_no_line_moves(package):
    assert (package / "py.typed").exists()
    assert '__version__ = "1.2.3"' in (package / "__init__.py").read_text()
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        for path in files:
            if "__pycache__" in path.parts:
                continue
            place = path.relative_to(ROOT)
            if "results" in place.parts:  # tables of the repository
                assert not (package / place).exists(), place
                continue
            old = path.read_text()
            new = (package / place).read_text()
            assert new.replace("from ssmax import", "import").replace("ssmax.", "") == (
                old
            ), path
            assert new.count("\n") == old.count("\n")


def test_the_package_names_nothing_but_itself(package):
    keys = set(_keys(common.base().to_dict()))
    ours = hatch_build.module_names(ROOT)
    assert "kernels.dispatch" in ours and "kernels" not in ours
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module}
            else:
                names = set()
            assert not {name.split(".")[0] for name in names} & {*FOLDERS}, path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ours, path
                name = node.value.removeprefix("ssmax.")
                # else a key would have been taken for a module
                assert name == node.value or name not in keys, (path, name)


def _keys(tree: dict, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


# What is declared.

# The module of a distribution where it has another name.
IMPORTED_AS = {
    "absl-py": "absl",
    "flash-linear-attention": "fla",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}
NOT_IMPORTED = {
    "importlib-resources",  # by tensorflow-datasets
    "ipykernel",  # runs notebooks
    "pytest-xdist",  # pytest -n
    "ruff",  # make lint
}
# On no registry: from its repository, for kernels.bench.
NOT_DECLARED = {"flashfftconv"}


def _declared(*extras: str) -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for e in extras for text in EXTRAS[e])]
    requirements = map(Requirement, texts)
    return {canonicalize_name(r.name): r for r in requirements}


def _modules_of(names: Iterable[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def _third_party(path: Path, within_functions: bool = True) -> set[str]:
    """Top-level names of what a file imports that is neither ours nor Python's."""
    own = {*FOLDERS, "tests", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    found, waiting = set(), [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "importorskip")
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        if within_functions or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in found} - own - {*sys.stdlib_module_names}


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_what_is_declared_is_imported_and_what_is_imported_is_declared():
    files = [*_sources(*FOLDERS, "tests"), ROOT / "hatch_build.py"]
    imported = set().union(*map(_third_party, files))
    declared = _declared(*EXTRAS)
    assert {*NOT_IMPORTED} <= {*declared}
    assert _modules_of({*declared} - NOT_IMPORTED) - imported == set()
    assert imported - _modules_of(declared) == NOT_DECLARED


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(("kernels", "ssm", "layers"), ()), (("train", "configs"), ("train",))],
    ids=["core", "train"],
)
def test_a_module_is_imported_with_what_its_part_declares(folders, extras):
    """Other packages only in the functions that need them; triton in backends, which
    are imported when they are called."""
    allowed = _modules_of(_declared(*extras)) | {"triton"}
    for path in _sources(*folders):
        assert _third_party(path, within_functions=False) <= allowed, path


@pytest.mark.parametrize("python", ["py311", "py312"])
def test_requirements_pin_what_is_declared(python):
    lines = (ROOT / "requirements" / f"{python}.txt").read_text().splitlines()
    pins = map(Requirement, lines)
    versions = {canonicalize_name(p.name): str(p.specifier)[2:] for p in pins}
    declared = _declared(*INSTALLED)
    for name, requirement in declared.items():
        assert requirement.specifier.contains(versions[name]), name
    for extra in {*EXTRAS} - {*INSTALLED}:  # never on every machine
        alone = {*map(canonicalize_name, _names(extra))} - {*declared}
        assert not alone & {*versions}, extra


def _names(extra: str) -> list[str]:
    return [Requirement(text).name for text in EXTRAS[extra]]


def test_the_citation_is_of_this_version_and_license():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {PROJECT['version']}" in lines
    assert f"license: {PROJECT['license']}" in lines
    assert f"title: {PROJECT['name']}" in lines
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


# The wheel in an environment of its own, in the folder of a user whose files have the
# names that the repository has.

USERS_FILES = {
    "train.py": "raise RuntimeError('the train.py of a user')",
    "kernels/__init__.py": "raise RuntimeError('the kernels of a user')",
    "layers/__init__.py": "",
    "layers/halved.py": """
from ssmax.layers import S5


class Halved(S5):
    state_size: int = 8

    def __call__(self, x, state=None, sequence=None, train=False):
        y, state = super().__call__(x, state, sequence, train)
        return y / 2, state
""",
    "raw.py": """
import jax
import jax.numpy as jnp

import ssmax
from ssmax.kernels import linear_scan

a, x = jnp.full((1, 4, 1), 0.5), jnp.ones((1, 4, 1))
h, final = jax.jit(linear_scan)(a, x)
print(ssmax.__version__, h.ravel().tolist(), final.ravel().tolist())
print(jax.grad(lambda x: linear_scan(a, x)[1].sum())(x).ravel().tolist())
""",
    "everything.py": """
import importlib
import pkgutil
import sys

import ssmax

names = [m.name for m in pkgutil.walk_packages(ssmax.__path__, "ssmax.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
print(sorted({"kernels", "ssm", "layers", "train", "configs"} & {*sys.modules}))
""",
    "digest.py": """
import importlib
import pkgutil
from pathlib import Path

import ssmax.kernels

found = pkgutil.walk_packages(ssmax.kernels.__path__, "ssmax.kernels.")
(name,) = (module.name for module in found if module.name.endswith(".certificate"))
certificate = importlib.import_module(name)
before = certificate.source_hash("linear_scan")
path = Path(ssmax.kernels.__file__).with_name("dispatch.py")
source = path.read_text()
path.write_text(source + "# other\\n")
print(before != certificate.source_hash("linear_scan"))
path.write_text(source)
print(before == certificate.source_hash("linear_scan"))
""",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Runs a Python command in the user's folder: its finished process."""
    place = tmp_path_factory.mktemp("user")
    for name, text in USERS_FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    wheels, venv = place / "wheels", place / "venv"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    alone = ["--quiet", "--no-deps", "--no-index"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "-w", wheels, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *alone, wheel], check=True)

    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True)
    packages = Path(said.stdout.strip())
    version = PROJECT["version"]
    assert {path.name for path in packages.iterdir()} == {
        "ssmax",
        f"ssmax-{version}.dist-info",
    }
    # Of a folder in a path file no path files are read, such as that of this project's
    # own editable install.
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("\n".join(paths))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def start(*arguments):
        return subprocess.Popen(
            [python, *map(str, arguments)],
            cwd=place,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start, place


def _said(user, *arguments, code: int = 0, timeout: float = 600) -> str:
    process = user[0](*arguments)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"{out}\n{err}"
    return err if code else out


@pytest.mark.slow
def test_kernels_of_the_wheel_in_raw_jax(user):
    first, second = _said(user, "raw.py").splitlines()
    assert first == f"{PROJECT['version']} [1.0, 1.5, 1.75, 1.875] [1.875]"
    assert second == "[0.125, 0.25, 0.5, 1.0]"


@pytest.mark.slow
def test_every_module_of_the_wheel_is_imported_and_none_of_other_names(user):
    number, others = _said(user, "everything.py").splitlines()
    assert int(number) > 100 and others == "[]"
    assert "the kernels of a user" in _said(user, "-c", "import kernels", code=1)


@pytest.mark.slow
def test_the_wheel_checks_its_kernels(user):
    """Triton's interpreter runs in a process of its own."""
    command = ["-m", "ssmax.kernels.check", "--quick", "--dtype", "float32"]
    command += ["--op", "linear_scan", "contracted_scan", "short_conv", "cauchy"]
    said = _said(user, *command)
    assert "FAILED" not in said and said.count("passed") >= 12
    if sys.platform == "linux":
        assert re.search(r"triton\s+│ interpreted .* passed", said)
    assert _said(user, "digest.py").split() == ["True", "True"]


@pytest.mark.slow
def test_laws_of_a_layer_of_the_users(user):
    said = _said(user, "-m", "ssmax.layers.laws", "--layer", "layers.halved.Halved")
    assert "layers.halved.Halved holds" in said and "FAILS" not in said


def _checkpoints(workdir: Path) -> list[Path]:
    return [path for path in workdir.glob("*/[0-9]*") if path.name.isdigit()]


@pytest.mark.slow
def test_a_run_of_the_wheel_is_killed_and_goes_on(user):
    start, place = user
    config = "pixels:digits,layer=layers.halved.Halved"
    command = ["-m", "ssmax.train.main", "--config", config, "--workdir", "run"]
    settings = dict(steps=60, batch_size=8, eval_every=30, checkpoint_every=5)
    command += [f"--config.train.{key}={value}" for key, value in settings.items()]
    command += ["--config.model.features=4", "--config.model.depth=1"]
    process = start(*command)
    metrics, end = place / "run" / "metrics.jsonl", time.monotonic() + 180
    while len(_checkpoints(place / "run")) < 2:  # the first of them is whole
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said = _said(user, *command)
    assert re.search(r"resumed from step \d+", said)
    assert (place / "run" / "report.html").exists() and metrics.exists()
    # A mistake stays one line, also where its error is known by its module's name.
    mistakes = {
        "holds a run of another config": ["--config.model.features=5"],
        "there is no checkpoint in nowhere": [
            "--workdir=other",
            "--config.train.init_from=nowhere",
        ],
    }
    for says, flags in mistakes.items():
        err = _said(user, *command, *flags, code=2)
        assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert "python -m ssmax.train.main" in _said(user, "-m", "ssmax.train.main", "-?")
