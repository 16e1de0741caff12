"""The modes of a bank of diagonal systems, and what decoding computes once."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import recurrent
from layers.parameters import at_least_complex64
from ssm import recurrence
from ssm import sequence as seq

CONSTANTS = "constants"  # the collection of what `prepare` computes


def computed_once(module: nn.Module, name: str, make: Callable[[], Any]) -> Any:
    """`make()`, or what `prepare` has kept of it: values that depend on parameters
    alone and would otherwise be computed anew for every token."""
    if module.has_variable(CONSTANTS, name):
        return module.get_variable(CONSTANTS, name)
    value = make()
    if module.is_mutable_collection(CONSTANTS) and not module.is_initializing():
        module.put_variable(CONSTANTS, name, value)
    return value


def prepare(module: nn.Module, variables: Mapping, token: Any) -> dict:
    """Variables for decoding: what a step needs of the parameters, computed once.

    The result replaces `variables` in calls of one token with a state; any change of
    the parameters makes it stale.

    Args:
        module: a layer or model with a recurrent mode.
        variables: those that `module.apply` takes.
        token: an input of length 1 (any values), such as x[:, :1].
    """
    state = module.init_state(token.shape[0])
    _, constants = module.apply(variables, token, state, mutable=[CONSTANTS])
    return {**variables, **constants}


def zero_modes(layer: nn.Module, batch_size: int) -> jax.Array:
    """The state of H systems of n = state_size / 2 modes before the first token, zeros
    [B, H, n] complex. `ValueError` for a bidirectional layer, which has none."""
    recurrent(layer)
    shape = batch_size, layer.features, layer.state_size // 2
    return jnp.zeros(shape, at_least_complex64(layer.dtype))


def modes(
    module: nn.Module,
    system: recurrence.Diagonal,
    convolve: Callable[..., tuple[jax.Array, jax.Array]],
    D: jax.Array,
    u: jax.Array,
    state: jax.Array | None,
    sequence: seq.Sequence,
) -> tuple[jax.Array, jax.Array]:
    """y [B, L, H] and the state of a `ssm.recurrence.Diagonal` bank with feed-through D
    in the mode that the call allows: a convolution without state, reset or dt, one step
    where L = 1, chunks otherwise.

    convolve(u, mask) -> (y + D u, state) is the first of them, on right padding.
    """
    if state is None and sequence.reset is None and sequence.dt is None:
        u, compacted, restore = seq.compact(u, sequence)
        y, state = convolve(u, compacted.mask)
        return restore(y), state
    elapsed = seq.elapsed(sequence)
    u = seq.zero_masked(u, sequence)
    if u.shape[1] == 1 and state is not None:
        y, state = _diagonal_step(module, system, u, state, elapsed, sequence.reset)
    else:
        y, state = recurrence.chunked(system, u, state, elapsed, sequence.reset)
    return seq.zero_masked(y + D * u, sequence), state


def _diagonal_step(module, system, u, state, elapsed, reset):
    reset = None if reset is None else reset[:, 0]
    if elapsed is None:
        # Exponentials cost more than the step itself; see `prepare`.
        log_a, b, c = system
        a, b, c = computed_once(module, "step", lambda: (jnp.exp(log_a), b, c))
        y, state = recurrence.advance(a, b, c, u[:, 0], state, reset)
    else:
        y, state = recurrence.step(system, u[:, 0], state, elapsed[:, 0], reset)
    return y[:, None], state
