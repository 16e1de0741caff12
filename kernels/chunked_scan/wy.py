"""What a chunk writes by the delta rule, but for the state (WY form):

    u = U - W S,   (I + A) [U, W] = beta [v, e^G k]
    A[i, j] = beta[i] e^(G[i] - G[j]) k[i] . k[j],   j < i

for all chunks at once, with G the log decay cumulated inside each.
"""

import jax.numpy as jnp

from kernels.chunked_scan import decay, delta


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

    keys, given, weights = fold(k)[:, 0], fold(v), fold(beta)[..., None]
    decays = decay.scalar(fold(g))
    links, first = 1, 1
    if segment is not None:
        number = jnp.pad(segment, ((0, 0), (0, -length % size)), mode="edge")
        number = number.reshape(batch, chunks, size)
        before = jnp.pad(number[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))

        def per_group(x):
            x = jnp.broadcast_to(x[:, :, None], (batch, chunks, groups, *x.shape[2:]))
            return x.reshape(-1, 1, *x.shape[3:])

        links = per_group(number[..., None] == number[..., None, :])
        first = per_group(number == before)[..., None]
    among = jnp.matmul(keys, keys.mT, precision="highest")[:, None] * decays.between
    entering = first * decays.enter[..., None] * keys[:, None]
    right = jnp.concatenate([given, entering], -1)
    solved = delta.solve(weights * links * among, weights * right)
    solved = solved.reshape(batch, chunks, heads, size, -1).swapaxes(2, 3)
    solved = solved.reshape(batch, -1, *solved.shape[3:])[:, :length].astype(k.dtype)
    return solved[..., :values], solved[..., values:]
