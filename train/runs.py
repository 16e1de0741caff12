"""A run read back from its workdir: the trained model, or its files alone."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
from ml_collections import ConfigDict

from layers.models.build import build, foreign
from train import checkpoint, data, records, settings
from train.data import described
from train.data.spec import Spec
from train.losses import LOSSES
from train.records import CONFIG, DATA

UNKNOWN = "\N{EN DASH}"


class DataError(ValueError):
    """The data of a run are not there, or not what they were."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, read back from its workdir.

    Attributes:
        config: resolved.
        spec: what its data are, known also where they are not there.
        model, variables: of the checkpoint.
        step: of the checkpoint.
        find: gives the dataset.
    """

    config: ConfigDict
    spec: Spec
    model: nn.Module
    variables: dict = dataclasses.field(repr=False)
    step: int
    find: Callable[[], data.Dataset] = dataclasses.field(repr=False)

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        """The dataset, loaded when it is first asked for. `DataError` where that cannot
        be, which names what is missing."""
        return self.find()

    def on(self, dataset: data.Dataset) -> "Run":
        """The same run on other data."""
        return dataclasses.replace(self, spec=dataset.spec, find=lambda: dataset)


def load_run(workdir, at=None, trust: bool = False) -> Run:
    """The run of `workdir` at checkpoint `at` (None: the newest good one).

    Its data need not be there: they are loaded once `dataset` is asked for. Only a run
    from before there was data.json has to load them here.

    Args:
        workdir: of the run.
        at: step of the checkpoint.
        trust: import the layers and the dataset that the run names by dotted paths,
            which executes their code; without it such a run is refused before anything
            is imported.

    Raises:
        ValueError: no run was ever started in `workdir`, its config cannot be, or it
            names a layer or dataset that is not of this project and is not trusted.
        CheckpointError: no such checkpoint, or it is damaged.
        DataError: a run without data.json whose data are not there.
    """
    workdir = settings.place("workdir", workdir)
    config = records.read_config(workdir)
    check_trust(workdir, config, trust)
    spec = records.read_data(workdir)
    variables, found = checkpoint.restore_params(workdir, at)
    if spec is None:
        dataset = _load_data(workdir, config)
        spec, find = dataset.spec, lambda: dataset
    else:
        _check_fits(workdir, spec, config, variables)
        find = functools.partial(_load_data, workdir, config, spec)
    return Run(config, spec, build(config.model), variables, found, find)


def _load_data(workdir: Path, config: ConfigDict, spec: Spec | None = None):
    """The dataset of a run, whose data were once `spec`."""
    try:
        dataset = data.load(config.data)
    except (ValueError, OSError) as problem:
        cure = "what else reads a run, such as train.predict and train.evaluate --data,"
        cure += " does without"
        if spec is None:
            cure = f"the run began before there was {DATA} and cannot be read without"
        raise DataError(
            f"the data of {workdir} cannot be loaded: {problem}; {cure}"
        ) from problem
    if spec is not None and (changed := described.differing(spec, dataset.spec)):
        raise DataError(f"the data of {workdir} are others than they were: {changed}")
    return dataset


def _check_fits(
    workdir: Path, spec: Spec, config: ConfigDict, variables: Mapping
) -> None:
    """Raises a `ValueError` for data that are not those of the model."""
    for key in ("outputs", "vocab_size"):
        value, most = getattr(spec, key), config.model.get(key)
        if most is not None and value > most:
            raise ValueError(
                f"{workdir / DATA}: spec.{key} must be at most {most}, the model.{key} "
                f"of {CONFIG}, got {value}"
            )
    read = variables.get("params", {}).get("encoder", {}).get("project", {})
    kernel = read.get("kernel") if spec.encoder in ("scalar", "image") else None
    if kernel is not None and kernel.shape[-2] != spec.channels:
        raise ValueError(
            f"{workdir / DATA}: spec.channels must be {kernel.shape[-2]}, what the "
            f"model reads, got {spec.channels}"
        )


def check_trust(workdir, config: ConfigDict, trust: bool) -> None:
    """Raises a `ValueError` for a run whose layers or dataset are not of this project,
    unless they are trusted."""
    named = [("layer", name) for name in foreign(config.model)]
    named += [("dataset", name) for name in data.foreign(config.data)]
    if named and not trust:
        what, name = named[0]
        raise ValueError(
            f"workdir: {workdir} names the {what} {name!r}, which is not of this "
            "project, and reading the run would execute its code; --trust allows it "
            "(trust=True of load_run)"
        )


def last_split(dataset: data.Dataset) -> str:
    """The split to show: that of the test, or of what there is instead."""
    return next(s for s in ("test", "validation", "train") if s in dataset.sources)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's own files.

    Attributes:
        path: of the folder.
        config: resolved.
        rows: the lines of metrics.jsonl.
        results: of a finished run, else None.
        versions: revision, packages, devices; {} if they are not there.
    """

    path: Path
    config: ConfigDict
    rows: list[dict]
    results: dict | None
    versions: dict

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def layer(self) -> str:
        layer = self.config.model.layer
        return layer if isinstance(layer, str) else ", ".join(layer)

    @property
    def score(self) -> tuple[str, str]:
        """The metric that counts, and its name in words."""
        accurate = any("accuracy" in row for row in self.rows)
        guessed = "classification" if accurate else "regression"
        loss = LOSSES[self.results["loss"] if self.results else guessed]
        return loss.metric, loss.title

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    def validation(self, step: int) -> dict:
        """The last validation scores up to `step`; {} if there are none."""
        rows = (r for r in self.rows if r["split"] == "validation")
        return next((r for r in reversed([*rows]) if r["step"] <= step), {})

    def gap(self) -> str:
        """The largest difference between the parallel and the recurrent mode."""
        gap = (self.results or {}).get("parallel_vs_recurrent")
        if gap is None:
            return UNKNOWN
        return f"{gap:.1e}" if isinstance(gap, float) else "no recurrent mode"

    def took(self) -> str:
        """Time inside training steps, by the logged rates."""
        seconds, before = 0.0, 0
        for row in self.rows:
            if row["split"] == "train" and row.get("steps_per_second"):
                seconds += (row["step"] - before) / row["steps_per_second"]
                before = row["step"]
        if not seconds:
            return UNKNOWN
        length = datetime.timedelta(seconds=round(seconds))
        return f"{length} ({before / seconds:.3g} steps/s)"

    def devices(self) -> str:
        kinds = self.versions.get("devices") or []
        counts = [f"{kinds.count(kind)} x {kind}" for kind in sorted({*kinds})]
        return ", ".join(counts) or UNKNOWN

    def ended(self) -> str:
        times = [row["time"] for row in self.rows if "time" in row]
        if not times:
            return "nothing logged"
        last = datetime.datetime.fromtimestamp(times[-1], datetime.UTC)
        return f"last logged {last:%Y-%m-%d %H:%M} UTC"


def read(path: str | Path) -> Workdir:
    """The run in a folder.

    Raises:
        ValueError: no run was started there, or one of its files cannot be read.
    """
    path = Path(path)
    return Workdir(
        path,
        records.read_config(path),
        records.read_metrics(path),
        records.read_results(path),
        records.read_versions(path),
    )
