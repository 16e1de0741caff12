"""What every layer is by construction: its dtypes, its empty batch, where it may run.

Tracing shows all of this; `layers.laws` compares the numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constants import largest_constant

from configs import common
from kernels.tolerance import assert_close
from layers import FRAME_LAYERS, LAYERS, Sequence, build, laws
from layers.facts import L, has_state, refusals
from layers.laws import examples

B = 2
# One of each way to compute; the others are variants of them.
NAMES = [name for name in examples.CASES if " " not in name]
NAMES += [name for name in examples.CASES if name.startswith("attention ")]
STATEFUL = [name for name in NAMES if has_state(examples.CASES[name]())]
EVERY = sorted(LAYERS | FRAME_LAYERS)
DTYPES = {"float32", "complex64", "int32", "bool"}


def test_every_layer_is_here():
    assert set(LAYERS) | set(FRAME_LAYERS) == {name.split()[0] for name in NAMES}


def mostly_slow(*quick, of=NAMES):
    """The names `of` layers, those that are not in `quick` marked slow."""
    return [
        pytest.param(name, marks=[] if name in quick else [pytest.mark.slow])
        for name in of
    ]


class Traced:
    """A layer, shapes of its variables and of an input, and its first state."""

    def __init__(self, name, batch=B):
        self.layer = examples.CASES[name]()
        token = *getattr(self.layer, "size", ()), self.layer.features
        self.x = jax.ShapeDtypeStruct((batch, L, *token), jnp.float32)
        self.variables = nn.unbox(
            jax.eval_shape(self.layer.init, jax.random.key(0), self.x)
        )
        self.first = self.initial(batch)

    def initial(self, batch):
        if not has_state(self.layer):
            return None
        return jax.eval_shape(lambda: self.layer.init_state(batch))

    def __call__(self, state=None, sequence=None):
        return jax.eval_shape(self.layer.apply, self.variables, self.x, state, sequence)

    def companions(self, batch=B):
        """Those sequences that the layer takes."""
        flags = jax.ShapeDtypeStruct((batch, L), bool)
        times = jax.ShapeDtypeStruct((batch, L), jnp.float32)
        fields = dict(mask=flags, reset=flags, dt=times)
        refused = refusals(self.layer)
        return [Sequence(**{k: v}) for k, v in fields.items() if k not in refused]


def names(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    "name", mostly_slow("s5", "lru", "mamba", "rg_lru", "lstm", "gru", "conv_s5")
)
def test_a_float32_layer_stays_one_with_x64(name):
    """`jax_enable_x64` alone changes no dtype: parameters, outputs, states."""
    with jax.enable_x64(True):
        case = Traced(name)
        assert names(case.variables) <= {"float32"}
        assert names(case()) <= DTYPES
        for sequence in case.companions()[-1:]:
            y, state = case(case.first, sequence)
            assert names((y, state)) <= DTYPES
            if case.first is not None:
                assert names(state) == names(case.first)
        if case.first is None:
            assert case()[1] is None
            return

        def decode(variables, state, x):
            def step(state, x):
                y, state = case.layer.apply(variables, x[:, None], state)
                return state, y

            return jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))

        state, _ = jax.eval_shape(decode, case.variables, case.first, case.x)
        assert state == case.first


def test_initial_parameters_do_not_depend_on_x64():
    for name in ("s5", "lru"):
        layer = examples.CASES[name]()
        x = np.zeros((1, 2, *getattr(layer, "size", ()), layer.features), np.float32)
        usual = jax.jit(layer.init)(jax.random.key(0), x)
        with jax.enable_x64(True):
            wider = jax.jit(layer.init)(jax.random.key(0), x)
        assert laws.worst(nn.unbox(wider), nn.unbox(usual)) < 1e-6, name


@pytest.mark.parametrize("name", mostly_slow("s5", "attention", "conv_s5"))
def test_a_batch_of_no_rows(name):
    case = Traced(name)
    companions = case.companions()[:2]
    case.x = jax.ShapeDtypeStruct((0, *case.x.shape[1:]), case.x.dtype)
    first = case.initial(0)
    for state in (None, first):
        for sequence in [None, *companions]:
            none = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct((0, L), s.dtype), sequence
            )
            y, final = case(state, none)
            assert y == case.x
            assert first is None or final == first

    def total(variables, x):
        return jnp.sum(case.layer.apply(variables, x)[0])

    gradients = jax.eval_shape(jax.grad(total, (0, 1)), case.variables, case.x)
    assert gradients[1] == case.x


@pytest.mark.parametrize("head", ["token", "mean"])
def test_a_model_with_x64_and_without_rows(head):
    config = common.base().model
    config.update(layer="lstm", features=4, depth=2, encoder="token", vocab_size=5)
    config.update(outputs=3, length=L, head=head)
    model = build(config)
    tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
    with jax.enable_x64(True):
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        state = model.init_state(B)
        assert names((variables, state)) <= DTYPES
        _, after = jax.eval_shape(model.apply, variables, tokens, state)
        assert names(after) == names(state)
    assert len(set(buffers(state))) == len(buffers(state))
    none = jax.ShapeDtypeStruct((0, L), jnp.int32)
    y, _ = jax.eval_shape(model.apply, variables, none)
    assert y.shape == ((0, L, 3) if head == "token" else (0, 3))


def buffers(state):
    """The places of its leaves in memory."""
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]


def test_only_these_have_no_state():
    stateless = [name for name in NAMES if not has_state(examples.CASES[name]())]
    assert stateless == ["flash_butterfly", "attention bidirectional"]
    for name in stateless:
        with pytest.raises(ValueError, match="init_state"):
            examples.CASES[name]().init_state(B)


@pytest.mark.parametrize("name", STATEFUL)
def test_an_initial_state_shares_no_buffer(name):
    state = examples.CASES[name]().init_state(B)
    assert len(set(buffers(state))) == len(buffers(state))


@pytest.mark.parametrize("name", mostly_slow("lstm", "attention window", of=STATEFUL))
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_state_may_be_donated(name):
    layer = examples.CASES[name]()
    x = jnp.ones((B, L, *getattr(layer, "size", ()), layer.features))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    state = layer.init_state(B)
    call = jax.jit(layer.apply, donate_argnums=2)
    for piece in (x[:, :1], x[:, 1:2], x[:, 2:3]):
        _, state = call(variables, piece, state)
    _, state = jax.jit(layer.apply)(variables, x)
    for _ in range(2):
        _, state = call(variables, x, state)
    assert len(set(buffers(state))) == len(buffers(state))


@pytest.mark.parametrize(
    "name", mostly_slow("lstm", of=["attention", "lstm", "conv_lstm"])
)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_state_of_a_model_may_be_donated(name):
    """At once, and after a call; of blocks that are repeated and of one that is not."""
    config = common.base().model.to_dict() | dict(layer=(name, "gru"), depth=3)
    config |= dict(features=8, outputs=2, length=L, encoder="scalar", head="mean")
    x = jnp.ones((B, 4))
    if name in FRAME_LAYERS:
        config |= dict(layer=(name, "conv_s5"), encoder="video")
        config["video"] = config["video"] | dict(size=(4, 4), channels=1, depths=(4,))
        x = jnp.ones((B, 4, 4, 4, 1))
    model = build(config)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    state = model.init_state(B)
    assert len(set(buffers(state))) == len(buffers(state))
    expected, _ = jax.jit(model.apply)(variables, x)
    call = jax.jit(model.apply, donate_argnums=2)
    for t in range(x.shape[1]):
        y, state = call(variables, x[:, t : t + 1], state)
    answer = expected[:, -1:] if name in FRAME_LAYERS else expected
    assert_close(y, answer)


CUT = 7  # where a sequence restarts


@pytest.mark.parametrize(
    "bad", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", mostly_slow("attention window"))
def test_nothing_crosses_a_reset(name, bad):
    """Outputs, final state and gradients behind a reset are those of finite tokens
    before it, and what may see such a token is not finite."""
    layer = examples.CASES[name]()
    token = *getattr(layer, "size", ()), layer.features
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (B, L, *token))
    variables = jax.jit(layer.init)(keys[1], x)
    sequence = Sequence(reset=jnp.zeros((B, L), bool).at[:, CUT].set(True))

    def behind(x, state):
        y, final = layer.apply(variables, x, state, sequence)
        weight = jax.random.normal(keys[2], y[:, CUT:].shape)
        return jnp.sum(y[:, CUT:] * weight), (y, final)

    call = jax.jit(jax.value_and_grad(behind, has_aux=True))
    state = None
    if has_state(layer):
        _, state = jax.jit(layer.apply)(variables, x)
    if "reset" in refusals(layer):
        with pytest.raises(ValueError, match="reset: FlashButterfly"):
            call(x, state)
        return
    (_, (y, final)), dx = call(x, state)
    (_, (found, end)), found_dx = call(x.at[:, : CUT - 1].set(bad), state)
    assert_close((found[:, CUT:], end), (y[:, CUT:], final))
    assert_close(found_dx[:, CUT:], dx[:, CUT:], "gradient")
    assert not np.isfinite(found[:, : CUT - 1]).any()
    assert not np.isfinite(found[:, CUT - 1]).any()
    if state is None:
        return
    state = jax.tree.map(
        lambda s: jnp.full_like(s, bad) if jnp.issubdtype(s.dtype, jnp.inexact) else s,
        state,
    )
    (_, (found, end)), found_dx = call(x, state)
    assert_close((found[:, CUT:], end), (y[:, CUT:], final))
    assert_close(found_dx[:, CUT:], dx[:, CUT:], "gradient")


LONG = 2**20
# Bytes of the largest constant that must grow with the length: the complex nodes of
# S4's generating function on the upper half of the unit circle, whose distance from the
# singularity at -1 would lose its digits in float32.
GROWING = {"s4": 8 * (LONG // 2 + 1)}


LINE = 100  # bytes of its text beside the constant


def long_layer(name):
    """A layer of 64 features that takes LONG tokens, or frames of four pixels; shapes
    of its variables and of an input."""
    cls = (LAYERS | FRAME_LAYERS)[name]
    capacities = {"length", "context"} & cls.__dataclass_fields__.keys()
    fields = dict.fromkeys(capacities, LONG)
    size = (2, 2) if name in FRAME_LAYERS else ()
    if size:
        fields["size"] = size
    if name == "attention":
        fields = dict(window=128)
    layer = cls(64, **fields)
    x = jax.ShapeDtypeStruct((1, LONG, *size, 64), jnp.float32)
    return layer, jax.eval_shape(layer.init, jax.random.key(0), x), x


@pytest.mark.parametrize("name", EVERY)
def test_no_program_holds_a_table(name):
    """At most 1 MB of constants at 2^20 tokens of 64 features."""
    layer, variables, x = long_layer(name)
    lowered = jax.jit(layer.apply).lower(variables, x)
    assert largest_constant(lowered) <= GROWING.get(name, 2**20) + LINE


def gradient(model):
    """The gradients of a call with its final state, compiled when it is called."""

    def total(variables, x, state=None, sequence=None):
        y, state = model.apply(variables, x, state, sequence)
        return jnp.sum(y), state

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("name", mostly_slow("s5", "hyena", "conv_s5", of=EVERY))
def test_no_program_of_gradients_holds_a_table(name):
    layer, variables, x = long_layer(name)
    lowered = gradient(layer).lower(variables, x)
    assert largest_constant(lowered) <= GROWING.get(name, 2**20) + LINE


@pytest.mark.parametrize("name", mostly_slow("s5", "conv_s5", of=EVERY))
def test_no_program_of_all_that_a_layer_takes_holds_a_table(name):
    """Gradients with a state, a mask, resets and elapsed times."""
    layer, variables, x = long_layer(name)
    refused = refusals(layer)
    flags = jax.ShapeDtypeStruct((1, LONG), bool)
    fields = dict(mask=flags, reset=flags, dt=x.update(shape=(1, LONG)))
    sequence = Sequence(**{k: v for k, v in fields.items() if k not in refused})
    state = None
    if "state" not in refused:
        state = jax.eval_shape(lambda: layer.init_state(1))
    lowered = gradient(layer).lower(variables, x, state, sequence)
    # Nothing grows here: S4 with resets has no use for its generating function.
    assert largest_constant(lowered) <= 2**20 + LINE


def test_no_program_of_a_model_holds_a_table():
    config = common.base().model.to_dict() | dict(layer=("s5", "hyena"), depth=2)
    config |= dict(features=64, length=LONG, encoder="scalar", outputs=2)
    model = build(config)
    x = jax.ShapeDtypeStruct((1, LONG), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    lowered = gradient(model).lower(variables, x)
    assert largest_constant(lowered) <= 2**20 + LINE


def inside(case, mesh, state, gradient, steps=L):
    """A call, or its gradients, of rows that are split over the devices."""
    rows, every = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    has_state = case.first is not None

    def value(variables, x, state):
        y, final = case.layer.apply(variables, x, state)
        leaves = [y, *jax.tree.leaves(final)]
        total = sum(
            jnp.sum(jnp.abs(z) ** 2)
            for z in leaves
            if jnp.issubdtype(z.dtype, jnp.inexact)
        )
        return jax.lax.psum(total, "data") if gradient else (y, final)

    function, out = value, (rows, rows if has_state else every)
    if gradient:
        function, out = jax.grad(value, (0, 1)), (every, rows)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(every, rows, every if state is None else rows),
        out_specs=out,
    )


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", mostly_slow("s5", "attention", "lstm", "hyena"))
def test_runs_inside_of_shard_map(name, gradient):
    """With its default check, which tracing makes."""
    auto = (jax.sharding.AxisType.Auto,)
    case, mesh = Traced(name), jax.make_mesh((1,), ("data",), auto)
    for state in [None] if case.first is None else [None, case.first]:
        call = inside(case, mesh, state, gradient)
        jax.eval_shape(call, case.variables, case.x, state)
        if state is not None:
            token = jax.ShapeDtypeStruct((B, 1, *case.x.shape[2:]), case.x.dtype)
            jax.eval_shape(call, case.variables, token, state)
