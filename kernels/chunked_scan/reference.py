"""The definition as a loop over time."""

import jax
import jax.numpy as jnp


def unsupported(*arguments) -> str | None:
    return None


def chunked_scan(q, k, v, log_decay, beta, state, into):
    """S[t] = A[t] S[t-1] + k[t] u[t]^T, o[t] = S[t]^T q[t]; A = exp(log_decay), u = v,
    or by the delta rule u = beta (v - (A S[t-1])^T k).

    q, k [B, L, G, K], v [B, L, H, V], log_decay [B, L, H] or [B, L, H, K], beta
    [B, L, H] or None, state [B, H, K, V]; into [B, L] bool cuts the carry into a step,
    or None.
    """
    heads = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, heads, 2) for x in (q, k))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(S, token):
        *token, cut = token
        q, k, v, g, beta = jax.tree.map(lambda x: x.astype(S.dtype), token)
        if cut is not None:
            S = jnp.where(cut[:, None, None, None], 0, S)
        S = jnp.exp(g)[..., None] * S
        if beta is not None:
            v = beta[..., None] * (v - jnp.sum(k[..., None] * S, -2))
        S = S + k[..., None] * v[..., None, :]
        return S, jnp.sum(q[..., None] * S, -2)

    tokens = (q, k, v, log_decay, beta, into)
    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
    final, o = jax.lax.scan(step, state, tokens)
    return o.swapaxes(0, 1), final
