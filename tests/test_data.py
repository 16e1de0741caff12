import collections
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from train import data
from train.data import pipeline, sources
from train.data import workers as workers_module
from train.data.spec import Spec

DIGITS = dict(name="digits", target="label", augment="none", workers=0)
BACKGROUND = (np.float32(0) - np.float32(4.881)) / 6.014


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def numbered(count):
    """A dataset whose inputs say which example they are."""
    arrays = {
        "inputs": np.arange(count, dtype=np.float32)[:, None],
        "targets": np.arange(count) % 2,
        "mask": np.ones((count, 1), bool),
    }
    return pipeline.Dataset(
        Spec("scalar", 1, 1, "regression"), {"train": sources.Rows(arrays)}
    )


def test_digits_have_stratified_fixed_splits():
    dataset = data.load(DIGITS)
    sizes = {split: dataset.num_examples(split) for split in sources.SPLITS}
    assert sizes == {"train": 1293, "validation": 144, "test": 360}
    for split, size in sizes.items():
        (batch,) = dataset.evaluation(split, size)
        counts = np.bincount(batch["targets"], minlength=10)
        assert abs(counts - size / 10).max() < 0.1 * size / 10 + 1, split


def test_digit_splits_share_no_example():
    from sklearn.datasets import load_digits

    dataset = data.load(DIGITS)
    rows = collections.Counter()
    for split in sources.SPLITS:
        (batch,) = dataset.evaluation(split, dataset.num_examples(split))
        rows.update(row.tobytes() for row in batch["inputs"])
    pixels = (load_digits().data.astype(np.float32) - np.float32(4.881)) / 6.014
    assert rows == collections.Counter(row.tobytes() for row in pixels)


def test_digits_are_standardised_and_the_background_is_not_zero():
    dataset = data.load(DIGITS)
    (batch,) = dataset.evaluation("train", dataset.num_examples("train"))
    pixels = batch["inputs"]
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (0, 1), atol=1e-3)
    assert abs(pixels).min() > 0.01


def test_digits_by_label():
    dataset = data.load(DIGITS)
    batch = next(dataset.train(32, seed=0))
    assert batch["inputs"].shape == (32, 64) == batch["mask"].shape
    assert batch["inputs"].dtype == np.float32 and batch["mask"].all()
    assert batch["targets"].dtype == np.int32 and batch["targets"].shape == (32,)
    assert dataset.spec == Spec("scalar", 64, 10, "classification")


@pytest.mark.parametrize("augment", ["none", "affine"])
def test_digits_by_next_pixel_are_shifted_by_one(augment):
    dataset = data.load(DIGITS | dict(target="next", augment=augment))
    batch = next(dataset.train(32, seed=0))
    inputs, targets = batch["inputs"], batch["targets"]
    assert inputs.dtype == targets.dtype == np.int32
    assert (inputs[:, 0] == 17).all()
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert targets.min() >= 0 and targets.max() <= 16
    assert dataset.spec == Spec("token", 64, 17, "token", vocab_size=18, causal=True)


def test_shift_moves_by_at_most_one_pixel():
    plain = next(data.load(DIGITS).train(64, seed=3))["inputs"]
    shifted = next(data.load(DIGITS | dict(augment="shift")).train(64, seed=3))[
        "inputs"
    ]
    seen = set()
    for image, moved in zip(plain, shifted, strict=True):
        padded = np.pad(image.reshape(8, 8), 1, constant_values=BACKGROUND)
        seen |= {
            (i, j)
            for i in range(3)
            for j in range(3)
            if (padded[i : i + 8, j : j + 8] == moved.reshape(8, 8)).all()
        }
    assert seen == {(i, j) for i in range(3) for j in range(3)}


def test_affine_keeps_the_digit_recognisable():
    plain = next(data.load(DIGITS).train(256, seed=3))["inputs"]
    moved = next(data.load(DIGITS | dict(augment="affine")).train(256, seed=3))[
        "inputs"
    ]
    assert moved.min() == BACKGROUND and moved.max() <= plain.max()
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(plain, moved, strict=True)]
    assert 0.5 < np.mean(correlation) < 0.95


def test_augmentation_leaves_evaluation_alone_and_differs_between_epochs():
    plain, moved = data.load(DIGITS), data.load(DIGITS | dict(augment="affine"))
    assert_equal(plain.evaluation("test", 100), moved.evaluation("test", 100))

    def inputs_by_epoch(dataset):
        size = dataset.num_examples("train")
        first, second = take(dataset.train(size, seed=0), 2)
        return (set(map(bytes, epoch["inputs"])) for epoch in (first, second))

    first, second = inputs_by_epoch(plain)
    assert first == second
    first, second = inputs_by_epoch(moved)
    assert not first & second


def test_every_epoch_is_a_new_permutation_of_all_examples():
    batches = take(numbered(10).train(4, seed=1), 10)
    stream = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    epochs = stream.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [np.arange(10)] * 4)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_neighbouring_seeds_share_no_permutation():
    dataset = numbered(30)
    epochs = {
        tuple(batch["inputs"][:, 0])
        for seed in range(4)
        for batch in take(dataset.train(30, seed), 4)
    }
    assert len(epochs) == 16


def test_batches_keep_their_examples_together():
    batch = next(numbered(10).train(10, seed=0))
    np.testing.assert_array_equal(batch["targets"], batch["inputs"][:, 0] % 2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(workers):
    dataset = data.load(DIGITS | dict(augment="affine"))
    whole = take(dataset.train(500, seed=5), 8)  # crosses three epochs
    iterator = dataset.train(500, seed=5, workers=workers)
    assert_equal(take(iterator, 3), whole[:3])
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 2), whole[3:5])
    iterator.set_state(state)
    assert iterator.get_state() == state
    assert_equal(take(iterator, 2), whole[3:5])
    iterator.close()
    resumed = dataset.train(500, seed=5, workers=workers)
    resumed.set_state(state)
    assert_equal(take(resumed, 5), whole[3:])
    resumed.close()


def test_state_of_another_stream_is_refused():
    dataset = numbered(10)
    state = dataset.train(4, seed=1).get_state()
    with pytest.raises(ValueError, match=r"batch_size 5, the saved one had 4"):
        dataset.train(5, seed=1).set_state(state)
    with pytest.raises(ValueError, match=r"seed 2, the saved one had 1"):
        dataset.train(4, seed=2).set_state(state)
    with pytest.raises(ValueError, match=r"num_examples 11"):
        numbered(11).train(4, seed=1).set_state(state)


ORPHANS = """
import multiprocessing, time
from train import data

if __name__ == "__main__":
    dataset = data.load(dict(name="digits", target="label", augment="none"))
    iterator = dataset.train(8, seed=0, workers=2)
    for _ in range(4):
        next(iterator)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def is_running(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    with parent:
        workers = parent.stdout.readline().split()
        assert len(workers) == 2 and all(map(is_running, workers))
        parent.kill()
    deadline = time.monotonic() + 15
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, workers))


def processes_of(iterator):
    """The process ids of the workers, once they have been started."""
    before = {child.pid for child in multiprocessing.active_children()}
    assert not iterator.ready(lambda: True)  # starts them, and waits for none
    return sorted({c.pid for c in multiprocessing.active_children()} - before)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
def test_workers_are_not_ended_by_signals_while_they_start(number):
    dataset = data.load(DIGITS)
    with contextlib.closing(dataset.train(500, seed=5, workers=2)) as iterator:
        workers = processes_of(iterator)
        assert len(workers) == 2 and iterator.get_state()["batches"] == 0
        for pid in workers:  # while Python starts, long before they say otherwise
            os.kill(pid, number)
        assert_equal(take(iterator, 3), take(dataset.train(500, seed=5), 3))
        assert sorted(p.pid for p in multiprocessing.active_children()) == workers
        for pid in workers:
            os.kill(pid, number)
        take(iterator, 4)
    assert not any(map(is_running, workers))


# More than a pipe holds, so that it cannot be left there for a worker that has died.
@pytest.mark.parametrize("taken", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_dead_worker_is_an_error(taken):
    with contextlib.closing(numbered(10**6).train(4, seed=0, workers=2)) as iterator:
        workers = processes_of(iterator)
        take(iterator, taken)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(workers_module.WorkerError) as caught:
            while iterator.ready(lambda: False):
                next(iterator)
    said = (
        rf"data worker \d of 2 \(process ({'|'.join(map(str, workers))})\) has died, "
    )
    assert re.match(said + "by SIGKILL; ", str(caught.value))


def test_what_still_gives_to_a_worker_ends_before_its_connection(monkeypatch):
    """Else it would write to a handle that is closed, or by then another's."""
    give, given = workers_module._give, []

    def late(connection, job):
        time.sleep(0.3)
        give(connection, job)
        given.append(connection.closed)

    monkeypatch.setattr(workers_module, "_give", late)
    workers_module.Workers(range(10), 0, 2).close()
    assert given == [False, False]


def broken(rng):
    raise ValueError(f"data.folder: broken, got {rng.integers(1, 2)}")


def test_an_error_in_a_worker_is_raised():
    dataset = pipeline.Dataset(
        Spec("scalar", 1, 1, "regression"),
        {"train": sources.Drawn(broken, 0, "train", 8)},
    )
    with (
        contextlib.closing(dataset.train(4, seed=0, workers=1)) as iterator,
        pytest.raises(ValueError, match=r"data.folder: broken, got 1") as caught,
    ):
        next(iterator)
    assert "in broken" in "".join(caught.value.__notes__)


def test_evaluation_is_in_order_and_padded_without_weight():
    batches = list(numbered(10).evaluation("train", 4))
    assert [batch["inputs"][:, 0].tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 9, 9],
    ]
    assert batches[2]["mask"][:, 0].tolist() == [True, True, False, False]
    assert all(batch["mask"].all() for batch in batches[:2])


def test_evaluation_can_be_repeated_and_may_exceed_the_split():
    evaluation = numbered(3).evaluation("train", 8)
    assert len(evaluation) == 1
    (first,), (second,) = evaluation, evaluation
    assert_equal([first], [second])
    assert first["mask"].sum() == 3 and first["inputs"].shape == (8, 1)


def test_shortened_splits_have_their_first_examples():
    whole = numbered(10)
    (batch,) = whole.shortened(3).evaluation("train", 4)
    assert batch["inputs"][:, 0].tolist() == [0, 1, 2, 2]
    assert whole.shortened(11).num_examples("train") == 10


def test_bad_requests_are_named():
    dataset = numbered(10)
    with pytest.raises(ValueError, match=r"examples must be 1 or more, got 0"):
        dataset.shortened(0)
    with pytest.raises(ValueError, match=r"between 1 and 10.*got 11"):
        dataset.train(11, seed=0)
    with pytest.raises(ValueError, match=r"batch_size.*got 0"):
        dataset.evaluation("train", 0)
    with pytest.raises(ValueError, match=r"workers.*-1"):
        dataset.train(2, seed=0, workers=-1)
    with pytest.raises(ValueError, match=r"one of train, got 'valid'"):
        dataset.evaluation("valid", 2)
    with pytest.raises(ValueError, match=r"one of train, got 'dev'"):
        dataset.num_examples("dev")


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match=r"data\.name.*mnist, .*got 'letters'"):
        data.load(dict(name="letters"))
    with pytest.raises(ValueError, match=r"augmnt.*target, augment"):
        data.load(dict(name="digits", augmnt="none"))
    with pytest.raises(ValueError, match=r"target.*'label', 'next'.*'previous'"):
        data.load(DIGITS | dict(target="previous"))
    with pytest.raises(ValueError, match=r"augment.*'none', 'shift', 'affine'.*'flip'"):
        data.load(DIGITS | dict(augment="flip"))
