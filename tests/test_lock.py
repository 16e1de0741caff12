"""One run at a time in a workdir, whoever starts, is killed or comes back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tiny_run

from train import lock, processes

# Takes a lock when told to, says what came of it, and keeps it until it is killed.
TAKER = """
import sys, time
sys.path[:0] = [{root!r}]
from train import lock
lock.BEAT = 0.05
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock.held(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print("refused:", error, flush=True)
"""


@pytest.fixture
def takers(tmp_path):
    """Starts processes that are ready to take the lock of a folder."""
    begun = []

    def start(count, workdir=tmp_path / "run"):
        script = textwrap.dedent(TAKER).format(root=str(tiny_run.ROOT))
        command = [sys.executable, "-c", script, str(workdir)]
        new = [
            subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(count)
        ]
        begun.extend(new)
        for process in new:
            assert process.stdout.readline() == "ready\n"
        return new

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_one_of_eight_starters_wins_and_a_killed_one_is_succeeded_by_one(
    tmp_path, takers
):
    workdir = tmp_path / "run"
    for _ in range(2):  # into an empty folder, then over the lock of a killed process
        processes = takers(8)
        for process in processes:
            go(process)
        said = [process.stdout.readline() for process in processes]
        (winner,) = (p for p, s in zip(processes, said, strict=True) if s == "held\n")
        for line in said:
            if line != "held\n":
                assert f"in use by another run: process {winner.pid} on host" in line
                assert " since 2" in line
        assert [path.name for path in workdir.iterdir()] == [lock.NAME]
        kill(winner)
    (last,) = takers(1)
    go(last)
    assert last.stdout.readline() == "held\n"
    go(last)
    assert last.wait(timeout=30) == 0 and list(workdir.iterdir()) == []


def test_a_folder_that_another_run_makes_at_the_same_moment(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def late(path, *args, **kwargs):
        mkdir(path)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", late)
    with lock.held(tmp_path / "of" / "both"):
        pass
    # What the other has made is the other's to remove.
    assert (tmp_path / "of" / "both").is_dir()


def written(workdir, **changes):
    """A lock of this process, altered."""
    with lock.held(workdir):
        told = json.loads((workdir / lock.NAME).read_text())
    (workdir / lock.NAME).write_text(json.dumps(told | changes))
    return told | changes


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_released_after_the_end_and_after_errors(tmp_path):
    for error in (None, RuntimeError, KeyboardInterrupt, SystemExit):
        try:
            with lock.held(tmp_path):
                assert (tmp_path / lock.NAME).exists()
                if error:
                    raise error
        except BaseException as raised:
            assert type(raised) is error
        assert list(tmp_path.iterdir()) == []


def test_a_process_of_this_host_that_has_ended_is_succeeded_at_once(tmp_path, caplog):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    written(tmp_path, process=child.pid)
    with lock.held(tmp_path):
        pass
    assert f"is taken over: process {child.pid}" in caplog.text
    # The number of the process is another one's by now.
    written(tmp_path, started="before")
    with lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_not_yet_waited_for_has_ended(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    written(tmp_path, process=child.pid, started=lock._started(child.pid))
    with pytest.raises(ValueError, match=f"process {child.pid} on host"):
        lock.held(tmp_path).__enter__()
    child.stdin.close()
    deadline = time.monotonic() + 30
    while lock._started(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    with lock.held(tmp_path):  # a zombie
        pass
    child.wait()


@pytest.mark.parametrize("away", [{"place": "another"}, {"started": None}])
def test_another_host_has_a_minute(tmp_path, away):
    """So does a process of which nothing can be seen."""
    written(tmp_path, **away, host="another")
    age(tmp_path / lock.NAME, lock.STALE - 5)
    with pytest.raises(ValueError, match=r"in use by .* on host another since"):
        lock.held(tmp_path).__enter__()
    age(tmp_path / lock.NAME, 10)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_is_out_of_sight_is_waited_for(tmp_path, monkeypatch, capsys):
    """Until it touches its lock, or has not for a minute."""
    monkeypatch.setattr(lock, "STALE", 2.0)
    written(tmp_path, place="another", host="lost")
    with lock.held(tmp_path, patience=10):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert "run.lock: waiting whether process" in capsys.readouterr().out
    written(tmp_path, place="another", host="alive")
    touch = threading.Timer(0.5, os.utime, [tmp_path / lock.NAME])
    touch.start()
    with pytest.raises(ValueError, match=r"in use by .* on host alive since"):
        lock.held(tmp_path, patience=10).__enter__()
    touch.join()
    # One that is seen is not waited for.
    (tmp_path / lock.NAME).unlink()
    written(tmp_path)
    with pytest.raises(ValueError, match="in use by"):
        lock.held(tmp_path, patience=1000).__enter__()


def test_a_lock_is_touched_as_long_as_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    path = tmp_path / lock.NAME
    with lock.held(tmp_path) as own:
        for harm in (lambda: age(path, 100), path.unlink):
            harm()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not (
                path.exists() and time.time() - path.stat().st_mtime < 50
            ):
                time.sleep(0.01)
            assert path.exists() and time.time() - path.stat().st_mtime < 50
        own.check()


def test_a_lock_that_another_took_over_ends_the_run(tmp_path, monkeypatch):
    """As after a sleep of minutes. What the other holds stays."""
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.held(tmp_path) as own:
        told = json.loads((tmp_path / lock.NAME).read_text())
        other = json.dumps(told | {"id": "another", "host": "there"})
        (tmp_path / "aside").write_text(other)
        (tmp_path / "aside").rename(tmp_path / lock.NAME)
        deadline = time.monotonic() + 20
        while own.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ValueError, match=r"no longer this run's.* on host there"):
            own.check()
    assert (tmp_path / lock.NAME).read_text() == other


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "../../x"}', "[" * 99_999])
def test_an_unreadable_lock_has_a_minute_too(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "WRITING", 0.1)
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"in use by .*: its run.lock cannot be read"):
        lock.held(tmp_path).__enter__()
    age(tmp_path / lock.NAME, 100)
    with lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
    with (
        lock.held(tmp_path),
        pytest.raises(ValueError, match="in use by another run"),
    ):
        lock.held(tmp_path).__enter__()
    written(tmp_path, started="before")
    with lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("crash", ["before the rename", "before the check"])
def test_a_taker_that_was_killed_is_succeeded(tmp_path, crash):
    first = written(tmp_path, id="first", started="before")
    heir = tmp_path / f"{lock.NAME}.first"
    if crash == "before the check":  # of one that another has succeeded long since
        heir = tmp_path / f"{lock.NAME}.long_since"
    heir.write_text(json.dumps(first | {"id": "second"}))
    age(heir, 100)
    with lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_slow_taker_does_not_take_from_the_fast(tmp_path, monkeypatch):
    """Both saw the dead lock; the fast one has succeeded it in between."""
    written(tmp_path, id="dead", started="before")
    real, fast = lock._dead, lock.held(tmp_path)

    def slow(holder, *arguments):
        dead = real(holder, *arguments)
        if holder["id"] == "dead" and dead:
            monkeypatch.undo()
            fast.__enter__()
        return dead

    monkeypatch.setattr(lock, "_dead", slow)
    with pytest.raises(ValueError, match="in use by another run"):
        lock.held(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    fast.__exit__(None, None, None)


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    for path, reason in (
        (tmp_path / "file" / "run", "got the file .*/file"),
        (tmp_path / ("x" * 260), "File name too long"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=f"workdir must be a folder.*{reason}"):
            lock.held(path).__enter__()
    for number, kind in ((30, ValueError), (28, OSError)):

        def refuse(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(lock.Path, "write_text", refuse)
            with pytest.raises(kind, match=os.strerror(number)):
                lock.held(tmp_path / "new").__enter__()
        assert not (tmp_path / "new").exists()


def test_the_others_of_a_run_learn_what_came_of_it(tmp_path, monkeypatch):
    """Process 0 holds the lock; the second sees only its decision."""
    workdir = tmp_path / "run"
    with processes.held(workdir):
        with pytest.raises(ValueError, match="in use by another run") as refused:
            processes.held(workdir).__enter__()
        # Of two processes, process 1.
        first = {"problem": None, "host": "there"}
        monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
        of_first = lock.holder_id(workdir)

        def of_all(own):
            return [first if isinstance(own, dict) else of_first, own]

        monkeypatch.setattr(processes, "of_all", of_all)
        with processes.held(workdir):
            pass
        assert (workdir / lock.NAME).exists()
        monkeypatch.setattr(processes, "VISIBLE", 0.0)
        # One of its own, left there by a process that was killed, is not that of 0.
        (tmp_path / "elsewhere").mkdir()
        written(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="workdir must be in a file system that "):
            processes.held(tmp_path / "elsewhere").__enter__()
        shutil.rmtree(tmp_path / "elsewhere")
        first["problem"] = str(refused.value)
        with pytest.raises(
            ValueError, match=r"process 0 on there: .* in use by another"
        ):
            processes.held(workdir).__enter__()
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


MEMBER = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from train import processes
try:
    with processes.held(sys.argv[3]):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print("refused:", error, flush=True)
"""


def answer(process):
    """The first line that is a member's own."""
    lines = iter(process.stdout.readline, "")
    return next(line for line in lines if line.startswith(("held", "refused")))


@pytest.mark.slow
def test_the_processes_of_one_run_share_a_lock(tmp_path):
    """Two runs of two processes each."""
    runs = []
    try:
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            command = [sys.executable, "-c", MEMBER, address]
            runs.append(
                [
                    subprocess.Popen(
                        [*command, str(rank), str(tmp_path / "run")],
                        cwd=tiny_run.ROOT,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    for rank in range(2)
                ]
            )
            said = [answer(process) for process in runs[-1]]
            if len(runs) == 1:
                assert said == ["held\n", "held\n"]
            else:
                holder = runs[0][0].pid
                assert all(
                    f"in use by another run: process {holder}" in s for s in said
                )
        for process in runs[0]:
            go(process)
        assert [process.wait(timeout=60) for process in runs[0]] == [0, 0]
        assert not (tmp_path / "run" / lock.NAME).exists()
    finally:
        for process in (p for run in runs for p in run):
            process.kill()
            process.communicate()
