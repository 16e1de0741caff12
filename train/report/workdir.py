"""What a run has written about itself, read back from its workdir."""

import dataclasses
import datetime
from pathlib import Path

from ml_collections import ConfigDict

from train import record
from train.record import SCORES

UNKNOWN = "\N{EN DASH}"


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
        if self.results:
            return SCORES[self.results["loss"]][:2]
        accurate = any("accuracy" in row for row in self.rows)
        return SCORES["classification" if accurate else "regression"][:2]

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
        record.read_config(path),
        record.read_metrics(path),
        record.read_results(path),
        record.read_versions(path),
    )
