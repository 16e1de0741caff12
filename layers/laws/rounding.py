"""What the shorter dtypes cost every layer.

    python -m layers.laws.rounding [--layers s4d,mamba] [--lengths 64,1024,4096]
                                        [--out layers/laws/rounding.md]

The table has, for every layer with its default fields, the largest difference between
float32 and float64, over the largest value, of the output, of the final state and of
the gradients of a random contraction of both; and that of the output between bfloat16
and float64.
"""

import argparse
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers import laws
from layers.models.build import LAYERS
from layers.models.precision import POLICIES, cast

BATCH, FEATURES = 2, 16


def _results(layer, policy, variables, x):
    """Output, final state and gradients of one call."""
    layer = layer.clone(dtype=policy.compute)
    variables, x = cast((variables, x), policy)
    x = x.astype(policy.compute)

    def contraction(params, x):
        y, final = layer.apply({**variables, "params": params}, x)
        total = 0.0
        for i, leaf in enumerate(jax.tree.leaves((y, final))):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            wave = jnp.cos(jnp.arange(leaf.size) + i).reshape(leaf.shape)
            total = total + jnp.sum(leaf.real * wave) + jnp.sum(leaf.imag * wave)
        return total, (y, final)

    compute = jax.jit(jax.value_and_grad(contraction, (0, 1), has_aux=True))
    (_, (y, final)), gradients = compute(variables["params"], x)
    return jax.device_get((y, final, gradients))


def measure(name: str, length: int) -> list[float]:
    """Errors of layer `name` on `length` tokens: float32 output, state and gradients,
    bfloat16 output."""
    cls = LAYERS[name]
    fields = cls.__dataclass_fields__
    capacity = {key: length for key in ("length", "context") if key in fields}
    layer = cls(FEATURES, **capacity)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (BATCH, length, FEATURES))
    variables = nn.unbox(jax.jit(layer.init)({"params": keys[1]}, x))
    single = _results(layer, POLICIES["float32"], variables, x)
    half = _results(layer, POLICIES["bfloat16"], variables, x)
    with jax.enable_x64(True):
        variables, x = jax.device_get((variables, x))
        as_float64 = jax.tree.map(jnp.asarray, (variables, x))
        double = _results(layer, POLICIES["float64"], *as_float64)
    errors = [laws.worst(s, d) for s, d in zip(single, double, strict=True)]
    return [*errors, laws.worst(half[0], double[0])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m layers.laws.rounding")
    parser.add_argument("--layers", default=",".join(LAYERS), help="names, by commas")
    parser.add_argument("--lengths", default="64,1024,4096", help="of the sequences")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args(argv)
    names = options.layers.split(",")
    unknown = sorted(set(names) - set(LAYERS))
    if unknown:
        parser.error(f"--layers: must be among {sorted(LAYERS)}, got {unknown}")
    numbers = options.lengths.split(",")
    if not all(n.isdecimal() and int(n) for n in numbers):
        parser.error(
            f"--lengths must be whole numbers from 1, by commas, got {options.lengths}"
        )
    lengths = [int(n) for n in numbers]
    lines = [
        "| layer | length | output | final state | gradients | output in bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in names:
        for length in lengths:
            errors = " | ".join(f"{e:.0e}" for e in measure(name, length))
            lines.append(f"| `{name}` | {length} | {errors} |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text(_page(lines))
    return 0


def _page(lines):
    command = "python -m layers.laws.rounding --out layers/laws/rounding.md"
    return "\n".join(
        [
            "# Errors by dtype",
            "",
            f"`{command}` on {jax.devices()[0].device_kind}, jax {jax.__version__}: "
            f"largest difference from float64 over the largest value, {BATCH} "
            f"sequences of {FEATURES} features, default fields, initial parameters.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
