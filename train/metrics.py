"""Where numbers go during a run: metrics.jsonl, TensorBoard files, the terminal."""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from configs.common import GROUP_NAMES
from train import files
from train.files import write_atomically
from train.losses import LOSSES
from train.state import named_leaves

FILE = "metrics.jsonl"
BOARD = "tensorboard"
SPEED_SECONDS = 300.0  # over which the bar's rate and remaining time are means
FLUSH_SECONDS = 10.0  # TensorBoard is at most so far behind
CLOCK = ("steps_per_second", "time")  # differ between two runs that are otherwise equal


class Metrics:
    """Writes what a run measures.

    Lines after `start` that an earlier process left are dropped: the file of a run that
    was killed and resumed equals that of one which never stopped, apart from CLOCK.

    Args:
        workdir: of the run.
        start: the step that the run goes on from.
        steps: the step at which it ends.
        unvalidated: whether `start` is still to be validated: a line that says so is
            dropped as well.

    Raises:
        OSError: a file cannot be written, which the error names; here, in `write`, and
            on leaving unless another error is on its way.
    """

    def __init__(
        self, workdir: Path, start: int, steps: int, unvalidated: bool = False
    ):
        self._first = jax.process_index() == 0
        self._steps = steps
        self._step = start
        self._time = time.monotonic()
        if self._first:
            self._path = workdir / FILE
            with _named(self._path):
                _drop_after(self._path, start, unvalidated)
                self._file = self._path.open("a", buffering=1)
            with _named(workdir / BOARD):
                self._board = _Board(workdir / BOARD, start + 1)
        self._bar = _bar(start, steps) if self._first and _is_terminal() else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, *_):
        if self._bar is not None:
            self._bar.stop()
        if not self._first:
            return
        failed = None
        for path, opened in ((self._path, self._file), (self._board.path, self._board)):
            try:
                with _named(path):
                    opened.close()
            except OSError as error:
                failed = failed or error
        if failed is not None and kind is None:
            raise failed

    def advance(self, step: int) -> None:
        """Moves the progress bar, where there is one, to the last step that is done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def rate(self, step: int) -> float:
        """Steps per second since the last call; `step` is done."""
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate

    @contextlib.contextmanager
    def paused(self):
        """Leaves the time spent inside out of the rate."""
        begun = time.monotonic()
        yield
        self._time += time.monotonic() - begun

    def write(self, step: int, split: str, scalars: dict[str, float]) -> None:
        """Adds one line of `scalars`, measured after `step` updates on `split`."""
        if not self._first:
            return
        line = {"step": step, "split": split, **scalars, "time": time.time()}
        with _named(self._path):
            self._file.write(json.dumps(line) + "\n")
        with _named(self._board.path):
            self._board.write(step, {f"{split}/{k}": v for k, v in scalars.items()})
        self._show(step, split, scalars)

    def _show(self, step: int, split: str, scalars: dict[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        if "steps_per_second" in scalars:
            seconds = (self._steps - step) / scalars["steps_per_second"]
            text += f"  eta {datetime.timedelta(seconds=round(seconds))}"
        line = f"{step:>{len(str(self._steps))}}/{self._steps}  {split:<10}  {text}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


class _Board:
    """A TensorBoard file, written in the caller's thread.

    tensorboardX's own writer has a thread: on a full disk that thread ends, and its
    callers wait for ever for room in its queue.

    Args:
        folder: of the file.
        first: events of this step and later ones in older files are hidden.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._records = RecordWriter(str(self.path))
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._add(step=step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())


class _Speed(ProgressColumn):
    """Steps per second, once that is known."""

    def render(self, task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} steps/s")


class _Elapsed(TimeElapsedColumn):
    def render(self, task) -> Text:
        return Text.assemble("elapsed ", super().render(task))


class _Remaining(TimeRemainingColumn):
    def render(self, task) -> Text:
        return Text.assemble("remaining ", super().render(task))


@contextlib.contextmanager
def _named(path: Path):
    """Gives an `OSError` of writing, which names no file, that of `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _bar(start: int, steps: int) -> Progress:
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        _Elapsed(),
        _Remaining(),
        console=Console(stderr=True),
        speed_estimate_period=SPEED_SECONDS,
    )
    bar.add_task("", total=steps, completed=start)
    bar.start()
    return bar


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def _drop_after(path: Path, step: int, unvalidated: bool) -> None:
    """Keeps the lines up to `step`, without that of its validation if it is still to
    be made; a line that was cut off is of a later one."""
    if not path.exists():
        return
    kept = []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            at = row["step"], row.get("split")
            early = at[0] <= step
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if number < len(lines):
                print(
                    f"{path}: line {number} is left out: it must be a JSON object with "
                    f"a step, got {files.quoted(line.rstrip())}",
                    flush=True,
                )
            continue
        if (
            line.endswith("\n")
            and early
            and not (unvalidated and at == (step, "validation"))
        ):
            kept.append(line)
    write_atomically(path, "".join(kept))


def print_table(
    config: ConfigDict, groups: Mapping[str, list[str]], params, mesh, compiled, seconds
) -> None:
    """Parameters by group, floating-point operations, devices.

    Args:
        config: the run's.
        groups: pattern -> paths of its parameters.
        params: tree of shapes.
        mesh: of the devices.
        compiled: the train step.
        seconds: that compiling it took.
    """
    named = named_leaves(params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in named}
    factors = dict(config.groups)
    counts = [
        (group_name(pattern, factors[pattern]), sum(map(sizes.get, paths)))
        for pattern, paths in groups.items()
    ]
    flops = (compiled.cost_analysis() or {}).get("flops", math.nan)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = [
        ("layer", f"{config.model.layer}, {config.model.depth} deep"),
        ("parameters", f"{sum(sizes.values()):,}"),
        *[(f"  {name}", f"{count:,}") for name, count in counts if count],
        ("FLOPs per step", f"{flops:.3g}"),
        ("compiled in", f"{seconds:.1f} s"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        ("mesh", shape),
    ]
    # A user's pattern can be long; the numbers stay readable beside it.
    width = min(max(len(name) for name, _ in rows), 60)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", flush=True)


def group_name(pattern: str, factors: Mapping) -> str:
    """A parameter group in words: what it is, where the configs say so of `pattern`,
    and how it learns."""
    lr, wd = factors.get("lr", 1.0), factors.get("wd", 1.0)
    how = [f"lr x {lr:.3g}"] * (lr not in (0, 1))
    how += [f"decay x {wd:.3g}" if wd else "no decay"] * (wd != 1)
    how = "frozen" if lr == 0 else ", ".join(how)
    name = GROUP_NAMES.get(pattern, f"what matches {pattern}")
    return f"{name} ({how})" if how else name


def print_results(results: Mapping) -> None:
    """Prints the lines at the end of a run."""
    loss = LOSSES[results["loss"]]
    name, label = loss.metric, loss.title
    if results["test"]:
        print(f"test {label}: {results['test'][name]:.4f}")
    best = results["best"]
    if best and best["test"]:
        print(
            f"best on validation, step {best['step']}: validation {label} "
            f"{best['validation'][name]:.4f}, test {label} {best['test'][name]:.4f}"
        )
    difference = results["parallel_vs_recurrent"]
    if isinstance(difference, float):
        print(f"parallel vs recurrent: max difference {difference:.1e}")
    else:
        print(f"parallel vs recurrent: no recurrent mode ({difference})")
    print(f"checkpoint: {results['checkpoint']}", flush=True)


PROFILED = 2, 6  # first and last step of the trace, counted from the start


@contextlib.contextmanager
def profiler(folder: Path, progress, steps: int):
    """Yields what is to be called before every step: it traces the steps PROFILED.

    A run with fewer steps is traced to its end, which may also be an error.
    """
    first = progress.step
    begin = first + min(PROFILED[0], steps - first) - 1

    def end():
        try:
            jax.block_until_ready(progress.state)
        finally:
            jax.profiler.stop_trace()

    with contextlib.ExitStack() as running:

        def between_steps():
            if progress.step == begin:
                jax.profiler.start_trace(folder)
                running.callback(end)
            elif progress.step == first + PROFILED[1]:
                running.close()

        yield between_steps
