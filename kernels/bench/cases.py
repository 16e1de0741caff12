"""What is timed: every operation, beside the forms a reader would write in JAX."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels import (
    chunked_scan,
    contracted_scan,
    dplr_filter,
    fft_conv,
    linear_scan,
    selective_scan,
    short_conv,
    vandermonde,
    vandermonde_transpose,
)
from kernels.check.cases import OPERATIONS, normal


@dataclass
class Workload:
    """One row: `make(size, rng)` gives the arguments of every function in `forms`."""

    op: str
    name: str
    size: dict[str, int]
    small: dict[str, int]
    make: Callable
    forms: Callable  # size -> {name: function}; the first is the subject
    flops: Callable = lambda s: 0  # of the subject's matmuls

    def at_length(self, length: int, small: bool = False) -> dict[str, int]:
        """The size with the same number of entries at another length: fewer rows for a
        longer one, then fewer channels or heads."""
        size = dict(self.small if small else self.size)
        width = next(name for name in ("H", "D", "P") if name in size)
        entries = size["L"] * size.get("B", 1)
        if "B" in size:
            size["B"] = max(1, entries // length)
        if entries < length or "B" not in size:
            size[width] = max(1, size[width] * entries // length)
        return size | {"L": length}


# The plain forms, each the way a reader of the equation would write it in JAX.


def _combine(left, right):
    (a, x), (b, y) = left, right
    return a * b, b * x + y


def scan_by_associative_scan(a, x):
    """h [B, L, ...] of h[t] = a[t] h[t-1] + x[t]."""
    a = jnp.broadcast_to(a, x.shape)
    return jax.lax.associative_scan(_combine, (a, x), axis=1)[1]


def scan_by_lax_scan(a, x):
    """The same, one step after another."""

    def step(h, inputs):
        h = inputs[0] * h + inputs[1]
        return h, h

    a = jnp.broadcast_to(a, x.shape)
    steps = (a.swapaxes(0, 1), x.swapaxes(0, 1))
    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), steps)[1].swapaxes(0, 1)


def bank_of_states(scan):
    """The contracted scan with every state in memory."""

    def run(log_a, b, c, u, dt=None):
        x = b * u[..., None]
        if dt is None:
            a = jnp.exp(log_a)
        else:
            elapsed = dt[..., None, None]
            a = jnp.exp(elapsed * log_a)
            x = jnp.expm1(elapsed * log_a) / jnp.expm1(log_a) * x
        return jnp.sum(c * scan(a, x), -1).real

    return run


def selective_by_associative_scan(u, dt, A, B, C):
    """S6 with every state [B, L, D, N] in memory."""
    decay = jnp.exp(dt[..., None] * A)
    increment = (dt * u)[..., None] * B[:, :, None]
    return jnp.einsum("bldn,bln->bld", scan_by_associative_scan(decay, increment), C)


def selective_by_materialised_scan(u, dt, A, B, C):
    """Decays and inputs of all steps first, then a scan over them under checkpoint."""
    decay = jnp.exp(dt[..., None] * A)
    increment = (dt * u)[..., None] * B[:, :, None]

    @jax.checkpoint
    def contracted(decay, increment, C):
        def step(h, token):
            decay, increment, C = token
            h = decay * h + increment
            return h, jnp.sum(h * C[:, None], -1)

        tokens = [x.swapaxes(0, 1) for x in (decay, increment, C)]
        return jax.lax.scan(step, jnp.zeros_like(increment[:, 0]), tokens)[1]

    return contracted(decay, increment, C).swapaxes(0, 1)


def selective_by_lax_scan(u, dt, A, B, C):
    """One step after another; states are made again for the gradient."""

    @jax.checkpoint
    def step(h, token):
        u, dt, B, C = token
        h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], -1)

    tokens = [x.swapaxes(0, 1) for x in (u, dt, B, C)]
    start = jnp.zeros((u.shape[0], *A.shape))
    return jax.lax.scan(step, start, tokens)[1].swapaxes(0, 1)


def selective_forms(s):
    return {
        "selective_scan": lambda *args: selective_scan(*args)[0],
        "associative_scan": selective_by_associative_scan,
        "checkpointed lax.scan, inputs materialised": selective_by_materialised_scan,
        "checkpointed lax.scan": selective_by_lax_scan,
    }


def chunked_by_lax_scan(checkpoint):
    """One token after another; `checkpoint` keeps the states only."""

    def run(q, k, v, g, beta=None):
        def step(S, token):
            q, k, v, g, beta = token
            S = jnp.exp(g)[..., None, None] * S
            if beta is not None:
                v = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, S))
            S = S + k[..., None] * v[..., None, :]
            return S, jnp.einsum("bhk,bhkv->bhv", q, S)

        if checkpoint:
            step = jax.checkpoint(step, prevent_cse=False)
        tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g, beta))
        start = jnp.zeros((*k[:, 0].shape, v.shape[-1]))
        return jax.lax.scan(step, start, tokens)[1].swapaxes(0, 1)

    return run


def chunked_forms(s):
    return {
        "chunked_scan": lambda *args: chunked_scan(*args)[0],
        "lax.scan": chunked_by_lax_scan(False),
        "checkpointed lax.scan": chunked_by_lax_scan(True),
    }


def filter_by_table(length):
    """Filters [..., H, L] by a table [H, N, L] of all powers."""

    def run(c, log_z):
        table = jnp.exp(log_z[..., None] * jnp.arange(length))
        return jnp.einsum("...hn,hnl->...hl", c, table).real

    return run


def filter_by_taps(length):
    """Every tap a sum over modes, mapped over taps: the usual form in JAX."""

    def run(c, log_z):
        def tap(l):
            return jnp.sum(c * jnp.exp(l * log_z), -1).real

        return jax.vmap(tap, out_axes=-1)(jnp.arange(length))

    return run


def dplr_filter_by_table(length):
    """The generating function at the roots of unity over all N modes, each Cauchy sum
    with its [H, N, L] table (https://arxiv.org/abs/2111.00396)."""

    def run(c, b, p, lam, log_dt):
        dt = jnp.exp(log_dt)
        roots = jnp.exp(-2j * jnp.pi * jnp.arange(length) / length)
        c, b, p, lam = (
            jnp.concatenate([x, x.conj()], -1)[..., None] for x in (c, b, p, lam)
        )
        points = (2 / dt) * (1 - roots) / (1 + roots)

        def g(u, v):
            return jnp.sum(u * v / (points[:, None] - lam), 1)

        inner = g(c, p) / (1 + g(p.conj(), p)) * g(p.conj(), b)
        return jnp.fft.ifft(2 / (1 + roots) * (g(c, b) - inner), length).real

    return run


def dplr_filter_of_pairs(length):
    """`dplr_filter` of the arguments that `make_dplr` gives."""

    def run(c, b, p, lam, log_dt):
        dt = jnp.exp(log_dt)
        scaled = c[None], dt * b, jnp.sqrt(dt) * p[None], dt * lam
        return dplr_filter(*scaled, length)[0]

    return run


def moments_by_table(u, log_z):
    """The moments [B, H, N] by a table [H, N, L] of all powers."""
    table = jnp.exp(log_z[..., None] * jnp.arange(u.shape[-1]))
    return jnp.einsum("bhl,hnl->bhn", u.astype(table.dtype), table)


def convolution_per_head(u, k):
    """A causal convolution as one FFT per row and channel."""

    def one(u, k):
        size = 2 * u.shape[0]
        product = jnp.fft.rfft(u, size) * jnp.fft.rfft(k, size)
        return jnp.fft.irfft(product, size)[: u.shape[0]]

    return jax.vmap(jax.vmap(one, (1, 0), 1), (0, None))(u, k)


def depthwise_by_lax_conv(u, w):
    """XLA's own convolution, of w [H, W] with lag 0 first."""
    return jax.lax.conv_general_dilated(
        u,
        w[:, ::-1].T[:, None],
        (1,),
        [(w.shape[1] - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=u.shape[2],
    )


# Inputs.


def inputs_of(operation: str, variant: str, **sizes: int | str) -> Callable:
    """`make` of a `Workload`: the arrays with which `kernels.check` tries this variant,
    in float32 and without initial state and resets.

    Args:
        operation, variant: of `kernels.check.cases.OPERATIONS`.
        sizes: those that the case does not say: numbers, or names of sizes like them.
    """

    def make(size, rng):
        size = {name: size.get(like, like) for name, like in sizes.items()} | size
        arrays = OPERATIONS[operation].make(rng, variant, size["L"], size)
        optional = ("initial_state", "reset")
        return [_narrow(x) for name, x in arrays.items() if name not in optional]

    return make


def _narrow(x):
    return x.astype(np.complex64 if np.iscomplexobj(x) else np.float32)


def make_dplr(s, rng):
    """c, b, p [H, N / 2] and lam like those of HiPPO-LegS, log dt [H, 1]."""
    n = s["N"] // 2
    c, b, p = (_narrow(normal(rng, s["H"], n, kind="c")) for _ in range(3))
    imaginary = s["N"] ** 2 / np.pi / (2 * np.arange(n) + 1)
    lam = np.tile(-0.5 - 1j * imaginary, (s["H"], 1))
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), (s["H"], 1))
    return c, b, p, _narrow(lam), _narrow(log_dt)


def resets(u):
    """Before one token of a hundred; from the input, or the compiler would do what
    depends on them alone."""
    return u[..., 0] > 2.33


WORKLOADS = [
    Workload(
        "linear_scan",
        "time-varying, real",
        {"B": 8, "L": 4096, "D": 256},
        {"B": 2, "L": 512, "D": 64},
        inputs_of("linear_scan", "real"),
        lambda s: {
            "linear_scan": lambda a, x: linear_scan(a, x)[0],
            "associative_scan": scan_by_associative_scan,
            "lax.scan": scan_by_lax_scan,
        },
    ),
    Workload(
        "linear_scan",
        "constant, complex",
        {"B": 8, "L": 4096, "P": 64},
        {"B": 2, "L": 512, "P": 16},
        inputs_of("linear_scan", "constant a", D="P"),
        lambda s: {
            "linear_scan": lambda a, x: linear_scan(a, x)[0],
            "associative_scan": scan_by_associative_scan,
            "lax.scan": scan_by_lax_scan,
        },
    ),
    Workload(
        "contracted_scan",
        "constant decay",
        {"B": 2, "L": 4096, "H": 64, "N": 32},
        {"B": 1, "L": 512, "H": 8, "N": 16},
        inputs_of("contracted_scan", "complex"),
        lambda s: {
            "contracted_scan": lambda *args: contracted_scan(*args)[0],
            "states, associative_scan": bank_of_states(scan_by_associative_scan),
            "states, lax.scan": bank_of_states(scan_by_lax_scan),
        },
        flops=lambda s: 2 * s["B"] * s["L"] * s["H"] * 3 * 2 * s["N"],
    ),
    Workload(
        "contracted_scan",
        "with dt",
        {"B": 2, "L": 2048, "H": 64, "N": 32},
        {"B": 1, "L": 256, "H": 8, "N": 16},
        inputs_of("contracted_scan", "complex, dt"),
        lambda s: {
            "contracted_scan": lambda *args: contracted_scan(*args)[0],
            "states, associative_scan": bank_of_states(scan_by_associative_scan),
            "states, lax.scan": bank_of_states(scan_by_lax_scan),
        },
    ),
    Workload(
        "selective_scan",
        "Mamba",
        {"B": 4, "L": 1024, "D": 256, "N": 16},
        {"B": 1, "L": 256, "D": 16, "N": 8},
        inputs_of("selective_scan", "no skip"),
        selective_forms,
    ),
    Workload(
        "selective_scan",
        "Mamba, long",
        {"B": 2, "L": 4096, "D": 256, "N": 16},
        {"B": 1, "L": 512, "D": 16, "N": 8},
        inputs_of("selective_scan", "no skip"),
        selective_forms,
    ),
    Workload(
        "chunked_scan",
        "scalar decay",
        {"B": 4, "L": 1024, "H": 4, "K": 64},
        {"B": 1, "L": 256, "H": 2, "K": 16},
        inputs_of("chunked_scan", "scalar decay", G="H", V="K"),
        chunked_forms,
        # the least there is to do, by steps: a product into the state and one out
        flops=lambda s: 4 * s["B"] * s["L"] * s["H"] * s["K"] ** 2,
    ),
    Workload(
        "chunked_scan",
        "gated delta rule",
        {"B": 4, "L": 1024, "H": 4, "K": 64},
        {"B": 1, "L": 256, "H": 2, "K": 16},
        inputs_of("chunked_scan", "delta rule, scalar decay", G="H", V="K"),
        chunked_forms,
        flops=lambda s: 6 * s["B"] * s["L"] * s["H"] * s["K"] ** 2,
    ),
    Workload(
        "cauchy",
        "S4 filter, rank 1",
        {"H": 128, "N": 64, "L": 16384},
        {"H": 16, "N": 16, "L": 1024},
        make_dplr,
        lambda s: {
            "dplr_filter": dplr_filter_of_pairs(s["L"]),
            "(N, L) tables": dplr_filter_by_table(s["L"]),
        },
        flops=lambda s: 2 * s["H"] * 4 * s["N"] * s["L"],
    ),
    Workload(
        "vandermonde",
        "S4D filter",
        {"H": 128, "N": 64, "L": 16384},
        {"H": 16, "N": 16, "L": 1024},
        inputs_of("vandermonde", "complex", R=1),
        lambda s: {
            "vandermonde": lambda c, z: vandermonde(c, z, s["L"]),
            "(N, L) table": filter_by_table(s["L"]),
        },
        flops=lambda s: 4 * s["H"] * s["N"] * s["L"],
    ),
    Workload(
        "vandermonde_transpose",
        "final state",
        {"B": 4, "H": 64, "N": 32, "L": 8192},
        {"B": 2, "H": 8, "N": 16, "L": 512},
        inputs_of("vandermonde_transpose", "complex"),
        lambda s: {
            "vandermonde_transpose": vandermonde_transpose,
            "(N, L) table": moments_by_table,
        },
        flops=lambda s: 4 * s["B"] * s["H"] * s["N"] * s["L"],
    ),
    Workload(
        "fft_conv",
        "causal",
        {"B": 8, "H": 128, "L": 4096},
        {"B": 2, "H": 16, "L": 512},
        inputs_of("fft_conv", "no gates", K="L"),
        lambda s: {
            "fft_conv": lambda u, k: fft_conv(u, k)[0],
            "per-head FFT": convolution_per_head,
            "Monarch": lambda u, k: fft_conv(u, k, backend="monarch")[0],
        },
    ),
    Workload(
        "fft_conv",
        "256 taps",
        {"B": 1, "H": 16, "L": 262144, "K": 256},
        {"B": 1, "H": 4, "L": 4096, "K": 64},
        inputs_of("fft_conv", "no gates"),
        lambda s: {
            "fft_conv": lambda u, k: fft_conv(u, k)[0],
            "one FFT": lambda u, k: fft_conv(u, k, backend="xla")[0],
        },
    ),
    Workload(
        "fft_conv",
        "resets",
        {"B": 4, "H": 64, "L": 16384},
        {"B": 2, "H": 8, "L": 256},
        inputs_of("fft_conv", "no gates", K="L"),
        lambda s: {
            "fft_conv": lambda u, k: fft_conv(u, k, reset=resets(u))[0],
            "without resets": lambda u, k: fft_conv(u, k)[0],
        },
    ),
    Workload(
        "short_conv",
        "width 4",
        {"B": 8, "H": 256, "L": 4096, "W": 4},
        {"B": 2, "H": 32, "L": 512, "W": 4},
        inputs_of("short_conv", "no bias"),
        lambda s: {
            "short_conv": lambda u, w: short_conv(u, w)[0],
            "lax.conv": depthwise_by_lax_conv,
        },
    ),
]
