"""The flight recorder: what it shows, and that it names what broke first."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from configs import common
from layers.models.build import build
from train import flight, loop, losses, sharding, state

HYBRID = "mamba+attention"


@functools.cache
def parts(layer=HYBRID, depth=3):
    """A probe, a state and a batch of a small model of tokens."""
    config = common.base()
    common.set_layer(config, layer)
    config.model.update(features=8, depth=depth, encoder="token", head="token")
    config.model.update(vocab_size=5, outputs=5, length=6)
    model = build(config.model)
    tokens = np.arange(12).reshape(2, 6) % 5
    batch = {"inputs": tokens, "targets": tokens, "mask": np.ones((2, 6), bool)}
    mesh = sharding.make_mesh(config)
    batch = sharding.place(batch, mesh)
    made = state.create(model, optax.sgd(0.1), batch, 0, mesh)
    return flight.make_probe(model, losses.make("token"), 0, True), made, batch


def test_every_block_of_a_pattern_shows_itself():
    probe, made, batch = parts()
    found = flight.quantities(probe(made, batch).record)
    names = list(found)
    assert [n for n in names if "output" in n] == [
        f"block {i}: output_rms" for i in (1, 2, 3)
    ]
    assert names == sorted(names, key=lambda name: int(name.split()[1].rstrip(":")))
    dt = [found[f"block {i}: {n}"] for i in (1, 3) for n in ("dt_min", "dt_max")]
    assert 0 < dt[0] < dt[1] < 1 and 0 < dt[2] < dt[3] < 1
    assert found["block 1: log_decay_max"] < 0
    assert "block 2: dt_min" not in found and "block 2: state_rms" in found


@pytest.mark.slow
def test_masked_tokens_do_not_show():
    probe, made, batch = parts()
    part = {k: jnp.asarray(v[:, :3]) for k, v in batch.items()}
    masked = dict(batch, mask=jnp.arange(6) < 3 * jnp.ones((2, 1), bool))
    whole, short = (flight.quantities(probe(made, b).record) for b in (masked, part))
    assert list(whole) == list(short)
    np.testing.assert_allclose([*whole.values()], [*short.values()], rtol=1e-5)


def broken(made, name, value):
    """The state with one parameter replaced."""

    def change(path, leaf):
        here = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(leaf, value) if here.endswith(name) else leaf

    return made.replace(params=jax.tree_util.tree_map_with_path(change, made.params))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nothing", 0.0, ""),
        ("block_0/mixer/dt/bias", np.nan, "the parameter .*mixer/dt/bias = nan"),
        ("block_0/mixer/D", 3e38, "block 1, output_rms = inf"),
        ("block_1/mixer/out/kernel", 3e38, "block 2, output_rms = (inf|nan)"),
        ("head/kernel", 3e38, "the loss = (inf|nan)"),
    ],
)
def test_the_first_that_broke_is_named(name, value, message):
    probe, made, batch = parts()
    said = flight.first_bad(probe(broken(made, name, value), batch))
    assert not said if not message else re.match(message, said)


@pytest.mark.slow
def test_a_log_has_what_the_recorder_shows(tmp_path):
    loop.run(tiny_run.config(record=True, steps=3), tmp_path)
    row = tiny_run.lines(tmp_path)[0]
    assert row["record/block 1: state_rms"] > 0
