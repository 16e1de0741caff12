import asyncio.log
import errno
import json
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from train import checkpoint, sharding, state
from train.checkpoint import CheckpointError, Checkpoints

MESH = sharding.make_mesh({"mesh": {"data": 1, "fsdp": 1, "sequence": 1}})
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
    with Checkpoints(workdir, 5) as checkpoints:
        return checkpoints.restore(state.abstract(lambda: like, MESH))


def folder(workdir, step):
    return workdir / checkpoint.FOLDER / str(step)


def largest(path):
    return max(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


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
        (lambda path: (path / checkpoint.DIGEST).unlink(), "digest.json is missing"),
        (lambda path: (path / checkpoint.DIGEST).write_text("["), "cannot be read"),
        (lambda path: (path / checkpoint.DIGEST).write_text("[]"), "cannot be read"),
        (lambda path: (path / checkpoint.DIGEST).write_text("{}"), "names no file"),
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
        (folder(tmp_path, step) / checkpoint.DIGEST).unlink()
    assert restore(tmp_path, like) is None
    assert "checkpoint 20 is removed: its save was cut off" in caplog.text
    assert list((tmp_path / checkpoint.FOLDER).iterdir()) == []
    save(tmp_path, 10)
    assert int(restore(tmp_path, like)[0].step) == 10


def test_a_save_without_digest_is_not_kept_and_hides_no_damage(tmp_path):
    like = save(tmp_path, 10, 20, 30)
    (folder(tmp_path, 30) / checkpoint.DIGEST).unlink()
    assert int(restore(tmp_path, like)[0].step) == 20
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {"10", "20"}
    (folder(tmp_path, 20) / checkpoint.DIGEST).unlink()
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
            monkeypatch.setattr(checkpoint, "_write_digest", fail)
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
        monkeypatch.setattr(checkpoint, "_write_digest", broken)
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
    digest = json.loads((path / checkpoint.DIGEST).read_text())
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert set(digest) == files - {checkpoint.DIGEST}
