"""What a chunk writes by the delta rule, but for the state (WY form):

    u = U - W S,   (I + A) [U, W] = beta [v, e^G k]
    A[i, j] = beta[i] e^(G[i] - G[j]) k[i] . k[j],   j < i

for all chunks at once, with G the log decay cumulated inside each.
"""

import jax.numpy as jnp

from kernels.chunked_scan import decay, delta, isolation


def system(k, v, g, beta, segment, size):
    """U [B, L, H, V] and W [B, L, H, K] in k's dtype, of chunks of `size` tokens.

    k [B, L, G, K], v [B, L, H, V], g and beta [B, L, H], segment [B, L] or None. With
    the state S before it, a chunk writes the values U - W S.
    """
    batch, length, heads, values = v.shape
    groups, chunks = k.shape[2], -(-length // size)

    def fold(x):
        """[B, L, heads, *] -> [B C G, heads per group, T, *]"""
        x = x.astype(g.dtype)
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, chunks, size, groups, x.shape[2] // groups, *x.shape[3:])
        return jnp.moveaxis(x, 2, 4).reshape(-1, *x.shape[4:5], size, *x.shape[5:])

    def per_group(x):
        """[B, C, T] -> [B C G, 1, T]"""
        x = jnp.broadcast_to(x[:, :, None], (batch, chunks, groups, size))
        return x.reshape(-1, 1, size)

    inputs, number, first = [fold(x) for x in (k, v, g, beta)], None, None
    if segment is not None:
        number = per_group(_by_chunk(segment, size))
        first = per_group(entered(segment, size))
    solved = _solved(*inputs, number, first)
    solved = solved.reshape(batch, chunks, heads, size, -1).swapaxes(2, 3)
    solved = solved.reshape(batch, -1, *solved.shape[3:])[:, :length].astype(k.dtype)
    return solved[..., :values], solved[..., values:]


def _solved(k, v, g, beta, number, first):
    """[U, W] from arrays [N, 1, T, K], [N, R, T, V], [N, R, T]; `number` of segments
    and `first`, what belongs to the one that the state enters, [N, 1, T] or None."""
    if number is not None:
        bad = isolation.unusable(k, v, g, beta)
        reached = isolation.reached_by(number, bad, behind=True)[..., None]
        k, v, beta = (isolation.finite(x) for x in (k, v, beta))
        g = isolation.decays(g)
    decays = decay.scalar(g)
    among = jnp.matmul(k, k.mT, precision="highest") * decays.between
    entering = decays.enter[..., None] * k
    if number is not None:
        among = jnp.where(number[..., None] == number[..., None, :], among, 0)
        entering = jnp.where(first[..., None], entering, 0)
    right = beta[..., None] * jnp.concatenate([v, entering], -1)
    solved = delta.solve(beta[..., None] * among, right)
    return solved if number is None else jnp.where(reached, jnp.nan, solved)


def entered(segment, size):
    """[B, C, T], which tokens of a chunk the state before it reaches."""
    number = _by_chunk(segment, size)
    return number == jnp.pad(number[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))


def _by_chunk(segment, size):
    number = jnp.pad(segment, ((0, 0), (0, -segment.shape[1] % size)), mode="edge")
    return number.reshape(len(segment), -1, size)
