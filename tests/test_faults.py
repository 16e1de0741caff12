"""What breaks while a run goes on: saves that hang, steps that are not finite, data
that are gone."""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import test_checkpoint
import tiny_run
from eight_devices import ALONE, THERE, passed
from PIL import Image

from configs import video
from train import (
    checkpoint,
    digest,
    faults,
    flight,
    loop,
    main,
    metrics,
    parts,
    sharding,
    window,
)
from train.checkpoint import CheckpointError, Checkpoints
from train.data import pipeline, prepared
from train.data.workers import WorkerError

SECONDS = 30.0  # how long a test waits for what takes none


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of the runs below, which compile the same step again and again."""
    before = jax.config.jax_compilation_cache_dir
    folder = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", folder)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def stuck(monkeypatch):
    """Saves, but for that of step 10, wait for their digest until this is set."""
    event, write = threading.Event(), digest.write

    def waits(folder):
        if folder.name != "10":
            event.wait()
        write(folder)

    monkeypatch.setattr(digest, "write", waits)
    yield event
    release(event)


def release(event):
    event.set()
    for thread in checkpoint._abandoned:
        thread.join()


@contextlib.contextmanager
def begun(workdir, timeout):
    """The second of two saves, at most one of them is kept: it hangs. The first may
    take any time, as on a machine with other work it does."""
    target = test_checkpoint.make()
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(test_checkpoint.at(10, target), {}, {})
    with Checkpoints(workdir, 1, timeout=timeout) as checkpoints:
        checkpoints.restore(target)
        checkpoints.save(test_checkpoint.at(20, target), {}, {})
        yield checkpoints


def polled(checkpoints):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        checkpoints.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("notice", [polled, Checkpoints.wait, lambda _: None])
def test_a_save_that_hangs_ends_the_run(tmp_path, stuck, notice):
    """Noticed between two steps, where it is waited for, and on leaving."""
    before = time.monotonic()
    with (
        pytest.raises(CheckpointError) as caught,
        begun(tmp_path, timeout=0.5) as checkpoints,
    ):
        notice(checkpoints)
    assert 0.5 < time.monotonic() - before < SECONDS
    assert str(caught.value) == (
        f"the checkpoint {tmp_path}/checkpoints/20 was not written within 0.5 s, which "
        "is train.save_timeout; last good checkpoint: step 10; once its file system "
        "answers, start the same command again"
    )
    with pytest.raises(CheckpointError, match="was not written within"):
        checkpoints.save(test_checkpoint.make(), {}, {})
    assert checkpoint.hanging()
    assert checkpoint.newest_good(tmp_path) == 10
    release(stuck)
    assert not checkpoint.hanging()
    # What ends too late removes nothing any more.
    assert checkpoint.damage(tmp_path / "checkpoints" / "10") is None


def test_an_error_comes_before_that_of_a_save_that_hangs(tmp_path, stuck, caplog):
    with pytest.raises(KeyError), begun(tmp_path, timeout=0.5):
        raise KeyError
    assert "checkpoints/20 was not written within 0.5 s" in caplog.text


@pytest.mark.parametrize("timeout", [0.0, 1e30])
def test_a_save_may_take_any_time(tmp_path, stuck, timeout):
    with begun(tmp_path, timeout) as checkpoints:
        checkpoints.poll()
        threading.Timer(0.3, stuck.set).start()
    assert checkpoint.newest_good(tmp_path) == 20


def test_a_negative_timeout(tmp_path):
    with pytest.raises(ValueError, match=r"train.save_timeout must be 0 or more"):
        Checkpoints(tmp_path, 1, timeout=-1.0)


HANGS = """
import threading
from orbax.checkpoint._src.checkpointers import async_checkpointer
from train import main

commit = async_checkpointer._on_commit_callback

def hangs(folder, *arguments):
    if folder.get_final().name == "10":
        threading.Event().wait()
    commit(folder, *arguments)

async_checkpointer._on_commit_callback = hangs
main.command(main.main)
"""


@pytest.mark.slow
def test_a_process_whose_save_hangs_ends_and_its_run_goes_on(tmp_path, cache):
    """A thread of orbax's hangs too, which the interpreter would wait for."""
    process = tiny_run.start(tmp_path, cache, program=("-c", HANGS), save_timeout=10.0)
    _, err = tiny_run.finish(process, code=2, timeout=90)
    assert err.startswith(
        f"error: the checkpoint {tmp_path}/checkpoints/10 was not written within 10 s"
    )
    assert "last good checkpoint: step 5;" in err and err.count("\n") == 1
    assert tiny_run.weights(tmp_path)[0] == 5
    out, _ = tiny_run.finish(tiny_run.start(tmp_path, cache))
    assert "resumed from step 5 in" in out
    assert tiny_run.weights(tmp_path)[0] == 12


def poison(monkeypatch, steps):
    """The inputs of these steps are not numbers."""
    take = pipeline.TrainIterator.__next__

    def poisoned(self):
        batch = take(self)
        if self._taken in steps:
            batch["inputs"] = np.full_like(batch["inputs"], np.nan)
        return batch

    monkeypatch.setattr(pipeline.TrainIterator, "__next__", poisoned)


def leave_out(monkeypatch, steps):
    """These steps count, and that is all they do."""
    set_up = loop.set_up

    def changed(*arguments):
        made = set_up(*arguments)
        compute = made.train_step

        def train_step(state, batch):
            if int(jax.device_get(state.step)) + 1 not in steps:
                return compute(state, batch)
            step = jax.device_put(np.int32(state.step) + 1, state.step.sharding)
            nothing = {"loss": np.float32(np.nan), "grad_norm": np.float32(0)}
            return state.replace(step=step), nothing

        made.train_step = train_step
        return made

    monkeypatch.setattr(loop, "set_up", changed)


def ended(monkeypatch, config, workdir):
    """The progress at the last step of a run, which is not tested."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *given: found.append(given[-1]))
        loop.run(config, workdir)
    return found[0]


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def skipping(**train):
    """A run that saves where its steps say, and not where it is better."""
    return tiny_run.config(**{"skip_nonfinite": 3, "eval_every": 1000} | train)


BAD = (4, 5, 6, 9)


@pytest.mark.parametrize(
    "train", [{}, pytest.param(dict(accumulate=2, record=True), marks=pytest.mark.slow)]
)
def test_steps_that_are_not_finite_change_nothing(
    tmp_path, monkeypatch, capsys, cache, train
):
    with monkeypatch.context() as patch:
        poison(patch, BAD)
        found = ended(monkeypatch, skipping(**train), tmp_path / "a")
    said = re.findall(r"step \d+ is skipped: .*", capsys.readouterr().out)
    assert said == [f"step {n} is skipped: grad_norm is nan, loss is nan" for n in BAD]
    text = (tmp_path / "a" / metrics.FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text
    rows = {r["step"]: r for r in map(json.loads, text.splitlines()) if "lr" in r}
    assert {n: row["skipped"] for n, row in rows.items()} == {3: 0, 6: 3, 9: 4, 12: 4}
    assert [n for n, row in rows.items() if "loss" in row] == [3, 9, 12]
    recorded = [n for n, row in rows.items() if any("record" in name for name in row)]
    assert recorded == ([3, 12] if train else [])  # 6 and 9 ended with a step skipped
    assert rows[6]["lr"] == rows[3]["lr"] > rows[9]["lr"] > rows[12]["lr"]
    with monkeypatch.context() as patch:
        leave_out(patch, BAD)
        expected = ended(monkeypatch, skipping(**train), tmp_path / "b")
    assert_same(found.state, expected.state)
    assert found.skipped == 4 and found.in_a_row == 0


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_also_where_it_goes_on(
    tmp_path, monkeypatch, cache
):
    poison(monkeypatch, (4, 5, 6, 7))
    for _ in range(2):
        with pytest.raises(FloatingPointError) as caught:
            loop.run(skipping(), tmp_path / "run")
        assert re.match(
            "grad_norm is nan, loss is nan at step 7, the last of 4 steps in a row, "
            "from step 4 on, that are not finite, and train.skip_nonfinite allows 3; "
            "first non-finite value: .* = nan, step 6; last good checkpoint: step 5 in",
            str(caught.value),
        )
        assert checkpoint.steps(tmp_path / "run") == [5]
    # Who allows more goes on, as if it had been allowed from the start.
    goes_on_as_if_nothing_was(monkeypatch, skipping(skip_nonfinite=4), tmp_path)
    (*_, last) = (r for r in tiny_run.lines(tmp_path / "run") if r["split"] == "train")
    assert last["skipped"] == 4


@pytest.mark.slow
def test_what_broke_is_not_looked_for_where_a_save_hangs(
    tmp_path, monkeypatch, stuck, caplog, cache
):
    poison(monkeypatch, (6,))
    with pytest.raises(FloatingPointError, match=r"is nan at step 6$"):
        loop.run(skipping(skip_nonfinite=0, save_timeout=3.0), tmp_path)
    assert "checkpoints/5 was not written within 3 s" in caplog.text


@pytest.mark.slow
def test_none_is_skipped_unless_that_is_asked_for(tmp_path, monkeypatch, cache):
    poison(monkeypatch, (4,))
    with pytest.raises(FloatingPointError, match="is nan at step 4; first non-"):
        loop.run(skipping(skip_nonfinite=0), tmp_path)


def test_a_checkpoint_from_before_steps_were_skipped():
    memory = {"step": 3, "best": None, "window": [], "unvalidated": False}
    progress = parts.Progress(None, **memory)
    assert (progress.skipped, progress.in_a_row) == (0, 0)
    assert progress.memory() == memory | {"skipped": 0, "in_a_row": 0}


def measured(loss=1.0, **other):
    return {"loss": loss, "grad_norm": 1.0, "weight": 8.0, **other}


def test_a_number_of_a_step_that_was_taken_ends_the_run():
    """The state has followed its gradient, whatever else is not finite."""
    broken = measured(psnr=np.inf)
    progress = parts.Progress(None, step=2, unchecked=[measured(), broken])
    with pytest.raises(FloatingPointError, match=r"^psnr is inf at step 2$"):
        window.check_window(progress, 3)
    assert progress.skipped == 0


def test_steps_are_counted_once():
    progress = parts.Progress(None, step=2, unchecked=[measured(), measured(np.nan)])
    for _ in range(3):  # as for a checkpoint, and for the log after it
        window.check_window(progress, 1)
    assert (progress.skipped, progress.in_a_row) == (1, 1)
    assert progress.window == [measured()]
    progress.step, progress.unchecked = 3, [measured()]
    window.check_window(progress, 1)
    assert (progress.skipped, progress.in_a_row) == (1, 0)


@pytest.mark.parametrize(
    ("bad", "allowed", "in_a_row", "found"),
    [
        ((6, 8, 9, 10), 2, 0, "8"),  # 6 was skipped and done with
        ((6, 8, 9, 10), 0, 0, "6"),
        ((5, 6, 9), 2, 1, "5"),  # the one before the first was skipped too
        ((6,), 2, 0, ""),  # what ended the run came after
        ((10,), 2, 0, "10"),  # the state of the last step is not finite
    ],
)
def test_what_ended_a_run_is_found_among_what_was_skipped(
    bad, allowed, in_a_row, found
):
    def probe(state, _):
        value = np.float32(np.nan if state + 1 in bad else 0.0)
        return flight.Probe({}, {}, value, {})

    def train_step(state, _):
        return state + 1, {}

    batches, mesh = iter([{}] * 99), sharding.rows_mesh()
    steps = range(5, 11)
    said = flight.find(probe, train_step, 4, batches, mesh, steps, allowed, in_a_row)
    assert said == (f"the loss = nan, step {found}" if found else "")


@THERE
def test_steps_are_skipped_over_a_mesh(tmp_path, monkeypatch):
    config = skipping(accumulate=2, batch_size=16, steps=6, checkpoint_every=4)
    config.mesh.update(data=2, fsdp=4)
    found = {}
    for name, harm in (("found", poison), ("expected", leave_out)):
        with monkeypatch.context() as patch:
            harm(patch, (3, 4))
            found[name] = ended(monkeypatch, config, tmp_path / name)
    assert_same(found["found"].state, found["expected"].state)
    assert found["found"].skipped == 2
    leaves = jax.tree.leaves(found["found"].state)
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)


@ALONE
@pytest.mark.slow
def test_eight_devices():
    assert passed(__file__, "over_a_mesh") == 1


def fail_at(monkeypatch, call, error):
    """The next batch cannot be had, when it is asked for the `call`-th time."""
    take, calls = pipeline.TrainIterator.__next__, []

    def failing(self):
        calls.append(self)
        if len(calls) == call:
            raise error
        return take(self)

    monkeypatch.setattr(pipeline.TrainIterator, "__next__", failing)


GONE = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "my.bin")


@pytest.mark.parametrize(
    ("error", "said", "ours"),
    [
        (GONE, r"\[Errno 2\] No such file or directory: 'my.bin'", True),
        pytest.param(
            WorkerError("it has died"), "it has died", True, marks=pytest.mark.slow
        ),
        pytest.param(KeyError("x"), "KeyError: 'x'", False, marks=pytest.mark.slow),
    ],
)
def test_what_was_done_is_saved_when_data_are_gone(
    tmp_path, monkeypatch, cache, error, said, ours
):
    """And whose mistake it was is told from the error itself."""
    with monkeypatch.context() as patch:
        fail_at(patch, 9, error)  # the first is for compiling
        with pytest.raises(faults.BatchError) as caught:
            loop.run(tiny_run.config(), tmp_path / "run")
    rest = (
        rf"; step 7 is saved, from where the same command goes on \(workdir {tmp_path}"
    )
    assert re.match(said + rest, str(caught.value))
    assert caught.value.__cause__ is error
    assert main._ours(caught.value) == ours
    assert checkpoint.newest_good(tmp_path / "run") == 7
    goes_on_as_if_nothing_was(monkeypatch, tiny_run.config(), tmp_path)


def goes_on_as_if_nothing_was(monkeypatch, config, place):
    """What is in place/run ends as a run in place/other that starts now."""
    found, expected = (
        ended(monkeypatch, config, place / name) for name in ("run", "other")
    )
    assert_same(found.state, expected.state)
    assert found.memory() == expected.memory()
    found, expected = (tiny_run.lines(place / name) for name in ("run", "other"))
    assert found == expected


def test_data_that_are_gone_before_the_first_step(tmp_path, monkeypatch, cache):
    fail_at(monkeypatch, 2, GONE)
    with pytest.raises(faults.BatchError, match=r"'my.bin'; no step done, from where"):
        loop.run(tiny_run.config(), tmp_path)
    assert checkpoint.steps(tmp_path) == []


def test_a_save_that_fails_comes_before_what_it_was_for(tmp_path, monkeypatch, cache):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fail_at(monkeypatch, 5, GONE)
    monkeypatch.setattr(digest, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        loop.run(tiny_run.config(), tmp_path)


def filmed(folder, workers):
    config = video.get_config(f"frames,layer=conv_lstm,path={folder}")
    config.data.update(length=4, channels=1, workers=workers)
    config.model.update(features=4, depth=1)
    config.model.video.depths = (4, 4)
    config.optimizer.warmup = 0
    config.train.update(steps=14, batch_size=2, log_every=1, eval_every=10)
    config.train.update(checkpoint_every=1000)
    return config


def at_step(monkeypatch, step, act):
    write = metrics.Metrics.write

    def written(self, number, *arguments):
        write(self, number, *arguments)
        if number == step:
            act()

    monkeypatch.setattr(metrics.Metrics, "write", written)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "workers", "saved"),
    [("train", 0, 0), ("train", 1, 0), ("validation", 0, 10)],
)
def test_frames_that_vanish_or_are_cut_off(
    tmp_path, monkeypatch, split, workers, saved
):
    """They are read when they are needed, those of a validation too."""
    rng, folder, aside = (
        np.random.default_rng(0),
        tmp_path / "frames",
        tmp_path / "aside",
    )
    for part in ("train", "validation"):
        for one in range(3):
            (folder / part / f"video{one}").mkdir(parents=True)
            for t in range(6):
                pixels = rng.integers(256, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"video{one}" / f"{t}.png")

    def harm():
        shutil.copytree(folder, aside)
        for file in (folder / split).rglob("*.png"):
            os.truncate(file, 40) if saved else file.unlink()

    config = filmed(folder, workers)
    with monkeypatch.context() as patch:
        at_step(patch, 3, harm)
        with pytest.raises(faults.BatchError) as caught:
            loop.run(config, tmp_path / "run")
    said = str(caught.value)
    assert re.match(rf"{folder}/{split}/video\d/\d.png: not a readable image", said)
    step = int(re.search(r"; step (\d+) is saved", said)[1])
    assert step == checkpoint.newest_good(tmp_path / "run")
    assert step == saved or (not saved and 3 <= step < 10)
    assert main._ours(caught.value)
    shutil.rmtree(folder)
    aside.rename(folder)
    goes_on_as_if_nothing_was(monkeypatch, config, tmp_path)


def _example(record):
    return {"inputs": np.frombuffer(record, np.uint8)}


def test_records_that_were_altered_are_named(tmp_path):
    path = tmp_path / "train.array_record"
    rng = np.random.default_rng(0)
    prepared.write_records(path, (rng.bytes(2000) for _ in range(2000)))
    records = prepared.Records([path], _example)
    assert records[0]["inputs"].shape == (2000,)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : -len(content) // 3] = bytes(len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} cannot be read .*prepared again"):
        for index in range(2000):
            records[index]
