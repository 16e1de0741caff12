"""What people bring: words as classes, recordings, tables, numbers of any scale."""

import dataclasses
import json
import re
import struct
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import tiny_run
from scipy.io import wavfile

from configs import common
from configs import own as own_config
from kernels import tolerance
from train import data, loop, predict, records, runs
from train.data import arrays, described, own, recordings, said, sources, tables, unseen
from train.data.source_file import File
from train.data.sources import Rows
from train.data.spec import Spec
from train.report import answers

RNG = np.random.default_rng(0)
N, L = 40, 6
INPUTS = RNG.normal(size=(N, L))
CLASSES = np.arange(N) % 4
WORDS = np.array(["four", "one", "three", "two"])[CLASSES]
WHOLE = dict(validation=0.0, test=0.0)
SPLIT = np.repeat(["train", "validation", "test"], [20, 10, 10])
SMALL = tolerance.limit("float32")


def load(path, **config):
    return data.load(dict(name="arrays", path=str(path), **config))


def load_npz(tmp_path, config=None, **given):
    np.savez(tmp_path / "own.npz", **given)
    return load(tmp_path / "own.npz", **(config or {}))


def load_csv(tmp_path, text, **config):
    (tmp_path / "own.csv").write_text(text)
    return load(tmp_path / "own.csv", **{**WHOLE, **config})


def load_parquet(tmp_path, columns, **config):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "own.parquet")
    return load(tmp_path / "own.parquet", **{**WHOLE, **config})


def rows(dataset, split="train"):
    """All examples of a split, as one batch."""
    (batch,) = dataset.evaluation(split, dataset.num_examples(split))
    return batch


# Names of classes.


@pytest.mark.parametrize("kind", ["U", "S"])
def test_words_are_classes_in_their_order(tmp_path, kind):
    words = WORDS if kind == "U" else np.char.encode(WORDS, "utf-8")
    dataset = load_npz(tmp_path, WHOLE, inputs=INPUTS, targets=words)
    assert dataset.spec.classes == ("four", "one", "three", "two")
    assert dataset.spec.outputs == 4 and dataset.spec.loss == "classification"
    assert rows(dataset)["targets"].tolist() == CLASSES.tolist()


def test_whole_numbers_as_words_are_in_the_order_of_their_values(tmp_path):
    words = np.array(["10", "9", "2", "1"])[CLASSES]
    dataset = load_npz(tmp_path, WHOLE, inputs=INPUTS, targets=words)
    assert dataset.spec.classes == ("1", "2", "9", "10")
    assert rows(dataset)["targets"].tolist() == (3 - CLASSES).tolist()


def test_words_of_tokens_may_be_missing_where_there_is_no_class(tmp_path):
    words = np.full((N, L), "b")
    words[:, 0], words[3, 1] = "a", ""
    lengths = np.full(N, L - 1)
    dataset = load_npz(tmp_path, WHOLE, inputs=INPUTS, targets=words, lengths=lengths)
    assert (dataset.spec.loss, dataset.spec.classes) == ("token", ("a", "b"))
    found = rows(dataset)["targets"]
    assert found[3].tolist() == [0, -1, 1, 1, 1, -1] and found[4, 1] == 1


def test_class_names_name_numbers_and_order_words(tmp_path):
    names = np.array(["zero", "one", "two", "three", "four"])
    given = dict(inputs=INPUTS, class_names=names)
    dataset = load_npz(tmp_path, WHOLE, targets=CLASSES, **given)
    assert dataset.spec.classes == tuple(names) and dataset.spec.outputs == 5
    dataset = load_npz(tmp_path, WHOLE, targets=WORDS, **given)
    expected = [names.tolist().index(word) for word in WORDS]
    assert rows(dataset)["targets"].tolist() == expected


BAD_NAMES = {
    "empty": (dict(targets=np.where(CLASSES == 2, "", WORDS)), {}, "empty in row 2"),
    "unknown": (
        dict(targets=WORDS, class_names=["one", "two"]),
        {},
        "has 'four', which class_names does not have",
    ),
    "twice": (
        dict(targets=CLASSES, class_names=["a", "b", "a", "c"]),
        {},
        "class_names has 'a' twice",
    ),
    "few": (
        dict(targets=CLASSES, class_names=["a", "b"]),
        {},
        r"targets is 2 at \[2\]; it must lie between 0 and 1",
    ),
    "numbers as names": (
        dict(targets=CLASSES, class_names=np.arange(4)),
        {},
        r"class_names is int64 \(4,\); it must be \[K\] words",
    ),
    "outputs": (
        dict(targets=WORDS),
        dict(outputs=7),
        r"has names for 4 classes; data\.outputs must be 0 or that, got 7",
    ),
    "regression": (
        dict(targets=WORDS),
        dict(loss="regression"),
        r"has words as targets, .*data\.loss must be classification or token",
    ),
    "not UTF-8": (dict(targets=np.full(N, b"\xff")), {}, "targets is not UTF-8"),
}


@pytest.mark.parametrize(
    ("given", "config", "message"), BAD_NAMES.values(), ids=BAD_NAMES
)
def test_faults_of_names_are_said(tmp_path, given, config, message):
    with pytest.raises(ValueError, match=f"own.npz: .*{message}"):
        load_npz(tmp_path, config, inputs=INPUTS, **given)


def test_the_report_shows_names():
    spec = Spec("scalar", 5, 3, "classification", classes=("no", "$x", "<yes>"))
    found = answers.Answers(
        "test",
        3,
        RNG.normal(size=(3, 5)),
        np.array([0, 1, 2]),
        np.ones((3, 5), bool),
        np.array([0, 2, 2]),
        np.full(3, 0.5),
    )
    page = answers.section(found, spec, 1)
    assert "2 of 3 are right" in page
    assert answers._names(np.array([2, 3]), spec) == ["<yes>", "3"]
    symbols = spec.but(classes=(), symbols=("a", "b", "c"))
    assert answers._names(np.array([2]), symbols) == ["2"]
    assert answers._names(np.array([2]), symbols.but(loss="token")) == ["c"]


# Normalisation.


def test_numbers_are_normalised_by_the_real_tokens_of_the_training_part(tmp_path):
    inputs = RNG.normal(size=(N, L, 3)) * [1e-3, 50, 1] + [7, -1e6, 0]
    inputs[..., 2] = 0.1  # the same everywhere
    lengths = RNG.integers(2, L + 1, N)
    real = np.arange(L) < lengths[:, None]
    inputs[~real] = 1e30
    inputs[SPLIT == "test"] += 5
    given = dict(inputs=inputs, targets=CLASSES, lengths=lengths, split=SPLIT)
    dataset = load_npz(tmp_path, dict(normalise=True), **given)
    training = inputs[SPLIT == "train"][real[SPLIT == "train"]]
    mean, std = training.mean(axis=0), training.std(axis=0)
    std[2] = 1
    np.testing.assert_allclose(dataset.spec.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(dataset.spec.std, std, rtol=1e-9)
    for split in dataset.sources:
        found = rows(dataset, split)["inputs"]
        kept = real[split == SPLIT]
        expected = (inputs[split == SPLIT] - mean) / std
        np.testing.assert_allclose(found[kept], expected[kept], rtol=SMALL, atol=SMALL)
        assert (found[~kept] == 0).all()
    assert (rows(dataset)["inputs"][..., 2] == 0).all()
    assert load_npz(tmp_path, **given).spec.mean == ()


def test_what_was_normalised_is_of_no_dtype_that_overflows(tmp_path):
    inputs = np.where(np.arange(N)[:, None] % 2, 3e38, -3e38) * np.ones((1, L))
    dataset = load_npz(
        tmp_path, dict(normalise=True, **WHOLE), inputs=inputs, targets=CLASSES
    )
    assert dataset.spec.std == pytest.approx([3e38])
    assert {*rows(dataset)["inputs"].ravel().tolist()} == {-1.0, 1.0}
    tiny = np.where(np.arange(N)[:, None] % 2, 1e-300, 0) * np.ones((1, L))
    dataset = load_npz(
        tmp_path, dict(normalise=True, **WHOLE), inputs=tiny, targets=CLASSES
    )
    assert dataset.spec.std == (1.0,)
    inputs = np.where(SPLIT[:, None] == "train", INPUTS * 1e-30, 1e30)
    with pytest.raises(
        ValueError, match=r"1e\+30 in channel 0, which normalised is be"
    ):
        load_npz(
            tmp_path,
            dict(normalise=True),
            inputs=inputs,
            targets=CLASSES,
            split=SPLIT,
        )


def test_many_blocks_are_one_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 2 * L)
    dataset = load_npz(
        tmp_path, dict(normalise=True, **WHOLE), inputs=INPUTS, targets=CLASSES
    )
    assert dataset.spec.mean == pytest.approx([INPUTS.mean()])
    assert dataset.spec.std == pytest.approx([INPUTS.std()])
    expected = (INPUTS - INPUTS.mean()) / INPUTS.std()
    np.testing.assert_allclose(
        rows(dataset)["inputs"], expected, rtol=SMALL, atol=SMALL
    )


def test_tokens_are_not_normalised(tmp_path):
    tokens = RNG.integers(9, size=(N, L))
    dataset = load_npz(tmp_path, dict(normalise=True), inputs=tokens, targets=CLASSES)
    assert dataset.spec.encoder == "token" and dataset.spec.mean == ()
    with pytest.raises(ValueError, match=r"data\.normalise must be True or False"):
        load_npz(tmp_path, dict(normalise=1), inputs=tokens, targets=CLASSES)


def test_new_inputs_are_encoded_as_those_of_the_run():
    spec = Spec("scalar", L, 2, "classification", channels=2, mean=(1, 2), std=(2, 4))
    new = RNG.normal(size=(3, 9, 2))
    found = arrays.encoded("new: inputs", new, spec)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (new - [1, 2]) / [2, 4], rtol=SMALL, atol=SMALL)
    with pytest.raises(ValueError, match=r"new: inputs .*1 channels; .*trained on 2"):
        arrays.encoded("new: inputs", new[..., 0], spec)
    tokens = spec.but(encoder="token", vocab_size=5, channels=1, mean=(), std=())
    assert arrays.encoded("new", np.array([[4, 0]]), tokens).dtype == np.int32
    with pytest.raises(ValueError, match=r"new is 5 at \[0, 0\]; .* between 0 and 4"):
        arrays.encoded("new", np.array([[5]]), tokens)


# Tables.


@pytest.mark.parametrize(
    ("text", "inputs", "classes"),
    [
        ("1,2,cat\n3,4,dog\n", [[1, 2], [3, 4]], ("cat", "dog")),
        ("t0,t1,kind\n1,2,cat\n3,4,dog\n", [[1, 2], [3, 4]], ("cat", "dog")),
        ("0,1,kind\n5,6,cat\n7,8,dog\n9,9,cat\n", [[5, 6], [7, 8], [9, 9]], None),
        ("0,1,cat\n5,6,cat\n7,8,dog\n", [[0, 1], [5, 6], [7, 8]], ("cat", "dog")),
        ("0,1,kind\n5,6,0\n7,8,1\n", [[5, 6], [7, 8]], ()),
        ("a,,b\n5,6,0\n7,8,1\n", [[5, 6], [7, 8]], ()),
    ],
)
def test_a_csv_may_have_words_and_a_header(tmp_path, text, inputs, classes):
    dataset = load_csv(tmp_path, text)
    assert rows(dataset)["inputs"].tolist() == inputs
    assert dataset.spec.classes == (("cat", "dog") if classes is None else classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1,2,cat\n3,4,0\n5,6,dog\n",
            "row 2, column 3 is 0; the target of row 1 is a w",
        ),
        (
            "1,2,0\n3,4,dog\n",
            "row 2, column 3 is 'dog'; it must be a number, as .* row 1",
        ),
        ("1,x,cat\n3,4,dog\n", "row 1, column 2 is 'x'; it must be a number"),
    ],
)
def test_words_and_numbers_do_not_mix(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"own.csv: {message}"):
        load_csv(tmp_path, text)


DATES = ["2016-07-01 00:00:00", "2016/7/1 0:00", "2016-07-01", "2016-07-01T00:00:00Z"]
DATES += ["01/07/2016", "7/1/2016 0:00", "7/1/16", "01.07.2016 13:15", "2016.07.01"]
DATES += ["1949-01", "01/1949", "Jan-49", "January 1949", "1949 Jan", "Sept-49"]
DATES += ["1 Jul 2016", "1-Jul-16", "Fri 1 July 2016", "2016-07-01T00:00:00.5+02:00"]
DATES += ["20160701T000000Z", "7/1/2016 12:00:00 AM", "00:15", "2016-W07", "2016Q3"]
DATES += ['"Jul 1, 2016"', "2016-07-01 00:00:00+00:00"]

NO_DATES = ["1949", "1949.01", "20160701", "12.2016", "1e-05", "-1949", "3/4", "1.2.3"]
NO_DATES += ["v2016.07.01", "may", "mar-3", "2016-13", "10-11-12", "1:2", "may-be", ""]
NO_DATES += ["1949-1950", "31-12", "12345-01", "a 2016-07-01", "nan", "sat", "99:99"]


@pytest.mark.parametrize("text", DATES)
def test_dates_are_dates(text):
    assert tables.are_dates([text.strip('"')])


@pytest.mark.parametrize("text", NO_DATES)
def test_numbers_and_words_are_no_dates(text):
    assert not tables.are_dates([text] * 20)


@pytest.mark.parametrize("date", DATES)
def test_a_csv_with_dates_is_a_forecasting_file(tmp_path, date):
    body = "".join(f"{date},{i}.5,{i}.25,{i}\n" for i in range(5))
    with pytest.raises(ValueError) as error:
        load_csv(tmp_path, f"date,load,level,OT\n{body}")
    said = str(error.value)
    assert "own.csv: column 1 (date) holds dates: this is a forecasting file" in said
    assert "\n" not in said
    with pytest.raises(ValueError, match=r"column 1 holds dates"):
        load_csv(tmp_path, body)
    # One bad cell, or an empty one, is a mistake among dates.
    for cell in ("", "?"):
        lines = body.splitlines(keepends=True)
        lines[2] = lines[2].replace(date, cell)
        with pytest.raises(ValueError, match=r"column 1 holds dates"):
            load_csv(tmp_path, "".join(lines))
    # One date is a mistake, not a layout; and numbers with dashes are no dates.
    with pytest.raises(ValueError, match=r"row 3, column 1 is .*must be a number"):
        load_csv(tmp_path, f"1,2,0\n3,4,1\n{date},4,0\n")


def test_dates_in_parquet_are_refused_too(tmp_path):
    moments = np.arange(5).astype("datetime64[s]")
    for dates in (moments, [*map(str, moments)]):
        with pytest.raises(ValueError, match=r"column 1 \(when\) holds dates"):
            load_parquet(tmp_path, {"when": dates, "x": np.arange(5.0)})
    for dates in (["1/7/2016 0:00"] * 4 + [None], ["Jan-49"] * 5):
        with pytest.raises(ValueError, match=r"column 2 \(when\) holds dates"):
            load_parquet(tmp_path, {"x": np.arange(5.0), "when": dates})
    with pytest.raises(ValueError, match=r"column 2 .* holds dates"):
        index = "__index_level_0__"  # of a frame whose index are moments
        load_parquet(tmp_path, {"x": np.arange(5.0), index: moments})


def test_a_table_of_parquet_is_read_as_a_csv(tmp_path):
    columns = {"a": [1, 2, 3, 4], "b": [0.5, 1, 2, 3], "kind": ["x", "y", "x", "y"]}
    columns["__index_level_0__"] = [7, 5, 3, 1]  # what pandas leaves of an index
    dataset = load_parquet(tmp_path, columns)
    assert rows(dataset)["inputs"].tolist() == [[1, 0.5], [2, 1], [3, 2], [4, 3]]
    assert dataset.spec.classes == ("x", "y") and dataset.spec.encoder == "scalar"


def test_lists_of_parquet_are_sequences(tmp_path):
    ragged = [[1, 2, 3], [4], [5, 6], [2, 2]]
    dataset = load_parquet(tmp_path, {"inputs": ragged, "targets": [0, 1, 0, 1]})
    assert (dataset.spec.encoder, dataset.spec.vocab_size) == ("token", 7)
    found = rows(dataset)
    assert found["mask"].sum(axis=1).tolist() == [3, 1, 2, 2]
    assert found["inputs"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0], [2, 2, 0]]
    channels = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    targets = [[0, 1], [1]]
    dataset = load_parquet(tmp_path, {"inputs": channels, "targets": targets})
    assert (dataset.spec.channels, dataset.spec.loss) == (2, "token")
    assert rows(dataset)["targets"].tolist() == [[0, 1], [1, -1]]
    vectors = {"inputs": ragged, "targets": [[0.5, 1, 2, 3]] * 4}
    dataset = load_parquet(tmp_path, vectors, encoder="scalar")
    assert (dataset.spec.loss, dataset.spec.outputs) == ("regression", 4)
    split = ["train", "train", "test", "validation"]
    dataset = load_parquet(
        tmp_path, {"inputs": ragged, "targets": list("abab"), "split": split}
    )
    assert dataset.num_examples("train") == 2 and dataset.spec.classes == ("a", "b")


BAD_PARQUET = {
    "null": ({"a": [1.0, None], "b": [0, 1]}, "column 'a' is empty at value 2"),
    "words": ({"a": ["x", "y"], "b": [0, 1]}, "column 'a' is of type .*string"),
    "unknown": (
        {"inputs": [[1], [2]], "target": [0, 1]},
        "column 'target' is not known; those are inputs, targets",
    ),
    "no targets": ({"inputs": [[1], [2]]}, "column 'targets' is missing"),
    "no lists": ({"inputs": [1, 2], "targets": [0, 1]}, "'inputs' is of type .*lists"),
    "lonely": ({"a": [1, 2]}, "column 'a' is the only one"),
    "counts": (
        {"inputs": [[1, 2], [3]], "mask": [[True], [True]], "targets": [0, 1]},
        "column 'mask' has 1 values in row 1, where inputs has 2",
    ),
    "channels": (
        {"inputs": [[[1, 2], [3]], [[4, 5]]], "targets": [0, 1]},
        "lists within lists of several lengths",
    ),
    "too large": ({"a": [1e300, 1.0], "b": [0, 1]}, "those of float32, up to 3.4e"),
    "too large a token": (
        {"inputs": [[2**40], [1]], "targets": [0, 1]},
        "inputs is 1099511627776 at .*must lie between 0 and 2147483646",
    ),
    "too large a class": ({"a": [1.0, 2.0], "b": [0, 2**40]}, "1099511627776"),
    "too small a dt": (
        {"inputs": [[1.5], [2.5]], "dt": [[1e-50], [1.0]], "targets": [0, 1]},
        "dt is 1e-50 at .*must be 1.18e-38 or more",
    ),
    "no rows": ({"a": np.zeros(0), "b": np.zeros(0)}, "has no sequence"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_every_fault_of_a_parquet_file_is_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=f"own.parquet: .*{message}"):
        load_parquet(tmp_path, columns)


def test_what_is_no_parquet_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"own\.parquet: not a readable Parquet file"):
        load(tmp_path / "own.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow, .*pip install pyarrow"):
        load(tmp_path / "own.parquet")


# Recordings.


def tone(count=80, pitch=0.3):
    return 0.5 * np.sin(pitch * np.arange(count))


def write_wav(path, samples=None, rate=8000, dtype=np.int16):
    samples = tone() if samples is None else samples
    path.parent.mkdir(parents=True, exist_ok=True)
    if np.issubdtype(dtype, np.integer):
        half = 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
        samples = np.rint(samples * (half - 1)) + half * (dtype is np.uint8)
    wavfile.write(path, rate, samples.astype(dtype))


def write_digits(folder, template="{label}_ann_{i}.wav", splits=("",), count=10):
    for split in splits:
        for i in range(count):
            for label, pitch in (("zero", 0.1), ("one", 0.6)):
                name = template.format(label=label, i=i)
                write_wav(folder / split / name, tone(60 + i, pitch))


@pytest.mark.parametrize(
    ("template", "label"),
    [
        ("{label}_ann_{i}.wav", ""),
        ("{label}-{i}.WAV", "name"),
        ("{label}/{i}.wav", ""),
        ("{label}/ann/{i}.wav", "folder"),
        ("ann/{label}_{i}.wav", "name"),
    ],
)
def test_recordings_are_labelled_by_folder_or_name(tmp_path, template, label):
    write_digits(tmp_path, template)
    write_wav(tmp_path / ".hidden" / "x.wav")
    dataset = load(tmp_path, label=label, test=0.4, validation=0.25)
    assert dataset.spec.classes == ("one", "zero")
    sizes = {split: len(source) for split, source in dataset.sources.items()}
    assert sizes == {"train": 9, "validation": 3, "test": 8}
    assert np.bincount(rows(dataset, "test")["targets"]).tolist() == [4, 4]
    assert (dataset.spec.length, dataset.spec.padded) == (69, True)
    batch = rows(dataset)
    slow = [
        np.abs(np.diff(x[real])).mean()
        for x, real in zip(batch["inputs"], batch["mask"], strict=True)
    ]
    assert ((np.array(slow) < 0.1) == (batch["targets"] == 1)).all()


def test_folders_may_be_splits(tmp_path):
    write_digits(tmp_path, "{label}/{i}.wav", ("train", "test"), 3)
    dataset = load(tmp_path)
    assert {s: len(x) for s, x in dataset.sources.items()} == {"train": 6, "test": 6}
    assert dataset.spec.classes == ("one", "zero")
    write_digits(tmp_path / "named", "{label}_{i}.wav", ("train", "validation"), 2)
    dataset = load(tmp_path / "named")
    assert [*dataset.sources] == ["train", "validation"]


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(np.uint8, 2**-7), (np.int16, 2**-15), (np.int32, 2**-31), (np.float32, 0)],
)
def test_samples_are_numbers_from_minus_1_to_1(tmp_path, dtype, step):
    stereo = np.stack([tone(), np.zeros(80)], axis=1)
    write_wav(tmp_path / "a_1.wav", stereo, dtype=dtype)
    found, mask = own.read_sequences(tmp_path / "a_1.wav")
    assert found.dtype == np.float32 and found.shape == (1, 80) and mask.all()
    np.testing.assert_allclose(found[0], tone() / 2, atol=2 * step + SMALL)


def test_the_formats_of_recordings_are_told(tmp_path):
    write_digits(tmp_path, count=3)
    found, line, _ = told(load(tmp_path, **WHOLE))
    assert found["dtype"] == "int16 PCM" and "(int16 PCM, 8,000 Hz) in [-0.4" in line
    for name, dtype in (("one_a_1.wav", np.uint8), ("one_b_1.wav", np.float32)):
        write_wav(tmp_path / name, dtype=dtype)
    found, line, _ = told(load(tmp_path, rate=4000, **WHOLE))
    assert found["dtype"] == "float32 and int16 PCM and uint8 PCM"
    assert "(float32 and int16 PCM and uint8 PCM, 4,000 Hz) in" in line


def test_the_rate_of_recordings_is_kept_and_new_ones_are_resampled_to_it(tmp_path):
    write_digits(tmp_path / "wav", count=3)
    spec = load(tmp_path / "wav", **WHOLE).spec
    resampled = load(tmp_path / "wav", rate=4000, **WHOLE).spec
    assert (spec.rate, resampled.rate) == (8000, 4000)
    records.write_data(tmp_path, load(tmp_path / "wav", **WHOLE))
    assert records.read_data(tmp_path) == spec
    write_wav(tmp_path / "new" / "one_1.wav", tone(160), rate=16000)
    (sample,) = unseen.inputs(tmp_path / "new", spec).companions["mask"].sum(axis=1)
    assert sample == 80
    assert unseen.labelled(tmp_path / "wav", spec.but(rate=2000)).spec.length == 16
    # A run from before it was kept reads them as they are.
    old = spec.but(rate=0)
    assert unseen.inputs(tmp_path / "new", old).inputs.shape == (1, 160)
    assert described.differing(old, spec) == ""
    assert described.differing(spec, spec.but(rate=4000)) == "rate was 8000, is 4000"


def test_24_bits_are_read(tmp_path):
    samples = np.rint(tone() * (2**23 - 1)).astype("<i4")
    frames = b"".join(struct.pack("<i", s)[:3] for s in samples)
    head = struct.pack("<4sI4s", b"RIFF", 36 + len(frames), b"WAVE")
    head += struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 24000, 3, 24)
    # A chunk of notes, which editors write, does no harm.
    notes = struct.pack("<4sI4s", b"note", 4, b"abcd")
    body = head + notes + struct.pack("<4sI", b"data", len(frames)) + frames
    (tmp_path / "a.wav").write_bytes(body)
    found = own.read_inputs(tmp_path / "a.wav")
    np.testing.assert_allclose(found[0], tone(), atol=SMALL)
    source = File(str(tmp_path), own.FILES, folders=True)
    assert recordings.read_unlabelled(source, 0, 0).formats == ("int24 PCM",)


def test_recordings_of_several_rates_become_one(tmp_path):
    seconds = 0.5
    for name, rate in (("low_1", 8000), ("low_2", 11025), ("high_1", 4000)):
        pitch = 2 * np.pi * (200 if name[0] == "l" else 700) / rate
        write_wav(tmp_path / f"{name}.wav", tone(int(seconds * rate), pitch), rate)
    with pytest.raises(
        ValueError, match=r"low_1.wav: has 8000 samples .*high_1.wav .*4"
    ):
        load(tmp_path, **WHOLE)
    dataset = load(tmp_path, rate=2000, length=1200, **WHOLE)
    batch = rows(dataset)
    assert batch["inputs"].shape == (3, 1200)
    assert batch["mask"].sum(axis=1).tolist() == [1000] * 3
    expected = 0.5 * np.sin(2 * np.pi * 200 / 2000 * np.arange(1000))
    middle = slice(100, 900)  # the filter rings at the ends
    for row in (1, 2):
        error = np.abs(batch["inputs"][row, :1000] - expected)[middle].max()
        assert error < 0.01
    cut = rows(load(tmp_path, rate=2000, length=300, **WHOLE))
    assert cut["mask"].all() and cut["inputs"].shape == (3, 300)
    np.testing.assert_array_equal(cut["inputs"], batch["inputs"][:, :300])


def damaged(tmp_path, name, text):
    write_digits(tmp_path, count=2)
    path = tmp_path / name
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        write_wav(path, text, dtype=np.float32)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a_1.wav", b"", r"a_1\.wav: not a readable WAV file"),
        ("a_1.wav", b"RIFF....WAVE", r"a_1\.wav: not a readable WAV file"),
        ("a_1.wav", b"ID3 an mp3", r"a_1\.wav: not a readable .*ffmpeg -i IN"),
        ("a_1.wav", np.zeros(0), r"a_1\.wav: (has no samples|not a readable)"),
        (
            "a_1.wav",
            np.array([0, np.nan]),
            r"a_1\.wav: has samples that are not finite",
        ),
        ("alone.wav", tone(), r"alone\.wav: has no label: its name must begin with"),
        ("_1.wav", tone(), r"_1\.wav: has no label"),
    ],
)
def test_a_bad_recording_is_named(tmp_path, name, content, message):
    damaged(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **WHOLE)


def test_a_recording_that_is_cut_off_is_named(tmp_path):
    write_digits(tmp_path, count=2)
    path = tmp_path / "zero_ann_1.wav"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"zero_ann_1\.wav: (is cut off|not a readable)"
    ):
        load(tmp_path, **WHOLE)


def test_folders_that_cannot_be_labelled_say_the_cure(tmp_path):
    with pytest.raises(
        ValueError, match=r"folder of \.wav files, got .*which has none"
    ):
        load(tmp_path)
    write_digits(tmp_path / "all", "{label}_{i}.wav", count=2)
    with pytest.raises(ValueError, match=r"one class, 'all'; .*data\.label=name takes"):
        load(tmp_path)
    write_wav(tmp_path / "two_1.wav")
    with pytest.raises(
        ValueError, match=r"two_1\.wav: lies in no folder.*label=folder"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"two_1\.wav: has no label: it must lie in"):
        load(tmp_path, label="folder")
    assert load(tmp_path, label="name", **WHOLE).spec.classes == ("one", "two", "zero")
    with pytest.raises(ValueError, match=r"data\.label must be one of '', 'folder'"):
        load(tmp_path, label="x")
    with pytest.raises(ValueError, match=r"data\.rate must be 0 or more, got -1"):
        load(tmp_path, label="name", rate=-1)


def test_what_is_for_recordings_is_refused_elsewhere(tmp_path):
    with pytest.raises(ValueError, match=r"data\.rate is for a folder of \.wav files"):
        load_npz(tmp_path, dict(rate=8000), inputs=INPUTS, targets=CLASSES)


def test_recordings_are_stretched_to_longer_cuts(tmp_path):
    write_digits(tmp_path, count=5)
    config = dict(name="arrays", path=str(tmp_path), length=20, **WHOLE)
    assert data.stretched(config, 2).spec.length == 40
    with pytest.raises(
        ValueError, match=r"data\.length must be a number of frames, or"
    ):
        data.stretched({**config, "length": 0}, 2)


def test_inputs_without_targets_are_read(tmp_path):
    np.savez(tmp_path / "x.npz", inputs=INPUTS)
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n4,5\n")
    write_wav(tmp_path / "w" / "b.wav", tone(30))
    write_wav(tmp_path / "w" / "a.wav", tone(50))
    np.testing.assert_array_equal(own.read_inputs(tmp_path / "x.npz"), INPUTS)
    found, mask = own.read_sequences(tmp_path / "x.csv")
    assert found.tolist() == [[1, 2, 3], [4, 5, 0]] and mask.sum() == 5
    found, mask = own.read_sequences(tmp_path / "w", rate=4000, length=40)
    assert found.shape == (2, 40) and mask.sum(axis=1).tolist() == [25, 15]
    assert own.read_inputs(tmp_path / "w").shape == (2, 50)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"a": [1, 2], "b": [3, 4]}), tmp_path / "x.parquet"
    )
    assert own.read_inputs(tmp_path / "x.parquet").tolist() == [[1, 3], [2, 4]]
    for name, message in (("x.txt", r"inputs must end in \.npz"), ("y.npz", "no file")):
        with pytest.raises(ValueError, match=message):
            own.read_inputs(tmp_path / name)


# What a run says first.


def told(dataset):
    """The line and the warnings, by way of JSON, which keeps the facts."""
    found = json.loads(json.dumps(said.facts(dataset)))
    return found, said.line(found), said.warnings(found)


def test_a_line_says_what_the_data_were_taken_for(tmp_path):
    lengths = RNG.integers(2, L + 1, N)
    given = dict(inputs=100 * INPUTS, targets=WORDS, lengths=lengths)
    dataset = load_npz(tmp_path, dict(normalise=True), **given)
    found, line, warnings = told(dataset)
    assert line.startswith(
        "data: 32 train, 4 validation, 4 test sequences of 2 to 6 (median "
    )
    low, high = (
        f(given["inputs"][np.arange(L) < lengths[:, None]]) for f in (min, max)
    )
    assert f"float64 [n, L] in [{low:.6g}, {high:.6g}]: taken as numbers" in line
    assert "normalised by the training part's mean" in line
    assert "4 classes, the largest (four) 25.0%" in line
    assert "loss classification, chance level 0.25 (accuracy, test)" in line
    assert warnings == [] and found["normalised"]["std"] == [*dataset.spec.std]
    assert "\n" not in line
    _, line, warnings = told(load_npz(tmp_path, **given))
    assert "normalised" not in line
    (warning,) = warnings
    assert "channel 0 is far from mean 0 and std 1" in warning
    assert "--config.data.normalise=True" in warning


def test_bytes_of_a_signal_are_not_taken_for_tokens_in_silence(tmp_path):
    signal = 128 + 100 * np.sin(RNG.random((N, 1)) * 6 + 0.1 * np.arange(100))
    given = dict(inputs=signal.astype(np.uint8), targets=CLASSES)
    _, line, warnings = told(load_npz(tmp_path, **given))
    assert (
        "; uint8 integers [n, L] in [28, 227]: taken as tokens of a vocabulary of 228"
        in line
    )
    assert "--config.data.encoder=scalar reads them as numbers" in line
    assert any("look like numbers" in text for text in warnings)
    _, line, warnings = told(load_npz(tmp_path, dict(encoder="token"), **given))
    assert "as data.encoder says" in line and warnings == []
    config = dict(encoder="scalar", normalise=True)
    _, line, warnings = told(load_npz(tmp_path, config, **given))
    assert "read as numbers" in line and warnings == []
    text = RNG.permuted(given["inputs"], axis=1)
    _, _, warnings = told(load_npz(tmp_path, inputs=text, targets=CLASSES))
    assert warnings == []
    with pytest.raises(ValueError, match=r"is -1 .*encoder=scalar reads them as numbe"):
        load_npz(tmp_path, inputs=np.full((N, L), -1), targets=CLASSES)


def test_numbers_of_many_kinds_are_not_taken_for_tokens_in_silence(tmp_path):
    identities = RNG.permutation(10**6)[: N * 50].reshape(N, 50)
    _, _, warnings = told(load_npz(tmp_path, inputs=identities, targets=CLASSES))
    (warning,) = warnings
    assert "1,600 kinds of tokens among 1,600" in warning and "scalar" in warning
    flags = RNG.integers(0, 2, (N, 50)).astype(bool)
    _, line, warnings = told(load_npz(tmp_path, inputs=flags, targets=CLASSES))
    assert "bool [n, L] in [0, 1]: taken as numbers" in line and warnings == []


def test_warnings_of_what_makes_a_score_worthless(tmp_path):
    inputs = RNG.normal(size=(N, L, 2))
    inputs[..., 1] = 3
    inputs[30] = inputs[31] = inputs[0]
    lengths = np.full(N, L)
    inputs[30, -1], lengths[[0, 30]] = 99, L - 1  # they differ where it is masked
    targets = np.sort(CLASSES)
    targets[SPLIT == "train"] = np.arange(20) % 3
    given = dict(inputs=inputs, targets=targets, lengths=lengths, split=SPLIT)
    found, _, warnings = told(load_npz(tmp_path, dict(normalise=True), **given))
    assert found["repeated"] == {"test": 1} and found["constant"] == [1]
    assert found["unseen"] == {"test": ["3"]}
    assert found["missing"] == {"validation": ["0", "1"], "test": ["0", "1", "2"]}
    words = " | ".join(warnings)
    assert "1 of the 10 test sequences are also in the training part" in words
    assert "channel 1 is constant in the training part" in words
    assert "test has classes that training has not: 3" in words
    assert "validation has no sequence of 0, 1, which training has" in words


def test_a_vocabulary_may_have_gaps(tmp_path):
    """The next byte of a text, of which not every one occurs."""
    tokens = np.random.default_rng(0).choice([65, 66, 90], (N, L)).astype(np.int64)
    np.savez(tmp_path / "my.npz", inputs=tokens, targets=np.roll(tokens, -1, 1))
    reading = arrays.load(str(tmp_path / "my.npz")).reading
    assert not [text for text in reading.warnings if "classes" in text]


def test_labels_may_look_like_times(tmp_path):
    rows = [f"{i},{i % 3},{('16:9', '4:3')[i % 2]}" for i in range(40)]
    (tmp_path / "my.csv").write_text("\n".join(rows))
    assert arrays.load(str(tmp_path / "my.csv")).spec.classes == ("16:9", "4:3")


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (CLASSES + 1, "no target is 0, and yet the model has an output for it"),
        (np.array([0, 2, 3, 7])[CLASSES], "only 4 of the 8 classes from 0"),
        (np.int64(10) ** CLASSES, "only 4 of the 1,001 classes .*from 0 without gaps"),
        (
            300_000 + np.arange(N) % 20 * 1000,
            r"only 20 of the 319,001 .*regressed with --config.data.loss=regression",
        ),
        (
            np.arange(N) % 20,
            r"the 40 training sequences have 20 classes, 2\.0 sequences each .*"
            r"regressed with --config.data.loss=regression",
        ),
        (
            np.char.add("w", (np.arange(N) % 20).astype(str)),
            r"have 20 classes, 2\.0 .*: join classes, or bring more sequences$",
        ),
        (
            CLASSES % 2 / 1.0,
            r"floats of 2 whole values only \(0, 1\) .*"
            r"--config.data.loss=classification takes them for classes",
        ),
        (1 - CLASSES % 2 * 2.0, r"\(-1, 1\) .*, once they are numbered from 0, takes"),
        (CLASSES % 2 == 0, r"\(0, 1\) and are regressed; .*loss=classification"),
        (
            np.tile(CLASSES[:, None] % 2 / 1.0, L),
            r"\(0, 1\) .*--config.data.loss=token takes them for classes",
        ),
        (
            np.tile(1 - CLASSES[:, None] % 2 * 2, L),
            r"no target is 0, .*\(-1 is no class of tokens\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_targets_that_may_be_of_another_kind_are_told(tmp_path, targets, text):
    dataset = load_npz(tmp_path, WHOLE, inputs=INPUTS, targets=targets)
    doubts = dataset.reading.warnings
    assert any(re.search(text, doubt) for doubt in doubts), doubts
    assert {*doubts} <= {*told(dataset)[2]}
    # What was asked for is not asked about.
    asked = dict(loss=dataset.spec.loss, **WHOLE)
    dataset = load_npz(tmp_path, asked, inputs=INPUTS, targets=targets)
    assert dataset.reading.warnings == ()


@pytest.mark.parametrize(
    "targets",
    [
        CLASSES,
        INPUTS[:, 0],
        np.arange(N) / 1.0,
        np.stack([CLASSES / 1.0, CLASSES % 2], axis=1),
        CLASSES[:, None] / 1.0,
        np.tile(CLASSES[:, None] % 2, L),
    ],
    ids=["classes", "numbers", "whole numbers", "vectors", "column", "tokens"],
)
def test_targets_of_one_kind_alone_are_not_asked_about(tmp_path, targets):
    dataset = load_npz(tmp_path, WHOLE, inputs=INPUTS, targets=targets)
    assert dataset.reading.warnings == ()


def test_amounts_as_whole_numbers_of_a_table_are_told(tmp_path):
    prices = "".join(f"{i},{i % 3},{1000 * (i % 25) + 100}\n" for i in range(50))
    dataset = load_csv(tmp_path, prices)
    assert (dataset.spec.loss, dataset.spec.outputs) == ("classification", 24_101)
    assert "only 25 of the 24,101 classes" in " ".join(told(dataset)[2])
    regressed = load_csv(tmp_path, prices, loss="regression")
    assert "classes" not in " ".join(told(regressed)[2])
    with pytest.raises(ValueError, match=r"divided: .*loss=regression"):
        load_csv(tmp_path, prices.replace(",100\n", ",77\n", 1), test=0.1)


def test_labels_below_0_say_the_cure(tmp_path):
    targets = 1 - CLASSES % 2 * 2
    message = r"targets is -1 at \[1\]; .*number the classes from 0, or write them as w"
    with pytest.raises(ValueError, match=rf"{message}.*loss=regression"):
        load_npz(tmp_path, inputs=INPUTS, targets=targets)
    with pytest.raises(ValueError, match=rf"{message}.*astype\(str\)\)$"):
        load_npz(tmp_path, dict(loss="classification"), inputs=INPUTS, targets=targets)
    dataset = load_npz(tmp_path, inputs=INPUTS, targets=targets.astype(str))
    assert dataset.spec.classes == ("-1", "1")


def test_copies_between_test_and_validation_are_told(tmp_path):
    inputs = INPUTS.copy()
    inputs[[35, 36, 37]] = inputs[[25, 25, 0]]
    given = dict(targets=CLASSES, split=SPLIT)
    found, _, warnings = told(load_npz(tmp_path, inputs=inputs, **given))
    assert found["validated"] == 2 and found["repeated"] == {"test": 1}
    text = "2 of the 10 test sequences are also in validation"
    assert any(text in warning for warning in warnings)
    found, _, warnings = told(load_npz(tmp_path, inputs=INPUTS, **given))
    assert found["validated"] == 0 and not any("also in" in w for w in warnings)
    # What a run from before there was the key has kept is read as it was.
    del found["validated"]
    assert said.warnings(found) == warnings


def test_classes_are_counted_in_memory_of_those_that_occur(tmp_path):
    targets = np.where(CLASSES, CLASSES, 2**31 - 2)
    split = dict(split=SPLIT)
    dataset = load_npz(tmp_path, inputs=INPUTS, targets=targets, **split)
    assert dataset.spec.outputs == 2**31 - 1
    tracemalloc.start()
    try:
        found, line, warnings = told(dataset)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**24
    assert found["largest"] == {"class": "1", "share": 0.25}
    assert "2,147,483,647 classes" in line and "only 4 of the 2,147" in warnings[0]


def test_a_given_split_that_is_sorted_is_told_and_a_drawn_one_is_not(tmp_path):
    targets = np.concatenate([np.sort(CLASSES[:20]), np.sort(CLASSES[20:])])
    split = np.repeat(["train", "test"], 20)
    given = dict(inputs=INPUTS, targets=targets)
    found, _, warnings = told(load_npz(tmp_path, split=split, **given))
    assert found["sorted"] == ["test"] and "the rows of test are sorted" in warnings[0]
    found, _, warnings = told(
        load_npz(tmp_path, inputs=INPUTS, targets=np.sort(CLASSES))
    )
    assert found["sorted"] == [] and warnings == []


def test_a_regression_says_its_chance_level_and_the_scale_of_its_targets(tmp_path):
    targets = RNG.normal(size=(N, 2)) * [1, 50] + [0, 1200]
    given = dict(inputs=INPUTS, targets=targets, split=SPLIT)
    found, line, warnings = told(load_npz(tmp_path, **given))
    mean = targets[SPLIT == "train"].mean(axis=0)
    chance = ((targets[SPLIT == "test"] - mean) ** 2).mean()
    assert found["chance"]["value"] == pytest.approx(chance, rel=1e-4)
    assert "(error of the mean, test)" in line and "classes" not in line
    (warning,) = warnings
    assert "targets of output 1 have mean 1" in warning and "regress (targets - 1" in (
        warning
    )


def test_a_table_of_moments_is_no_set_of_sequences(tmp_path):
    moments = np.arange(200)
    columns = [
        np.sin(moments / 20),
        5 + np.cos(moments / 30),
        moments / 100,
        moments / 50,
    ]
    text = "\n".join(",".join(f"{x:.4f}" for x in row) for row in np.array(columns).T)
    _, _, warnings = told(load_csv(tmp_path, text, normalise=True, test=0.1))
    assert any("like the moments of one series" in text for text in warnings)
    walks = np.cumsum(RNG.normal(size=(200, 30)), axis=1)  # sequences, one per row
    text = "\n".join(",".join(f"{x:.4f}" for x in [*w, w[-1]]) for w in walks)
    _, _, warnings = told(load_csv(tmp_path, text, normalise=True))
    assert not any("moments" in text for text in warnings)


def test_padding_and_a_lonely_class_are_told(tmp_path):
    inputs = np.tile(INPUTS, (1, 5))
    given = dict(inputs=inputs, targets=0 * CLASSES, lengths=np.full(N, 3))
    _, _, warnings = told(load_npz(tmp_path, **given))
    assert any("one class only" in text for text in warnings)
    assert any("only 10.0% of the tokens are real" in text for text in warnings)


@pytest.mark.parametrize(
    "config",
    [
        dict(name="digits"),
        dict(name="digits", target="next"),
        dict(name="mqar", length=32, vocab_size=16, pairs=2),
        dict(name="moving_digits", length=4, train=9),
    ],
    ids=str,
)
def test_every_kind_of_dataset_is_described(config):
    found, line, warnings = told(data.load(config))
    assert warnings == []
    assert line.startswith("data: ") and f"loss {found['loss']}" in line
    if config["name"] != "moving_digits":
        assert 0 < found["chance"]["value"] < 1 and "seen in 512 examples" in line


def test_what_is_drawn_without_end_is_not_gone_through():
    class Endless:
        asked = 0

        def __len__(self):
            return 2**52

        def __getitem__(self, index):
            Endless.asked += 1
            x = np.full(8, index % 7, np.float32)
            return {"inputs": x, "targets": np.int32(index % 2), "mask": x == x}

    spec = Spec("scalar", 8, 2, "classification")
    found = said.facts(data.Dataset(spec, {"train": Endless()}))
    assert found["splits"]["train"] == {
        "sequences": 2**52,
        "examined": 512,
        "length": {"min": 8, "median": 8, "max": 8},
    }
    assert Endless.asked == 512


# Data by a dotted path, and a run of them.


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module that docs/data.md shows, where Python looks."""
    page = (tiny_run.ROOT / "docs" / "data.md").read_text()
    (text,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "my_data.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_data.py"
    sys.modules.pop("my_data", None)


def test_the_example_of_the_page_is_a_dataset(example):
    config = own_config.get_config("name=my_data.tones,layer=gru,count=20,length=16")
    assert config.data.to_dict() == {
        "name": "my_data.tones",
        "workers": 0,
        "buckets": common.base().data.buckets.to_dict(),
        "count": 20,
        "length": 16,
    }
    dataset = data.load(config.data)
    assert dataset.num_examples("train") == 20 and dataset.spec.classes == (
        "low",
        "high",
    )
    assert data.stretched(config.data, 2).spec.length == 32
    assert told(dataset)[2] == []
    here, there = (dataset.train(4, 0, workers) for workers in (0, 1))
    try:
        np.testing.assert_array_equal(next(here)["inputs"], next(there)["inputs"])
    finally:
        there.close()
    with pytest.raises(ValueError, match=r"data: size is no argument of .*my_data\.to"):
        data.load({**config.data, "size": 3})
    with pytest.raises(
        ValueError, match=r"data\.count must be a whole number, got 'x'"
    ):
        data.load({**config.data, "count": "x"})


@pytest.mark.slow
def test_a_run_of_the_example_is_asked_by_who_trusts_it(example, tmp_path):
    config = own_config.get_config("name=my_data.tones,layer=gru,count=20,length=16")
    config.model.update(features=4, depth=1)
    config.train.update(steps=1, batch_size=4, eval_every=1, checkpoint_every=1)
    loop.run(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"names the dataset 'my_data.tones'"):
        runs.load_run(tmp_path / "run")
    run = runs.load_run(tmp_path / "run", trust=True)
    assert run.spec.classes == ("low", "high")
    (batch,) = run.dataset.evaluation("test", 5)
    answers = predict.predict(run, batch["inputs"])
    logits, _ = run.model.apply(run.variables, batch["inputs"])
    tolerance.assert_close(np.log(answers), jax.nn.log_softmax(logits))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nodots", "data.name must be one of aan, .*dotted path of a function"),
        ("my data.x", "data.name must be one of"),
        (
            "nowhere_at_all.load",
            "no module 'nowhere_at_all'; Python looked in .*PYTHONPA",
        ),
        ("my_data.nothing", "module 'my_data' .*my_data.py. has no function 'nothing'"),
        ("my_data.no_dataset", r"must return a .*Dataset, got int"),
        ("my_data.no_train", r"with examples to train on, got the splits .*'test': 1"),
        ("my_data.no_mask", r"have inputs, targets and mask .*got inputs, targets"),
        ("my_data.short_mask", r"masks are bool \[4\], .*got bool \(3,\)"),
        ("my_data.needs", r"data\.folder is missing, an argument of .*no default"),
    ],
)
def test_a_dotted_path_that_gives_no_dataset_says_why(example, name, message):
    more = """
def no_dataset():
    return 3


def made(split="train", **changes):
    x = np.zeros((1, 4), np.float32)
    rows = {"inputs": x, "targets": np.zeros(1, np.int32), "mask": x == 0} | changes
    rows = {key: value for key, value in rows.items() if value is not None}
    return Dataset(Spec("scalar", 4, 2, "classification"), {split: Rows(rows)})


def no_train():
    return made("test")


def no_mask():
    return made(mask=None)


def short_mask():
    return made(mask=np.ones((1, 3), bool))


def needs(folder):
    return made()
"""
    example.write_text(example.read_text() + more)
    with pytest.raises(ValueError, match=message):
        data.load(dict(name=name))


FITTING = """
def made(case="", drawn=0):
    last = {"token": 2**40, "number": 1e300}.get(case, 5)
    inputs = np.array([[0, 1, 2], [3, 4, last]])
    mask = np.array([[True, True, False]] * 2)
    dt = np.array([[1.0, 1e-50 if case == "dt" else 1.0, 0.0]] * 2)
    targets = np.array([1, 2**31 if case == "class" else 0])
    rows = {"inputs": inputs, "targets": targets, "mask": mask, "dt": dt}
    spec = Spec("scalar", 3, 2, "classification")
    if drawn:
        return Dataset(spec, {"train": Drawn(rows)}, finish=dict)
    return Dataset(spec, {"train": Rows(rows)})


class Drawn(Rows):
    pass
"""


@pytest.mark.parametrize("drawn", [0, 1], ids=["rows", "drawn"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("token", "inputs is 1099511627776 at .*between -2147483648 and 2147483647"),
        ("number", r"inputs is 1e\+300 at .*those of float32"),
        ("class", "targets is 2147483648 at .*and 2147483647"),
        ("dt", "dt is 1e-50 at .*must be 1.18e-38 or more"),
    ],
)
def test_a_dataset_whose_numbers_do_not_fit_is_refused(example, case, message, drawn):
    example.write_text(example.read_text() + FITTING)
    with pytest.raises(ValueError, match=rf"data\.name: my_data\.made: .*{message}"):
        dataset = data.load({"name": "my_data.made", "case": case, "drawn": drawn})
        next(dataset.train(2, 0))


WIDE = {"inputs": np.zeros((2, 3), np.int64), "mask": np.ones((2, 3), bool)}
WIDE["targets"] = np.zeros(2, np.int64)


@pytest.mark.parametrize("drawn", [0, 1], ids=["rows", "drawn"])
def test_a_dataset_whose_numbers_fit_is_of_32_bits(example, drawn):
    example.write_text(example.read_text() + FITTING)
    dataset = data.load({"name": "my_data.made", "drawn": drawn})
    batch = next(dataset.train(2, 0))
    assert {key: str(array.dtype) for key, array in batch.items()} == {
        "inputs": "int32",
        "mask": "bool",
        "dt": "float32",
        "targets": "int32",
    }
    assert sorted(batch["inputs"].ravel()) == [0, 1, 2, 3, 4, 5]


def test_rows_in_memory_stay_rows_beside_others(example):
    """Of which all facts are counted."""
    example.write_text(example.read_text() + FITTING)
    whole = data.load({"name": "my_data.made"})
    mixed = dataclasses.replace(
        whole, sources=whole.sources | {"test": sources.First(Rows(WIDE), 2)}
    )
    narrow = data._narrow("my_data.made", mixed)
    assert type(narrow.sources["train"]) is Rows and narrow.finish is None
    assert narrow.sources["test"][0]["inputs"].dtype == np.int32


def test_what_a_module_of_ones_own_lacks_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text("import nothing_that_is_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_that_is_there"):
        data.load(dict(name="my_data.load"))


def test_a_run_whose_data_are_a_function_is_refused_before_it_is_imported(
    example, tmp_path
):
    config = own_config.get_config("name=my_data.tones")
    records.write_config(tmp_path / "run", config)
    with pytest.raises(
        ValueError, match=r"names the dataset 'my_data.tones', .*--trust"
    ):
        runs.load_run(tmp_path / "run")
    assert "my_data" not in sys.modules
    runs.check_trust(tmp_path / "run", config, True)


def test_what_older_runs_lack_is_what_the_config_has():
    for name, keys in records.ABSENT_DATA.items():
        config = own_config.get_config()
        assert config.data.name == name
        for key, (_, default) in keys.items():
            assert config.data[key.removeprefix("data.")] == default


def test_an_older_run_of_a_file_reads_its_numbers_as_they_are(tmp_path):
    config = own_config.get_config("path=my.npz")
    records.write_config(tmp_path, config)
    path = tmp_path / records.CONFIG
    old = json.loads(path.read_text())
    for key in ("normalise", "rate", "length", "label"):
        del old["data"][key]
    path.write_text(json.dumps(old))
    assert records.read_config(tmp_path).data.normalise is False
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    if not records.checkpoint.steps(tmp_path):
        pytest.fail("this is no checkpoint any more")
    again = records.continued(tmp_path, config)
    assert again.data.normalise is False
    records.check_workdir(tmp_path, again)


def test_a_run_on_recordings_says_what_they_are_and_trains(tmp_path, capsys):
    write_digits(tmp_path / "wav", count=10)
    config = own_config.get_config(f"path={tmp_path / 'wav'},layer=gru")
    config.model.update(features=4, depth=1)
    config.data.update(rate=4000, length=32)
    config.train.update(steps=1, batch_size=4, eval_every=1)
    results = loop.run(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert out.index("data: 16 train, 2 validation, 2 test") < out.index("compiling")
    assert (
        "recordings (int16 PCM, 4,000 Hz) in [-0." in out and "chance level 0.5" in out
    )
    assert results["step"] == 1 and not Rows({"x": [1]}).arrays["x"][1:]
