"""A trained run's answers to new inputs: a file at once, or token by token.

    python -m train.predict --workdir runs/my --inputs new.npz --out answers.csv
    python -m train.predict --workdir runs/my --inputs recordings/ --length 0
    python -m train.predict --workdir runs/my --inputs new.csv --stream
    sensor | python -m train.predict --workdir runs/my --inputs -

The data that the run was trained on need not be there. Inputs are those of one

    .npz       inputs and, optionally, mask or lengths, reset and dt, laid out as
               `train.data.arrays` says; targets and split are not read
    .csv       numbers, one sequence per row, no target; .parquet likewise
    .wav       one recording, or a folder with such, below which all are read, sorted;
               they are resampled to the rate that the run was trained on, and those
               longer than its data.length are cut there, unless --length says other
    -          standard input, token by token: a line is a token, its numbers separated
               by commas or blanks; an empty line begins the next sequence

in the numbers of the file that the run was trained on: they are normalised as those
were. A sequence may have any length that the layers can take.

What is written is CSV, to --out, whole or not at all, or else to standard output:

    index       of the sequence, from 0
    token       of the sequence, from 0: where the model answers at every token, and
                with --stream; masked tokens have no line
    prediction  number of the class that is the likeliest
    label       its name, where the run's data name their classes or symbols; else its
                number
    score       its probability
    y_0, ...    instead of those three where numbers were to be predicted
    file        of a recording

--stream feeds the model one token at a time in its recurrent mode, one sequence after
another, and writes a line after each: the answer so far. The last line of a sequence
has the answer that it gets without --stream, up to rounding.
"""

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from layers import prepare
from layers.facts import has_state
from layers.models.model import Model
from ssm.sequence import Sequence
from train import files, settings, stream
from train.data import cast, unseen
from train.data.targets import LOSSES
from train.evaluate import PROBLEMS, add_trust, check_call
from train.runs import Run, load_run

STDIN = "-"


def predict(
    run: Run,
    inputs: np.ndarray,
    sequence: Sequence | None = None,
    batch: int = 0,
    chunk: int = stream.CHUNK,
) -> np.ndarray:
    """The answers of a run to sequences.

    Args:
        run: of `train.runs.load_run`.
        inputs: [n, L] or [n, L, C] numbers as the run's own data had them before they
            were normalised, [n, L] tokens, or [n, h, w, C] images.
        sequence: mask, reset and dt, each [n, L]; None for none of them.
        batch: sequences at once; 0: as many tokens as in training.
        chunk: tokens of a sequence at once, where a state takes them further.

    Returns:
        The probabilities of the classes [n, K], or [n, L, K] of a model that answers at
        every token; the predicted numbers of a regression in the same shapes.

    Raises:
        ValueError: inputs that the run cannot read, a dt that float32 cannot hold above
            0, a chunk below 1, or a run of frames.
    """
    check_run(run)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    inputs = unseen.encoded("inputs", inputs, run.spec, run.config.data.name)
    companions = {
        name: np.asarray(value)
        for name in ("mask", "reset", "dt")
        if sequence is not None and (value := getattr(sequence, name)) is not None
    }
    if "dt" in companions:
        dt = companions["dt"]
        real = cast.where_real(companions.get("mask"), dt)
        companions["dt"] = cast.real("sequence.dt", dt, cast.LEAST, real)
    return np.concatenate([*_in_batches(run, inputs, companions, batch, chunk)])


def check_run(run: Run) -> None:
    """Raises a `ValueError` for a run that does not answer to sequences."""
    if not isinstance(run.model, Model) or run.spec.loss not in LOSSES:
        raise ValueError(
            "workdir: must be of a run that answers to sequences, got one of the loss "
            f"{run.spec.loss!r}; train.video.rollout predicts frames"
        )


class Stream:
    """The answers of a run to one sequence, token by token, in its recurrent mode.

    Attributes:
        state: the model's, after the tokens so far; may be kept and put back.

    Args:
        run: of `train.runs.load_run`.

    Raises:
        ValueError: a run of frames, or of a model that has no recurrent mode.
    """

    def __init__(self, run: Run):
        check_run(run)
        if run.model.head == "retrieval":
            raise ValueError(
                "run: a stream must be of one document, got two to compare"
            )
        self._run = run
        self._step = _answering(run)
        self.state = run.model.init_state(1)
        token = np.zeros((1, 1), np.int32)
        if run.spec.encoder != "token":
            token = np.zeros(self._shape(), np.float32)
        prepared = jax.jit(lambda variables: prepare(run.model, variables, token))
        self._variables = prepared(run.variables)

    def feed(
        self, token: Any, reset: bool | None = None, dt: float | None = None
    ) -> np.ndarray:
        """The answer [K] after one more token: probabilities of the classes, or
        numbers.

        Args:
            token: a number, [C] numbers, or the number of a token, as the run's data
                had them before they were normalised.
            reset: whether the state starts anew before it.
            dt: time since the token before in nominal steps; None: 1.

        Raises:
            ValueError: what is no token of the run's, or a dt that float32 cannot hold
                above 0.
        """
        return self.feed_encoded(self._encoded(token), reset, dt)

    def feed_encoded(
        self, token: np.ndarray, reset: bool | None = None, dt: float | None = None
    ) -> np.ndarray:
        """`feed` of a token as the model takes it, [1, 1] or [1, 1, C]."""
        if dt is not None:
            dt = cast.real("dt", np.full((1, 1), dt), cast.LEAST)
        reset = None if reset is None else np.full((1, 1), reset, bool)
        sequence = Sequence(reset=reset, dt=dt)
        y, self.state = self._step(self._variables, token, self.state, sequence)
        return np.asarray(y).reshape(-1)

    def restart(self) -> None:
        """Forgets all tokens so far."""
        self.state = self._run.model.init_state(1)

    def _shape(self) -> tuple[int, ...]:
        spec = self._run.spec
        return (1, 1, *(1,) * (spec.encoder == "image"), spec.channels)

    def _encoded(self, token) -> np.ndarray:
        spec, token = self._run.spec, np.asarray(token)
        count = 1 if spec.encoder == "token" else spec.channels
        if token.size != count:
            raise ValueError(
                f"token: must be {count} number{'s' * (count > 1)}, got shape "
                f"{token.shape}"
            )
        if spec.encoder == "image":
            return cast.real("token", token.reshape(self._shape()))
        shape = (1, 1) if spec.encoder == "token" else (1, 1, count)
        token = token.reshape(shape)
        return unseen.encoded("token", token, spec, self._run.config.data.name)


def _answering(run: Run) -> Callable:
    """The jitted (variables, inputs, state, sequence) -> answers, state."""
    return _jitted(run.model, run.spec.loss == "regression")


@functools.lru_cache(maxsize=8)  # a notebook asks the same run again and again
def _jitted(model: Model, numbers: bool) -> Callable:
    def answered(variables, inputs, state, sequence):
        y, state = model.apply(variables, inputs, state, sequence)
        return y if numbers else jax.nn.softmax(y), state

    return jax.jit(answered)


def _in_batches(
    run: Run,
    inputs: np.ndarray,
    companions: Mapping,
    batch: int = 0,
    chunk: int = stream.CHUNK,
) -> Iterator[np.ndarray]:
    """The answers to some rows after another, in memory of the device that does not
    grow with their number nor, where a state goes on, with their length.

    Raises:
        ValueError: sequences that are longer than a layer can take, or what
            accompanies them is not for it.
    """
    companions = {k: v for k, v in companions.items() if k != "mask" or not v.all()}
    pairs = run.model.head == "retrieval"
    several = pairs or run.spec.encoder == "image"
    tokens = math.prod(inputs.shape[1 : 3 if several else 2])
    most = run.config.train.batch_size * run.spec.length * (1 + pairs)
    rows = min(batch or max(1, most // tokens), len(inputs))
    sequence = Sequence(**{k: v[:rows] for k, v in companions.items()})
    cure = "; --stream reads longer ones, as far as its state remembers"
    cure = cure if has_state(run.model) else ""
    answer = _answering(run)
    check_call(run, "inputs", answer, inputs[:rows], sequence, cure)
    in_pieces = not several and tokens > chunk and has_state(run.model)
    for start in range(0, len(inputs), rows):
        there = np.minimum(np.arange(start, start + rows), len(inputs) - 1)
        part = inputs[there], {k: v[there] for k, v in companions.items()}
        count = min(rows, len(inputs) - start)
        if in_pieces:
            yield _in_pieces(run, answer, *part, chunk)[:count]
        else:
            y, _ = answer(run.variables, part[0], None, Sequence(**part[1]))
            yield np.asarray(y)[:count]


def _in_pieces(
    run: Run, answer: Callable, inputs, companions, chunk: int
) -> np.ndarray:
    """The answers to rows that are fed `chunk` tokens at a time."""
    per_token, found = run.model.head == "token", []
    variables = jax.tree.map(jax.numpy.asarray, run.variables)

    def call(piece, state):
        sequence = Sequence(**{k: v for k, v in piece.items() if k != "inputs"})
        return answer(variables, piece["inputs"], state, sequence)

    state = run.model.init_state(len(inputs))
    arrays = {"inputs": inputs, **companions}
    with stream.bar("predicting", -(-inputs.shape[1] // chunk)) as advance:
        for y, _ in stream.over(call, state, arrays, chunk, advance):
            if not per_token:
                found.clear()  # only the last is the answer
            found.append(np.asarray(y))
    if not per_token:
        return found[0]
    return np.concatenate(found, axis=1)[:, : inputs.shape[1]]


class Table:
    """The lines of answers, as CSV.

    Args:
        run: that answers.
        file: to write to.
        per_token: whether there is a column "token".
        names: of recordings, a column "file"; () for none.
    """

    def __init__(
        self, run: Run, file: TextIO, per_token: bool, names: tuple[str, ...] = ()
    ):
        self._spec, self._names, self._per_token = run.spec, names, per_token
        self._writer, self._file = csv.writer(file, lineterminator="\n"), file
        values = ["prediction", "label", "score"]
        if run.spec.loss == "regression":
            values = [f"y_{k}" for k in range(run.model.outputs)]
        token, last = ["token"] * per_token, ["file"] * bool(names)
        self._writer.writerow(["index", *token, *values, *last])
        self.count = 0

    def write(self, index: int, answer: np.ndarray, token: int = 0) -> None:
        """A line for the answer [K] to a sequence, or at one of its tokens."""
        if self._spec.loss == "regression":
            values = [str(value) for value in answer]
        else:
            number = int(answer.argmax())
            values = [number, self._spec.name(number), f"{answer[number]:.6g}"]
        places = [index, token] if self._per_token else [index]
        names = [self._names[index]] if self._names else []
        self._writer.writerow([*places, *values, *names])
        self.count += 1

    def flush(self) -> None:
        self._file.flush()


def write_answers(
    run: Run,
    given: unseen.Unseen,
    table: Table,
    batch: int = 0,
    chunk: int = stream.CHUNK,
) -> None:
    """The answers to all sequences in their order, see `predict` for the sizes."""
    index = 0
    for answers in _in_batches(run, given.inputs, given.companions, batch, chunk):
        for answer in answers:
            if run.model.head != "token":
                table.write(index, answer)
            else:
                mask = given.companions.get("mask")
                real = np.ones(len(answer), bool) if mask is None else mask[index]
                for token in np.flatnonzero(real):
                    table.write(index, answer[token], int(token))
            index += 1


def stream_answers(run: Run, given: unseen.Unseen, table: Table) -> None:
    """The answers so far after every token, one sequence after another."""
    fed = Stream(run)
    inputs, companions = given.inputs, dict(given.companions)
    if run.spec.encoder == "image":
        inputs = inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    mask = companions.pop("mask", None)
    for index, sequence in enumerate(inputs):
        fed.restart()
        pending = False  # a reset on a masked token is for the next that exists
        for token in range(len(sequence)):
            here = {name: value[index, token] for name, value in companions.items()}
            if "reset" in here:
                pending = here["reset"] = bool(here["reset"] or pending)
            if mask is not None and not mask[index, token]:
                continue
            pending = False
            answer = fed.feed_encoded(sequence[None, token : token + 1], **here)
            table.write(index, answer, token)
            table.flush()


def stream_lines(run: Run, lines: Iterable[str], table: Table) -> None:
    """The answers so far to tokens that come as lines, see this module's docstring."""
    fed, index, token = Stream(run), 0, 0
    for number, line in enumerate(_until_interrupted(lines), 1):
        words = line.replace(",", " ").split()
        if not words:
            if token:
                fed.restart()
                index, token = index + 1, 0
            continue
        try:
            answer = fed.feed(np.array([float(word) for word in words]))
        except ValueError as problem:
            raise ValueError(
                f"--inputs {STDIN}: line {number} must be a token, got "
                f"{files.quoted(line.strip())} ({problem})"
            ) from None
        table.write(index, answer, token)
        table.flush()
        token += 1


def _until_interrupted(lines: Iterable[str]) -> Iterator[str]:
    """The lines; Ctrl-C ends them as the end of the file does."""
    lines = iter(lines)
    while True:
        try:
            line = next(lines, None)
        except KeyboardInterrupt:
            return
        if line is None:
            return
        yield line


@contextlib.contextmanager
def _opened(out: str) -> Iterator[TextIO]:
    """What the table is written to: the file `out`, which is there only once it is
    whole, or standard output."""
    if not out:
        yield sys.stdout
        sys.stdout.flush()
        return
    with files.replacing(settings.place("--out", out)) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.flush()
        text.detach()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.predict",
        description="Writes a trained run's answers to new inputs as CSV.",
    )
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument(
        "--inputs",
        required=True,
        help="an .npz, .csv, .parquet or .wav file, a folder of .wav files, or -",
    )
    parser.add_argument("--out", default="", help="a CSV file; default: print it")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    parser.add_argument(
        "--stream", action="store_true", help="token by token, an answer after each"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        help="sequences at once; default: as many tokens as in training",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=stream.CHUNK,
        help="tokens of a sequence at once, where a state takes them further; default: "
        f"{stream.CHUNK}",
    )
    parser.add_argument(
        "--length",
        type=int,
        help="cut recordings to so many samples; 0: never; default: as in training",
    )
    add_trust(parser)
    options = parser.parse_args(argv)
    try:
        _check_options(options)
        run = load_run(options.workdir, options.step, options.trust)
        check_run(run)
        count = _answer(run, options)
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except PROBLEMS as problem:
        parser.error(str(problem))
    except KeyboardInterrupt:
        return 130
    if options.out:
        print(f"{options.out}: {count:,} answers of step {run.step:,}")
    return 0


def _answer(run: Run, options) -> int:
    """Writes what the command asks for; how many answers that are."""
    per_token = run.model.head == "token"
    if options.inputs == STDIN:
        with _opened(options.out) as file:
            table = Table(run, file, True)
            stream_lines(run, sys.stdin, table)
        return table.count
    spec, trained = run.spec, run.config.data
    heard = trained if trained.name == unseen.OWN else {}
    rate, length = (heard.get(key, 0) for key in ("rate", "length"))
    if options.length is not None:
        length = options.length
    given = unseen.inputs(options.inputs, spec, trained.name, rate, length)
    if given.names and not (rate or spec.rate):
        print(
            f"{options.inputs}: is read as sampled; the run has resampled nothing "
            "(data.rate is 0), so that these must have the rate of its own recordings",
            file=sys.stderr,
        )
    table_like = Path(options.inputs).suffix.lower() in (".csv", ".parquet")
    if table_like and given.inputs.shape[1] == spec.length + 1:
        print(
            f"{options.inputs}: its rows have one number more than the "
            f"{spec.length} that the run was trained on; should the last one be the "
            "target, it is read as an input: leave it out",
            file=sys.stderr,
        )
    with _opened(options.out) as file:
        table = Table(run, file, per_token or options.stream, given.names)
        if options.stream:
            stream_answers(run, given, table)
        else:
            write_answers(run, given, table, options.batch, options.chunk)
    return table.count


def _check_options(options) -> None:
    """Raises a `ValueError` for what cannot be, before anything is read."""
    for name, least in (("batch", 0), ("length", 0), ("chunk", 1)):
        value = getattr(options, name)
        if value is not None and not least <= value <= settings.MOST:
            raise ValueError(
                f"--{name} must lie between {least} and {settings.MOST}, got {value}"
            )
    out = settings.place("--out", options.out)
    if options.out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(
            f"--out must be a file in a folder that exists, got {str(out)!r}"
        )
    if not options.inputs:
        raise ValueError("--inputs must name a file, a folder or -; it is empty")
    if options.inputs != STDIN:
        place = settings.place("--inputs", options.inputs)
        if not place.exists():
            raise ValueError(f"--inputs: there is no {str(place)!r}")
        if options.out and out.exists() and out.samefile(place):
            raise ValueError("--out must be another file than --inputs")


if __name__ == "__main__":
    sys.exit(main())
