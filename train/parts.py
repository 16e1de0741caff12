"""What a run consists of: the parts that stay, and the progress that a step changes."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from layers import contract
from train import (
    checkpoint,
    data,
    flight,
    losses,
    optimizers,
    processes,
    resolve,
    settings,
    sharding,
    state,
    step,
    stream,
)
from train.checkpoint import Checkpoints
from train.data import said
from train.data.pipeline import TrainIterator
from train.data.spec import Spec
from train.metrics import print_table
from train.signals import Stop
from train.state import TrainState


@dataclasses.dataclass
class Parts:
    """What a run needs and does not change.

    Attributes:
        dataset, mesh, model: of the run.
        facts: what the data were taken for, see `train.data.said`; {} on other hosts.
        create: () -> the state before the first step.
        target: that state's shapes and shardings.
        schedule: step -> learning rate.
        train_step: compiled for every shape of a batch, (state, batch) -> (state,
            measured).
        eval_step: (variables, batch) -> sums of loss and metrics, in pieces of
            `train.chunk` tokens where training is.
        probe: (state, batch) -> what the flight recorder shows.
        examples: () -> the endless stream to train on, from its first batch.
        batches: that stream, where the run stands.
    """

    dataset: data.Dataset
    facts: dict
    mesh: Mesh
    model: nn.Module
    create: Callable[[], TrainState]
    target: TrainState
    schedule: optax.Schedule
    train_step: Callable
    eval_step: Callable
    probe: Callable
    examples: Callable[[], TrainIterator]
    batches: TrainIterator


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        state: after `step` steps.
        step: steps done.
        best: {"step", "scores"} of the best on validation; None before the first.
        window: what the steps since the last log measured; not those skipped.
        unvalidated: whether a validation of `step` is due, which a signal cut off.
        skipped: steps so far that changed nothing, see `train.skip_nonfinite`.
        in_a_row: how many of them were the last ones.
        unchecked: what the last steps measured, still on the device.
    """

    state: TrainState
    step: int = 0
    best: dict | None = None
    window: list = dataclasses.field(default_factory=list)
    unvalidated: bool = False
    skipped: int = 0
    in_a_row: int = 0
    unchecked: list = dataclasses.field(default_factory=list)

    def memory(self) -> dict:
        """What is kept beside the state, of steps that were all checked."""
        keys = ("step", "best", "window", "unvalidated", "skipped", "in_a_row")
        return {key: getattr(self, key) for key in keys}


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A training step that is not compiled yet: what `set_up` and `train.plan` compile.

    Attributes:
        mesh, sample: the devices, and a batch or its shapes and shardings.
        params: the tree of the parameters' shapes.
        groups: pattern -> paths of its parameters.
        create: () -> the state before the first step.
        target: that state's shapes and shardings.
        schedule: step -> learning rate.
        train_step: (state, batch) -> (state, measured).
    """

    mesh: Mesh
    sample: Mapping
    params: Any
    groups: dict[str, list[str]]
    create: Callable[[], TrainState]
    target: TrainState
    schedule: optax.Schedule
    train_step: Callable

    def trace(self, sample: Mapping | None = None) -> jax.stages.Traced:
        """The step as JAX reads it, for the devices of the mesh, and for another
        sample where one is given."""
        return self.train_step.trace(
            self.target, self.sample if sample is None else sample
        )


def assemble(
    config: ConfigDict, spec: Spec, mesh: Mesh, model: nn.Module, sample: Mapping
) -> Assembled:
    """The parts of a training step; allocates and compiles nothing.

    Args:
        config: completed by `resolve.complete`.
        spec: of the data.
        mesh: the devices, which need not be here.
        model: what `config.model` says.
        sample: a batch on the mesh, or its shapes and shardings.

    Raises:
        ValueError: a parameter that no group matches, heads or inner features that
            mesh.tensor does not divide, a length or a layer that mesh.sequence does
            not, a train.chunk that cannot be.
    """
    options = config.train
    boxes = state.param_boxes(model, sample)
    sharding.check_tensor(model, boxes, mesh)
    check_inputs(config, mesh, model, sample["inputs"])
    optimizer, groups, schedule = optimizers.make(config, boxes)
    ema = options.ema > 0
    create = state.creator(model, optimizer, sample, config.seed, mesh, ema=ema)
    target = state.abstract(create)
    train_step = step.make_train_step(
        model,
        optimizer,
        losses.make(spec.loss, options.label_smoothing),
        config,
        spec.padded,
        jax.tree.map(lambda x: x.sharding, target),
    )
    params = nn.unbox(boxes)
    return Assembled(mesh, sample, params, groups, create, target, schedule, train_step)


def check_inputs(config: ConfigDict, mesh: Mesh, model: nn.Module, inputs) -> None:
    """`ValueError` where the inputs' length cannot be divided as is asked for."""
    sharding.check_sequence(model, inputs, mesh)
    resolve.check_chunk(config, model, inputs)


def by_shape(compiled: Sequence[Callable], samples: Sequence[Mapping]) -> Callable:
    """The step that takes batches of the shape of any sample: (state, batch) -> (state,
    measured)."""
    if len(compiled) == 1:
        return compiled[0]
    shapes = [sample["mask"].shape for sample in samples]
    steps = dict(zip(shapes, compiled, strict=True))
    return lambda state, batch: steps[batch["mask"].shape](state, batch)


def set_up(
    config: ConfigDict,
    dataset: data.Dataset,
    mesh: Mesh,
    model: nn.Module,
    stop: Stop,
) -> Parts:
    """Says what the data are taken for and compiles the step; nothing of the state is
    allocated yet. `ValueError` for a model whose state cannot be made, or declared to
    be none."""
    options, spec, seed = config.train, dataset.spec, config.seed
    own = functools.partial(sharding.own_rows, mesh)
    examples = functools.partial(
        dataset.train, options.batch_size, seed, config.data.workers, own
    )
    with processes.agreed():
        contract.check_init_state(model)
        facts = said.facts(dataset) if jax.process_index() == 0 else {}
        if facts:
            print(*said.lines(facts), sep="\n", flush=True)
        samples = dataset.samples(options.batch_size, seed, own)
        samples = [sharding.place(sample, mesh) for sample in samples]
        if facts and dataset.buckets:
            print(dataset.describe_buckets(options.batch_size), flush=True)
        assembled = assemble(config, spec, mesh, model, samples[0])
        for sample in samples[1:]:
            check_inputs(config, mesh, model, sample["inputs"])
        if jax.default_backend() == "cpu":
            leaves = jax.tree.leaves(assembled.params)
            size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
            settings.check_memory("model", size, "its parameters")
        stop.nothing_to_save("compiling")
        shapes = _described(config, samples)
        print(f"compiling the training step: {shapes}", flush=True)
        before = time.monotonic()
        lowered = [assembled.trace(sample).lower() for sample in samples]
    # Processes may share what a compiler finds out.
    compiled = [one.compile() for one in lowered]
    seconds = time.monotonic() - before
    stop.nothing_to_save("starting")
    print_table(config, assembled.groups, assembled.params, mesh, compiled[0], seconds)
    return Parts(
        dataset=dataset,
        facts=facts,
        mesh=mesh,
        model=model,
        create=assembled.create,
        target=assembled.target,
        schedule=assembled.schedule,
        train_step=by_shape(compiled, samples),
        eval_step=_evaluation(config, spec, model, mesh),
        probe=flight.make_probe(
            model, losses.make(spec.loss), seed, spec.padded, mesh, options.chunk
        ),
        examples=examples,
        batches=examples(),
    )


def _evaluation(config, spec, model, mesh) -> Callable:
    """The step of evaluation, whose memory is no more than that of training: in pieces
    where that is."""
    chunk, loss = config.train.chunk, losses.make(spec.loss)
    if chunk:
        return stream.make_eval_step(model, loss, spec.padded, mesh, chunk)
    return step.make_eval_step(model, loss, spec.padded, mesh)


def _described(config, samples) -> str:
    """What is compiled: the model, and the largest input of a batch of each shape."""
    shapes = []
    for sample in samples:
        inputs = max(jax.tree.leaves(sample["inputs"]), key=lambda x: x.size)
        shapes.append(" x ".join(map(str, inputs.shape)))
    return (
        f"{config.model.depth} blocks of {config.model.features} features "
        f"({config.model.layer}), a batch of {' or '.join(shapes)}"
    )


def start(
    config: ConfigDict, workdir: Path, parts: Parts, checkpoints: Checkpoints
) -> Progress:
    """Where to go on from: the own workdir, else `train.init_from`, else scratch."""
    restored = checkpoints.restore(parts.target)
    if restored is not None:
        trained, position, memory = restored
        parts.batches.set_state(position)
        print(f"resumed from step {memory['step']} in {workdir}")
        # Checkpoints from before there was "unvalidated" or "skipped" lack them.
        return Progress(trained, **memory)
    initial = parts.create()
    if config.train.init_from:
        initial = checkpoint.init_from(config.train.init_from, initial)
    return Progress(initial)
