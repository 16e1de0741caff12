"""Which form suits a call by default, in the open: `backend_report()` shows the words.

Thresholds are measured on a CPU (`python -m kernels.bench --op fft_conv`). On GPUs and
TPUs they are not: there direct, and on GPUs overlap-save, follow the same count of
operations and bytes. On TPUs whatever uses XLA's FFT is left out, which is slow to run
and takes half a minute to compile where matmuls do not.
"""

import jax.numpy as jnp

from kernels import compat

FEW = 16  # taps, or steps, up to which multiplies and adds are faster than an FFT
LONG = 2**18  # steps from which on blocks are faster than one FFT
SHORT = 32  # and how many times longer than its filter the sequence must be then


def advice(u, k, initial_state, k_reverse) -> dict[str, tuple[bool, str]]:
    """Backend -> whether to take it by default, and why (not)."""
    length, taps = u.shape[1], k.shape[1]
    used_taps = taps if initial_state is not None else min(taps, length)
    if k_reverse is not None:
        taps = max(taps, k_reverse.shape[1])
        used_taps += min(k_reverse.shape[1], length - 1)
    few = min(used_taps, length) <= FEW
    short = length >= max(LONG, SHORT * taps)
    tpu = compat.platform() == "tpu"
    low = u.dtype == jnp.bfloat16
    sizes = f"K={taps} taps against L={length}"
    pays = f"pays from L={max(LONG, SHORT * taps)}"
    blocks = short, sizes if short else f"{sizes}, {pays}"
    if tpu:
        blocks = False, "XLA's FFT is slow on tpu"
    return {
        "direct": (few, sizes if few else f"{sizes}, pays up to {FEW} of either"),
        "overlap_save": blocks,
        "triton": (
            low,
            f"{u.dtype.name}, whose matmuls are {'fast' if low else 'not'}",
        ),
        "monarch": (
            tpu,
            "matmuls, XLA's FFT is slow on tpu"
            if tpu
            else f"XLA's FFT is faster on {compat.platform()}",
        ),
    }
