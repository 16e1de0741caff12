"""Masks, resets and elapsed times: compaction against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm import Sequence, sequence


def by_hand(x, mask, reset):
    """Existing tokens in order, and whether any reset stood since the one before."""
    rows = []
    for row, keep, cut in zip(x, mask, reset, strict=True):
        pending, values, cuts = False, [], []
        for value, exists, is_cut in zip(row, keep, cut, strict=True):
            pending |= bool(is_cut)
            if exists:
                values.append(value)
                cuts.append(pending)
                pending = False
        rows.append((values, cuts, pending))
    return rows


def random_case(seed, B=4, L=9):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, L, 2)).astype(np.float32)
    mask, reset = rng.random((B, L)) < 0.6, rng.random((B, L)) < 0.3
    mask[0], mask[1] = True, False
    return x, mask, reset


@pytest.mark.parametrize("seed", range(5))
def test_compact_moves_tokens_and_resets_like_a_loop(seed):
    x, mask, reset = random_case(seed)
    given = Sequence(jnp.asarray(mask), jnp.asarray(reset))
    moved, after, restore = sequence.compact(jnp.asarray(x), given)
    for b, (values, cuts, pending) in enumerate(by_hand(x, mask, reset)):
        n = len(values)
        np.testing.assert_array_equal(after.mask[b], np.arange(x.shape[1]) < n)
        if n:
            np.testing.assert_array_equal(moved[b, :n], np.stack(values))
            np.testing.assert_array_equal(after.reset[b, :n], cuts)
        np.testing.assert_array_equal(moved[b, n:], 0)
        if n < x.shape[1]:  # a reset behind the last token waits on the padding
            assert bool(after.reset[b, n]) == pending
            assert not np.any(after.reset[b, n + 1 :])
    np.testing.assert_array_equal(restore(moved), np.where(mask[..., None], x, 0))
    assert after.compacted


def test_compact_hides_nan_and_is_idempotent():
    x, mask, _ = random_case(0)
    x = jnp.where(mask[..., None], x, jnp.nan)
    moved, after, _ = sequence.compact(x, Sequence(jnp.asarray(mask)))
    again, same, _ = sequence.compact(moved, after)
    np.testing.assert_array_equal(again, moved)
    assert same is after and bool(jnp.isfinite(moved).all())


def test_align_right_puts_the_last_token_last():
    x = jnp.asarray([[1.0, 2, 3, 0, 0], [4, 0, 0, 0, 0], [1, 2, 3, 4, 5]])[..., None]
    aligned = sequence.align_right(x, x[..., 0] > 0)[..., 0]
    np.testing.assert_array_equal(
        aligned, [[0, 0, 1, 2, 3], [0, 0, 0, 0, 4], [1, 2, 3, 4, 5]]
    )


def test_elapsed_is_float32_or_better():
    dt = jnp.ones((1, 3), jnp.bfloat16)
    for mask in (None, jnp.ones((1, 3), bool)):
        assert sequence.elapsed(Sequence(mask, None, dt)).dtype == jnp.float32


def test_elapsed_is_zero_on_masked_tokens():
    mask = jnp.asarray([[True, False, True]])
    dt = jnp.asarray([[0.5, 7.0, 2.0]])
    assert sequence.elapsed(Sequence()) is None
    np.testing.assert_array_equal(sequence.elapsed(Sequence(mask)), [[1, 0, 1]])
    both = sequence.elapsed(Sequence(mask, None, dt))
    np.testing.assert_array_equal(both, [[0.5, 0, 2]])


def test_sequence_is_a_pytree_with_a_static_flag():
    given = Sequence(mask=jnp.ones((1, 2), bool), compacted=True)
    leaves, tree = jax.tree.flatten(given)
    assert len(leaves) == 1 and jax.tree.unflatten(tree, leaves).compacted


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (jnp.ones(3), None, r"x: must be \[B, L, ...\], got shape \(3,\)"),
        (jnp.ones((2, 0, 1)), None, r"x: the length L must be at least 1"),
        (jnp.ones((2, 3, 1)), {"mask": 1}, r"sequence: must be a ssm.Sequence"),
        (
            jnp.ones((2, 3, 1)),
            Sequence(mask=jnp.ones((2, 4), bool)),
            r"mask: must have shape \[B, L\] = \(2, 3\), got \(2, 4\)",
        ),
        (
            jnp.ones((2, 3, 1)),
            Sequence(reset=jnp.ones((2, 3))),
            r"reset: must be bool, got float32",
        ),
        (
            jnp.ones((2, 3, 1)),
            Sequence(dt=jnp.ones((2, 3), int)),
            r"dt: must be floating, got int32",
        ),
    ],
)
def test_bad_input_names_the_argument(x, given, message):
    with pytest.raises(ValueError, match=message):
        sequence.check(x, given)
