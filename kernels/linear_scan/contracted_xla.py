"""The contracted scan in chunks: matmuls where the decay is constant, else a loop.

Constant decay: inside a chunk of T tokens the system is a T x T Toeplitz filter, its
state enters and leaves through [T, N] tables of powers, and only the states at the
chunk boundaries are scanned. Three real matmuls per chunk; JAX differentiates them.
They are of full precision, so that all modes of a system agree on every device.

With dt or resets the steps differ: a chunk's states are made by the linear scan,
contracted and forgotten. Only the states at chunk boundaries are kept; the backward
pass makes a chunk's states again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pairs
from kernels.linear_scan import gradient, hold, xla

GROUP = 32  # chunks that share one rounded decay where the decay is constant
CHUNK = 32  # steps whose states exist at once where they cannot be matmuls


def unsupported(*arguments) -> str | None:
    return None


def contracted_scan(log_a, b, c, u, dt, initial_state, into):
    """y and the final state; log_a, b, c and initial_state have one dtype."""
    if dt is None and into is None:
        system = (pairs.split(array) for array in (log_a, b, c))
        return _matmuls(*system, u, initial_state)
    if dt is not None:
        # w = [dt phi(dt log_a)] / phi(log_a): the second factor is constant
        b = b / hold.phi(log_a)
    keep = None if into is None else ~into
    return _steps(log_a, b, c, u, dt, keep, initial_state)


def _matmuls(log_a, b, c, u, state):
    length = u.shape[1]
    size = _chunk(length, len(b) * b[0].shape[-1])
    split = length // size * size
    outputs = []
    if split:
        y, state = _matmul_chunks(log_a, b, c, u[:, :split], state, size)
        outputs.append(y)
    if split < length:
        y, state = _matmul_chunks(log_a, b, c, u[:, split:], state, length - split)
        outputs.append(y)
    return _joined(outputs), state


def _chunk(length, modes):
    """Work per token grows with the chunk, states with its inverse: near 2N. A power of
    two, by which a phase is scaled without rounding."""
    return min(length, max(32, min(128, 1 << (modes.bit_length() - 1))))


@jax.default_matmul_precision("highest")
def _matmul_chunks(log_a, b, c, u, state, size):
    batch, length, channels = u.shape
    chunks = length // size
    dtype = b[0].dtype
    table = pairs.powers(log_a, size + 1)  # [H, N, T + 1]
    parts = len(table)

    def column(p):
        return tuple(part[..., None] for part in p)

    into = pairs.mul(tuple(part[..., :size] for part in table), column(b))
    out = pairs.mul(tuple(part[..., 1:] for part in table), column(c))
    lags = _real_sum(into, c)  # [H, T]
    lag = jnp.arange(size)[None, :] - jnp.arange(size)[:, None]
    toeplitz = jnp.where(lag >= 0, lags[:, jnp.maximum(lag, 0)], 0)  # [H, from, to]

    inputs = (
        u.astype(dtype).reshape(batch, chunks, size, channels).transpose(3, 1, 0, 2)
    )
    driven = jnp.einsum("hcbt,hnt->hcbn", inputs, jnp.concatenate(into, 1)[..., ::-1])
    driven = pairs.join(tuple(jnp.split(driven, parts, -1)))
    before, last = _at_boundaries(log_a, size, driven, state.swapaxes(0, 1))
    y = jnp.einsum(
        "hcbk,hkt->hcbt",
        jnp.concatenate([inputs, *pairs.split(before)], -1),
        jnp.concatenate([toeplitz, *pairs.conj(out)], 1),
    )
    y = y.transpose(2, 1, 3, 0).reshape(batch, length, channels)
    return y.astype(u.dtype), last.swapaxes(0, 1)


def _at_boundaries(log_a, size, driven, entering):
    """The states before each of C chunks of `size` steps, [H, C, B, N], and the last.

    driven: [H, C, B, N], what each chunk adds to its final state.
    entering: [H, B, N].

    A decay that was rounded once and is applied C times is C roundings off. So runs of
    GROUP chunks are solved from 0, and one scan over runs, whose decay is made afresh
    from log_a, gives the states between them.
    """
    channels, chunks, *rest = driven.shape
    if chunks <= 2 * GROUP:
        decay = pairs.join(pairs.power(log_a, size))[:, None, None]
        after, last = gradient.solve(xla, False, decay, driven, entering, None)
        return jnp.concatenate([entering[:, None], after[:, :-1]], 1), last
    groups = chunks // GROUP
    runs = driven[:, : groups * GROUP].reshape(channels * groups, GROUP, *rest)
    rates = tuple(jnp.repeat(part, groups, 0) for part in log_a)
    states, increments = _at_boundaries(rates, size, runs, jnp.zeros_like(runs[:, 0]))
    increments = increments.reshape(channels, groups, *rest)
    between, last = _at_boundaries(log_a, size * GROUP, increments, entering)
    table = pairs.powers(pairs.scale(log_a, float(size)), GROUP)  # [H, N, GROUP]
    decay = pairs.join(table).swapaxes(1, 2)[:, None, :, None]
    states = states.reshape(channels, groups, GROUP, *rest)
    states += decay * between[:, :, None]
    states = states.reshape(channels, groups * GROUP, *rest)
    if groups * GROUP == chunks:
        return states, last
    after, last = _at_boundaries(log_a, size, driven[:, groups * GROUP :], last)
    return jnp.concatenate([states, after], 1), last


def _real_sum(table, c):
    """Re sum_n c[h, n] table[h, n, t]."""
    stacked = jnp.concatenate(pairs.conj(c), -1)
    return jnp.einsum("hn,hnt->ht", stacked, jnp.concatenate(table, 1))


def _steps(log_a, b, c, u, dt, keep, state):
    """Chunks of CHUNK steps, and a last one for what is left."""

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(system, state, inputs):
        return _chunk_states(*system, state, *inputs)

    def one(state, inputs):
        return chunk(system, state, inputs)

    system = (log_a, b, c)
    batch, length, channels = u.shape
    split = length // CHUNK * CHUNK
    outputs = []
    if split:

        def fold(x):
            return x[:, :split].reshape(batch, -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)

        state, y = jax.lax.scan(one, state, jax.tree.map(fold, (u, dt, keep)))
        outputs.append(y.swapaxes(0, 1).reshape(batch, split, channels))
    if split < length:
        rest = jax.tree.map(lambda x: x[:, split:], (u, dt, keep))
        state, y = chunk(system, state, rest)
        outputs.append(y)
    return _joined(outputs), state


def _chunk_states(log_a, b, c, state, u, dt, keep):
    """The chunk's final state and y, through its states [B, T, H, N]."""
    inputs = u.astype(b.real.dtype)[..., None]
    if dt is None:
        decay = jnp.exp(log_a)[None, None]
        driven = _times(inputs, b)
    else:
        elapsed = dt[..., None, None]
        decay, weight = hold.exp_and_phi(_times(elapsed, log_a))
        driven = weight * _times(elapsed * inputs, b)
    h, last = gradient.solve(xla, False, decay, driven, state, keep)
    y = sum(
        part * weight
        for part, weight in zip(pairs.split(h), pairs.conj(pairs.split(c)), strict=True)
    )
    return last, y.sum(-1).astype(u.dtype)


def _times(real, array):
    """Their product part by part, so that gradients are sums of reals: sums of complex
    numbers are slow on a CPU."""
    return pairs.join(pairs.scale(pairs.split(array), real))


def _joined(outputs):
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 1)
