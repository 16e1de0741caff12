"""ConvSSM, ConvS5, ConvLSTM and attention over frames: transcriptions in NumPy float64,
identities, and the gradients of a convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close
from layers import (
    S5,
    Attention,
    ConvLSTM,
    ConvS5,
    FrameAttention,
    FullFrameAttention,
    Sequence,
)
from ssm import conv_ssm, discretize

B, h, w, U = 2, 3, 4, 6
SIZE = (h, w)


def frames(length, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), (B, length, h, w, U), dtype)


def made(layer, x, seed=1):
    """The layer's variables in float64."""
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(seed), x))
    return jax.tree.map(lambda p: p.astype(jnp.float64), variables)


def convolve(x, kernel):
    """x [..., h, w, I] * kernel [k, k, I, O], zero outside, tap by tap."""
    k = kernel.shape[0]
    low = (k - 1) // 2
    margin = [(0, 0)] * (x.ndim - 3) + [(low, k // 2), (low, k // 2), (0, 0)]
    padded = np.pad(x, margin)
    y = np.zeros((*x.shape[:-1], kernel.shape[-1]), np.result_type(x, kernel))
    for i in range(k):
        for j in range(k):
            part = padded[..., i : i + x.shape[-3], j : j + x.shape[-2], :]
            y += part @ kernel[i, j]
    return y


def complex_of(pairs):
    return pairs[..., 0] + 1j * pairs[..., 1]


@pytest.mark.parametrize(
    "k", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 4))]
)
def test_a_convolution_and_its_gradients(k):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(k), 3)
        x = frames(2)
        kernel = jax.random.normal(keys[0], (k, k, U, 5))
        dy = jax.random.normal(keys[1], (B, 2, h, w, 5))
        y, pull = jax.vjp(conv_ssm.convolve, x, kernel)
        assert_close(y, convolve(np.asarray(x), np.asarray(kernel)))
        # What other devices than a CPU take: XLA's own.
        images, dy_images = x.reshape(-1, h, w, U), dy.reshape(-1, h, w, 5)
        dx, dkernel = conv_ssm._xla_gradients(images, kernel, dy_images)
        assert_close(pull(dy), (dx.reshape(x.shape), dkernel), "gradient")


def test_a_stride_keeps_every_second_pixel():
    x = frames(2, dtype=jnp.float32)
    kernel = jax.random.normal(jax.random.key(0), (1, 1, U, 5))
    found = conv_ssm.convolve(x, kernel, stride=2)
    assert_close(found, conv_ssm.convolve(x, kernel)[:, :, ::2, ::2])


@pytest.mark.parametrize(
    "output", ["linear", pytest.param("diag_resnet", marks=pytest.mark.slow)]
)
def test_conv_s5_against_its_equations(output):
    with jax.enable_x64(True):
        x = frames(5)
        layer = ConvS5(U, SIZE, 8, 2, 3, 2, output=output, dtype=jnp.float64)
        variables = made(layer, x)
        p = jax.tree.map(np.asarray, variables["params"])
        lam = np.minimum(p["Lambda_re"], -1e-4) + 1j * p["Lambda_im"]
        dt = np.exp(p["log_step"])
        a, gain = np.exp(lam * dt), np.expm1(lam * dt) / lam
        X, u, ys, f = 0, np.asarray(x), [], p["readout"]
        for t in range(x.shape[1]):
            X = a * X + gain * convolve(u[:, t], complex_of(p["B"]))
            ys.append(2 * convolve(X, complex_of(p["C"])).real)
        y = np.stack(ys, 1)
        if output == "linear":
            y = y + convolve(u, f["D"]["kernel"])
        else:
            z = y = y + f["D"] * u
            for i in (1, 2):
                z = np.asarray(jax.nn.gelu(group_norm(z, f["residual"][f"norm_{i}"])))
                conv = f["residual"][f"conv_{i}"]
                z = convolve(z, conv["kernel"]) + conv["bias"]
            y = np.asarray(jax.nn.gelu(y + z))
        assert_close(layer.apply(variables, x), (y, X))


def group_norm(x, p):
    """Two groups: the largest number that divides 6 and 32."""
    groups = x.reshape(*x.shape[:-1], 2, -1)
    mean = groups.mean((2, 3, 5), keepdims=True)
    variance = groups.var((2, 3, 5), keepdims=True)
    normed = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return normed * p["scale"] + p["bias"]


def test_conv_s5_is_s5_at_every_pixel():
    """With 1 x 1 kernels."""
    with jax.enable_x64(True):
        x = frames(20)
        pixels = x.transpose(0, 2, 3, 1, 4).reshape(-1, 20, U)
        s5 = S5(U, 8, 2, dtype=jnp.float64, clip_eigs=True)
        variables = made(s5, pixels)
        p = dict(variables["params"])
        p["B"] = p["B"].swapaxes(0, 1)[None, None]
        p["C"] = p["C"].swapaxes(1, 2)[None]
        p["readout"] = {"D": {"kernel": jnp.diag(p.pop("D"))[None, None]}}
        layer = ConvS5(U, SIZE, 8, 2, 1, 1, 1, "linear", dtype=jnp.float64)
        y, state = layer.apply({"params": p}, x)
        expected, expected_state = s5.apply(variables, pixels)
        expected = expected.reshape(B, h, w, 20, U).transpose(0, 3, 1, 2, 4)
        assert_close((y, state), (expected, expected_state.reshape(B, h, w, 4)))


@pytest.mark.slow
def test_conv_s5_in_parallel_is_its_steps_over_fifty_frames():
    with jax.enable_x64(True):
        x = frames(50)
        layer = ConvS5(U, SIZE, 8, dtype=jnp.float64)
        variables = made(layer, x)
        start = layer.init_state(B) + 1.0

        def step(state, frame):
            y, state = layer.apply(variables, frame[:, None], state)
            return state, y[:, 0]

        last, ys = jax.lax.scan(step, start, x.swapaxes(0, 1))
        assert_close(layer.apply(variables, x, start), (ys.swapaxes(0, 1), last))


@pytest.mark.slow
@pytest.mark.parametrize("length", [15, 37])
def test_chunks_change_no_gradient(length):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x = frames(length)
        kernels = [jax.random.normal(k, (3, 3, U, U, 2)) for k in keys[:2]]
        lam = jax.lax.complex(-jnp.arange(1.0, U + 1), jnp.arange(1.0, U + 1))
        dt = jax.random.uniform(keys[2], (B, length), minval=0.5, maxval=2.0)

        def rule(elapsed):
            return discretize.zoh(lam, 0.1, 1.0 if elapsed is None else elapsed)

        def loss(chunk, x, pairs, dt, state):
            BC = [jax.lax.complex(p[..., 0], p[..., 1]) for p in pairs]
            y, final = conv_ssm.convolved(
                rule, *BC, x, state, dt, readout=jnp.multiply, chunk=chunk
            )
            return jnp.sum(y**2) + jnp.sum(jnp.abs(final) ** 2)

        state = jnp.ones((B, h, w, U), jnp.complex128)
        arguments = x, kernels, dt, state
        gradients = [
            jax.jit(jax.grad(functools.partial(loss, chunk), (0, 1, 2, 3)))(*arguments)
            for chunk in (4, length)
        ]
        assert_close(*gradients, "gradient")


@pytest.mark.slow
def test_conv_s5_is_translation_equivariant_away_from_borders():
    layer = ConvS5(U, (12, 12), 8, output="linear")
    x = jnp.zeros((1, 4, 12, 12, U)).at[:, :, 5, 5].set(1.0)
    variables = layer.init(jax.random.key(0), x)
    moved = jnp.roll(x, (1, 2), (2, 3))
    expected = jnp.roll(layer.apply(variables, x)[0], (1, 2), (2, 3))
    assert_close(layer.apply(variables, moved)[0], expected)


def test_conv_lstm_against_its_equations():
    with jax.enable_x64(True):
        x = frames(5)
        layer = ConvLSTM(U, SIZE, dtype=jnp.float64)
        variables = made(layer, x)
        p = jax.tree.map(np.asarray, variables["params"])
        hidden = c = np.zeros((B, h, w, U))
        ys = []

        def sigmoid(z):
            return 1 / (1 + np.exp(-z))

        for t in range(x.shape[1]):
            gates = convolve(np.asarray(x)[:, t], p["input"]["kernel"])
            gates = gates + p["input"]["bias"] + convolve(hidden, p["recurrent_kernel"])
            i, f, g, o = np.split(gates, 4, -1)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(c)
            ys.append(hidden)
        y, state = layer.apply(variables, x)
        assert_close((y, *state), (np.stack(ys, 1), hidden, c))


@pytest.mark.slow
def test_attention_over_frames_of_one_pixel_is_attention():
    x = jax.random.normal(jax.random.key(0), (B, 7, 1, 1, U))
    layer = FullFrameAttention(U, (1, 1), 3, context=7)
    variables = layer.init(jax.random.key(1), x)
    y, _ = layer.apply(variables, x)
    plain = Attention(U, 3, context=7)
    p = {k: v for k, v in variables["params"].items() if k != "place"}
    shifted = x[:, :, 0, 0] + variables["params"]["place"].value[0]
    assert_close(y[:, :, 0, 0], plain.apply({"params": p}, shifted)[0])


def test_full_attention_is_a_softmax_over_all_pixels_so_far():
    """Each frame sees itself and those before it, turned by the time between them."""
    x = frames(3, dtype=jnp.float32)
    layer = FullFrameAttention(U, SIZE, 1, context=3)
    variables = nn.unbox(layer.init(jax.random.key(1), x))
    y, _ = layer.apply(variables, x)
    p = variables["params"]
    tokens = x.reshape(B, 3, h * w, U) + p["place"]
    q, k, v = (tokens @ p[name]["kernel"] for name in ("query", "key", "value"))
    rates = 10_000.0 ** (-np.arange(U // 2) / (U // 2))
    turns = np.exp(1j * rates * np.arange(3)[:, None, None])  # [t, 1, U / 2]

    def turned(x):
        pairs = np.asarray(x[..., : U // 2] + 1j * x[..., U // 2 :], np.complex128)
        return pairs * turns

    scores = np.einsum("bqic,bkjc->bqikj", turned(q), turned(k).conj()).real
    scores /= np.sqrt(U)
    for t in range(3):
        seen = scores[:, t, :, : t + 1].reshape(B, h * w, -1)
        weights = np.exp(seen - seen.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        values = np.asarray(v[:, : t + 1], np.float64).reshape(B, -1, U)
        expected = weights @ values @ np.asarray(p["out"]["kernel"], np.float64)
        assert_close(y[:, t].reshape(B, h * w, U), np.float32(expected))


@pytest.mark.slow
def test_time_and_place_are_mixed_in_turn():
    """A pixel of an earlier frame is seen everywhere; one of a later frame nowhere."""
    x = frames(4, dtype=jnp.float32)
    layer = FrameAttention(U, SIZE, 2, context=8)
    variables = layer.init(jax.random.key(1), x)
    changed = x.at[:, 1, 0, 0].add(1.0)
    moved = layer.apply(variables, changed)[0] - layer.apply(variables, x)[0]
    assert jnp.all(moved[:, 0] == 0)
    assert jnp.all(jnp.abs(moved[:, 1:]).max(-1) > 0)


LAYERS = {
    "conv_s5": ConvS5(U, SIZE, 8),
    "conv_lstm": ConvLSTM(U, SIZE),
    "frame_attention": FrameAttention(U, SIZE, 2, context=4),
    "full_frame_attention": FullFrameAttention(U, SIZE, 2, context=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_frame_is_named(name):
    layer = LAYERS[name]
    with pytest.raises(ValueError, match=r"^x: must be \[B, L, 3, 4, 6\], got"):
        layer.init(jax.random.key(0), jnp.zeros((B, 3, w, h, U)))
    with pytest.raises(ValueError, match=r"^size: must be"):
        layer.clone(size=(3,)).init(jax.random.key(0), jnp.zeros((B, 3, h, w, U)))
    x = jnp.zeros((B, 3, h, w, U))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"^state: must be None or what init_state"):
        layer.apply(variables, x, layer.init_state(B + 1))


@pytest.mark.parametrize("name", ["conv_lstm", "frame_attention"])
def test_a_layer_without_elapsed_times_says_so(name):
    x = jnp.zeros((B, 3, h, w, U))
    with pytest.raises(ValueError, match=r"^dt: "):
        LAYERS[name].init(jax.random.key(0), x, None, Sequence(dt=jnp.ones((B, 3))))


@pytest.mark.parametrize("name", ["frame_attention", "full_frame_attention"])
def test_a_call_beyond_the_context_is_named(name):
    with pytest.raises(ValueError, match=r"^context: must be at least the 5"):
        LAYERS[name].init(jax.random.key(0), jnp.zeros((B, 5, h, w, U)))


@pytest.mark.parametrize("name", ["frame_attention", "full_frame_attention"])
def test_a_context_may_be_of_one_frame(name):
    layer, x = LAYERS[name].clone(context=1), jnp.zeros((B, 1, h, w, U))
    (y, state), _ = jax.eval_shape(
        layer.init_with_output, jax.random.key(0), x, layer.init_state(B)
    )
    assert y.shape == x.shape and state.count.shape[0] == B


def test_a_kernel_without_a_tap_is_named():
    layer = LAYERS["conv_lstm"].clone(kernel_size=0)
    with pytest.raises(ValueError, match=r"^kernel_size: must be at least 1, got 0"):
        layer.init(jax.random.key(0), jnp.zeros((B, 3, h, w, U)))


def test_an_unknown_output_is_named():
    layer = ConvS5(U, SIZE, 8, output="gelu")
    with pytest.raises(ValueError, match=r"^output: must be one of .* got"):
        layer.init(jax.random.key(0), jnp.zeros((B, 3, h, w, U)))
