"""Commands keep freed memory, which saves the page faults of using it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import allocator

ROOT = Path(__file__).parents[1]
SCRIPT = """
import resource
import sys
import threading

import numpy as np

from kernels import allocator

def work():
    for _ in range(5):
        large, small = np.ones(8_000_000), np.ones(200_000)
        del large, small

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1:] == ["keep"]:
    allocator.keep_freed_memory()
faults()
print(faults(), sorted(allocator.setting()))
"""


def glibc():
    names = getattr(os, "confstr_names", {})
    return "CS_GNU_LIBC_VERSION" in names and os.confstr("CS_GNU_LIBC_VERSION")


def run(*arguments, **variables):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(allocator.VARIABLES)
    }
    command = [sys.executable, "-c", SCRIPT, *arguments]
    environment |= variables
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    number, _, setting = done.stdout.strip().partition(" ")
    return int(number), setting


@pytest.mark.skipif(not glibc(), reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    without, setting = run()
    assert without > 2_000 and setting == "[]"
    kept, setting = run("keep")
    assert kept < without / 20 and setting == str(sorted(allocator.PARAMETERS))


@pytest.mark.skipif(not glibc(), reason="of glibc")
def test_the_environments_own_setting_stays():
    faults, setting = run("keep", MALLOC_ARENA_MAX="4")
    assert faults > 2_000 and setting == "['MALLOC_ARENA_MAX']"
