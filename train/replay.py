"""A run that broke, once more from its last checkpoint: its first non-finite value."""

import contextlib
from pathlib import Path

from ml_collections import ConfigDict

from train import flight
from train.checkpoint import Checkpoints
from train.parts import Parts, start
from train.signals import Stopped


def first_broken(config: ConfigDict, workdir: Path, parts: Parts, until: int) -> str:
    """What broke first between the last checkpoint and the step `until`, as the
    beginning of a sentence; "" if it does not happen again, or a signal ended the
    search: what broke is an error all the same."""
    options = config.train
    parts.batches = parts.examples()
    with Checkpoints(workdir, options.keep) as checkpoints:
        progress = start(config, workdir, parts, checkpoints)
    cause = ""
    with contextlib.closing(parts.batches) as batches, contextlib.suppress(Stopped):
        cause = flight.find(
            parts.probe,
            parts.train_step,
            progress.state,
            batches,
            parts.mesh,
            range(progress.step + 1, until + 1),
            options.skip_nonfinite,
            progress.in_a_row,
        )
    return f"first non-finite value: {cause}; " if cause else ""
