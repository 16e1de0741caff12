"""What a newcomer does with data of his own, by the commands that he types: trained,
its data gone, loaded, asked, streamed, scored on other data."""

import csv
import json
import shutil

import numpy as np
import pytest
import test_main
from scipy import signal
from scipy.io import wavfile

from train import evaluate, main, predict, runs

parsed = test_main.parsed
RATE, LENGTH = 2000, 40
TINY = (
    "--config.model.features=4",
    "--config.model.depth=1",
    "--config.train.steps=2",
    "--config.train.batch_size=8",
    "--config.train.eval_every=2",
    "--config.train.checkpoint_every=2",
    "--noreport",
)
PITCHES = {"high": 600, "low": 90}  # Hz


def tone(label, rate, rng):
    """A twentieth of a second of 16-bit sound."""
    seconds = np.arange(rate // 20) / rate
    x = np.sin(2 * np.pi * (PITCHES[label] * seconds + rng.random()))
    return (8000 * x + 500 * rng.normal(size=x.shape)).astype(np.int16)


def recordings(place, count, rng):
    """A folder of recordings whose rates differ, by their own names."""
    place.mkdir()
    for i in range(count):
        rate, label = (4000, 8000)[i % 2], [*PITCHES][i % 2]
        wavfile.write(place / f"{label}_{i}.wav", rate, tone(label, rate, rng))


def remove(place):
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def one_recording(place, rng):
    wavfile.write(place, 16000, tone("low", 16000, rng))
    rate, samples = wavfile.read(place)
    return rate, samples / 2.0**15


def rows(place, count, rng):
    """A table of numbers, its last column a word."""
    lines = []
    for i in range(count):
        label = [*PITCHES][i % 2]
        numbers = 100 + 20 * rng.normal(size=LENGTH) + 30 * (label == "high")
        lines.append(",".join([*(f"{x:.2f}" for x in numbers), label]))
    place.write_text("\n".join(lines) + "\n")


def one_row(place, rng):
    numbers = np.round(100 + 20 * rng.normal(size=LENGTH), 2)
    place.write_text(",".join(map(str, numbers)) + "\n")
    return None, numbers


def without_labels(place):
    """The same as inputs alone, and the labels in their order."""
    if place.is_dir():
        return place, [file.stem.partition("_")[0] for file in sorted(place.iterdir())]
    lines = [line.rpartition(",") for line in place.read_text().splitlines()]
    bare = place.with_stem(f"{place.stem}_bare")
    bare.write_text("\n".join(numbers for numbers, _, _ in lines) + "\n")
    return bare, [label for _, _, label in lines]


PATHS = {
    "recordings": (
        ("mine", recordings),
        ("new.wav", one_recording),
        [f"--config.data.rate={RATE}", f"--config.data.length={LENGTH}"],
    ),
    "a table": (("mine.csv", rows), ("new.csv", one_row), []),
}


def table(path):
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize(
    "path", ["a table", pytest.param("recordings", marks=pytest.mark.slow)]
)
def test_from_data_to_a_stream(path, parsed, tmp_path, monkeypatch, capsys):
    (name, write), (new, write_new), more = PATHS[path]
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write(tmp_path / name, 40, rng)
    command = ["--config", f"own:path={name},layer=lru", "--workdir", "runs/my"]
    assert main.main(parsed(*command, *TINY, *more)) == 0
    printed = capsys.readouterr().out
    assert "taken as numbers" in printed
    assert "normalised by the training part's mean" in printed
    assert "2 classes, the largest (" in printed and "chance level 0.5" in printed
    remove(tmp_path / name)

    run = runs.load_run("runs/my")
    assert run.spec.classes == ("high", "low") and run.spec.length == LENGTH
    rate, numbers = write_new(tmp_path / new, rng)
    asked = ["--workdir", "runs/my", "--inputs", new, "--out", "answers.csv"]
    assert predict.main(asked) == 0
    (answer,) = table("answers.csv")
    assert answer["label"] == run.spec.classes[int(answer["prediction"])]
    assert predict.main([*asked, "--stream"]) == 0
    streamed = table("answers.csv")
    assert [int(row["token"]) for row in streamed] == [*range(LENGTH)]
    assert streamed[-1]["label"] == answer["label"]
    score = float(answer["score"])
    assert float(streamed[-1]["score"]) == pytest.approx(score, abs=1e-4)
    # By hand, from what the file has: SciPy's own resampling, the run's statistics.
    if rate:
        numbers = signal.resample_poly(numbers, RATE, rate)[:LENGTH]
    stream = predict.Stream(run)
    for number in numbers:
        probabilities = stream.feed(number)
    assert probabilities.argmax() == int(answer["prediction"])
    assert probabilities.max() == pytest.approx(score, abs=1e-4)

    write(tmp_path / f"other_{name}", 6, rng)
    capsys.readouterr()
    command = ["--workdir", "runs/my", "--data", f"other_{name}"]
    assert evaluate.main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    inputs, labels = without_labels(tmp_path / f"other_{name}")
    asked[3] = str(inputs)
    assert predict.main(asked) == 0
    answers = [row["label"] for row in table("answers.csv")]
    right = [answer == label for answer, label in zip(answers, labels, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["parallel_vs_recurrent"] < 1e-4


def test_a_table_of_dates_ends_in_one_line_that_names_it(tmp_path):
    path = tmp_path / "sales.csv"
    days = [f"2024-01-{day:02},{day * 1.5},{day * 2}" for day in range(1, 29)]
    path.write_text("\n".join(["date,price,sold", *days]) + "\n")
    workdir = tmp_path / "run"
    refusal = test_main.answer("--config", f"own:path={path}", f"--workdir={workdir}")
    assert refusal.startswith("error: ") and refusal.count("\n") == 1
    assert "forecasting file" in refusal and str(path) in refusal
    assert not workdir.exists()
