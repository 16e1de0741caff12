"""Every layer passes every law that applies; a layer that breaks one is caught."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from layers import examples, laws
from ssm import sequence as seq

GRADIENTS = [law for law in laws.LAWS if "gradients" in law]
VALUES = [law for law in laws.LAWS if law not in GRADIENTS]


def examined(name, only):
    """The laws that said nothing about a case; fails where one does not hold."""
    findings = laws.examine(examples.CASES[name](), only=only)
    failed = [f"{f.law}: {f.error:.2g} > {f.limit}" for f in findings if not f.passed]
    assert not failed
    return {f.law for f in findings if f.error is None}


# One of each way to compute; the others take minutes to compile.
QUICK = ("s4d bidirectional", "s5", "attention", "conv_s5 linear")
QUICK_GRADIENTS = ("lru",)

WITHOUT_TIME = {"gru", "lstm", "delta_net", "attention"}
WITHOUT_TIME |= {"conv_lstm", "frame_attention", "full_frame_attention"}
WITHOUT_TIME |= {"long_conv", "flash_butterfly", "sg_conv", "hyena", "h3"}
RESETS = {"packing", "reset on a masked token", "reset everywhere"}


def cases(quick):
    """All cases, those that are not in `quick` marked slow."""
    return [
        pytest.param(name, marks=[] if name in quick else [pytest.mark.slow])
        for name in examples.CASES
    ]


def reads_the_future(name):
    return "bidirectional" in name or "flash_butterfly" in name


def without_time(name):
    convolves = "bidirectional" in name and not name.startswith("s5")
    return convolves or name.split()[0] in WITHOUT_TIME


@pytest.mark.parametrize("name", cases(QUICK))
def test_every_law_of_values_holds(name):
    expected = {"sharding"} if jax.local_device_count() == 1 else set()
    if reads_the_future(name):
        expected |= {"one call = pieces = steps", "causality"}
    else:
        expected |= {"no recurrent mode"}
    if without_time(name):
        expected |= {"elapsed time"}
    if name == "flash_butterfly":
        expected |= RESETS
    assert examined(name, VALUES) == expected


@pytest.mark.parametrize("name", cases(QUICK_GRADIENTS))
def test_every_law_of_gradients_holds(name):
    expected = set()
    if reads_the_future(name):
        expected |= {"one call = pieces, gradients"}
    if without_time(name) or reads_the_future(name):
        expected |= {"elapsed time, gradients"}
    if name == "flash_butterfly":
        expected |= {"packing, gradients"}
    assert examined(name, GRADIENTS) == expected


ACROSS = ("mamba", "mamba2", "gla", "gated_delta_net", "rg_lru")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["s4", "dss", "s4d", "s4d bilinear", "s5", "lru", *ACROSS]
)
def test_laws_hold_across_chunks(name):
    """Longer than the chunks in which states exist at once. In bfloat16 the norm of a
    head enlarges the rounding of the one token among so many whose output vanishes."""
    length = 600 if name in ("s5", "lru") else 300
    exact = [law for law in laws.LAWS if law != "bfloat16"]
    findings = laws.examine(examples.CASES[name](), length, only=exact)
    assert [f.law for f in findings if not f.passed] == []


class Leaky(nn.Module):
    """A running mean that forgets about masks, resets and states of a wrong kind."""

    features: int

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        seq.check(x, sequence)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        state = jnp.zeros_like(x[:, 0]) if state is None else state
        y = jnp.cumsum(x * scale, axis=1) + state[:, None]
        return y, y[:, -1]

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.features))


def test_a_layer_that_ignores_masks_and_resets_is_caught():
    findings = {f.law: f for f in laws.examine(Leaky(4))}
    for law in ("padding", "padding, gradients", "packing", "reset everywhere"):
        assert not findings[law].passed, law
    for law in ("one call = pieces = steps", "causality", "batch"):
        assert findings[law].passed, law


class Peeking(Leaky):
    """Subtracts the mean of the whole call: neither causal nor composable."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        y, state = Leaky(self.features)(x, state, sequence, train)
        return y - x.mean(axis=1, keepdims=True), state


def test_a_layer_that_peeks_is_caught():
    only = ["one call = pieces = steps", "causality"]
    assert not any(f.passed for f in laws.examine(Peeking(4), only=only))


def test_command_names_the_layers(capsys):
    with pytest.raises(SystemExit, match="2"):
        laws.main(["--layer", "s6"])
    assert "unknown 's6'" in capsys.readouterr().err


def test_command_reports_a_users_layer(capsys):
    assert laws.main(["--layer", f"{__name__}.Peeking"]) == 1
    out = capsys.readouterr().out
    assert "FAILS" in out and "causality" in out.split("failed:")[1]
