"""Where numbers go during a run: metrics.jsonl, TensorBoard files, the terminal."""

import contextlib
import datetime
import json
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from train.checkpoint import write_atomically

FILE = "metrics.jsonl"
CLOCK = ("steps_per_second", "time")  # differ between two runs that are otherwise equal


class Metrics:
    """Writes what a run measures.

    Lines after `start` that an earlier process left are dropped: the file of a run that
    was killed and resumed equals that of one which never stopped, apart from CLOCK.

    Args:
        workdir: of the run.
        start: the step that the run goes on from.
        steps: the step at which it ends.
    """

    def __init__(self, workdir: Path, start: int, steps: int):
        self._first = jax.process_index() == 0
        self._steps = steps
        self._step = start
        self._time = time.monotonic()
        if self._first:
            _drop_after(workdir / FILE, start)
            self._file = (workdir / FILE).open("a", buffering=1)
            board = str(workdir / "tensorboard")
            self._board = SummaryWriter(board, purge_step=start + 1)
        self._bar = _bar(start, steps) if self._first and _is_terminal() else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()
        if self._first:
            self._file.close()
            self._board.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def rate(self, step: int) -> float:
        """Steps per second since the last call."""
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
        self._file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
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


def _bar(start: int, steps: int) -> Progress:
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("", total=steps, completed=start)
    bar.start()
    return bar


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def _drop_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a line that was cut off is of a later one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(kept))
