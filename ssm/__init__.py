"""The mathematics of state-space models: arrays in, arrays out.

Notation, everywhere in this repository:

    B        batch                       u        input   [B, L, H] (or [B, L, ...])
    L        length of the call          y        output, same shape as u
    H        features (channels)         A, B, C, D  the continuous system
    N, n     real state size; n = N / 2 stored conjugate pairs
    P        stored complex states of a multi-input system (S5, LRU)
    lam      eigenvalues of A (1 / time) dt       step size (time per token)
    log_a    log of the discrete decay per token, so that a = exp(log_a)

A *filter* is the impulse response of a system. A *kernel* is fast code (`kernels/`).
"""

from ssm import (
    discretize,
    dplr,
    filters,
    hippo,
    hippo_memory,
    implicit_filters,
    recurrence,
    sequence,
    spectra,
    stability,
)
from ssm.sequence import Sequence

__all__ = [
    "Sequence",
    "discretize",
    "dplr",
    "filters",
    "hippo",
    "hippo_memory",
    "implicit_filters",
    "recurrence",
    "sequence",
    "spectra",
    "stability",
]
