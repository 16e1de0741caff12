"""The ledger of reproductions: runs trained once, their scores, machine and seconds.

A row is one run: an entry of `entries.ENTRIES`, a layer, a variant and a seed. Rows are
kept as JSON in `results/`, a file per entry, each written when its run ends; the table
of the page is made of them and of nothing else.
"""

import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from train import data, files, pretrain, records
from train.losses import LOSSES
from train.reproduce.entries import ENTRIES, Entry

SECONDS = "seconds.json"
RESULTS = Path(__file__).parent / "results"
MARK = "ledger"


class Row(NamedTuple):
    """What a run came to.

    Attributes:
        layer, variant, seed: which run of its entry.
        config: `FILE:ARGUMENT` that it was made of.
        step, last: the last step, and its score on the test.
        best_step, best: of the best step on validation; None without a validation.
        seconds: wall-clock, compilation included, of all its parts.
        machine: what it ran on.
        versions: package -> version.
        revision: of the code.
        data: name and digest of the data.
        changes: dotted key -> value, what the entry changes in its config.
        curve: [step, score] on validation.
    """

    layer: str
    variant: str
    seed: int
    config: str
    step: int
    last: float
    best_step: int | None
    best: float | None
    seconds: float
    machine: str
    versions: dict
    revision: str
    data: str
    changes: dict
    curve: list

    @property
    def key(self) -> tuple:
        """Which run of its entry it is."""
        return self.layer, self.variant, self.seed


def machine() -> str:
    """What the seconds of a table were measured on."""
    device = jax.devices()[0].device_kind
    what = [platform.machine(), f"{len(jax.devices())} device"]
    if device == "cpu":
        # Those that this process may use, where the system says so.
        own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        count = len(own(0))
        what.append(f"{count} core{'s' if count > 1 else ''}")
    return f"{device} ({', '.join(what)}), jax {jax.__version__}"


def trained(config: ConfigDict, workdir: Path) -> dict:
    """One finished run: its results, and the seconds it took, compilation included, of
    all starts that ended by themselves or by a signal that asked for it."""
    path, done = workdir / SECONDS, records.read_results(workdir) is not None
    before = files.read_json(path, float) or 0.0
    start = time.monotonic()
    results = pretrain.run(config, workdir)
    seconds = before if done else before + time.monotonic() - start
    files.write_atomically(path, json.dumps(seconds))
    if "stopped" in results:  # by SIGTERM or Ctrl-C; the next start goes on from here
        raise SystemExit(0)
    return results | {"seconds": seconds}


def config_of(entry: Entry, layer: str, variant: str, seed: int) -> ConfigDict:
    """The config of a run."""
    file, _, argument = entry.config.partition(":")
    make = importlib.import_module(f"configs.{file}").get_config
    config = make(f"{argument},layer={layer}")
    for key, value in changes(entry, variant).items():
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
    config.seed = seed
    return config


def changes(entry: Entry, variant: str) -> dict:
    """What an entry changes in its config for a variant."""
    return {**entry.overrides, **entry.variants[variant]}


def runs_of(entry: Entry, layers: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The layers and variants of an entry, one after another."""
    return [
        (layer, variant)
        for layer in layers or entry.layers
        for variant in entry.variants
        if layer in entry.only.get(variant, (layer,))
    ]


def run(
    name: str,
    seeds: Sequence[int] = (),
    layers: Sequence[str] = (),
    workdir: Path = Path("runs/reproduce"),
    results: Path = RESULTS,
) -> list[Row]:
    """Trains what an entry lacks, and keeps each row when it is there.

    Args:
        name: a key of ENTRIES.
        seeds, layers: only these; those of the entry where empty.
        workdir: gets a folder for each run, in which it goes on when it was stopped.
        results: folder of the rows.

    Raises:
        ValueError: an unknown name or layer.
    """
    if name not in ENTRIES:
        raise ValueError(f"NAME must be one of {', '.join(ENTRIES)}, got {name!r}")
    entry = ENTRIES[name]
    unknown = sorted(set(layers) - set(entry.layers))
    if unknown:
        raise ValueError(
            f"--layers must be of {', '.join(entry.layers)} for {name}, got "
            f"{unknown[0]}"
        )
    for seed in seeds or entry.seeds:
        for layer, variant in runs_of(entry, layers):
            done = of_entry(entry, kept(name, results))
            if any(row.key == (layer, variant, seed) for row in done):
                continue
            folder = "-".join(filter(None, (name, layer, variant, str(seed))))
            folder = folder.replace(" ", "_")
            row = _row(entry, layer, variant, seed, workdir / folder)
            # Read only now: others may have been kept while this one trained.
            rows = [r for r in kept(name, results) if r.key != row.key]
            _keep(name, [*rows, row], results)
    return kept(name, results)


def _row(entry: Entry, layer, variant, seed, workdir: Path) -> Row:
    config = config_of(entry, layer, variant, seed)
    found = trained(config, workdir)
    metric = LOSSES[found["loss"]].metric
    best = found["best"] or {}
    curve = [
        [logged["step"], round(logged[metric], 5)]
        for logged in records.read_metrics(workdir)
        if logged["split"] == "validation"
    ]
    versions = records.read_versions(workdir)
    return Row(
        layer=layer,
        variant=variant,
        seed=seed,
        config=entry.config,
        step=found["step"],
        last=round(found["test"][metric], 5),
        best_step=best.get("step"),
        best=round(best["test"][metric], 5) if best.get("test") else None,
        seconds=round(found["seconds"], 1),
        machine=machine(),
        versions={"python": versions["python"], **versions["packages"]},
        revision=_revision(**versions["git"]),
        data=f"{config.data.name} {data.load(config.data).digest}".strip(),
        changes=changes(entry, variant),
        curve=curve,
    )


def _revision(revision: str | None, dirty: bool) -> str:
    """Of the code; + where files differ from it."""
    return f"{revision or ''}{'+' if dirty else ''}"


def kept(name: str, results: Path = RESULTS) -> list[Row]:
    """The rows of an entry that there are.

    Raises:
        ValueError: a file that is not one of the ledger.
    """
    path = results / f"{name}.json"
    found = files.read_json(path, list)
    try:
        return [Row(**row) for row in found or []]
    except TypeError as error:
        raise ValueError(f"{path} must have rows of the ledger: {error}") from None


def of_entry(entry: Entry, rows: Sequence[Row]) -> list[Row]:
    """Those that the entry, as it is now, would make: a row of another config or of
    other changes is none of its."""
    return [
        row
        for row in rows
        if row.config == entry.config
        and row.variant in entry.variants
        and row.changes == changes(entry, row.variant)
    ]


def _keep(name: str, rows: list[Row], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row._asdict()) for row in sorted(rows, key=_order))
    files.write_atomically(results / f"{name}.json", f"[\n{lines}\n]\n")


def _order(row: Row) -> tuple:
    return row.layer, row.variant, row.seed


def table(entries: Mapping[str, Entry] = ENTRIES, results: Path = RESULTS) -> str:
    """Markdown: a row for each layer and variant of each entry, with the median and
    range of its seeds; those that nobody has run are visibly empty."""
    lines = [
        "| entry | layer | test accuracy, last step | best step on validation "
        "| published | seeds | minutes | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        rows = of_entry(entry, kept(name, results))
        for layer, variant in runs_of(entry):
            own = [r for r in rows if (r.layer, r.variant) == (layer, variant)]
            lines.append(_line(name, entry, layer, variant, own))
    lines += [""]
    lines += [f"`{name}`: {entry.title}." for name, entry in entries.items()]
    return "\n".join(lines)


def _line(name, entry: Entry, layer, variant, rows: list[Row]) -> str:
    title = f"`{layer}`, {variant}" if variant else f"`{layer}`"
    published = entry.published.get(layer)
    reported = f"[{published.score:.4f}]({published.source})" if published else ""
    if not rows:
        cells = ["", "", reported, "", "", f"not run yet: {entry.machine}"]
    else:
        best = [row.best for row in rows if row.best is not None]
        cells = [
            _spread([row.last for row in rows]),
            _spread(best) if best else "",
            reported,
            str(len(rows)),
            f"{statistics.median(row.seconds for row in rows) / 60:.0f}",
            ", ".join(sorted({row.machine for row in rows})),
        ]
    return f"| `{name}` | {title} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.4f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.4f}-{max(values):.4f})"
