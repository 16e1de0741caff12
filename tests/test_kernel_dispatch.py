"""The choice of a backend, and the tolerance table."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import compat, dispatch
from kernels.check.cases import OPERATIONS
from kernels.tolerance import assert_close, error, limit


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(dispatch, "_excluded", {})
    monkeypatch.setattr(dispatch, "_chosen", {})


@pytest.fixture
def made_up(monkeypatch):
    """Operations and backends of these tests alone."""
    monkeypatch.setattr(dispatch, "OPERATIONS", ("op", "other"))
    monkeypatch.setattr(dispatch, "_table", lambda op: TABLE)


def backend(reason=None):
    return SimpleNamespace(unsupported=lambda *arguments: reason)


FAST, SLOW = backend("needs a GPU"), backend()
TABLE = {"fast": FAST, "slow": SLOW}


def test_default_is_the_first_that_can_run():
    assert dispatch.pick("op", TABLE, None) is SLOW
    assert dispatch.pick("op", {"slow": SLOW, "fast": FAST}, None) is SLOW
    fast = backend()
    assert dispatch.pick("op", {"fast": fast, "slow": SLOW}, None) is fast


def test_arguments_decide():
    picky = SimpleNamespace(
        unsupported=lambda x: "only even" if x % 2 else None,
    )
    table = {"picky": picky, "slow": SLOW}
    assert dispatch.pick("op", {"picky": picky}, None, 2) is picky
    assert dispatch.pick("op", table, None, 3) is SLOW


def test_named_backend_never_falls_back():
    words = r"op: backend 'fast' cannot run; .*'fast': needs a GPU; 'slow': can run"
    with pytest.raises(ValueError, match=words):
        dispatch.pick("op", TABLE, "fast")
    words = (
        r"op: backend must be one of \['fast', 'slow'\], got 'quick'; "
        r".*'fast': needs a GPU; 'slow': can run"
    )
    with pytest.raises(ValueError, match=words):
        dispatch.pick("op", TABLE, "quick")


def test_nothing_can_run():
    with pytest.raises(ValueError, match=r"op: no backend can run; .*needs a GPU"):
        dispatch.pick("op", {"fast": FAST}, None)


def test_excluded_backend_is_not_the_default_but_can_be_named(made_up):
    fast = backend()
    table = {"fast": fast, "slow": SLOW}
    kernels.exclude("op", "fast", "wrong gradient here")
    assert dispatch.pick("op", table, None) is SLOW
    assert dispatch.pick("other", table, None) is fast
    assert dispatch.pick("op", table, "fast") is fast
    assert dispatch.pick("op", table, None) is SLOW
    name, reason = kernels.backend_report()["op"]
    assert name == "slow"
    assert "fast: wrong gradient here" in reason
    kernels.exclude("op", "slow", "too slow")
    with pytest.raises(ValueError, match=r"'fast': wrong.*'slow': too slow"):
        dispatch.pick("op", table, None)


def test_preferred_backend_is_as_good_as_named(made_up):
    with kernels.prefer(op="slow", other="fast"):
        with kernels.prefer(other="slow"):
            assert dispatch.pick("other", TABLE, None) is SLOW
        assert dispatch.pick("op", {"able": backend(), "slow": SLOW}, None) is SLOW
        with pytest.raises(ValueError, match="other: backend 'fast' cannot run"):
            dispatch.pick("other", TABLE, None)
    assert dispatch.pick("other", TABLE, None) is SLOW


def test_unknown_names_are_refused():
    assert {*OPERATIONS} == {*dispatch.OPERATIONS}
    for call in (
        kernels.exclude,
        lambda *names: kernels.prefer(**{names[0]: names[1]}),
    ):
        name = "exclude" if call is kernels.exclude else "prefer"
        with pytest.raises(ValueError, match=f"{name}: operation must be one of .*scn"):
            enter(call("linear_scn", "xla", "why"))
        words = f"{name}: backend of cauchy must be one of triton, xla, ref.*'pallas'"
        with pytest.raises(ValueError, match=words):
            enter(call("cauchy", "pallas", "why"))
    with pytest.raises(ValueError, match=r"linear_scan: backend must be .*, got ''"):
        kernels.linear_scan(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), backend="")


def enter(context):
    with context:
        pass


def test_a_preference_acts_when_a_call_is_traced():
    scan = jax.jit(lambda x: kernels.linear_scan(x, x)[0])
    x = jnp.ones((1, 2, 1))
    with kernels.prefer(linear_scan="reference"):
        scan(x)
    scan(x)
    assert kernels.backend_report()["linear_scan"][0] == "reference"


def test_a_backend_for_another_platform_waits_to_be_named(monkeypatch):
    """Its module is imported when it is named, not before."""
    monkeypatch.setattr(compat, "platform", lambda: "cpu")
    missing = dispatch.OnPlatform("no.such.module", "tpu", lambda: None)
    table = {"tpu": missing, "slow": SLOW}
    assert dispatch.pick("op", table, None) is SLOW
    _, reason = kernels.backend_report()["op"]
    assert "tpu: for tpu, would be interpreted here" in reason
    with pytest.raises(ModuleNotFoundError, match="no"):
        dispatch.pick("op", table, "tpu")
    monkeypatch.setattr(compat, "platform", lambda: "tpu")
    monkeypatch.setattr(compat, "partitioned_by_xla", lambda: True)
    assert dispatch.pick("op", table, None) is SLOW
    assert "outside jax.shard_map" in kernels.backend_report()["op"][1]


def test_triton_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton", reason="the reason would be that it is missing")
    monkeypatch.setattr(compat, "platform", lambda: "cpu")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, or TRITON_INTERPRET"):
        kernels.linear_scan(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), backend="triton")


def test_report_and_one_log_line(caplog):
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        for _ in range(3):
            kernels.linear_scan(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)))
    assert kernels.backend_report()["linear_scan"][0] == "xla"
    assert len(caplog.records) == 1
    assert "linear_scan: backend xla" in caplog.text


def test_error_is_relative_to_the_largest_entry():
    assert error(np.array([1.0, 10.0]), np.array([1.5, 10.0])) == pytest.approx(0.05)
    assert error(np.array([0.25]), np.array([0.0])) == 0.25
    assert error(np.array([1j]), np.array([2j])) == 0.5
    assert error(np.ones(2), np.ones(3)) == np.inf
    assert error(np.array([np.nan]), np.ones(1)) == np.inf
    assert error(np.ones(1), np.array([np.inf])) == np.inf
    assert error(np.ones((2, 0)), np.ones((2, 0))) == 0


def test_assert_close_names_the_leaf():
    good = {"a": np.ones(2, np.float32), "b": (np.ones(1),)}
    assert_close(good, good)
    bad = {"a": np.ones(2, np.float32), "b": (np.full(1, 1.5),)}
    with pytest.raises(AssertionError, match=r"\['b'\]\[0\]: error 0.5, limit 1e-11"):
        assert_close(bad, good)
    with pytest.raises(AssertionError, match="shapes"):
        assert_close(np.ones(2), np.ones(3))
    with pytest.raises(AssertionError, match="structures differ"):
        assert_close((1.0, 2.0), [1.0, 2.0])
    off = np.float32([1 + 5e-5])
    assert_close(off, np.ones(1), "gradient")
    with pytest.raises(AssertionError, match="limit 2e-05"):
        assert_close(off, np.ones(1))
    assert_close(off, np.ones(1), dtype="bfloat16")


def test_limits():
    assert limit("complex64", "gradient") == limit(jnp.float32, "gradient")
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .* got int8"):
        limit("int8")
    with pytest.raises(ValueError, match="kind must be"):
        limit("float32", "speed")
