import arena
import jax
import numpy as np
import pytest
import tiny_run

from configs import common, lra
from train import checkpoint, data, loop, losses, pretrain, records
from train.data import objectives
from train.data.pipeline import Dataset
from train.data.sources import Rows
from train.data.spec import Spec
from train.report import pages


def numbers(channels=0, count=6, length=20):
    rng = np.random.default_rng(0)
    shape = (count, length, channels) if channels else (count, length)
    arrays = {
        "inputs": rng.random(shape).astype(np.float32),
        "targets": rng.integers(0, 2, count).astype(np.int32),
        "mask": np.arange(length) < rng.integers(5, length + 1, count)[:, None],
    }
    spec = Spec("scalar", length, 2, "classification", max(channels, 1), padded=True)
    return Dataset(spec, {"train": Rows(arrays), "validation": Rows(arrays)})


def tokens(count=6, length=20):
    dataset = numbers(count=count, length=length)
    arrays = dict(dataset.sources["train"].arrays)
    arrays["inputs"] = (9 * arrays["inputs"]).astype(np.int32)
    spec = dataset.spec.but(encoder="token", vocab_size=9)
    return Dataset(spec, {"train": Rows(arrays), "validation": Rows(arrays)})


def whole(dataset, split="validation"):
    (batch,) = dataset.evaluation(split, dataset.num_examples(split))
    return batch


def test_hidden_tokens_are_asked_for():
    plain, dataset = whole(tokens()), objectives.asked(tokens(), dict(name="masked"))
    batch = whole(dataset)
    hidden = batch["inputs"] == 9
    assert 0.3 < hidden[plain["mask"]].mean() < 0.7 and not hidden[~plain["mask"]].any()
    np.testing.assert_array_equal(batch["inputs"][~hidden], plain["inputs"][~hidden])
    np.testing.assert_array_equal(batch["targets"][hidden], plain["inputs"][hidden])
    assert (batch["targets"][~hidden] == losses.IGNORED).all()
    assert dataset.spec.vocab_size == 10 and dataset.spec.outputs == 9
    assert dataset.spec.loss == "token" and not dataset.spec.causal


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_hidden_numbers_are_asked_for(channels):
    plain = whole(numbers(channels))
    dataset = objectives.asked(numbers(channels), dict(name="masked", ratio=0.25))
    batch = whole(dataset)
    inputs = plain["inputs"].reshape(6, 20, -1)
    hidden = batch["inputs"][..., -1] == 1
    assert 0.1 < hidden[plain["mask"]].mean() < 0.4 and not hidden[~plain["mask"]].any()
    shown = np.where(hidden[..., None], 0, inputs)
    np.testing.assert_array_equal(batch["inputs"][..., :-1], shown)
    np.testing.assert_array_equal(batch["targets"][hidden], inputs[hidden])
    assert np.isnan(batch["targets"][~hidden]).all()
    assert dataset.spec.loss == "absolute"
    assert dataset.spec.outputs == max(channels, 1)
    assert dataset.spec.channels == max(channels, 1) + 1


def test_numbers_as_classes():
    objective = dict(name="masked", ratio=1.0, levels=5, low=0.0, high=1.0)
    batch, plain = whole(objectives.asked(numbers(), objective)), whole(numbers())
    expected = np.where(plain["mask"], np.round(4 * plain["inputs"]), -1)
    np.testing.assert_array_equal(batch["targets"], expected)


@pytest.mark.parametrize("make", [tokens, numbers])
def test_the_next_one_is_asked_for(make):
    plain, batch = whole(make()), whole(objectives.asked(make(), dict(name="next")))
    np.testing.assert_array_equal(batch["inputs"], plain["inputs"])
    wanted = plain["mask"][:, 1:] & plain["mask"][:, :-1]
    targets = batch["targets"].reshape(6, 20)
    assert (targets[:, :-1][wanted] == plain["inputs"][:, 1:][wanted]).all()
    others = np.concatenate([targets[:, :-1][~wanted], targets[:, -1]])
    assert (np.isnan(others) if make is numbers else others == -1).all()
    assert objectives.asked(make(), dict(name="next")).spec.causal


def test_what_is_hidden_is_drawn_anew_in_training_and_fixed_in_evaluation():
    dataset = objectives.asked(tokens(), dict(name="masked"))
    first, again = (whole(dataset)["inputs"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    stream = dataset.train(6, seed=0)
    epochs = [next(stream) for _ in range(2)]
    hidden = [np.sort((b["inputs"] == 9).sum(axis=1)).tolist() for b in epochs]
    assert hidden[0] != hidden[1]
    other = dataset.train(6, seed=0)
    np.testing.assert_array_equal(next(other)["inputs"], epochs[0]["inputs"])


def test_each_of_two_documents_is_a_sequence():
    arrays = tokens(count=8).sources["train"].arrays
    pairs = {k: arrays[k].reshape(4, 2, 20) for k in ("inputs", "mask")}
    pairs["targets"] = arrays["targets"][:4]
    dataset = Dataset(tokens().spec, {"train": Rows(pairs), "validation": Rows(pairs)})
    asked = objectives.asked(dataset, dict(name="next", documents=2))
    assert asked.num_examples("train") == 8
    np.testing.assert_array_equal(whole(asked)["inputs"], arrays["inputs"])
    marked = whole(objectives.asked(dataset, dict(name="marked")))
    np.testing.assert_array_equal(marked["inputs"], pairs["inputs"])


def test_the_loss_is_of_hidden_places_only():
    """Values and gradients: no other output matters."""
    for dataset in (tokens(), numbers(2)):
        asked = objectives.asked(dataset, dict(name="masked"))
        batch = whole(asked)
        hidden = (
            batch["targets"] != -1
            if asked.spec.loss == "token"
            else np.isfinite(batch["targets"]).all(axis=-1)
        )
        rng = np.random.default_rng(0)
        outputs = rng.normal(size=(6, 20, asked.spec.outputs)).astype(np.float32)
        loss = losses.make(asked.spec.loss)
        total, weight, _ = loss(outputs, batch)
        assert weight == hidden.sum() > 0
        gradient = jax.grad(lambda y, batch=batch, loss=loss: loss(y, batch)[0])(
            outputs
        )
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).sum(axis=-1)[~hidden] == 0).all()
        assert (np.abs(gradient).sum(axis=-1)[hidden] > 0).all()
        changed = np.where(hidden[..., None], outputs, 7.0)
        assert loss(changed, batch)[0] == total


def test_absolute_errors_by_hand():
    batch = {
        "targets": np.array([[[1.0, 2.0], [np.nan, np.nan]]], np.float32),
        "mask": np.ones((1, 2), bool),
    }
    total, weight, metrics = losses.make("absolute")(np.zeros((1, 2, 2)), batch)
    assert (total, weight, metrics["absolute_error"]) == (1.5, 1.0, 1.5)
    with pytest.raises(
        ValueError, match=r"outputs must be \[B, L, K\] like the targets"
    ):
        losses.make("absolute")(np.zeros((1, 2)), batch)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (dict(name="hidden"), r"objective\.name must be one of masked, next, marked"),
        (
            dict(name="masked", ratio=0.0),
            r"objective\.ratio must be in \(0, 1\], got 0",
        ),
        (
            dict(name="masked", ratio=2.0),
            r"objective\.ratio must be in \(0, 1\], got 2",
        ),
        (dict(name="masked", levels=1), r"levels must be 0, or 2 or more, got 1"),
        (dict(name="masked", low=1.0), r"low must be below high, got 1\.0 and 1\.0"),
        (dict(name="masked", documents=3), r"documents must be 1 or 2, got 3"),
        (dict(name="masked", share=1), r"has no 'share'; it has ratio, levels"),
        (dict(name="masked", ratio="half"), r"objective\.ratio must be a number"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_are_named(objective, message):
    with pytest.raises(ValueError, match=message):
        objectives.asked(numbers(), objective)


def test_data_that_are_no_sequences_have_no_objective():
    several = dict(name="masked", levels=4)
    with pytest.raises(ValueError, match=r"levels must be 0 for numbers of several"):
        objectives.asked(numbers(3), several)
    config = dict(name="moving_digits", objective=dict(name="masked"))
    with pytest.raises(
        ValueError, match=r"must be label, .* got 'masked' for video inp"
    ):
        data.load(config)
    with pytest.raises(
        ValueError, match=r"must be label, .* got 'masked' for video inp"
    ):
        data.known(config)


def test_what_a_dataset_says_before_it_is_made_is_what_it_says_after(tmp_path):
    config = dict(name="listops", train=4, validation=2, test=2, min_length=5)
    config |= dict(max_length=30, max_depth=3, folder=str(tmp_path))
    for name in objectives.OBJECTIVES:
        config["objective"] = dict(name=name)
        assert data.known(config) == data.load(config).spec


def tiny(**pretraining):
    config = tiny_run.config(steps=4, eval_every=2, checkpoint_every=2)
    config.model.update(layer="s5", features=4, norm="layer", dropout=0.0)
    common.set_layer(config, "s5")
    config.model.layer_args.update(state_size=4)
    config.pretrain.update(dict(steps=4) | pretraining)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A task after self-pretraining, and from scratch."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny(scratch=True, lr=2e-3, batch_size=16)
    return config, workdir, pretrain.run(config, workdir)


def test_the_task_begins_with_the_weights_of_the_pretraining_bit_for_bit(
    run, tmp_path, monkeypatch
):
    config, workdir, results = run
    first = pretrain.fine_tuning(config, workdir / pretrain.FOLDER)
    begun = {}

    def stop(*arguments):
        begun["state"] = arguments[3].state
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.run(first, tmp_path)
    trained, step = checkpoint.restore_params(workdir / pretrain.FOLDER)
    assert step == results["step"] == 4
    was = dict(checkpoint.named_leaves(trained["params"]))
    now = dict(checkpoint.named_leaves(begun["state"].params))
    assert was.keys() == now.keys()
    for name, value in now.items():
        if not name.startswith("head"):
            np.testing.assert_array_equal(value, was[name], err_msg=name)


@pytest.mark.slow
def test_scratch_is_the_task_without_it(run, tmp_path):
    config, workdir, _ = run
    alone = config.copy_and_resolve_references()
    alone.pretrain.update(steps=0, scratch=False)
    loop.run(alone, tmp_path)
    tiny_run.assert_same(workdir / pretrain.SCRATCH, tmp_path)


def test_each_part_keeps_its_own_config(run):
    config, workdir, _ = run
    parts = [records.read_config(p) for p in (workdir, workdir / pretrain.FOLDER)]
    assert [p.optimizer.lr for p in parts] == [config.optimizer.lr, 2e-3]
    assert [p.train.batch_size for p in parts] == [8, 16]
    assert [p.data.objective.name for p in parts] == ["marked", "masked"]
    assert [p.pretrain.steps for p in parts] == [4, 0]


def test_another_config_is_refused_before_anything_is_trained(run, monkeypatch):
    config, workdir, _ = run
    other = config.copy_and_resolve_references()
    other.pretrain.steps = 6
    monkeypatch.setattr(loop, "run", None)
    with pytest.raises(ValueError, match=r"pretrain\.steps was 4, is 6"):
        pretrain.run(other, workdir)


def test_pieces_of_tokens_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    config = tiny()
    config.train.chunk = 8
    monkeypatch.setattr(loop, "run", None)
    with pytest.raises(ValueError, match=r"train\.chunk must be 0 with pretrain\.ste"):
        pretrain.run(config, tmp_path)


def test_a_config_without_the_section_has_none(tmp_path, monkeypatch):
    config = tiny()
    with config.unlocked():
        del config.pretrain
    monkeypatch.setattr(loop, "run", lambda config, *_, **__: {"step": 0})
    assert pretrain.run(config, tmp_path) == {"step": 0}


def test_a_second_start_trains_nothing(run, monkeypatch):
    config, workdir, results = run
    monkeypatch.setattr(loop, "train", None)
    assert pretrain.run(config, workdir) == results


@pytest.mark.parametrize("part", ["pretrain", pytest.param("", marks=pytest.mark.slow)])
def test_what_was_stopped_goes_on(run, tmp_path, monkeypatch, part):
    """In the part that a signal ended, to the same weights."""
    config, workdir, _ = run
    begin, go_on = loop.run, loop.may_begin

    def ends(step, pace, batches, stop):
        if step > 2:
            stop.signal = "SIGTERM"
            return False
        return go_on(step, pace, batches, stop)

    def stopped(config, workdir, *args, **kwargs):
        with monkeypatch.context() as patched:
            if workdir == tmp_path / part:
                patched.setattr(loop, "may_begin", ends)
            return begin(config, workdir, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "run", stopped)
        assert pretrain.run(config, tmp_path) == {"step": 2, "stopped": "SIGTERM"}
    pretrain.run(config, tmp_path)
    for folder in (pretrain.FOLDER, "."):
        tiny_run.assert_same(workdir / folder, tmp_path / folder)


@pytest.mark.slow
def test_the_report_compares_with_scratch(run):
    _, workdir, results = run
    page = pages.write(workdir).read_text()
    assert "Self-pretraining" in page and "from scratch" in page
    scratch = records.read_results(workdir / pretrain.SCRATCH)
    for found in (results, scratch):
        assert f"{found['test']['accuracy']:.4f}" in page
    assert pages.write(workdir / pretrain.FOLDER).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(model=dict(head="token")),
            r"steps must be 0 unless model\.head is one of",
        ),
        (dict(model=dict(grid="cross")), r"pretrain\.steps must be 0 with model\.grid"),
        (
            dict(train=dict(init_from="x")),
            r"train\.init_from must be empty with pretra",
        ),
        (
            dict(pretrain=dict(objective="all")),
            r"pretrain\.objective must be masked or",
        ),
        (
            dict(pretrain=dict(ratio=0.0)),
            r"objective\.ratio must be in \(0, 1\], got 0",
        ),
        (
            dict(
                pretrain=dict(objective="next"),
                model=dict(layer_args=dict(bidirectional=True)),
            ),
            r"model\.layer must not read the future",
        ),
        (dict(pretrain=dict(steps=-1)), r"pretrain\.steps must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_a_section_that_does_not_fit_is_named(tmp_path, change, message):
    config = tiny()
    for section, values in change.items():
        config[section].update(values)
    with pytest.raises(ValueError, match=message):
        pretrain.run(config, tmp_path / "run")
    assert not list(tmp_path.rglob("checkpoints"))


def test_documents_are_cut_for_the_pretraining_alone(tmp_path):
    config = tiny()
    for longest, shortest in ((0, 8), (48, 0)):
        config.data.buckets.update(shortest=8, longest=longest, cut=True)
        assert pretrain.pretraining(config).data.buckets.cut
        task = pretrain.fine_tuning(config, tmp_path).data.buckets
        assert (task.shortest, task.longest, task.cut) == (shortest, 0, False)
        assert config.data.buckets.cut


@pytest.mark.slow
def test_pairs_are_pretrained_on_each_document(tmp_path):
    config = lra.get_config("retrieval,layer=s5")
    arena.write_pairs(tmp_path / "tsv_data")
    config.data.update(length=16, path=str(tmp_path / "tsv_data"), folder=str(tmp_path))
    config.model.update(features=4, depth=1)
    config.model.layer_args.update(state_size=4, blocks=1)
    config.optimizer.warmup = 0
    config.train.update(steps=1, eval_every=1, log_every=1, batch_size=2)
    config.pretrain.update(steps=1, ratio=0.15)
    results = pretrain.run(config, tmp_path / "run")
    assert np.isfinite(results["test"]["loss"])
