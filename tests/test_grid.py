"""Mixers over images and volumes: what the schemes compute, and models of them."""

import functools
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, images, pixels
from kernels.tolerance import assert_close
from layers import LAYERS, Grid, Sequence, build
from layers.models import grid
from layers.models.block import Block, Norm
from layers.models.model import Embedding
from train import data, loop, losses, optimizers, resolve
from train.data import images as files
from train.data import original
from train.reproduce import baseline

H = 4
IMAGE, VOLUME = (3, 5), (2, 3, 4)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def normal(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


class Sums(nn.Module):
    """A causal mixer that is quick to compile: y[t] = tanh(w sum_{s <= t} x[s])."""

    REFUSES = ("state",)

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        w = self.param("w", nn.initializers.normal(1.0), (self.features,))
        return jnp.tanh(w * jnp.cumsum(x, 1)).astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size):
        raise ValueError("a sum over places has no state")


def made(layer, scheme, size, dtype=jnp.float64, **fields):
    """A Grid, its parameters and an input."""
    cls = Sums if layer == "sums" else LAYERS[layer]
    mixer = functools.partial(cls, features=H, dtype=dtype, **fields)
    found = Grid(mixer, H, scheme, dtype)
    x = normal((2, *size, H), dtype)
    variables = jax.jit(found.init)({"params": jax.random.key(0)}, x)
    # Parameters are drawn in float32, and so would be what is computed of them alone.
    wide = jnp.promote_types(dtype, jnp.float32)
    params = jax.tree.map(lambda p: p.astype(wide), nn.unbox(variables)["params"])
    return found, params, x


def applied(layer, params, x):
    return jax.jit(lambda params, x: layer.apply({"params": params}, x)[0])(params, x)


def impulse_response(layer, params, n):
    """What a bidirectional layer answers to an impulse, lags -(n-1) to n-1."""
    x = jnp.zeros((1, 2 * n - 1, H), layer.dtype).at[:, n - 1].set(1.0)
    return applied(layer, params, x)[0]


def taps(layer, params, n):
    """The same of a LongConv, read from its parameters."""
    taps = np.array(params["filter"], np.float64)
    past, future = np.moveaxis(taps, 1, 2)[:, :n]
    past[0] += params["D"]
    return np.concatenate([future[: n - 1][::-1], past])


def convolution(x, filters):
    """One FFT over all axes, of a filter that is an outer product."""
    size = x.shape[1:-1]
    outer = functools.reduce(lambda a, b: a[..., None, :] * b, map(np.array, filters))
    axes = tuple(range(len(size)))
    padded = [3 * n for n in size]
    transform = np.fft.fftn(np.array(x), padded, [a + 1 for a in axes])
    y = np.fft.ifftn(transform * np.fft.fftn(outer, padded, axes), axes=np.add(axes, 1))
    inside = (slice(n - 1, 2 * n - 1) for n in size)
    return y[(slice(None), *inside)].real


@pytest.mark.parametrize(
    ("layer", "size", "fields", "filter_of"),
    [
        slow("s4d", IMAGE, dict(state_size=4), impulse_response),
        ("long_conv", VOLUME, dict(length=4), taps),
    ],
)
def test_separable_convolutions_are_one_in_all_dimensions(
    x64, layer, size, fields, filter_of
):
    found, params, x = made(layer, "separable", size, bidirectional=True, **fields)
    one = found.mixer()
    filters = [filter_of(one, params[f"axis_{i}"], n) for i, n in enumerate(size)]
    assert_close(applied(found, params, x), convolution(x, filters))


def both(layer, params, name, u):
    """u forwards and backwards."""
    future = applied(layer, params[f"{name}_reverse"], jnp.flip(u, 1))
    return applied(layer, params[name], u) + jnp.flip(future, 1)


@pytest.mark.parametrize("scheme", grid.SCHEMES)
def test_a_grid_of_one_axis_is_both_directions(x64, scheme):
    found, params, x = made("sums", scheme, (5,))
    expected = both(found.mixer(), params, "axis_0", x)
    assert_close(applied(found, params, x), expected)


@pytest.mark.parametrize("size", [slow(IMAGE), VOLUME], ids=len)
def test_cross_reads_all_places_with_each_axis_the_fastest_once(x64, size):
    found, params, x = made("sums", "cross", size)
    y = np.zeros(x.shape)
    for axis in range(len(size)):
        order = sorted(
            np.ndindex(size), key=lambda p: (p[:axis], p[axis + 1 :], p[axis])
        )
        places = (slice(None), *np.transpose(order))
        y[places] += both(found.mixer(), params, f"axis_{axis}", x[places])
    assert_close(applied(found, params, x), y)


@pytest.mark.parametrize(
    ("scheme", "layer"),
    [
        ("axis_sum", "sums"),
        slow("cross", "sums"),
        slow("separable", "s4d"),
        slow("cross", "mamba"),
    ],
)
def test_a_transposed_image_with_swapped_parameters_is_transposed(x64, scheme, layer):
    found, params, x = made(layer, scheme, IMAGE)
    other = {"0": "1", "1": "0"}
    swapped = {name.translate(str.maketrans(other)): p for name, p in params.items()}
    y = applied(found, swapped, jnp.swapaxes(x, 1, 2))
    assert_close(jnp.swapaxes(y, 1, 2), applied(found, params, x))


@pytest.mark.parametrize(
    ("layer", "scheme", "size", "fields"),
    [
        ("sums", "separable", VOLUME, {}),
        slow("long_conv", "axis_sum", VOLUME, dict(length=4)),
        slow("gru", "separable", IMAGE, {}),
        slow("s5", "cross", IMAGE, dict(state_size=4, bidirectional=True)),
        slow("attention", "cross", IMAGE, dict(context=15)),
        slow("attention", "separable", VOLUME, dict(context=4, bidirectional=True)),
        slow("mamba", "separable", VOLUME, dict(state_size=4)),
        slow("mamba", "cross", IMAGE, dict(state_size=4)),
        slow("s5", "axis_sum", VOLUME, dict(state_size=4)),
        slow("long_conv", "cross", VOLUME, dict(length=24)),
    ],
)
def test_rows_are_independent_and_every_parameter_has_a_gradient(
    layer, scheme, size, fields
):
    found, params, x = made(layer, scheme, size, jnp.float32, **fields)

    @jax.jit
    def gradient(params, x):
        def loss(params, x):
            y, state = found.apply({"params": params}, x)
            assert state is None and y.shape == x.shape
            return jnp.sum(jnp.sin(y), range(1, y.ndim)), y

        (rows, y), pull = jax.vjp(loss, params, x)
        return y, pull((jnp.ones_like(rows), jnp.zeros_like(y)))

    y, gradients = gradient(params, x)
    chex.assert_tree_all_finite(gradients)
    assert all(map(np.any, jax.tree.leaves(gradients)))
    turned, (of_params, of_x) = gradient(params, x[::-1])
    assert_close(turned, y[::-1])
    assert_close((of_params, of_x[::-1]), gradients, "gradient")


def test_the_dtype_of_the_output_is_that_of_the_layer():
    mixer = functools.partial(Sums, H)  # of float32
    x, key = jnp.zeros((2, *IMAGE, H)), jax.random.key(0)
    init = Grid(mixer, H, dtype=jnp.bfloat16).init_with_output
    assert jax.eval_shape(init, key, x)[0][0].dtype == jnp.bfloat16


TOKENS = jnp.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("x", "state", "sequence", "message"),
    [
        ((2, H), None, None, r"x: must be \[B, n_1, .*, 4\] with k >= 1 .* \(2, 4\)"),
        ((2, 3, 5, H + 1), None, None, r"x: must be .* got shape \(2, 3, 5, 5\)"),
        ((2, 3, 0, H), None, None, r"x: must be .* 1 or more places"),
        ((2, 3, 5, H), jnp.zeros((2, H)), None, "state: a Grid has none"),
        ((2, 3, 5, H), None, Sequence(mask=TOKENS), "mask: belongs to tokens"),
        ((2, 3, 5, H), None, Sequence(reset=TOKENS), "reset: belongs to tokens"),
        ((2, 3, 5, H), None, Sequence(dt=1.0 * TOKENS), "dt: belongs to tokens"),
        ((2, 3, 5, H), None, TOKENS, "sequence: must be a ssm.Sequence or None"),
    ],
)
def test_what_a_grid_cannot_read_is_named(x, state, sequence, message):
    found = Grid(functools.partial(LAYERS["gru"], H), H)
    with pytest.raises(ValueError, match=message):
        found.init(jax.random.key(0), jnp.zeros(x), state, sequence)


def test_a_grid_has_no_recurrent_mode_and_names_its_schemes():
    found = Grid(functools.partial(LAYERS["gru"], H), H, "spiral")
    with pytest.raises(ValueError, match="Grid has no recurrent mode"):
        found.init_state(2)
    with pytest.raises(ValueError, match=r"scheme: must be .*\['axis.* 'spiral'"):
        found.init(jax.random.key(0), jnp.zeros((2, 3, 5, H)))


@pytest.mark.parametrize("scheme", grid.SCHEMES)
@pytest.mark.parametrize(("layer", "key"), [("long_conv", "length")])
def test_a_capacity_is_that_of_the_longest_sequence(scheme, layer, key):
    def init(capacity):
        mixer = functools.partial(LAYERS[layer], H, **{key: capacity})
        x = jnp.zeros((1, *IMAGE, H))
        return jax.eval_shape(Grid(mixer, H, scheme).init, jax.random.key(0), x)

    longest = grid.longest(scheme, IMAGE)
    assert longest == (15 if scheme == "cross" else 5)
    init(longest)
    with pytest.raises(ValueError, match=f"^{key}: .* {longest} tokens"):
        init(longest - 1)


def configured(**changes):
    """config.model of a small model of grids."""
    config = common.base().model
    config.update(dict(encoder="grid", grid="separable", layer="test_grid.Sums"))
    config.update(dict(features=6, depth=1, outputs=3) | changes)
    return config


@pytest.mark.parametrize("remat", [False, slow(True)])
@pytest.mark.parametrize("size", [(4, 6), slow((2, 4, 2))], ids=len)
def test_a_model_of_grids(size, remat):
    model = build(configured(patch=2, norm="batch", dropout=0.5, remat=remat))
    x = normal((3, *size, 2))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(2)}
    variables = jax.jit(model.init)(rngs, x)

    @jax.jit
    def train(x):
        kept = ["batch_stats", "record"]
        return model.apply(variables, x, train=True, rngs=rngs, mutable=kept)

    (y, _), kept = train(x)
    assert y.shape == (3, 3)
    recorded = kept["record"]["stack"]["repeated"]["block_0"]
    assert np.isfinite(recorded["output_rms"]).all()
    means = kept["batch_stats"]["stack"]["repeated"]["block_0"]["norm"]["norm"]["mean"]
    assert means.shape == (1, 6) and np.any(means)
    with pytest.raises(ValueError, match="Grid has no recurrent mode"):
        model.init_state(2)


def test_a_patch_becomes_one_place_by_a_linear_map():
    encoder = Embedding("grid", 6, patch=2)
    encode = jax.jit(lambda x: encoder.init_with_output(jax.random.key(0), x))
    x = np.random.default_rng(1).integers(256, size=(3, 4, 6, 2), dtype=np.uint8)
    y, variables = nn.unbox(encode(x))
    project = variables["params"]["project"]
    patches = (x / 255).reshape(3, 2, 2, 3, 2, 2)
    expected = jnp.einsum("bipjqc,pqch->bijh", patches, project["kernel"])
    assert_close(y, expected + project["bias"])


class Ones(nn.Module):
    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return jnp.ones_like(x), state


def test_norm_and_tied_dropout_treat_all_places_of_an_image_alike():
    x, key = normal((3, *IMAGE, 6)), jax.random.key(0)
    norm, block = Norm("batch"), Block(Ones, 6, gate="gelu", dropout=0.5)

    @jax.jit
    def computed(x, rngs):
        grid = norm.init_with_output(key, x, None, True)
        flat = norm.init_with_output(key, x.reshape(3, -1, 6), None, True)
        y, _ = block.init_with_output(rngs, jnp.zeros_like(x), None, None, True)
        return grid, flat, y[0] == 0

    (y, stats), (flat, flat_stats), dropped = computed(x, dict(params=key, dropout=key))
    assert_close((y.reshape(flat.shape), stats), (flat, flat_stats))
    assert dropped.any() and not dropped.all()
    assert np.all(dropped == dropped[:, :1, :1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(grid="spiral"), r"grid: must be .*\['', 'axis_sum', 'cro.* 'spiral'"),
        (dict(encoder="image"), r"grid: must be '' .* data.layout=image"),
        (dict(grid=""), r"grid: must be one of \['axis_sum', 'cross.* got ''"),
        (dict(patch=0), "patch: must be at least 1, .* got 0"),
        (dict(grid="", encoder="image", patch=2), "patch: .* 1 without a grid, got 2"),
    ],
)
def test_a_config_that_is_no_grid_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(configured(**changes))


@pytest.mark.parametrize(
    ("changes", "shape", "sequence", "message"),
    [
        (dict(head="last"), (2, 4, 4, 1), None, "head: must be 'mean' for the grid"),
        (dict(patch=3), (2, 6, 4, 1), None, r"patch: must divide .* \(6, 4\), got 3"),
        ({}, (2, 16, 1), None, r"inputs: must be \[B, h, w, C\] or .* for the grid"),
        ({}, (2, 4, 4, 1), Sequence(mask=TOKENS), "mask: belongs to tokens"),
    ],
)
def test_inputs_that_are_no_grid_are_named(changes, shape, sequence, message):
    model = build(configured(**changes))
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape), None, sequence)


def loaded(config):
    """Its dataset, of blank images where the files would have to be downloaded."""
    shape = (28, 28) if config.data.name == "mnist" else (32, 32, 3)
    blank = np.zeros((20, *shape), np.uint8), np.zeros(20, np.uint8)
    with (
        mock.patch.object(original, "locate", lambda *args: [None] * len(args[2])),
        mock.patch.object(files, "_read_mnist", lambda *_: blank * 2),
        mock.patch.object(original, "read_cifar", lambda *_: blank),
    ):
        return data.load(config.data)


@pytest.mark.parametrize(
    ("arg", "shape", "length"),
    [
        ("digits,scheme=cross", (8, 8, 1), 64),
        ("digits,layer=long_conv", (8, 8, 1), 8),
        ("mnist,layer=attention,scheme=cross", (28, 28, 1), 196),
        slow("cifar,layer=mamba+attention,scheme=axis_sum", (32, 32, 3), 16),
    ],
)
def test_image_config_fits_its_data_model_and_optimizer(arg, shape, length):
    config = images.get_config(arg)
    dataset = loaded(config)
    config = resolve.complete(config, dataset.spec)
    assert (config.model.encoder, config.model.length) == ("grid", length)
    config.model.update(features=8, depth=2)
    model, batch = build(config.model), next(dataset.train(2, seed=0))
    assert batch["inputs"].shape == (2, *shape)

    def loss(key):
        variables = model.init({"params": key}, batch["inputs"])
        outputs, _ = model.apply(variables, batch["inputs"])
        return variables["params"], losses.make(dataset.spec.loss)(outputs, batch)

    params, (total, *_) = jax.eval_shape(loss, jax.random.key(0))
    _, groups, _ = optimizers.make(config, params)
    assert total.shape == ()
    assert sum(map(len, groups.values())) == len(jax.tree.leaves(params))


def test_the_config_knows_the_schemes():
    assert set(images.SCHEMES) == set(grid.SCHEMES)
    with pytest.raises(ValueError, match=r"scheme must be one of separable, .*, got"):
        images.get_config("digits,scheme=rows")


def test_pixels_in_a_row_are_no_grid():
    config = pixels.get_config("digits")
    config.model.grid = "cross"
    config = resolve.complete(config, data.load(config.data).spec)
    with pytest.raises(ValueError, match=r"encoder 'scalar'; .*layout=image"):
        build(config.model)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar"])
def test_an_image_is_the_sequence_of_its_pixels(name):
    config = images.get_config(name)
    as_images = loaded(config)
    del config.data["layout"]
    flat = loaded(config)
    image, row = (next(d.train(4, seed=0)) for d in (as_images, flat))
    np.testing.assert_array_equal(image["inputs"].ravel(), row["inputs"].ravel())
    np.testing.assert_array_equal(image["mask"], row["mask"])
    size = image["inputs"].shape[1:3]
    assert as_images.spec == flat.spec.but(encoder="image", size=size)
    by_hand = (
        baseline.features(d.spec, batch["inputs"], batch["mask"])
        for d, batch in ((as_images, image), (flat, row))
    )
    np.testing.assert_array_equal(*by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(name="digits", layout="grid"),
            "data.layout must be one of 'sequence', 'im",
        ),
        (dict(name="digits", layout="image", target="next"), "for the target next"),
        (dict(name="mnist", layout="image", permutation="random"), "with a permut"),
        (dict(name="cifar", layout="grid"), "data.layout must be one of 'sequence'"),
    ],
)
def test_a_layout_that_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        data.load(settings)


@pytest.mark.slow
def test_a_run_of_images(tmp_path):
    config = images.get_config("digits,layer=gru")
    config.model.update(features=4, depth=1, patch=2)
    config.train.update(steps=2, eval_every=2, batch_size=8)
    results = loop.run(config, tmp_path)
    assert "Grid has no recurrent mode" in results["parallel_vs_recurrent"]
    assert results["test"]["accuracy"] >= 0
