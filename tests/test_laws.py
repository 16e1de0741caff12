"""Every layer obeys every law that applies; a layer that breaks one is caught."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import linear_scan, shards
from layers import S5, facts, laws
from layers.checks import checked
from layers.facts import L
from layers.laws import __main__ as command
from layers.laws import examples
from layers.parameters import at_least_float32
from ssm import sequence as seq

STATES = {"one call = pieces = steps", "no state, gradients", "causality"}
STATES |= {"lax.scan over calls", "elapsed time, gradients"}
RESETS = {"packing", "packing, gradients", "reset on a masked token"}
RESETS |= {"reset everywhere", "isolation"}
TIMES = {"elapsed time", "elapsed time, gradients"}
OF_DEVICES = ("sharding", "sequence axis")  # of more than one


def not_applied(name):
    """The laws that say nothing about a case."""
    missing = set(OF_DEVICES) if jax.local_device_count() == 1 else set()
    if facts.why_sequential(examples.CASES[name]()):
        missing |= {"sequence axis"}
    if "bidirectional" in name or name == "flash_butterfly":
        missing |= STATES
    # What is declared is refused, and nothing else: the law of refusals.
    if "dt" in getattr(examples.CASES[name](), "REFUSES", ()):
        missing |= TIMES
    return missing | (RESETS if name == "flash_butterfly" else set())


def holds(layer, only=None, length=L):
    """The laws that said nothing; fails where one does not hold."""
    findings = laws.examine(layer, length, only=only)
    assert [f for f in findings if not f.passed] == []
    return {f.law for f in findings if f.error is None}


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.CASES)
def test_every_law_holds(name):
    assert holds(examples.CASES[name]()) == not_applied(name)


# One of each way to compute, and the laws that compile little; all others take minutes.
QUICK = ("refusals", "one call = pieces = steps", "packing", "isolation", "rows")


@pytest.mark.parametrize(
    "name", ["s5", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_laws_of_values_hold(name):
    assert holds(examples.CASES[name](), QUICK) == not_applied(name) & set(QUICK)


@pytest.mark.slow
def test_laws_of_gradients_hold():
    only = ("padding, gradients", "packing, gradients", "shard_map", "x64")
    assert holds(examples.CASES["lru"](), only) == set()


ACROSS = ("mamba", "mamba2", "gla", "gated_delta_net", "rg_lru")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["s4", "dss", "s4d", "s4d bilinear", "s5", "lru", *ACROSS]
)
def test_laws_hold_across_chunks(name):
    """Longer than the chunks in which states exist at once. In bfloat16 the norm of a
    head enlarges the rounding of the one token among so many whose output vanishes."""
    length = 600 if name in ("s5", "lru") else 300
    exact = [law for law in laws.LAWS if law not in ("bfloat16", "length")]
    holds(examples.CASES[name](), exact, length)


@pytest.mark.parametrize(
    ("seconds", "memory", "tokens"),
    [
        ((0.002, 0.02), (10**4, 10**5), 2**16),
        ((0.0001, 0.2), (10**4, 10**5), 2**12),  # quadratic
        ((0.1, 0.27), (10**4, 10**5), 2**16),  # a long, linear call
        ((0.5, 9.7), (10**4, 10**5), 2**10),  # quadratic; the first call was disturbed
        ((0.002, 0.02), (10**5, 2**27), 2**12),
    ],
    ids=str,
)
def test_a_length_that_takes_a_while_is_not_tried(seconds, memory, tokens):
    assert laws._most(seconds, memory) == tokens


class Decay(nn.Module):
    """h[t] = exp(-dt[t] / 2) h[t-1] + scale u[t], y = h: it obeys every law."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        sequence = checked(self, x, state, sequence)
        state = self.zeros(x.shape[0]) if state is None else state
        y, state = self.mixed(x.astype(at_least_float32(self.dtype)), state, sequence)
        return seq.zero_masked(y, sequence).astype(self.dtype), state

    def mixed(self, x, state, sequence):
        u = seq.zero_masked(x, sequence) * self.scale()
        return linear_scan(self.decay(u, sequence), u, state, reset=sequence.reset)

    def scale(self):
        return self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)

    @nn.nowrap
    def decay(self, u, sequence):
        elapsed = seq.elapsed(sequence)
        elapsed = jnp.ones(u.shape[:2], u.dtype) if elapsed is None else elapsed
        elapsed = elapsed.astype(u.dtype)[..., None]
        return jnp.broadcast_to(jnp.exp(-elapsed / 2), u.shape)

    @nn.nowrap
    def init_state(self, batch_size):
        return self.zeros(batch_size)

    @nn.nowrap
    def zeros(self, batch_size):
        return jnp.zeros((batch_size, self.features), at_least_float32(self.dtype))


def test_a_sound_layer_of_a_users_own_holds():
    slow = ("length", "jit", *OF_DEVICES)
    quick = [law for law in laws.LAWS if law not in slow]
    assert holds(Decay(2), quick) == set()


# Each breaks the law beside it in FAULTS.


class Peeking(Decay):
    """Subtracts the mean of the whole call: neither causal nor composable."""

    def mixed(self, x, state, sequence):
        y, state = super().mixed(x, state, sequence)
        return y - x.mean(axis=1, keepdims=True), state


class Leaky(Decay):
    """Forgets about masks and resets."""

    def mixed(self, x, state, sequence):
        return super().mixed(x, state, seq.Sequence(dt=sequence.dt))


class SilentlyUndeclared(Decay):
    """Refuses elapsed times without saying so."""

    def mixed(self, x, state, sequence):
        if sequence.dt is not None:
            raise ValueError("dt: there is no time here")
        return super().mixed(x, state, sequence)


class Boasting(Decay):
    """Declares a refusal that is none."""

    REFUSES = ("dt",)


class Forgetful(Decay):
    """A state that cannot be asked for, without saying so."""

    @nn.nowrap
    def init_state(self, batch_size):
        raise ValueError("init_state: not today")


class Careless(Decay):
    """Takes any input."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        state = self.zeros(x.shape[0]) if state is None else state
        return self.mixed(x, state, sequence or seq.Sequence())


class Started(Decay):
    """Without a state there are no gradients."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        x = jax.lax.stop_gradient(x) if state is None else x
        return super().__call__(x, state, sequence, train)


class CutByResets(Decay):
    """Resets cut all gradients."""

    def mixed(self, x, state, sequence):
        x = x if sequence.reset is None else jax.lax.stop_gradient(x)
        return super().mixed(x, state, sequence)


class LosingResets(Decay):
    """A reset on a masked token is none."""

    def mixed(self, x, state, sequence):
        mask, reset = sequence.mask, sequence.reset
        if mask is not None and reset is not None:
            sequence = seq.Sequence(mask, reset & mask, sequence.dt)
        return super().mixed(x, state, sequence)


class Multiplying(Decay):
    """Resets by a factor of 0, which NaN survives."""

    def mixed(self, x, state, sequence):
        u = seq.zero_masked(x, sequence) * self.scale()
        a = self.decay(u, sequence)
        if sequence.reset is not None:
            a = a * ~sequence.reset[..., None]
        y, state = (
            jax.lax.associative_scan(
                lambda one, two: (one[0] * two[0], one[1] * two[0] + two[1]),
                (a, u.at[:, 0].add(a[:, 0] * state)),
                axis=1,
            )[1],
            None,
        )
        return y, y[:, -1]


def first_row(sequence):
    def spread(field):
        return None if field is None else jnp.broadcast_to(field[:1], field.shape)

    return seq.Sequence(spread(sequence.mask), spread(sequence.reset), sequence.dt)


class FirstRow(Decay):
    """Every row has the mask and the resets of the first."""

    def mixed(self, x, state, sequence):
        return super().mixed(x, state, first_row(sequence))


class FirstState(Decay):
    """Every row has the state of the first."""

    def mixed(self, x, state, sequence):
        state = jnp.broadcast_to(state[:1], state.shape)
        return super().mixed(x, state, sequence)


class FirstTime(Decay):
    """Every row has the elapsed times of the first."""

    def mixed(self, x, state, sequence):
        if sequence.dt is not None:
            dt = jnp.broadcast_to(sequence.dt[:1], sequence.dt.shape)
            sequence = seq.Sequence(sequence.mask, sequence.reset, dt)
        return super().mixed(x, state, sequence)


class Mixing(Decay):
    """Subtracts the mean of the batch."""

    def mixed(self, x, state, sequence):
        return super().mixed(x - x.mean(axis=0), state, sequence)


class Timeless(Decay):
    """Takes elapsed times and ignores them."""

    def mixed(self, x, state, sequence):
        sequence = seq.Sequence(sequence.mask, sequence.reset)
        return super().mixed(x, state, sequence)


class ConstantTime(Decay):
    """Elapsed times have no gradient."""

    @nn.nowrap
    def decay(self, u, sequence):
        return jax.lax.stop_gradient(super().decay(u, sequence))


class Rescaled(Decay):
    """Sums in the units of the first token, which overflow in a long call."""

    def mixed(self, x, state, sequence):
        growth = jnp.exp(jnp.arange(x.shape[1], dtype=x.dtype) / 100)[:, None]
        y = (jnp.cumsum(x * growth, axis=1) + state[:, None]) / growth
        return y * self.scale(), y[:, -1] * jnp.exp(-0.01).astype(x.dtype)


class Lengthening(Decay):
    """Counts its tokens in float32: off after many, whatever the cut."""

    def mixed(self, x, state, sequence):
        turn = jnp.arange(x.shape[1], dtype=x.dtype) * jnp.asarray(0.1, x.dtype)
        y, state = super().mixed(x, state, sequence)
        return y + jnp.sin(turn)[:, None] / 10, state


class Heavy(Decay):
    """The output is float32 whatever its dtype."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        y, state = super().__call__(x, state, sequence, train)
        return y.astype(jnp.float32), state


class Widening(Decay):
    """A parameter of whatever width a Python float has."""

    def scale(self):
        return self.param("scale", lambda key: jnp.ones(self.features, float))


class Looking(Decay):
    """Does something else where it is compiled."""

    def mixed(self, x, state, sequence):
        x = 2 * x if isinstance(x, jax.core.Tracer) else x
        return super().mixed(x, state, sequence)


class Crowded(Decay):
    """Is silent before a single row."""

    def mixed(self, x, state, sequence):
        return super().mixed(x * (x.shape[0] > 1), state, sequence)


class Counting(Decay):
    """Is different in every program."""

    programs = itertools.count(1)

    def mixed(self, x, state, sequence):
        return super().mixed(x * next(Counting.programs), state, sequence)


class Doubled(Decay):
    """Two states in one buffer, which cannot be donated."""

    def mixed(self, x, state, sequence):
        y, state = super().mixed(x, state[0], sequence)
        return y, (state, state * 1)

    @nn.nowrap
    def zeros(self, batch_size):
        return (super().zeros(batch_size),) * 2


class Unvarying(Decay):
    """Loops from zeros that belong to no device."""

    def mixed(self, x, state, sequence):
        def add(total, token):
            return total + token, total

        zeros = jnp.zeros(x.shape[::2], x.dtype)
        jax.lax.scan(add, zeros, jnp.moveaxis(x, 1, 0))
        return super().mixed(x, state, sequence)


@jax.custom_vjp
def passed_on(state):
    return state


passed_on.defvjp(
    lambda state: (state, None),
    # Inside of a map over devices only: there a value varies over the axis.
    lambda _, slope: ((2.0 if jax.typeof(slope).vma else 1.0) * slope,),
)


class TwiceInside(Decay):
    """The gradient of the state is twice as large in `jax.shard_map`."""

    def mixed(self, x, state, sequence):
        return super().mixed(x, passed_on(state), sequence)


FAULTS = {
    "refusals": (SilentlyUndeclared, Boasting, Forgetful),
    "bad input": (Careless,),
    "one call = pieces = steps": (Peeking,),
    "no state, gradients": (Started,),
    "causality": (Peeking,),
    "padding": (Leaky, FirstRow),
    "padding, gradients": (Leaky,),
    "packing": (Leaky, FirstRow),
    "packing, gradients": (CutByResets,),
    "reset on a masked token": (LosingResets,),
    "reset everywhere": (Leaky,),
    "isolation": (Multiplying,),
    "rows": (FirstRow, FirstState, FirstTime),
    "batch": (Mixing,),
    "elapsed time": (Timeless, SilentlyUndeclared),
    "elapsed time, gradients": (ConstantTime, SilentlyUndeclared),
    "length": (Rescaled, Lengthening),
    "bfloat16": (Heavy,),
    "x64": (Widening,),
    "jit": (Looking,),
    "vmap": (Crowded,),
    "checkpoint": (Counting,),
    "lax.scan over calls": (Doubled,),
    "shard_map": (Unvarying, TwiceInside),
}


def test_every_law_has_a_fault_that_it_catches():
    assert laws.LAWS.keys() - FAULTS.keys() == {*OF_DEVICES}  # see below


@pytest.mark.parametrize(
    ("law", "fault"),
    [(law, fault) for law, faults in FAULTS.items() for fault in faults],
)
def test_a_fault_is_caught(law, fault):
    (finding,) = laws.examine(fault(2), only=[law])
    assert not finding.passed
    assert finding.where or finding.reason


def test_a_law_that_compares_nothing_does_not_hold(monkeypatch):
    monkeypatch.setitem(laws.LAWS, "rows", lambda case: iter(()))
    rows, refusals = laws.examine(Decay(2), only=["rows", "refusals"])
    assert not rows.passed and rows.reason == "it has compared nothing"
    assert refusals.passed


def test_only_the_laws_of_what_is_broken_catch_it():
    findings = {f.law: f for f in laws.examine(Leaky(2), only=QUICK)}
    assert not findings["packing"].passed and not findings["isolation"].passed
    for law in ("refusals", "one call = pieces = steps", "rows"):
        assert findings[law].passed, law


class FirstRowOfS5(S5):
    """An S5 in which every row has the mask and the resets of the first."""

    def __call__(self, x, state=None, sequence=None, train=False):
        sequence = None if sequence is None else first_row(sequence)
        return super().__call__(x, state, sequence, train)


def test_a_row_that_has_the_mask_of_another_is_caught():
    (finding,) = laws.examine(FirstRowOfS5(6, 8, 2), only=["rows"])
    assert not finding.passed and finding.where.startswith("row 1 alone")


def test_a_finding_says_why():
    only = ["elapsed time", "one call = pieces = steps"]
    findings = laws.examine(SilentlyUndeclared(2), only=only)
    assert findings[0].reason.startswith("ValueError: dt: there is no time here (test_")
    assert "pieces: output, row " in laws.examine(Peeking(2), only=only)[1].where


@pytest.mark.parametrize("refuses", ["dt", ("time",)])
def test_refusals_have_names(refuses):
    class Strange(Decay):
        REFUSES = refuses

    with pytest.raises(
        ValueError, match="REFUSES: must be a tuple of names among mask"
    ):
        laws.examine(Strange(2))


def test_lengths_are_whole_thirds():
    with pytest.raises(ValueError, match="length: must be a multiple of 3"):
        laws.examine(Decay(2), 14)


class Grounded(Decay):
    """Wants all on the first device."""

    def mixed(self, x, state, sequence):
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        x = jax.lax.with_sharding_constraint(x, place)
        return super().mixed(x, state, sequence)


class Parted(Decay):
    """Knows of the devices that its sequence is spread over."""

    def mixed(self, x, state, sequence):
        return super().mixed(x * shards.devices(shards.TIME), state, sequence)


TWO_DEVICES = """
import jax
from layers import laws
from layers.laws import examples
from tests import test_laws

assert jax.local_device_count() == 2
layers = [examples.CASES[name]() for name in {names}] or [test_laws.Decay(2)]
for layer in layers:
    assert test_laws.holds(layer, ["shard_map", *test_laws.OF_DEVICES]) == set()
assert not laws.examine(test_laws.Grounded(2), only=["sharding"])[0].passed
assert not laws.examine(test_laws.Parted(2), only=["sequence axis"])[0].passed
"""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="a user's"),
        pytest.param(["lru", "s5", "conv_s5"], marks=pytest.mark.slow),
    ],
)
def test_the_laws_of_two_devices(names):
    flags = os.environ.get("XLA_FLAGS", "")
    two = f"{flags} --xla_force_host_platform_device_count=2"
    root = Path(__file__).parents[1]
    environment = os.environ | {"XLA_FLAGS": two, "PYTHONPATH": str(root)}
    subprocess.run(
        [sys.executable, "-c", TWO_DEVICES.format(names=names)],
        cwd=root,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )


def test_command_names_the_layers(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--layer", "s6"])
    assert "got 's6'" in capsys.readouterr().err


def findings_of(layer, only):
    """As the command has them."""
    findings = {f.law: f for f in laws.examine(layer, only=only)}
    nothing = laws.Finding("", None, None, "not asked for")
    every = [findings.get(law, nothing._replace(law=law)) for law in laws.LAWS]
    return command.Examined(every, 1.0)


def test_the_tables_fit_a_terminal_and_say_why(capsys, monkeypatch):
    short = ["elapsed time", "reset everywhere"]
    made = {
        "attention bidirectional": findings_of(Leaky(2), short),
        "full_frame_attention": findings_of(SilentlyUndeclared(2), short),
    }
    monkeypatch.setattr(command, "_examined", made.get)
    monkeypatch.setattr(command, "CASES", {k: lambda k=k: k for k in made})
    monkeypatch.setattr(command, "cases_of", lambda name: {name: lambda: name})
    assert command.main(["--all"]) == 1
    table = capsys.readouterr().out
    assert command.main(["--layer", "attention bidirectional"]) == 1
    lines = capsys.readouterr().out
    for text in (table, lines):
        assert max(map(len, text.splitlines())) <= 80
        assert "all tokens: output, row" in " ".join(text.split())
        assert "failed: attention bidirectional: reset everywhere" in text
    assert "ValueError: dt: there is no time here" in " ".join(table.split())
    assert "not asked for: every case" in table
    assert "cases: 2 in 0 s" in table and "the longest took 1 s" in table


@pytest.mark.slow
def test_command_reports_a_users_layer(capsys):
    assert command.main(["--layer", f"{__name__}.Peeking"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "FAILS" in out and "causality" in out.split("failed:")[1]


@pytest.mark.slow
def test_long_calls_of_quadratic_layers_are_shorter():
    (finding,) = laws.examine(examples.CASES["attention"](), only=["length"])
    assert finding.passed and len(finding.remarks) == 1
    tokens = int(finding.remarks[0].split()[2])
    assert 2**8 <= tokens < 2**16 and np.log2(tokens) % 1 == 0


@pytest.mark.slow
def test_a_long_memory_is_not_held_to_more_than_its_rounded_decay():
    """dt of 1.8e-3 here: 1,100 tokens, each of which rounds the decay once more."""
    assert holds(S5(6, 4), ["length"]) == set()
