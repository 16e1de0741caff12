import errno
import functools
import io
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import tiny_run
from flax import linen as nn
from rich.console import Console

from configs import common
from train import (
    checkpoint,
    endings,
    generate,
    loop,
    losses,
    metrics,
    optimizers,
    parts,
    records,
    sharding,
    state,
    step,
    window,
)
from train.data.spec import Spec
from train.parts import Progress

MESH = sharding.rows_mesh()
LOSS = losses.make("classification")


class Pool(nn.Module):
    """The smallest model of the contract that knows mask and dropout."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, state=None, sequence=None, train=False):
        x = nn.tanh(nn.Dense(8)(inputs[..., None]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if sequence is not None and sequence.mask is not None:
            x = x * sequence.mask[..., None]
        return nn.Dense(3)(x.sum(axis=1)), None


def batch_of(size=8, length=5):
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.normal(size=(size, length)).astype(np.float32),
        "targets": rng.integers(0, 3, size),
        "mask": np.arange(length) < rng.integers(2, length + 1, size)[:, None],
    }


def begin(batch, dropout=0.0, padded=True, **train):
    """The state at step 0 as a function, and the step."""
    defaults = {"accumulate": 1, "chunk": 0, "ema": 0.0, "skip_nonfinite": 0}
    config = {"seed": 3, "train": defaults | train}
    model, optimizer = Pool(dropout), optax.sgd(0.1)
    ema = config["train"]["ema"] > 0
    update = step.make_train_step(model, optimizer, LOSS, config, padded)
    create = functools.partial(state.create, model, optimizer, batch, 0, MESH, ema)
    return create, update


def updated(batch, **options):
    """State and metrics after one update."""
    create, update = begin(batch, **options)
    return update(create(), batch)


def assert_close(a, b, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.max(np.abs(x - y)) <= tolerance * max(np.max(np.abs(y)), 1e-3)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    batch = batch_of()
    batch["mask"][3:6] = False  # micro-batches of unequal weight
    whole, at_once = updated(batch)
    cut, in_parts = updated(batch, accumulate=4)
    assert_close(cut.params, whole.params)
    assert_close(in_parts, at_once)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["inputs", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(accumulate, name):
    """Also where the loss is finite and the norm of its gradient is not."""
    batch = batch_of()
    create, update = begin(
        batch, skip_nonfinite=1, dropout=0.5, ema=0.9, accumulate=accumulate
    )
    current, _ = update(create(), batch)
    if name == "overflow":
        kernel = current.params["Dense_1"]["kernel"]
        current.params["Dense_1"]["kernel"] = kernel * 1e25
    before = jax.device_get(current)
    bad = batch | {"inputs": batch["inputs"] * np.nan} if name == "inputs" else batch
    after, measured = update(current, bad)
    assert not np.isfinite(measured["grad_norm"])
    assert np.isfinite(measured["loss"]) == (name == "overflow")
    assert int(after.step) == 2
    assert_close(after.replace(step=before.step), before, 0)


def test_a_run_that_skips_nothing_has_the_program_it_had():
    def program(**train):
        create, update = begin(batch_of(), **train)
        return str(update.trace(create(), batch_of()).jaxpr)

    plain, one, more = (program(skip_nonfinite=n) for n in (0, 1, 5))
    # The loss asks too.
    assert plain.count("is_finite") == one.count("is_finite") - 1
    assert len(plain) < len(one) and one == more


def test_dropout_depends_on_the_step_and_nothing_else():
    batch = batch_of()
    create, update = begin(batch, dropout=0.5)
    losses = [
        float(update(create().replace(step=jax.numpy.int32(n)), batch)[1]["loss"])
        for n in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    create, update = begin(batch, dropout=0.5)
    assert float(update(create(), batch)[1]["loss"]) == losses[0]


def test_average_of_the_weights():
    batch = batch_of()
    create, update = begin(batch, ema=0.15)
    current = create()
    average = jax.device_get(current.ema)
    for n in range(3):
        current, _ = update(current, batch)
        d = min(0.15, (1 + n) / (10 + n))  # 0.1, 0.15, 0.15
        average = jax.tree.map(
            lambda old, new, d=d: d * old + (1 - d) * new, average, current.params
        )
    assert_close(current.ema, average)
    assert current.variables()["params"] is current.ema
    assert begin(batch)[0]().ema is None


def test_the_model_gets_the_mask_only_of_padded_data():
    batch = batch_of()
    _, masked = updated(batch)
    _, unmasked = updated(batch, padded=False)
    assert masked["loss"] != unmasked["loss"]


def test_gradient_norm_is_that_of_the_mean_loss():
    batch = batch_of()
    create, update = begin(batch)
    first = jax.device_get(create().params)
    second, measured = update(create(), batch)
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, first, second.params)
    assert_close(measured["grad_norm"], optax.tree.norm(moved), 1e-5)


def test_evaluation_does_not_depend_on_the_batch_size():
    data, model = batch_of(size=7), Pool()
    variables = model.init(jax.random.key(0), data["inputs"])
    evaluate = step.make_eval_step(model, LOSS)

    def batches(size):
        for start in range(0, 7, size):
            rows = np.minimum(np.arange(start, start + size), 6)
            batch = {name: array[rows].copy() for name, array in data.items()}
            batch["mask"][np.arange(start, start + size) > 6] = False
            yield batch

    found = [step.mean_scores(evaluate, variables, batches(n)) for n in (7, 3, 1)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_all_finite():
    good = state.create(Pool(), optax.adam(0.1), batch_of(), 0, MESH)
    assert step.all_finite(good)
    bias = good.params["Dense_0"]["bias"].at[0].set(np.inf)
    assert not step.all_finite(good.replace(params={"bias": bias}))


def test_unknown_collection():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            self.variable("cache", "x", lambda: 0.0)

    with pytest.raises(ValueError, match=r"among params, .* got cache"):
        state.init_variables(Odd(), batch_of(), jax.random.key(0))


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Of the runs below, which compile the same step again and again."""
    before = jax.config.jax_compilation_cache_dir
    cache = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.run(tiny_run.config(), workdir)


def test_what_a_run_leaves(finished):
    workdir, results = finished
    assert results == json.loads((workdir / records.RESULTS).read_text())
    assert checkpoint.steps(workdir)[-1] == results["step"] == 12
    assert results["checkpoint"] == str(workdir / "checkpoints" / "12")
    assert 0 <= results["test"]["accuracy"] <= 1
    assert results["best"]["step"] in (5, 10, 12)
    assert results["parallel_vs_recurrent"] < 1e-4
    versions = json.loads((workdir / records.VERSIONS).read_text())
    assert versions["packages"]["jax"] == jax.__version__ and versions["devices"]
    assert list((workdir / "tensorboard").glob("events*"))
    config = records.read_config(workdir)
    assert (config.model.encoder, config.model.outputs) == ("scalar", 10)
    with pytest.raises(ValueError, match=r"no config.json"):
        records.read_config(workdir / "tensorboard")


def test_metrics_file(finished):
    rows = tiny_run.lines(finished[0])
    training = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in training] == [3, 6, 9, 12]
    assert {"loss", "accuracy", "grad_norm", "lr"} < set(training[0])
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in validation] == [5, 10, 12]
    best = max(validation, key=lambda row: row["accuracy"])  # the first of equal ones
    assert finished[1]["best"]["step"] == best["step"]
    assert finished[1]["best"]["validation"]["accuracy"] == best["accuracy"]


def test_a_finished_run_says_so(finished, capsys):
    workdir, results = finished
    before = tiny_run.weights(workdir)
    assert loop.run(tiny_run.config(log_every=1), workdir) == results
    out = capsys.readouterr().out
    assert "finished before, at step 12" in out
    assert f"\ntest accuracy: {results['test']['accuracy']:.4f}\n" in out
    assert f"best on validation, step {results['best']['step']}: " in out
    assert "parallel vs recurrent: max difference" in out
    assert tiny_run.weights(workdir) == before


def test_another_config_in_the_same_workdir(finished):
    other = tiny_run.config(batch_size=16, steps=20)
    other.optimizer.lr = 1.0
    with pytest.raises(ValueError) as caught:
        loop.run(other, finished[0])
    message = str(caught.value)
    assert "optimizer.lr was 0.001, is 1.0" in message
    assert "train.batch_size was 8, is 16" in message
    assert "steps" not in message


def test_a_workdir_without_checkpoint_is_free(tmp_path):
    wrong = tiny_run.config(steps=3)
    wrong.optimizer.schedule = "cosin"
    with pytest.raises(ValueError, match=r"optimizer.schedule must be one of"):
        loop.run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    records.write_config(tmp_path, wrong)
    records.check_workdir(tmp_path, tiny_run.config())


def test_a_lost_best_step_does_not_hide_the_last(finished, monkeypatch, capsys):
    perfect = {"accuracy": 1.0, "loss": 0.0}
    monkeypatch.setattr(endings, "measure", lambda *_: perfect)
    monkeypatch.setattr(endings, "compare", lambda *_: "it is bidirectional")
    monkeypatch.setattr(records, "write_results", lambda *_: None)
    dataset = SimpleNamespace(spec=Spec("scalar", 1, 2, "classification"))
    parts = SimpleNamespace(dataset=dataset, mesh=MESH, model=None)
    best = {"step": 7, "scores": perfect}
    progress = SimpleNamespace(step=12, best=best, state=begin(batch_of())[0]())
    results = endings.finish(None, finished[0], parts, progress)
    assert results["test"] == perfect and results["best"]["test"] is None
    out = capsys.readouterr().out
    assert "the best step is not tested: no checkpoint of step 7" in out
    assert "test accuracy: 1.0000" in out
    assert "parallel vs recurrent: no recurrent mode (it is bidirectional)" in out


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    make = optimizers.make

    def poisoned(config, params):
        tx, groups, schedule = make(config, params)
        poison = optax.stateless(
            lambda updates, _: jax.tree.map(lambda u: u * np.nan, updates)
        )
        late = optax.conditionally_transform(poison, lambda n: n == 6)
        return optax.chain(tx, late), groups, schedule

    monkeypatch.setattr(optimizers, "make", poisoned)
    with pytest.raises(FloatingPointError) as caught:
        loop.run(tiny_run.config(), tmp_path)
    # The update of step 7 breaks the weights; the loss of step 8 shows it.
    assert "at step 8; first non-finite value: the parameter" in str(caught.value)
    assert "= nan, step 8; last good checkpoint: step 5" in str(caught.value)
    assert checkpoint.steps(tmp_path) == [5]
    assert tiny_run.lines(tmp_path)[-1]["step"] == 6


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.step, "all_finite", lambda _: False)
    with pytest.raises(FloatingPointError, match="the state is not finite at step 5"):
        loop.run(tiny_run.config(), tmp_path)
    assert checkpoint.steps(tmp_path) == []


class FullDisk:
    """A file that has room for some writes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= 1
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def close(self):
        self._file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "full", [metrics.FILE, pytest.param(metrics.BOARD, marks=pytest.mark.slow)]
)
def test_a_full_disk_for_the_metrics_ends_the_run(tmp_path, monkeypatch, full):
    begin = metrics.Metrics.__init__

    def limited(self, *arguments):
        begin(self, *arguments)
        if full == metrics.FILE:  # full from the third line on: that of step 6
            self._file = FullDisk(self._file, 2)
        else:
            self._board._records = FullDisk(self._board._records, 2)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "__init__", limited)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            loop.run(tiny_run.config(), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"the disk is full: {tmp_path / full}")
    assert "last good checkpoint: step 5 in" in message
    assert checkpoint.newest_good(tmp_path) == 5
    assert loop.run(tiny_run.config(), tmp_path)["step"] == 12


def test_a_full_disk_noticed_on_leaving(tmp_path):
    def leave(error):
        with metrics.Metrics(tmp_path, 0, 12) as measured:
            measured._file = FullDisk(measured._file, 0)
            if error:
                raise error

    with pytest.raises(OSError, match=metrics.FILE):
        leave(None)
    with pytest.raises(KeyError):  # comes first
        leave(KeyError())


@pytest.mark.slow
def test_a_short_run_is_traced_too(tmp_path):
    loop.run(tiny_run.config(steps=1), tmp_path, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_ends_with_an_error(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    progress = SimpleNamespace(step=10, state=0)
    with pytest.raises(KeyError), metrics.profiler(tmp_path, progress, 99) as between:
        for progress.step in range(10, 20):
            calls.append(progress.step)
            between()
            if progress.step == 13:
                raise KeyError
    assert calls == [10, 11, "start", 12, 13, "stop"]
    with metrics.profiler(tmp_path, progress, 99) as between:
        for progress.step in range(13, 25):
            between()
            calls.append(progress.step)
    assert calls[6:] == [13, "start", *range(14, 19), "stop", *range(19, 25)]


def test_a_model_smaller_than_the_dataset(tmp_path):
    for key, least in (("outputs", 17), ("vocab_size", 18)):
        config = tiny_run.config()
        config.data.target = "next"
        config.model[key] = least - 1
        with pytest.raises(
            ValueError, match=f"model.{key} must be {least} or more, .* got {least - 1}"
        ):
            loop.run(config, tmp_path)


def test_a_batch_without_targets_is_named(tmp_path):
    batch = batch_of()
    batch["mask"][:] = False
    create, update = begin(batch)
    before = jax.device_get(create().params)
    after, measured = update(create(), batch)
    assert measured["weight"] == measured["loss"] == measured["grad_norm"] == 0
    assert_close(after.params, before, 0)
    progress = Progress(None, step=4, unchecked=[measured])
    with pytest.raises(ValueError, match="the batch of step 4 must have a target"):
        window.check_window(progress)
    variables = Pool().init(jax.random.key(0), batch["inputs"])
    with pytest.raises(ValueError, match="the split to evaluate must have a target"):
        step.mean_scores(step.make_eval_step(Pool(), LOSS), variables, [batch])


def test_rows_of_an_evaluation_batch():
    def rows(count, devices, **train):
        config = tiny_run.config(**train)
        return sharding.evaluation_batch_size(
            config, SimpleNamespace(shape={"data": 1, "fsdp": devices}), count
        )

    assert rows(1000, 8) == 40 and rows(1000, 8, eval_batch_size=0) == 8
    assert rows(3, 8) == 8 and rows(9, 8) == 16 and rows(3, 1) == 3


@pytest.mark.parametrize(
    "train",
    [
        dict(batch_size=1, eval_batch_size=72, steps=1),
        pytest.param(
            dict(batch_size=3, accumulate=3, log_every=100, checkpoint_every=100),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(batch_size=1, eval_batch_size=1), marks=pytest.mark.slow),
        pytest.param(dict(batch_size=1293), marks=pytest.mark.slow),
    ],
    ids=lambda train: ",".join(f"{k}={v}" for k, v in train.items()),
)
def test_the_smallest_sizes(tmp_path, train):
    config = tiny_run.config(**{"steps": 3, "eval_every": 2, "log_every": 2} | train)
    config.optimizer.warmup = -500
    results = loop.run(config, tmp_path)
    assert results["step"] == config.train.steps
    assert np.isfinite(results["test"]["loss"])
    (last,) = (r for r in tiny_run.lines(tmp_path)[-2:] if r["split"] == "train")
    assert last["step"] == results["step"]


@pytest.mark.slow
def test_a_recipe_s_warmup_fits_a_short_trial(tmp_path, capsys):
    config = tiny_run.config(eval_every=100, steps=10)
    config.optimizer.warmup = -500
    loop.run(config, tmp_path)
    said = "warmup: 1 steps, a tenth of train.steps = 10; the recipe has 500\n"
    assert said in capsys.readouterr().out
    assert records.read_config(tmp_path).optimizer.warmup == 1
    config.train.steps = 12  # goes on with the one it has, whoever asks
    assert loop.run(config, tmp_path)["step"] == 12
    assert records.read_config(tmp_path).optimizer.warmup == 1
    assert "warmup:" not in capsys.readouterr().out
    config.optimizer.warmup = 500  # the user's
    with pytest.raises(ValueError, match=r"optimizer.warmup must be .* got 500"):
        loop.run(config, tmp_path / "other")


@pytest.mark.parametrize(
    ("warmup", "steps", "saved", "used"),
    [
        (-500, 501, None, 500),
        (-500, 500, None, 50),
        (-500, 9, None, 0),
        (-500, 20_000, 5, 5),
        (-500, 20_000, 0, 0),
        (500, 50, 5, 500),
        (0, 50, 5, 0),
    ],
)
def test_warmup(warmup, steps, saved, used):
    config = tiny_run.config(steps=steps)
    config.optimizer.warmup = warmup
    optimizers.settle_warmup(config, saved)
    assert config.optimizer.warmup == used


def test_the_table_says_what_groups_are():
    parts = [*common.groups(ssm_lr=0.1), (r".*/mine", dict(lr=0.0))]
    said = [metrics.group_name(*part) for part in parts]
    assert said == [
        "state space: eigenvalues, step size, B (lr x 0.1, no decay)",
        "taps of long convolutions (lr x 0.1, no decay)",
        "biases, scales, decays (no decay)",
        "other weights",
        "what matches .*/mine (frozen)",
    ]


def test_compiling_is_said(tmp_path, monkeypatch, capsys):
    def table(*_):
        raise KeyError

    monkeypatch.setattr(parts, "print_table", table)
    with pytest.raises(KeyError):
        loop.run(tiny_run.config(), tmp_path)
    said = (
        "compiling the training step: 1 blocks of 4 features (gru), a batch of 8 x 64"
    )
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_the_bar_says_which_clock_is_which():
    bar = metrics._bar(20, 100)
    bar.stop()
    bar.update(bar.task_ids[0], completed=22)
    console = Console(width=150, file=io.StringIO())
    console.print(bar.get_renderable())
    said = console.file.getvalue()
    assert "22/100" in said and "elapsed 0:" in said and "remaining " in said


@pytest.mark.slow
def test_what_is_shown_is_done(tmp_path, monkeypatch):
    """The bar moves to steps that are done, and two at most are not."""
    begun, shown = [], []
    pace = loop.Pace

    class Watched(pace):
        def begun(self, measured, asked):
            begun.append(measured)
            super().begun(measured, asked)

    def advance(self, step):
        assert len(begun) - step <= 2
        assert all(measured.is_ready() for measured in begun[:step])
        shown.append(step)

    monkeypatch.setattr(loop, "Pace", Watched)
    monkeypatch.setattr(metrics.Metrics, "advance", advance)
    loop.run(tiny_run.config(log_every=100), tmp_path)
    assert shown[-1] == len(begun) == 12 and shown == sorted(shown)


def test_a_step_keeps_its_types_in_x64():
    batch = batch_of()
    for options in (dict(ema=0.9), dict(accumulate=4, dropout=0.5)):
        with jax.enable_x64(True):
            create, update = begin(batch, **options)
            before = create()
            after, _ = jax.eval_shape(update, before, batch)
            types = [[x.dtype for x in jax.tree.leaves(s)] for s in (before, after)]
            assert types[0] == types[1]
            assert {*types[1]} == {np.dtype("float32"), np.dtype("int32")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "target"), [("s4d", "label"), ("gru", "label"), ("mamba", "next")]
)
def test_a_run_ends_in_x64(tmp_path, layer, target):
    config = tiny_run.config(steps=2, eval_every=1, log_every=1, eval_batch_size=8)
    common.set_layer(config, layer)
    config.data.target = target
    config.model.head = "token" if target == "next" else "mean"
    with jax.enable_x64(True):
        results = loop.run(config, tmp_path)
        assert results["parallel_vs_recurrent"] < 1e-4
        saved, _ = checkpoint.restore_params(tmp_path)
        if target == "next":
            run = generate.load_run(tmp_path)
            prompt = np.full((2, 1), run.dataset.spec.start)
            key = jax.random.key(0)
            made = generate.generate(run.model, run.variables, prompt, 5, key)
            assert made.dtype == np.int32
    assert {x.dtype for x in jax.tree.leaves(saved)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (dict(log_every=0), "train.log_every must be 1 or more, got 0"),
        (dict(accumulate=3), "multiple of .* train.accumulate = 3, got 8"),
        (dict(ema=1.0), r"train.ema must lie in \[0, 1\), got 1.0"),
        (dict(keep=0), "train.keep must be 1 or more"),
        (dict(save_timeout=-1.0), "train.save_timeout must be 0 or more, got -1.0"),
        (dict(skip_nonfinite=-1), "train.skip_nonfinite must be 0 or more, got -1"),
    ],
)
def test_impossible_settings(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        loop.run(tiny_run.config(**train), tmp_path)


def test_a_negative_seed(tmp_path):
    config = tiny_run.config()
    config.seed = -1
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        loop.run(config, tmp_path)


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / metrics.FILE
    kept = '{"step": 3, "loss": 1.0}\n{"step": 5, "loss": 0.5}\n'
    path.write_text(kept + '{"step": 6, "loss": 0.4}\n{"step": 4, "lo')
    with metrics.Metrics(tmp_path, 5, 12):
        pass
    assert path.read_text() == kept
