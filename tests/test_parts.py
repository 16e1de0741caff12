"""The parts of the tests, of which `.ci/run` runs one a commit."""

import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
CASES = 200
TESTS = f"""
import pytest

@pytest.mark.parametrize("n", range({CASES}))
def test_one(n):
    pass

@pytest.mark.slow
def test_long():
    pass
"""


@pytest.fixture
def collected(tmp_path):
    """The names of the tests that arguments of pytest choose."""
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_many.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def collect(*arguments, code=0):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            return done.stderr
        return [line for line in done.stdout.splitlines() if "::" in line]

    return collect


def test_every_test_is_in_exactly_one_part(collected):
    parts = [collected("--part", f"{k}/3") for k in (1, 2, 3)]
    together = sorted([*parts[0], *parts[1], *parts[2]])
    assert together == sorted(collected()) and len(together) == CASES + 1
    assert all(len(part) > CASES / 6 for part in parts)
    assert collected("--part=2/3") == parts[1]
    assert collected("--part=1/1") == collected()


def test_a_part_is_of_what_is_chosen_otherwise(collected):
    (k,) = (k for k in (1, 2) if any("long" in t for t in collected(f"--part={k}/2")))
    assert collected("-m", "slow", f"--part={k}/2") == ["test_many.py::test_long"]


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3"])
def test_what_is_no_part_is_refused(part):
    message = f"--part must be K/N with K between 1 and N, such as 2/5, got {part}"
    with pytest.raises(pytest.UsageError, match=message):
        conftest.as_part(part)


def test_a_refusal_is_said_on_the_command_line(collected):
    assert "such as 2/5, got 4/3" in collected("--part=4/3", code=4)
