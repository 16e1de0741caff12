"""The suite over tokens: mixers, training steps and decoding beside textbook forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from configs import common
from kernels import fft_conv, short_conv
from kernels.bench import cases as plain
from kernels.bench import timing
from layers import S4, S4D, S5, Hyena, LongConv, Mamba, build, prepare
from layers.parameters import logical
from ssm import sequence as seq
from train.bench import rows


class TableS4D(S4D):
    """S4D whose filter is a product with the (n, L) table of powers."""

    make = staticmethod(plain.filter_by_table)

    def _forward(self, system, rule, B, D, u, state, sequence):
        if state is not None:
            return super()._forward(system, rule, B, D, u, state, sequence)
        taps = self.make(u.shape[1])(system.c * system.b, system.log_a)
        return fft_conv(u, taps, skip=D)[0], state


class TapsS4D(TableS4D):
    """S4D whose filter is a sum over modes, mapped over taps."""

    make = staticmethod(plain.filter_by_taps)


class TableS4(S4):
    """S4 whose filter comes from [N, L] tables, as the generating function is written
    down; C~ at the length of the call."""

    def _filters(self, system, C_tilde, L):
        make = plain.dplr_filter_by_table(L)
        return make(C_tilde[0], system.B, system.P[0], system.lam, jnp.log(system.dt))[
            None
        ]


class AssociativeS5(S5):
    """S5 with a complex `associative_scan` over all states, the published form."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        lam, dt, B, C, D = self._parameters()
        z = lam * dt
        inputs = (jnp.expm1(z) / lam) * (x @ B.T)
        states = plain.scan_by_associative_scan(jnp.exp(z), inputs)
        return (states @ C[0].T).real + D * x, state


class DenseS4D(nn.Module):
    """Decoding with dense state matrices, y = C h, h = A h + B u, one [N, N] complex
    matrix per feature: what a general state-space implementation does per token."""

    features: int
    state_size: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        seq.check(x, sequence)
        state = self.init_state(len(x)) if state is None else state
        H, N = self.features, self.state_size

        def matrices(key, shape, dtype):
            lam = -jax.random.uniform(key, shape[:2], dtype)
            return jnp.eye(N, dtype=dtype) * jnp.exp(lam)[..., None]

        A = self.param("A", logical(matrices, "embed", None, None), (H, N, N))
        A = A.astype(jnp.complex64)
        B, C = (
            self.param(name, logical(nn.initializers.normal(), "embed", None), (H, N))
            for name in "BC"
        )
        outputs = []
        for t in range(x.shape[1]):
            state = jnp.einsum("hmn,bhn->bhm", A, state) + B * x[:, t, :, None]
            outputs.append(jnp.sum(C * state, axis=-1).real)
        return jnp.stack(outputs, axis=1), state

    @nn.nowrap
    def init_state(self, batch_size):
        shape = (batch_size, self.features, self.state_size)
        return jnp.zeros(shape, jnp.complex64)


class ScanMamba(Mamba):
    """Mamba on a scan over time under `jax.checkpoint`, which is given the discretised
    inputs of all steps; nothing else is made again."""

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return self._mix(x, None, None, seq.check(x, sequence))[0], state

    @nn.nowrap
    def _scan(self, u, Delta, A, B, C, h, reset, D):
        y = plain.selective_by_materialised_scan(u, Delta, A, B, C)
        return y + D * u, h


def model_config(layer, features, depth, **layer_args):
    """A scalar-to-class model of the default shape."""
    config = common.base().model
    config.update(layer=layer, features=features, depth=depth, norm="layer")
    config.update(encoder="scalar", outputs=10)
    config.layer_args.update(layer_args)
    return config


HERE = f"{__name__}."


def mixer_case(small):
    """S5 mixer, forward+backward: B8 L4096 H128 P64."""
    B, L, H, P = (2, 256, 16, 8) if small else (8, 4096, 128, 64)
    x = jax.random.normal(jax.random.key(0), (B, L, H))
    functions = {}
    for name, cls in (("S5", S5), ("complex associative_scan", AssociativeS5)):
        mixer = cls(H, 2 * P)
        variables = nn.unbox(mixer.init(jax.random.key(1), x[:, :2]))

        def run(variables, x, mixer=mixer):
            def loss(variables, x):
                return jnp.sum(mixer.apply(variables, x)[0] ** 2)

            return jax.value_and_grad(loss, (0, 1))(variables, x)

        functions[name] = (run, (variables, x))
    return functions


def step_function(config):
    """A training step (AdamW), and what makes its arguments for a batch and length."""
    model, optimizer = build(config), optax.adamw(1e-3)

    def step(params, opt_state, x, labels):
        def loss(params):
            logits, _ = model.apply({"params": params}, x, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def arguments(batch, length):
        x = jax.random.normal(jax.random.key(0), (batch, length))
        init = jax.jit(model.init)
        params = nn.unbox(init({"params": jax.random.key(1)}, x)["params"])
        labels = jnp.zeros((batch,), jnp.int32)
        return params, optimizer.init(params), x, labels

    return step, arguments


def step_case(small):
    """Training step of the 4-layer S4D model: B16 L1024 H128 N64 (all modes stored)."""
    forms = {"S4D": "s4d", "product with a table of powers": HERE + "TableS4D"}
    forms["sum of powers, mapped over taps"] = HERE + "TapsS4D"
    return _steps(forms, small, state_size=128)


def step_s4_case(small):
    """Training step of the 4-layer S4 model: B16 L1024 H128 N64."""
    forms = {"S4": "s4", "tables of reciprocals": HERE + "TableS4"}
    return _steps(forms, small, length=128 if small else 1024)


def step_mamba_case(small):
    """Training step of the 4-layer Mamba model: B16 L1024 H128 N16."""
    forms = {"Mamba": "mamba", "checkpointed time scan": HERE + "ScanMamba"}
    return _steps(forms, small, dict(gate="none"))


def _steps(forms, small, block=None, **layer_args):
    B, L, H = (2, 128, 16) if small else (16, 1024, 128)
    functions = {}
    for name, layer in forms.items():
        config = model_config(layer, H, 4, **layer_args)
        config.update(block or {})
        step, arguments = step_function(config)
        functions[name] = (step, arguments(B, L))
    return functions


def long_conv_case(small):
    """LongConv, forward+backward: B8 L4096 H128, beside its convolution alone."""
    B, L, H = (2, 128, 16) if small else (8, 4096, 128)
    x, k, D = _normal((B, L, H), (H, L), (H,))

    def parts(x, k, D):
        return fft_conv(x, k, skip=D)[0]

    return _beside(LongConv(H, L), x, "fft_conv", parts, (x, k, D))


def hyena_case(small):
    """Hyena, forward+backward: B8 L4096 H128, beside its projections and convolutions
    with given filters."""
    B, L, H = (2, 128, 16) if small else (8, 4096, 128)
    inputs = _normal((B, L, H), (H, 3 * H), (3 * H, 3), (H, L), (H,), (H, H))

    def parts(x, into, short, k, D, out):
        a, b, v = jnp.split(short_conv(x @ into, short)[0], 3, -1)
        return (a * fft_conv(b * v, k, skip=D)[0]) @ out

    return _beside(
        Hyena(H, L), inputs[0], "projections and convolutions", parts, tuple(inputs)
    )


def _normal(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(k, s) * s[-1] ** -0.5
        for k, s in zip(keys, shapes, strict=True)
    ]


def _beside(layer, x, name, parts, inputs):
    """The gradient of a layer in everything, beside that of `parts(*inputs)`."""
    variables = nn.unbox(jax.jit(layer.init)({"params": jax.random.key(1)}, x))

    def whole(variables, x):
        return jnp.sum(layer.apply(variables, x)[0] ** 2)

    def plainly(*inputs):
        return jnp.sum(parts(*inputs) ** 2)

    return {
        type(layer).__name__: (jax.grad(whole, (0, 1)), (variables, x)),
        name: (jax.grad(plainly, tuple(range(len(inputs)))), inputs),
    }


def decode_case(small):
    """Decoding, B1, 4 layers, H128 N64, 64 tokens in one compiled loop."""
    H, tokens = (16, 8) if small else (128, 64)
    functions = {}
    for name, layer in (("S4D", "s4d"), ("dense state matrices", HERE + "DenseS4D")):
        model = build(model_config(layer, H, 4))
        x = jax.random.normal(jax.random.key(0), (1, tokens))
        state = model.init_state(1)
        variables = nn.unbox(
            jax.jit(model.init)({"params": jax.random.key(1)}, x[:, :1], state)
        )

        def run(variables, x, state, model=model):
            def one(state, token):
                y, state = model.apply(variables, token[:, None], state)
                return state, y

            return jax.lax.scan(one, state, x.T)

        variables = jax.jit(functools.partial(prepare, model))(variables, x[:, :1])
        functions[name] = (run, (variables, x, state))
    return functions


CASES = {
    "mixer": mixer_case,
    "step": step_case,
    "step_s4": step_s4_case,
    "step_mamba": step_mamba_case,
    "long_conv": long_conv_case,
    "hyena": hyena_case,
    "decode": decode_case,
}


def compile_rows(small):
    """Seconds to compile a training step of S4D at growing L and growing depth."""
    base = (64, 2) if small else (1024, 4)
    rows = []
    for length, depth in (base, (4 * base[0], base[1]), (base[0], 4 * base[1])):
        step, arguments = step_function(model_config("s4d", 32, depth))
        shapes = jax.eval_shape(functools.partial(arguments, 4, length))
        _, seconds, _ = timing.compile_function(step, shapes)
        rows.append({"length": length, "depth": depth, "seconds": seconds})
    return rows


def suite(options, console) -> dict:
    """Its figures by case: times, memory and the time to compile."""
    figures = {}
    for name, case in CASES.items():
        if options.case in (None, name):
            figures[name] = rows.measured(case, options.small, options.repeats)
            rows.show(console, case.__doc__, figures[name])
    if options.case in (None, "compile"):
        figures["compile"] = compile_rows(options.small)
        for row in figures["compile"]:
            console.print(
                f"compile a training step, L={row['length']} depth={row['depth']}: "
                f"{row['seconds']:.2f} s"
            )
    return figures
