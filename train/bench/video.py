"""Cases of `train.bench --suite video`: layers over frames, sizes paired.

Hidden channels of ConvLSTM = U = N, the real state size of ConvS5, as published; 3 x 3
kernels, one clip, every block rematerialised.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kernels.bench import timing
from layers import ConvLSTM, ConvS5, FrameAttention, FullFrameAttention
from layers.models.block import Block
from layers.models.stack import Stack
from ssm import conv_ssm
from train.bench import rows

CONTEXTS = (16, 32, 64, 128, 256, 512)  # frames of history
FRAMES = (75, 150, 300, 600)


def _stack(layer, U, depth=2):
    block = functools.partial(Block, mixer=layer, features=U, gate="none")
    return Stack((block,), depth, remat=True)


def _training(layer, frames, side, U):
    """A step of AdamW on the square of the outputs, and its arguments (B1)."""
    model, optimizer = _stack(layer, U), optax.adamw(1e-3)

    def step(params, opt_state, x):
        def loss(params):
            return jnp.mean(model.apply({"params": params}, x, train=True)[0] ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def arguments():
        x = jax.random.normal(jax.random.key(0), (1, frames, side, side, U))
        variables = jax.jit(model.init)({"params": jax.random.key(1)}, x[:, :1])
        params = nn.unbox(variables["params"])
        return params, optimizer.init(params), x

    return step, arguments


def _sizes(small):
    """Frames, side and U of the training step."""
    return (12, 4, 8) if small else (300, 16, 32)


def step_case(small):
    """Training step of 2 layers, B1, 300 frames of 16x16x32, remat."""
    frames, side, U = _sizes(small)
    paired = dict(features=U, size=(side, side))
    forms = {
        "ConvS5": functools.partial(ConvS5, **paired, state_size=U),
        "ConvLSTM": functools.partial(ConvLSTM, **paired),
        "ConvS5, P = U complex states": functools.partial(
            ConvS5, **paired, state_size=2 * U
        ),
        "ConvS5, y + D u": functools.partial(
            ConvS5, **paired, state_size=U, output="linear"
        ),
    }
    cases = {}
    for name, layer in forms.items():
        step, arguments = _training(layer, frames, side, U)
        cases[name] = (step, arguments())
    return cases


def memory_rows(small):
    """Temporary memory of a training step over frames, in chunks and at once."""
    _, side, U = _sizes(small)
    records = []
    for frames in (4, 8) if small else FRAMES:
        for name, chunk in (("in chunks", conv_ssm.CHUNK), ("at once", frames)):
            layer = functools.partial(ConvS5, U, (side, side), U, chunk=chunk)
            step, arguments = _training(layer, frames, side, U)
            shapes = jax.eval_shape(arguments)
            _, _, temporary = timing.compile_function(step, shapes)
            records.append(
                {"form": name, "frames": frames, "temporary_bytes": temporary}
            )
    return records


def generation_rows(small, repeats):
    """Seconds per generated frame behind a history of so many frames, 2 layers, B1,
    16x16x32; the cache of attention holds that history, a state none."""
    _, side, U = _sizes(small)
    paired, steps = dict(features=U, size=(side, side)), 2 if small else 4
    compiled = {}
    for context in (2, 4) if small else CONTEXTS:
        forms = {
            "ConvS5": functools.partial(ConvS5, **paired, state_size=U),
            "ConvLSTM": functools.partial(ConvLSTM, **paired),
            "attention, time and place": functools.partial(
                FrameAttention, **paired, context=context
            ),
            "attention, all pixels": functools.partial(
                FullFrameAttention, **paired, context=context
            ),
        }
        for name, layer in forms.items():
            model = _stack(layer, U)
            state = jax.tree.map(_filled(context), model.init_state(1))
            x = jnp.ones((1, 1, side, side, U))
            variables = nn.unbox(
                jax.jit(model.init)({"params": jax.random.key(1)}, x, state)
            )

            def run(variables, x, state, model=model):
                def one(carry, _):
                    return model.apply(variables, *carry), None

                return jax.lax.scan(one, (x, state), length=steps)[0][0]

            arguments = variables, x, state
            call, _, _ = timing.compile_function(run, arguments)
            compiled[name, context] = (call, arguments)
    times = timing.measure(compiled, repeats)
    records = []
    for (name, context), seconds in times.items():
        summary = timing.summary([s / steps for s in seconds])
        records.append({"form": name, "context": context, **summary})
    return records


def _filled(context):
    """Counts of a cache that is full."""
    return lambda leaf: (
        jnp.full_like(leaf, context - 1) if leaf.dtype == jnp.int32 else leaf
    )


def suite(options, console) -> dict:
    """A training step, its memory, generation."""
    step = step_case
    figures = {"step": rows.measured(step, options.small, options.repeats)}
    rows.show(console, step.__doc__, figures["step"])
    figures["memory"] = memory_rows(options.small)
    rows.show_rows(
        console,
        figures["memory"],
        "frames",
        lambda row: f"{row['temporary_bytes'] / 1e6:.0f} MB",
        "Temporary memory of a training step of ConvS5",
    )
    figures["generation"] = generation_rows(options.small, options.repeats)
    rows.show_rows(
        console,
        figures["generation"],
        "context",
        lambda row: f"{1e3 * row['median_s']:.2f} ms",
        "One generated frame after a history of so many",
    )
    return figures
