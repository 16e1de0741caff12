"""Sampling from a trained per-token model in its recurrent mode.

    python -m train.generate --workdir runs/pixels-digits-next-0 --count 8

The model reads the prompt in parallel (a prefill) and then makes one token per step
from its state; the cost of a token does not grow with the length. Both are done --chunk
tokens at a time, so that no more than these are on the device; which tokens are drawn
does not depend on it. One sequence is printed as it is made, several once all are
there. --prompt_file names an .npy of integers [L], for prompts that are longer than a
command line.
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers import prepare
from train import files, settings, step, stream
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
    made = tokens_in_pieces(model, variables, prompt, length, key, temperature)
    return np.concatenate([*made], axis=1)


def tokens_in_pieces(
    model: nn.Module,
    variables: Mapping,
    prompt: np.ndarray,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    chunk: int = stream.CHUNK,
    advance: stream.Advance = stream.unheard,
) -> Iterator[np.ndarray]:
    """What `generate` makes, [B, chunk] tokens at a time, of which the last piece may
    have fewer; the prompt is read in pieces of so many too.

    Token n is drawn with fold_in(key, n), whatever the chunk. `advance` is told the
    tokens of every piece that is read or made.

    Raises:
        ValueError: as `generate`, or a chunk below 1; before the first piece.
    """
    prompt = np.asarray(prompt)
    _check(model, prompt, length, temperature)
    stream.check("chunk", chunk, model)
    _check_capacity(model, variables, prompt)
    return _pieces(model, variables, prompt, length, key, temperature, chunk, advance)


def _check(model, prompt, length, temperature):
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


def _check_capacity(model, variables, prompt):
    """In pieces a layer would not see that the whole is longer than it can take."""
    whole = jax.ShapeDtypeStruct(prompt.shape, jnp.int32)
    jax.eval_shape(model.apply, variables, whole, model.init_state(len(prompt)))


def _pieces(model, variables, prompt, length, key, temperature, chunk, advance):
    variables = jax.tree.map(jnp.asarray, variables)  # to the device, once
    prompt = prompt.astype(np.int32)
    rows, size = len(prompt), min(chunk, length)
    last = (prompt.shape[1] - 1) % chunk  # of the last piece of the prompt

    @functools.partial(jax.jit, donate_argnums=1)
    def read(variables, state, piece):
        sequence = step.sequence_of(piece, "mask" in piece)
        logits, state = model.apply(variables, piece["inputs"], state, sequence)
        return logits[:, last], state

    def draw(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draws = jax.random.categorical(key, logits / temperature)
        return draws.astype(jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def make(variables, logits, state, key, first, count):
        def one(n, carry):
            logits, state, made = carry
            token = draw(logits, jax.random.fold_in(key, first + n))
            logits, state = model.apply(variables, token[:, None], state)
            return logits[:, 0], state, made.at[n].set(token)

        made = jnp.zeros((size, rows), jnp.int32)
        logits, state, made = jax.lax.fori_loop(0, count, one, (logits, state, made))
        return made.T, logits, state

    state = jax.jit(lambda: model.init_state(rows))()
    every = stream.over(
        lambda piece, state: read(variables, state, piece),
        state,
        {"inputs": prompt},
        chunk,
        advance,
    )
    for found in every:
        logits, state = found
    first_token = prompt[:, :1]
    fast = jax.jit(lambda variables: prepare(model, variables, first_token))(variables)
    for first in range(0, length, size):
        count = min(size, length - first)
        made, logits, state = make(fast, logits, state, key, first, count)
        yield np.asarray(made)[:, :count]
        advance(rows * count)


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
    parser.add_argument("--prompt_file", default="", help="an .npy of such, [L]")
    parser.add_argument(
        "--chunk",
        type=int,
        default=stream.CHUNK,
        help=f"tokens on the device at once; default: {stream.CHUNK}",
    )
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
        prompt = np.tile(prompt, (options.count, 1))
        tokens = _written(run, prompt, length, options)
        if options.picture:
            _draw(tokens, options.picture)
    except PROBLEMS as problem:
        parser.error(str(problem))
    return 0


def _written(run, prompt, length, options) -> np.ndarray:
    """Makes the tokens [count, length], and prints and saves them on the way."""
    chunk, alone = options.chunk, len(prompt) == 1
    tokens, at = np.empty((len(prompt), length), np.int32), 0
    pieces = -(-prompt.shape[1] // chunk) + -(-length // chunk)
    shown = not (alone and sys.stdout.isatty())
    with (
        _saving(options.out, tokens.shape) as save,
        stream.bar("generating", pieces, shown) as advance,
    ):
        made = tokens_in_pieces(
            run.model,
            run.variables,
            prompt,
            length,
            jax.random.key(options.seed),
            options.temperature,
            chunk,
            advance,
        )
        for piece in made:
            save(at, piece)
            if alone:
                print(" " * (at > 0) + " ".join(map(str, piece[0])), end="", flush=True)
            tokens[:, at : at + piece.shape[1]] = piece
            at += piece.shape[1]
    if alone:
        print()
    else:
        for row in tokens:
            print(" ".join(map(str, row)))
    return tokens


def _check_numbers(options, length):
    """Raises a `ValueError` for what cannot be, before anything is computed."""
    sizes = dict(count=options.count, length=length, chunk=options.chunk)
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
        settings.check(name, value, 1)
    settings.check_seed("seed", options.seed)
    taken = 4 * options.count * length
    settings.check_memory("count, length", taken, "the tokens")
    for name in ("out", "picture"):
        path = settings.place(name, getattr(options, name))
        if getattr(options, name) and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                f"{name}: must be a file in a folder that exists, got {str(path)!r}"
            )
    if options.picture and math.isqrt(length) ** 2 != length:
        raise ValueError(f"length: must be a square number with picture, got {length}")


@contextlib.contextmanager
def _saving(out, shape):
    """(at, piece) -> None, which writes a piece [count, n] of tokens into an .npy that
    is there whole or not at all; its suffix is added where it is missing. Nothing is
    written without `out`."""
    if not out:
        yield lambda at, piece: None
        return
    path = settings.place("out", out)
    path = path if path.suffix == ".npy" else path.with_name(path.name + ".npy")
    with files.replacing(path) as file:
        layout = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, layout)
        begin = file.tell()

        def save(at, piece):
            for row, tokens in enumerate(piece):
                file.seek(begin + 4 * (row * shape[1] + at))
                file.write(tokens.astype("<i4").tobytes())

        yield save


def _prompt(options, spec):
    words = options.prompt.split()
    if options.prompt_file:
        if words:
            raise ValueError(
                "prompt: must go without prompt_file, which has the tokens"
            )
        return _read_prompt(options.prompt_file)
    if not words:
        # A dataset of next tokens names the token that stands before the first one.
        return np.array([spec.start], np.int32)
    try:
        return np.array([int(word) for word in words], np.int32)
    except (ValueError, OverflowError):
        raise ValueError(
            f"prompt: must be integers separated by spaces, got {options.prompt!r}"
        ) from None


def _read_prompt(name):
    path = settings.place("prompt_file", name)
    try:
        with path.open("rb") as file:
            prompt = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ValueError(f"prompt_file: {path} cannot be read: {reason}") from None
    if prompt.ndim != 1 or not len(prompt) or prompt.dtype.kind not in "iu":
        raise ValueError(
            f"prompt_file: must be integers [L >= 1], got {prompt.dtype} of shape "
            f"{prompt.shape}"
        )
    return prompt


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
