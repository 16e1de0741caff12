"""`mesh.sequence`: a sequence that is spread over devices is what it is on one.

On eight emulated devices, in a process of its own (`test_eight_devices`).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import ALONE, DEVICES, THERE, passed
from jax.sharding import AxisType, PartitionSpec

from kernels import (
    backend_report,
    chunked_scan,
    fft_conv,
    linear_scan,
    selective_scan,
    shards,
    short_conv,
)
from kernels.tolerance import assert_close
from layers import facts, laws, spread_attention
from layers.attention import Attention
from layers.frames.frame_attention import FrameAttention, FullFrameAttention
from layers.laws.examples import CASES
from ssm import parallel

QUICK = ("s5", "gated_delta_net", "s4d")
AXIS = ("sequence",)
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)


@ALONE
def test_eight_devices():
    count = len(QUICK) + len(QUICK_FORMS) + len(SENT) + len(OWN)
    assert passed(__file__, "test_quick or is_sent or of_ones_own") == count


@ALONE
@pytest.mark.slow
def test_eight_devices_every_layer():
    assert passed(__file__, "test_every") == len(CASES) + len(FORMS)


def mesh():
    return jax.make_mesh((len(jax.devices()),), AXIS, axis_types=(AxisType.Auto,))


def holds(layer):
    (finding,) = laws.examine(layer, only=["sequence axis"])
    assert finding.passed, finding
    return finding


@THERE
@pytest.mark.parametrize("name", QUICK)
def test_quick(name):
    assert holds(CASES[name]()).error is not None


@THERE
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layer(name):
    layer = CASES[name]()
    assert (holds(layer).error is None) == bool(facts.why_sequential(layer))


BOTH_WAYS = dict(context=30, bidirectional=True)
# name -> (form, the tokens from which it is a ring, the layer)
FORMS = {
    "heads": ("heads", 8192, Attention(16, heads=8, context=30)),
    "heads, both ways": ("heads", 8192, Attention(16, heads=8, **BOTH_WAYS)),
    "keys": ("keys", 8192, Attention(16, heads=8, kv_heads=4, context=30)),
    "keys of a neighbour": ("keys", 1, Attention(6, heads=3, window=3)),
    "keys of a window": ("keys", 8192, Attention(6, heads=3, window=7)),
    "keys, both ways": ("keys", 8192, Attention(6, heads=3, **BOTH_WAYS)),
    "ring": ("ring", 1, Attention(6, heads=3, kv_heads=1, context=30)),
    "ring of a window": ("ring", 1, Attention(6, heads=3, window=7)),
    "ring, both ways": ("ring", 1, Attention(6, heads=3, **BOTH_WAYS)),
    "frames": ("keys", 8192, FrameAttention(6, (2, 2), heads=3, context=30)),
    "frames by heads": ("heads", 1, FullFrameAttention(8, (1, 2), 8, context=30)),
}


QUICK_FORMS = ("heads", "keys of a neighbour", "ring")


@THERE
@pytest.mark.parametrize("name", QUICK_FORMS)
def test_quick_form(name, monkeypatch):
    holds_in_its_form(name, monkeypatch)


@THERE
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_form(name, monkeypatch):
    holds_in_its_form(name, monkeypatch)


def holds_in_its_form(name, monkeypatch):
    form, ring, layer = FORMS[name]
    monkeypatch.setattr(spread_attention, "RING", ring)
    holds(layer)
    assert backend_report()["attention over devices"][0] == form


def inputs(length):
    draw = np.random.default_rng(0)

    def some(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    decay = -jnp.abs(some(2, length, 8))
    return some, decay, jnp.asarray(draw.random((2, length)) < 0.1)


def scans(length):
    """name -> a recurrence over the length and its first argument."""
    some, log_a, reset = inputs(length)
    x = some(2, length, 8)
    q, k, v = (some(2, length, 2, 4) for _ in range(3))
    beta = jax.nn.sigmoid(some(2, length, 2))
    A, B, C = -jnp.abs(some(8, 3)), some(2, length, 3), some(2, length, 3)
    return {
        "linear": (lambda x: linear_scan(jnp.exp(log_a), x, None, reset), x),
        "selective": (lambda x: selective_scan(x, -log_a, A, B, C, None, reset), x),
        "delta rule": (
            lambda v: chunked_scan(q, k / 2, v, None, beta, None, reset),
            v,
        ),
        "short convolution": (lambda x: short_conv(x, jnp.ones((8, 4))), x),
    }


SENT = tuple(scans(8))


@THERE
@pytest.mark.parametrize("name", SENT)
def test_what_is_sent(name):
    """The same at two lengths, and with gradients too."""

    def sent(length):
        call, x = scans(length)[name]

        def total(x):
            with shards.over(some, time=AXIS):
                return jnp.sum(call(x)[0] ** 2)

        x = jax.device_put(x, jax.NamedSharding(some, PartitionSpec(None, AXIS)))
        text = jax.jit(jax.value_and_grad(total)).lower(x).compile().as_text()
        return sorted(COLLECTIVE.findall(text))

    some = mesh()
    found = sent(16 * DEVICES)
    assert found and found == sent(64 * DEVICES)


def own(name, length=16 * DEVICES):
    """What `ssm.parallel` is for: in a `jax.shard_map` of one's own. Its function of a
    part of x, and what that is on one device."""
    some, log_a, reset = inputs(length)
    x, state, k = some(2, length, 8), some(2, 8), some(8, length)
    if name == "scan":

        def part(x, log_a, reset):
            def call(state, **how):
                return linear_scan(jnp.exp(log_a), x, state, reset, **how)

            y, _ = parallel.scan(
                AXIS, call, state, reverse=False, return_transition=False
            )
            return y

        whole = linear_scan(jnp.exp(log_a), x, state, reset)[0]
    else:

        def part(x, log_a, reset):
            u = parallel.to_channels(AXIS, x)
            taps = k[jax.lax.axis_index(AXIS)][None]
            return parallel.to_time(AXIS, fft_conv(u, taps)[0])

        whole = fft_conv(x, k)[0]
    return part, (x, log_a, reset), whole


OWN = ("scan", "convolution")


@THERE
@pytest.mark.parametrize("name", OWN)
def test_in_a_shard_map_of_ones_own(name):
    part, arrays, whole = own(name)
    spec = PartitionSpec(None, AXIS)
    run = functools.partial(jax.shard_map, mesh=mesh(), in_specs=spec, out_specs=spec)
    assert_close(jax.jit(run(part))(*arrays), whole)
