"""What a signal does to a run: said at once, ended soon, and nothing lost."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run

from train import (
    checkpoint,
    flight,
    loop,
    main,
    pace,
    records,
    replay,
    sharding,
    signals,
    step,
)
from train.data import pipeline
from train.draw import figures
from train.report import answers, inside, pages

SECONDS = 30.0  # how long a test waits for what takes none


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def send(stop, number):
    """To this process, until the thread that receives it knows."""
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.signal)


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_signal_says_what_it_saves_before_the_main_thread_does(number, capfd):
    with signals.stop_signals() as stop:
        assert stop.may_begin(7) and stop.may_begin(8)
        send(stop, number)
        name = signal.Signals(number).name
        assert stop.signal == name
        wait_until(
            lambda: f"stopping ({name}): saving step 8" in capfd.readouterr().out
        )
        assert stop.may_begin(8) and not stop.may_begin(9)
        with pytest.raises(signals.Stopped, match=f"stopped by {name}"):
            signals.check()
    signals.check()  # the stop is over


def test_what_comes_to_an_end_by_itself(capfd):
    with signals.stop_signals() as stop:
        stop.nothing_to_save("compiling")
        send(stop, signal.SIGTERM)
        assert not stop.may_begin(1)
    with signals.stop_signals() as stop:
        stop.may_begin(3)
        stop.ends_after("batch")
        assert list(signals.stoppable([1, 2])) == [1, 2]
        send(stop, signal.SIGTERM)
        with pytest.raises(signals.Stopped):
            next(signals.stoppable([1, 2]))
    said = "stopping (SIGTERM) after compiling: nothing to save\n"
    assert capfd.readouterr().out == said + "stopping (SIGTERM) after this batch\n"


def test_a_second_signal_is_that_of_the_process():
    with signals.stop_signals() as stop:
        send(stop, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SECONDS)


def test_sighup_stays_ignored(capfd):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_signals() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            send(stop, signal.SIGTERM)
            assert stop.signal == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_stop_for_what_lies_within():
    handler = signal.getsignal(signal.SIGTERM)
    with signals.stop_signals() as outer, signals.stop_signals() as inner:
        assert outer is inner
    assert signal.getsignal(signal.SIGTERM) is handler
    found = []

    def elsewhere():
        with signals.stop_signals() as stop:
            found.append(stop.may_begin(1))

    thread = threading.Thread(target=elsewhere)  # receives no signals
    thread.start()
    thread.join()
    assert found == [True]


BUSY = """
import hashlib, sys
from train.signals import stop_signals

with stop_signals(program=True) as stop:
    if sys.argv[1] == "compiling":
        stop.nothing_to_save("compiling")
    else:
        stop.may_begin(4)
    print("busy")
    # Long, and without a look at Python's handlers, like a compiler.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)
"""


def busy(doing):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, doing],
        cwd=tiny_run.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    return process


def test_a_program_with_nothing_to_save_ends_inside_the_compiler():
    process = busy("compiling")
    process.send_signal(signal.SIGTERM)
    out, _ = tiny_run.finish(process, 0, SECONDS)
    assert out == "stopped by SIGTERM while compiling: nothing to save\n"


def test_a_second_signal_ends_a_program_hard():
    process = busy("training")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping (SIGTERM): saving step 4\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = tiny_run.finish(process, 128 + signal.SIGINT, SECONDS)
    assert out == "ended by a second signal, SIGINT\n"


class Result:
    """Of a step that takes a while: the time at which it is known."""

    def __init__(self, clock, seconds):
        self._clock, self._seconds, self.known = clock, seconds, False

    def block_until_ready(self):
        self._clock[0] += self._seconds
        self.known = True
        return self


@pytest.mark.parametrize(("seconds", "most"), [(0.01, 2), (2.0, 1)])
def test_steps_in_flight(monkeypatch, seconds, most):
    clock = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    mesh = jax.make_mesh((1,), ("data",))
    ahead, results = pace.Pace(mesh), []
    clock[0] += 100  # what comes before the first step says nothing of the steps
    for number in range(6):
        ahead.wait()
        done = sum(result.known for result in results)
        assert done == number - len(ahead)
        # The second waits for the first, which says how long they take.
        assert len(ahead) == (0 if number < 2 else most - 1)
        results.append(Result(clock, seconds))
        ahead.begun(results[-1], False)
    ahead.drain()
    assert len(ahead) == 0 and all(result.known for result in results)
    # An evaluation makes quick steps no slow ones: none of them waits.
    clock[0] += 100
    for number in range(3):
        ahead.wait()
        assert len(ahead) == (0 if number < 1 else most - 1)
        ahead.begun(Result(clock, seconds), False)


def test_several_processes_stop_where_they_agree(monkeypatch, capfd):
    """Until then a signal ends none of them, and no step is named."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ahead = pace.Pace(jax.make_mesh((1,), ("data",)))
    with signals.stop_signals() as stop:
        stop.nothing_to_save("starting")
        begun = 0
        while loop.may_begin(begun + 1, ahead, None, stop):
            if begun == 3:  # while the third is computed
                send(stop, signal.SIGTERM)
            begun += 1
            ahead.begun(np.zeros(()), stop.signal is not None)
            ahead.wait()
        ahead.drain()
    said = "after this step and those that all processes have begun\n"
    assert capfd.readouterr().out == f"stopping (SIGTERM) {said}"
    assert begun == 5  # the fourth tells of it, and the fifth has begun by then


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    cache = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.run(tiny_run.config(), workdir)


# Validation has 4 batches, at steps 5, 10 and 12; then the test has 9, and 9 of the
# best step.
@pytest.mark.parametrize(
    ("batch", "at"),
    [
        (23, 12),
        pytest.param(2, 5, marks=pytest.mark.slow),
        pytest.param(10, 12, marks=pytest.mark.slow),
        pytest.param(14, 12, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_ends_after_its_batch(tmp_path, monkeypatch, finished, batch, at):
    count = 0
    make = step.make_eval_step

    def make_eval_step(*arguments):
        compiled = make(*arguments)

        def counted(*inputs):
            nonlocal count
            count += 1
            if count == batch:
                send(signals._active, signal.SIGTERM)
            return compiled(*inputs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(loop.step, "make_eval_step", make_eval_step)
        stopped = loop.run(tiny_run.config(), tmp_path)
    assert stopped == {"step": at, "stopped": "SIGTERM"} and count == batch
    assert checkpoint.newest_good(tmp_path) == at
    assert not (tmp_path / records.RESULTS).exists()
    results = loop.run(tiny_run.config(), tmp_path)
    checked = {**results, "checkpoint": finished[1]["checkpoint"]}
    assert checked == finished[1]
    assert tiny_run.lines(tmp_path) == tiny_run.lines(finished[0])
    assert tiny_run.weights(tmp_path) == tiny_run.weights(finished[0])


def test_a_stop_while_a_batch_is_waited_for(tmp_path, monkeypatch, finished):
    ready = pipeline.TrainIterator.ready

    def late(self, stopped):
        if self.get_state()["batches"] < 7:
            return ready(self, stopped)
        send(signals._active, signal.SIGTERM)
        return not stopped()

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainIterator, "ready", late)
        assert loop.run(tiny_run.config(), tmp_path)["step"] == 7
    loop.run(tiny_run.config(), tmp_path)
    assert tiny_run.lines(tmp_path) == tiny_run.lines(finished[0])
    assert tiny_run.weights(tmp_path) == tiny_run.weights(finished[0])


@pytest.mark.parametrize(
    ("during", "after"),
    [
        ((pages, "_verdict"), (pages, "_curves")),
        ((pages, "_curves"), (inside, "_stages")),
        pytest.param(
            (answers, "section"), (figures, "spectra"), marks=pytest.mark.slow
        ),
        pytest.param(
            (pages, "_reproduce"), (pages, "_environment"), marks=pytest.mark.slow
        ),
    ],
    ids=["verdict", "curves", "answers", "reproduce"],
)
def test_a_report_ends_after_its_section(finished, monkeypatch, capfd, during, after):
    workdir, _ = finished
    before = {path.name for path in workdir.iterdir()}
    results = (workdir / records.RESULTS).read_text()
    make, ended = getattr(*during), []

    def stopped(*arguments):
        send(signals._active, signal.SIGTERM)
        section = make(*arguments)
        ended.append(during)
        return section

    monkeypatch.setattr(*during, stopped)
    monkeypatch.setattr(*after, lambda *_: ended.append(after))
    assert main._unless_stopped(lambda _: main._write_report(workdir), []) == 0
    assert ended == [during]
    first, last = capfd.readouterr().out.splitlines()
    assert first == "stopping (SIGTERM) after this section of the report"
    assert last == "stopped by SIGTERM"
    assert {path.name for path in workdir.iterdir()} == before
    assert (workdir / records.RESULTS).read_text() == results


def test_the_search_for_what_broke_ends_after_its_step():
    def probe(state, _):
        asked.append(state)
        if len(asked) == 2:
            send(signals._active, signal.SIGTERM)
        return flight.Probe({}, {}, np.float32(0), {})

    def train_step(state, _):
        return state + 1, {}

    asked, mesh = [], sharding.rows_mesh()
    with signals.stop_signals(), pytest.raises(signals.Stopped):
        batches = itertools.repeat({})
        flight.find(probe, train_step, 7, batches, mesh, range(8, 99))
    assert asked == [7, 8]


def test_a_run_that_broke_has_its_error_also_where_the_search_was_stopped(
    tmp_path, monkeypatch
):
    def stopped(*_):
        raise signals.Stopped("stopped by SIGTERM")

    progress = SimpleNamespace(step=5, state=None, in_a_row=0)
    monkeypatch.setattr(replay, "start", lambda *_: progress)
    monkeypatch.setattr(replay, "Checkpoints", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(flight, "find", stopped)
    batches = SimpleNamespace(close=lambda: None)
    parts = SimpleNamespace(
        examples=lambda: batches, probe=None, train_step=None, mesh=None
    )
    assert replay.first_broken(tiny_run.config(), tmp_path, parts, 8) == ""


def test_a_process_that_is_being_started_is_ended_too(monkeypatch, capfd):
    children, acts = [], []
    monkeypatch.setattr(signals.multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(signals.os, "_exit", acts.append)
    stop = signals.Stop(program=True)
    with signals.STARTS:
        thread = threading.Thread(target=stop.receive, args=(signal.SIGTERM,))
        thread.start()
        thread.join(0.2)
        assert acts == []
        children.append(SimpleNamespace(kill=lambda: acts.append("killed")))
    thread.join()
    signals.STARTS.release()  # which the end of the process does elsewhere
    assert acts == ["killed", 0]
    assert "stopped by SIGTERM while setting up" in capfd.readouterr().out
