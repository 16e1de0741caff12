import os
import zipfile

import numpy as np
import pytest

from train import data

RNG = np.random.default_rng(0)
N, L = 40, 6
INPUTS = RNG.normal(size=(N, L))
CLASSES = np.arange(N) % 4


def load_npz(tmp_path, config=None, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return data.load(dict(name="arrays", path=str(path), **(config or {})))


def load_csv(tmp_path, text, **config):
    path = tmp_path / "own.csv"
    path.write_text(text)
    return data.load(dict(name="arrays", path=str(path), **config))


def everything(dataset):
    """All examples as one batch, in the order of the splits."""
    batches = [
        batch
        for split in dataset.sources
        for batch in dataset.evaluation(split, dataset.num_examples(split))
    ]
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize(
    ("arrays", "spec"),
    [
        (
            dict(inputs=INPUTS, targets=CLASSES),
            dict(encoder="scalar", outputs=4, loss="classification"),
        ),
        (
            dict(inputs=RNG.normal(size=(N, L, 3)), targets=INPUTS[:, 0]),
            dict(channels=3, outputs=1, loss="regression"),
        ),
        (
            dict(inputs=INPUTS, targets=INPUTS[:, :2]),
            dict(outputs=2, loss="regression"),
        ),
        (dict(inputs=INPUTS, targets=INPUTS), dict(outputs=1, loss="regression")),
        (
            dict(inputs=INPUTS, targets=RNG.normal(size=(N, L, 2))),
            dict(outputs=2, loss="regression"),
        ),
        (
            dict(inputs=RNG.integers(9, size=(N, L)), targets=np.full((N, L), 6)),
            dict(encoder="token", vocab_size=9, outputs=7, loss="token"),
        ),
    ],
    ids=["classes", "channels", "vectors", "per-token", "token-vectors", "tokens"],
)
def test_npz_layouts(tmp_path, arrays, spec):
    dataset = load_npz(tmp_path, **arrays)
    assert dataset.spec.length == L and dataset.spec.but(**spec) == dataset.spec
    assert not dataset.spec.padded
    batch = next(dataset.train(8, seed=0))
    token = dataset.spec.encoder == "token"
    assert batch["inputs"].dtype == (np.int32 if token else np.float32)
    assert batch["mask"].shape == (8, L) and batch["mask"].all()
    regression = dataset.spec.loss == "regression"
    assert batch["targets"].dtype == (np.float32 if regression else np.int32)
    rows = everything(dataset)
    order = np.lexsort(rows["inputs"].reshape(N, -1).T)
    expected = np.lexsort(
        arrays["inputs"].astype(rows["inputs"].dtype).reshape(N, -1).T
    )
    for key in ("inputs", "targets"):
        np.testing.assert_allclose(rows[key][order], arrays[key][expected], rtol=1e-6)


def test_splits_are_fractions_stratified_and_seeded(tmp_path):
    arrays = dict(inputs=INPUTS, targets=CLASSES)
    dataset = load_npz(tmp_path, dict(test=0.2, validation=0.25), **arrays)
    sizes = {split: dataset.num_examples(split) for split in dataset.sources}
    assert sizes == {"train": 24, "validation": 8, "test": 8}
    for split, size in sizes.items():
        (batch,) = dataset.evaluation(split, size)
        assert np.bincount(batch["targets"]).tolist() == [size // 4] * 4
    again = load_npz(tmp_path, dict(test=0.2, validation=0.25), **arrays)
    other = load_npz(tmp_path, dict(test=0.2, validation=0.25, seed=1), **arrays)
    inputs = [everything(d)["inputs"] for d in (dataset, again, other)]
    assert (inputs[0] == inputs[1]).all() and (inputs[0] != inputs[2]).any()


def test_given_split_is_kept(tmp_path):
    split = np.array(["train"] * 30 + ["test"] * 10)
    dataset = load_npz(tmp_path, inputs=INPUTS, targets=CLASSES, split=split)
    assert set(dataset.sources) == {"train", "test"}
    (batch,) = dataset.evaluation("test", 10)
    np.testing.assert_allclose(batch["inputs"], INPUTS[30:], rtol=1e-6)
    with pytest.raises(ValueError, match=r"one of train, test, got 'validation'"):
        dataset.evaluation("validation", 1)


def test_lengths_reset_and_dt(tmp_path):
    lengths = RNG.integers(1, L + 1, size=N)
    real = np.arange(L) < lengths[:, None]
    reset = RNG.integers(2, size=(N, L))
    dt = np.where(real, RNG.uniform(0.5, 2, size=(N, L)), 0.0)
    targets = RNG.integers(3, size=(N, L))
    arrays = dict(inputs=INPUTS, targets=targets, reset=reset, dt=dt)
    config = dict(test=0.0, validation=0.0)
    dataset = load_npz(tmp_path, config, lengths=lengths, **arrays)
    assert dataset.spec.padded
    rows = everything(dataset)
    np.testing.assert_array_equal(rows["mask"], real)
    np.testing.assert_array_equal(rows["targets"], np.where(real, targets, -1))
    assert rows["reset"].dtype == bool and (rows["reset"] == reset).all()
    np.testing.assert_allclose(rows["dt"], np.where(real, dt, 1), rtol=1e-6)
    masked = load_npz(tmp_path, config, mask=real, **arrays)
    np.testing.assert_array_equal(everything(masked)["mask"], real)


def test_csv_pads_short_rows(tmp_path):
    text = "t0,t1,t2,label\n1,2,3,0\n4,5,1\n6,,,2\n7,8,9,1\n"
    dataset = load_csv(tmp_path, text, test=0.0, validation=0.0)
    rows = everything(dataset)
    expected = [[1, 2, 3], [4, 5, 0], [6, 0, 0], [7, 8, 9]]
    np.testing.assert_array_equal(rows["inputs"], expected)
    assert rows["mask"].sum(axis=1).tolist() == [3, 2, 1, 3]
    assert rows["targets"].tolist() == [0, 1, 2, 1]
    assert dataset.spec.outputs == 3 and dataset.spec.length == 3


def test_csv_without_header_regresses_floats_and_reads_tokens(tmp_path):
    text = "1,2,0.5\r\n3,4,1.0\r\n\r\n"
    config = dict(encoder="token", test=0.0, validation=0.0)
    dataset = load_csv(tmp_path, text, **config)
    assert (dataset.spec.loss, dataset.spec.outputs) == ("regression", 1)
    assert (dataset.spec.encoder, dataset.spec.vocab_size) == ("token", 5)
    assert everything(dataset)["targets"].tolist() == [0.5, 1.0]


def test_whole_targets_can_be_regressed(tmp_path):
    text = "\n".join(f"{i},{i + 1},{i % 3}" for i in range(12))
    dataset = load_csv(tmp_path, text, loss="regression")
    assert dataset.spec.loss == "regression"


BAD_NPZ = {
    "no targets": (dict(inputs=INPUTS), "targets is missing; the file has inputs"),
    "unknown key": (
        dict(inputs=INPUTS, targets=CLASSES, labels=CLASSES),
        "labels is no known key; those are inputs, targets, mask",
    ),
    "rank": (
        dict(inputs=np.zeros(N), targets=CLASSES),
        r"inputs has shape \(40,\); it must be \[n, L\]",
    ),
    "no tokens": (
        dict(inputs=np.zeros((N, 0)), targets=CLASSES),
        r"inputs has shape \(40, 0\); every axis must be 1 or longer",
    ),
    "no sequences": (
        dict(inputs=np.zeros((0, L)), targets=CLASSES[:0]),
        r"inputs has shape \(0, 6\)",
    ),
    "counts": (
        dict(inputs=INPUTS, targets=CLASSES[:-1]),
        r"targets has shape \(39,\), but inputs has 40 sequences",
    ),
    "nan": (
        dict(inputs=np.where(np.arange(L) == 2, np.nan, INPUTS), targets=CLASSES),
        r"inputs is nan at \[0, 2\]",
    ),
    "infinite target": (
        dict(inputs=INPUTS, targets=np.full(N, np.inf)),
        r"targets is inf at \[0\]",
    ),
    "text": (
        dict(inputs=INPUTS.astype(str), targets=CLASSES),
        "inputs is of dtype <U.*numbers",
    ),
    "objects": (
        dict(inputs=INPUTS, targets=CLASSES.astype(object)),
        "not a readable NPZ of plain arrays",
    ),
    "negative class": (
        dict(inputs=INPUTS, targets=CLASSES - 1),
        r"targets is -1 at \[0\]; it must lie between 0 and 2147483646",
    ),
    "target shape": (
        dict(inputs=INPUTS, targets=np.zeros((N, L + 1), int)),
        r"targets is int64 \(40, 7\); it must be \[n\] for the loss classification",
    ),
    "target rank": (
        dict(inputs=INPUTS, targets=np.zeros((N, 2, 2))),
        r"targets has shape \(40, 2, 2\)",
    ),
    "only ignored": (
        dict(inputs=INPUTS, targets=np.full((N, L), -1)),
        "targets has no class at all",
    ),
    "negative token": (
        dict(inputs=np.full((N, L), -3), targets=CLASSES),
        r"inputs is -3 at \[0, 0\]; it must lie between 0",
    ),
    "lengths": (
        dict(inputs=INPUTS, targets=CLASSES, lengths=np.full(N, L + 1)),
        r"lengths lies in \[7, 7\]; it must lie in \[1, 6\]",
    ),
    "float lengths": (
        dict(inputs=INPUTS, targets=CLASSES, lengths=np.full(N, 2.0)),
        r"lengths is float64 \(40,\); it must be integers",
    ),
    "two masks": (
        dict(
            inputs=INPUTS,
            targets=CLASSES,
            lengths=np.full(N, L),
            mask=np.ones((N, L), bool),
        ),
        "lengths and mask say the same",
    ),
    "empty row": (
        dict(inputs=INPUTS, targets=CLASSES, mask=np.arange(N)[:, None] > [3] * L),
        "mask has no True in row 0",
    ),
    "mask values": (
        dict(inputs=INPUTS, targets=CLASSES, mask=np.full((N, L), 2)),
        r"mask is int64 \(40, 6\); it must be bool",
    ),
    "dt": (
        dict(inputs=INPUTS, targets=CLASSES, dt=np.zeros((N, L))),
        r"dt is 0\.0 at \[0, 0\]; it must be 1\.18e-38 or more",
    ),
    "beyond float32": (
        dict(inputs=np.where(np.arange(L) == 2, 1e300, INPUTS), targets=CLASSES),
        r"inputs is 1e\+300 at \[0, 2\]; its numbers must be those of float32, up to",
    ),
    "target beyond float32": (
        dict(inputs=INPUTS, targets=np.where(np.arange(N) == 5, -1e300, 0.5)),
        r"targets is -1e\+300 at \[5\]; its numbers must be those of float32",
    ),
    "large token": (
        dict(inputs=np.where(np.arange(L) == 1, 2**40, [[1]] * N), targets=CLASSES),
        r"inputs is 1099511627776 at \[0, 1\]; it must lie between 0 and 2147483646",
    ),
    "large unsigned class": (
        dict(inputs=INPUTS, targets=np.full(N, 2.0**40).astype(np.uint64)),
        r"targets is 1099511627776 at \[0\]; it must lie between 0 and",
    ),
    "large class": (
        dict(inputs=INPUTS, targets=np.where(np.arange(N) == 3, 2**31, CLASSES)),
        r"targets is 2147483648 at \[3\]; it must lie between 0 and 2147483646",
    ),
    "unsigned class": (
        dict(inputs=INPUTS, targets=np.full((N, L), 2**63, np.uint64)),
        r"targets is 9223372036854775808 at \[0, 0\]; it must lie between -1 and",
    ),
    "small dt": (
        dict(inputs=INPUTS, targets=CLASSES, dt=np.full((N, L), 1e-50)),
        r"dt is 1e-50 at \[0, 0\]; it must be 1\.18e-38 or more",
    ),
    "large dt": (
        dict(inputs=INPUTS, targets=CLASSES, dt=np.full((N, L), 1e50)),
        r"dt is 1e\+50 at \[0, 0\]; its numbers must be those of float32",
    ),
    "mask of text": (
        dict(inputs=INPUTS, targets=CLASSES, mask=np.full((N, L), "1")),
        r"mask is <U1 \(40, 6\); it must be bool",
    ),
    "complex": (
        dict(inputs=INPUTS.astype(complex), targets=CLASSES),
        "inputs is of dtype complex128; it must be numbers",
    ),
    "dates": (
        dict(inputs=INPUTS, targets=CLASSES.astype("M8[s]")),
        "targets is of dtype datetime64.*; it must be numbers",
    ),
    "dt shape": (
        dict(inputs=INPUTS, targets=CLASSES, dt=np.ones(N)),
        r"dt has shape \(40,\); it must be \[n, L\]",
    ),
    "split": (
        dict(inputs=INPUTS, targets=CLASSES, split=np.full(N, "dev")),
        "split is .* with 'dev'; it must be .* train, validation, test",
    ),
    "no training": (
        dict(inputs=INPUTS, targets=CLASSES, split=np.full(N, "test")),
        "split leaves no sequence to train on",
    ),
    "rare class": (
        dict(inputs=INPUTS, targets=np.where(np.arange(N) == 0, 4, CLASSES)),
        "its 40 sequences cannot be divided: .*data.validation or data.test",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_every_fault_of_an_npz_is_named(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=f"own.npz: {message}"):
        load_npz(tmp_path, **arrays)


BAD_CSV = {
    "cell": ("1,2,0\n3,x,1\n", "row 2, column 2 is 'x'; it must be a number"),
    "first row": ("a,2,0\n3,4,1\n", "row 1, column 1 is 'a'; it must be a number"),
    "target": ("1,2,0\n3,4,cat\n", "row 2, column 3 is 'cat'"),
    "nan": ("1,2,0\n3,nan,1\n", "row 2, column 2 is nan; it must be a finite number"),
    "gap": ("1,2,3,0\n3,,4,1\n", "row 2, column 2 is empty inside the sequence"),
    "lonely target": ("1,2,0\n5\n", "row 2 needs at least one input"),
    "empty": ("", "has no sequence"),
    "only a header": ("a,b,label\n", "has no sequence"),
    "beyond float32": ("1,2,0\n3,1e300,1\n", "row 2, column 2 is 1e300; .* of float32"),
    "beyond float": ("1,2,0\n3,1e400,1\n", "row 2, column 2 is 1e400; .* finite"),
    "digits": (
        "1,2,0\n3,4,12345678901234567890\n",
        "row 2, column 3 is 12345678901234567.*; a whole number as target must be at",
    ),
    "large class": ("1,2,0\n3,4,3000000000\n", "row 2, column 3 is 3000000000; a who"),
    "quote": ('1,2,0\n3,"4,1\n', "row 2, column 2 is '4,1.n'; it must be a number"),
    "nul": ("1,2,0\n3,\0,1\n", "(row 2, column 2 is '.x00'|not a UTF-8 CSV)"),
    "blank lines": ("\n\n ,\n", "has no sequence"),
    "semicolons": (
        "1;2;0\n3;4;1\n",
        r"row 1 needs at least one input before .*separated by commas",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_every_fault_of_a_csv_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"own.csv: {message}"):
        load_csv(tmp_path, text)


def test_binary_csv_is_refused(tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"own.csv: not a UTF-8 CSV file"):
        data.load(dict(name="arrays", path=str(path)))


def test_one_example_may_be_a_split_and_a_class_may_be_held_out_alone(tmp_path):
    arrays = dict(inputs=INPUTS[:3], targets=np.array([0, 1, 2]))
    split = np.array(["train", "validation", "test"])
    dataset = load_npz(tmp_path, split=split, **arrays)
    assert dataset.spec.outputs == 3
    stream = dataset.train(1, seed=0)
    assert [next(stream)["targets"].tolist() for _ in range(3)] == [[0]] * 3
    (batch,) = dataset.evaluation("test", 2)
    assert batch["mask"].any(axis=1).tolist() == [True, False]
    with pytest.raises(
        ValueError, match=r"train\.batch_size must be between 1 and 1, "
    ):
        dataset.train(2, seed=0)
    alone = load_npz(
        tmp_path, dict(validation=0.0, test=0.0), inputs=INPUTS[:1], targets=[0]
    )
    assert list(alone.sources) == ["train"]
    with pytest.raises(
        ValueError, match=r"own\.npz: its 1 sequences cannot be divided"
    ):
        load_npz(tmp_path, inputs=INPUTS[:1], targets=[0])


def test_what_is_masked_may_be_anything(tmp_path):
    mask = np.arange(L) < np.full((N, 1), 4)
    targets = np.where(mask, np.uint64(2), np.uint64(2**63))
    config = dict(test=0.0, validation=0.0)
    rows = everything(
        load_npz(tmp_path, config, inputs=INPUTS, targets=targets, mask=mask)
    )
    assert rows["targets"].dtype == np.int32
    np.testing.assert_array_equal(rows["targets"], np.where(mask, 2, -1))


def test_a_number_of_float64_is_rounded_and_a_small_one_may_be_0(tmp_path):
    inputs = np.where(np.arange(L) == 0, 1e-300, INPUTS)
    config = dict(test=0.0, validation=0.0)
    rows = everything(load_npz(tmp_path, config, inputs=inputs, targets=CLASSES))
    np.testing.assert_array_equal(rows["inputs"], inputs.astype(np.float32))


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (self._path, "w")


def test_an_npz_of_pickles_is_refused_without_reading_them(tmp_path):
    executed = tmp_path / "executed"
    inputs = np.array([Hostile(str(executed))] * N, object)
    with pytest.raises(ValueError, match=r"own\.npz: not a readable NPZ of plain"):
        load_npz(tmp_path, inputs=inputs, targets=CLASSES)
    assert not executed.exists()


def test_an_npz_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    # 8 TB of zeros are 8 GB when they are packed; here, less of a machine.
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match=r"must be smaller: .*own\.npz, unpacked"):
        load_npz(tmp_path, inputs=np.zeros((N, 10_000)), targets=CLASSES)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_npz_is_refused(tmp_path, share):
    path = tmp_path / "own.npz"
    np.savez(path, inputs=INPUTS, targets=CLASSES)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"own.npz: not a readable NPZ"):
        data.load(dict(name="arrays", path=str(path)))


def test_members_that_are_no_arrays_are_refused(tmp_path):
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs", b"text")
        archive.writestr("../targets.npy", b"text")
    with pytest.raises(ValueError, match=r"own\.npz: "):
        data.load(dict(name="arrays", path=str(path)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.npz"]


def test_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match=r"own.npz: not a readable NPZ"):
        data.load(dict(name="arrays", path=str(path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(outputs=3), r"targets is 3 at \[3\]; it must lie between 0 and 2"),
        (dict(encoder="token"), "inputs has fractions"),
        (dict(encoder="image"), r"data\.encoder.*'scalar', 'token'.*'image'"),
        (dict(loss="mse"), r"data\.loss.*'regression'.*'mse'"),
        (dict(loss="token"), r"targets is int64 \(40,\)"),
        (dict(test=1.5), "test must be a fraction"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_file_is_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path, config, inputs=INPUTS, targets=CLASSES)


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for path, message in [
        ("", "data.path must name an .npz, .csv or .parquet file or a folder"),
        ("x.xlsx", r"must end in .npz, .csv or .parquet, or be a folder .*'x.xlsx'"),
        ("one.wav", r"got 'one.wav'; recordings are read from the folder"),
        ("nowhere", "there is no file or folder 'nowhere'; it must hold inputs and t"),
        (
            str(tmp_path / "none.npz"),
            r"no file .*none.npz'; it must hold inputs and targets, .*data\.md",
        ),
        (
            str(tmp_path / "folder.csv"),
            "must be a file, or .*folder.csv', which has none",
        ),
        (
            "~nouser/x.npz",
            r"data\.path must be a path that can be, got '~nouser",
        ),
        (f"{'x' * 260}.npz", r"data\.path must be a path that can be.*too long"),
        ("x\0.npz", r"data\.path"),
        (None, r"data\.path must be a text, got None"),
        (3, r"data\.path must be a text, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.load(dict(name="arrays", path=path))
