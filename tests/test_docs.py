"""What the pages point to is there: files, modules, configs."""

import importlib.util
import re

import pytest
import tiny_run

PAGES = [tiny_run.ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted((tiny_run.ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_points_to_what_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    configs = re.findall(r"configs/\w+\.py", text)
    assert [name for name in configs if not (tiny_run.ROOT / name).exists()] == []
    modules = re.findall(r"python -m ((?:kernels|layers|train)[\w.]*\w)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
