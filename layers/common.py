"""Parts that two or more layers share."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import fft_conv
from ssm import recurrence
from ssm import sequence as seq


def logical(init, *axes):
    """`init` whose parameter carries the logical axis names `axes` (for sharding) and
    is float32 unless it is asked for in another dtype: JAX's own initialisers would
    follow `jax_enable_x64` to float64."""

    def in_float32(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype=dtype)

    return nn.with_logical_partitioning(in_float32, axes)


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
        return jax.random.normal(key, shape, dtype) * (std / math.sqrt(2))

    return init


def uniform(key, shape, dtype=jnp.float32, *, bound):
    """Initialiser U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(
    features,
    name,
    dtype,
    axes=("embed", "mlp"),
    bias_init=nn.initializers.zeros_init(),  # noqa: B008 (a pure function)
    kernel_init=nn.initializers.lecun_normal(),  # noqa: B008
):
    """`nn.Dense` with logical axes on its kernel and bias; bias_init None for none."""
    return nn.Dense(
        features,
        name=name,
        dtype=dtype,
        use_bias=bias_init is not None,
        kernel_init=logical(kernel_init, *axes),
        bias_init=None if bias_init is None else logical(bias_init, axes[1]),
    )


def linear(features, name, dtype, axes=("embed", "mlp")):
    """A projection without bias, as the families of gated mixers use them."""
    return dense(features, name, dtype, axes, bias_init=None)


def also_empty(call):
    """The call of a mixer, which now also answers a batch of no rows [0, L, ...], with
    outputs and a state of no rows. A reshape cannot tell the heads of no rows apart, so
    a row of zeros is computed in their place and dropped."""

    def row(leaf):
        shape = getattr(leaf, "shape", ())
        return jnp.zeros((1, *shape[1:]), leaf.dtype) if shape[:1] == (0,) else leaf

    @functools.wraps(call)
    def answer(self, x, state=None, sequence=None, train=False):
        if getattr(x, "shape", ())[:1] != (0,):
            return call(self, x, state, sequence, train)
        x, state, sequence = jax.tree.map(row, (x, state, sequence))
        return jax.tree.map(
            lambda leaf: leaf[:0], call(self, x, state, sequence, train)
        )

    return answer


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


def begin(layer, x, state, sequence):
    """What every mixer checks first: x [B, L, layer.features], a sequence that fits it
    and a state of the kind that `layer.init_state` gives. Returns the Sequence."""
    return _begin(layer, x, (layer.features,), state, sequence)


def begin_frames(layer, x, state, sequence):
    """The same for a layer over frames, x [B, L, h, w, layer.features] with (h, w) its
    `size`."""
    if len(layer.size) != 2 or min(layer.size) < 1:
        raise ValueError(f"size: must be (h, w), both at least 1, got {layer.size}")
    return _begin(layer, x, (*layer.size, layer.features), state, sequence)


def _begin(layer, x, token, state, sequence):
    sequence = seq.check(x, sequence)
    if x.shape[2:] != token:
        expected = ", ".join(map(str, token))
        raise ValueError(f"x: must be [B, L, {expected}], got {x.shape}")
    if state is not None:
        if getattr(layer, "bidirectional", False):
            raise ValueError(
                f"state: a bidirectional {type(layer).__name__} has none; pass None or "
                "set bidirectional=False"
            )
        check_state(state, jax.eval_shape(lambda: layer.init_state(x.shape[0])))
    return sequence


def at_least_one(layer, *names):
    """Raises a `ValueError` naming the first of these fields that is below 1."""
    for name in names:
        if getattr(layer, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(layer, name)}")


def at_least_zero(layer, *names):
    """The same for fields whose 0 has a meaning of its own."""
    for name in names:
        if getattr(layer, name) < 0:
            raise ValueError(
                f"{name}: must be 0 or positive, got {getattr(layer, name)}"
            )


def wide(dtype):
    """The dtype of gates, states and SSM parameters where activations are `dtype`:
    float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def wide_complex(dtype):
    """The complex dtype of the same precision."""
    return jnp.promote_types(wide(dtype), jnp.complex64)


def check_state(state, expected):
    """Raises a `ValueError` naming `state` unless it is None or has the structure and
    shapes of `expected`, what `init_state` returns for this batch."""
    if state is None:
        return
    found = jax.tree.map(jnp.shape, state)
    wanted = jax.tree.map(jnp.shape, expected)
    if found != wanted:
        raise ValueError(
            f"state: must be None or what init_state gives, {wanted}, got {found}"
        )


def no_initial_state(layer):
    """The error of `init_state` on a bidirectional layer."""
    return ValueError(
        f"bidirectional: {layer} has no recurrent mode with bidirectional=True; "
        "init_state needs bidirectional=False"
    )


def regular(layer, sequence):
    """Raises a `ValueError` naming dt, for which the taps of a filter have no place."""
    if sequence.dt is not None:
        raise ValueError(
            f"dt: the filters of {type(layer).__name__} have taps at regular steps; "
            "pass None"
        )


def within_length(layer, x):
    """Raises a `ValueError` naming `length` where a call has more tokens."""
    at_least_one(layer, "length")
    if x.shape[1] > layer.length:
        raise ValueError(
            f"length: {type(layer).__name__} has filters of {layer.length} taps, got a "
            f"call of {x.shape[1]} tokens; build it with length={x.shape[1]}"
        )


def long_conv(u, k, state, sequence, skip=None):
    """y = k * u + skip u, and the last K-1 inputs that exist, the state [B, K-1, H].

    u [B, L, H] with right padding only, k [H, K], skip [H]; state None: no past.
    """
    y, _ = fft_conv(u, k, state, sequence.reset, skip=skip)
    if state is None:
        state = past_inputs(u.shape[0], k.shape[1], k.shape[0], u.dtype)
    return y, seq.window(state, u, sequence)


def past_inputs(batch_size, taps, features, dtype):
    """The state of `long_conv` before the first token, zeros [B, K-1, H]."""
    return jnp.zeros((batch_size, taps - 1, features), wide(dtype))


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
