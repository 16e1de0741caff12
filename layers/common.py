"""Parts that two or more layers share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssm import recurrence
from ssm import sequence as seq


def logical(init, *axes):
    """`init` whose parameter carries the logical axis names `axes` (for sharding)."""
    return nn.with_logical_partitioning(init, axes)


def constant(value):
    """Initialiser from a NumPy array, computed in float64 and cast once."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.asarray(np.broadcast_to(value, shape), dtype)

    return init


def constant_pair(value):
    """Initialiser of [..., 2] real pairs from a complex NumPy array."""
    return constant(np.stack([np.real(value), np.imag(value)], axis=-1))


def complex_normal(std=1.0):
    """[..., 2] real pairs of a complex normal with E|z|^2 = std^2."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, shape, dtype) * (std / np.sqrt(2))

    return init


def dense(
    features,
    name,
    dtype,
    axes=("embed", "mlp"),
    bias_init=nn.initializers.zeros_init(),  # noqa: B008 (a pure function)
):
    """`nn.Dense` with logical axes on its kernel and bias."""
    return nn.Dense(
        features,
        name=name,
        dtype=dtype,
        kernel_init=logical(nn.initializers.lecun_normal(), *axes),
        bias_init=logical(bias_init, axes[1]),
    )


CONSTANTS = "constants"  # the collection of what `prepare` computes


def once(module, name, make):
    """`make()`, or what `prepare` has kept of it: values that depend on parameters
    alone and would otherwise be computed anew for every token."""
    if module.has_variable(CONSTANTS, name):
        return module.get_variable(CONSTANTS, name)
    value = make()
    if module.is_mutable_collection(CONSTANTS) and not module.is_initializing():
        module.put_variable(CONSTANTS, name, value)
    return value


def prepare(module, variables, token):
    """Variables for decoding: what a step needs of the parameters, computed once.

    The result replaces `variables` in calls of one token with a state; any change of
    the parameters makes it stale.

    Args:
        module: a layer or model with a recurrent mode.
        variables: of the module.
        token: an input of length 1 (any values), such as x[:, :1].
    """
    state = module.init_state(token.shape[0])
    _, constants = module.apply(variables, token, state, mutable=[CONSTANTS])
    return {**variables, **constants}


def check_state(state, expected):
    """Raises a `ValueError` naming `state` unless it is None or has the structure,
    shapes of `expected` (what `init_state` returns for this batch)."""
    if state is None:
        return
    found = jax.tree.map(jnp.shape, state)
    wanted = jax.tree.map(jnp.shape, expected)
    if found != wanted:
        raise ValueError(
            f"state: must be None or what init_state gives, {wanted}, got {found}"
        )


def no_state(layer, state):
    """A bidirectional layer reads the future, so it has no state to be given."""
    if state is not None:
        raise ValueError(
            f"state: a bidirectional {layer} has none; pass None or set "
            "bidirectional=False"
        )


def no_initial_state(layer):
    """The error of `init_state` on a bidirectional layer."""
    return ValueError(
        f"bidirectional: {layer} has no recurrent mode with bidirectional=True; "
        "init_state needs bidirectional=False"
    )


def diagonal_modes(module, system, convolve, D, u, state, sequence):
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
        a, b, c = once(module, "step", lambda: (jnp.exp(log_a), b, c))
        y, state = recurrence.advance(a, b, c, u[:, 0], state, reset)
    else:
        y, state = recurrence.step(system, u[:, 0], state, elapsed[:, 0], reset)
    return y[:, None], state
