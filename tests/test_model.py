"""Blocks, stacks, heads and `build`: the contract holds for whole models."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from kernels.tolerance import assert_close
from layers import FRAME_LAYERS, LAYERS, Sequence, build
from layers.models.block import GELUS, Block, Norm
from layers.models.stack import KEEPS

CONFIG = {
    "layer": "gru",  # quick to compile, where the layer is not the point
    "layer_args": {},
    "features": 8,
    "depth": 3,
    "encoder": "scalar",
    "vocab_size": 0,
    "length": 12,
    "outputs": 5,
    "head": "mean",
    "norm": "layer",
    "prenorm": True,
    "gate": "glu",
    "gelu": "",
    "norm_epsilon": -1.0,
    "mlp": 0.0,
    "grid": "",
    "patch": 1,
    "dropout": 0.0,
    "tie_dropout": True,
    "dtype": "float32",
    "remat": False,
    "remat_keeps": "loops",
}


def applied(model, train=False, **kwargs):
    """`model.apply`, compiled: eager scans over layers are slow."""
    return jax.jit(
        lambda variables, x, state=None, sequence=None, rngs=None: model.apply(
            variables, x, state, sequence, train, rngs=rngs, **kwargs
        )
    )


def made(**changes):
    """A model, its variables and an input of the right kind."""
    config = {**CONFIG, **changes}
    model = build(config)
    key = jax.random.key(0)
    shape = {"scalar": (2, 12), "token": (2, 12), "image": (2, 3, 4, 1)}
    shape = shape[config["encoder"]]
    if config["head"] == "retrieval":
        shape = (2, 2, 12)
    if config["encoder"] == "token":
        x = jax.random.randint(key, shape, 0, config["vocab_size"])
    else:
        x = jax.random.normal(key, shape)
    return model, jax.jit(model.init)({"params": key}, x), x


def stepped(model, variables, x, sequence=None):
    """The answers after every token, fed one at a time."""
    apply = applied(model)
    state, answers = model.init_state(len(x)), []
    for t in range(x.shape[1]):
        part = jax.tree.map(lambda f, t=t: f[:, t : t + 1], sequence)
        y, state = apply(variables, x[:, t : t + 1], state, part)
        answers.append(y)
    return answers, state


# Every head with one layer, every layer with one head.
HEADS = [("s4d", "mean"), pytest.param("s4d", "last", marks=pytest.mark.slow)]
HEADS += [
    pytest.param(name, "token", marks=[] if name == "s4" else [pytest.mark.slow])
    for name in LAYERS
    if name != "flash_butterfly"
]


@pytest.mark.parametrize(("layer", "head"), HEADS)
def test_token_by_token_ends_at_the_whole_answer(layer, head):
    model, variables, x = made(layer=layer, head=head)
    whole, state = applied(model)(variables, x)
    answers, last = stepped(model, variables, x)
    answer = jnp.concatenate(answers, 1) if head == "token" else answers[-1]
    assert_close((answer, last), (whole, state))


@pytest.mark.parametrize(
    "head", ["mean", "token", pytest.param("last", marks=pytest.mark.slow)]
)
def test_padding_and_packing_of_whole_models(head):
    model, variables, x = made(layer="s4d", head=head, norm="batch")
    mask = jnp.asarray([[True] * 12, [False] * 3 + [True] * 6 + [False] * 3])
    reset = jnp.zeros((2, 12), bool).at[:, 5].set(True)
    poisoned = jnp.where(mask, x, jnp.nan)
    y, _ = applied(model)(variables, poisoned, None, Sequence(mask, reset))
    answers, _ = stepped(model, variables, jnp.where(mask, x, 0), Sequence(mask, reset))
    alone, _ = applied(model)(variables, x[1:, 5:9])
    if head == "token":
        assert_close(y, jnp.concatenate(answers, 1))
        assert_close(y[1, 5:9], alone[0])
        assert not np.any(np.asarray(y[1, 9:]))
    else:
        assert_close(y, answers[-1])
        assert_close(y[1], alone[0])


def test_padding_does_not_reach_batch_statistics():
    model, variables, x = made(norm="batch")

    def trained(x, sequence):
        apply = applied(model, train=True, mutable=["batch_stats"])
        return apply(variables, x, None, sequence)

    (plain, _), expected = trained(x, None)
    mask = jnp.arange(17) < 12
    padded = jnp.pad(x, ((0, 0), (0, 5)), constant_values=jnp.nan)
    (masked, _), found = trained(padded, Sequence(jnp.broadcast_to(mask, (2, 17))))
    assert_close((masked, found), (plain, expected))


@pytest.mark.parametrize(
    "depth", [3, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 4))]
)
def test_a_pattern_repeats_and_its_rest_is_unrolled(depth):
    model, variables, x = made(layer=("s5", "gru"), depth=depth, norm="batch")
    whole, state = applied(model)(variables, x)
    answers, last = stepped(model, variables, x)
    assert_close((answers[-1], last), (whole, state))
    stack = variables["params"]["stack"]
    assert ("repeated" in stack, "rest_0" in stack) == (depth > 1, depth % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("keeps", KEEPS)
def test_remat_changes_nothing_but_memory(keeps):
    def gradients(remat):
        model, variables, x = made(
            remat=remat, remat_keeps=keeps, layer=("s5", "gru"), depth=3
        )

        def loss(params):
            return jnp.sum(model.apply({"params": params}, x)[0] ** 2)

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    assert_close(gradients(True), gradients(False), kind="gradient")


def operations(jaxpr):
    """The names of all operations, of those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves([*equation.params.values()]):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


@pytest.mark.slow
def test_what_remat_keeps_is_not_computed_again():
    def products(**changes):
        model, variables, x = made(layer="mamba", depth=1, mlp=1.0, **changes)

        def loss(params):
            return jnp.sum(model.apply({"params": params}, x)[0] ** 2)

        traced = jax.make_jaxpr(jax.grad(loss))(variables["params"])
        return collections.Counter(operations(traced.jaxpr))

    nothing, loops, dots = (products(remat=True, remat_keeps=k) for k in KEEPS)
    assert nothing["scan"] > loops["scan"] == dots["scan"]
    assert loops["dot_general"] > dots["dot_general"]
    with pytest.raises(ValueError, match=r"remat_keeps: must be one of .* got 'all'"):
        made(remat_keeps="all")


@pytest.mark.parametrize("gate", ["gelu", "glu", "full_glu", "half_glu1", "half_glu2"])
@pytest.mark.parametrize("prenorm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_gate_and_norm_position_builds(gate, prenorm):
    model, variables, x = made(gate=gate, prenorm=prenorm, norm="rms", depth=1)
    assert bool(jnp.isfinite(applied(model)(variables, x)[0]).all())
    assert ("norm" in variables["params"]) == prenorm


def test_encoders():
    for changes in (
        {"encoder": "token", "vocab_size": 7, "head": "token"},
        {"encoder": "image"},
    ):
        model, variables, x = made(**changes)
        y, _ = applied(model)(variables, x)
        assert y.shape == ((2, 12, 5) if "head" in changes else (2, 5))
    model, variables, x = made(encoder="image")
    image = jax.random.randint(jax.random.key(1), x.shape, 0, 256).astype(jnp.uint8)
    assert_close(
        applied(model)(variables, image)[0],
        applied(model)(variables, image.astype(jnp.float32) / 255)[0],
    )


def test_retrieval_compares_two_documents():
    model, variables, x = made(head="retrieval")
    mask = jnp.ones((2, 2, 12), bool).at[1, 1, 8:].set(False)
    apply = applied(model)
    y, _ = apply(variables, x, None, Sequence(mask=mask))
    short = x.at[1, 1, 8:].set(jnp.nan)
    assert y.shape == (2, 5)
    assert_close(apply(variables, short, None, Sequence(mask=mask))[0], y)
    state = model.init_state(2)
    for t in range(12):
        part = Sequence(mask=mask[:, :, t : t + 1])
        answer, state = apply(variables, x[:, :, t : t + 1], state, part)
    assert_close(answer, y)


class Ones(nn.Module):
    """A mixer whose output is 1 everywhere: what is missing was dropped."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return jnp.ones_like(x), state


@pytest.mark.parametrize("tied", [True, False])
def test_tied_dropout_drops_a_feature_at_every_token(tied):
    block = Block(Ones, 6, gate="gelu", dropout=0.5, tie_dropout=tied)
    x = jnp.zeros((4, 12, 6))

    @jax.jit
    def dropped(seed):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(seed)}
        (y, _), _ = block.init_with_output(rngs, x, None, None, True)
        return y == 0

    first = np.asarray(dropped(1))
    assert first.any() and not first.all()
    assert np.all(first == first[:, :1]) == tied
    np.testing.assert_array_equal(dropped(1), first)
    assert np.any(dropped(2) != first)


def test_parameters_carry_logical_axes():
    _, variables, _ = made(layer="s4d")
    mixer = variables["params"]["stack"]["repeated"]["block_0"]["mixer"]
    assert mixer["C"].names == ("layers", None, "embed", "state", None)


def test_bfloat16_activations_keep_float32_parameters_and_answers():
    model, variables, x = made(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y, _ = applied(model)(variables, x)
    exact, _ = applied(made()[0])(variables, x)
    assert y.dtype == jnp.float32
    assert_close(y, exact, dtype="bfloat16", kind="gradient")


def test_a_bidirectional_model_has_no_state():
    model, variables, x = made(layer="s4d", layer_args={"bidirectional": True})
    with pytest.raises(ValueError, match="bidirectional"):
        model.init_state(2)
    y, _ = applied(model)(variables, x)
    assert y.shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "s6"}, r"layer: must be one of .*'gru', .*'lru', .*'s4'.* got 's6'"),
        ({"layer": "os.path.Nothing"}, "layer: must be .* got 'os.path.Nothing'"),
        ({"layer_args": {"modes": 3}}, r"layer_args: must .* for gru, got \['modes'\]"),
        ({"head": "max"}, r"head: must be one of .*'mean'.* got 'max'"),
        ({"encoder": "pixel"}, r"encoder: must be one of .* got 'pixel'"),
        ({"norm": "group"}, r"norm: must be one of .* got 'group'"),
        ({"gate": "swiglu"}, r"gate: must be one of .* got 'swiglu'"),
        ({"dtype": "float16"}, r"dtype: must be one of .* got 'float16'"),
        ({"depth": 0}, r"depth: must be at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout: must be in \[0, 1\), got 1.5"),
        ({"layer": ()}, r"layer: a pattern must have at least one name"),
        (
            {"layer": ("gru", "lru"), "layer_args": {"state_size": 4}},
            r"layer_args: must stand under .* layers, \['gru', 'lru'\], got",
        ),
        ({"encoder": "token"}, r"vocab_size: "),
    ],
)
def test_build_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        build({**CONFIG, **changes})


def test_wrong_inputs_name_the_argument():
    model, variables, x = made()
    for bad, sequence, message in (
        (x[:, :0], None, "inputs: the length L"),
        (x[0], None, r"inputs: must be \[B, L\] or .* for the scalar encoder"),
        (x, Sequence(mask=jnp.ones((2, 3), bool)), r"mask: must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, bad, None, sequence)
    with pytest.raises(ValueError, match="state: must be None or what init_state"):
        model.apply(variables, x, model.init_state(3))


# Gate, form of GELU, epsilon of the norms and width of the MLP per feature, as in each
# family's public code; of what has none, and of a user's own layer, the default.
S4_FAMILY = ("glu", "erf", 1e-5, 0)
FAMILIES = {
    "s4": S4_FAMILY,
    "s4d": S4_FAMILY,
    "dss": S4_FAMILY,
    "long_conv": S4_FAMILY,
    "sg_conv": S4_FAMILY,
    "flash_butterfly": ("glu", "tanh", 1e-5, 0),
    "mamba": ("none", "tanh", 1e-5, 0),
    "mamba2": ("none", "tanh", 1e-5, 0),
    "h3": ("none", "tanh", 1e-5, 4),
    "hyena": ("none", "tanh", 1e-5, 4),
    "rg_lru": ("none", "tanh", 0.0, 3),
    "min_gru": ("none", "tanh", 0.0, 2),
    "retention": ("none", "tanh", 0.0, 2),
    "lightning": ("none", "tanh", 0.0, 2),
    "gla": ("none", "tanh", 0.0, 8 / 3),
    "delta_net": ("none", "tanh", 0.0, 8 / 3),
    "gated_delta_net": ("none", "tanh", 0.0, 8 / 3),
    "attention": ("none", "tanh", 0.0, 8 / 3),
    "conv_s5": ("none", "tanh", 0.0, 0),
    "conv_lstm": ("none", "tanh", 0.0, 0),
    "frame_attention": ("none", "tanh", 0.0, 8 / 3),
    "full_frame_attention": ("none", "tanh", 0.0, 8 / 3),
    "s5": ("glu", "tanh", 0.0, 0),
    "lru": ("glu", "tanh", 0.0, 0),
    "lstm": ("glu", "tanh", 0.0, 0),
    "gru": ("glu", "tanh", 0.0, 0),
    "layers.lru.LRU": ("glu", "tanh", 0.0, 0),
}


def test_every_layer_is_of_a_family():
    assert FAMILIES.keys() - {"layers.lru.LRU"} == LAYERS.keys() | FRAME_LAYERS.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_is_that_of_its_family(name):
    config = {**CONFIG, "layer": name, "gate": "", "mlp": -1.0, "features": 24}
    if name in FRAME_LAYERS:
        video = common.base().model.video.to_dict() | dict(size=(4, 4), depths=(4,))
        config |= dict(encoder="video", video=video)
    model = build(config)
    gate, gelu, epsilon, mlp = FAMILIES[name]
    block = model.stack().pattern[0].keywords
    found = tuple(block[key] for key in ("gate", "gelu", "norm_epsilon", "mlp"))
    assert found == (gate, gelu, epsilon, 24 * mlp)
    own = build({**config, "gelu": "tanh", "norm_epsilon": 1e-3})
    block = own.stack().pattern[0].keywords
    assert (block["gelu"], block["norm_epsilon"]) == ("tanh", 1e-3)
    if name not in FRAME_LAYERS:  # before the head too
        assert (model.norm_epsilon, own.norm_epsilon) == (epsilon, 1e-3)


class Identity(nn.Module):
    """A mixer that passes its input on."""

    def __call__(self, x, state=None, sequence=None, train=False):
        return x, None


def gelu_erf(y):
    return y * jax.scipy.stats.norm.cdf(y)


def gelu_tanh(y):
    return 0.5 * y * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (y + 0.044715 * y**3)))


@pytest.mark.parametrize("gate", ["gelu", "glu", "half_glu1", "half_glu2"])
def test_the_form_of_gelu_reaches_every_gate(gate):
    x = jnp.linspace(-4, 4, 24).reshape(1, 3, 8)
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    for form, gelu in (("erf", gelu_erf), ("tanh", gelu_tanh)):
        block = Block(Identity, 8, norm="rms", gate=gate, gelu=form)
        variables = nn.unbox(block.init(jax.random.key(0), x))
        found = block.apply(variables, x)[0] - x
        g = gelu(y)
        W = variables["params"].get("gate", {}).get("kernel", jnp.zeros((8, 16)))
        value, sigmoid = (g @ W)[..., :8], nn.sigmoid((g @ W)[..., -8:])
        expected = {
            "gelu": g,
            "glu": value * sigmoid,
            "half_glu1": g * sigmoid,
            "half_glu2": y * sigmoid,
        }
        assert_close(found, expected[gate])


def test_derivatives_of_the_exact_gelu():
    x = jnp.linspace(-6, 6, 49)
    for form in (lambda f: f, jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))):
        found, expected = (jax.vmap(form(f))(x) for f in (GELUS["erf"], gelu_erf))
        assert_close(found, expected)


@pytest.mark.parametrize("kind", ["layer", "batch", "rms"])
def test_epsilon_is_what_is_added_to_the_variance(kind):
    x = 1e-3 * jax.random.normal(jax.random.key(0), (2, 5, 8))
    for epsilon, value in (
        (0.0, {"layer": 1e-6, "batch": 1e-5, "rms": 1e-6}[kind]),
        (1e-4, 1e-4),
    ):
        norm = Norm(kind, epsilon=epsilon)
        variables = norm.init(jax.random.key(0), x)
        found, _ = norm.apply(variables, x, None, True, mutable=["batch_stats"])
        axes = {"layer": -1, "batch": (0, 1), "rms": -1}[kind]
        mean = 0 if kind == "rms" else jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axes, keepdims=True)
        assert_close(found, (x - mean) / jnp.sqrt(variance + value))


def decoded(layer, tokens, chunk, mark=()):
    """Feeds a model `tokens` random ones, `chunk` of them in a program that takes them
    one by one: the bytes of the program's temporaries, and of all live arrays after
    the numbers of chunks in `mark`."""
    model, variables, x = made(layer=layer, head="token", encoder="token", vocab_size=7)

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(variables, state, tokens):
        def step(state, token):
            y, state = model.apply(variables, token[:, None], state)
            return state, jnp.argmax(y[:, 0], -1)

        state, answers = jax.lax.scan(step, state, tokens)
        return answers[-1], state

    state = model.init_state(len(x))
    draw = np.random.default_rng(0)
    program, live, answer = None, [], None
    for number in range(1, tokens // chunk + 1):
        part = draw.integers(0, 7, (chunk, len(x)), np.int32)
        program = program or steps.lower(variables, state, part).compile()
        answer, state = program(variables, state, part)
        del part
        if number in mark:
            jax.block_until_ready((answer, state))
            live.append(sum(array.nbytes for array in jax.live_arrays()))
    return program.memory_analysis().temp_size_in_bytes, live


DECODERS = [
    name if name == "s5" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("s5", "attention", "mamba")
]


@pytest.mark.parametrize("layer", DECODERS)
def test_a_program_of_more_steps_needs_no_more_memory(layer):
    """Beside the tokens that it is fed, 8 bytes in each step, and its answers."""
    short, _ = decoded(layer, 100, 100)
    long, _ = decoded(layer, 2_000, 2_000)
    assert long - short <= 2 * 8 * 2_000 + 1_000


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["s5", "attention", "mamba"])
def test_decoding_100_000_tokens_needs_constant_memory(layer):
    _, (early, late) = decoded(layer, 100_000, 5_000, mark=(2, 20))
    assert early == late
