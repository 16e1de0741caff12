"""Runs that are killed and resumed equal, bit by bit, the one that was not."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest
import tiny_run

from train import checkpoint, digest, lock

STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    tiny_run.finish(tiny_run.start(workdir, cache, steps=STEPS))
    assert tiny_run.weights(workdir)[0] == STEPS
    return workdir


def folders(workdir, pattern):
    return list((workdir / checkpoint.FOLDER).glob(pattern))


def between_commit_and_digest(workdir):
    return any(
        not (folder / digest.FILE).exists()
        for folder in folders(workdir, "[0-9]*")
        if folder.name.isdigit()
    )


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_at_a_random_step(tmp_path, cache, uninterrupted):
    rng = random.Random(0)
    for lines in sorted(rng.sample(range(2, 25), 2)):
        process = tiny_run.start(tmp_path, cache, steps=STEPS)
        tiny_run.wait_for(lambda n=lines: tiny_run.logged(tmp_path) >= n, process)
        kill(process)  # its lock is succeeded at once
    tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS))
    tiny_run.assert_same(tmp_path, uninterrupted)
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.slow
def test_a_second_start_is_told_who_runs(tmp_path, cache):
    """While the first compiles, and changes nothing of it."""
    process = tiny_run.start(tmp_path, cache, steps=100_000)
    tiny_run.wait_for((tmp_path / lock.NAME).exists, process)
    _, err = tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS), code=2)
    assert err.startswith(f"error: {tmp_path} is in use by another run: process ")
    assert f"process {process.pid} on host {socket.gethostname()} since 2" in err
    assert err.count("\n") == 1
    kill(process)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(tmp_path, cache, uninterrupted):
    process = tiny_run.start(tmp_path, cache, steps=STEPS, checkpoint_every=1000)
    tiny_run.wait_for(lambda: tiny_run.logged(tmp_path) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = tiny_run.finish(process)
    step = checkpoint.newest_good(tmp_path)
    assert f"stopped by SIGTERM at step {step}; to go on from there" in out
    assert not (tmp_path / lock.NAME).exists()
    out, _ = tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS))
    assert f"resumed from step {step} in" in out
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again(tmp_path, cache, uninterrupted, workers):
    """At random steps, during saves, and between a commit and its digest."""
    flag = f"--config.data.workers={workers}"
    rng = random.Random(workers)
    moments = [
        lambda: folders(tmp_path, f"*{checkpoint.UNFINISHED}"),
        lambda: between_commit_and_digest(tmp_path),
        lambda: tiny_run.logged(tmp_path) >= 12,
        lambda: tiny_run.logged(tmp_path) >= 18,
    ]
    for moment in moments:
        process = tiny_run.start(tmp_path, cache, flag, steps=STEPS)
        tiny_run.wait_for(moment, process)
        time.sleep(rng.uniform(0, 0.02))
        kill(process)
    tiny_run.finish(tiny_run.start(tmp_path, cache, flag, steps=STEPS))
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_reaches_workers_too(
    tmp_path, cache, uninterrupted, number
):
    flag = "--config.data.workers=2"
    process = tiny_run.start(tmp_path, cache, flag, steps=STEPS, checkpoint_every=1000)
    tiny_run.wait_for(lambda: tiny_run.logged(tmp_path) >= 3, process)
    os.killpg(process.pid, number)
    out, err = tiny_run.finish(process)
    assert f"stopped by {number.name}" in out and "Traceback" not in err
    tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS))
    tiny_run.assert_same(tmp_path, uninterrupted)


def workers_of(process):
    """How many data workers the run has started."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children()
        return sum("spawn_main" in " ".join(child.cmdline()) for child in children)
    return 0


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_which_goes_on(tmp_path, cache, uninterrupted):
    flag = "--config.data.workers=2"
    process = tiny_run.start(tmp_path, cache, flag, steps=STEPS, checkpoint_every=1000)
    tiny_run.wait_for(lambda: workers_of(process) == 2, process)
    children = psutil.Process(process.pid).children()
    (worker, _) = (c for c in children if "spawn_main" in " ".join(c.cmdline()))
    tiny_run.wait_for(lambda: tiny_run.logged(tmp_path) >= 2, process)
    worker.kill()
    _, err = tiny_run.finish(process, code=2)
    step = checkpoint.newest_good(tmp_path)
    assert re.match(
        rf"error: data worker \d of 2 \(process {worker.pid}\) has died, by SIGKILL; "
        rf".*; step {step} is saved, from where the same command goes on",
        err,
    )
    assert err.count("\n") == 1
    out, _ = tiny_run.finish(tiny_run.start(tmp_path, cache, flag, steps=STEPS))
    assert f"resumed from step {step} in" in out
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_a_signal_to_the_group_while_workers_start(
    tmp_path, cache, uninterrupted, number, after
):
    flag = "--config.data.workers=2"
    process = tiny_run.start(tmp_path, cache, flag, steps=STEPS, checkpoint_every=1000)
    tiny_run.wait_for(lambda: workers_of(process), process)
    time.sleep(after)
    os.killpg(process.pid, number)
    out, err = tiny_run.finish(process, timeout=60)
    assert re.search(rf"stopp(ed|ing)\W.*{number.name}", out) or "checkpoint:" in out
    assert "Traceback" not in err and "KeyboardInterrupt" not in err
    tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS))
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_signal_while_compiling_leaves_nothing(tmp_path):
    process = tiny_run.start(tmp_path / "run", tmp_path / "cache")
    while "compiling the training step" not in process.stdout.readline():
        assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = tiny_run.finish(process)
    assert time.monotonic() - begun < 5
    assert out == "stopped by SIGTERM while compiling: nothing to save\n"
    assert not checkpoint.steps(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [True, False])
def test_sighup_saves_unless_it_is_ignored(tmp_path, cache, uninterrupted, ignored):
    prefix = ("nohup",) if ignored else ()
    process = tiny_run.start(tmp_path, cache, prefix=prefix, steps=STEPS)
    tiny_run.wait_for(lambda: tiny_run.logged(tmp_path) >= 3, process)
    process.send_signal(signal.SIGHUP)
    out, _ = tiny_run.finish(process)
    assert ("stopped by SIGHUP" in out) != ignored
    tiny_run.finish(tiny_run.start(tmp_path, cache, steps=STEPS))
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_run(tmp_path, cache, number):
    flag = "--config.data.workers=2"
    process = tiny_run.start(tmp_path, cache, flag, steps=100_000)
    tiny_run.wait_for(lambda: tiny_run.logged(tmp_path) >= 3, process)

    def members():
        """Processes of the run's session that still live."""
        found = subprocess.run(
            ["ps", "-o", "stat=", "-s", str(process.pid)],
            capture_output=True,
            text=True,
        )
        return [stat for stat in found.stdout.split() if not stat.startswith("Z")]

    assert len(members()) >= 3
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 15
    while members() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members() == []


@pytest.mark.slow
def test_full_disk(tmp_path, cache):
    """On a small file system of its own, mounted in a namespace; then it grows."""
    enter = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    if (
        not shutil.which("unshare")
        or subprocess.run([*enter, mount, tmp_path]).returncode
    ):
        pytest.skip("this machine does not allow user namespaces")
    script = f'{mount}; "$@"; echo "exit code $?"; mount -o remount,size=9m "$0"; "$@"'
    process = tiny_run.start(
        tmp_path / "run",
        cache,
        prefix=[*enter, script, str(tmp_path)],
        steps=STEPS,
        keep=100,
        checkpoint_every=2,
    )
    out, err = tiny_run.finish(process)
    said = re.search(r"the disk is full: the checkpoint of step (\d+) needs up to", err)
    assert "Traceback" not in err and "exit code 2" in out
    good = int(said[1]) - 2
    assert f"last good checkpoint: step {good}; make room" in err
    assert f"resumed from step {good} in" in out and "test accuracy: " in out
