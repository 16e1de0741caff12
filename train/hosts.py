"""How a process finds the others of its run: under SLURM, on a TPU pod, in a JobSet of
Kubernetes, by variables of JAX, or as flags say.

Each of these tells what it knows. The address of the coordinator, the number of
processes, that of this one and its devices are each what the first says that knows
them: flags before variables. Alone is who finds no others. `jax.distributed` does the
rest.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# Seconds that those who are done wait for the others at the end.
PARTING = 60
# Seconds in which all may fail of the same.
GRACE = 3
# Seconds beyond ours after which JAX itself would give up, and abort without a word.
SLACK = 60

TPU_PORT = 8482  # what TPU pods keep open between hosts for JAX
JOB_PORT = 8476  # of a pod in Kubernetes, which has all to itself
SLURM_PORTS = 12_000, 20_000  # first and number: below those that systems hand out


class Place(NamedTuple):
    """Where a process is among those of its run.

    Attributes:
        coordinator: host:port at which process 0 is found.
        processes: how many there are.
        process: the number of this one, from 0.
        devices: the numbers of its devices among those that it sees; None: all.
        found: what told so.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None
    found: str


def _of_jax(env: Mapping[str, str]) -> dict:
    return {
        "coordinator": env.get("JAX_COORDINATOR_ADDRESS"),
        "processes": _number(env, "JAX_NUM_PROCESSES"),
        "process": _number(env, "JAX_PROCESS_ID"),
    }


def _of_slurm(env: Mapping[str, str]) -> dict:
    """A task of srun. An sbatch script, or a shell of salloc, has no step of its own:
    there only the job has tasks, and it is no one of them."""
    count = _number(env, "SLURM_STEP_NUM_TASKS")
    if count is None or count == 1 or "SLURM_PROCID" not in env:
        return {}
    known = {"processes": count, "process": _number(env, "SLURM_PROCID")}
    if first := _first_host(env.get("SLURM_STEP_NODELIST", "")):
        start, length = SLURM_PORTS
        job, step = (_number(env, f"SLURM_{x}_ID") or 0 for x in ("JOB", "STEP"))
        known["coordinator"] = f"{first}:{start + (job * 7 + step) % length}"
    known["devices"] = _slurm_devices(env)
    return known


def _of_tpu(env: Mapping[str, str]) -> dict:
    """A host of a TPU pod, or of several slices (MEGASCALE)."""
    names = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    hosts = [name.strip() for name in names.split(",") if name.strip()]
    worker = _number(env, "TPU_WORKER_ID")
    slices = _number(env, "MEGASCALE_NUM_SLICES") or 1
    if worker is None or len(hosts) * slices < 2:
        return {}
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    number = _number(env, "MEGASCALE_SLICE_ID") or 0
    return {
        "coordinator": f"{first.rpartition(':')[0] or first}:{TPU_PORT}",
        "processes": len(hosts) * slices,
        "process": worker + number * len(hosts),
    }


def _of_jobset(env: Mapping[str, str]) -> dict:
    """A pod of an indexed job in a JobSet. Kubernetes numbers it; its manifest names
    the set and the job, and says how many there are (JAX_NUM_PROCESSES)."""
    index = _number(env, "JOB_COMPLETION_INDEX")
    names = [env.get(name) for name in ("JOBSET_NAME", "REPLICATED_JOB_NAME")]
    if index is None:
        return {}
    known = {"process": index}
    if all(names):
        known["coordinator"] = f"{names[0]}-{names[1]}-0-0.{names[0]}:{JOB_PORT}"
    return known


# By precedence. What is set by hand comes first.
FINDERS: dict[str, Callable[[Mapping[str, str]], dict]] = {
    "JAX_ variables": _of_jax,
    "SLURM": _of_slurm,
    "TPU pod": _of_tpu,
    "JobSet": _of_jobset,
}


def find(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> Place | None:
    """Where this process is among those of its run; None where it is alone.

    Args:
        coordinator, processes, process: as the flags say; None: not said.
        env: the variables of the environment.

    Raises:
        ValueError: others are known of, but not all that is needed to find them, or a
            value that cannot be.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    told = {"flags": flags} | {name: tell(env) for name, tell in FINDERS.items()}
    known, found = {}, []
    for name, values in told.items():
        new = {k: v for k, v in values.items() if v is not None and k not in known}
        known |= new
        found += [name] if new else []
    # A number alone, such as that of a job in a sweep, tells of no others.
    if not {"coordinator", "processes"} & {*known} or known.get("processes") == 1:
        if flags["process"] is not None and known.get("processes") != 1:
            raise ValueError("--process must come with --coordinator and --processes")
        return None
    missing = [name for name in flags if name not in known]
    if missing:
        raise ValueError(
            f"--{missing[0]} must be given where a run has several processes "
            f"({', '.join(found)} said {', '.join(k for k in flags if k in known)}), "
            "got none"
        )
    place = Place(**{"devices": None} | known, found=", ".join(found))
    if place.processes < 1:
        raise ValueError(f"--processes must be 1 or more, got {place.processes}")
    if not 0 <= place.process < place.processes:
        raise ValueError(
            f"--process must be from 0 to {place.processes - 1}, one less than the "
            f"number of processes, got {place.process}"
        )
    _address(place.coordinator)
    return place


def join(place: Place, timeout: float, lost_after: float) -> None:
    """Meets the other processes; `jax.devices()` are those of all from then on.

    Args:
        place: of `find`.
        timeout: seconds to wait for all.
        lost_after: seconds after which a process that is not heard of is lost, and the
            others end.

    Raises:
        ValueError: the coordinator does not answer, or its address is taken.
    """
    import jax  # not above: what is wrong with the flags is said before JAX has started

    host, port = _address(place.coordinator)
    began = time.monotonic()
    if place.process == 0:
        _check_free(port)
    else:
        _check_answers(host, port, timeout)
    # It would take SIGTERM for itself, which is ours to answer to.
    jax.config.update("jax_enable_preemption_service", False)
    left = max(1.0, timeout - (time.monotonic() - began))
    with _bounded(left, place, timeout):
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(left) + SLACK,
                heartbeat_timeout_seconds=int(lost_after),
                shutdown_timeout_seconds=PARTING,
            )
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"--coordinator {place.coordinator} cannot be used: {error}"
            ) from error


@contextlib.contextmanager
def joined(
    place: Place | None, as_jax: bool, timeout: float, lost_after: float
) -> Iterator[None]:
    """Meets the others, if there are any; what is printed inside comes from process 0
    alone, but for errors.

    Args:
        place: of `find`.
        as_jax: where that is None, lets JAX look for others (a pod of TPU VMs, which
            ask their machine; Open MPI).
        timeout, lost_after: as in `join`.

    Raises:
        ValueError: as `join`, or JAX has found none.
    """
    with contextlib.ExitStack() as leaving:
        if place is not None:
            join(place, timeout, lost_after)
        elif as_jax:
            _join_as_jax(timeout, lost_after)
        if several():
            leaving.enter_context(_first_alone())
        yield


def several() -> bool:
    """Whether this process has met others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def _first_alone() -> Iterator[None]:
    import jax

    number, count = jax.process_index(), jax.process_count()
    devices = jax.local_devices()
    print(
        f"process {number} of {count} on {socket.gethostname()}: "
        f"{len(devices)} x {devices[0].device_kind}",
        flush=True,
    )
    if number == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _join_as_jax(timeout: float, lost_after: float) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=int(lost_after),
            shutdown_timeout_seconds=PARTING,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed must be given where JAX can find the other hosts, got: "
            f"{error}"
        ) from error


def leave(code: int) -> None:
    """Ends this process at once: the others, if there are any, do not come to where all
    part, which an ordinary end would wait for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if several() and sys.modules["jax"].process_index() == 0:
        # Without it the runtime ends the others, which may have something to say too.
        time.sleep(GRACE)
    os._exit(code)


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list, such as rack[0-1]n[003-010,12],other: rack0n003."""
    (first, *_) = re.split(r",(?![^\[]*\])", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Of the GPUs that the tasks of one node see, the equal share of this task; all
    where it is alone on its node, or sees none but its own."""
    own = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU")
    bound = not env.get("SLURM_GPU_BIND", "none").startswith("none")
    if bound or any(name in env for name in own):
        return None
    tasks = _tasks(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node, local = _number(env, "SLURM_NODEID"), _number(env, "SLURM_LOCALID")
    if node is None or local is None or node >= len(tasks) or tasks[node] == 1:
        return None
    visible = [x for x in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    if len(visible) < tasks[node]:
        return None
    if len(visible) % tasks[node]:
        raise ValueError(
            f"SLURM must give a node as many GPUs as tasks, or a multiple, got "
            f"{len(visible)} for {tasks[node]} tasks (--gpus-per-task gives each its "
            "own)"
        )
    share = len(visible) // tasks[node]
    return tuple(range(local * share, (local + 1) * share))


def _tasks(text: str) -> list[int]:
    """SLURM's tasks of every node, such as 4(x2),3: [4, 4, 3]; [] for other text."""
    counts = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", word.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator must be host:port, got {text[:100]!r}")
    return host.strip("[]"), int(port)


def _check_free(port: int) -> None:
    """JAX's server would share a port with another of its kind, unnoticed."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--coordinator must have a free port on this host, got {port}, which "
                f"cannot be used ({error.strerror}): another run may have it"
            ) from None


def _check_answers(host: str, port: int, timeout: float) -> None:
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), min(left, 10)).close()
            return
        except OSError as error:
            reason = error.strerror or "no answer"
        time.sleep(min(0.5, max(0.0, left)))
    raise ValueError(
        f"--coordinator {host}:{port} did not answer within {timeout:g} s "
        f"({reason}): process 0 must be started, and reachable from this host"
    )


@contextlib.contextmanager
def _bounded(left: float, place: Place, timeout: float) -> Iterator[None]:
    """Ends this process with one line where the others do not come: JAX waits where no
    exception reaches."""

    def give_up():
        print(
            f"error: not all of {place.processes} processes came to "
            f"{place.coordinator} within {timeout:g} s; this is process "
            f"{place.process}, found by {place.found}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(left, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
