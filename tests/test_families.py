"""The gated and attending families against transcriptions of their equations in NumPy
float64, token by token, and the identities between them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chunked_scan, linear_scan, selective_scan, short_conv
from kernels.tolerance import assert_close
from layers import LAYERS
from layers.lightning import slopes
from ssm import Sequence, recurrence

B, L, H = 2, 7, 8


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * scale


def conv(x, p):
    """Depthwise and causal, x [B, L, C]."""
    w = p["kernel"]
    padded = np.pad(x, ((0, 0), (w.shape[1] - 1, 0), (0, 0)))
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(w.shape[1]):
            y[:, t] += w[:, j] * padded[:, t + w.shape[1] - 1 - j]
    return y + p.get("bias", 0.0)


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1)


def linear_attention(q, k, v, log_decay=None, beta=None):
    """o[t] = S[t]^T q[t]; log_decay [B, L, heads] or [B, L, heads, K]."""
    S = np.zeros((q.shape[0], v.shape[2], q.shape[-1], v.shape[-1]))
    outputs = []
    each = v.shape[2] // q.shape[2]
    q, k = np.repeat(q, each, 2), np.repeat(k, each, 2)
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = np.exp(log_decay[:, t])
            S = S * decay.reshape(*decay.shape, *[1] * (4 - decay.ndim))
        new = v[:, t]
        if beta is not None:
            b = beta[:, t][..., None]
            new = b * (new - np.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], new)
        outputs.append(np.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return np.stack(outputs, 1)


def turn(x, base, size):
    """Rotary positions 0, 1, ... on the first `size` channels of [B, L, heads, K]."""
    half = size // 2
    z = x[..., :half] + 1j * x[..., half:size]
    theta = base ** (-np.arange(half) / half)
    z = z * np.exp(1j * np.arange(x.shape[1])[:, None, None] * theta)
    return np.concatenate([z.real, z.imag, x[..., size:]], -1)


def gated_output(p, o, gate=None):
    o = rms(o, p["norm"]["scale"], 1e-5).reshape(*o.shape[:2], -1)
    return (o if gate is None else o * gate) @ p["out"]["kernel"]


def mamba(layer, p, x):
    E, N = 2 * H, layer.state_size
    u, z = np.split(x @ p["in"]["kernel"], 2, -1)
    u = silu(conv(u, p["conv"]))
    low, B_, C_ = np.split(u @ p["select"]["kernel"], [1, 1 + N], -1)
    Delta = softplus(low @ p["dt"]["kernel"] + p["dt"]["bias"])
    A = -np.exp(p["A_log"])
    h, y = np.zeros((B, E, N)), []
    for t in range(L):
        new = (Delta[:, t] * u[:, t])[..., None] * B_[:, t, None]
        h = np.exp(Delta[:, t, :, None] * A) * h + new
        y.append(np.sum(h * C_[:, t, None], -1) + p["D"] * u[:, t])
    return (np.stack(y, 1) * silu(z)) @ p["out"]["kernel"]


def mamba2(layer, p, x):
    E, N, G, P = 2 * H, layer.state_size, layer.groups, layer.head_size
    parts = np.split(x @ p["in"]["kernel"], [E, 2 * E + 2 * G * N], -1)
    z, u, d = parts
    u = silu(conv(u, p["conv"]))
    u, B_, C_ = np.split(u, [E, E + G * N], -1)
    Delta = np.clip(softplus(d + p["dt_bias"]), *layer.dt_limit)
    u, B_, C_ = heads(u, E // P), heads(B_, G), heads(C_, G)
    y = linear_attention(C_, B_, Delta[..., None] * u, -Delta * np.exp(p["A_log"]))
    y = (y + p["D"][:, None] * u).reshape(z.shape) * silu(z)
    y = rms(heads(y, G), p["norm"]["scale"], 1e-5).reshape(z.shape)
    return y @ p["out"]["kernel"]


def rg_lru(layer, p, x):
    def gelu_tanh(v):
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    gate = gelu_tanh(x @ p["gate"]["kernel"] + p["gate"]["bias"])
    u = conv(x @ p["in"]["kernel"] + p["in"]["bias"], p["conv"])
    blocks = heads(u, layer.heads)

    def gates(name):
        mixed = np.einsum("blhi,hij->blhj", blocks, p[f"{name}_kernel"])
        return sigmoid(mixed.reshape(u.shape) + p[f"{name}_bias"])

    r, i = gates("r"), gates("i")
    a = np.exp(-8 * r * softplus(p["Lambda"]))
    h, states = np.zeros((B, u.shape[-1])), []
    for t in range(L):
        scale = np.sqrt(1 - a[:, t] ** 2) if t else 1.0
        h = a[:, t] * h + scale * i[:, t] * u[:, t]
        states.append(h)
    return (np.stack(states, 1) * gate) @ p["out"]["kernel"] + p["out"]["bias"]


def retention(layer, p, x):
    q, k, v = (heads(x @ p[n]["kernel"], 2) for n in ("query", "key", "value"))
    K = q.shape[-1]
    q, k = turn(q, layer.base, K), turn(k / np.sqrt(K), layer.base, K)
    gamma = np.log(1 - 2.0 ** (-5 - np.arange(2)))
    o = linear_attention(q, k, v, np.broadcast_to(gamma, (B, L, 2)))
    return gated_output(p, o, silu(x @ p["gate"]["kernel"]))


def lightning(layer, p, x):
    q, k, v = (heads(x @ p[n]["kernel"], 2) for n in ("query", "key", "value"))
    decay = np.broadcast_to(-np.asarray([2.0**-4, 2.0**-8]), (B, L, 2))
    o = linear_attention(silu(q), silu(k), v, decay)
    return gated_output(p, o, sigmoid(x @ p["gate"]["kernel"]))


def gla(layer, p, x):
    q, k, v = (heads(x @ p[n]["kernel"], 2) for n in ("query", "key", "value"))
    g = x @ p["decay_in"]["kernel"] @ p["decay"]["kernel"] + p["decay"]["bias"]
    g = heads(-softplus(-g) / 16, 2)
    o = linear_attention(q / np.sqrt(q.shape[-1]), k, v, g)
    return gated_output(p, o, silu(x @ p["gate"]["kernel"]))


def delta_inputs(p, x):
    q, k, v = (
        heads(silu(conv(x @ p[n]["kernel"], p[f"{n}_conv"])), 2)
        for n in ("query", "key", "value")
    )
    q, k = (z / np.sqrt(np.sum(z * z, -1, keepdims=True) + 1e-6) for z in (q, k))
    return q / np.sqrt(q.shape[-1]), k, v, sigmoid(x @ p["beta"]["kernel"])


def delta_net(layer, p, x):
    q, k, v, beta = delta_inputs(p, x)
    return gated_output(p, linear_attention(q, k, v, None, beta))


def gated_delta_net(layer, p, x):
    q, k, v, beta = delta_inputs(p, x)
    dt = softplus(x @ p["dt"]["kernel"] + p["dt_bias"])
    o = linear_attention(q, k, v, -np.exp(p["A_log"]) * dt, beta)
    return gated_output(p, o, silu(x @ p["gate"]["kernel"]))


def attention(layer, p, x):
    G = layer.kv_heads or layer.heads
    q, k, v = (
        heads(x @ p[n]["kernel"], count)
        for n, count in (("query", layer.heads), ("key", G), ("value", G))
    )
    K = q.shape[-1]
    size = int(K * layer.rotary) // 2 * 2
    q, k = turn(q, layer.base, size), turn(k, layer.base, size)
    k, v = (np.repeat(z, layer.heads // G, 2) for z in (k, v))
    o = np.zeros_like(q)
    reach = layer.window or layer.context
    for t in range(L):
        near = slice(max(0, t - reach + 1), L if layer.bidirectional else t + 1)
        logits = np.einsum("bhk,bshk->bhs", q[:, t], k[:, near]) / np.sqrt(K)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        o[:, t] = np.einsum("bhs,bshk->bhk", weights, v[:, near])
    return o.reshape(B, L, -1) @ p["out"]["kernel"]


def lstm(layer, p, x):
    h = c = np.zeros((B, H))
    outputs = []
    for t in range(L):
        raw = x[:, t] @ p["input"]["kernel"] + p["input"]["bias"]
        i, f, g, o = np.split(raw + h @ p["recurrent_kernel"], 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


def min_gru(layer, p, x):
    z = sigmoid(x @ p["gate"]["kernel"] + p["gate"]["bias"])
    c = x @ p["candidate"]["kernel"] + p["candidate"]["bias"]
    h, states = np.zeros((B, H)), []
    for t in range(L):
        h = (1 - z[:, t]) * h + z[:, t] * c[:, t]
        states.append(h)
    return np.stack(states, 1)


TRANSCRIPTIONS = {
    "mamba": (mamba, dict(state_size=4)),
    "mamba2": (mamba2, dict(state_size=3, head_size=4, groups=2, dt_limit=(0.01, 0.5))),
    "rg_lru": (rg_lru, dict(width=12, heads=3)),
    "retention": (retention, dict(heads=2)),
    "lightning": (lightning, dict(heads=2)),
    "gla": (gla, dict(heads=2, rank=3)),
    "delta_net": (delta_net, dict(heads=2)),
    "gated_delta_net": (gated_delta_net, dict(heads=2)),
    "attention": (attention, dict(heads=4, kv_heads=2, rotary=0.5)),
    "attention, window": (attention, dict(heads=2, window=3)),
    "attention, bidirectional": (attention, dict(heads=2, bidirectional=True)),
    "lstm": (lstm, {}),
    "min_gru": (min_gru, {}),
}


def in_float64(layer, x):
    """Variables with every parameter random, and the layer's output."""
    variables = jax.jit(layer.init)({"params": jax.random.key(0)}, jnp.asarray(x))
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    leaves = [
        jnp.asarray(np.asarray(p, np.float64) + 0.1 * rng.normal(size=p.shape))
        for p in leaves
    ]
    variables = jax.tree.unflatten(structure, leaves)
    y, state = jax.jit(layer.apply)(variables, jnp.asarray(x))
    return variables, y, state


def unboxed(variables):
    params = jax.tree.map(
        lambda p: p.unbox() if hasattr(p, "unbox") else p,
        variables["params"],
        is_leaf=lambda p: hasattr(p, "unbox"),
    )
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("case", TRANSCRIPTIONS)
def test_layer_is_its_equations(case):
    transcription, fields = TRANSCRIPTIONS[case]
    x = np.random.default_rng(1).normal(size=(B, L, H))
    with jax.enable_x64(True):
        layer = LAYERS[case.split(",")[0]](H, **fields, dtype=jnp.float64)
        variables, y, state = in_float64(layer, x)
    assert y.dtype == np.float64
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {
        *("float64", "bool", "int32")
    }
    assert_close(y, transcription(layer, unboxed(variables), x), dtype="float64")


X = jax.random.normal(jax.random.key(2), (B, 20, H))


def mixed(layer, variables, x):
    """What the mixing itself gives, before gates, norms and projections."""
    apply = jax.jit(lambda v, x: layer.apply(v, x, mutable=["intermediates"]))
    return apply(variables, x)[1]["intermediates"]["mixed"][0]


def made(layer, x=X):
    """Variables without their sharding annotations."""
    return nn.unbox(jax.jit(layer.init)({"params": jax.random.key(0)}, x))


def test_mamba2_without_a_head_size_has_the_largest_that_fits():
    for features, groups, expected in ((48, 1, 48), (128, 1, 64), (48, 4, 24)):
        layer = LAYERS["mamba2"](features, groups=groups)
        _, heads, _, size = layer.init_state(1).ssm.shape
        assert size == expected and heads * size == 2 * features
        assert heads % groups == 0


def test_attention_pays_for_no_cache_that_is_empty():
    layer, x = LAYERS["attention"](H, heads=2, context=4096), X
    variables = made(layer)

    def memory(reset):
        run = jax.jit(lambda v, x: layer.apply(v, x, None, Sequence(reset=reset))[0])
        return run.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(jnp.zeros((B, 20), bool)) < memory(None) + 100_000


@pytest.mark.slow
def test_gated_delta_net_without_decay_is_delta_net():
    gated = LAYERS["gated_delta_net"](H, heads=2, expand_v=1.0)
    variables = made(gated)
    variables["params"]["A_log"] = jnp.full((2,), -jnp.inf)  # g = 0
    plain = LAYERS["delta_net"](H, heads=2)
    kept = {k: variables["params"][k] for k in made(plain)["params"]}
    assert_close(mixed(gated, variables, X), mixed(plain, {"params": kept}, X))


@pytest.mark.slow
def test_delta_rule_with_orthogonal_keys_only_adds():
    k = jnp.eye(8)[None, :, None]
    q, v = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 8))
    beta = jax.random.uniform(jax.random.key(1), (1, 8, 1))
    decay = -jax.random.uniform(jax.random.key(3), (1, 8, 1))
    corrected, _ = chunked_scan(q, k, v, decay, beta)
    added, _ = chunked_scan(q, k, beta[..., None] * v, decay)
    assert_close(corrected, added)


def test_mamba_with_constant_step_is_a_real_diagonal_system():
    """h = e^(Delta A) h + Delta B u where nothing depends on the input."""
    u = jax.random.normal(jax.random.key(0), (B, 20, 3))
    A = -jnp.arange(1.0, 5.0) * jnp.ones((3, 1))
    b, c = jax.random.normal(jax.random.key(1), (2, 4))
    B_, C_ = (jnp.broadcast_to(w, (B, 20, 4)) for w in (b, c))
    y, _ = selective_scan(u, jnp.full(u.shape, 0.1), A, B_, C_)
    system = recurrence.Diagonal(0.1 * A, 0.1 * b * jnp.ones_like(A), c)
    assert_close(y, recurrence.scan(system, u)[0])


@pytest.mark.slow
def test_mamba2_with_constant_step_is_lightning_attention():
    layer = LAYERS["mamba2"](H, 3, 8, dt_limit=(1.0, 1.0))
    variables = made(layer)
    variables["params"]["D"] *= 0
    projected = X @ variables["params"]["in"]["kernel"]
    w = variables["params"]["conv"]
    convolved, _ = short_conv(projected[..., 16:-2], w["kernel"], w["bias"])
    u, b, c = jnp.split(nn.silu(convolved), [16, 19], -1)
    decay = -jnp.exp(variables["params"]["A_log"])
    expected, _ = chunked_scan(
        c[:, :, None], b[:, :, None], u.reshape(B, 20, 2, 8), decay
    )
    assert_close(mixed(layer, variables, X), expected)


@pytest.mark.slow
def test_rg_lru_with_open_gates_is_a_normalised_diagonal_recurrence():
    layer = LAYERS["rg_lru"](H)
    variables = made(layer)
    p = variables["params"]
    p |= {name: p[name] * 0 for name in ("r_kernel", "i_kernel")}
    p["r_bias"], p["i_bias"] = jnp.full(H, 0.3), jnp.full(H, 50.0)  # i = 1
    p["conv"] = {"kernel": jnp.eye(1, 4).repeat(H, 0), "bias": jnp.zeros(H)}
    a = jnp.exp(-8 * nn.sigmoid(0.3) * nn.softplus(p["Lambda"]))
    u = X @ p["in"]["kernel"] + p["in"]["bias"]
    scale = jnp.sqrt(1 - a**2) * jnp.ones((20, 1))
    expected, _ = linear_scan(a, scale.at[0].set(1.0) * u)
    assert_close(mixed(layer, variables, X), expected)


@pytest.mark.slow
def test_retention_without_turning_is_linear_attention_with_fixed_decays():
    layer = LAYERS["retention"](H, heads=2, base=1e30)
    variables = made(layer)
    p = variables["params"]
    q, k, v = (
        (X @ p[name]["kernel"]).reshape(B, 20, 2, -1)
        for name in ("query", "key", "value")
    )
    # Only the first pair of channels turns at an endless base.
    still = jnp.ones(4).at[jnp.asarray([0, 2])].set(0.0)
    p["query"]["kernel"] *= jnp.tile(still, 2)
    gamma = jnp.log1p(-(2.0 ** -jnp.arange(5.0, 7.0)))
    expected, _ = chunked_scan(q * still, k / 2, v, gamma)
    assert_close(mixed(layer, variables, X), expected)


def test_a_mask_costs_retention_no_precision():
    with jax.enable_x64(True):
        layer = LAYERS["retention"](H, heads=2, dtype=jnp.float64)
        every = Sequence(mask=jnp.ones((B, L), bool))
        for sequence in (Sequence(), every):
            log_gamma = layer._log_decay(jnp.zeros((B, L, H)), sequence)
            exact = np.log1p(-(2.0 ** -np.array([5, 6])))
            np.testing.assert_allclose(log_gamma[0, 0], exact, rtol=1e-15)


def test_attention_with_a_window_as_long_as_the_call_is_full():
    full = LAYERS["attention"](H, heads=2, context=20)
    variables = made(full)
    for window in (20, 33):
        wide = LAYERS["attention"](H, heads=2, window=window)
        assert_close(mixed(wide, variables, X), mixed(full, variables, X))


def test_attention_forgets_what_lies_beyond_its_window():
    layer = LAYERS["attention"](H, heads=2, window=5)
    variables = made(layer)
    y, _ = layer.apply(variables, X)
    changed, _ = layer.apply(variables, X.at[:, 3].add(1.0))
    moved = np.flatnonzero(np.any(np.asarray(y != changed), (0, 2)))
    assert list(moved) == [3, 4, 5, 6, 7]


def test_slopes_of_heads_that_are_no_power_of_two():
    np.testing.assert_allclose(slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(slopes(6), expected)


BAD = {
    "mamba": [
        ("expand", 0, "expand: must be at least 1, got 0"),
        ("rank", -1, "rank: must be 0 or positive, got -1"),
    ],
    "mamba2": [
        ("head_size", 5, "head_size: must divide expand x features = 16, got 5"),
        ("groups", 3, "groups: must divide the number of heads"),
        ("dt_limit", (0.5, 0.1), "dt_limit: must be two numbers, 0 <= least"),
        ("dt_limit", (0.5,), "dt_limit: must be two numbers, 0 <= least"),
    ],
    "rg_lru": [
        ("heads", 3, "heads: must divide the width = 8, got 3"),
        ("a_max", 1.0, "a_min, a_max: must satisfy"),
        ("width", -4, "width: must be 0 or positive, got -4"),
    ],
    "retention": [
        ("heads", 3, "heads: must divide features x expand_k = 8, got 3"),
        ("heads", 8, "heads: 8 leave keys of 1 channels, which turn in pairs"),
        ("base", 0.0, "base: must be positive, got 0.0"),
    ],
    "lightning": [("slope_scale", -1.0, "slope_scale: must be 0 or positive, got -1")],
    "gla": [
        ("rank", 0, "rank: must be at least 1, got 0"),
        ("normaliser", 0.0, "normaliser: must be positive, got 0.0"),
    ],
    "delta_net": [
        ("expand_v", 0.1, "heads: must divide features x expand_v"),
        ("conv_width", 0, "conv_width: must be at least 1, got 0"),
    ],
    "attention": [
        ("heads", 3, "heads: must divide features = 8, got 3"),
        ("kv_heads", 3, "kv_heads: must divide heads = 4, got 3"),
        ("kv_heads", -2, "kv_heads: must be 0 or positive, got -2"),
        ("context", 19, "context: must be at least the 20 tokens of the call, got 19"),
        ("window", -1, "window: must be 0 or positive, got -1"),
        ("rotary", 2.0, r"rotary: must be in \[0, 1\], got 2.0"),
    ],
}


@pytest.mark.parametrize(
    ("layer", "field", "value", "message"),
    [(layer, *case) for layer, cases in BAD.items() for case in cases],
)
def test_a_field_that_cannot_be_is_named(layer, field, value, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(LAYERS[layer](H, **{field: value}).init, jax.random.key(0), X)


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        ("delta_net", {"conv_width": 0}, "conv_width: must be at least 1, got 0"),
        ("rg_lru", {"width": -4}, "width: must be 0 or positive, got -4"),
        ("retention", {"heads": 8}, "heads: 8 leave keys of 1 channels"),
        (
            "attention",
            {"bidirectional": True, "window": 3},
            "window: must be 0 with bidirectional=True",
        ),
    ],
)
def test_a_field_that_cannot_be_is_named_before_decoding_too(layer, fields, message):
    layer = LAYERS[layer](H, **fields)
    with pytest.raises(ValueError, match=message):
        if getattr(layer, "bidirectional", False):
            jax.eval_shape(layer.init, jax.random.key(0), X)
        layer.init_state(B)
