"""The scan as one loop over short blocks of steps, updating its output in place.

A block of STEPS steps is unrolled: long enough to spread the cost of an iteration,
short enough that recomputing the chain for each of its outputs (XLA fuses them) stays
free. The backward pass is one loop too: it makes the gradients of x and a together, so
nothing but h itself is kept. Differentiating through the in-place updates instead would
cost O(L^2).
"""

import jax
import jax.numpy as jnp

from kernels import pairs

STEPS = 8


def unsupported(*arguments) -> str | None:
    return None


def forward(a, x, initial_state, keep, reverse):
    """h and final state, pairs; a [B|1, L|1, *S|1], x [B, L, *S], keep [B, L]."""
    length = x[0].shape[1]
    parts = len(initial_state)
    dtype = initial_state[0].dtype
    varying = a[0].shape[1] > 1

    def block(start, size, carry):
        h, out = carry
        first = length - start - size if reverse else start
        inputs = _rows(x, first, size, dtype)
        decays = _rows(a, first, size, dtype) if varying else pairs.cast(a, dtype)
        kept = None if keep is None else _rows((keep,), first, size, dtype)[0]
        rows = [None] * size
        for i in _order(size, reverse):
            decay = tuple(part[:, i if varying else 0] for part in decays)
            if kept is not None:
                decay = pairs.scale(decay, _column(kept, i, h))
            h = pairs.add(pairs.mul(decay, h), tuple(part[:, i] for part in inputs))
            rows[i] = h
        return h, _write(out, rows, first)

    h_dtype = x[0].dtype if parts == 1 else dtype
    out = tuple(jnp.zeros(x[0].shape, h_dtype) for _ in range(parts))
    final, out = _forwards(block, length, (initial_state, out))
    return out, final


def backward(a, h, initial_state, keep, like_x, h_gradient, final_gradient, reverse):
    """Gradients of a, x and the initial state: g[t] = dh[t] + conj(a[t+1]) g[t+1]."""
    length = h[0].shape[1]
    dtype = initial_state[0].dtype
    varying = a[0].shape[1] > 1

    def block(start, size, carry, is_first=False):
        g, da, dx = carry
        first = length - start - size if reverse else start
        gradients = _rows(h_gradient, first, size, dtype)
        decays = _rows(a, first, size, dtype) if varying else pairs.cast(a, dtype)
        kept = None if keep is None else _rows((keep,), first, size, dtype)[0]
        if is_first:
            previous = _first_previous(h, initial_state, first, size, dtype, reverse)
        else:
            previous = _rows(h, first + 1 if reverse else first - 1, size, dtype)
        dx_rows, da_rows = [None] * size, [None] * size
        for i in _order(size, not reverse):
            decay = pairs.conj(tuple(part[:, i if varying else 0] for part in decays))
            before = pairs.conj(tuple(part[:, i] for part in previous))
            if kept is not None:
                decay = pairs.scale(decay, _column(kept, i, g))
                before = pairs.scale(before, _column(kept, i, g))
            g = pairs.add(g, tuple(part[:, i] for part in gradients))
            dx_rows[i] = g[: len(like_x)]
            da_rows[i] = pairs.mul(before, g)[: len(a)]
            g = pairs.mul(decay, g)
        if varying:
            da = _write(da, da_rows, first)
        else:
            da = tuple(
                total + sum(row[part] for row in da_rows)
                for part, total in enumerate(da)
            )
        return g, da, _write(dx, dx_rows, first)

    dx = tuple(jnp.zeros(h[0].shape, part.dtype) for part in like_x)
    if varying:
        da = tuple(jnp.zeros(part.shape, part.dtype) for part in a)
    else:
        da = tuple(jnp.zeros_like(initial_state[0]) for _ in a)
    dstate, da, dx = _backwards(block, length, (final_gradient, da, dx))
    if not varying:
        da = tuple(
            _reduce(total[:, None], part.shape).astype(part.dtype)
            for total, part in zip(da, a, strict=True)
        )
    return da, dx, dstate


def _forwards(block, length, carry):
    """The first block takes what does not fill a whole one; the others loop."""
    first = length % STEPS or min(STEPS, length)
    carry = block(0, first, carry)
    return _loop(length - first, lambda i, c: block(first + i * STEPS, STEPS, c), carry)


def _backwards(block, length, carry):
    first = length % STEPS or min(STEPS, length)
    last = length - STEPS
    carry = _loop(length - first, lambda i, c: block(last - i * STEPS, STEPS, c), carry)
    return block(0, first, carry, is_first=True)


def _loop(steps, body, carry):
    # a loop without iterations would still be traced, with slices that do not fit
    return jax.lax.fori_loop(0, steps // STEPS, body, carry) if steps else carry


def _first_previous(h, initial_state, first, size, dtype, reverse):
    """The states before each step of the first block, the initial state among them."""
    if reverse:
        rows = _rows(h, first + 1, size - 1, dtype)
        both = lambda part, state: [part, state[:, None]]  # noqa: E731
    else:
        rows = _rows(h, first, size - 1, dtype)
        both = lambda part, state: [state[:, None], part]  # noqa: E731
    return tuple(
        jnp.concatenate(both(part, state), 1)
        for part, state in zip(rows, initial_state, strict=True)
    )


def _order(size, backwards):
    return reversed(range(size)) if backwards else range(size)


def _rows(arrays, first, size, dtype):
    return tuple(
        jax.lax.dynamic_slice_in_dim(part, first, size, 1).astype(dtype)
        for part in arrays
    )


def _column(kept, i, like):
    return kept[:, i].reshape(-1, *[1] * (like[0].ndim - 1))


def _write(arrays, rows, first):
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(
            whole,
            _reduce(
                jnp.stack([row[part] for row in rows], 1),
                (whole.shape[0], len(rows), *whole.shape[2:]),
            ).astype(whole.dtype),
            first,
            1,
        )
        for part, whole in enumerate(arrays)
    )


def _reduce(array, shape):
    """Sums over the axes along which `shape` was broadcast."""
    axes = [i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1]
    return array.sum(axes, keepdims=True) if axes else array
