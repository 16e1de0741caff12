"""One linear system in four modes, against a float64 loop; gaps, resets, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close
from ssm import Sequence, discretize, recurrence, sequence

B, H, N, P = 2, 3, 4, 5


def complex_draw(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def bank(seed=0):
    rng = np.random.default_rng(seed)
    log_a = -rng.uniform(0.01, 0.5, (H, N)) + 1j * rng.uniform(-3, 3, (H, N))
    return log_a, complex_draw(rng, H, N), complex_draw(rng, H, N)


def loop(log_a, b, c, u, state, elapsed, reset):
    """The recurrence as it is written down, one token at a time, in NumPy."""
    y = np.zeros(u.shape)
    for t in range(u.shape[1]):
        state = np.where(reset[:, t, None, None], 0, state)
        e = elapsed[:, t, None, None]
        weight = np.expm1(e * log_a) / np.expm1(log_a)
        state = np.exp(e * log_a) * state + weight * b * u[:, t, :, None]
        y[:, t] = np.sum(c * state, axis=-1).real
    return y, state


def draw(L, seed=1):
    rng = np.random.default_rng(seed)
    elapsed = rng.uniform(0.2, 3.0, (B, L)) * (rng.random((B, L)) < 0.8)
    reset = rng.random((B, L)) < 0.2
    return rng.normal(size=(B, L, H)), complex_draw(rng, B, H, N), elapsed, reset


def single(*arrays):
    """Casts to float32 and complex64."""
    wide = {np.float64: np.float32, np.complex128: np.complex64}
    return [jnp.asarray(a, wide.get(a.dtype.type, a.dtype)) for a in arrays]


@pytest.mark.parametrize("mode", ["scan", "chunked"])
@pytest.mark.parametrize("L", [1, 7, 64, 301])
@pytest.mark.parametrize("irregular", [False, True])
def test_modes_equal_the_loop(mode, L, irregular):
    u, state, elapsed, reset = draw(L)
    if not irregular:
        elapsed = np.ones_like(elapsed)
    expected = loop(*bank(), u, state, elapsed, reset)
    system = recurrence.Diagonal(*single(*bank()))
    u, state, e = single(u, state, elapsed)
    run = jax.jit(getattr(recurrence, mode))
    found = run(system, u, state, e if irregular else None, jnp.asarray(reset))
    assert_close(found, tuple(single(*expected)))


def test_step_equals_the_loop():
    u, state, elapsed, reset = draw(5)
    expected = loop(*bank(), u, state, elapsed, reset)
    system = recurrence.Diagonal(*single(*bank()))
    u, state, elapsed = single(u, state, elapsed)
    step, ys = jax.jit(recurrence.step), []
    for t in range(5):
        y, state = step(system, u[:, t], state, elapsed[:, t], reset[:, t])
        ys.append(y)
    assert_close((jnp.stack(ys, 1), state), tuple(single(*expected)))


@pytest.mark.parametrize("L", [1, 7, 64, 301])
def test_convolution_equals_the_loop_with_its_final_state(L):
    u = draw(L)[0]
    length = np.array([L, max(1, L // 2)])
    mask = np.arange(L) < length[:, None]
    u = u * mask[..., None]
    rest = np.ones((B, L)) * mask
    y, state = loop(
        *bank(), u, np.zeros((B, H, N), complex), rest, ~np.ones((B, L), bool)
    )
    system = recurrence.Diagonal(*single(*bank()))
    found, final = jax.jit(recurrence.convolution)(
        system, *single(u), jnp.asarray(mask)
    )
    real = mask[..., None]
    assert_close((found * real, final), (single(y)[0] * real, single(state)[0]))


@pytest.mark.parametrize("name", discretize.DISCRETIZATIONS)
def test_varying_discretises_at_every_token(name):
    """Against a loop that calls the rule once per token."""
    rng = np.random.default_rng(3)
    lam = -rng.uniform(0.1, 1, (H, N)) + 1j * rng.normal(size=(H, N))
    dt = rng.uniform(0.01, 0.3, (H, 1))
    b, c = complex_draw(rng, H, N), complex_draw(rng, H, N)
    u, state, _, reset = draw(11)
    elapsed = rng.uniform(0.2, 3, (B, 11))
    lam, dt, b, c, u, state, elapsed = single(lam, dt, b, c, u, state, elapsed)
    rule = functools.partial(discretize.get(name), lam, dt)
    expected, x = [], state
    for t in range(11):
        log_a, gain = rule(elapsed[:, t, None, None])
        x = jnp.where(reset[:, t, None, None], 0, x)
        x = jnp.exp(log_a) * x + gain * b * u[:, t, :, None]
        expected.append(jnp.sum(c * x, -1).real)
    run = jax.jit(functools.partial(recurrence.varying, rule, b, c, chunk=4))
    found = run(u, state, elapsed, jnp.asarray(reset))
    assert_close(found, (jnp.stack(expected, 1), x))


def mixed_case(L, seed=5):
    rng = np.random.default_rng(seed)
    log_a = -rng.uniform(0.01, 0.5, P) + 1j * rng.uniform(-3, 3, P)
    into, out = complex_draw(rng, P, H), complex_draw(rng, H, P)
    return (
        *single(log_a, into, out, rng.normal(size=(B, L, H)), complex_draw(rng, B, P)),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("L", [1, 7, 64, 130])
def test_mixed_equals_a_loop(reverse, L):
    log_a, into, out, u, state = mixed_case(L)
    reset = np.random.default_rng(L).random((B, L)) < 0.2

    def rule(elapsed):
        return log_a, jnp.ones_like(log_a)

    expected, x = [None] * L, state
    for t in reversed(range(L)) if reverse else range(L):
        # The link between t and t + 1 is cut by reset[t + 1], in both directions.
        cut = (
            (np.zeros(B, bool) if t == L - 1 else reset[:, t + 1])
            if reverse
            else reset[:, t]
        )
        x = jnp.where(cut[:, None], 0, x)
        x = jnp.exp(log_a) * x + u[:, t] @ into.T
        expected[t] = (x @ out.T).real
    if reverse:
        x = jnp.where(reset[:, 0, None], 0, x)
    run = functools.partial(
        recurrence.mixed, rule, into, out, reverse=reverse, chunk=16
    )
    found = jax.jit(run)(u, state, None, jnp.asarray(reset))
    assert_close(found, (jnp.stack(expected, 1), x))


@pytest.mark.slow
def test_mixed_gradients_do_not_depend_on_the_chunk():
    log_a, into, out, u, state = mixed_case(50)
    elapsed = jnp.asarray(
        np.random.default_rng(0).uniform(0.2, 2, (B, 50)), jnp.float32
    )

    def total(chunk, log_a, into, out, u, state, elapsed):
        def rule(e):
            return log_a * e, recurrence.hold(log_a, e)

        y, x = recurrence.mixed(rule, into, out, u, state, elapsed, chunk=chunk)
        return jnp.sum(y**2) + jnp.sum(jnp.abs(x) ** 2)

    def gradients(chunk):
        run = jax.jit(jax.grad(functools.partial(total, chunk), range(6)))
        return run(log_a, into, out, u, state, elapsed)

    assert_close(gradients(8), gradients(64), kind="gradient")


def test_halving_the_rate_with_doubled_dt_is_exact_for_zoh():
    """Every input held twice: the coarse run equals every second fine output."""
    lam = jnp.asarray(bank()[0], jnp.complex64)
    u = jnp.asarray(draw(20)[0], jnp.float32)
    fine = recurrence.Diagonal(*discretize.zoh(lam, 0.05), jnp.ones_like(lam))
    coarse = recurrence.Diagonal(*discretize.zoh(lam, 0.1), jnp.ones_like(lam))
    repeated = recurrence.scan(fine, jnp.repeat(u, 2, axis=1))[0][:, 1::2]
    assert_close(repeated, recurrence.scan(coarse, u)[0])
    double = recurrence.scan(fine, u, elapsed=jnp.full((B, 20), 2.0))[0]
    assert_close(double, recurrence.scan(coarse, u)[0])


@pytest.mark.slow
def test_compaction_equals_elapsed_zero():
    """The two treatments of a mask agree: convolution of compacted, scan of gaps."""
    rng = np.random.default_rng(8)
    mask = jnp.asarray(rng.random((B, 30)) < 0.6)
    (u,) = single(rng.normal(size=(B, 30, H)))
    system = recurrence.Diagonal(*single(*bank()))
    given = Sequence(mask=mask)
    moved, compacted, restore = sequence.compact(u, given)
    y, state = recurrence.convolution(system, moved, compacted.mask)
    expected = recurrence.chunked(
        system, sequence.zero_masked(u, given), None, sequence.elapsed(given)
    )
    assert_close(
        (restore(y), state), (sequence.zero_masked(expected[0], given), expected[1])
    )
