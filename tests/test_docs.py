"""The pages hold: what they point to is there, their Python runs as it stands, their
commands are understood by the programs that they name."""

import argparse
import importlib
import re
import shlex
import tomllib

import pytest
import test_main
import tiny_run

from train import main

PAGES = [tiny_run.ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted((tiny_run.ROOT / "docs").glob("*.md"))
PAGES.append(tiny_run.ROOT / "notebooks" / "README.md")
TAUGHT = [page for page in PAGES if page.name != "CONTRIBUTING.md"]
NAMES = [f"{page.parent.name}-{page.stem}" for page in TAUGHT]
# A line that is typed, or one within a sentence, up to a comment.
COMMAND = re.compile(
    r"(?:^ {4,}|`)((?:\w+=\S+ )*(?:\S*/)?python -m (?:ssmax\.)?"
    r"((?:kernels|layers|train|configs)[\w.]*)[^`\n#]*)",
    re.M,
)
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")  # such as RUN: whatever the reader has

parsed = test_main.parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_points_to_what_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    configs = re.findall(r"configs/\w+\.py", text)
    assert [name for name in configs if not (tiny_run.ROOT / name).exists()] == []
    modules = re.findall(r"python -m ((?:kernels|layers|train)[\w.]*\w)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def blocks(page):
    """The Python of a page, each with the line that it begins in. What reads a run is
    for the test that has made one."""
    text = page.read_text()
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
        if "load_run(" not in found[1]
    ]


def commands(page):
    """(module, its arguments) of the commands on a page, in order; one may be several
    lines."""
    text = re.sub(r"\\\n *", "", page.read_text())
    found = []
    for line, module in COMMAND.findall(text):
        words = shlex.split(line)
        found.append((module, words[words.index("-m") + 2 :]))
    return found


def test_there_is_something_to_run_and_to_type():
    readme, training = tiny_run.ROOT / "README.md", tiny_run.ROOT / "docs/training.md"
    assert blocks(readme) and blocks(tiny_run.ROOT / "docs/kernels.md")
    assert ("layers.laws", ["--all"]) in commands(readme)
    assert ("train.main", ["--config", "pixels:digits"]) in commands(training)


@pytest.mark.parametrize(
    "page",
    # test_other_code.py has its blocks, the last of them without this repository
    [page for page in TAUGHT if blocks(page) and page.name != "other_code.md"],
    ids=lambda page: page.name,
)
def test_the_python_of_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


class Understood(Exception):
    """A command line was parsed."""


def understand(module, arguments, parsed, monkeypatch):
    """Has the module's own parser read the arguments; the folders of the runs that they
    make, or are about, where that is said."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    if module == "train.main":
        rest = parsed(*arguments)
        main.check_arguments(rest)
        seeds = [int(seed) for seed in main.SEEDS.value] or [main.CONFIG.value.seed]
        return [str(main._workdir(seed, len(seeds) > 1)) for seed in seeds]
    if module == "train.plan":
        found.check_arguments(parsed(*arguments))
        return []
    if module in ("train.baseline", "train.reproduce.baseline"):
        main.check_arguments(parsed(*arguments))
        return []
    if module == "train.repeat":
        main.check_arguments(parsed(*arguments))
        for mesh in found.MESHES.value:
            found.with_mesh(main.CONFIG.value, mesh)
        return []

    read = argparse.ArgumentParser.parse_args

    def understood(self, *given):
        options = read(self, *given)
        raise Understood(options)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", understood)
        with pytest.raises(Understood) as caught:
            found.main(arguments)
    (options,) = caught.value.args
    return [options.workdir] if "--workdir" in arguments else []


@pytest.mark.parametrize("page", TAUGHT, ids=NAMES)
def test_commands_are_understood_and_runs_are_made_before_they_are_read(
    page, parsed, monkeypatch
):
    made = set()
    if "make train" in page.read_text():
        made |= {*understand("train.main", _of_make(), parsed, monkeypatch)}
    for module, arguments in commands(page):
        if arguments[-1:] == ["..."] and module != "train.report":
            arguments = arguments[:-2]  # an option whose value is left to the reader
            if not arguments:
                continue
        runs = understand(module, arguments, parsed, monkeypatch)
        if module == "train.main":
            made |= {*runs}
            continue
        missing = [run for run in runs if run not in made]
        assert [run for run in missing if not PLACEHOLDER.search(run)] == []


def test_a_workdir_has_one_config_on_all_pages(parsed):
    """A run goes on with the config that it began with, so that who types one page
    after another would be refused."""
    configs = {}
    for page in TAUGHT:
        for module, arguments in commands(page):
            if module != "train.main" or arguments[-1:] == ["..."]:
                continue
            main.check_arguments(parsed(*arguments))
            seeds = [int(seed) for seed in main.SEEDS.value] or [main.CONFIG.value.seed]
            for seed in seeds:
                config = main.CONFIG.value.copy_and_resolve_references()
                config.seed = seed
                workdir = str(main._workdir(seed, len(seeds) > 1))
                configs.setdefault(workdir, {})[config.to_json()] = page.name
    assert len(configs) > 10
    several = {w: [*pages.values()] for w, pages in configs.items() if len(pages) > 1}
    assert several == {}


def _of_make():
    """The arguments of `train.main` in `make train`."""
    text = (tiny_run.ROOT / "Makefile").read_text()
    config = re.search(r"^CONFIG \?= (\S+)", text, re.M)[1]
    assert "-m train.main --config $(CONFIG)" in text
    return ["--config", config]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_and_extras_are_there(page):
    text, made = page.read_text(), (tiny_run.ROOT / "Makefile").read_text()
    words = re.findall(r"(?:^ {4,}|`)make((?: [\w.=/-]+)*)", text, re.M)
    targets = {w for line in words for w in line.split() if "=" not in w}
    assert [t for t in targets if not re.search(rf"^{t}:", made, re.M)] == []
    project = tomllib.loads((tiny_run.ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text)
    names = {name for group in extras for name in group.split(",")}
    assert names <= {*project["optional-dependencies"]}
