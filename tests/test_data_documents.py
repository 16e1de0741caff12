import gzip
import importlib.resources
import json

import numpy as np
import pytest
from arena import (
    REVIEWS,
    everything,
    tar,
    write_listops,
    write_pairs,
    write_pathfinder,
    write_reviews,
)

from configs import lra
from train import data, loop
from train.data import documents, imdb, lra_release, prepare, prepared
from train.report import pages


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A folder with reviews as they are published, but few."""
    monkeypatch.setattr(imdb, "EACH", 2)
    monkeypatch.setattr(imdb, "LEAST", 2)
    write_reviews(tmp_path)
    return tmp_path


def test_the_published_digest_is_that_which_tensorflow_datasets_knows():
    package = importlib.resources.files("tensorflow_datasets")
    listed = (package / "datasets/imdb_reviews/checksums.tsv").read_text()
    url, size, sha256, _ = imdb.REVIEWS
    assert f"{url}\t{size}\t{sha256}\t" in listed


def test_reviews_as_bytes(reviews):
    settings = dict(name="imdb", folder=str(reviews), length=16)
    dataset = data.load(settings)
    assert dataset.spec == data.known(settings)
    assert (dataset.spec.vocab_size, dataset.spec.length) == (257, 16)
    batch = everything(dataset, "train")
    np.testing.assert_array_equal(batch["targets"], [0, 0, 1, 1])
    texts = [
        "train Bad \N{PILE OF POO}!",
        "train tedious",
        "train Good, good.",
        "train né",
    ]
    for row, mask, text in zip(batch["inputs"], batch["mask"], texts, strict=True):
        tokens = [byte + 1 for byte in text.encode()[:16]]
        assert row.tolist() == tokens + [0] * (16 - len(tokens))
        assert mask.tolist() == [True] * len(tokens) + [False] * (16 - len(tokens))
    for split in ("validation", "test"):  # both traditions choose by the test
        shown = everything(dataset, split)["inputs"][1] - 1
        assert bytes(shown[:12].astype("u1").tolist()) == b"test tedious"


def test_reviews_as_characters(reviews):
    dataset = data.load(dict(name="imdb", folder=str(reviews), length=10, variant="s4"))
    # Twice or more in the texts to train on.
    characters = " adeinort"
    joined = "".join(text for name, text in REVIEWS.items() if "/train/" in name)
    assert "".join(sorted(set(joined))) != characters
    assert dataset.spec.symbols == (
        "<pad>",
        "<unk>",
        "<eos>",
        *dataset.spec.symbols[3:],
    )
    known = dataset.spec.symbols[3:]
    assert all(joined.count(c) >= 2 for c in known)
    assert all(joined.count(c) < 2 for c in set(joined) - set(known))
    batch = everything(dataset, "train")
    (row, *_), (mask, *_) = batch["inputs"], batch["mask"]
    text = "".join(dataset.spec.symbols[token] for token in row)
    assert text == "train <unk>ad<eos>" and mask.all()
    last = everything(dataset, "train")["inputs"][3]
    text = [dataset.spec.symbols[token] for token in last]
    assert text == [*"train n", "<unk>", "<eos>", "<pad>"]


def test_some_training_reviews_may_choose_the_step(reviews):
    settings = dict(name="imdb", folder=str(reviews), length=20, validation=0.5)
    dataset = data.load(settings)
    parts = [everything(dataset, s) for s in ("train", "validation")]
    assert [sorted(part["targets"]) for part in parts] == [[0, 1], [0, 1]]
    rows = np.concatenate([part["inputs"] for part in parts])
    whole = everything(data.load(settings | dict(validation=0.0)), "train")["inputs"]
    assert sorted(map(tuple, rows)) == sorted(map(tuple, whole))


def test_unpacked_reviews_are_the_same(reviews, tmp_path_factory):
    other = tmp_path_factory.mktemp("unpacked")
    for name, content in REVIEWS.items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(content, encoding="utf-8")
    packed, unpacked = (
        everything(data.load(dict(name="imdb", folder=str(f), length=30)), "test")
        for f in (reviews, other)
    )
    np.testing.assert_array_equal(packed["inputs"], unpacked["inputs"])
    name = next(name for name in REVIEWS if "/test/" in f"/{name}")
    (other / name).write_text("edited since", encoding="utf-8")
    edited = data.load(dict(name="imdb", folder=str(other), length=30))
    assert (everything(edited, "test")["inputs"] != unpacked["inputs"]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(variant="s5"), r"data\.variant must be one of 'lra', 's4', got 's5'"),
        (dict(length=1), r"data\.length must be 2 or more, got 1"),
        (dict(validation=1.0), r"data\.validation must be in \[0, 1\), got 1\.0"),
        (dict(folder="none"), r"IMDB: none lacks aclImdb .* Put there what http"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(reviews, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(dict(name="imdb", folder=str(reviews)) | change)


def test_reviews_that_are_not_all_there_are_refused(reviews, monkeypatch):
    packed = reviews / "aclImdb_v1.tar.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"aclImdb_v1\.tar\.gz: damaged or incomplete"):
        data.load(dict(name="imdb", folder=str(reviews)))
    packed.write_bytes(whole)
    monkeypatch.setattr(imdb, "EACH", 3)
    with pytest.raises(
        ValueError, match="aclImdb/train/neg must have 3 reviews, has 2"
    ):
        data.load(dict(name="imdb", folder=str(reviews)))
    assert [path.name for path in reviews.iterdir()] == [packed.name]


@pytest.mark.parametrize("variant", documents.VARIANTS)
def test_pairs_of_papers(tmp_path, variant):
    settings = write_pairs(tmp_path / "tsv_data") | dict(length=8, variant=variant)
    dataset = data.load(settings)
    assert dataset.spec.vocab_size == len(dataset.spec.symbols)
    batch = everything(dataset, "train")
    assert batch["inputs"].shape == batch["mask"].shape == (2, 2, 8)
    np.testing.assert_array_equal(batch["targets"], [1, 0])
    shown = "".join(dataset.spec.symbols[t] for t in batch["inputs"][0, 0])
    assert shown == {"lra": "One pape", "s4": "One pap<eos>"}[variant]
    lengths = batch["mask"].sum(axis=-1)
    assert (
        lengths.tolist()
        == {
            "lra": [[8, 7], [7, 5]],
            "s4": [[8, 8], [8, 6]],
        }[variant]
    )
    for split, target in dict(validation=0, test=1).items():
        assert everything(dataset, split)["targets"] == [target]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["2\ta\tb\tx\ty"], r"eval\.tsv, line 1: must have a label of 0 or 1"),
        (["1\ta\tb\tx\ty", "0\ta\tb\tx"], r"eval\.tsv, line 2: .* got 4 fields"),
        ([], r"eval\.tsv: must have a pair of papers, is empty"),
    ],
)
def test_every_fault_of_the_pairs_is_named(tmp_path, lines, message):
    settings = write_pairs(tmp_path / "tsv_data", eval=lines)
    with pytest.raises(ValueError, match=message):
        data.load(settings)
    assert not list(tmp_path.glob("made/*"))


def test_missing_pairs_are_named(tmp_path):
    settings = write_pairs(tmp_path / "tsv_data")
    (tmp_path / "tsv_data/new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(
        ValueError, match=r"must be a folder with new_aan_pairs\.eval\.t"
    ):
        data.load(settings)
    with pytest.raises(ValueError, match=r"data\.path must be .*train\.tsv.*, got ''"):
        data.load(settings | dict(path=""))


@pytest.fixture
def archive(tmp_path):
    """A small lra_release.gz."""
    source = tmp_path / "source"
    write_listops(source / "listops-1000")
    write_pairs(source / "tsv_data")
    write_pathfinder(source / "pathfinder32")
    files = {
        f"lra_release/lra_release/{path.relative_to(source)}": path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file()
    }
    files["lra_release/lra_release/pathfinder32/curv_baseline/x.png"] = b"easy"
    files["lra_release/../pathfinder32/curv_contour_length_14/evil"] = b"outside"
    tar(tmp_path / "lra_release.gz", files)
    return tmp_path / "lra_release.gz"


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("listops", "40 train, 10 validation, 10 test"),
        ("retrieval", "2 train, 1 validation, 1 test"),
        ("pathfinder32", "20 every"),
    ],
)
def test_the_arena_s_archive_is_read(tmp_path, archive, capsys, task, counts):
    flags = [f"--dataset={task}", f"--folder={tmp_path / 'data'}"]
    assert prepare.main([*flags, f"--path={archive}"]) == 0
    said, digest, command = capsys.readouterr().out.splitlines()
    assert f"{task}, {counts} examples" in said
    part = tmp_path / "data/lra_release" / lra_release.PARTS[task][0]
    assert (
        f"--config lra:{task},scale=paper" in command
        and f"--config.data.path={part}" in command
    )
    assert not (part / "curv_baseline").exists() and not (part / "evil").exists()
    archive.unlink()  # what is there is not read again
    archive.write_bytes(b"")
    assert prepare.main([*flags, f"--path={archive}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == digest


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged or incomplete after"),
        (lambda whole: b"", "damaged or incomplete after its beginning"),
        (lambda whole: gzip.compress(b"no tar" * 200), "damaged or incomplete after"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, archive, capsys, cut, message):
    archive.write_bytes(cut(archive.read_bytes()))
    flags = ["--dataset=retrieval", f"--folder={tmp_path / 'data'}"]
    with pytest.raises(SystemExit):
        prepare.main([*flags, f"--path={archive}"])
    assert f"lra_release.gz: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob("data/lra_release/*"))


def test_an_archive_without_the_task_is_refused(tmp_path, capsys):
    tar(tmp_path / "lra_release.gz", {"lra_release/readme": "nothing"})
    flags = [f"--folder={tmp_path / 'data'}", f"--path={tmp_path / 'lra_release.gz'}"]
    for task, message in (
        ("pathx", "must have files of pathfinder128/curv_contour_length_14, has none"),
        ("pathfinder24", "the archive has listops, retrieval, .* and not pathfinder24"),
    ):
        with pytest.raises(SystemExit):
            prepare.main([f"--dataset={task}", *flags])
        assert message.split(" .* ")[0] in capsys.readouterr().err


def test_flags_that_a_data_set_has_no_use_for_are_refused(reviews, capsys):
    for flags, message in (
        (["--dataset=text", "--limit=3"], "--limit is not for the data set text"),
        (["--dataset=retrieval", "--seed=3"], "--seed is not for the data set retri"),
        (
            ["--dataset=pathx", "--limit=3", f"--path={reviews}"],
            "--limit must go without --path",
        ),
    ):
        with pytest.raises(SystemExit):
            prepare.main([*flags, f"--folder={reviews}"])
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["listops", "pathfinder24", "pathx", "text", "retrieval"]
)
def test_a_run_trains_on_what_was_prepared(tmp_path, monkeypatch, task):
    """Offline, a step, its score and a report."""
    monkeypatch.setattr(imdb, "EACH", 2)
    config = lra.get_config(f"{task},layer=s5,variant={'s5' if 'path' in task else ''}")
    config.data.folder = str(tmp_path)
    if task == "text":
        write_reviews(tmp_path)
        config.data.update(length=32, validation=0.0)
    elif task == "retrieval":
        config.data.update(length=32, path=write_pairs(tmp_path / "tsv_data")["path"])
    else:
        config.data.update(train=4, validation=2, test=2)
    config.model.update(features=4, depth=1)
    config.model.layer_args.update(state_size=4, blocks=1)
    config.optimizer.warmup = 0
    config.train.update(steps=1, eval_every=1, log_every=1, batch_size=2)
    results = loop.run(config, tmp_path / "run")
    assert results["step"] == 1 and np.isfinite(results["test"]["loss"])
    assert pages.write(tmp_path / "run").exists()


def test_the_command_converts_reviews(reviews, capsys):
    assert prepare.main(["--dataset=text", f"--folder={reviews}"]) == 0
    said, digest, command = capsys.readouterr().out.splitlines()
    assert "text, 4 train, 4 test examples" in said
    (home,) = reviews.glob("reviews-*")
    assert digest == f"sha256 {prepared.digest(home)}"
    assert json.loads((home / imdb.CHARACTERS).read_text())["t"] == 5
    assert command.endswith(
        f"--config lra:text,scale=paper --config.data.folder={reviews}"
    )
