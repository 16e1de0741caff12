"""python -m kernels.bench: speed and memory beside plain forms and floors, on this
device.

Every row is one operation at one size in float32. The subject and its baselines are
compiled, then called in turn, repeat after repeat, so that a busy machine slows all of
them alike; the table gives ratios of medians. Floors (copy bandwidth, matmul rate) are
measured in the same run. Peak temporary memory is XLA's own count for the compiled
function.

    python -m kernels.bench [--op NAME] [--out FILE.json] [--repeats N] [--small]

On Linux the C library gives large buffers back after every call, and each new one costs
page faults. Started with MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=34359738368 it keeps them, which speeds everything up, the plain
forms most.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

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


@dataclass
class Case:
    """One row: `make(size, rng)` gives the arguments of every function in `forms`."""

    op: str
    name: str
    size: dict[str, int]
    small: dict[str, int]
    make: Callable
    forms: Callable  # size -> {name: function}; the first is the subject
    flops: Callable = lambda s: 0  # of the subject's matmuls


# The plain forms, each the way a reader of the equation would write it in JAX.


def _combine(left, right):
    (a, x), (b, y) = left, right
    return a * b, b * x + y


def scan_by_associative_scan(a, x):
    a = jnp.broadcast_to(a, x.shape)
    return jax.lax.associative_scan(_combine, (a, x), axis=1)[1]


def scan_by_lax_scan(a, x):
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
    decay = jnp.exp(dt[..., None] * A)
    given = (dt * u)[..., None] * B[:, :, None]
    return jnp.einsum("bldn,bln->bld", scan_by_associative_scan(decay, given), C)


def selective_by_materialised_scan(u, dt, A, B, C):
    """Decays and inputs of all steps first, then a scan over them under checkpoint."""
    decay = jnp.exp(dt[..., None] * A)
    given = (dt * u)[..., None] * B[:, :, None]

    @jax.checkpoint
    def contracted(decay, given, C):
        def step(h, token):
            decay, given, C = token
            h = decay * h + given
            return h, jnp.sum(h * C[:, None], -1)

        tokens = [x.swapaxes(0, 1) for x in (decay, given, C)]
        return jax.lax.scan(step, jnp.zeros_like(given[:, 0]), tokens)[1]

    return contracted(decay, given, C).swapaxes(0, 1)


def selective_by_lax_scan(u, dt, A, B, C):
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
    def run(c, log_z):
        table = jnp.exp(log_z[..., None] * jnp.arange(length))
        return jnp.einsum("hn,hnl->hl", c, table).real

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
    def run(c, b, p, lam, log_dt):
        dt = jnp.exp(log_dt)
        scaled = c[None], dt * b, jnp.sqrt(dt) * p[None], dt * lam
        return dplr_filter(*scaled, length)[0]

    return run


def moments_by_table(u, log_z):
    table = jnp.exp(log_z[..., None] * jnp.arange(u.shape[-1]))
    return jnp.einsum("bhl,hnl->bhn", u.astype(table.dtype), table)


def convolution_per_head(u, k):
    def one(u, k):
        size = 2 * u.shape[0]
        product = jnp.fft.rfft(u, size) * jnp.fft.rfft(k, size)
        return jnp.fft.irfft(product, size)[: u.shape[0]]

    return jax.vmap(jax.vmap(one, (1, 0), 1), (0, None))(u, k)


def convolution_by_toeplitz(u, k, reset=None):
    length = u.shape[1]
    lag = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    matrix = jnp.where(lag >= 0, k[:, jnp.maximum(lag, 0)], 0)
    if reset is None:
        return jnp.einsum("hts,bsh->bth", matrix, u)
    segment = jnp.cumsum(reset, 1)
    same = (segment[:, :, None] == segment[:, None, :]).astype(u.dtype)
    return jnp.einsum("bts,hts,bsh->bth", same, matrix, u)


def depthwise_by_lax_conv(u, w):
    return jax.lax.conv_general_dilated(
        u,
        w[:, ::-1].T[:, None],
        (1,),
        [(w.shape[1] - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=u.shape[2],
    )


# Inputs.


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _complex(rng, *shape):
    return (_normal(rng, *shape) + 1j * _normal(rng, *shape)).astype(np.complex64)


def _rates(rng, heads, modes):
    """Logarithms of S4D-like eigenvalues: slow decay, frequencies up to Nyquist."""
    size = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (heads, 1)))
    rates = size * (-0.5 + 1j * np.pi * np.arange(modes))
    return rates.astype(np.complex64)


def make_scan(s, rng):
    shape = s["B"], s["L"], s["D"]
    return rng.uniform(0.8, 1, shape).astype(np.float32), _normal(rng, *shape)


def make_constant_scan(s, rng):
    shape = s["B"], s["L"], s["P"]
    return np.exp(_rates(rng, 1, s["P"])[0]), _complex(rng, *shape)


def make_bank(s, rng):
    log_a = _rates(rng, s["H"], s["N"])
    b, c = _complex(rng, s["H"], s["N"]), _complex(rng, s["H"], s["N"])
    return log_a, b, c, _normal(rng, s["B"], s["L"], s["H"])


def make_timed_bank(s, rng):
    dt = rng.uniform(0, 2, (s["B"], s["L"])).astype(np.float32)
    return *make_bank(s, rng), dt


def make_selective(s, rng):
    tokens = s["B"], s["L"]
    dt = rng.uniform(1e-3, 1e-1, (*tokens, s["D"])).astype(np.float32)
    A = -np.tile(np.arange(1, s["N"] + 1, dtype=np.float32), (s["D"], 1))
    weights = (_normal(rng, *tokens, s["N"]) for _ in range(2))
    return _normal(rng, *tokens, s["D"]), dt, A, *weights


def make_scalar_chunks(s, rng):
    """q, k (of length 1), v and log decays."""
    tokens = s["B"], s["L"], s["H"]
    q, k, v = (_normal(rng, *tokens, s["K"]) for _ in range(3))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, -rng.uniform(0, 0.2, tokens).astype(np.float32)


def make_delta_chunks(s, rng):
    beta = rng.uniform(0, 1, (s["B"], s["L"], s["H"])).astype(np.float32)
    return *make_scalar_chunks(s, rng), beta


def make_filter(s, rng):
    return _complex(rng, s["H"], s["N"]), _rates(rng, s["H"], s["N"])


def make_dplr(s, rng):
    """c, b, p [H, N / 2] and lam like those of HiPPO-LegS, log dt [H, 1]."""
    n = s["N"] // 2
    c, b, p = (_complex(rng, s["H"], n) for _ in range(3))
    imaginary = s["N"] ** 2 / np.pi / (2 * np.arange(n) + 1)
    lam = np.tile(-0.5 - 1j * imaginary, (s["H"], 1)).astype(np.complex64)
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), (s["H"], 1)).astype(np.float32)
    return c, b, p, lam, log_dt


def make_moments(s, rng):
    return _normal(rng, s["B"], s["H"], s["L"]), _rates(rng, s["H"], s["N"])


def make_convolution(s, rng):
    return _normal(rng, s["B"], s["L"], s["H"]), _normal(rng, s["H"], s["L"])


def make_short(s, rng):
    return _normal(rng, s["B"], s["L"], s["H"]), _normal(rng, s["H"], s["W"])


def _resets(s):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.uniform(size=(s["B"], s["L"])) < 0.01)


CASES = [
    Case(
        "linear_scan",
        "time-varying, real",
        {"B": 8, "L": 4096, "D": 256},
        {"B": 2, "L": 512, "D": 64},
        make_scan,
        lambda s: {
            "linear_scan": lambda a, x: linear_scan(a, x)[0],
            "associative_scan": scan_by_associative_scan,
            "lax.scan": scan_by_lax_scan,
        },
    ),
    Case(
        "linear_scan",
        "constant, complex",
        {"B": 8, "L": 4096, "P": 64},
        {"B": 2, "L": 512, "P": 16},
        make_constant_scan,
        lambda s: {
            "linear_scan": lambda a, x: linear_scan(a, x)[0],
            "associative_scan": scan_by_associative_scan,
            "lax.scan": scan_by_lax_scan,
        },
    ),
    Case(
        "contracted_scan",
        "constant decay",
        {"B": 2, "L": 4096, "H": 64, "N": 32},
        {"B": 1, "L": 512, "H": 8, "N": 16},
        make_bank,
        lambda s: {
            "contracted_scan": lambda *args: contracted_scan(*args)[0],
            "states, associative_scan": bank_of_states(scan_by_associative_scan),
            "states, lax.scan": bank_of_states(scan_by_lax_scan),
        },
        flops=lambda s: 2 * s["B"] * s["L"] * s["H"] * 3 * 2 * s["N"],
    ),
    Case(
        "contracted_scan",
        "with dt",
        {"B": 2, "L": 2048, "H": 64, "N": 32},
        {"B": 1, "L": 256, "H": 8, "N": 16},
        make_timed_bank,
        lambda s: {
            "contracted_scan": lambda *args: contracted_scan(*args)[0],
            "states, associative_scan": bank_of_states(scan_by_associative_scan),
            "states, lax.scan": bank_of_states(scan_by_lax_scan),
        },
    ),
    Case(
        "selective_scan",
        "Mamba",
        {"B": 4, "L": 1024, "D": 256, "N": 16},
        {"B": 1, "L": 256, "D": 16, "N": 8},
        make_selective,
        selective_forms,
    ),
    Case(
        "selective_scan",
        "Mamba, long",
        {"B": 2, "L": 4096, "D": 256, "N": 16},
        {"B": 1, "L": 512, "D": 16, "N": 8},
        make_selective,
        selective_forms,
    ),
    Case(
        "chunked_scan",
        "scalar decay",
        {"B": 4, "L": 1024, "H": 4, "K": 64},
        {"B": 1, "L": 256, "H": 2, "K": 16},
        make_scalar_chunks,
        chunked_forms,
        # the least there is to do, by steps: a product into the state and one out
        flops=lambda s: 4 * s["B"] * s["L"] * s["H"] * s["K"] ** 2,
    ),
    Case(
        "chunked_scan",
        "gated delta rule",
        {"B": 4, "L": 1024, "H": 4, "K": 64},
        {"B": 1, "L": 256, "H": 2, "K": 16},
        make_delta_chunks,
        chunked_forms,
        flops=lambda s: 6 * s["B"] * s["L"] * s["H"] * s["K"] ** 2,
    ),
    Case(
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
    Case(
        "vandermonde",
        "S4D filter",
        {"H": 128, "N": 64, "L": 16384},
        {"H": 16, "N": 16, "L": 1024},
        make_filter,
        lambda s: {
            "vandermonde": lambda c, z: vandermonde(c, z, s["L"]),
            "(N, L) table": filter_by_table(s["L"]),
        },
        flops=lambda s: 4 * s["H"] * s["N"] * s["L"],
    ),
    Case(
        "vandermonde_transpose",
        "final state",
        {"B": 4, "H": 64, "N": 32, "L": 8192},
        {"B": 2, "H": 8, "N": 16, "L": 512},
        make_moments,
        lambda s: {
            "vandermonde_transpose": vandermonde_transpose,
            "(N, L) table": moments_by_table,
        },
        flops=lambda s: 4 * s["B"] * s["H"] * s["N"] * s["L"],
    ),
    Case(
        "fft_conv",
        "causal",
        {"B": 8, "H": 128, "L": 4096},
        {"B": 2, "H": 16, "L": 512},
        make_convolution,
        lambda s: {
            "fft_conv": lambda u, k: fft_conv(u, k)[0],
            "per-head FFT": convolution_per_head,
        },
    ),
    Case(
        "fft_conv",
        "causal, resets",
        {"B": 4, "H": 32, "L": 1024},
        {"B": 2, "H": 8, "L": 256},
        make_convolution,
        lambda s: {
            "fft_conv": lambda u, k: fft_conv(u, k, reset=_resets(s))[0],
            "masked Toeplitz": lambda u, k: convolution_by_toeplitz(u, k, _resets(s)),
        },
    ),
    Case(
        "short_conv",
        "width 4",
        {"B": 8, "H": 256, "L": 4096, "W": 4},
        {"B": 2, "H": 32, "L": 512, "W": 4},
        make_short,
        lambda s: {
            "short_conv": lambda u, w: short_conv(u, w)[0],
            "lax.conv": depthwise_by_lax_conv,
        },
    ),
]


def with_gradients(function):
    """The result and the gradient by every argument, for a cotangent given as input."""

    def run(cotangent, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(cotangent)

    return run


def compile_function(function, arguments):
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return compiled, seconds, compiled.memory_analysis().temp_size_in_bytes


def measure(functions: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of every function, called in turn `repeats` times after one warm-up."""
    times = {name: [] for name in functions}
    for _, (function, arguments) in functions.items():
        jax.block_until_ready(function(*arguments))
    for _ in range(repeats):
        for name, (function, arguments) in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(time.perf_counter() - start)
    return times


def summary(times):
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"median_s": middle, "quartiles_s": [low, high]}


def floors(small: bool) -> dict[str, float]:
    """Copy bandwidth in B/s and float32 matmul rate in FLOP/s of this device."""
    size = (16 if small else 64) * 2**20
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    side = 1024 if small else 2048
    square = jnp.ones((side, side), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    copies, products = [], []
    x = copy(x)
    jax.block_until_ready(matmul(square, square))
    for _ in range(7):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(matmul(square, square))
        products.append(time.perf_counter() - start)
    return {
        "copy_bytes_per_s": 2 * size / float(np.median(copies)),
        "matmul_flop_per_s": 2 * side**3 / float(np.median(products)),
    }


def run_case(case: Case, small: bool, repeats: int, floor: dict) -> list[dict]:
    size = case.small if small else case.size
    arguments = jax.device_put(case.make(size, np.random.default_rng(0)))
    forms = case.forms(size)
    result = jax.eval_shape(next(iter(forms.values())), *arguments)
    cotangent = jnp.ones(result.shape, result.dtype)
    moved = sum(x.nbytes for x in arguments) + cotangent.nbytes
    least = max(
        moved / floor["copy_bytes_per_s"],
        case.flops(size) / floor["matmul_flop_per_s"],
    )
    rows = []
    for kind in ("forward", "forward+backward"):
        functions, made = {}, {}
        for name, form in forms.items():
            both = kind == "forward+backward"
            inputs = (cotangent, *arguments) if both else tuple(arguments)
            compiled, seconds, temporary = compile_function(
                with_gradients(form) if both else form, inputs
            )
            functions[name] = (compiled, inputs)
            made[name] = {"compile_s": seconds, "temporary_bytes": temporary}
        for name, times in measure(functions, repeats).items():
            made[name] |= summary(times)
            rows.append(
                {
                    "op": case.op,
                    "case": case.name,
                    "size": size,
                    "kind": kind,
                    "form": name,
                    "subject": name == next(iter(forms)),
                    "floor_s": least * (3 if kind == "forward+backward" else 1),
                    **made[name],
                }
            )
    return rows


def compile_times(case: Case, small: bool) -> dict[str, float]:
    """Seconds to compile forward+backward at L and at 4 L: the program is one size."""
    base = dict(case.small if small else case.size)
    seconds = {}
    for factor in (1, 4):
        size = base | {"L": base["L"] // 4 * factor}
        arguments = jax.eval_shape(
            lambda size=size: jax.tree.map(
                jnp.asarray, case.make(size, np.random.default_rng(0))
            )
        )
        form = next(iter(case.forms(size).values()))
        result = jax.eval_shape(form, *arguments)
        _, seconds[f"L={size['L']}"], _ = compile_function(
            with_gradients(form), (result, *arguments)
        )
    return seconds


def table(rows: list[dict]) -> Table:
    shown = Table(
        title="subject, and how many times slower and larger the plain forms are"
    )
    for name in ("operation", "size", "pass", "form", "ms (quartiles)", "time ratio",
                 "temp MB", "temp ratio", "x floor"):  # fmt: skip
        shown.add_column(name, no_wrap=name != "operation")
    subject = None
    for row in rows:
        if row["subject"]:
            subject = row
            shown.add_section()
        low, high = row["quartiles_s"]
        size = " ".join(f"{k}{v}" for k, v in row["size"].items())
        memory = row["temporary_bytes"]
        shown.add_row(
            f"{row['op']}: {row['case']}" if row["subject"] else "",
            size if row["subject"] else "",
            row["kind"],
            row["form"],
            f"{1e3 * row['median_s']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
            f"{row['median_s'] / subject['median_s']:.2f}",
            f"{memory / 1e6:.1f}",
            f"{memory / max(subject['temporary_bytes'], 1):.1f}",
            f"{row['median_s'] / row['floor_s']:.1f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    ops = sorted({case.op for case in CASES})
    parser.add_argument("--op", choices=ops, help="only this operation")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="small sizes, seconds")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be >= 1")
    console = Console()
    if not console.is_terminal:
        console.width = 160
    floor = floors(options.small)
    console.print(
        f"{jax.devices()[0].device_kind} ({jax.default_backend()}), "
        f"jax {jax.__version__}; copy {floor['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matmul {floor['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s"
    )
    rows, compiled = [], {}
    for case in CASES:
        if options.op in (None, case.op):
            rows += run_case(case, options.small, options.repeats, floor)
            compiled[f"{case.op}: {case.name}"] = compile_times(case, options.small)
    console.print(table(rows))
    for name, seconds in compiled.items():
        listed = ", ".join(f"{length}: {s:.2f} s" for length, s in seconds.items())
        console.print(f"compile forward+backward, {name}: {listed}")
    if options.out:
        options.out.write_text(json.dumps(report(rows, compiled, floor), indent=1))


def environment():
    """What figures depend on: the device, versions and the allocator setting."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


def report(rows, compiled, floor):
    return environment() | {"floors": floor, "rows": rows, "compile_s": compiled}


if __name__ == "__main__":
    main()
