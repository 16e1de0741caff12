"""One policy says which dtype is used where; bfloat16 trains every layer."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from layers import LAYERS, build
from layers.laws import rounding
from layers.models import precision
from layers.parameters import at_least_float32


def model_of(layer, **changes):
    config = common.base().model
    config.update(layer=layer, features=8, depth=2, encoder="token", vocab_size=5)
    config.update(outputs=5, length=24, head="token", **changes)
    return build(config)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_training_in_bfloat16_stays_finite(layer):
    model = model_of(layer, dtype="bfloat16")
    tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 5)
    variables = nn.unbox(jax.jit(model.init)({"params": jax.random.key(1)}, tokens))
    params = variables.pop("params")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    @jax.jit
    def step(params, moments):
        def loss(params):
            logits, _ = model.apply({"params": params, **variables}, tokens)
            labels = jnp.roll(tokens, -1, 1)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = optimizer.init(params), []
    for _ in range(30):
        params, moments, value = step(params, moments)
        losses.append(float(value))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    chex.assert_tree_all_finite(params)


def test_a_policy_is_found_by_name():
    policy = precision.get("bfloat16")
    assert policy == (jnp.float32, jnp.bfloat16, jnp.float32)
    with pytest.raises(ValueError, match=r"dtype: must be one of .* got 'float16'"):
        precision.get("float16")
    with pytest.raises(ValueError, match=r"dtype: must be one of .* got 'half'"):
        model_of("s4d", dtype="half")
    with pytest.raises(ValueError, match="dtype: 'float64' needs jax"):
        model_of("s4d", dtype="float64")
    with jax.enable_x64(True):
        assert precision.get("float64").compute == jnp.float64


@pytest.mark.parametrize("policy", precision.POLICIES.values())
def test_layers_take_the_state_of_a_policy_from_its_compute(policy):
    with jax.enable_x64(True):
        assert at_least_float32(policy.compute) == policy.state


def test_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "rounding.md"
    arguments = ["--layers", "lru", "--lengths", "9", "--out", str(out)]
    assert rounding.main(arguments) == 0
    row = out.read_text().strip().splitlines()[-1]
    name, length, *errors = [cell.strip() for cell in row.strip("|").split("|")]
    assert (name, length) == ("`lru`", "9")
    *single, half = map(float, errors)
    assert 0 < max(single) < 1e-4 < half < 2e-2
    assert row in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "s6"], "--layers: must be among"),
        (["--lengths", "9,x"], "--lengths must be whole numbers"),
        (["--lengths", "0"], "--lengths must be whole numbers from 1"),
    ],
)
def test_command_refuses_what_cannot_be(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        rounding.main(arguments)
    assert said in capsys.readouterr().err
