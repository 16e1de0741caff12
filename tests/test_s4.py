"""S4 and DSS beside their definitions and beside S4D."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import error, limit
from layers import DSS, S4, S4D, S5

H, B = 4, 2
CLOSE = limit("float32")


def with_variables(layer, x, seed=0):
    variables = jax.jit(layer.init)({"params": jax.random.key(seed)}, x)
    return nn.unbox(variables)


def inputs(length, seed=1):
    return jax.random.normal(jax.random.key(seed), (B, length, H))


def stepped(layer, variables, x):
    """Token by token from the zero state."""

    def one(state, token):
        y, state = layer.apply(variables, token[:, None], state)
        return state, y[:, 0]

    _, y = jax.lax.scan(one, layer.init_state(B), x.swapaxes(0, 1))
    return y.swapaxes(0, 1)


@pytest.mark.parametrize(("measure", "length"), [("legs", 97), ("legt", 40)])
def test_a_call_longer_than_length_equals_stepping(measure, length):
    layer = S4(H, 16, 8, measure=measure, rank=2)
    x = inputs(length)
    variables = with_variables(layer, x)
    y = jax.jit(lambda x: layer.apply(variables, x)[0])(x)
    assert error(y, jax.jit(lambda x: stepped(layer, variables, x))(x)) < CLOSE


@pytest.mark.slow
def test_the_first_taps_do_not_depend_on_length():
    """C~ is trained at `length`; the filter it stands for is that of C."""
    x = inputs(20)
    short = S4(H, 20, 8)
    long = S4(H, 64, 8)
    y = []
    for layer in (short, long):
        variables = with_variables(layer, x)
        y.append(layer.apply(variables, x)[0])
    assert error(*y) < CLOSE


@pytest.mark.slow
def test_without_low_rank_it_is_s4d():
    """P = 0 and the bilinear rule: C from C~, the eigenvalues and B of S4."""
    x = inputs(24)
    s4 = S4(H, 24, 8)
    variables = with_variables(s4, x)
    params = dict(variables["params"])
    params["P"] = jnp.zeros_like(params["P"])
    lam = -jnp.exp(params["A_re"]) + 1j * params["A_im"]
    z = jnp.exp(params["log_dt"])[:, None] * lam
    decay = (1 + z / 2) / (1 - z / 2)
    C_tilde = params["C"][0, ..., 0] + 1j * params["C"][0, ..., 1]
    C = C_tilde / (1 - decay**24)
    s4d = S4D(H, 8, discretization="bilinear")
    same = {k: params[k] for k in ("A_re", "A_im", "B", "D", "log_dt")}
    same["C"] = jnp.stack([C.real, C.imag], -1)[None]
    y, _ = s4.apply({"params": params}, x)
    expected, _ = s4d.apply({"params": same}, x)
    assert error(y, expected) < CLOSE


@pytest.mark.slow
def test_dss_exp_is_s4d_without_the_other_half():
    """DSS sums C, S4D 2 C, over one of each conjugate pair."""
    x = inputs(24)
    dss = DSS(H, 24, 8, variant="exp")
    params = dict(with_variables(dss, x)["params"])
    y, _ = dss.apply({"params": params}, x)
    n = params["A_re"].shape[-1]
    s4d = S4D(H, 8, copies=1)
    params["C"] = params["C"] / 2
    params["B"] = jnp.tile(jnp.array([1.0, 0.0]), (1, n, 1))
    expected, _ = s4d.apply({"params": params}, x)
    assert error(y, expected) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("real", [-0.5, 0.0, 3.0])
def test_dss_softmax_is_a_softmax(real):
    """K = Re sum_n C_n / lam_n softmax_l(a_n l), for decaying, neutral and growing
    modes, over the whole length and less."""
    length = 33
    layer = DSS(H, length, 6, dt_min=0.05, dt_max=0.4)
    impulse = jnp.zeros((B, length, H)).at[:, 0].set(1.0)
    params = dict(with_variables(layer, impulse)["params"])
    params["A_re"] = jnp.full_like(params["A_re"], real)
    params["D"] = jnp.zeros_like(params["D"])
    K, _ = layer.apply({"params": params}, impulse)
    lam = np.asarray(params["A_re"] + 1j * params["A_im"], np.complex128)
    a = np.exp(np.asarray(params["log_dt"], np.float64))[:, None] * lam
    powers = np.exp(a[..., None] * np.arange(length))
    softmax = powers / powers.sum(-1, keepdims=True)
    C = np.asarray(params["C"][0, ..., 0] + 1j * params["C"][0, ..., 1])
    expected = ((C / lam)[..., None] * softmax).sum(1).real
    assert error(K[0].T, expected) < CLOSE
    shorter, _ = layer.apply({"params": params}, impulse[:, :20])
    assert error(shorter[0].T, expected[:, :20]) < CLOSE
    recurrent = stepped(layer, {"params": params}, impulse)
    assert error(recurrent[0].T, expected) < 10 * CLOSE


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: S4D(H, 8, step_scale=scale),
        lambda scale: DSS(H, 64, 8, variant="exp", step_scale=scale),
        lambda scale: S5(H, 8, step_scale=scale),
    ],
    ids=["s4d", "dss", "s5"],
)
def test_half_the_sampling_rate_is_exact_for_a_held_input(make):
    """A fine input that repeats every sample, read at every second output, is the
    coarse input with the step doubled."""
    coarse = inputs(16)
    fine = jnp.repeat(coarse, 2, axis=1)
    variables = with_variables(make(1.0), fine)
    without_skip = {
        "params": {**variables["params"], "D": jnp.zeros_like(variables["params"]["D"])}
    }
    y_fine, _ = make(1.0).apply(without_skip, fine)
    y_coarse, _ = make(2.0).apply(without_skip, coarse)
    assert error(y_coarse, y_fine[:, 1::2]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda scale: S4(H, 128, 8, dt_max=1e-2, step_scale=scale),
        lambda scale: DSS(H, 128, 8, dt_max=1e-2, step_scale=scale),
    ],
    ids=["s4", "dss"],
)
def test_half_the_rate_is_close_where_no_hold_is_assumed(make):
    """The bilinear rule and the softmax are exact for no input; dt is small."""
    t = jnp.arange(128) / 128
    fine = jnp.tile(jnp.sin(12 * t + 1)[None, :, None], (B, 1, H))
    variables = with_variables(make(1.0), fine)
    params = {**variables["params"], "D": jnp.zeros((H,))}
    y_fine, _ = make(1.0).apply({"params": params}, fine)
    y_coarse, _ = make(2.0).apply({"params": params}, fine[:, ::2])
    wrong, _ = make(1.0).apply({"params": params}, fine[:, ::2])
    assert error(y_coarse, y_fine[:, ::2]) < 0.1
    assert error(wrong, y_fine[:, ::2]) > 0.2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (S4(H, 0), "length: must be at least 1, got 0"),
        (S4(H, 8, state_size=5), "state_size: must be even and at least 2, got 5"),
        (S4(H, 8, measure="lgs"), "measure: .*'lgs'"),
        (S4(H, 8, measure="legt"), "rank: must be 2 to 3 for 'legt', got 1"),
        (S4(H, 8, copies=3), "copies: must divide features = 4, got 3"),
        (S4(H, 8, step_scale=0.0), "step_scale: must be positive, got 0.0"),
        (
            DSS(H, 8, variant="tanh"),
            r"variant: must be .* got 'tanh'",
        ),
        (DSS(H, 0), "length: must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init({"params": jax.random.key(0)}, inputs(8))
