"""Chunks of time as matmuls, the state carried from one to the next.

With the decays of decay.py, a chunk that S enters is

    u = v, or by the delta rule the solution of (I + A) u = beta (v - read(k, S)),
        where A is beta scores(k, k) below the diagonal
    o = scores(q, k) u + read(q, S)
    S <- keep(S) + write(k, u)

JAX differentiates a chunk; the backward pass keeps the states between chunks and makes
everything else again. All chunks at once, with only their states in a loop, took 1.25
times as long on a CPU and twice the memory.

Float32 inputs are multiplied in full precision on every device. Narrower ones lose
nothing in a device's faster formats, so scores and reads use its default; the state,
where errors stay, and the delta rule's system, which may amplify them, do not.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import compat, segments
from kernels.chunked_scan import decay, delta, isolation

SCALAR_CHUNK = 64
CHUNK = 32  # where work grows faster with the chunk: vector decay and delta rule


def unsupported(*arguments) -> str | None:
    return None


def chunked_scan(q, k, v, log_decay, beta, state, into):
    """o [B, L, H, V] and the final state; see reference.chunked_scan."""
    values = v.shape[3]
    if compat.platform() == "gpu":
        # XLA there joins the values of all heads of a group, and finds no tiles for
        # their number unless it is round
        padding = [(0, 0)] * 3 + [(0, -values % 16)]
        v, state = jnp.pad(v, padding), jnp.pad(state, padding)
    batch, length, heads, _ = v.shape
    groups = q.shape[2]
    narrow = all(x.dtype.itemsize < 4 for x in (q, k, v))
    precision = None if narrow else "highest"
    simple = beta is None and log_decay.ndim == 3
    size = SCALAR_CHUNK if simple else CHUNK
    while size >= 2 * length:
        size //= 2

    def fold(x):
        """[B, L, heads, ...] -> [chunks, B G, heads per group, T, ...]"""
        x = x if x.dtype == bool else x.astype(state.dtype)
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, -1, size, groups, x.shape[2] // groups, *x.shape[3:])
        x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(state, inputs):
        if into is not None:
            return isolation.chunk(partial(_chunk, precision), state, *inputs)
        return _chunk(precision, state, *inputs)

    if into is not None:
        into = jnp.broadcast_to(into[..., None], (batch, length, groups))
    inputs = jax.tree.map(fold, (q, k, v, log_decay, beta, into))
    folded = state.reshape(batch * groups, -1, *state.shape[2:])
    if length <= size:
        folded, o = chunk(folded, jax.tree.map(lambda x: x[0], inputs))
        o = o[None]
    else:
        folded, o = jax.lax.scan(chunk, folded, inputs)
    o = o.reshape(-1, batch, heads, *o.shape[3:])
    o = jnp.moveaxis(o, (0, 1, 2, 3), (1, 0, 3, 2)).reshape(batch, -1, *v.shape[2:])
    return o[:, :length, :, :values], folded.reshape(state.shape)[..., :values]


def _chunk(precision, state, q, k, v, g, beta, into):
    """The state after a chunk and its o; the arrays have the axes fold gives them."""
    q, k = q[:, 0], k[:, 0]
    linked, first, last, through = _masks(into)
    decays = decay.scalar(g) if g.ndim == 3 else decay.vector(g)
    if beta is not None:
        beta = beta[..., None]
        recalled = _where(first, decays.read(k, state, "highest"))
        among = _where(linked, decays.scores(k, k, "highest"))
        v = delta.solve(beta * among, beta * (v - recalled))
    scores = _where(linked, decays.scores(q, k, precision))
    o = jnp.matmul(scores, v, precision=precision)
    o = o + _where(first, decays.read(q, state, precision))
    carried = _where(through, decays.keep(state))
    return carried + decays.write(k, _where(last, v)), o


def _where(linked, x):
    return x if linked is None else jnp.where(linked, x, 0)


def _masks(into):
    """Where resets leave a link: between tokens, from the state that enters, to the one
    that leaves, and from one to the other. None without resets."""
    if into is None:
        return None, None, None, None
    number = segments.ids(into[:, 0])[:, None, :, None]
    end = number[:, :, -1:]
    return number == number.mT, number == 0, number == end, end == 0
