"""Sequences in pieces: evaluated, generated and trained on as the whole would be."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_steps
import tiny_run
from eight_devices import ALONE, THERE, passed
from flax import linen as nn
from test_predict import refused

from configs import common
from kernels.tolerance import assert_close
from layers import build
from ssm.sequence import Sequence
from train import (
    evaluate,
    flight,
    generate,
    loop,
    losses,
    records,
    resolve,
    runs,
    sharding,
    state,
    step,
    stream,
)
from train.bench import streams
from train.report import answers

B, L, WORDS = 4, 12, 8
TOKEN = losses.make("token")


def config_of(layer, **train):
    config = common.base()
    common.set_layer(config, layer)
    config.model.update(features=8, depth=2, encoder="token", vocab_size=WORDS)
    config.model.update(outputs=WORDS, head="token", length=L)
    if layer in ("s5", "mamba"):
        config.model.layer_args.state_size = 4
    config.train.update(train)
    return config


def batch_of(seed=0, resets=True):
    """Masks that differ from row to row, with gaps; resets, also on masked tokens."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, L)) < 0.8
    mask[0], mask[1, 3:] = True, False
    batch = {
        "inputs": rng.integers(0, WORDS, (B, L)).astype(np.int32),
        "targets": rng.integers(-1, WORDS, (B, L)).astype(np.int32),
        "mask": mask,
    }
    if resets:
        batch["reset"] = rng.random((B, L)) < 0.2
        batch["reset"][1] = np.arange(L) == 5  # behind its last real token
    return batch


def variables_of(model, batch):
    return state.init_variables(model, batch, jax.random.key(1))


def compiled(caplog):
    return [r for r in caplog.records if "Compiling jit(read_piece)" in r.getMessage()]


@pytest.mark.parametrize("chunk", [5, 50])
@pytest.mark.parametrize("head", ["token", "mean", "last"])
def test_scores_in_pieces_are_those_of_the_whole(head, chunk, caplog):
    config = config_of("s5")
    config.model.update(encoder="scalar", vocab_size=0, head=head)
    model, batch, mesh = build(config.model), batch_of(), sharding.rows_mesh()
    rng = np.random.default_rng(3)
    batch["inputs"] = rng.normal(size=(B, L)).astype(np.float32)
    batch["dt"] = rng.uniform(0.5, 2, (B, L)).astype(np.float32)
    loss = TOKEN
    if head != "token":
        loss, batch["targets"] = losses.make("classification"), np.arange(B)
    else:
        # One row is right wherever it counts, which none of its pieces knows alone.
        batch["targets"][0] = -1
    variables = variables_of(model, batch)
    whole = step.make_eval_step(model, loss, True, mesh)(variables, batch)
    told = []
    pieces = stream.make_eval_step(model, loss, True, mesh, chunk, told.append)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = pieces(variables, batch)
        found = pieces(variables, batch)
    assert {*found} == {*whole}
    for name, value in whole.items():
        assert_close(found[name], value)
    assert len(compiled(caplog)) == 1
    assert told == 2 * ([B * 5] * 3 if chunk == 5 else [B * L])


def test_a_sequence_is_right_where_all_its_pieces_are():
    batch = batch_of(resets=False)
    outputs = 9.0 * jax.nn.one_hot(batch["targets"], WORDS)
    outputs = outputs.at[2, 7].add(-20 * outputs[2, 7])
    batch["targets"][2, 7], batch["mask"][2, 7] = 1, True
    expected = TOKEN(outputs, batch)
    rows = None
    for at in range(0, L, 4):
        part = {name: x[:, at : at + 4] for name, x in batch.items()}
        loss, weight, metrics = losses.by_row(TOKEN)(outputs[:, at : at + 4], part)
        sums = {"loss": loss, "weight": weight, **metrics}
        rows = sums if rows is None else jax.tree.map(jnp.add, rows, sums)
    found = losses.joined(rows)
    assert 0 < expected[2]["sequence_accuracy"] < expected[2]["accuracy"]
    for name, value in {
        "loss": expected[0],
        "weight": expected[1],
        **expected[2],
    }.items():
        assert_close(found[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(), "1 or more tokens, got 0"),
        (dict(head="retrieval"), "got the head 'retrieval', which compares two"),
        (dict(encoder="image"), "got the encoder 'image', whose inputs cannot be cut"),
        (dict(layer="long_conv"), "without a recurrent mode: .*bidirectional"),
    ],
)
def test_what_cannot_be_read_in_pieces(change, message):
    config = config_of(change.pop("layer", "s5"))
    if config.model.layer == "long_conv":
        config.model.layer_args.bidirectional = True
    config.model.update(change)
    chunk = 4 if "1 or more" not in message else 0
    with pytest.raises(ValueError, match=f"^--chunk must be .*{message}"):
        stream.check("--chunk", chunk, build(config.model))


def test_a_model_of_another_kind_is_not_read_in_pieces():
    with pytest.raises(ValueError, match="got Dense, of another kind"):
        stream.check("--chunk", 4, nn.Dense(3))


# Training.


def updated(config, batch):
    """Metrics, gradient and state of one step."""
    model, optimizer = build(config.model), optax.trace(0.0)  # keeps the gradient
    create = state.creator(model, optimizer, batch, 0, sharding.rows_mesh())
    update = step.make_train_step(model, optimizer, TOKEN, config)
    after, measured = update(create(), batch)
    return measured, after.opt_state.trace, after


def by_hand(config, batch, chunk):
    """The gradient of the mean loss whose state is cut off between the pieces."""
    model = build(config.model)
    create = state.creator(model, optax.sgd(1.0), batch, 0, sharding.rows_mesh())
    before = create()

    def loss(params):
        collections, carried = before.collections(), model.init_state(B)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        total = weight = 0.0
        for at in range(0, L, chunk):
            piece = {name: x[:, at : at + chunk] for name, x in batch.items()}
            (y, carried), collections = model.apply(
                {"params": params, **collections},
                piece["inputs"],
                jax.lax.stop_gradient(carried),
                Sequence(piece["mask"], piece.get("reset")),
                train=True,
                rngs={"dropout": jax.random.fold_in(key, at // chunk)},
                mutable=[*collections],
            )
            one, count, _ = TOKEN(y, piece)
            total, weight = total + one, weight + count
        return total / weight, collections

    return jax.jit(jax.grad(loss, has_aux=True))(before.params)


def assert_alike(found, expected):
    jax.tree.map(lambda a, b: assert_close(a, b), found, expected)


def test_a_gradient_in_pieces_is_cut_between_them():
    config, batch = config_of("s5"), batch_of()
    expected, _ = by_hand(config, batch, 4)
    config.train.chunk = 4
    assert_alike(updated(config, batch)[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["s5", "mamba"])
def test_a_gradient_in_pieces_is_cut_nowhere_else(layer):
    batch = batch_of()
    measured, gradient, _ = updated(config_of(layer), batch)
    as_whole, same, _ = updated(config_of(layer, chunk=L), batch)
    in_pieces, cut, _ = updated(config_of(layer, chunk=4), batch)
    accumulated = updated(config_of(layer, chunk=4, accumulate=2), batch)[1]
    assert_alike(same, gradient)
    assert_alike(cut, by_hand(config_of(layer), batch, 4)[0])
    assert_alike(accumulated, cut)
    for name in ("loss", "weight", "accuracy", "sequence_accuracy"):
        assert_close(as_whole[name], measured[name])
        assert_close(in_pieces[name], measured[name])
    with pytest.raises(AssertionError, match="not close"):  # what is cut is no rounding
        assert_alike(cut, gradient)


@pytest.mark.slow
def test_a_piece_has_the_statistics_of_those_before_and_its_own_dropout():
    config, batch = config_of("gru", chunk=4), batch_of()
    config.model.update(norm="batch", dropout=0.5)
    _, gradient, after = updated(config, batch)
    expected, collections = by_hand(config, batch, 4)
    assert_alike(gradient, expected)
    assert_alike(after.collections(), collections)


@pytest.mark.parametrize(
    ("change", "chunk", "sequence", "message"),
    [
        (dict(), 5, 1, "divide the length of the sequences, 12, got 5"),
        (dict(), 3, 2, "be a multiple of mesh.sequence = 2, got 3"),
        (dict(head="mean"), 4, 1, "model.head is token, got 4 and 'mean': only the la"),
        (dict(layer="long_conv"), 4, 1, "without a recurrent mode"),
    ],
)
def test_what_cannot_be_trained_in_pieces(change, chunk, sequence, message):
    config = config_of(change.pop("layer", "s5"), chunk=chunk)
    if config.model.layer == "long_conv":
        config.model.layer_args.bidirectional = True
    config.model.update(change)
    config.mesh.sequence = sequence
    with pytest.raises(ValueError, match=f"^train.chunk must .*{message}"):
        resolve.check_chunk(config, build(config.model), batch_of()["inputs"])


@pytest.mark.slow
def test_the_recorder_goes_through_the_pieces_too():
    config, batch = config_of("s5"), batch_of()
    model = build(config.model)
    create = state.creator(model, optax.sgd(1.0), batch, 0, sharding.rows_mesh())
    probes = [
        flight.make_probe(model, TOKEN, 0, True, None, chunk)(create(), batch)
        for chunk in (0, L, 4)
    ]
    assert_alike(probes[1], probes[0])
    assert_close(probes[2].loss, probes[0].loss)
    shown = [flight.quantities(probe.record) for probe in probes]
    assert [*shown[2]] == [*shown[0]] and len(shown[0]) >= 4
    # The largest over the pieces, not their mean.
    name = "block 1: output_rms"
    assert shown[2][name] > shown[0][name] * (1 + 1e-3)
    bad = create()
    encoder = jax.tree.map(lambda x: x.at[:].set(jnp.nan), bad.params["encoder"])
    bad = bad.replace(params={**bad.params, "encoder": encoder})
    probe = flight.make_probe(model, TOKEN, 0, True, None, 4)(bad, batch)
    assert all(
        np.isnan(v) for k, v in flight.quantities(probe.record).items() if "out" in k
    )


@THERE
@pytest.mark.parametrize("layer", ["s5", "mamba"])
@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, sequence=2)]
)
def test_pieces_on_eight(layer, sizes):
    config = sharded_steps.config_of(layer)
    config.train.chunk = 4
    one = sharded_steps.steps(config, jax.devices()[:1])["measured"]
    config.mesh.update(sizes)
    many = sharded_steps.steps(config, None)["measured"]
    np.testing.assert_allclose(many, one, rtol=2e-3)


@THERE
@pytest.mark.parametrize("head", ["token", "mean"])
def test_scores_on_eight(head, caplog):
    config = config_of("s5")
    config.model.head = head
    model, mesh = build(config.model), sharding.rows_mesh()
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch_of())
    loss = TOKEN
    if head == "mean":
        loss, batch["targets"] = losses.make("classification"), np.arange(2 * B)
    variables = variables_of(model, batch)
    whole = step.make_eval_step(model, loss)(variables, batch)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = stream.make_eval_step(model, loss, True, mesh, 5)(variables, batch)
    assert len(compiled(caplog)) == 1
    for name, value in whole.items():
        assert_close(found[name], value)


@ALONE
@pytest.mark.slow
def test_eight_devices():
    assert passed(__file__, "on_eight") == 6


# Commands.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in pieces, recorded, of next tokens."""
    folder = tmp_path_factory.mktemp("stream")
    inputs = np.random.default_rng(0).integers(0, WORDS, (40, L))
    np.savez(folder / "my.npz", inputs=inputs, targets=inputs)
    config = config_of("s5", steps=3, batch_size=8, eval_every=3, log_every=1, chunk=4)
    config.train.update(record=True, checkpoint_every=3)
    config.model.update(encoder="", outputs=0, vocab_size=0)
    config.data.update(name="arrays", path=str(folder / "my.npz"), validation=0.1)
    config.data.update(test=0.2)
    return folder / "run", loop.run(config, folder / "run")


def test_a_run_in_pieces(trained):
    workdir, results = trained
    rows = records.read_metrics(workdir)
    assert any(name.startswith("record/block 1") for name in rows[0])
    assert results["parallel_vs_recurrent"] < 1e-4
    run = runs.load_run(workdir)
    assert run.config.train.chunk == 4
    assert evaluate.scores(run, "test") == pytest.approx(results["test"], rel=1e-5)


def test_the_score_of_a_run_in_pieces(trained, tmp_path, capsys):
    workdir, _ = trained
    found = []
    for flags in (["--chunk", str(L)], ["--chunk", "5"]):
        assert evaluate.main(["--workdir", str(workdir), *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert "parallel_vs_recurrent" not in found[0]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    tokens = np.random.default_rng(1).integers(0, WORDS, (3, 50))
    np.savez(tmp_path / "new.npz", inputs=tokens, targets=tokens)
    command = ["--workdir", str(workdir), "--data", str(tmp_path / "new.npz")]
    for flags in (["--chunk", "50"], ["--chunk", "16"]):
        assert evaluate.main([*command, *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[3]["loss"] == pytest.approx(found[2]["loss"], rel=1e-5)
    said = refused(evaluate.main, [*command, "--chunk", "0"], capsys)
    assert "--chunk must be 1 or more tokens, got 0" in said


def test_what_reads_a_run_in_pieces_reads_in_pieces(trained, monkeypatch):
    """Unless it is told otherwise."""
    workdir, _ = trained
    run = runs.load_run(workdir)
    whole = run.config.copy_and_resolve_references()
    whole.train.chunk = 0
    expected = answers.answer(dataclasses.replace(run, config=whole))
    read, lengths = stream.pieces, []

    def pieces(*arguments):
        for piece in read(*arguments):
            lengths.append(piece["inputs"].shape[1])
            yield piece

    monkeypatch.setattr(stream, "pieces", pieces)
    found = answers.answer(run)
    np.testing.assert_array_equal(found.outputs, expected.outputs)
    assert_close(found.confidence, expected.confidence)
    evaluate.scores(run, "test")
    assert {*lengths} == {4}


def test_generation_does_not_depend_on_the_pieces(trained):
    run = runs.load_run(trained[0])
    prompt = np.random.default_rng(2).integers(0, WORDS, (2, 9))
    key = jax.random.key(5)
    given = run.model, run.variables, prompt, 11, key
    whole = generate.generate(*given)
    pieces = [*generate.tokens_in_pieces(*given, chunk=4)]
    assert [piece.shape for piece in pieces] == [(2, 4), (2, 4), (2, 3)]
    assert (np.concatenate(pieces, axis=1) == whole).all()
    # Token by token, with keys that are split all at once.
    apply = jax.jit(run.model.apply)
    logits, after = apply(run.variables, prompt, run.model.init_state(2))
    for n, one in enumerate(jax.random.split(key, 11)):
        token = jax.random.categorical(one, logits[:, -1])
        assert (whole[:, n] == token).all()
        logits, after = apply(run.variables, token[:, None], after)


def test_a_prompt_from_a_file(trained, tmp_path, capsys):
    workdir, path = str(trained[0]), tmp_path / "prompt.npy"
    words = [3, 1, 2, 5, 6]
    np.save(path, np.array(words))
    command = ["--workdir", workdir, "--count", "1", "--length", "9"]
    typed = [*command, "--prompt", " ".join(map(str, words))]
    assert generate.main(typed) == 0
    expected = capsys.readouterr().out
    out = tmp_path / "made.npy"
    read = [*command, "--prompt_file", str(path), "--chunk", "4", "--out", str(out)]
    assert generate.main(read) == 0
    assert capsys.readouterr().out == expected
    assert np.load(out).tolist() == [[int(word) for word in expected.split()]]
    assert generate.main([*read, "--count", "2"]) == 0
    made = [
        [int(w) for w in line.split()] for line in capsys.readouterr().out.splitlines()
    ]
    assert np.load(out).tolist() == made and len(made) == 2
    for flags, message in {
        ("--prompt", "1"): "prompt: must go without prompt_file",
        ("--chunk", "0"): "chunk: must be at least 1, got 0",
        (
            "--prompt_file",
            str(tmp_path / "no.npy"),
        ): "no.npy cannot be read: No such file",
    }.items():
        assert message in refused(generate.main, [*read, *flags], capsys)
    np.save(path, np.ones((2, 3)))
    said = refused(generate.main, read, capsys)
    assert "prompt_file: must be integers [L >= 1], got float64 of shape (2, 3)" in said


def test_progress_is_shown_on_a_terminal(monkeypatch, capsys):
    with stream.bar("evaluating", 2) as advance:
        advance(5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with stream.bar("evaluating", 2) as advance:
        advance(5)
        print("an answer")
    said = capsys.readouterr()
    assert "evaluating" in said.err and "1/2" in said.err and said.out == "an answer\n"


def test_what_a_layer_cannot_hold_is_refused(trained):
    run = runs.load_run(trained[0])
    config = config_of("hyena")
    model = build(config.model)
    run = dataclasses.replace(
        run, model=model, variables=variables_of(model, batch_of())
    )
    longer = dataclasses.replace(run, spec=run.spec.but(length=2 * L))
    with pytest.raises(ValueError, match=r"--chunk: inputs of shape \(1, 24\) cannot"):
        evaluate.scores(longer, "test", 4)


def test_the_page_has_the_figures_that_were_measured():
    path = tiny_run.ROOT / "train" / "bench" / "results" / "streams-cpu.json"
    rows = [streams.cells(row) for row in json.loads(path.read_text())["streams"]]
    page = (tiny_run.ROOT / "docs" / "scale.md").read_text()
    assert len(rows) == 22
    assert [row for row in rows if f"| {' | '.join(row)} |" not in page] == []


@pytest.mark.slow
def test_the_suite_over_streams_measures(monkeypatch, tmp_path):
    for name in streams.CASES:
        row = streams.measured(name, "s5", 256, 64)
        assert row["seconds"] > 0 and (row["case"], row["chunk"]) == (name, 64)
    # What is held meanwhile counts, whether or not it is given back.
    monkeypatch.setitem(streams.CASES, "hold", lambda *_: lambda: np.ones(2**25).sum())
    assert streams.measured("hold", "s5", 256, 64)["peak_bytes"] > 2**27
