"""Puts the five folders of the repository into the wheel as one package, `ssmax`.

The sources name each other as the repository does, `from layers import S5`. Names such
as `layers` and `train` must never land in a user's site-packages, so in the wheel they
become `ssmax.layers`: in imports, in strings that are the name of a module, and in
commands, `python -m train.main`. Lines stay where they are.
"""

import ast
import re
import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "ssmax"
FOLDERS = ("kernels", "ssm", "layers", "train", "configs")
# "results" are tables of the repository: beside a package's code a command would go on
# with them, in site-packages.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "results")
COMMAND = re.compile(rf"(?<=-m)(\s+)({'|'.join(FOLDERS)})\b")
START = '''"""State-space and convolutional sequence models in JAX.

`ssmax.layers` has Flax modules, `ssmax.kernels` fast array operations, `ssmax.ssm` the
mathematics, `ssmax.train` and `ssmax.configs` what `python -m ssmax.train.main` needs.
"""

__version__ = "{version}"
'''


class Hook(BuildHookInterface):
    """Of the wheel; an editable install has the repository itself on the path."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        self.place = tempfile.mkdtemp()
        package = Path(self.place, NAME)
        assemble(Path(self.root), package, self.metadata.version)
        build_data["force_include"][str(package)] = NAME

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if version != "editable":
            shutil.rmtree(self.place)


def assemble(root: Path, package: Path, version: str) -> None:
    """Writes the package from the repository at `root`."""
    for folder in FOLDERS:
        shutil.copytree(root / folder, package / folder, ignore=LEFT_OUT)
    modules = module_names(package)
    for path in package.rglob("*.py"):
        try:
            path.write_text(rewritten(path.read_text("utf-8"), modules), "utf-8")
        except ValueError as problem:
            raise ValueError(f"{path.relative_to(package)}: {problem}") from None
    shutil.copy(root / "py.typed", package)
    (package / "__init__.py").write_text(START.format(version=version), "utf-8")


def module_names(root: Path) -> set[str]:
    """Dotted names of all modules below the five folders, these not among them."""
    found = set()
    for folder in FOLDERS:
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found - {*FOLDERS}


def rewritten(source: str, modules: set[str]) -> str:
    """`source` with NAME before what it names of the five folders.

    Args:
        source: of a module, which imports absolutely.
        modules: dotted names. A string that is one of them, or a folder's name and a
            dot, is the name of a module or how such names begin; other strings are
            left as they are, such as "train.steps", a key of a config.

    Raises:
        ValueError: an import or a string that cannot be rewritten where it stands.
    """
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    inserted = []  # (offset, text)

    def at(node) -> int:
        return starts[node.lineno - 1] + node.col_offset

    text = b"".join(lines)
    names = modules | {f"{folder}." for folder in FOLDERS}
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and _ours(node.module):
            name = re.compile(rb"from\s+").match(text, at(node))
            inserted.append((name.end(), f"{NAME}."))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if not _ours(alias.name):
                    continue
                if alias.asname:  # import layers.s5 as s5
                    inserted.append((at(alias), f"{NAME}."))
                elif len(node.names) == 1 and "." not in alias.name:
                    inserted.append((at(node), f"from {NAME} "))  # import kernels
                else:
                    raise ValueError(
                        f"line {node.lineno}: must be `from ... import ...` or `import "
                        f"... as ...`, got `import {alias.name}`"
                    )
        elif isinstance(node, ast.Constant) and node.value in names:
            quoted = text[at(node) + 1 : at(node) + 1 + len(node.value)]
            if quoted != node.value.encode():
                raise ValueError(
                    f"line {node.lineno}: the name of a module must be one plain "
                    f"string, got {node.value!r} in pieces or with a prefix"
                )
            inserted.append((at(node) + 1, f"{NAME}."))
    for offset, new in sorted(inserted, reverse=True):
        text = text[:offset] + new.encode() + text[offset:]
    return COMMAND.sub(rf"\1{NAME}.\2", text.decode())


def _nodes(tree: ast.AST):
    """All nodes but those within f-strings, which have no place of their own."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.JoinedStr):
            yield from _nodes(child)


def _ours(module: str) -> bool:
    return module.partition(".")[0] in FOLDERS
