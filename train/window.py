"""What was measured since the last log: checked, written, forgotten."""

import math

import jax
import numpy as np

from train import flight, losses, step


def log(config, parts, progress, metrics, batch) -> None:
    """Writes the means over the steps since the last log, and of its last batch what
    the recorder shows. Steps that were skipped have no part in either."""
    allowed = config.train.skip_nonfinite
    check_window(progress, allowed)
    names = [name for name in (progress.window or [{}])[0] if name != "weight"]
    means = {k: float(np.mean([m[k] for m in progress.window])) for k in names}
    # The schedule counts updates.
    means["lr"] = float(parts.schedule(max(progress.step - progress.skipped - 1, 0)))
    if allowed:
        means["skipped"] = progress.skipped
    means["steps_per_second"] = metrics.rate(progress.step)
    if config.train.record and not progress.in_a_row:
        quantities = flight.quantities(parts.probe(progress.state, batch).record)
        means |= {f"record/{name}": value for name, value in quantities.items()}
    metrics.write(progress.step, "train", means)
    progress.window = []


def check_window(progress, allowed: int = 0) -> None:
    """Fetches what was measured and not yet checked, and moves it to the window.

    Args:
        progress: of the run; counts the steps that were skipped.
        allowed: `train.skip_nonfinite`.

    Raises:
        FloatingPointError: something is not finite, where steps are skipped in more
            than `allowed` steps in a row or in one that was not skipped.
        ValueError: a batch had nothing to learn from.
    """
    fetched, progress.unchecked = jax.device_get(progress.unchecked), []
    for number, measures in enumerate(fetched, progress.step - len(fetched) + 1):
        measures = {name: float(value) for name, value in measures.items()}
        bad = {k: v for k, v in measures.items() if not math.isfinite(v)}
        if allowed and any(name in bad for name in step.DECISIVE):
            skip(progress, number, bad, allowed)
            continue
        for name, value in bad.items():
            raise FloatingPointError(f"{name} is {value} at step {number}")
        if measures["weight"] == 0:
            raise ValueError(
                f"the batch of step {number} must have a target to learn from, got "
                f"only masked ones or {losses.IGNORED}, which is ignored"
            )
        progress.in_a_row = 0
        progress.window.append(measures)


def skip(progress, number: int, bad: dict, allowed: int) -> None:
    """Counts a step that changed nothing, and says so.

    Args:
        progress, allowed: see `check_window`.
        number: of the step.
        bad: name -> value of what is not finite.

    Raises:
        FloatingPointError: too many in a row.
    """
    progress.skipped += 1
    progress.in_a_row += 1
    what = ", ".join(f"{name} is {value}" for name, value in bad.items())
    if progress.in_a_row > allowed:
        first = number - progress.in_a_row + 1
        raise FloatingPointError(
            f"{what} at step {number}, the last of {progress.in_a_row} steps in a row, "
            f"from step {first} on, that are not finite, and train.skip_nonfinite "
            f"allows {allowed}"
        )
    if jax.process_index() == 0:
        print(f"step {number} is skipped: {what}", flush=True)
