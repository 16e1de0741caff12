import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from train import losses

RNG = np.random.default_rng(0)


def batch(targets, mask):
    return {"targets": jnp.asarray(targets), "mask": jnp.asarray(mask)}


def evaluate(loss, outputs, batch, **options):
    loss_fn = jax.jit(losses.make(loss, **options))
    total, weight, metrics = loss_fn(jnp.asarray(outputs), batch)
    return float(total), float(weight), {k: float(v) for k, v in metrics.items()}


def test_classification_counts_only_rows_with_a_real_token():
    outputs = RNG.normal(size=(3, 5)).astype(np.float32)
    targets = np.array([1, 4, 2])
    mask = np.array([[True, False], [False, False], [True, True]])
    total, weight, metrics = evaluate("classification", outputs, batch(targets, mask))
    log_p = log_softmax(outputs, axis=-1)
    assert weight == 2
    np.testing.assert_allclose(total, -log_p[0, 1] - log_p[2, 2], rtol=1e-6)
    hits = sum(outputs[row].argmax() == targets[row] for row in (0, 2))
    assert metrics == {"accuracy": hits}


def test_token_loss_skips_masked_and_ignored_tokens():
    outputs = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    targets = np.array([[0, -1, 3], [2, 1, 1]])
    mask = np.array([[True, True, True], [True, False, False]])
    total, weight, _ = evaluate("token", outputs, batch(targets, mask))
    log_p = log_softmax(outputs, axis=-1)
    expected = -(log_p[0, 0, 0] + log_p[0, 2, 3] + log_p[1, 0, 2])
    assert weight == 3
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_token_accuracy_is_a_count():
    outputs = jax.nn.one_hot(jnp.array([[0, 1, 2, 3]]), 4)
    targets = np.array([[0, 1, 3, -1]])
    _, weight, metrics = evaluate(
        "token", outputs, batch(targets, np.ones((1, 4), bool))
    )
    assert (metrics["accuracy"], weight) == (2, 3)


def test_sequence_accuracy_counts_the_tokens_of_sequences_that_are_all_right():
    outputs = jax.nn.one_hot(jnp.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]), 4)
    targets = np.array([[0, -1, 2, 0], [0, 1, 3, -1], [1, 1, 1, 1]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    _, weight, metrics = evaluate("token", outputs, batch(targets, mask))
    assert weight == 5 and metrics == {"accuracy": 4, "sequence_accuracy": 2}


def test_label_smoothing_mixes_in_the_uniform_distribution():
    outputs = RNG.normal(size=(1, 6)).astype(np.float32)
    data = batch(np.array([2]), np.ones((1, 1), bool))
    total, _, _ = evaluate("classification", outputs, data, label_smoothing=0.1)
    log_p = log_softmax(outputs[0])
    np.testing.assert_allclose(total, -0.9 * log_p[2] - 0.1 * log_p.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "outputs_shape", [(3, 2), (3, 1), (3, 4, 2), (3, 4, 1)], ids=str
)
def test_regression_is_the_mean_squared_error_of_real_items(outputs_shape):
    outputs = RNG.normal(size=outputs_shape).astype(np.float32)
    targets = RNG.normal(size=outputs_shape).astype(np.float32)
    mask = np.array([[True] * 4, [True, False, True, False], [False] * 4])
    squeezed = targets[..., 0] if outputs_shape[-1] == 1 else targets
    total, weight, metrics = evaluate("regression", outputs, batch(squeezed, mask))
    real = mask if len(outputs_shape) == 3 else mask.any(1)
    error = (outputs - targets)[real]
    assert weight == real.sum()
    np.testing.assert_allclose(total, (error**2).mean(-1).sum(), rtol=1e-5)
    absolute = np.abs(error).mean(-1).sum()
    np.testing.assert_allclose(metrics["absolute_error"], absolute, rtol=1e-5)


def test_float32_whatever_the_outputs():
    # In bfloat16 log 2 has an error of 0.2 %, and a count of ones stops at 256.
    outputs = jnp.zeros((1024, 2), jnp.bfloat16)
    data = batch(np.zeros(1024, int), np.ones((1024, 1), bool))
    loss_fn = losses.make("classification")
    total, weight, _ = loss_fn(outputs, data)
    assert total.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(total, 1024 * np.log(2), rtol=1e-5)


@pytest.mark.parametrize("loss", ["classification", "token", "regression"])
def test_nan_at_padding_reaches_neither_value_nor_gradient(loss):
    shape = (2, 3, 4) if loss == "token" else (2, 4)
    outputs = jnp.asarray(RNG.normal(size=shape)).at[1].set(jnp.nan)
    mask = np.array([[True] * 3, [False] * 3])
    targets = np.zeros(shape if loss == "regression" else shape[:-1])
    kind = float if loss == "regression" else int
    data = batch(targets.astype(kind), mask)
    loss_fn = losses.make(loss)
    total, gradient = jax.jit(
        jax.value_and_grad(lambda outputs: loss_fn(outputs, data)[0])
    )(outputs)
    assert jnp.isfinite(total) and jnp.isfinite(gradient).all()
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        ("classification", (2, 3, 4), (2,)),
        ("classification", (2, 3, 4), (2, 3)),
        ("token", (2, 4), (2, 3)),
        ("token", (2, 4), (2,)),
        ("regression", (2, 3, 1), (2,)),
        ("regression", (2, 1), (2, 3)),
    ],
)
def test_wrong_head_is_named(loss, outputs, targets):
    data = batch(np.zeros(targets, int), np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"outputs must be .*model\.head"):
        losses.make(loss)(jnp.zeros(outputs), data)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"classification, token, regression.*'ce'"):
        losses.make("ce")
    with pytest.raises(ValueError, match=r"label_smoothing.*1\.5"):
        losses.make("token", label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing.*regression"):
        losses.make("regression", label_smoothing=0.1)


def test_every_loss_has_an_end_and_knows_what_is_better():
    from train.endings import ENDINGS

    assert ENDINGS.keys() == losses.LOSSES.keys()
    low, high = ({k: x for k in ("loss", "accuracy", "mse")} for x in (0.1, 0.9))
    assert losses.LOSSES["token"].better(high, low)
    assert not losses.LOSSES["token"].better(low, low)
    assert losses.LOSSES["regression"].better(low, high)
