"""Runs of several processes: how they find one another, what each reads, and that they
train, stop, die and go on as one."""

import os
import random
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import tiny_run

from train import checkpoint, data, evaluate, hosts, records, runs
from train.hosts import Place

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-008],other",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
SLURM_PORT = 12_000 + (4242 * 7 + 1) % 20_000
JOBSET = {
    "JOB_COMPLETION_INDEX": "2",
    "JOBSET_NAME": "long",
    "REPLICATED_JOB_NAME": "workers",
    "JAX_NUM_PROCESSES": "4",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.svc, t-1.svc"}
SLICES = TPU | {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s:8080",
}
BY_JAX = {
    "JAX_COORDINATOR_ADDRESS": "a:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        (SLURM, Place(f"gpu007:{SLURM_PORT}", 4, 3, None, "SLURM")),
        # A shell of salloc or a script of sbatch is no task, whatever the job has.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            JOBSET,
            Place("long-workers-0-0.long:8476", 4, 2, None, "JAX_ variables, JobSet"),
        ),
        ({"JOB_COMPLETION_INDEX": "7"}, None),  # of a sweep: its pods are alone
        (TPU, Place("t-0.svc:8482", 2, 1, None, "TPU pod")),
        (SLICES, Place("s-0-0.s:8482", 4, 3, None, "TPU pod")),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (BY_JAX, Place("a:1234", 2, 1, None, "JAX_ variables")),
        # By hand before by itself, each for what it says.
        (
            SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1234"},
            Place("a:1234", 4, 3, None, "JAX_ variables, SLURM"),
        ),
        (BY_JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_where_others_are_found(env, place):
    assert hosts.find(env=env) == place


def test_flags_come_before_variables():
    found = hosts.find("b:99", 3, 2, env=BY_JAX | SLURM)
    assert found[:3] == ("b:99", 3, 2) and found.found == "flags"
    assert hosts.find("b:99", 3, 2, env={}).found == "flags"
    assert hosts.find(processes=1, process=0, env=SLURM) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015]", "node001"),
        ("a-b[3]", "a-b3"),
        ("rack[0-1]_blade[3-5],rack7", "rack0_blade3"),
        ("", ""),
    ],
)
def test_the_first_node_of_slurm(nodes, first):
    assert hosts._first_host(nodes) == first


@pytest.mark.parametrize(
    ("tasks", "node", "local", "visible", "devices"),
    [
        ("1(x2)", 1, 0, "0,1,2,3", None),  # alone on its node: all
        ("4(x2)", 0, 2, "0,1,2,3", (2,)),
        ("2(x2),1", 1, 1, "0,1,2,3", (2, 3)),
        ("2(x2),1", 2, 0, "0,1,2,3", None),
        ("4", 0, 2, "2", None),  # --gpus-per-task: it sees its own
        ("4", 0, 2, "", None),
        ("", 0, 0, "0,1", None),
    ],
)
def test_the_devices_of_a_task_of_slurm(tasks, node, local, visible, devices):
    env = SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "CUDA_VISIBLE_DEVICES": visible,
    }
    assert hosts.find(env=env).devices == devices


@pytest.mark.parametrize(
    "own",
    [
        {"SLURM_GPUS_PER_TASK": "4"},
        {"SLURM_TRES_PER_TASK": "gres/gpu:4"},
        {"SLURM_GPU_BIND": "closest"},
    ],
)
def test_a_task_of_slurm_that_sees_its_own_devices_takes_all(own):
    env = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert hosts.find(env=env).devices == (2, 3)
    assert hosts.find(env=env | {"SLURM_GPU_BIND": "none"}).devices == (2, 3)
    assert hosts.find(env=env | own).devices is None


@pytest.mark.parametrize(
    ("flags", "env", "said"),
    [
        (("a:1", None, None), {}, "--processes must be given .*flags said coordinator"),
        ((None, 4, 1), {}, "--coordinator must be given"),
        ((None, None, 1), {}, "--process must come with --coordinator and --proc"),
        (("a:1", 4, 4), {}, "--process must be from 0 to 3, .* got 4"),
        (("a:1", 0, 0), {}, "--processes must be 1 or more, got 0"),
        (("nowhere", 2, 0), {}, "--coordinator must be host:port, got 'nowhere'"),
        (("a:99999", 2, 0), {}, "--coordinator must be host:port, got 'a:99999'"),
        (
            (None, None, None),
            SLURM | {"SLURM_PROCID": "x"},
            "SLURM_PROCID must be a wh",
        ),
        (
            (None, None, None),
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            "SLURM must give a node as many GPUs as tasks, .* got 3 for 2 tasks",
        ),
        (
            (None, None, None),
            {k: v for k, v in JOBSET.items() if k != "JAX_NUM_PROCESSES"},
            "--processes must be given .*JobSet said coordinator, process",
        ),
    ],
)
def test_what_is_not_enough_to_find_them(flags, env, said):
    with pytest.raises(ValueError, match=said):
        hosts.find(*flags, env=env)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# Before a batch norm a bias has no gradient but what rounding leaves.
NORM = "--config.model.norm=layer"


STARTED = []


def member(workdir, cache, port, process, *flags, **train):
    """One of two processes, with four devices."""
    flags = [f"--coordinator=localhost:{port}", f"--process={process}", NORM, *flags]
    started = tiny_run.start(
        workdir, cache, "--processes=2", *flags, devices=4, **train
    )
    STARTED.append(started)
    return started


def pair(workdir, cache, *flags, second=(), **train):
    """Two processes with four devices each."""
    port = free_port()
    return [
        member(workdir, cache, port, process, *flags, *more, **train)
        for process, more in enumerate(((), second))
    ]


def finish(processes, code=0):
    """What both print."""
    return [tiny_run.finish(process, code, timeout=400) for process in processes]


@pytest.fixture(autouse=True)
def none_left():
    """Whatever a test has come to, it leaves no process behind."""
    yield
    for process in STARTED:
        with process:  # which closes its pipes and waits for it
            process.kill()
    STARTED.clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """A run of two processes."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    (out, _), (silent, _) = finish(pair(workdir, cache))
    assert "process 0 of 2 on " in out and ": 4 x cpu" in out
    own = [line for line in silent.splitlines() if "[Gloo]" not in line]
    assert len(own) == 1 and own[0].startswith("process 1 of 2 on ")
    return workdir


def test_an_address_that_is_taken(tmp_path, cache):
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        _, err = tiny_run.finish(member(tmp_path / "run", cache, port, 0), code=2)
    assert err.startswith(
        f"error: --coordinator must have a free port on this host, got {port}, which"
    )
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer(tmp_path, cache):
    process = member(tmp_path / "run", cache, free_port(), 1, "--start_timeout=2")
    _, err = tiny_run.finish(process, code=2)
    assert re.match(
        r"error: --coordinator localhost:\d+ did not answer within 2 s", err
    )


def test_a_process_that_does_not_come(tmp_path, cache):
    process = member(tmp_path / "run", cache, free_port(), 0, "--start_timeout=2")
    _, err = tiny_run.finish(process, code=2)
    assert re.search(
        r"error: not all of 2 processes came to localhost:\d+ within 2 s", err
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_one_host_are_those_of_the_whole_batch(workers):
    """Behind augmentation, from any position on."""
    dataset = data.load(tiny_run.config().data)
    whole, mine = (
        dataset.train(6, 3),
        dataset.train(6, 3, workers, rows=lambda size: [1, 2, 5]),
    )
    for _ in range(3):
        all_rows, own = next(whole), next(mine)
        for name in all_rows:
            np.testing.assert_array_equal(own[name], all_rows[name][[1, 2, 5]])
    assert mine.get_state() == whole.get_state()
    later = dataset.train(6, 3, workers, rows=lambda size: [0])
    later.set_state(whole.get_state())
    np.testing.assert_array_equal(next(later)["inputs"], next(whole)["inputs"][:1])
    mine.close()
    later.close()


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_evaluation_on_several_hosts_covers_every_example_once(count):
    dataset = data.load(tiny_run.config().data).shortened(count)
    whole = list(dataset.evaluation("test", 4))
    parts = [list(dataset.evaluation("test", 4, rows)) for rows in ([0, 3], [1, 2])]
    assert sum(int(b["mask"].any(1).sum()) for part in parts for b in part) == count
    for all_rows, first, second in zip(whole, *parts, strict=True):
        for name in all_rows:
            np.testing.assert_array_equal(first[name], all_rows[name][[0, 3]])
            np.testing.assert_array_equal(second[name], all_rows[name][[1, 2]])


def test_a_run_of_two_processes(tmp_path, cache, uninterrupted):
    """It trains as one process does on as many devices, and one process reads it and
    goes on with it; a host with another config is refused by name."""
    tiny_run.finish(tiny_run.start(tmp_path / "alone", cache, NORM, devices=8))
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    assert_close(workdir, tmp_path / "alone")
    told = records.read_results(workdir)
    here = evaluate.scores(runs.load_run(workdir), "test")
    assert here == pytest.approx(told["test"], rel=1e-5)
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / checkpoint.FOLDER / "12")
    tiny_run.finish(tiny_run.start(workdir, cache, NORM))
    assert_close(workdir, tmp_path / "alone")
    refused = pair(tmp_path / "none", cache, second=["--config.optimizer.lr=0.5"])
    for _, err in finish(refused, code=2):
        said = next(line for line in err.splitlines() if line.startswith("error: "))
        assert said.startswith("error: process 1 on ")
        assert "has another config than process 0 (optimizer.lr is 0.5, in proc" in said
    assert not (tmp_path / "none").exists()


def assert_close(workdir, other):
    """Over other devices sums are rounded otherwise."""
    rows, others = (tiny_run.lines(path) for path in (workdir, other))
    for row, its in zip(rows, others, strict=True):
        assert row.keys() == its.keys()
        for key, value in row.items():
            if not isinstance(value, float):
                assert value == its[key]
            else:
                np.testing.assert_allclose(value, its[key], rtol=1e-4, atol=1e-6)


def stopped(workdir, cache, lines, number, process, *flags, **train):
    """A pair that a signal was sent to, when it had logged so much."""
    processes = pair(workdir, cache, *flags, **train)
    tiny_run.wait_for(lambda: tiny_run.logged(workdir) >= lines, processes[0])
    os.kill(processes[process].pid, number)
    return processes


def lost(processes, process, seconds=60):
    """Both have ended: one was killed, and the other missed it, either where the
    connection broke, which an array's computation or a thread of Gloo's own may be the
    first to see, or as the runtime heard no more of it."""
    out, err = processes[1 - process].communicate(timeout=seconds)
    code = processes[1 - process].returncode
    said = {
        2: ["error: another process of the run is lost ("],
        -signal.SIGABRT: [
            "the JAX distributed service detected fatal errors",
            "terminate called after throwing an instance of 'gloo::",
        ],
    }
    assert any(words in err for words in said.get(code, [])), (code, out, err)
    processes[process].communicate(timeout=seconds)


def test_signals_to_one_of_two_processes(tmp_path, cache, uninterrupted):
    """SIGTERM saves and ends both with 0; SIGKILL ends the other too, within a minute;
    either way the same commands go on, bit by bit as if nothing had been."""
    answers = finish(stopped(tmp_path, cache, 1, signal.SIGTERM, process=1))
    (out, _), (receiver, _) = answers
    assert "stopping (SIGTERM) after this step and those that all processes" in receiver
    step = int(
        re.search(r"stopped by a signal to another process at step (\d+)", out)[1]
    )
    assert checkpoint.newest_good(tmp_path) == step < 12
    lines = tiny_run.logged(tmp_path) + 1
    lost(stopped(tmp_path, cache, lines, signal.SIGKILL, process=0), process=0)
    finish(pair(tmp_path, cache))
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=1, fsdp=8),  # parameters over both processes
        dict(data=1, fsdp=2, tensor=4),  # rows too
        dict(data=1, tensor=8),  # both read all rows
        dict(data=1, sequence=8),
        dict(data=4, sequence=2),  # pairs of devices read the same rows
    ],
    ids=str,
)
def test_meshes_over_two_processes(tmp_path, cache, monkeypatch, sizes):
    monkeypatch.setitem(tiny_run.MODEL, "layer", "mamba")
    monkeypatch.setitem(tiny_run.MODEL, "features", 8)
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    tiny_run.finish(tiny_run.start(tmp_path / "alone", cache, NORM))
    finish(pair(tmp_path / "run", cache, *mesh))
    assert_close(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
def test_a_signal_after_the_last_step(tmp_path, cache, last):
    """All learn of it, or none does: the run ends for all alike."""
    processes = pair(tmp_path, cache)
    results = tmp_path / ("checkpoints/12" if last else "checkpoints/10")
    tiny_run.wait_for(results.exists, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    finish(processes)
    if not (tmp_path / "results.json").exists():
        finish(pair(tmp_path, cache))
    assert (tmp_path / "results.json").exists()


# The rows of the eighth batch and later ones are not to be had.
WITHOUT_DATA = """
from train import main
from train.data import pipeline

read = pipeline._Rows.__getitem__

def fail(rows, index):
    if index >= 7 * len(rows._rows):
        raise FileNotFoundError(2, "No such file or directory", "gone.bin")
    return read(rows, index)

pipeline._Rows.__getitem__ = fail
main.command(main.main)
"""


@pytest.mark.slow
def test_data_that_one_of_two_processes_lacks(tmp_path, cache, uninterrupted):
    """Both save a step, say whose data it was and end with 2: two batches before it is
    needed, that one is not there, and at step 6, a log, all look whether to stop."""
    port, options = free_port(), dict(checkpoint_every=1000)
    processes = [
        member(tmp_path, cache, port, 0, **options),
        member(tmp_path, cache, port, 1, program=("-c", WITHOUT_DATA), **options),
    ]
    other, own = (
        next(line for line in err.splitlines() if line.startswith("error: "))
        for _, err in finish(processes, code=2)
    )
    assert checkpoint.newest_good(tmp_path) == 6
    assert own == (
        "error: [Errno 2] No such file or directory: 'gone.bin'; step 6 is saved, from "
        f"where the same command goes on (workdir {tmp_path})"
    )
    assert other.startswith("error: process 1 on ") and own[7:] in other
    finish(pair(tmp_path, cache))
    tiny_run.assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_processes_are_killed_twenty_times(tmp_path, cache):
    """One of the two, at random moments, and both start again."""
    options = dict(steps=60, eval_every=60, log_every=1, checkpoint_every=2)
    finish(pair(tmp_path / "uninterrupted", cache, **options))
    rng, workdir = random.Random(0), tmp_path / "run"
    for _ in range(20):
        lines = min(tiny_run.logged(workdir) + rng.randrange(1, 4), 55)
        process, flag = rng.randrange(2), "--lost_after=10"
        lost(
            stopped(workdir, cache, lines, signal.SIGKILL, process, flag, **options),
            process,
        )
    finish(pair(workdir, cache, **options))
    tiny_run.assert_same(workdir, tmp_path / "uninterrupted")
