"""What a training step needs on a machine, compiled for it before it is there.

    python -m train.plan --config pixels:digits,layer=s5 --target here
    python -m train.plan --config synthetic:mqar --target tpu:v5e:4x4 --json plan.json
    python -m train.plan --config synthetic:mqar,layer=mamba --target gpu:h200:8

--target is "here", the devices of this machine, or one of kernels.check with a topology
behind it: tpu:v5e:16x16, chips along two axes, gpu:h200:8, GPUs of a host (2x8 of two);
without one it is a single device. The compiler of that machine compiles the step that
`train.main` would run there (`make compiled` gets it, in .venv-tpu and .venv-cuda);
where it is missing, or with --emulate, as many CPU devices stand for it, and the plan
says so. Nothing is allocated, and the data need not be there where the config says what
they are.

Where the step does not fit into the memory of a device (--memory: so many gigabytes),
the smallest change after which it does is looked for by compiling, see
`train.plan.remedies`; --nopropose leaves that out. The exit code is 1 where it does not
fit as the config is, 2 for what cannot be.

--workload NAME plans one of `train.plan.workloads` instead of a config. --table plans
all of them, or the one, on the machines of docs/plan.md whose compilers are here, and
writes that page.
"""

import json
from pathlib import Path

from absl import flags

from train import main as command_line

TARGET = flags.DEFINE_string(
    "target", "here", "here, or such as tpu:v5e:16x16, gpu:h200:8"
)
JSON = flags.DEFINE_string("json", None, "writes the plan to this file too")
MEMORY = flags.DEFINE_float(
    "memory", None, "gigabytes (10^9) of a device", lower_bound=0
)
EMULATE = flags.DEFINE_bool("emulate", False, "plan for CPU devices that stand for it")
PROPOSE = flags.DEFINE_bool("propose", True, "look for what makes it fit")
TABLE = flags.DEFINE_bool("table", False, "plan the workloads of docs/plan.md")
WORKLOAD = flags.DEFINE_string(
    "workload", None, "instead of --config, such as s5_path_x"
)


def main(argv: list[str]) -> int:
    check_arguments(argv)
    if TABLE.value:
        from train.plan import page

        return page.make([WORKLOAD.value] if WORKLOAD.value else [])
    # Before JAX has started: it is told what devices to have.
    from train.plan import machine

    machine.prepare(TARGET.value, EMULATE.value)
    if TARGET.value == machine.HERE:  # as the trainer leaves out what failed here
        from train import exclusions

        exclusions.apply(command_line.CERTIFICATE.value)
    return _plan(machine.find(TARGET.value, EMULATE.value))


def check_arguments(argv: list[str]) -> None:
    """Raises a `ValueError` for positional arguments, and unless --config, or
    --workload or --table, says what to plan."""
    if not (TABLE.value or WORKLOAD.value):
        command_line.check_arguments(argv)
    elif len(argv) > 1:
        raise ValueError(f"arguments must be flags, got {argv[1:]}")
    elif command_line.CONFIG.value is not None:
        raise ValueError("--config must not be there with --workload or --table")


def _task(devices: int):
    from train.plan import compiling, samples, workloads

    if WORKLOAD.value:
        return workloads.get(WORKLOAD.value).task(devices)
    return compiling.Task(
        command_line.CONFIG.value, *samples.of(command_line.CONFIG.value)
    )


def _plan(found) -> int:
    import dataclasses

    import jax
    from rich.console import Console

    from kernels.check import certificate
    from train import files
    from train.plan import compiling, machine, remedies, shown

    console = Console()
    if not console.is_terminal:
        console.width = 120
    if MEMORY.value:
        found = dataclasses.replace(found, memory=int(MEMORY.value * 1e9))
    if JSON.value and (reason := certificate.obstacle(Path(JSON.value))):
        raise ValueError(f"--json {reason}")
    task = _task(len(found.devices))
    # What it took before would be said to take no time.
    jax.config.update("jax_enable_compilation_cache", False)
    name = "this machine" if found.name == machine.HERE else found.name
    print(f"compiling the training step for {name}", flush=True)
    plans = [compiling.plan(task, found)]
    _show(console, shown, plans[0])
    if not plans[0].fits and PROPOSE.value:
        print("looking for the smallest change that fits", flush=True)
        proposal = remedies.find(task, found, lambda line: print(line, flush=True))
        if proposal is None:
            print("none of them fits: more devices, or a smaller batch or model")
        else:
            plans.append(proposal)
            print(f"proposal: {remedies.said(proposal.changes)}")
            _show(console, shown, proposal)
    if JSON.value:
        text = json.dumps([plan.as_json() for plan in plans], indent=1)
        files.write_atomically(Path(JSON.value), text + "\n")
        print(f"plan: {JSON.value}")
    return int(not plans[0].fits)


def _show(console, shown, plan) -> None:
    if plan.note:
        print(plan.note)
    for table in shown.tables(plan):
        console.print(table)
    for line in shown.lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command_line.command(main)
