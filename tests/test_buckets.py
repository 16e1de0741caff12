"""Dataset decomposition: which sequences there are, and in which order they come."""

import dataclasses
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from eight_devices import ALONE, THERE, passed
from ml_collections import ConfigDict

from configs import own
from train import data, loop, repeat, resolve, runs
from train.data import buckets, objectives
from train.data.buckets import CURRICULA, Options, Plan
from train.data.pipeline import Dataset
from train.data.sources import Rows
from train.data.spec import Spec

LENGTH = 32


def documents(count=60, seed=0, loss="token"):
    """Token i of document d is 100 d + i; each d has another length."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, LENGTH + 1, count)
    inputs = 100 * np.arange(count)[:, None] + np.arange(LENGTH)
    mask = np.arange(LENGTH) < sizes[:, None]
    targets = inputs + 1 if loss == "token" else np.arange(count) % 5
    rows = {
        "inputs": np.where(mask, inputs, 0).astype(np.int32),
        "targets": targets.astype(np.int32),
        "mask": mask,
        "dt": np.where(mask, 1 + inputs, 1).astype(np.float32),
    }
    spec = Spec("token", LENGTH, 100 * count + 1, loss, vocab_size=100 * count)
    return Dataset(spec, {"train": Rows(rows)}), sizes


def decomposed(loss="token", **options):
    dataset, sizes = documents(loss=loss)
    options = Options(**{"shortest": 4, "cut": loss == "token", **options})
    return dataclasses.replace(dataset, buckets=options), sizes


def taken(dataset, count, seed=0, size=8, **given):
    batches = dataset.train(size, seed, **given)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (32, [(0, 32)]),
        (31, [(0, 16), (16, 8), (24, 4), (28, 4)]),
        (20, [(0, 16), (16, 4)]),
        (5, [(0, 4), (4, 4)]),
        (3, [(0, 4)]),
        (70, [(0, 32), (32, 32), (64, 4), (68, 4)]),
    ],
)
def test_a_document_is_cut_into_the_largest_pieces_first(tokens, pieces):
    assert buckets._pieces(tokens, (32, 16, 8, 4), cut=True) == pieces


@pytest.mark.parametrize(("tokens", "length"), [(32, 32), (17, 32), (16, 16), (1, 4)])
def test_a_whole_one_goes_where_it_fits(tokens, length):
    assert buckets._pieces(tokens, (32, 16, 8, 4), cut=False) == [(0, length)]


@pytest.mark.parametrize("cut", [True, False])
def test_all_batches_have_as_many_tokens_each_sequence_of_one_document(cut):
    dataset, _ = decomposed("token" if cut else "classification")
    shapes = set()
    for batch in taken(dataset, 60):
        count, length = batch["inputs"].shape
        assert count * length == 8 * LENGTH
        shapes.add(length)
        for inputs, mask, dt in zip(
            batch["inputs"], batch["mask"], batch["dt"], strict=True
        ):
            real = inputs[mask]
            assert len({*(real // 100)}) == 1
            assert (np.diff(real) == 1).all() and mask[: len(real)].all()
            np.testing.assert_array_equal(dt[mask], 1 + real)
            if not cut:  # all of the document, in the shortest that holds it
                assert real[0] % 100 == 0
                assert len(real) > length // 2 or length == 4
    assert shapes >= {4, 16, 32}


def test_no_token_is_lost_and_none_comes_twice():
    """Over as many epochs as all buckets fill batches in."""
    dataset, sizes = decomposed()
    plan = dataset._batches(2, 0, None).plan
    times = int(np.lcm.reduce(plan.sizes))
    found = np.zeros((60, LENGTH), int)
    for batch in taken(dataset, sum(plan.before(times)), size=2):
        real = batch["inputs"][batch["mask"]]
        np.add.at(found, (real // 100, real % 100), 1)
        np.testing.assert_array_equal(batch["targets"][batch["mask"]], real + 1)
    real = np.arange(LENGTH) < sizes[:, None]
    np.testing.assert_array_equal(found, np.where(real, times, 0))


def test_a_target_of_the_whole_stays_with_it():
    dataset, _ = decomposed("classification")
    for batch in taken(dataset, 30):
        numbers = batch["inputs"][:, 0] // 100
        np.testing.assert_array_equal(batch["targets"], numbers % 5)


def test_pairs_of_documents_go_by_the_longer_one():
    dataset, sizes = documents(loss="classification")
    rows = dataset.sources["train"].arrays
    pairs = {
        key: np.stack([rows[key], rows[key][::-1]], axis=1)
        for key in ("inputs", "mask")
    } | {"targets": rows["targets"]}
    dataset = Dataset(dataset.spec, {"train": Rows(pairs)}, buckets=Options(shortest=8))
    longer = np.maximum(sizes, sizes[::-1])
    counts = {piece.length: piece.count for piece in dataset.pieces}
    expected = {n: int(((longer > n // 2) & (longer <= n)).sum()) for n in (32, 16)}
    assert counts == {n: c for n, c in expected.items() if c} | {
        8: int((longer <= 8).sum())
    }
    for batch in taken(dataset, 10):
        assert batch["inputs"].shape[1] == 2 and batch["mask"].ndim == 3


def test_documents_longer_than_the_longest_are_cut():
    dataset, sizes = decomposed(longest=16, shortest=8)
    counts = {piece.length: piece.count for piece in dataset.pieces}
    rest = sizes % 16
    small = (rest > 0) & (rest != 8)
    assert counts[16] == (sizes // 16).sum()
    assert counts[8] == (rest >= 8).sum() + (small).sum()
    batch = taken(dataset, 1)[0]
    assert batch["inputs"].size == 8 * 16


def orders(curriculum, cycles=1, counts=(64, 128, 256, 512), seed=0):
    """The ranks of an epoch's batches, 0 for the shortest."""
    plan = Plan(counts, (8, 16, 32, 64), curriculum, cycles, seed)
    number = sum(plan.before(1))
    found = np.array([plan.find(i) for i in range(number)])
    for bucket in range(4):  # each batch once, in turn
        own = found[found[:, 0] == bucket, 1]
        np.testing.assert_array_equal(own, np.arange(len(own)))
    return 3 - found[:, 0]


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_a_curriculum_has_each_batch_once(curriculum):
    np.testing.assert_array_equal(np.bincount(orders(curriculum)), [8] * 4)


@pytest.mark.parametrize(
    ("curriculum", "odds"),
    [
        ("natural", [1, 1, 3, 10]),  # as many as there are
        ("uniform", [1, 1, 1, 1]),
        ("grow_linear", [1, 2, 3, 4]),
        ("grow_p2", [1, 2, 4, 8]),
        ("shrink_linear", [4, 3, 2, 1]),
        ("shrink_p2", [8, 4, 2, 1]),
    ],
)
def test_odds_of_the_first_batch_by_buckets_the_longest_first(curriculum, odds):
    rng, left = np.random.default_rng(0), np.array([1, 1, 3, 10])
    first = [buckets._drawn(rng, left, curriculum)[0] for _ in range(2000)]
    shares = np.bincount(first, minlength=4) / 2000
    np.testing.assert_allclose(shares, np.array(odds) / sum(odds), atol=0.04)


def test_an_empty_bucket_leaves_its_odds_to_the_others():
    rng, left = np.random.default_rng(0), np.array([1000, 0, 1000, 100])
    drawn = buckets._drawn(rng, left, "grow_p2")
    empty = int(np.flatnonzero(drawn == 3)[-1]) + 1  # the shortest go first
    before, after = (np.mean(part == 2) for part in (drawn[:empty], drawn[empty:1000]))
    assert np.mean(drawn[:empty] == 3) == pytest.approx(8 / 13, abs=0.1)
    assert before == pytest.approx(4 / 13, abs=0.1)
    assert after == pytest.approx(4 / 5, abs=0.05)


def test_each_cycle_grows_anew():
    ranks = orders("grow_p2", cycles=2, counts=(256, 512, 1024, 2048))
    for half in (ranks[:64], ranks[64:]):
        np.testing.assert_array_equal(np.bincount(half), [16] * 4)
        assert half[:32].mean() + 0.5 < half[32:].mean()


def test_another_seed_or_epoch_is_another_order():
    plan = Plan((64, 128, 256, 512), (8, 16, 32, 64), "uniform", 1, 0)
    one, two = ([plan.find(i + 32 * e)[0] for i in range(32)] for e in range(2))
    assert one != two and sorted(one) == sorted(two)
    assert (orders("uniform", seed=0) != orders("uniform", seed=1)).any()


def same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], other[key])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(workers):
    dataset, _ = decomposed(curriculum="grow_p2", cycles=3)
    whole = taken(dataset, 40)
    for start in (1, 17, 33):
        batches = dataset.train(8, 0, workers)
        batches.set_state(dataset.train(8, 0).get_state() | {"batches": start})
        for expected in whole[start : start + 5]:
            same(next(batches), expected)
        batches.close()


def test_each_host_reads_its_own_rows():
    dataset, _ = decomposed()
    whole = taken(dataset, 20)
    mine = taken(dataset, 20, rows=lambda size: range(1, size, 2))
    for all_rows, odd in zip(whole, mine, strict=True):
        for key in odd:
            np.testing.assert_array_equal(odd[key], all_rows[key][1::2])


def test_augmentation_sees_the_whole_and_is_drawn_anew():
    dataset, _ = documents(count=4, loss="classification")

    def shift(example, rng):
        return {**example, "inputs": example["inputs"] + rng.integers(1000)}

    options = Options(shortest=32)
    dataset = dataclasses.replace(dataset, augment=shift, buckets=options)
    batches = dataset.train(4, 0)
    first = [next(batches)["inputs"][:, 0] for _ in range(3)]
    assert len({*np.concatenate(first)}) == 12


def test_an_objective_asks_before_documents_are_cut():
    """The last token of a piece is asked for the first of the next."""
    dataset, sizes = documents()
    dataset = objectives.asked(dataset, {"name": "next"})
    dataset = dataclasses.replace(dataset, buckets=Options(shortest=4, cut=True))
    for batch in taken(dataset, 30):
        for inputs, targets, mask in zip(
            batch["inputs"], batch["targets"], batch["mask"], strict=True
        ):
            real = inputs[mask]
            last = sizes[real // 100] == real % 100 + 1
            np.testing.assert_array_equal(targets[mask], np.where(last, -1, real + 1))


BAD = [
    (dict(shortest=5), "must be 32 halved some times, one of 32, 16, 8, 4, 2, 1, got"),
    (dict(shortest=64), "data.buckets.shortest must be 32 halved some times"),
    (dict(shortest=-1), "data.buckets.shortest must be 0 or more, got -1"),
    (dict(shortest=4, cycles=0), "data.buckets.cycles must be 1 or more, got 0"),
    (dict(shortest=4, longest=16), "data.buckets.longest must be 32, what an example"),
    (dict(shortest=4, longest=64, cut=True), "or less, got 64"),
    (dict(shortest=4, curriculum="grow"), "must be one of natural, uniform, grow_lin"),
    (dict(shortest=4.0), "data.buckets.shortest must be a whole number, got 4.0"),
    (dict(smallest=4), "data.buckets has no 'smallest'; it has shortest, longest"),
    (dict(shortest=4, cut=True), "cut must be False where a whole sequence has the"),
]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    dataset, sizes = documents(loss="classification")
    rows = dataset.sources["train"].arrays
    path = tmp_path_factory.mktemp("data") / "my.npz"
    np.savez(
        path,
        inputs=rows["inputs"] % 100,
        targets=(sizes > 16).astype(np.int32),
        lengths=sizes,
    )
    return path


@pytest.mark.parametrize(("options", "message"), BAD)
def test_buckets_that_cannot_be_are_named(npz, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config = ConfigDict(dict(name="arrays", path=str(npz), buckets=options))
        data.load(config).train(4, 0)


def test_images_have_no_buckets():
    config = dict(name="digits", layout="image", buckets=dict(shortest=8))
    with pytest.raises(ValueError, match="unless the data are sequences of tokens or"):
        data.load(config)


@pytest.fixture(scope="module")
def config(npz):
    config = own.get_config(f"path={npz},layer=gru")
    config.data.buckets.update(shortest=16, curriculum="grow_p2", cycles=2)
    config.model.update(features=4, depth=1, dropout=0.1)
    config.train.update(tiny_run.TRAIN)
    return config


@pytest.mark.slow
def test_a_run_stopped_inside_a_curriculum_goes_on_exactly(
    config, tmp_path, capsys, monkeypatch
):
    """Its steps are of two shapes, which it says before they are compiled."""
    whole, cut, go_on = tmp_path / "whole", tmp_path / "cut", loop.may_begin
    loop.run(config, whole)
    out = capsys.readouterr().out
    assert re.search(
        r"buckets: \d+ of 32 tokens, 8 in a batch; \d+ of 16 tokens, 16 in a batch; "
        r"grow_p2, cycles of 2\n",
        out,
    )
    assert "a batch of 8 x 32 or 16 x 16\n" in out

    def ends(step, pace, batches, stop):
        if step > 7:
            stop.signal = "SIGTERM"
            return False
        return go_on(step, pace, batches, stop)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "may_begin", ends)
        assert loop.run(config, cut) == {"step": 7, "stopped": "SIGTERM"}
    loop.run(config, cut)
    tiny_run.assert_same(cut, whole)
    assert runs.load_run(whole).config.data.buckets.shortest == 16


FLAGS = ("--config.data.buckets.curriculum=grow_p2", "--config.data.buckets.cycles=3")


@pytest.mark.slow
def test_a_run_killed_inside_a_curriculum_goes_on_exactly(npz, tmp_path):
    def start(workdir):
        command = [sys.executable, "-m", "train.main", "--noreport"]
        command += ["--config", f"own:path={npz},layer=gru", "--workdir", str(workdir)]
        settings = {"data.buckets.shortest": 16, "model.depth": 1, "model.features": 4}
        settings |= {
            f"train.{k}": v for k, v in {**tiny_run.TRAIN, "steps": 60}.items()
        }
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        command += FLAGS
        return subprocess.Popen(
            command,
            cwd=tiny_run.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny_run.finish(start(whole))
    for lines in (3, 11):
        process = start(killed)
        tiny_run.wait_for(lambda n=lines: tiny_run.logged(killed) >= n, process)
        process.kill()
        process.communicate(timeout=60)
    tiny_run.finish(start(killed))
    tiny_run.assert_same(killed, whole)


@pytest.mark.slow
@ALONE
def test_eight_devices():
    assert passed(__file__, "mesh") == 1


@pytest.mark.slow
@THERE
def test_a_mesh_trains_as_another_does(config):
    config = config.copy_and_resolve_references()
    config.model.update(dropout=0.0, norm="layer")  # see FLAGS of test_sharding
    dataset = data.load(config.data)
    config.optimizer.lr = 1e-4  # Adam makes steps of rounding errors
    complete = resolve.complete(config, dataset.spec)
    found = []
    for mesh in (dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)):
        complete.mesh.update(mesh)
        found.append(repeat.trained(complete, dataset, 6))
    assert repeat.difference(*found).loss < 1e-5, repeat.difference(*found)
