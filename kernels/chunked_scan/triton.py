"""On GPUs: plain decay (triton_decay.py) and the delta rule (triton_delta.py)."""

import jax.numpy as jnp

from kernels import segments
from kernels.chunked_scan import triton_decay, triton_delta

WIDEST = 128  # K, whose tiles are held whole; half of it in float32


def unsupported(q, v, log_decay, beta) -> str | None:
    if log_decay is not None and log_decay.ndim == 4:
        return "takes no decay per channel"
    widest = WIDEST if q.dtype == jnp.bfloat16 else WIDEST // 2
    if q.shape[-1] > widest:
        return f"K is at most {widest} in {q.dtype.name}"
    return None


def chunked_scan(q, k, v, log_decay, beta, state, into):
    """o [B, L, H, V] and the final state; see reference.chunked_scan."""
    segment = None if into is None else segments.ids(into)
    g = log_decay.astype(state.dtype)
    if beta is None:
        return triton_decay.scan(q, k, v, g, state, segment)
    return triton_delta.scan(q, k, v, g, beta.astype(state.dtype), state, segment)
