"""Compiles the training step of a config for a machine, and says what it needs there.

The step is that of `train.parts.assemble`, which the trainer compiles too. Nothing of
it is allocated.
"""

import dataclasses
import functools
import math
import operator
import re
import time
from collections.abc import Mapping

import jax
from jax.extend.core import Literal
from ml_collections import ConfigDict

from kernels.dispatch import backend_report
from layers import contract
from layers.models.build import build
from train import losses, parts, resolve, sharding, step
from train.data.spec import Spec
from train.parts import Assembled
from train.plan import operations, samples
from train.plan.figures import Plan, held
from train.plan.machine import Machine
from train.plan.program import Program

FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.I)
# What libtpu says that is: all, or what is beside the arguments.
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", re.I)
BESIDE = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is planned: a config, and the data that it is trained on.

    Attributes:
        config: the run's, not completed.
        spec: of its data.
        one: the shapes of a batch of one example, see `train.plan.samples`.
    """

    config: ConfigDict
    spec: Spec
    one: Mapping


def plan(
    task: Task, machine: Machine, changes: Mapping | None = None, trial: bool = False
) -> Plan:
    """The plan of a task's step on a machine.

    Args:
        task: what is trained.
        machine: where.
        changes: key -> value, such as "model.remat": True, that the config gets before.
        trial: asks only whether it fits: compiles nothing where state and batch alone
            do not, and no second program for the costs of what does not.

    Raises:
        ValueError: a config that cannot be, or a mesh or a batch that does not divide
            as the machine needs it.
    """
    changes = dict(changes or {})
    config = resolve.complete(changed(task.config, changes), task.spec)
    assembled = _assembled(config, task, machine)
    found = Plan(
        machine=machine.name,
        kind=machine.kind,
        devices=len(machine.devices),
        note=machine.note,
        mesh=dict(assembled.mesh.shape),
        model=_described(config),
        batch=config.train.batch_size,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(assembled.params)),
        changes=changes,
        held=held(assembled.target, assembled.sample),
        memory=machine.memory,
    )
    alone = sum(found.held.values())
    if trial and machine.memory is not None and alone > machine.memory:
        return dataclasses.replace(found, needed=alone, refused="not compiled")
    return _compiled(found, config, task, machine, assembled, trial)


def changed(config: ConfigDict, changes: Mapping) -> ConfigDict:
    """A copy of a config with other values: key, such as "model.remat", -> value."""
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, config)[name] = value
    return config


def _assembled(config: ConfigDict, task: Task, machine: Machine) -> Assembled:
    mesh = sharding.make_mesh(config, machine.devices)
    resolve.check(config, mesh)
    model = build(config.model)
    contract.check_init_state(model)
    if task.spec.causal:
        resolve.check_causal(model)
    # What was traced for another machine would be taken again, with its kernels.
    jax.clear_caches()
    sample = samples.batch(task.one, config.train.batch_size, sharding.rows(mesh))
    with machine.tracing():
        return parts.assemble(config, task.spec, mesh, model, sample)


def _described(config: ConfigDict) -> str:
    names = config.model.layer
    layer = names if isinstance(names, str) else "+".join(names)
    return f"{layer}, {config.model.depth} deep, {config.model.features} features"


def _compiled(
    found: Plan,
    config: ConfigDict,
    task: Task,
    machine: Machine,
    assembled: Assembled,
    trial: bool,
) -> Plan:
    with machine.tracing():
        traced = assembled.trace()
        lowered = traced.lower(lowering_platforms=machine.lowering or None)
        found = dataclasses.replace(
            found,
            kernels=backend_report(),
            products=operations.flops(traced.jaxpr.jaxpr),
            activations=_activations(config, task.spec, assembled),
        )
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        if not FULL.search(str(problem)):
            raise
        seconds = time.perf_counter() - start
        refused, needed = _full(str(problem), sum(found.held.values()))
        return dataclasses.replace(
            found, seconds=seconds, refused=refused, needed=needed
        )
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    parts_of_it = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    found = dataclasses.replace(
        found,
        seconds=seconds,
        needed=sum(parts_of_it.values()),
        **parts_of_it,
        loops=program.loops(),
        calls=tuple(program.kernels()),
        collectives=tuple(program.collectives()),
    )
    costs, whose = compiled.cost_analysis() or {}, "the compiler"
    if "flops" not in costs and (found.fits or not trial):
        costs = _costs_on_a_cpu(config, task, _rows(config, assembled))
        whose = "the program of a CPU with one device's rows"
    return dataclasses.replace(
        found,
        flops=costs.get("flops"),
        moved=costs.get("bytes accessed"),
        costs_from=whose,
    )


def _full(problem: str, arguments: int) -> tuple[str, int | None]:
    """What a compiler says of a step that has no room, and the bytes that it would
    need, where that is said."""
    first, *_ = problem.splitlines()
    for said, more in ((USED, 0), (BESIDE, arguments)):
        if found := said.search(problem):
            return first, int(float(found[1]) * UNITS[found[2].upper()]) + more
    return first, None


def _activations(config: ConfigDict, spec: Spec, assembled: Assembled) -> int:
    """Bytes that JAX keeps from the forward for the backward pass of one device's rows
    in one micro-batch, and in one piece where sequences are read in pieces, as if
    nothing but the rows were divided: no parameters and nothing of the batch."""
    loss = losses.make(spec.loss, config.train.label_smoothing)
    model, chunk = build(config.model), config.train.chunk
    make = step.make_piece_sums if chunk else step.make_sums
    sums = make(model, loss, spec.padded)
    rows = max(1, _rows(config, assembled) // config.train.accumulate)

    def part(x):
        shape = (rows, chunk, *x.shape[2:]) if chunk else (rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    batch = jax.tree.map(part, dict(assembled.sample))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def kept(params, carried, batch, key):
        _, backward, _ = jax.vjp(
            lambda params: sums(params, carried, batch, key), params, has_aux=True
        )
        return jax.tree.leaves(backward)

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), assembled.target
    )
    carried = target.collections()
    if chunk:
        carried = carried, jax.eval_shape(lambda: model.init_state(rows))
    jaxpr = jax.make_jaxpr(kept)(target.params, carried, batch, key).jaxpr
    made = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    made -= {*jaxpr.invars, *jaxpr.constvars}
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in made)


def _rows(config: ConfigDict, assembled: Assembled) -> int:
    """Of the batch, on one device."""
    return sharding.rows(assembled.mesh).shard_shape((config.train.batch_size,))[0]


def _costs_on_a_cpu(config: ConfigDict, task: Task, rows: int) -> Mapping:
    """The cost analysis of a CPU's program of one device's rows."""
    changes = {f"mesh.{axis}": 1 for axis in config.mesh}
    changes |= {"train.batch_size": rows, "train.eval_batch_size": 0}
    cpu = Machine("cpu", tuple(jax.devices("cpu")[:1]), None)
    assembled = _assembled(changed(config, changes), task, cpu)
    return assembled.trace().lower().compile().cost_analysis() or {}
