"""A run whose data are gone: read, asked, streamed through, scored on other files."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from scipy.io import wavfile

from configs import common, own
from kernels.tolerance import assert_close
from layers import build
from ssm.sequence import Sequence
from train import evaluate, generate, loop, predict, records, runs
from train.data import arrays, unseen
from train.data.spec import Spec
from train.report import __main__ as report

N, L, K = 40, 12, 3
RNG = np.random.default_rng(0)
NEW = RNG.normal(size=(5, 20))
NAMES = ["ant, red", "bee", "cow"]


def trained(folder, head="mean", layer="gru", **file):
    """The workdir of a run of seconds on a file, which is gone then."""
    path = folder / "my.npz"
    np.savez(path, **file)
    config = own.get_config(f"path={path},layer={layer},head={head}")
    config.model.update(features=4, depth=1)
    config.train.update(steps=2, batch_size=8, eval_every=2, checkpoint_every=2)
    loop.run(config, folder / "run")
    path.unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    inputs = RNG.normal(size=(N, L))
    folder = tmp_path_factory.mktemp("classes")
    return trained(folder, inputs=inputs, targets=np.arange(N) % K)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A run that answers at every token."""
    inputs = RNG.integers(0, 7, (N, L))
    folder = tmp_path_factory.mktemp("tokens")
    return trained(folder, "token", inputs=inputs, targets=inputs)


@pytest.fixture(scope="module")
def amounts(tmp_path_factory):
    """A run that answers with two numbers per sequence."""
    inputs = RNG.normal(size=(N, L))
    folder = tmp_path_factory.mktemp("amounts")
    return trained(folder, inputs=inputs, targets=inputs[:, :2])


@pytest.fixture
def named(classes, tmp_path):
    """The same run, whose data have names of classes and are normalised."""
    workdir = shutil.copytree(classes, tmp_path / "run")
    found = json.loads((workdir / records.DATA).read_text())
    found["spec"].update(classes=NAMES, mean=[3.0], std=[0.5])
    (workdir / records.DATA).write_text(json.dumps(found))
    return workdir


def untrained(layer, **spec):
    """A run of which there are only the variables that a model begins with."""
    spec = Spec(**{"encoder": "scalar", "length": L, "outputs": K, **spec})
    config = common.base()
    common.set_layer(config, layer)
    config.data.name = "arrays"
    config.model.update(features=4, depth=2, length=L, outputs=spec.outputs)
    config.model.update(encoder=spec.encoder, vocab_size=spec.vocab_size)
    config.model.head = "token" if spec.loss == "token" else "mean"
    model = build(config.model)
    shape = (1, *spec.size) if spec.size else (1, L)
    whole = spec.encoder == "token"
    x = jnp.zeros(shape if whole else (*shape, spec.channels), int if whole else float)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    return runs.Run(config, spec, model, variables, 0, find=None)


def refused(main, command, capsys):
    """The line with which a command ends."""
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def table(path):
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def probabilities(run, inputs):
    x = arrays.encoded("x", inputs, run.spec)
    y, _ = jax.jit(run.model.apply)(run.variables, x)
    return np.array(jax.nn.softmax(y))


def test_a_run_says_what_its_data_were(classes):
    found = json.loads((classes / records.DATA).read_text())
    assert found["spec"]["outputs"] == K and found["spec"]["length"] == L
    assert sum(found["examples"].values()) == N
    assert records.read_said(classes)["loss"] == "classification"
    run = runs.load_run(classes)
    assert run.spec == records.read_data(classes)
    with pytest.raises(runs.DataError, match=r"my\.npz'; .*train\.predict") as raised:
        _ = run.dataset
    assert str(classes) in str(raised.value)


def test_predict_gives_probabilities_at_any_length(classes):
    run = runs.load_run(classes)
    found = predict.predict(run, NEW)
    assert_close(found, probabilities(run, NEW))
    assert_close(predict.predict(run, NEW[..., None], batch=2), found)
    # A row of 7 real tokens is answered to as if it had no others.
    mask = np.arange(20) < np.array([[7], [20], [20], [20], [20]])
    padded = predict.predict(run, NEW, Sequence(mask=jnp.asarray(mask)))
    assert_close(padded[0], predict.predict(run, NEW[:1, :7])[0])
    assert_close(padded[1:], found[1:])


def test_answers_in_a_file(named, tmp_path, capsys):
    np.savez(tmp_path / "new.npz", inputs=NEW, lengths=[20, 20, 3, 20, 20])
    out = tmp_path / "answers.csv"
    command = ["--workdir", str(named), "--inputs", str(tmp_path / "new.npz")]
    assert predict.main([*command, "--out", str(out)]) == 0
    assert "5 answers of step 2" in capsys.readouterr().out
    run, rows = runs.load_run(named), table(out)
    assert [*rows[0]] == ["index", "prediction", "label", "score"]
    expected = probabilities(run, NEW)
    expected[2] = probabilities(run, NEW[2:3, :3])[0]
    assert [int(row["prediction"]) for row in rows] == [*expected.argmax(axis=1)]
    assert [row["label"] for row in rows] == [NAMES[i] for i in expected.argmax(axis=1)]
    scores = np.array([row["score"] for row in rows], np.float32)
    assert_close(scores, expected.max(axis=1))
    # What the run subtracts and divides by is a function of the run, not of the file.
    shifted = run.spec.but(mean=(0.0,), std=(1.0,))
    other = dataclasses.replace(run, spec=shifted)
    assert_close(predict.predict(other, (NEW - 3) / 0.5), predict.predict(run, NEW))
    assert predict.main(command) == 0
    assert capsys.readouterr().out == out.read_text()


def test_answers_at_every_token(tokens, tmp_path):
    new = RNG.integers(0, 7, (2, 5))
    path, out = tmp_path / "new.npz", tmp_path / "answers.csv"
    np.savez(path, inputs=new, mask=np.arange(5) < [[5], [2]])
    command = ["--workdir", tokens, "--inputs", path, "--out", out]
    assert predict.main([*map(str, command)]) == 0
    rows = table(out)
    assert [(r["index"], r["token"]) for r in rows] == [
        *[("0", str(t)) for t in range(5)],
        *[("1", str(t)) for t in range(2)],
    ]
    expected = predict.predict(runs.load_run(tokens), new)[0]
    assert [int(r["label"]) for r in rows[:5]] == [*expected.argmax(axis=1)]
    assert predict.main([*map(str, command), "--stream"]) == 0
    assert [{**r, "score": ""} for r in table(out)] == [
        {**r, "score": ""} for r in rows
    ]


def test_generation_needs_no_data(tokens, tmp_path, capsys):
    out = tmp_path / "made"
    command = ["--workdir", str(tokens), "--count", "2", "--out", str(out)]
    assert generate.main(command) == 0
    assert np.load(f"{out}.npy").shape == (2, L)
    command[-1] = str(tmp_path / "nowhere" / "made.npy")
    assert "out: must be a file in a folder" in refused(generate.main, command, capsys)


@pytest.mark.parametrize(
    "loss",
    [
        "classification",
        pytest.param("token", marks=pytest.mark.slow),
        pytest.param("regression", marks=pytest.mark.slow),
    ],
)
def test_a_stream_ends_at_the_answer_to_the_whole(loss, tmp_path):
    run = untrained("lru", loss=loss, channels=2)
    path, inputs = tmp_path / "new.npz", RNG.normal(size=(3, 9, 2))
    reset, mask = RNG.random((2, 3, 9)) < [[[0.2]], [[0.7]]]
    mask[:, 4] = True
    dt = RNG.uniform(0.5, 2, (3, 9))
    np.savez(path, inputs=inputs, mask=mask, reset=reset, dt=dt)
    given = unseen.inputs(path, run.spec)
    whole, streamed = io.StringIO(), io.StringIO()
    predict.write_answers(run, given, predict.Table(run, whole, loss == "token"))
    predict.stream_answers(run, given, predict.Table(run, streamed, True))
    rows = [[*csv.DictReader(f.getvalue().splitlines())] for f in (whole, streamed)]
    assert len(rows[1]) == mask.sum()
    if loss == "token":
        assert len(rows[0]) == mask.sum()
    else:
        rows[1] = [[r for r in rows[1] if r["index"] == str(i)][-1] for i in range(3)]
    names = [k for k in rows[0][0] if k == "score" or k.startswith("y_")]
    assert len(names) == (K if loss == "regression" else 1)
    numbers = [np.array([[r[k] for k in names] for r in x], float) for x in rows]
    assert_close(numbers[1], numbers[0], dtype="float32")


def test_a_dt_that_does_not_fit_is_refused():
    run = untrained("lru", loss="classification")
    stream = predict.Stream(run)
    for dt, message in {
        1e-50: "is 1e-50 at .*must be 1.18e-38 or more",
        1e300: r"is 1e\+300 at .*those of float32",
        0.0: "is 0.0 at .*must be 1.18e-38 or more",
        float("nan"): "is nan at .*must be finite",
        "x": "is of dtype <U1; it must be numbers",
    }.items():
        with pytest.raises(ValueError, match=f"^dt {message}"):
            stream.feed(1.0, dt=dt)
        sequence = Sequence(dt=np.full(NEW.shape, dt))
        with pytest.raises(ValueError, match=rf"^sequence\.dt {message}"):
            predict.predict(run, NEW, sequence)
    # of a masked token it is not read
    dt, mask = np.ones(NEW.shape), np.ones(NEW.shape, bool)
    dt[:, 3], mask[:, 3] = 0, False
    sequence = Sequence(mask=mask, dt=dt)
    assert np.isfinite(predict.predict(run, NEW, sequence)).all()


@pytest.mark.slow
def test_long_sequences_go_through_in_chunks():
    for loss in ("classification", "token"):
        run = untrained("lru", loss=loss)
        whole = predict.predict(run, NEW)
        assert_close(predict.predict(run, NEW, chunk=8), whole)
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0"):
        predict.predict(run, NEW, chunk=0)


def test_a_reset_that_comes_too_late_takes_nothing_from_the_answer():
    """It stands on a masked token, in a chunk behind which nothing is real."""
    run = untrained("lru", loss="classification")
    mask, reset = np.arange(20) < 6, np.arange(20) == 7
    sequence = Sequence(mask=np.tile(mask, (5, 1)), reset=np.tile(reset, (5, 1)))
    whole = predict.predict(run, NEW, sequence)
    assert_close(predict.predict(run, NEW, sequence, chunk=8), whole)


@pytest.mark.slow
def test_a_layer_says_how_long_a_call_may_be():
    run = untrained("long_conv", loss="classification")
    message = (
        r"\(5, 20\) cannot be answered to \(the run was trained on 12 tokens\): "
        r".*12 taps.*; --stream reads longer"
    )
    with pytest.raises(ValueError, match=message):
        predict.predict(run, NEW)
    stream = predict.Stream(run)
    found = [stream.feed(x) for x in NEW[0]]
    assert_close(found[L - 1], predict.predict(run, NEW[:1, :L])[0])
    assert np.isfinite(found).all()
    run = untrained("flash_butterfly", loss="classification")
    with pytest.raises(ValueError, match=r"cannot be answered to .*=20$"):
        predict.predict(run, NEW)
    with pytest.raises(ValueError, match="has no recurrent mode"):
        predict.Stream(run)


@pytest.mark.slow
def test_images_are_read_whole_and_pixel_by_pixel():
    run = untrained("lru", loss="classification", encoder="image", size=(3, 4))
    images = RNG.random((2, 3, 4), np.float32)
    whole = predict.predict(run, images)
    stream = predict.Stream(run)
    for pixel in images[0].ravel():
        found = stream.feed(pixel)
    assert_close(found, whole[0])
    with pytest.raises(
        ValueError, match=r"shape \(2, 4, 3\); the run reads images \[n, 3"
    ):
        predict.predict(run, images.swapaxes(1, 2))


def test_integers_are_refused_where_a_dataset_prepares_its_numbers_itself():
    spec, whole = Spec("scalar", L, K, "classification"), np.arange(24).reshape(2, 12)
    assert unseen.encoded("x", whole, spec).dtype == np.float32
    with pytest.raises(ValueError, match="dtype int64; the dataset 'digits' prepares"):
        unseen.encoded("x", whole, spec, "digits")
    floats = unseen.encoded("x", whole.astype(float), spec, "digits")
    np.testing.assert_array_equal(floats, whole)


def test_standard_input_is_a_stream(classes, monkeypatch, tmp_path, capsys):
    lines = [f"{x}\n" for x in NEW[0]] + ["\n", "\n"] + [f"{x},\n" for x in NEW[1]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    command = ["--workdir", str(classes), "--inputs", "-"]
    assert predict.main(command) == 0
    rows = [*csv.DictReader(capsys.readouterr().out.splitlines())]
    assert [r["index"] for r in rows] == ["0"] * 20 + ["1"] * 20
    assert [r["token"] for r in rows[:20]] == [str(i) for i in range(20)]
    expected = predict.predict(runs.load_run(classes), NEW[:2]).max(axis=1)
    assert_close(np.array([rows[19]["score"], rows[39]["score"]], np.float32), expected)
    # What cannot be read leaves what was there before.
    out = tmp_path / "answers.csv"
    out.write_text("before")
    for line, reason in (("1 2", "must be 1 number"), ("x", "could not convert")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"0.5\n{line}\n"))
        said = refused(predict.main, [*command, "--out", out], capsys)
        assert f"line 2 must be a token, got {line!r}" in said and reason in said
    assert out.read_text() == "before" and [*tmp_path.iterdir()] == [out]


def test_recordings(classes, tmp_path, capsys):
    folder = tmp_path / "recordings"
    (folder / "b").mkdir(parents=True)
    for name, length in (("b/a.wav", 30), ("c.wav", 9)):
        samples = RNG.integers(-(2**15), 2**15, length).astype(np.int16)
        wavfile.write(folder / name, 2000, samples)
    out, run = tmp_path / "answers.csv", runs.load_run(classes)
    command = ["--workdir", str(classes), "--out", str(out), "--inputs"]
    assert predict.main([*command, str(folder), "--length", "16"]) == 0
    rows = table(out)
    assert [row["file"] for row in rows] == ["b/a.wav", "c.wav"]
    for row, count in zip(rows, (16, 9), strict=True):
        _, samples = wavfile.read(folder / row["file"])
        heard = samples[None, :count] / 2**15
        expected = predict.predict(run, heard)[0].max()
        assert_close(np.float32(row["score"]), expected)
    capsys.readouterr()
    assert predict.main([*command, str(folder / "c.wav")]) == 0
    assert "must have the rate of its own recordings" in capsys.readouterr().err
    assert [r["file"] for r in table(out)] == ["c.wav"]
    (tmp_path / "empty").mkdir()
    said = refused(predict.main, [*command, tmp_path / "empty"], capsys)
    assert "empty: has no .wav file" in said


def test_a_recording_is_streamed_at_the_rate_of_the_run(classes, tmp_path, capsys):
    workdir = shutil.copytree(classes, tmp_path / "run")
    config = records.read_config(workdir)
    config.data.update(rate=1000, length=7)
    (workdir / records.CONFIG).write_text(config.to_json())
    path = tmp_path / "new.wav"
    wavfile.write(path, 2000, RNG.normal(size=30).astype(np.float32))
    command = ["--workdir", str(workdir), "--inputs", str(path)]
    assert predict.main(command) == 0
    (answer,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert predict.main([*command, "--stream"]) == 0
    lines = [*csv.DictReader(capsys.readouterr().out.splitlines())]
    assert [*lines[0]] == ["index", "token", "prediction", "label", "score", "file"]
    assert [row["token"] for row in lines] == [str(i) for i in range(7)]
    assert {row["file"] for row in lines} == {"new.wav"}
    assert_close(np.float32(lines[-1]["score"]), np.float32(answer["score"]))


def test_answers_to_a_parquet_file_are_those_to_an_npz(classes, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"inputs": NEW.tolist(), "lengths": [20, 3, 20, 20, 9]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "new.parquet")
    np.savez(tmp_path / "new.npz", inputs=NEW, lengths=columns["lengths"])
    printed = []
    for name in ("new.parquet", "new.npz"):
        command = ["--workdir", str(classes), "--inputs", str(tmp_path / name)]
        assert predict.main(command) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") == 6
    numbers = {f"t{i}": NEW[:, i] for i in range(20)}  # a column per token
    parquet.write_table(pyarrow.table(numbers), tmp_path / "new.parquet")
    assert predict.main([*command[:-1], str(tmp_path / "new.parquet")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == printed[0].splitlines()[1]


@pytest.mark.slow
def test_a_pipe_is_answered_line_by_line(classes):
    """Each answer is there before the next token is: a sensor never ends."""
    command = [sys.executable, "-m", "train.predict", "--inputs", "-"]
    command += ["--workdir", str(classes)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tiny_run.ROOT, **pipes) as process:
        rows = []
        for number in NEW[0, :4]:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            if not rows:
                header = process.stdout.readline()
            rows.append(process.stdout.readline().strip().split(","))
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0
    assert header == "index,token,prediction,label,score\n"
    assert [row[1] for row in rows] == ["0", "1", "2", "3"]
    expected = predict.predict(runs.load_run(classes), NEW[:1, :4])[0].max()
    assert_close(np.float32(rows[-1][-1]), expected)


@pytest.mark.slow
def test_numbers_that_are_predicted_have_a_column_each(tmp_path):
    inputs = RNG.normal(size=(N, L))
    targets = np.stack([inputs.mean(axis=1), inputs[:, 0]], axis=1)
    workdir = trained(tmp_path, inputs=inputs, targets=targets)
    path, out = tmp_path / "new.npz", tmp_path / "answers.csv"
    np.savez(path, inputs=NEW)
    command = ["--workdir", str(workdir), "--inputs", str(path), "--out", str(out)]
    assert predict.main(command) == 0
    rows = table(out)
    assert [*rows[0]] == ["index", "y_0", "y_1"]
    expected = predict.predict(runs.load_run(workdir), NEW)
    values = np.array([[row["y_0"], row["y_1"]] for row in rows], np.float32)
    assert_close(values, expected)
    assert predict.main([*command, "--stream"]) == 0
    streamed = table(out)
    assert [*streamed[0]] == ["index", "token", "y_0", "y_1"]
    last = streamed[19]
    assert_close(np.array([last["y_0"], last["y_1"]], np.float32), expected[0])


def test_rows_of_a_table_may_differ_in_length(classes, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("0.5,1.5,2.5\n1,2\n")
    spec = records.read_data(classes)
    given = unseen.inputs(path, spec)
    np.testing.assert_array_equal(given.companions["mask"], [[1, 1, 1], [1, 1, 0]])
    expected = arrays.encoded("x", np.array([[0.5, 1.5, 2.5]]), spec)
    np.testing.assert_array_equal(given.inputs[:1], expected)
    path.write_text(",".join(map(str, range(L + 1))))
    assert predict.main(["--workdir", str(classes), "--inputs", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 2
    assert "should the last one be the target" in said.err


def test_a_table_to_be_answered_to_has_no_targets(classes, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("0.5,1.5,bee\n")
    said = refused(predict.main, ["--workdir", classes, "--inputs", path], capsys)
    assert f"{path}: row 1, column 3 is 'bee'; it must be a number: " in said
    assert "leave that column out" in said


BAD = {
    "channels": (dict(inputs=np.zeros((2, 4, 3))), "inputs has shape (2, 4, 3)"),
    "a NaN": (dict(inputs=np.full((2, 4), np.nan)), "every value must be finite"),
    "text": (dict(inputs=np.array([["a"]])), "it must be numbers"),
    "nothing": (dict(inputs=np.zeros((0, 4))), "every axis must be 1 or longer"),
    "no inputs": (dict(x=np.zeros((2, 4))), "inputs is missing; the file has x"),
    "another key": (dict(inputs=np.zeros((2, 4)), x=[1, 2]), "x is no known key"),
    "lengths": (dict(inputs=np.zeros((2, 4)), lengths=[4, 5]), "lies in [4, 5]"),
    "objects": (dict(inputs=np.array([[None]])), "not a readable NPZ of plain arrays"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_inputs_that_cannot_be_read(classes, tmp_path, capsys, arrays, message):
    path = tmp_path / "new.npz"
    np.savez(path, **arrays)
    command = ["--workdir", classes, "--inputs", path, "--out", tmp_path / "x.csv"]
    said = refused(predict.main, command, capsys)
    assert str(path) in said and message in said
    assert [*tmp_path.iterdir()] == [path]


def test_tokens_beyond_the_vocabulary(tokens, tmp_path, capsys):
    path = tmp_path / "new.npz"
    np.savez(path, inputs=np.array([[0, 99]]), targets=np.array([[0, 1]]))
    for main, flag in ((predict.main, "--inputs"), (evaluate.main, "--data")):
        said = refused(main, ["--workdir", tokens, flag, path], capsys)
        assert f"{path}: inputs is 99 at [0, 1]; it must lie between 0 and" in said


def test_a_run_is_scored_on_another_file(named, tmp_path, capsys):
    path = tmp_path / "new.npz"
    run = runs.load_run(named)
    answers = predict.predict(run, NEW).argmax(axis=1)
    targets = answers.copy()
    targets[:2] = (targets[:2] + 1) % K
    command = ["--workdir", str(named), "--data", str(path)]
    np.savez(path, inputs=NEW, targets=np.array(NAMES)[targets])
    assert evaluate.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["parallel_vs_recurrent"] < 1e-4
    np.savez(path, inputs=NEW, targets=targets, split=["train"] * 2 + ["test"] * 3)
    chosen = evaluate.on_file(run, path).dataset
    assert {s: chosen.num_examples(s) for s in chosen.sources} == dict(train=2, test=3)
    found = [
        chosen.sources[s][i]["targets"]
        for s, n in (("train", 2), ("test", 3))
        for i in range(n)
    ]
    assert found == [*targets]
    assert "split must be one of train, test" in refused(
        evaluate.main, [*command, "--split", "validation"], capsys
    )
    assert "--lengths must go without --data" in refused(
        evaluate.main, [*command, "--lengths", "1"], capsys
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(inputs=NEW, targets=[0, 1, 2, 3, 0]), "targets is 3 at [3]; it must lie"),
        (
            dict(inputs=NEW, targets=NEW),
            "targets is float64 (5, 20); it must be (5,)",
        ),
        (dict(inputs=np.zeros((1, 4, 2)), targets=[0]), "inputs has shape (1, 4, 2)"),
        (dict(inputs=NEW), "targets is missing"),
    ],
    ids=["a class", "per token", "channels", "no targets"],
)
def test_what_a_run_cannot_be_scored_on(named, tmp_path, capsys, arrays, message):
    path = tmp_path / "new.npz"
    np.savez(path, **arrays)
    said = refused(evaluate.main, ["--workdir", named, "--data", path], capsys)
    assert str(path) in said and message in said


NUMBERED = (
    "the run has 3 classes, numbered from 0 as in the data that it was trained on"
)
WORDS = np.array(["bee"] * 5)


@pytest.mark.parametrize(
    ("run", "targets", "message"),
    [
        (
            "classes",
            np.arange(5) - 1,
            f"is -1 at [0]; .* between 0 and 2; {NUMBERED}: ",
        ),
        ("classes", np.arange(5.0), f"is 3.0 at [3]; .* between 0 and 2; {NUMBERED}: "),
        ("classes", np.full(5, 0.5), f"has fractions, 0.5 at [0]; .*; {NUMBERED}: "),
        ("classes", WORDS, "has the class 'bee'; .* have no names, only 0 to 2"),
        (
            "classes",
            NEW,
            "it must be (5,): the run answers every sequence with a class",
        ),
        ("named", np.arange(5), f"{NUMBERED}, in the order 'ant, red', 'bee', 'cow': "),
        (
            "tokens",
            np.full((5, 20), -2),
            "is -2 at [0, 0]; .* between -1 and 6; the run has 7 classes.*: -1 is for",
        ),
        (
            "tokens",
            np.zeros(5, int),
            "(5, 20): the run answers every token with a class",
        ),
        ("amounts", WORDS, "(5, 2): the run answers every sequence with numbers"),
        ("amounts", NEW[:, :3], "(5, 2): the run answers every sequence with numbers"),
        (
            "amounts",
            np.full((5, 2), "bee"),
            "has words; the run answers with numbers",
        ),
    ],
)
def test_targets_must_be_those_that_a_run_answers_with(
    request, tmp_path, capsys, run, targets, message
):
    """What it says is about the run, not about how one would be trained."""
    path = tmp_path / "new.npz"
    inputs = np.zeros((5, 20), int) if run == "tokens" else NEW
    np.savez(path, inputs=inputs, targets=targets)
    workdir = request.getfixturevalue(run)
    said = refused(evaluate.main, ["--workdir", workdir, "--data", path], capsys)
    parts = [re.escape(part) for part in message.split(".*")]
    assert re.search(f"{re.escape(str(path))}: targets .*{'.*'.join(parts)}", said)
    assert "data.loss" not in said and "--config" not in said


def test_numbers_are_not_taken_for_names_that_are_numbers(named, tmp_path, capsys):
    """1 may be the first class of 1 and 2, or the second: what it is must be said."""
    found = json.loads((named / records.DATA).read_text())
    found["spec"].update(classes=["1", "2", "3"])
    (named / records.DATA).write_text(json.dumps(found))
    path, targets = tmp_path / "new.npz", np.array([1, 2, 1, 2, 1])
    command = ["--workdir", str(named), "--data", str(path)]
    np.savez(path, inputs=NEW, targets=targets)
    said = refused(evaluate.main, command, capsys)
    assert "the run's classes, '1', '2', '3', are numbers too" in said
    run = runs.load_run(named)

    def numbers():
        rows = evaluate.on_file(run, path).dataset.sources["test"]
        return [int(rows[i]["targets"]) for i in range(5)]

    np.savez(path, inputs=NEW, targets=targets.astype(str))
    assert numbers() == [0, 1, 0, 1, 0]
    np.savez(path, inputs=NEW, targets=targets, class_names=["3", "2", "1"])
    assert numbers() == [1, 0, 1, 0, 1]


def test_a_split_that_is_none_is_refused(named, tmp_path, capsys):
    path = tmp_path / "new.npz"
    np.savez(path, inputs=NEW, targets=np.zeros(5, int), split=["test"] * 4 + ["tset"])
    said = refused(evaluate.main, ["--workdir", named, "--data", path], capsys)
    assert f"{path}: split is " in said and "'tset'; it must be" in said


def test_recordings_of_one_class_are_scored(named, tmp_path, capsys):
    """To train on them would be in vain; and a cure is one that the command has."""
    folder = tmp_path / "wav"
    command = ["--workdir", str(named), "--data", str(folder)]
    folder.mkdir()
    said = refused(evaluate.main, command, capsys)
    assert "--data must be a file, or a folder of .wav files, got the folder" in said
    for name in ("bee_1", "bee_2"):
        wavfile.write(folder / f"{name}.wav", 8000, NEW[0].astype(np.float32))
    assert evaluate.main(command) == 0
    assert "accuracy" in json.loads(capsys.readouterr().out)
    (folder / "bee_2.wav").rename(folder / "bee.wav")
    said = refused(evaluate.main, command, capsys)
    assert "has no label: its name must begin with the class" in said
    (folder / "cow").mkdir()
    (folder / "bee.wav").rename(folder / "cow" / "1.wav")
    other = refused(evaluate.main, command, capsys)
    assert "lies in no folder, but" in other
    assert "--config" not in said + other


def test_sequences_that_are_too_long_for_a_run(tmp_path, capsys):
    workdir = trained(
        tmp_path,
        layer="hyena",
        inputs=RNG.normal(size=(N, L)),
        targets=np.arange(N) % K,
    )
    path = tmp_path / "new.npz"
    np.savez(path, inputs=NEW, targets=np.zeros(5, int))
    for main, flag in ((predict.main, "--inputs"), (evaluate.main, "--data")):
        said = refused(main, ["--workdir", workdir, flag, path], capsys)
        assert "cannot be answered to (the run was trained on 12 tokens)" in said
        assert "20 tokens of the call" in said
    assert str(path) in said


def test_a_class_that_a_run_does_not_know(named, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("0.5,1.5,bee\n0.5,1.0,elk\n")
    said = refused(evaluate.main, ["--workdir", named, "--data", path], capsys)
    assert (
        f"{path}: targets has the class 'elk'; those of the run are 'ant, red'" in said
    )
    path.write_text("0.5,1.5,bee\n0.5,1.0,cow\n")
    assert evaluate.main(["--workdir", str(named), "--data", str(path)]) == 0
    assert "accuracy" in json.loads(capsys.readouterr().out)


def test_evaluation_without_data_names_the_file(classes, capsys):
    said = refused(evaluate.main, ["--workdir", classes], capsys)
    assert "there is no file" in said and "my.npz" in said and "--data" in said


@pytest.mark.slow
def test_a_report_without_data_says_what_it_lacks(classes, tmp_path):
    page = tmp_path / "page.html"
    assert report.main(["--workdir", str(classes), "--out", str(page)]) == 0
    text = page.read_text()
    assert "The answers cannot be shown: the data of" in text and "my.npz" in text
    assert "Verdict" in text and "Learned filters" in text


def test_a_run_goes_on_with_the_data_it_began_with(classes, tmp_path):
    workdir = shutil.copytree(classes, tmp_path / "run")
    config = records.read_config(workdir)
    config.train.steps = 4
    other = RNG.normal(size=(N, L, 2))
    np.savez(config.data.path, inputs=other, targets=np.arange(N) % K)
    try:
        with pytest.raises(ValueError, match=r"of other data .*channels was 1, is 2"):
            loop.run(config, workdir)
        with pytest.raises(
            runs.DataError, match=r"others than they were: .*was 1, is 2"
        ):
            _ = runs.load_run(workdir).dataset
    finally:
        (classes.parent / "my.npz").unlink()


def test_a_run_from_before_needs_its_data(classes, tmp_path):
    workdir = shutil.copytree(classes, tmp_path / "run")
    (workdir / records.DATA).unlink()
    with pytest.raises(runs.DataError, match=r"no file .*my\.npz'; .*the run began b"):
        runs.load_run(workdir)


def test_data_that_are_not_those_of_the_model(classes, tmp_path, capsys):
    workdir = shutil.copytree(classes, tmp_path / "run")
    found = json.loads((workdir / records.DATA).read_text())
    for change, message in (
        (dict(outputs=9, classes=[]), "spec.outputs must be at most 3"),
        (dict(channels=2, mean=[], std=[]), "spec.channels must be 1, what the model"),
    ):
        other = found | {"spec": found["spec"] | change}
        (workdir / records.DATA).write_text(json.dumps(other))
        said = refused(evaluate.main, ["--workdir", workdir], capsys)
        assert f"{workdir / records.DATA}: {message}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--out", "nowhere/x.csv"],
            "--out must be a file in a folder that exists, got",
        ),
        (["--out", "."], "--out must be a file in a folder that exists, got '.'"),
        (["--out", "new.npz"], "--out must be another file than --inputs"),
        (["--inputs", "none.npz"], "--inputs: there is no 'none.npz'"),
        (["--inputs", "x.txt"], "--inputs must end in .npz, .csv, .parquet or .wav"),
        (["--batch", "-1"], "--batch must lie between 0 and"),
        (["--length", "-1"], "--length must lie between 0 and"),
        (["--step", "7"], "no checkpoint of step 7"),
    ],
    ids=" ".join,
)
def test_flags_say_what_they_must_be(
    classes, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    np.savez("new.npz", inputs=NEW)
    (tmp_path / "x.txt").touch()
    command = ["--workdir", classes, "--inputs", "new.npz", *flags]
    assert message in refused(predict.main, command, capsys)


@pytest.mark.parametrize("name", ["README.md", "docs/training.md"])
def test_a_page_streams_through_a_model(classes, tmp_path, monkeypatch, name):
    page = (tiny_run.ROOT / name).read_text()
    (snippet,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
        if "load_run(" in block
    ]
    assert len([line for line in snippet.splitlines() if line]) == 6
    (tmp_path / "runs").mkdir()
    shutil.copytree(classes, tmp_path / "runs" / "my")
    np.savez(tmp_path / "new.npz", inputs=NEW)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    expected = predict.predict(runs.load_run(classes), NEW[:1])[0]
    assert_close(names["probabilities"], expected)
