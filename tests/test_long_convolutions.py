"""Long convolutions and H3 beside their equations, written out as loops in NumPy."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.fft_conv import dft_factors
from kernels.tolerance import assert_close, error
from layers import (
    H3,
    S4D,
    FlashButterfly,
    Hyena,
    LongConv,
    Sequence,
    SGConv,
    prepare,
)

B, L, H = 2, 20, 4  # more than the 16 steps up to which fft_conv takes no FFT
LENGTH = 24
EXACT = 1e-10


def made(layer, seed=0):
    """Variables of a layer."""
    x = jnp.zeros((1, 3, H), layer.dtype)
    return nn.unbox(jax.jit(layer.init)({"params": jax.random.key(seed)}, x))


def moved(variables, scale=0.3, seed=1):
    """Every parameter in float64 and away from where it starts."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: np.asarray(p, np.float64) + scale * rng.normal(size=p.shape),
        variables["params"],
    )
    return {**variables, "params": params}


def inputs(length=L, seed=2):
    return np.random.default_rng(seed).normal(size=(B, length, H))


def applied(layer):
    return jax.jit(
        lambda variables, x, state=None, sequence=None: layer.apply(
            variables, x, state, sequence
        )
    )


def convolved(k, v, ahead=None):
    """sum_j k[h, j] v[t-j, h] + sum_j ahead[h, j] v[t+1+j, h]."""
    y = np.zeros_like(v)
    for t in range(v.shape[1]):
        for s in range(v.shape[1]):
            if s <= t and t - s < k.shape[1]:
                y[:, t] += k[:, t - s] * v[:, s]
            if s > t and ahead is not None and s - t - 1 < ahead.shape[1]:
                y[:, t] += ahead[:, s - t - 1] * v[:, s]
    return y


def mean_of_neighbours(k, width):
    smooth = np.zeros_like(k)
    for j in range(k.shape[-1]):
        for i in range(j - width // 2, j + width // 2 + 1):
            if 0 <= i < k.shape[-1]:
                smooth[..., j] += k[..., i] / width
    return smooth


def gaussian_over_bins(k, width):
    K, half = k.shape[-1], width // 2
    spectrum = [
        sum(k[..., j] * np.exp(-2j * np.pi * f * j / K) for j in range(K))
        for f in range(K // 2 + 1)
    ]
    smooth = [
        sum(
            np.exp(-0.5 * i**2) * spectrum[f + i]
            for i in range(-half, half + 1)
            if 0 <= f + i < len(spectrum)
        )
        for f in range(len(spectrum))
    ]
    y = np.zeros_like(k)
    for j in range(K):
        for f, value in enumerate(smooth):
            once = f == 0 or 2 * f == K
            y[..., j] += (2 - once) * (value * np.exp(2j * np.pi * f * j / K)).real / K
    return y


def soft_threshold(k, threshold):
    return np.where(np.abs(k) > threshold, k - threshold * np.sign(k), 0.0)


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
@pytest.mark.parametrize("domain", ["time", "frequency"])
def test_long_conv(domain, length):
    ahead = domain == "frequency"
    with jax.enable_x64(True):
        layer = LongConv(
            H, length, "double_exp", 0.015, 5, domain, 0.0, ahead, jnp.float64
        )
        variables, x = moved(made(layer), 0.04), inputs()
        y, _ = applied(layer)(variables, x)
        assert y.dtype == jnp.float64
    smooth = mean_of_neighbours if domain == "time" else gaussian_over_bins
    k = soft_threshold(smooth(variables["params"]["filter"], 5), 0.015)
    assert 0.1 < np.mean(k == 0) < 0.9
    expected = convolved(k[0], x, k[1] if ahead else None)
    assert error(y, expected + variables["params"]["D"] * x) < EXACT


def block_transform(x, factors):
    """Of x [N] with any factors, the first index of j = j_1 M + m first."""
    if not factors:
        return x
    n, M = len(factors[0]), len(x) // len(factors[0])
    X = np.zeros((n, M), complex)
    for k in range(n):
        for m in range(M):
            total = sum(factors[0][k, j] * x[j * M + m] for j in range(n))
            X[k, m] = np.exp(-2j * np.pi * k * m / len(x)) * total
    return np.concatenate([block_transform(row, factors[1:]) for row in X])


@pytest.mark.parametrize("per_feature", [False, True])
def test_flash_butterfly(per_feature):
    length, short = 6, 5
    with jax.enable_x64(True):
        layer = FlashButterfly(
            H,
            length,
            bidirectional=True,
            order=2,
            per_feature=per_feature,
            dtype=jnp.float64,
        )
        variables, x = moved(made(layer)), inputs(short)
        y, _ = applied(layer)(variables, x)
    params = variables["params"]
    sizes = [len(params[f"u_factor_{i}"][..., 0, 0].T) for i in range(2)]
    N = sizes[0] * sizes[1]
    dft = [np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n) for n in sizes]
    back = np.linalg.inv(
        np.stack([block_transform(e, dft) for e in np.eye(N)], axis=-1)
    )
    expected = params["D"] * x
    for h in range(H):
        learned = {}
        for of in "uk":
            factors = [params[f"{of}_factor_{i}"] for i in range(2)]
            factors = [f[h] if per_feature else f for f in factors]
            learned[of] = [f[..., 0] + 1j * f[..., 1] for f in factors]
        k = np.zeros(N)
        k[:length] = params["filter"][0, h]
        for j in range(length - 1):
            k[N - 1 - j] = params["filter"][1, h, j]
        K = block_transform(k, learned["k"])
        for b in range(B):
            U = block_transform(np.pad(x[b, :, h], (0, N - short)), learned["u"])
            expected[b, :, h] += (back @ (K * U)).real[:short]
    assert error(y, expected) < EXACT


def between_knots(w, factor):
    """Linear interpolation of w [..., d] at the middles of d factor equal cells."""
    d = w.shape[-1]
    y = np.zeros((*w.shape[:-1], d * factor))
    for j in range(d * factor):
        place = min(max((j + 0.5) / factor - 0.5, 0), d - 1)
        i = min(int(place), d - 2)
        y[..., j] = (1 - place + i) * w[..., i] + (place - i) * w[..., i + 1]
    return y


def multiscale(params, layer):
    w = params["filter"]
    S, d = w.shape[0], layer.knots
    k = np.zeros((*w.shape[1:-1], d * 2 ** (S - 1)))
    m = np.linspace(layer.decay_min, layer.decay_max, H)[:, None]
    start = 0
    for i in range(S):
        factor = 2**i if layer.layout == "sum" else 2 ** max(0, i - 1)
        weight = 1.0 if layer.decay == "learned" else m ** (S - 1 - i)
        k[..., start : start + d * factor] += weight * between_knots(w[i], factor)
        start += d * factor if layer.layout == "cat" else 0
    if layer.decay == "learned":
        k *= np.arange(1.0, k.shape[-1] + 1) ** -params["decay"][:, None]
    return k


@pytest.mark.parametrize(
    ("layout", "decay", "ahead"),
    [
        ("cat", "fixed", False),
        ("sum", "learned", True),
        pytest.param("cat", "learned", False, marks=pytest.mark.slow),
        pytest.param("sum", "fixed", True, marks=pytest.mark.slow),
    ],
)
def test_sg_conv_and_its_stored_norm(layout, decay, ahead):
    with jax.enable_x64(True):
        layer = SGConv(H, LENGTH, 3, layout, decay, 1.5, 2.5, ahead, jnp.float64)
        first = made(layer)
        variables, x = moved(first), inputs()
        y, _ = applied(layer)(variables, x)
    Z = np.linalg.norm(
        multiscale(jax.tree.map(np.asarray, first["params"]), layer), axis=-1
    )
    assert error(first["buffers"]["norm"][..., 0], Z) < 1e-6
    Z = np.asarray(first["buffers"]["norm"])  # of the first parameters, not of these
    k = (multiscale(variables["params"], layer) / Z)[..., :LENGTH]
    expected = convolved(k[0], x, k[1] if ahead else None)
    assert error(y, expected + variables["params"]["D"] * x) < EXACT


def short_convolution(p, x):
    return p["bias"] + convolved(p["kernel"], x)


def affine(p, x):
    return x @ p["kernel"] + p["bias"]


def hyena_filters(params, layer):
    """[order-1, H, length], lag by lag."""
    K, filters = layer.length, (layer.order - 1) * H
    k = np.zeros((filters, K))
    for j in range(K):
        t, features = j / (K - 1), [j / (K - 1)]
        f = np.linspace(1e-4, layer.bands - 1, layer.bands)
        features += [np.cos(2 * np.pi * j * g / K) for g in f]
        features += [-np.sin(2 * np.pi * j * g / K) for g in f]
        h = np.array(features)
        for i in range(1 + layer.inner):
            h = np.sin(params["frequency"] * affine(params[f"filter_{i}"], h))
        h = h @ params["filter"]["kernel"]
        for c in range(filters):
            slow = np.log(layer.target) / layer.slow
            fast = np.log(layer.target) / layer.fast
            delta = slow + (fast - slow) * c / (filters - 1)
            k[c, j] = h[c] * (np.exp(-t * abs(delta)) + layer.shift)
    return k.reshape(H, layer.order - 1, K).transpose(1, 0, 2)


@pytest.mark.parametrize(
    "order", [pytest.param(2, marks=pytest.mark.slow), 3], ids=["order2", "order3"]
)
def test_hyena(order):
    with jax.enable_x64(True):
        layer = Hyena(H, LENGTH, order, hidden=5, bands=2, shift=0.1, dtype=jnp.float64)
        variables, x = moved(made(layer)), inputs()
        y, _ = applied(layer)(variables, x)
    params = variables["params"]
    k = hyena_filters(params, layer)
    p = short_convolution(params["conv"], affine(params["in"], x))
    *gates, v = np.split(p, order + 1, axis=-1)
    for i in range(order - 1, 0, -1):
        v = gates[i] * v
        v = convolved(k[i - 1], v) + params["D"][i - 1] * v
    assert error(y, affine(params["out"], gates[0] * v)) < EXACT


def s4d_output(params, u):
    """u [B, L, H]: state by state, with a zero-order hold."""
    lam = -np.exp(params["A_re"]) + 1j * params["A_im"]
    step = np.exp(params["log_dt"])[:, None]
    Bm, C = (p[..., 0] + 1j * p[..., 1] for p in (params["B"], params["C"][0]))
    state = np.zeros((u.shape[0], *lam.shape), complex)
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        gain = (np.exp(step * lam) - 1) / lam * Bm
        state = np.exp(step * lam) * state + gain * u[:, t, :, None]
        y[:, t] = 2 * (C * state).sum(-1).real + params["D"] * u[:, t]
    return y


@pytest.mark.parametrize("P", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_h3(P):
    with jax.enable_x64(True):
        layer = H3(H, 6, 5, P, dtype=jnp.float64)
        variables, x = moved(made(layer)), inputs()
        y, _ = applied(layer)(variables, x)
    params = variables["params"]
    q, k, v = np.split(affine(params["in"], x), 3, axis=-1)
    s = convolved(params["shift"]["kernel"], k) + params["shift"]["D"] * k
    o = np.zeros_like(v)
    for i in range(P):  # of each head; feature = head P + i
        for j in range(P):
            held = s4d_output(params["ssm"], s[..., i::P] * v[..., j::P])
            o[..., j::P] += q[..., i::P] * held
    assert error(y, affine(params["out"], o)) < EXACT


CAUSAL = {
    "long_conv": LongConv(H, 48),
    "sg_conv": SGConv(H, 48, 5),
    "hyena": Hyena(H, 48, 3, hidden=5),
    "h3": H3(H, 6, 20, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "long_conv",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sg_conv", "hyena", "h3")),
    ],
)
def test_pieces_equal_the_whole_where_the_convolution_is_an_fft(name):
    """The laws' calls are short; these have masks and resets too."""
    layer = CAUSAL[name]
    apply, variables = applied(layer), made(layer)
    params = flax.traverse_util.flatten_dict(variables["params"])
    if name == "long_conv":
        params["filter",] *= 100  # as visible as the skip
    variables = {**variables, "params": flax.traverse_util.unflatten_dict(params)}
    x = jnp.asarray(inputs(80), jnp.float32)
    sequence = Sequence(mask=jnp.ones((B, 80), bool).at[1, 30:37].set(False))
    sequence = Sequence(sequence.mask, jnp.zeros((B, 80), bool).at[0, 51].set(True))
    outputs, state = [], None
    for start in (0, 40):
        cut = slice(start, start + 40)
        part = jax.tree.map(lambda field, cut=cut: field[:, cut], sequence)
        y, state = apply(variables, x[:, cut], state, part)
        outputs.append(y)
    halves, state_of_halves = jnp.concatenate(outputs, 1), state
    outputs, state = [], None
    for start in range(0, 80, 20):
        cut = slice(start, start + 20)
        part = jax.tree.map(lambda field, cut=cut: field[:, cut], sequence)
        y, state = apply(variables, x[:, cut], state, part)
        outputs.append(y)
    assert_close((jnp.concatenate(outputs, 1), state), (halves, state_of_halves))
    fresh, _ = apply(variables, x[:1, 51:80])
    assert_close(halves[:1, 51:], fresh)


def test_flash_butterfly_starts_as_long_conv():
    x = jnp.asarray(inputs(), jnp.float32)
    for ahead in (False, True):
        butterfly = FlashButterfly(H, LENGTH, bidirectional=ahead)
        variables = made(butterfly)
        variables["params"]["filter"] *= 100
        params = {k: variables["params"][k] for k in ("filter", "D")}
        long = LongConv(H, LENGTH, bidirectional=ahead)
        expected, _ = applied(long)({"params": params}, x)
        y, state = applied(butterfly)(variables, x)
        assert state is None
        assert_close(y, expected)
    factor = variables["params"]["u_factor_0"]
    assert_close(factor, dft_factors([len(factor)])[0])


def test_a_learned_butterfly_ignores_padding_but_is_not_causal():
    layer = FlashButterfly(H, LENGTH)
    variables = jax.tree.map(jnp.float32, moved(made(layer)))
    apply, x = applied(layer), jnp.asarray(inputs(), jnp.float32)
    y, _ = apply(variables, x)
    mask = np.ones((B, L + 4), bool)
    mask[:, [0, 3, 7, L + 3]] = False
    padded = np.full((B, L + 4, H), np.nan, np.float32)
    padded[mask] = np.asarray(x).reshape(-1, H)
    found, _ = apply(variables, padded, None, Sequence(mask=jnp.asarray(mask)))
    assert_close(found[mask].reshape(y.shape), y)
    later, _ = apply(variables, x.at[:, -1].add(1.0))
    assert error(later[:, 0], y[:, 0]) > 0.01


def response(layer, variables, length):
    """The filter [H, length] that a layer has, without its skip."""
    params = dict(variables["params"])
    params["D"] = jnp.zeros_like(params["D"])
    impulse = jnp.zeros((1, length, H)).at[:, 0].set(1.0)
    return applied(layer)({**variables, "params": params}, impulse)[0][0].T


def test_the_filter_of_sg_conv_starts_with_norm_one():
    layer = SGConv(H, 24, 3)
    variables = made(layer)
    k = response(layer, variables, 24)
    assert_close(jnp.linalg.norm(k, axis=-1), jnp.ones(H))
    variables["params"]["filter"] *= 3
    assert_close(response(layer, variables, 24), 3 * k)
    _, changed = layer.apply(variables, jnp.zeros((1, 2, H)), mutable=["buffers"])
    assert_close(changed["buffers"], variables["buffers"])


def test_sg_conv_of_one_scale_is_a_free_filter_over_its_norm():
    x = jnp.asarray(inputs(), jnp.float32)
    layer = SGConv(H, LENGTH, LENGTH + 2)
    variables = made(layer)
    w, D = variables["params"]["filter"][0], variables["params"]["D"]
    taps = (w / jnp.linalg.norm(w, axis=-1, keepdims=True))[..., :LENGTH]
    y, _ = applied(layer)(variables, x)
    free = LongConv(H, LENGTH)
    expected, _ = applied(free)({"params": {"filter": taps, "D": D}}, x)
    assert_close(y, expected)


def test_long_conv_with_the_filter_of_s4d_is_s4d():
    x = jnp.asarray(inputs(), jnp.float32)
    s4d = S4D(H, 8)
    variables = made(s4d)
    taps = response(s4d, variables, LENGTH)[None]
    params = {"filter": taps, "D": variables["params"]["D"]}
    y, _ = applied(LongConv(H, LENGTH))({"params": params}, x)
    assert_close(y, applied(s4d)(variables, x)[0])


def plain_hyena(**fields):
    """Gates of 1, no short convolution, projections that do nothing."""
    layer = Hyena(H, LENGTH, hidden=5, **fields)
    variables = made(layer)
    params = variables["params"]
    params["in"] = {
        "kernel": jnp.concatenate([jnp.zeros((H, 2 * H)), jnp.eye(H)], 1),
        "bias": jnp.repeat(jnp.array([1.0, 1.0, 0.0]), H),
    }
    params["conv"] = {
        "kernel": jnp.zeros((3 * H, 3)).at[:, 0].set(1.0),
        "bias": jnp.zeros(3 * H),
    }
    params["out"] = {"kernel": jnp.eye(H), "bias": jnp.zeros(H)}
    return layer, variables


def test_hyena_with_gates_of_one_is_a_long_convolution():
    layer, variables = plain_hyena()
    x = jnp.asarray(inputs(), jnp.float32)
    taps = response(layer, variables, LENGTH)[None]
    params = {"filter": taps, "D": variables["params"]["D"][0]}
    expected, _ = applied(LongConv(H, LENGTH))({"params": params}, x)
    assert_close(applied(layer)(variables, x)[0], expected)


def test_hyena_with_gates_of_one_and_a_delta_filter_only_scales():
    layer, variables = plain_hyena(fast=1e-3, slow=1e-3)  # a window of one tap
    x = jnp.asarray(inputs(), jnp.float32)
    params = jax.tree.map(np.asarray, variables["params"])
    scale = hyena_filters(params, layer)[0, :, 0] + params["D"][0]
    assert_close(applied(layer)(variables, x)[0], x * jnp.float32(scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long_conv", "sg_conv", "hyena"])
def test_prepared_variables_hold_the_filter(name):
    layer = CAUSAL[name]
    variables, x = made(layer), jnp.asarray(inputs(2), jnp.float32)
    prepared = prepare(layer, variables, x[:, :1])
    (taps,) = jax.tree.leaves(prepared["constants"])
    assert taps.shape[-1] == 48
    apply = applied(layer)
    _, state = apply(variables, x[:, :1])
    assert_close(apply(prepared, x[:, 1:], state), apply(variables, x[:, 1:], state))


def test_filter_dropout_drops_taps_and_their_gradients():
    rate = 0.25
    layer = LongConv(H, LENGTH, filter_dropout=rate)
    variables, x = made(layer), jnp.asarray(inputs(LENGTH), jnp.float32)
    weight = jnp.asarray(inputs(LENGTH, 5), jnp.float32)

    @jax.jit
    def gradient(rngs=None):
        def scalar(variables):
            y, _ = layer.apply(variables, x, train=rngs is not None, rngs=rngs)
            return jnp.sum(weight * y)  # linear in the filter

        return jax.grad(scalar)(variables)["params"]["filter"]

    every = gradient()
    assert jnp.all(every != 0)
    dropped = [gradient({"dropout": jax.random.key(i)}) for i in (0, 1)]
    kept = dropped[0] != 0
    assert 0.55 < jnp.mean(kept) < 0.95
    assert_close(dropped[0], jnp.where(kept, every / (1 - rate), 0.0), "gradient")
    assert jnp.any(kept != (dropped[1] != 0))
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        layer.apply(variables, x, train=True)
    y, _ = LongConv(H, LENGTH).apply(variables, x, train=True)
    assert_close(y, layer.apply(variables, x)[0])


@pytest.mark.parametrize(
    ("start", "smooth", "most"),
    [("random", 0, 4e-3), ("random", 5, 1.78e-3), ("double_exp", 0, 4e-2)],
)
def test_a_squash_that_leaves_no_tap_is_refused(start, smooth, most):
    """At the largest threshold that is taken, some taps still learn."""
    x = jnp.asarray(inputs(200), jnp.float32)
    layer = LongConv(H, 200, start, most, smooth)
    variables = made(layer)
    of_power = jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, x)[0] ** 2)))
    gradient = of_power(variables)
    assert jnp.any(gradient["params"]["filter"] != 0)
    with pytest.raises(ValueError, match=r"^squash: must be from 0 to .*got 0.1"):
        made(layer.clone(squash=0.1))


LAYERS = {**CAUSAL, "flash_butterfly": FlashButterfly(H, 48)}


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_filter_of_taps_cannot_do_is_refused(name):
    layer = LAYERS[name]
    x = jnp.zeros((B, 48, H))
    with pytest.raises(ValueError, match=r"^dt: .* regular steps"):
        layer.apply({}, x, sequence=Sequence(dt=jnp.ones((B, 48))))
    with pytest.raises(ValueError, match=r"^state: "):
        layer.apply({}, x, jnp.zeros((B, 3, H)))
    if name != "h3":
        with pytest.raises(ValueError, match=r"^length: must .* 49 tokens .* 48 taps"):
            layer.apply({}, jnp.zeros((B, 49, H)))


def test_what_needs_the_past_alone_is_refused():
    butterfly, x = FlashButterfly(H, 8), jnp.zeros((B, 8, H))
    with pytest.raises(ValueError, match=r"^reset: FlashButterfly mixes all tokens"):
        butterfly.apply({}, x, sequence=Sequence(reset=jnp.ones((B, 8), bool)))
    with pytest.raises(ValueError, match="FlashButterfly has no recurrent mode"):
        butterfly.init_state(B)
    for layer in (LongConv(H, 8, bidirectional=True), SGConv(H, 8, bidirectional=True)):
        with pytest.raises(ValueError, match=r"^bidirectional: .* no recurrent mode"):
            layer.init_state(B)
        with pytest.raises(ValueError, match=r"^state: a bidirectional"):
            layer.apply({}, x, jnp.zeros((B, 7, H)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LongConv(H, 0), r"^length: must be at least 1, got 0"),
        (LongConv(H, 8, "zeros"), r"^start: must be .*\['double_exp'.* 'zeros'"),
        (LongConv(H, 8, smooth=4), r"^smooth: must be odd, or 0 for none, got 4"),
        (LongConv(H, 8, smooth_domain="lag"), r"^smooth_domain: must be .* got 'lag'"),
        (LongConv(H, 8, squash=-1.0), r"^squash: must be from 0"),
        (LongConv(H, 8, filter_dropout=1.0), r"^filter_dropout: must be in \[0, 1\)"),
        (FlashButterfly(H, 8, order=-1), r"^order: must be at least 1, or 0, got -1"),
        (SGConv(H, 8, 0), r"^knots: must be at least 1, got 0"),
        (SGConv(H, 8, layout="stack"), r"^layout: must be .*\['cat'.* got 'stack'"),
        (SGConv(H, 8, decay="none"), r"^decay: must be one of \['fixed'.* got 'none'"),
        (SGConv(H, 8, decay_min=3.0), r"^decay_min, decay_max: must satisfy 0 <"),
        (Hyena(H, 0), r"^length: must be at least 1, got 0"),
        (Hyena(H, 8, 1), r"^order: must be at least 2, got 1"),
        (Hyena(H, 8, inner=-1), r"^inner: must be 0 or positive, got -1"),
        (Hyena(H, 8, fast=0.0), r"^fast: must be positive, got 0.0"),
        (Hyena(H, 8, target=1.0), r"^target: must be between 0 and 1, got 1.0"),
        (H3(H, 4, 0), r"^taps: must be at least 1, got 0"),
        (H3(H, 4, 2, 3), r"^head_size: must divide features = 4, got 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_fields_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init({"params": jax.random.key(0)}, jnp.zeros((1, 2, H)))
