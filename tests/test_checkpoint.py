import asyncio.log
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from absl import logging as absl_logging
from flax import linen as nn
from orbax.checkpoint._src.serialization import ocdbt_utils

from train import checkpoint, digest, sharding, state, stored
from train.checkpoint import CheckpointError, Checkpoints

MESH = sharding.rows_mesh()
BATCH = {"inputs": np.zeros((2, 5), np.float32)}


class Linear(nn.Module):
    outputs: int = 3

    @nn.compact
    def __call__(self, inputs):
        self.variable("buffers", "norm", lambda: jnp.float32(2.0))
        return nn.Dense(self.outputs)(inputs)


def make(seed=0, ema=False, outputs=3):
    model, optimizer = Linear(outputs), optax.adam(1e-3)
    return state.create(model, optimizer, BATCH, seed, MESH, ema=ema)


def at(step, like):
    """A state whose weights tell its step."""
    params = jax.tree.map(lambda x: jnp.full_like(x, step), like.params)
    return like.replace(step=jnp.int32(step), params=params)


def save(workdir, *steps, keep=5, best=None):
    like = make()
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(at(step, like), {"batches": step}, {"step": step}, best)
    return like


def restore(workdir, like):
    place = sharding.replicated(MESH)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like
    )
    with Checkpoints(workdir, 5) as checkpoints:
        return checkpoints.restore(target)


def folder(workdir, step):
    return workdir / checkpoint.FOLDER / str(step)


def largest(path):
    """The largest file of those that the digest is of."""
    files = [p for p in path.rglob("*") if p.is_file() and p.name != digest.FILE]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_restores_what_was_saved(tmp_path):
    assert restore(tmp_path, make()) is None
    like = save(tmp_path, 10, 20)
    found, data, metadata = restore(tmp_path, like)
    assert (data, metadata) == ({"batches": 20}, {"step": 20})
    expected = at(20, like)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == sharding.replicated(MESH)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: flip(largest(path / "state")), "altered bytes"),
        (lambda path: os.truncate(largest(path / "state"), 10), "has 10 bytes instead"),
        (lambda path: largest(path / "state").unlink(), "No such file"),
        (lambda path: (path / "data" / "metadata").unlink(), "data/metadata: No such"),
        (lambda path: (path / digest.FILE).unlink(), "digest.json is missing"),
        (lambda path: (path / digest.FILE).write_text("["), "cannot be read"),
        (lambda path: (path / digest.FILE).write_text("[]"), "cannot be read"),
        (lambda path: (path / digest.FILE).write_text("{}"), "names no file"),
        (lambda path: (shutil.rmtree(path), path.mkdir()), "the folder is empty"),
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else "",
)
def test_damage_is_named_and_walked_back(tmp_path, caplog, harm, reason):
    like = save(tmp_path, 10, 20)
    harm(folder(tmp_path, 20))
    assert reason in checkpoint.damage(folder(tmp_path, 20))
    found, data, _ = restore(tmp_path, like)
    assert int(found.step) == 10 and data == {"batches": 10}
    assert "checkpoint 20 is not used" in caplog.text and reason in caplog.text
    # Out of the way, so that step 20 can be written again.
    assert checkpoint.steps(tmp_path) == [10]
    save(tmp_path, 20)
    assert int(restore(tmp_path, like)[0].step) == 20


def test_every_byte_counts(tmp_path):
    save(tmp_path, 10)
    path = folder(tmp_path, 10)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if file.stat().st_size:
            before = file.read_bytes()
            flip(file)
            assert checkpoint.damage(path), file
            file.write_bytes(before)
    assert checkpoint.damage(path) is None


def test_no_good_checkpoint_is_an_error_that_helps(tmp_path):
    like = save(tmp_path, 10, 20)
    for step in (10, 20):
        flip(largest(folder(tmp_path, step)))
    for _ in range(2):  # the second attempt must not start from scratch either
        with pytest.raises(
            CheckpointError, match=r"20: .* 10: .* to start afresh, remove"
        ):
            restore(tmp_path, like)


def test_keeps_the_last_and_the_best(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    with pytest.raises(ValueError, match=r"train.keep must be 1 or more, got 0"):
        Checkpoints(tmp_path, 0)


def test_a_save_is_a_copy(tmp_path):
    """Neither donated buffers nor a growing list change what is being written."""
    like = make()
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    current, window = at(1, like), [1.0]
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(current, {"batches": 1}, {"window": window})
        for _ in range(50):
            current = advance(current)
            window.append(current)
    found, _, metadata = restore(tmp_path, like)
    assert metadata == {"window": [1.0]} and int(found.step) == 1
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(found.params))


def test_leftovers_of_a_cut_off_save_are_removed(tmp_path):
    like = save(tmp_path, 10)
    left = tmp_path / checkpoint.FOLDER / f"20{checkpoint.UNFINISHED[:-1]}"
    shutil.copytree(folder(tmp_path, 10), left)
    assert int(restore(tmp_path, like)[0].step) == 10
    assert not left.exists()
    save(tmp_path, 20)


def test_a_first_save_without_digest_is_none(tmp_path, caplog):
    """As a kill between commit and digest leaves it."""
    like = save(tmp_path, 10, 20)
    for step in (10, 20):
        (folder(tmp_path, step) / digest.FILE).unlink()
    assert restore(tmp_path, like) is None
    assert "checkpoint 20 is removed: its save was cut off" in caplog.text
    assert list((tmp_path / checkpoint.FOLDER).iterdir()) == []
    save(tmp_path, 10)
    assert int(restore(tmp_path, like)[0].step) == 10


def test_a_save_without_digest_is_not_kept_and_hides_no_damage(tmp_path):
    like = save(tmp_path, 10, 20, 30)
    (folder(tmp_path, 30) / digest.FILE).unlink()
    assert int(restore(tmp_path, like)[0].step) == 20
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {"10", "20"}
    (folder(tmp_path, 20) / digest.FILE).unlink()
    flip(largest(folder(tmp_path, 10)))
    with pytest.raises(CheckpointError, match=r"20: digest.json .* 10: .* altered"):
        restore(tmp_path, like)


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("where", ["at once", "in the background", "at the digest"])
def test_full_disk(tmp_path, monkeypatch, where):
    like = save(tmp_path, 10)
    error = OSError(errno.ENOSPC, FULL)
    if where == "in the background":  # as tensorstore reports it
        error = ValueError(f"RESOURCE_EXHAUSTED: Error writing: {FULL}")

    def fail(*_, **__):
        monkeypatch.undo()
        raise error

    with (
        pytest.raises(CheckpointError) as caught,
        Checkpoints(tmp_path, 5) as checkpoints,
    ):
        if where == "at the digest":
            monkeypatch.setattr(checkpoint.digest, "write", fail)
        else:
            name = "save" if where == "at once" else "wait_until_finished"
            monkeypatch.setattr(checkpoints._writer, name, fail)
        checkpoints.save(at(20, like), {}, {})
        checkpoints.wait()
    message = str(caught.value)
    assert "the disk is full: the checkpoint of step 20 needs up to" in message
    assert "last good checkpoint: step 10" in message and str(tmp_path) in message
    assert checkpoint.newest_good(tmp_path) == 10
    assert int(restore(tmp_path, like)[0].step) == 10
    assert not list((tmp_path / checkpoint.FOLDER).glob(f"*{checkpoint.UNFINISHED}"))


def test_only_what_is_raised_anyway_is_not_printed(tmp_path, monkeypatch, caplog):
    """Writes that fail beside the first one are found by asyncio, or find no loop."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with Checkpoints(tmp_path, keep=1), Checkpoints(tmp_path, keep=1):
        for error in (RuntimeError("Event loop is closed"), RuntimeError("other")):
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
        for number in (errno.ENOSPC, errno.EACCES):
            error = OSError(number, os.strerror(number))
            asyncio.log.logger.error("a task", exc_info=error)
    assert [str(one.exc_value) for one in seen] == ["other"]
    assert [record.exc_info[1].errno for record in caplog.records] == [errno.EACCES]


def test_another_error_of_a_save_is_not_hidden(tmp_path, monkeypatch):
    def broken(*_):
        raise PermissionError("not yours")

    with (
        pytest.raises(PermissionError, match="not yours"),
        Checkpoints(tmp_path, 5) as checkpoints,
    ):
        monkeypatch.setattr(checkpoint.digest, "write", broken)
        checkpoints.save(at(20, make()), {}, {})
        checkpoints._thread.join()
        checkpoints.poll()


def test_restore_params(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.restore_params(tmp_path)
    save(tmp_path, 10, 20)
    variables, step = checkpoint.restore_params(tmp_path)
    assert step == 20 and set(variables) == {"params", "buffers"}
    assert isinstance(variables["params"]["Dense_0"]["kernel"], np.ndarray)
    assert (variables["params"]["Dense_0"]["kernel"] == 20).all()
    assert checkpoint.restore_params(tmp_path, 10)[1] == 10
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of step 15 .* \[10, 20\]"
    ):
        checkpoint.restore_params(tmp_path, 15)
    flip(largest(folder(tmp_path, 10)))
    with pytest.raises(CheckpointError, match=r"checkpoint 10 .* is damaged"):
        checkpoint.restore_params(tmp_path, 10)


def test_averaged_weights_are_the_ones_to_evaluate(tmp_path):
    like = at(7, make(ema=True))
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(like, {}, {})
    variables, _ = checkpoint.restore_params(tmp_path)
    kernel = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, like.ema["Dense_0"]["kernel"])
    assert (kernel != 7).all()


def test_init_from(tmp_path, capsys):
    save(tmp_path, 10)
    fresh = make(seed=1, ema=True)
    taken = checkpoint.init_from(tmp_path, fresh)
    assert int(taken.step) == 0
    for tree in (taken.params, taken.ema):
        assert all((leaf == 10).all() for leaf in jax.tree.leaves(tree))
    other = make(outputs=4)
    with pytest.raises(ValueError, match=r"no parameter of .* fits"):
        checkpoint.init_from(tmp_path, other.replace(buffers={}))
    checkpoint.init_from(tmp_path, other)
    assert "not initialised from there: params/Dense_0/bias" in capsys.readouterr().out


def test_digest_lists_every_file(tmp_path):
    save(tmp_path, 10)
    path = folder(tmp_path, 10)
    entries = json.loads((path / digest.FILE).read_text())
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert set(entries) == files - {digest.FILE}


@pytest.mark.parametrize(
    "name",
    [
        "runs[1]",
        "a*b",
        "a?b",
        r"back\slash",
        "gs:",
        "of 'all' \"sorts\" {x} длина #%20\n",
    ],
)
def test_a_path_is_taken_literally(tmp_path, name):
    """Not as a pattern, and not as another folder."""
    workdir = tmp_path / "runs" / name
    sibling = tmp_path / "runs" / name.replace("?", "X").replace("*", "X")
    if sibling != workdir:  # a pattern would match it too
        save(sibling, 5)
    like = save(workdir, 20)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert {*(tmp_path / "runs").iterdir()} == {workdir, sibling}
    found, data, _ = restore(workdir, like)
    assert int(found.step) == 20 and data == {"batches": 20}
    variables, _ = checkpoint.restore_params(workdir)
    assert (variables["params"]["Dense_0"]["kernel"] == 20).all()


def test_a_path_through_a_parent(tmp_path):
    save(tmp_path / "a" / ".." / "b", 10)
    assert checkpoint.restore_params(tmp_path / "b")[1] == 10


async def merges_nothing(*_, **__):
    """As orbax does, with no more than a warning, where it finds no files."""


async def merges_all_but_one(directory, *arguments, **options):
    await MERGE(directory, *arguments, **options)
    await database(directory).delete_range(
        ts.KvStore.KeyRange("params.Dense_0.kernel/", "params.Dense_0.kernel0")
    )


async def merges_no_values(directory, *arguments, **options):
    await MERGE(directory, *arguments, **options)
    await database(directory).write("params.Dense_0.kernel/0.0", None)


async def loses_a_file(directory, *arguments, **options):
    await MERGE(directory, *arguments, **options)
    for file in (directory / "d").iterdir():
        file.unlink()


MERGE = ocdbt_utils.merge_ocdbt_per_process_files


def database(path):
    """The key-value store of a saved state."""
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (merges_nothing, "manifest.ocdbt is missing|kernel is missing"),
        (merges_all_but_one, "params.Dense_0.kernel is missing"),
        (merges_no_values, "params.Dense_0.kernel has 0 chunks instead of 1"),
        (loses_a_file, "d/[0-9a-f]+: No such file"),
    ],
)
def test_a_save_that_cannot_be_read_is_none(tmp_path, monkeypatch, merge, reason):
    """It has no digest, the run ends, and the save before it is still there."""
    like = save(tmp_path, 10)
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge)
    with pytest.raises(
        CheckpointError, match=f"step 20 .* cannot be read back: .*({reason})"
    ) as caught:
        save(tmp_path, 20, 30, keep=1)
    assert "last good checkpoint: step 10" in str(caught.value)
    assert checkpoint.steps(tmp_path) == [10]
    assert int(restore(tmp_path, like)[0].step) == 10


def test_one_array_of_every_file_is_read_back(tmp_path, monkeypatch):
    """Of states that are not so small that all is in one file."""
    like = make()
    big = {f"w{i}": jax.random.normal(jax.random.key(i), (500, 500)) for i in range(9)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(at(10, like).replace(opt_state=big), {}, {})
    path = folder(tmp_path, 10) / "state"
    arrays = stored.contents(path)
    assert arrays["opt_state.w3"].shape == (500, 500)
    assert arrays["opt_state.w3"].nbytes == 10**6
    read, real = [], stored.read
    monkeypatch.setattr(
        stored, "read", lambda path, name: read.append(name) or real(path, name)
    )
    stored.read_back(path, arrays)
    files = [{file for file, _ in array.places} for array in arrays.values()]
    assert set().union(*files) == {
        file for name in read for file, _ in arrays[name].places
    }
    # In how many files a save lies depends on its threads; here in two and in none.
    sizes = {"a": (9, "d/1"), "b": (3, "d/1"), "c": (5, "d/2"), "e": (1, None)}
    made = {
        name: stored.Stored((size,), "<f4", 4 * size, ((file, 99),) if file else ())
        for name, (size, file) in sizes.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(stored, "read", lambda _, name: read.append(name))
        read.clear()
        stored.read_back(path, made)
    assert read == ["b", "c", "e"]
    lost = largest(path)
    os.truncate(lost, 1)
    with pytest.raises(ValueError, match=r"has 1 bytes, but \d+ are used"):
        stored.contents(path)
    lost.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        stored.read_back(path, arrays)


def exchange(workdir):
    one, other = folder(workdir, 10), folder(workdir, 20)
    one.rename(workdir / "aside")
    other.rename(one)
    (workdir / "aside").rename(other)


def test_a_renamed_checkpoint_is_not_believed(tmp_path, caplog):
    like = save(tmp_path, 5, 10)
    folder(tmp_path, 10).rename(folder(tmp_path, 20))
    reason = "it holds step 10: the folder was renamed"
    assert checkpoint.damage(folder(tmp_path, 20)) == reason
    with pytest.raises(CheckpointError, match=f"20 .* is damaged: {reason}"):
        checkpoint.restore_params(tmp_path, 20)
    assert checkpoint.restore_params(tmp_path)[1] == 5
    assert int(restore(tmp_path, like)[0].step) == 5
    assert f"checkpoint 20 is not used: {reason}" in caplog.text
    save(tmp_path, 10, 20)
    exchange(tmp_path)
    assert int(restore(tmp_path, like)[0].step) == 5


def test_a_memory_of_another_step_is_not_believed(tmp_path, caplog):
    like = save(tmp_path, 10)
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(at(20, like), {}, {"step": 21})
    assert int(restore(tmp_path, like)[0].step) == 10
    assert "checkpoint 20 is not used: it remembers step 21" in caplog.text


def signed(path):
    """Writes the digest anew, as somebody does who wants to be believed."""
    (path / digest.FILE).unlink()
    digest.write(path)


def nested(depth=200_000):
    return "[" * depth + "]" * depth


def edit(path, change):
    path.write_text(change(path.read_text()))


def declare(path, **changes):
    """Alters what the database says of a kernel."""
    store, key = database(path / "state"), "params.Dense_0.kernel/.zarray"
    told = json.loads(store.read(key).result().value)
    store.write(key, json.dumps(told | changes)).result()
    shape = json.dumps(changes.get("shape", [5, 3]))
    for name in ("_METADATA", "array_metadatas/process_0"):
        edit(path / "state" / name, lambda text: text.replace("[5, 3]", shape))
    signed(path)


def point_outside(path):
    """Lets a piece of the database lie where the tree above it does."""
    outside = path.parent / "outside"
    shutil.copytree(path / "state", outside)
    for file in (path / "state" / "d").iterdir():
        file.unlink()
        file.symlink_to(outside / "d" / file.name)
    signed(path)


UNREADABLE = {
    "nested digest": (
        lambda path: (path / digest.FILE).write_text(nested()),
        r"digest.json cannot be read \(RecursionError\)",
    ),
    "digest of no numbers": (
        lambda path: (path / digest.FILE).write_text('{"a": {"bytes": [], "sha'),
        "cannot be read",
    ),
    "digest of another place": (
        lambda path: edit(path / digest.FILE, lambda t: t.replace('"data/', '"/etc/')),
        "names /etc/.*, outside of its folder",
    ),
    "digest of a place above": (
        lambda path: edit(
            path / digest.FILE, lambda t: t.replace('"data/', '"../10/data/')
        ),
        "names ../10/data/.*, outside of its folder",
    ),
    "digest that is a folder": (
        lambda path: (
            (path / digest.FILE).unlink(),
            (path / digest.FILE).mkdir(),
        ),
        "cannot be read",
    ),
    "nested memory": (
        lambda path: (
            (path / "metadata" / "metadata").write_text(nested()),
            signed(path),
        ),
        "nested too deeply",
    ),
    "memory that is no object": (
        lambda path: ((path / "metadata" / "metadata").write_text("[]"), signed(path)),
        "metadata must be an object",
    ),
    "structure that is no object": (
        lambda path: ((path / "state" / "_METADATA").write_text("[]"), signed(path)),
        "_METADATA is damaged",
    ),
    "no database": (
        lambda path: ((path / "state" / "manifest.ocdbt").unlink(), signed(path)),
        "manifest.ocdbt is missing",
    ),
    "database of zeros": (
        lambda path: (
            (path / "state" / "manifest.ocdbt").write_bytes(bytes(99)),
            signed(path),
        ),
        "state: ",
    ),
    "link out": (point_outside, "d/[0-9a-f]+ is a link or no file"),
    "pipe": (
        lambda path: (os.mkfifo(path / "state" / "pipe"), signed(path)),
        "pipe is a link or no file",
    ),
    "huge shape": (
        lambda path: declare(path, shape=[5, 3 * 10**12]),
        "kernel has 1 chunks instead of 1000000000000",
    ),
    "huge chunk": (
        lambda path: declare(path, shape=[5, 3 * 10**12], chunks=[5, 3 * 10**12]),
        "kernel must have shape .5, 3., got|more than the",
    ),
    "chunk beyond its shape": (
        lambda path: declare(path, chunks=[5, 3 * 10**12]),
        "declares chunks .5, 3000000000000.",
    ),
    "another shape": (
        lambda path: declare(path, shape=[5, 2], chunks=[5, 2]),
        "kernel must have shape .5, 3., got .5, 2.",
    ),
}


@pytest.mark.parametrize(("harm", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_walked_back(tmp_path, caplog, harm, reason):
    """Said in a line each; an older one is used, and none is followed elsewhere."""
    like = save(tmp_path, 10, 20)
    harm(folder(tmp_path, 20))
    found, data, _ = restore(tmp_path, like)
    assert int(found.step) == 10 and data == {"batches": 10}
    (said,) = (r.getMessage() for r in caplog.records if "not used" in r.getMessage())
    assert said.startswith("checkpoint 20 is not used: ") and "\n" not in said
    assert re.search(reason, said)


@pytest.mark.parametrize("case", ["link out", "huge shape", "huge chunk", "pipe"])
def test_variables_of_a_hostile_checkpoint_are_refused(tmp_path, case):
    save(tmp_path, 20)
    UNREADABLE[case][0](folder(tmp_path, 20))
    with pytest.raises(CheckpointError, match=UNREADABLE[case][1]):
        checkpoint.restore_params(tmp_path, 20)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        checkpoint.restore_params(tmp_path)


@pytest.mark.parametrize(
    "location",
    ["value:../:d/a:0:1", "value::/etc/passwd:0:1", "value::d/..%2F..%2Fa:0:1", "what"],
)
def test_a_place_outside_of_a_checkpoint_is_refused(tmp_path, location):
    with pytest.raises(ValueError, match=r"lies outside of its folder|is unclear"):
        stored._check_place(tmp_path, *stored._place(location))


def test_a_checkpoint_runs_no_code(tmp_path):
    """Names and pickles in it are not even looked at."""
    like = save(tmp_path, 10)
    path, ran = folder(tmp_path, 10), tmp_path / "ran"
    command = f"open({str(ran)!r}, 'w')"
    payload = b"cbuiltins\neval\n(V" + command.encode() + b"\ntR."
    (path / "payload.pkl").write_bytes(payload)
    (path / "state" / "payload.py").write_text(command)
    edit(
        path / "_CHECKPOINT_METADATA",
        lambda text: text.replace(
            "orbax.checkpoint._src.handlers.pytree_checkpoint_handler."
            "PyTreeCheckpointHandler",
            "os.system",
        ),
    )
    edit(path / "state" / "_METADATA", lambda text: text.replace("jax.Array", "eval"))
    signed(path)
    with contextlib.suppress(CheckpointError):
        restore(tmp_path, like)
    with contextlib.suppress(CheckpointError):
        checkpoint.restore_params(tmp_path, 10)
    assert not ran.exists()


def test_other_names_beside_the_steps(tmp_path):
    """Digits of another script, zeros in front, and more than a step has."""
    like = save(tmp_path, 10)
    for name in ("²", "٣", "007", "1" * 30, "1_0", "+3", " 5"):
        (tmp_path / checkpoint.FOLDER / name).mkdir()
    (tmp_path / checkpoint.FOLDER / "99").write_text("no folder")
    assert checkpoint.steps(tmp_path) == [10]
    assert int(restore(tmp_path, like)[0].step) == 10


def test_a_file_where_the_checkpoints_belong(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Not a dir"):
        checkpoint.newest_good(tmp_path)


def test_checkpoints_that_may_not_be_seen_are_not_none(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.newest_good(tmp_path)


def test_what_it_silences_it_gives_back(tmp_path):
    """A process that trains keeps its own way to show errors."""
    loggers = absl_logging.get_absl_logger(), logging.getLogger("asyncio")
    before = sys.unraisablehook, [[*logger.filters] for logger in loggers]
    with Checkpoints(tmp_path / "a", 1), Checkpoints(tmp_path / "b", 1):
        assert sys.unraisablehook is not before[0]
    assert before == (sys.unraisablehook, [[*logger.filters] for logger in loggers])
