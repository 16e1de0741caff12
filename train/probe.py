"""What the mixers of a model compute, before and after training: filters, spectra."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.facts import has_state
from train import checkpoint, signals, state
from train.runs import Run

# What bounds the time of a report, whatever the model and the data.
LAGS = 4096
IMPULSES = 64
IMPULSE_NUMBERS = 2**22  # impulses x lags x features fed at once, but 8 impulses always

SILENCE = 1e-6  # below this, an answer to a unit impulse is rounding


class Response(NamedTuple):
    """What one mixer computes at one stage of training.

    Attributes:
        filters: [K, lags] output h after a unit impulse in input h, for K features h.
        memory: [lags] root mean square over those impulses of the whole output.
        log_a: complex eigenvalues of one token's step, as logarithms, or None.
    """

    filters: np.ndarray
    memory: np.ndarray
    log_a: np.ndarray | None


class Block(NamedTuple):
    """One block of the stack.

    Attributes:
        title: its number, from 1, and its layer.
        features: [K] the features whose filters are kept.
        lags: [lags] tokens since the impulse, negative where a layer reads the future.
        responses: stage -> `Response`.
    """

    title: str
    features: np.ndarray
    lags: np.ndarray
    responses: dict[str, Response]

    def silent(self) -> bool:
        """Whether an impulse leaves no trace in other tokens, at any stage: its filters
        would be flat lines."""
        return all(
            np.abs(response.memory[self.lags != 0]).max(initial=0)
            <= SILENCE * max(1.0, np.abs(response.memory).max())
            for response in self.responses.values()
        )

    def finite(self) -> bool:
        """Whether all that it answers with are numbers, at every stage."""
        return all(np.isfinite(r.memory).all() for r in self.responses.values())

    def has_spectrum(self) -> bool:
        """Whether its layer has eigenvalues."""
        spectra = (response.log_a for response in self.responses.values())
        return any(log_a is not None and log_a.size for log_a in spectra)


def initial_variables(run: Run) -> dict:
    """The variables that the run began with, from its seed or `train.init_from`.

    Raises:
        ValueError, CheckpointError: the run it began from is not there or does not fit.
    """
    batch = next(iter(run.dataset.evaluation("train", 1)))
    init = jax.jit(functools.partial(state.init_variables, run.model, batch))
    variables = init(jax.random.key(run.config.seed))
    if not run.config.train.init_from:
        return variables
    parts = {name: variables.get(name, {}) for name in state.COLLECTIONS}
    initial = state.TrainState(step=0, opt_state=None, ema=None, **parts)
    return checkpoint.init_from(run.config.train.init_from, initial).variables()


def blocks(model, stages: dict[str, dict], length: int) -> list[Block]:
    """Every block's mixer, alone, at every stage: its filters, memory and eigenvalues.

    A filter is the response to a unit impulse minus that to silence, so that a layer
    which is not linear has one too. A layer that reads the future gets the impulse in
    the middle, any other at the first token.

    Args:
        model: a `Model` or `Video`, as `layers.models.build.build` returns it.
        stages: name -> variables of the model.
        length: tokens of a sequence; at most LAGS of it are looked at.
    """
    stack = model.stack()
    compiled = [_probe(make().mixer(), length) for make in stack.pattern]
    found = []
    for number in signals.stoppable(range(stack.depth)):
        layer, features, lags, respond = compiled[number % len(stack.pattern)]
        responses = {
            name: respond(mixer_variables(variables, stack, number))
            for name, variables in stages.items()
        }
        title = f"block {number + 1}, {type(layer).__name__}"
        found.append(Block(title, features, lags, responses))
    return found


def mixer_variables(variables: dict, stack: nn.Module, number: int) -> dict:
    """Those of the mixer of block `number`, from 0, among a model's variables; the
    repeated blocks have a leading axis of repetitions."""
    repeat, kind = divmod(number, len(stack.pattern))
    repeated = repeat < stack.depth // len(stack.pattern)
    path = ("repeated", f"block_{kind}") if repeated else (f"rest_{kind}",)
    found = {}
    for name, tree in variables.items():
        for key in ("stack", *path, "mixer"):
            tree = tree.get(key, {})
        tree = jax.tree.map(np.asarray, tree)
        found[name] = jax.tree.map(lambda x: x[repeat], tree) if repeated else tree
    return {name: tree for name, tree in found.items() if tree}


def _probe(layer: nn.Module, length: int):
    """(layer, features, lags, variables -> Response), compiled once for all blocks."""
    L, H = min(length, LAGS), layer.features
    position = 0 if has_state(layer) else L // 2
    count = min(H, IMPULSES, max(8, IMPULSE_NUMBERS // (L * H)))
    features = np.linspace(0, H - 1, count).astype(int)
    rows = np.arange(count)
    inputs = np.zeros((count + 1, L, H), np.float32)  # the last row is silence
    inputs[rows, position, features] = 1.0

    @jax.jit
    def impulses(variables):
        y, _ = layer.apply(variables, inputs)
        y = y[:-1].astype(jnp.float32) - y[-1].astype(jnp.float32)
        memory = jnp.sqrt(jnp.mean(jnp.sum(y**2, axis=-1), axis=0))
        return y[rows, :, features], memory

    @jax.jit
    def eigenvalues(variables):
        return layer.apply(variables, method="eigenvalues")

    def respond(variables):
        filters, memory = map(np.asarray, impulses(variables))
        log_a = None
        if hasattr(layer, "eigenvalues"):
            with jax.default_device(_cpu()):
                log_a = np.asarray(eigenvalues(variables)).ravel()
            log_a = log_a[np.isfinite(log_a)]
        return Response(filters, memory, log_a)

    return layer, features, np.arange(L) - position, respond


def _cpu():
    """Not every device can compute the eigenvalues of a dense matrix; None, the default
    device, where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
