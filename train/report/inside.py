"""What is to be seen inside a trained model: filters, spectra, its answers."""

from collections.abc import Mapping

import numpy as np

from layers.models.model import Model
from train import checkpoint, probe, signals
from train.draw import figures
from train.draw.markup import Section, figure, paragraph, table
from train.report import answers, mixing
from train.runs import UNKNOWN, DataError, Run, Workdir


def sections(workdir: Workdir, run: Run, reached: Mapping[str, float]) -> list[Section]:
    """Of a `Model`; none of another kind of model. `reached`: the scores without
    reading the inputs."""
    if not isinstance(run.model, Model):
        return []
    stages, remark = _stages(run)
    blocks = probe.blocks(run.model, stages, workdir.config.model.length)
    selective, pattern = mixing.kinds(run), len(run.model.stack().pattern)
    answering, bent, silent, broken, selects = [], [], [], [], False
    for number, block in enumerate(blocks):
        most = selective.get(number % pattern)  # tokens of its matrix
        if not block.finite():
            broken.append(block)
        elif most:
            selects = True
        elif most is None:
            answering.append(block)
        elif block.silent():
            silent.append(block)
        else:
            answering.append(block)
            bent.append(block)
    try:
        answered = answers.section(
            answers.answer(run), run.spec, run.step, reached.get("accuracy")
        )
    except DataError as error:
        answered = paragraph(f"The answers cannot be shown: {error}.", "soft")
    filters = _filters(workdir, run, answering, bent) if answering else ""
    if broken:
        said = f"{_titles(broken)}: answers with what is not finite; nothing is drawn."
        filters += paragraph(said)
    filters = remark + filters if filters else ""
    mixed = ""
    if selects:
        try:
            mixed = _mixing(run, mixing.of(run, stages, selective))
        except DataError as error:
            mixed = paragraph(f"Mixing cannot be shown: {error}.", "soft")
    mixed += _neither(silent)
    if mixed and not filters:
        mixed = remark + mixed
    return [
        ("filters", "Learned filters", filters),
        ("mixing", "What a token reads", mixed),
        ("spectra", "Spectra and timescales", _spectra(workdir, blocks)),
        ("answers", "Answers", answered),
    ]


def _mixing(run, matrices: list[mixing.Mixing]) -> str:
    """A figure for each kind of layer."""
    parts = []
    for mixed in signals.stoppable(matrices):
        place = "one channel"
        if mixed.channels:
            place = f"channel {_place(mixed.channel, 1)} of {_place(mixed.channels)}"
        length = len(next(iter(mixed.matrices.values())))
        caption = (
            f"How {mixed.title} mixes the first {length:,} tokens of the first example "
            f"of the {mixed.split} split, checkpoint of step {run.step:,}: a row says "
            "how much that token takes of the value of every other, blue added and "
            "orange subtracted. Its own, on the diagonal, is left out, as a skip "
            f"connection would dwarf the rest. Of {place}, which takes the most from "
            "the past. What this layer lets pass depends on the input, so it has no "
            "filters."
        )
        drawn = figures.matrices(
            {f"{mixed.title}: {stage}": M for stage, M in mixed.matrices.items()}
        )
        parts.append(figure(drawn, caption, columns=2))
    return "".join(parts)


def _neither(blocks) -> str:
    """Of blocks that have neither a filter nor a matrix."""
    if not blocks:
        return ""
    return paragraph(
        f"{_titles(blocks)}: what it lets pass depends on the input, so that an "
        "impulse among zeros leaves no trace and there are no filters to draw; and it "
        "is linear in nothing that it shows, so that there is no mixing matrix either. "
        "A layer shows what it mixes, and the mixture, by layers.inside.expose."
    )


def _titles(blocks) -> str:
    return "; ".join(block.title for block in blocks)


def _place(numbers: tuple[int, ...], first: int = 0) -> str:
    """Numbers of the axes, as 4 x 16; those of a place are counted from `first`."""
    return (", " if first else " x ").join(str(i + first) for i in numbers)


def _stages(run) -> tuple[dict, str]:
    """The variables before and after training, and a remark where some are missing."""
    trained = {"trained": run.variables}
    try:
        return {"initial": probe.initial_variables(run)} | trained, ""
    except (ValueError, checkpoint.CheckpointError) as error:
        remark = f"What this run began with cannot be shown: {error}."
        return trained, paragraph(remark, "soft")


def _filters(workdir, run, blocks, bent) -> str:
    """`bent`: those of the blocks that are not linear."""
    block, L = blocks[0], workdir.config.model.length
    lines = min(len(block.features), figures.LINES)
    signals.check()
    caption = (
        f"Checkpoint of step {run.step:,}. What a block's mixer alone answers to a "
    )
    caption += f"unit impulse, in {lines} of the features, each after an impulse in "
    caption += "itself; its answer to silence is subtracted, and lag 0, where a skip "
    caption += (
        "connection would dwarf the rest, is left out. Size: root mean square of "
    )
    caption += f"the whole output over impulses in {len(block.features)} features."
    if len(block.lags) < L:
        caption += f" The first {len(block.lags):,} of {L:,} tokens."
    if bent:
        caption += " Not linear, so that other inputs are answered otherwise: "
        caption += f"{_titles(bent)}."
    columns = len(block.responses) + 1
    return figure(figures.filters(blocks), caption + _not_all(blocks), columns)


def _spectra(workdir, blocks) -> str:
    signals.check()
    blocks = [block for block in blocks if block.has_spectrum()]
    if not blocks:
        return ""
    L = workdir.config.model.length
    caption = "a: the eigenvalues of one token's step, those that a layer stores, and "
    caption += "the unit circle. log a: where a continuous system is sampled, its "
    caption += (
        "eigenvalues times the step size; above the dotted line, half a cycle per "
    )
    caption += (
        "token, a frequency cannot be told from a lower one. Timescale: the tokens "
    )
    caption += (
        "in which a mode decays by a factor e, 1 / -Re log a; dotted: the sequence "
    )
    caption += f"length, {L:,}."
    header, rows = ["timescale, tokens"], []
    for stage in blocks[0].responses:
        header += [f"{stage}: 5 %", "median", "95 %", f"above {L:,}"]
    for block in blocks:
        cells = []
        for response in block.responses.values():
            times = figures.timescales(response.log_a)
            if not times.size:  # what is not finite is left out
                cells += [UNKNOWN] * 4
                continue
            cells += [
                f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
                for x in np.percentile(times, (5, 50, 95))
            ]
            cells.append(f"{np.mean(times > L):.0%}")
        rows.append((block.title, *cells, np.count_nonzero(response.log_a.real >= 0)))
    drawn = figure(figures.spectra(blocks, L), caption + _not_all(blocks), 3)
    return drawn + table((*header, "do not decay"), rows)


def _not_all(blocks) -> str:
    most = figures.BLOCKS
    return f" {most} of {len(blocks)} blocks are drawn." if len(blocks) > most else ""
