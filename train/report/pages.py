"""The page of one run, and that of several."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax

from train import checkpoint, files, pretrain, records, runs, settings, signals
from train.data import examined
from train.draw import figures
from train.draw.markup import (
    Section,
    code,
    details,
    figure,
    page,
    paragraph,
    table,
)
from train.endings import ENDINGS
from train.report import facts
from train.runs import UNKNOWN, Workdir


def write(
    path: str | Path, out: str | Path | None = None, step=None, trust: bool = False
) -> Path:
    """Writes the report of the run in the workdir `path`; returns the file.

    Args:
        path: of a run with at least one checkpoint.
        out: the file; default `path`/report.html.
        step: of the checkpoint to look into; default the newest good one.
        trust: import the layers and the dataset that the run names by dotted paths,
            see `runs.load_run`.

    Raises:
        ValueError: no run, one of its files cannot be read, or `out` is in no folder.
        CheckpointError: no such checkpoint, or it is damaged.
        OSError: the report cannot be written.
        Stopped: a signal came; no page is written.
    """
    workdir = runs.read(path)
    out = _writable(workdir.path / "report.html" if out is None else Path(out))
    run = runs.load_run(path, step, trust)
    data_facts = records.read_said(workdir.path)
    sections = [*signals.stoppable(_sections(workdir, run, data_facts))]
    model = workdir.config.model
    subtitle = f"{workdir.name}: {model.depth} blocks of {model.features} features, "
    subtitle += f"{_count(run.variables)} parameters; {workdir.ended()}"
    title = f"{workdir.layer} on {workdir.config.data.name}"
    files.write_atomically(out, page(title, subtitle, sections))
    return out


def _sections(workdir: Workdir, run, data_facts: dict) -> Iterator[Section]:
    """The sections of a run's page, each made when it is asked for."""
    level = _level(data_facts, run)
    reached = {} if level is None else {level.metric: level.value}
    yield "verdict", "Verdict", _verdict(workdir, run, data_facts, level)
    yield "curves", "Curves", _curves({workdir.name: workdir}, reached)
    if workdir.config.pretrain.steps:
        yield "pretraining", "Self-pretraining", _pretraining(workdir, reached)
    yield from ENDINGS[run.spec.loss].sections(workdir, run, reached)
    yield "reproduce", "To reproduce", _reproduce(workdir)
    yield "environment", "Environment", _environment(workdir)


def compare(paths, out: str | Path = "compare.html") -> Path:
    """Writes one page about the runs in several workdirs, finished or not; returns it.

    Raises:
        ValueError: fewer than two runs, one of them twice, no run in a workdir, one of
            its files cannot be read, or `out` is in no folder.
        OSError: the page cannot be written.
    """
    if len(paths) < 2:
        raise ValueError(f"--compare must name two runs or more, got {len(paths)}")
    out = _writable(Path(out))
    paths = signals.stoppable(paths)
    compared = _labelled([runs.read(path) for path in paths])
    header = ("run", "layer", "steps", "validation, last", "test, last", "best step")
    header += ("test, best", "parallel vs recurrent", "parameters", "training steps")
    labelled = signals.stoppable(compared.items())
    rows = [(label, *_cells(workdir)) for label, workdir in labelled]
    names = " or ".join(sorted({workdir.score[1] for workdir in compared.values()}))
    note = (
        f"Scores: {names}. The best step is that on validation; an unfinished run has "
    )
    note += "no score on the test split."
    configs = {label: workdir.config.to_dict() for label, workdir in compared.items()}
    versions = {label: workdir.versions for label, workdir in compared.items()}
    sections = [
        ("scores", "Scores", table(header, rows) + paragraph(note, "soft")),
        ("curves", "Curves", _curves(compared, _together(compared))),
        ("configs", "What the configs differ in", _differences(configs)),
        ("environment", "What the environments differ in", _differences(versions)),
    ]
    title = f"{len(compared)} runs beside one another"
    files.write_atomically(out, page(title, ", ".join(compared), sections))
    return out


def _level(data_facts: dict, run) -> facts.Level | None:
    """What is reached without reading the inputs: kept, or else found in the data."""
    try:
        return facts.level(data_facts) or facts.level(examined.facts(run.dataset))
    except runs.DataError:
        return None


def _together(compared: dict[str, Workdir]) -> dict[str, float]:
    """What all the runs reach without reading the inputs, where they have kept it and
    it is the same."""
    levels = [
        facts.level(records.read_said(workdir.path)) for workdir in compared.values()
    ]
    known = {(x.metric, round(x.value, 4)) for x in levels if x is not None}
    return dict(known) if len(known) == 1 and None not in levels else {}


def _writable(out: Path) -> Path:
    """`out`, once it is known not to fail after all the work."""
    out = settings.place("--out", out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {out}")
    return out


def _labelled(runs: list[Workdir]) -> dict[str, Workdir]:
    """The runs by the name of their folder, or by its path where runs share one."""
    names = [workdir.name for workdir in runs]
    labels = [
        workdir.name if names.count(workdir.name) == 1 else str(workdir.path)
        for workdir in runs
    ]
    if len({*labels}) < len(labels):
        raise ValueError(f"--compare must name a run once, got {', '.join(labels)}")
    return dict(zip(labels, runs, strict=True))


def _verdict(workdir, run, data_facts, level) -> str:
    name, label = workdir.score
    names = (name,) if name == "loss" else (name, "loss")
    header = ["", "step"]
    for metric in (label, "loss")[: len(names)]:
        header += [f"validation {metric}", f"test {metric}"]
    rows = [
        (which, f"{step:,}", *(_number(s.get(n)) for n in names for s in scores))
        for which, step, *scores in _scored(workdir)
    ]
    measured = [
        ("parallel vs recurrent mode", workdir.gap()),
        ("parameters", _count(run.variables)),
        ("training steps took", workdir.took()),
        ("devices", workdir.devices()),
    ]
    parts = [paragraph(_sentence(workdir)), paragraph(level.sentence) if level else ""]
    parts += [table(header, rows), table((), measured)]
    if rows := facts.rows(data_facts):
        parts += [paragraph("What the run took its data for:"), table((), rows)]
    parts += [paragraph(f"Warning: {text}") for text in facts.warned(data_facts)]
    return "".join(parts)


def _scored(workdir):
    """(which, step, validation scores, test scores) of the last step and the best."""
    last, results = workdir.last_step, workdir.results
    if results is None:
        return [("last", last, workdir.validation(last), {})]
    step, best = results["step"], results["best"]
    rows = [("last", step, workdir.validation(step), results["test"] or {})]
    if best:
        scores = best["validation"], best["test"] or {}
        rows.append(("best on validation", best["step"], *scores))
    return rows


def _sentence(workdir) -> str:
    (name, label), results = workdir.score, workdir.results
    if results is None:
        steps = workdir.config.train.steps
        return f"This run is not finished: {workdir.last_step:,} of {steps:,} steps."
    sentence, test = f"After {results['step']:,} steps", results["test"]
    sentence += (
        f" the test {label} is {test[name]:.4f}" if test else " there is no test"
    )
    if best := results["best"]:
        sentence += f"; step {best['step']:,} was the best on validation"
        sentence += f" and has {best['test'][name]:.4f}" if best["test"] else ""
    if isinstance(results["parallel_vs_recurrent"], float):
        sentence += ". Fed token by token, the model gives the same outputs up to "
        sentence += workdir.gap()
    return sentence + ". The test split has selected nothing." * bool(test)


def _curves(runs: dict[str, Workdir], reached: dict[str, float]) -> str:
    several = len(runs) > 1
    panels = []
    for name in ("loss", "accuracy", "absolute_error"):
        title = name.replace("_", " ")
        if several:
            panels.append((f"{title}, training", name, ("train",)))
            panels.append((f"{title}, validation", name, ("validation",)))
        else:
            panels.append((title, name, ("train", "validation")))
    if not several:
        panels.append(("learning rate", "lr", ("train",)))
        panels.append(("gradient norm, before clipping", "grad_norm", ("train",)))
    rows = {label: workdir.rows for label, workdir in runs.items()}
    if not any(rows.values()):
        return paragraph("Nothing was logged yet.")
    caption = "Training values are means over the steps between two logs, with the "
    caption += "dropout and augmentation of the run; validation has neither."
    if reached:
        caption += " Dotted: what is reached without reading the inputs."
    lines = figures.key(list(rows)) if several else ()
    return figure(figures.curves(rows, panels, reached), caption, columns=2, key=lines)


def _pretraining(workdir, reached: dict[str, float]) -> str:
    """The task after self-pretraining, beside the same from scratch where that is."""
    options = workdir.config.pretrain
    asked = f"hid {options.ratio:.0%} of the tokens and asked for them"
    if options.objective == "next":
        asked = "asked at every token for the one after it"
    said = f"Before its own steps the model had {options.steps:,}, which {asked}."
    (_, label), runs_of = workdir.score, {"after self-pretraining": workdir}
    if (workdir.path / pretrain.SCRATCH / records.CONFIG).exists():
        runs_of["from scratch"] = runs.read(workdir.path / pretrain.SCRATCH)
    header = ("", "step", f"validation {label}", f"test {label}")
    rows = [
        (f"{name}, {which}", f"{step:,}", *(_number(s.get(label_of)) for s in scores))
        for name, one in runs_of.items()
        for label_of in [one.score[0]]
        for which, step, *scores in _scored(one)
    ]
    parts = [paragraph(said), table(header, rows)]
    if len(runs_of) > 1:
        parts.append(_curves(runs_of, reached))
    first = workdir.path / pretrain.FOLDER
    note = (
        "A run of its own, with a report of its own: python -m train.report --workdir"
    )
    parts.append(paragraph(f"{note} {first}", "soft"))
    return "".join(parts)


def _reproduce(workdir) -> str:
    git, parts = workdir.versions.get("git", {}), []
    if command := workdir.versions.get("command"):
        parts += [paragraph("The run was started by"), code(shlex.join(command))]
    again = "from train import loop, records\n"
    again += f"loop.run(records.read_config({str(workdir.path)!r}), 'runs/again')"
    parts.append(paragraph("The same run from its own config, in another folder:"))
    parts.append(code(again))
    if git.get("revision"):
        changed = ", with changes that were not committed" if git.get("dirty") else ""
        parts.append(paragraph(f"Revision {git['revision']}{changed}."))
    config = json.dumps(workdir.config.to_dict(), indent=2)
    return "".join(parts) + details(f"The config, {records.CONFIG}", code(config))


def _environment(workdir) -> str:
    versions = {
        k: v for k, v in workdir.versions.items() if k not in ("command", "devices")
    }
    if not versions:
        return paragraph(f"There is no {records.VERSIONS}.")
    return table((), [*records.flat(versions).items(), ("devices", workdir.devices())])


def _cells(workdir) -> tuple:
    """A run's row in the table of several."""
    name, _ = workdir.score
    (_, _, validation, test), *best = _scored(workdir)
    try:
        parameters = _count(checkpoint.restore_params(workdir.path)[0])
    except checkpoint.CheckpointError:
        parameters = UNKNOWN
    return (
        workdir.layer,
        f"{workdir.last_step:,} of {workdir.config.train.steps:,}",
        _number(validation.get(name)),
        _number(test.get(name)),
        f"{best[0][1]:,}" if best else UNKNOWN,
        _number(best[0][3].get(name)) if best else UNKNOWN,
        workdir.gap(),
        parameters,
        workdir.took(),
    )


def _differences(trees: dict[str, dict]) -> str:
    """The keys whose values differ, a column per run."""
    flat = {label: records.flat(tree) for label, tree in trees.items()}
    rows = []
    for key in sorted({key for values in flat.values() for key in values}):
        cells = [str(values.get(key, UNKNOWN)) for values in flat.values()]
        if len({*cells}) > 1:
            rows.append((key, *cells))
    return table(("", *flat), rows) if rows else paragraph("Nothing.")


def _count(variables) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(variables['params'])):,}"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"
