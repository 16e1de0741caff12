"""The mixing matrix of a layer, applied to its values, is the layer."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from kernels.tolerance import assert_close
from layers import LAYERS, materialize
from layers.laws import examples

L = 7
SEQUENTIAL = ("gru", "lstm")  # not linear in what they mix
CASES = [n for n in examples.CASES if n.split()[0] in LAYERS.keys() - SEQUENTIAL]
QUICK = ("s5", "mamba", "attention window")


def made(layer):
    x = jax.random.normal(jax.random.key(1), (2, L, layer.features))
    return nn.unbox(jax.jit(layer.init)({"params": jax.random.key(0)}, x)), x


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES],
)
def test_matrix_times_values_is_the_layer(case):
    layer = examples.CASES[case]()
    M, values, mixed = materialize(layer, *made(layer))
    if M.ndim == values.ndim + 1:
        product = jnp.einsum("b...ts,bs...->bt...", M, values)
    else:  # channels mix too
        out, into = mixed[0, 0].size, values[0, 0].size
        M = M.reshape(len(M), out, into, L, L)
        flat = values.reshape(*values.shape[:2], into)
        product = jnp.einsum("bcdts,bsd->btc", M, flat).reshape(mixed.shape)
    assert_close(product, mixed, "gradient")
    sees_the_future = "bidirectional" in case or "butterfly" in case
    assert np.any(np.triu(np.asarray(M), 1)) == sees_the_future


def test_rows_of_attention_sum_to_one():
    layer = LAYERS["attention"](6, 2)
    M, _, _ = materialize(layer, *made(layer))
    assert_close(M.sum(-1), jnp.ones_like(M[..., 0]))


@pytest.mark.slow
def test_matrix_of_a_time_invariant_layer_is_toeplitz():
    layer = LAYERS["s4d"](3, 4)
    M, values, mixed = materialize(layer, made(layer)[0], L)
    assert M.shape == (1, 3, L, L) and values.shape == mixed.shape == (1, L, 3)
    assert_close(M[..., 1:, 1:], M[..., :-1, :-1])


def test_a_matrix_that_depends_on_the_input_needs_one():
    layer = LAYERS["mamba"](6, 4)
    with pytest.raises(ValueError, match="x: the matrix of Mamba depends on the input"):
        materialize(layer, made(layer)[0], L)


@pytest.mark.slow
def test_the_matrix_of_a_layer_in_bfloat16_is_computed_in_float32():
    layer = LAYERS["s4d"](3, 4)
    variables, x = made(layer)
    low = materialize(layer.clone(dtype=jnp.bfloat16), variables, x)
    assert all(part.dtype == jnp.float32 for part in low)
    assert_close(low[0], materialize(layer, variables, x)[0])


def test_a_length_is_at_least_one():
    layer = LAYERS["s4d"](3, 4)
    with pytest.raises(ValueError, match="x: a length must be at least 1, got -1"):
        materialize(layer, {}, np.int64(-1))


def test_a_layer_that_is_not_linear_has_no_matrix():
    layer = LAYERS["gru"](3)
    with pytest.raises(ValueError, match="layer: GRU is not linear in its values"):
        materialize(layer, *made(layer))


def test_the_example_of_the_page_is_right():
    page = (tiny_run.ROOT / "docs" / "layers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "docs/layers.md", "exec"), {})
