"""Sampling from a trained per-token model in its recurrent mode.

    python -m train.generate --workdir runs/pixels-digits-next-0 --count 8

The model reads the prompt in one parallel call (a prefill) and then makes one token per
step from its state; the cost of a token does not grow with the length.
"""

import argparse
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from layers import prepare
from train import files, settings
from train.evaluate import PROBLEMS, add_trust
from train.runs import load_run


def generate(model, variables, prompt, length, key, temperature=1.0):
    """Continues `prompt` by `length` tokens.

    Args:
        model: a token encoder and a "token" head, with a recurrent mode.
        variables: of the model.
        prompt: [B, L >= 1] int tokens.
        length: number of tokens to make.
        key: of the random draws.
        temperature: divides the logits; 0 takes the most likely token.

    Returns:
        [B, length] int32 tokens.

    Raises:
        ValueError: an empty prompt, a length below 1, a negative temperature, a model
            of another kind.
    """
    if model.head != "token" or model.encoder != "token":
        raise ValueError(
            "model: encoder and head must be 'token' to generate, got "
            f"{model.encoder!r} and {model.head!r}"
        )
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt: must be [B, L >= 1], got shape {prompt.shape}")
    if not (prompt.min() >= 0 and prompt.max() < model.vocab_size):
        raise ValueError(
            f"prompt: tokens must be in [0, {model.vocab_size}), got "
            f"{prompt.min()} to {prompt.max()}"
        )
    if length < 1:
        raise ValueError(f"length: must be at least 1, got {length}")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: must be 0 or more, got {temperature}")

    def draw(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draws = jax.random.categorical(key, logits / temperature)
        return draws.astype(jnp.int32)

    @jax.jit
    def sample(variables, prompt, state, key):
        keys = jax.random.split(key, length)
        logits, state = model.apply(variables, prompt, state)
        fast = prepare(model, variables, prompt[:, :1])
        first = draw(logits[:, -1], keys[0])

        def one(carry, key):
            token, state = carry
            logits, state = model.apply(fast, token[:, None], state)
            token = draw(logits[:, 0], key)
            return (token, state), token

        _, rest = jax.lax.scan(one, (first, state), keys[1:])
        return jnp.concatenate([first[:, None], rest.T], axis=1)

    state = model.init_state(prompt.shape[0])
    return sample(variables, jnp.asarray(prompt, jnp.int32), state, key)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.generate",
        description="Samples tokens; prints one sequence per line.",
    )
    parser.add_argument("--workdir", required=True, help="of a trained per-token run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    parser.add_argument("--count", type=int, default=4, help="sequences to make")
    parser.add_argument(
        "--length", type=int, default=0, help="tokens; 0: the run's own"
    )
    parser.add_argument("--prompt", default="", help="tokens; default: the start token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="also write the tokens to this .npy")
    parser.add_argument(
        "--picture", default="", help="also draw square sequences to this .png"
    )
    add_trust(parser)
    options = parser.parse_args(argv)
    try:
        run = load_run(options.workdir, options.step, options.trust)
        length = options.length or run.spec.length
        _check_numbers(options, length)
        prompt = _prompt(options, run.spec)
        tokens = generate(
            run.model,
            run.variables,
            np.tile(prompt, (options.count, 1)),
            length,
            jax.random.key(options.seed),
            options.temperature,
        )
        tokens = np.asarray(tokens)
        for row in tokens:
            print(" ".join(map(str, row)))
        if options.out:
            _save(options.out, tokens)
        if options.picture:
            _draw(tokens, options.picture)
    except PROBLEMS as problem:
        parser.error(str(problem))
    return 0


def _check_numbers(options, length):
    """Raises a `ValueError` for what cannot be, before anything is computed."""
    for name, value in (("count", options.count), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    settings.check_seed("seed", options.seed)
    # Beside the tokens there is a key for each, of 8 bytes.
    taken = 4 * options.count * length + 8 * length
    settings.check_memory("count, length", taken, "the tokens")
    for name in ("out", "picture"):
        path = settings.place(name, getattr(options, name))
        if getattr(options, name) and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                f"{name}: must be a file in a folder that exists, got {str(path)!r}"
            )
    if options.picture and math.isqrt(length) ** 2 != length:
        raise ValueError(f"length: must be a square number with picture, got {length}")


def _save(out, tokens):
    """Writes an .npy, whole or not at all; the suffix is added where it is missing."""
    path, packed = settings.place("out", out), io.BytesIO()
    np.save(packed, tokens)
    path = path if path.suffix == ".npy" else path.with_name(path.name + ".npy")
    files.write_atomically(path, packed.getvalue())


def _prompt(options, spec):
    words = options.prompt.split()
    if not words:
        # A dataset of next tokens names the token that stands before the first one.
        return np.array([spec.start], np.int32)
    try:
        return np.array([int(word) for word in words], np.int32)
    except (ValueError, OverflowError):
        raise ValueError(
            f"prompt: must be integers separated by spaces, got {options.prompt!r}"
        ) from None


def _draw(tokens, path):
    """One grey image per sequence, for lengths that are squares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    side = math.isqrt(tokens.shape[1])
    figure, axes = plt.subplots(1, len(tokens), figsize=(len(tokens), 1), squeeze=False)
    for axis, row in zip(axes[0], tokens, strict=True):
        axis.imshow(row.reshape(side, side), cmap="gray_r")
        axis.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
