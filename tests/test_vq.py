"""The VQ autoencoder, its loss, and clips as codes."""

import errno
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs import common
from layers import build
from layers.models import precision
from layers.models.vq import VQ, Codebook, Decoder, Encoder, Reconstruction, moved
from ssm.sequence import Sequence
from train import checkpoint, data, loop, losses, runs
from train.video import codec

MODEL = VQ(2, (3,), codes=5, code_features=3, blocks=0)
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 2), np.uint8)


@functools.cache
def variables():
    found = jax.jit(MODEL.init)({"params": jax.random.key(0)}, CLIPS)
    return meta.unbox(found)


@functools.partial(jax.jit, static_argnames="model")
def trained(variables, inputs, sequence=None, model=MODEL):
    """Outputs and buffers of a call that may change them."""
    (outputs, _), changed = model.apply(
        variables,
        inputs,
        sequence=sequence,
        train=True,
        rngs={"dropout": jax.random.key(1)},
        mutable=["buffers"],
    )
    return outputs, changed["buffers"]


def test_shapes_of_clips_and_images():
    apply = jax.jit(MODEL.apply, static_argnames="method")
    codes = apply(variables(), CLIPS, method="encode")
    assert codes.shape == (2, 3, 2, 3) and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < 5
    frames = apply(variables(), codes, method="decode")
    assert frames.shape == CLIPS.shape and frames.dtype == jnp.float32
    outputs, state = apply(variables(), {"frames": CLIPS, "actions": None})
    assert state is None
    np.testing.assert_allclose(outputs.frames, frames, atol=1e-5)
    counts = (codes[..., None] == np.arange(5)).mean((2, 3))
    np.testing.assert_allclose(outputs.usage, counts, rtol=1e-6)
    # Deeper, and images in place of clips.
    deep, images = VQ(3, (3, 4), codes=7), jnp.zeros((2, 8, 12, 3), jnp.uint8)
    key = {"params": jax.random.key(0)}
    (outputs, _), _ = jax.eval_shape(deep.init_with_output, key, images)
    shapes = [output.shape for output in outputs]
    assert shapes == [images.shape, (2,), (2, 7)]


def test_straight_through_gradient_is_the_formula():
    """d/dz is what the decoder sends to q, plus 2 beta (z - e) / n; nothing else."""
    with jax.enable_x64(True):
        model = MODEL.clone(beta=0.7, dtype=jnp.float64)
        given = precision.cast(variables(), precision.get("float64"))
        loss_fn = losses.make("autoencoder")
        batch = {"inputs": CLIPS, "mask": np.ones((2, 3), bool)}

        @jax.jit
        @jax.grad
        def gradient(params):
            outputs, _ = model.apply({**given, "params": params}, CLIPS)
            return loss_fn(outputs, batch)[0]

        @jax.jit
        def formula(params):
            x = CLIPS / 127.5 - 1
            encoder = Encoder((3,), 3, 0, jnp.float64)
            decoder = Decoder((3,), 2, 0, jnp.float64)
            z, back = jax.vjp(
                lambda p: encoder.apply({"params": p}, x), params["encoder"]
            )
            codebook = given["buffers"]["codebook"]
            distance = ((z[..., None, :] - codebook) ** 2).sum(-1)
            e = codebook[distance.argmin(-1)]

            def reconstruction(params, q):
                wrong = decoder.apply({"params": params}, q) - x
                return ((wrong**2 + jnp.abs(wrong)) / 2).mean((2, 3, 4)).sum()

            to_decoder, to_q = jax.grad(reconstruction, (0, 1))(params["decoder"], e)
            (to_encoder,) = back(to_q + 0.7 * 2 * (z - e) / np.prod(z.shape[2:]))
            return {"encoder": to_encoder, "decoder": to_decoder}

        expected = formula(given["params"])
        jax.tree.map(  # the loss is float32
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            gradient(given["params"]),
            expected,
        )
        sizes = [np.abs(g).max() for g in jax.tree.leaves(expected["encoder"])]
        assert min(sizes) > 1e-3


def test_moving_averages_equal_those_of_numpy():
    rng = np.random.default_rng(1)
    K, D, M, decay = 4, 3, 30, 0.8
    start = rng.normal(size=(K, D))
    with jax.enable_x64(True):
        book = Codebook(start, np.zeros(K), np.zeros((K, D)))
        update = jax.jit(moved)
        codes, N, m = start.copy(), np.zeros(K), np.zeros((K, D))
        for _ in range(3):
            z, k = rng.normal(size=(M, D)), rng.integers(0, K - 1, M)
            chosen = np.eye(K)[k]
            chosen[-5:], z[-5:] = 0, 7.0  # padding
            book = update(book, z, chosen, np.ones(M), decay, 0.0, jax.random.key(0))
            for j in range(K):
                mine = z[:-5][k[:-5] == j]
                N[j] = decay * N[j] + (1 - decay) * len(mine)
                m[j] = decay * m[j] + (1 - decay) * mine.sum(0)
                if N[j]:
                    codes[j] = m[j] / N[j]
        for found, expected in zip(book, (codes, N, m), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(codes[-1], start[-1])  # never chosen


def test_dead_codes_begin_anew_where_codes_are_missing():
    z = np.array([[0.0, 0.0], [5.0, 5.0], [1.0, 0.0], [9.0, 9.0]], np.float32)
    chosen = np.eye(3, dtype=np.float32)[[0, 0, 0, 0]]
    chosen[3] = 0  # padding, whose error must not count
    error = np.array([0, 50, 0, 1e9], np.float32)
    book = Codebook(
        np.array([[0.3, 1.7], [8.0, 8.0], [7.0, 7.0]], np.float32),
        np.array([10.0, 0.5, 4.0], np.float32),
        np.array([[3.0, 17.0], [4.0, 4.0], [28.0, 28.0]], np.float32),
    )
    new = jax.jit(moved)(book, z, chosen, error, 0.9, 2.0, jax.random.key(0))
    # 0 is used, 2 is not but was a while ago, 1 is dead.
    np.testing.assert_allclose(new.codes[1], [5, 5])
    assert new.counts[1] == 2 and (new.sums[1] == 10).all()
    np.testing.assert_allclose(new.counts[::2], [0.9 * 10 + 0.1 * 3, 3.6], rtol=1e-6)
    np.testing.assert_allclose(new.codes[0], (0.9 * book.sums[0] + [0.6, 0.5]) / 9.3)
    np.testing.assert_allclose(new.codes[2], [7, 7], rtol=1e-6)
    # Draws follow the error, and go on where every vector lies on its code.
    many = Codebook(*(np.zeros(s, np.float32) for s in ((4000, 2), 4000, (4000, 2))))
    chosen = np.eye(4000, dtype=np.float32)[[0, 0, 0]]
    for error, shares in (([1, 3, 0], [0.25, 0.75, 0]), ([0, 0, 0], [1 / 3] * 3)):
        error = np.array(error, np.float32)
        new = jax.jit(moved)(many, z[:3], chosen, error, 0.9, 1.0, jax.random.key(2))
        found = [(new.codes == one).all(1).mean() for one in z[:3]]
        np.testing.assert_allclose(found, shares, atol=0.03)


def test_buffers_change_only_in_training():
    first = variables()["buffers"]
    outputs, changed = trained(variables(), CLIPS)
    assert (changed["counts"] > 0).all()  # restarts need no history
    assert (changed["codebook"] != first["codebook"]).any()
    apply = jax.jit(MODEL.apply, static_argnames=("train", "mutable"))
    (again, _), kept = apply(variables(), CLIPS, mutable=("buffers",))
    jax.tree.map(np.testing.assert_array_equal, kept["buffers"], first)
    np.testing.assert_allclose(again.frames, outputs.frames, atol=1e-5)
    # Frozen: nothing is drawn either.
    jax.eval_shape(functools.partial(MODEL.apply, train=True), variables(), CLIPS)


def test_masked_frames_move_no_code_and_answer_zero():
    model = MODEL.clone(restart=0.0)
    mask = np.array([[True, True, False], [False, True, True]])
    found, buffers = trained(variables(), CLIPS, Sequence(mask=mask), model)
    for output in found:
        assert (np.asarray(output)[~mask] == 0).all()
    real = CLIPS[mask].reshape(2, 2, *CLIPS.shape[2:])
    expected, alone = trained(variables(), real, None, model)
    for output, one in zip(found, expected, strict=True):
        one = one.reshape(-1, *one.shape[2:])
        np.testing.assert_allclose(np.asarray(output)[mask], one, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        buffers,
        alone,
    )


def test_loss_and_perplexity_of_a_known_assignment():
    loss_fn = jax.jit(losses.make("autoencoder"))
    frames = np.full((2, 2, 4, 4, 1), 255, np.uint8)  # x = 1
    usage = np.zeros((2, 2, 6), np.float32)
    usage[0, 0, :2], usage[0, 1, 2:4], usage[1, 0, 4] = 0.5, 0.5, 1
    outputs = np.full(frames.shape, 1.5, np.float32)
    commitment = np.full((2, 2), 0.25, np.float32)
    mask = np.array([[True, True], [False, False]])
    outputs[1], commitment[1] = np.nan, np.nan  # padding
    batch = {"inputs": frames, "mask": mask}
    total, weight, sums = loss_fn(Reconstruction(outputs, commitment, usage), batch)
    means = {name: float(value) / 2 for name, value in sums.items()}
    assert weight == 2 and np.isclose(total / 2, 0.5 * 0.25 + 0.5 * 0.5 + 0.25)
    expected = {"mse": 0.25, "commitment": 0.25, "perplexity": 4, "usage": 4 / 6}
    assert means == pytest.approx(expected, rel=1e-6)
    batch["mask"] = np.array([[False, False], [True, False]])
    done = Reconstruction(np.ones(frames.shape), np.zeros((2, 2)), usage)
    total, _, sums = loss_fn(done, batch)
    assert abs(total) < 1e-6 and sums["perplexity"] == 1  # one code only
    with pytest.raises(ValueError, match=r"be a Reconstruction.*vq gives, got \(2"):
        loss_fn(np.zeros((2, 3)), batch)


@pytest.mark.parametrize(
    ("fields", "frames", "message"),
    [
        ({}, CLIPS[..., :1], r"channels: must be 1, .* \(2, 3, 4, 6, 1\), got 2"),
        ({"depths": (3, 4)}, CLIPS, "depths: .* must .* of 4 for 2 .* 4, 6, 2"),
        ({}, CLIPS.astype(np.float32), "inputs: must be uint8 .* got float32"),
        ({}, CLIPS[0, 0], "inputs: must be uint8"),
        ({"depths": ()}, CLIPS, "depths: must be channels"),
        ({"codes": 0}, CLIPS, "codes: must be at least 1"),
        ({"beta": -1.0}, CLIPS, "beta: must be 0 or more"),
        ({"decay": 1.0}, CLIPS, r"decay: must lie in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(fields, frames, message):
    model = MODEL.clone(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, {"params": jax.random.key(0)}, frames)


def test_there_is_no_state_and_codes_are_integers():
    with pytest.raises(ValueError, match="an autoencoder of single frames has none"):
        MODEL.apply(variables(), CLIPS, state=0)
    with pytest.raises(ValueError, match="no recurrent mode"):
        MODEL.init_state(1)
    with pytest.raises(ValueError, match="codes: must be integers"):
        MODEL.apply(variables(), jnp.zeros((1, 2, 3)), method="decode")


def config():
    """A run of seconds; its frames are 8 x 8, its grids 4 x 4."""
    result = common.base()
    result.data.update(name="moving_digits", length=4, side=8, digit_side=4)
    result.data.update(digits=1, train=40, validation=3, test=3, reconstruct=True)
    result.model.update(layer="vq", layer_args=dict(depths=(4,), codes=7))
    result.train.update(steps=2, batch_size=4, eval_every=2, checkpoint_every=2)
    return result


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a finished run."""
    folder = tmp_path_factory.mktemp("vq")
    results = loop.run(config(), folder)
    assert set(results["test"]) >= {"mse", "perplexity", "usage"}
    assert results["best"]["validation"]["mse"] > 0
    return folder


def test_the_dataset_clips_reads_what_the_codec_writes(workdir, tmp_path, capsys):
    out = tmp_path / "clips.npz"
    command = ["--workdir", str(workdir), "--clips", "20", "--out", str(out)]
    assert codec.main(command) == 0
    assert "26 clips of 7 codes, (4, 4, 4)" in capsys.readouterr().out
    with np.load(out) as file:
        codes, split = file["codes"], file["split"]
    assert codes.shape == (26, 4, 4, 4) and codes.dtype == np.int32
    names, counts = np.unique(split, return_counts=True)
    assert dict(zip(names, counts, strict=True)) == dict(test=3, train=20, validation=3)
    run = runs.load_run(workdir)
    clips = np.stack([run.dataset.sources["test"][i]["frames"] for i in range(3)])
    expected = run.model.apply(run.variables, clips, method="encode")
    np.testing.assert_array_equal(codes[split == "test"], expected)
    read = data.load(dict(name="clips", path=str(out), vocab_size=7))
    assert read.spec.outputs == 7 and read.num_examples("train") == 20
    batch = next(iter(read.evaluation("test", 3)))
    np.testing.assert_array_equal(batch["targets"], expected[:, 1:])


@pytest.mark.slow
def test_one_split_of_longer_clips(workdir, tmp_path):
    out = str(tmp_path / "clips.npz")
    command = ["--workdir", str(workdir), "--split", "test", "--length", "6"]
    assert codec.main([*command, "--out", out]) == 0
    with np.load(out) as file:
        assert file["codes"].shape == (3, 6, 4, 4) and set(file["split"]) == {"test"}


@pytest.mark.slow
def test_actions_are_kept(workdir, tmp_path):
    rng = np.random.default_rng(0)
    path = str(tmp_path / "frames.npz")
    actions, split = rng.integers(0, 3, (5, 4)), ["train"] * 4 + ["test"]
    shown = rng.integers(0, 256, (5, 4, 8, 8, 1), np.uint8)
    np.savez(path, frames=shown, actions=actions, split=split)
    run = runs.load_run(workdir)
    run = run.on(data.load(dict(name="clips", path=path)))
    arrays = codec.encode(run, "train", 100)
    assert arrays["codes"].shape == (4, 4, 4, 4)
    np.testing.assert_array_equal(arrays["actions"][:, 1:], actions[:4, 1:])


def test_codec_shows_codes_as_pixels(workdir):
    decode = codec.load_codec(workdir)
    run = runs.load_run(workdir)
    codes = np.random.default_rng(0).integers(0, 7, (2, 3, 4, 4))
    pixels = decode(codes)
    assert pixels.shape == (2, 3, 8, 8, 1) and pixels.dtype == np.uint8
    exact = run.model.apply(run.variables, codes, method="decode")
    exact = 127.5 * (np.asarray(exact, np.float64) + 1)
    assert np.abs(pixels - exact.clip(0, 255)).max() <= 0.5001
    np.testing.assert_array_equal(decode(codes[:, 0]), pixels[:, 0])
    with pytest.raises(ValueError, match=r"codes: must lie in \[0, 7\)"):
        decode(codes + 1)
    with pytest.raises(ValueError, match="has 7 codes, but 8 are to be shown"):
        codec.load_codec(workdir, codes=8)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "clips.npz"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(ValueError, match=r"out: .*clips\.npz cannot .* No space left"):
        codec.write(path, {"codes": np.zeros(3)})
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "clips.npy"], "out: must be an .npz file in a folder that exists"),
        (["--out", "nowhere/clips.npz"], "out: must be an .npz file in a folder"),
        (["--split", "tests"], "split must be one of"),
        (["--clips", "0"], "clips: must be at least 1"),
        (["--workdir", "nowhere"], "workdir must be that of a run"),
    ],
)
def test_codec_says_what_is_wrong(workdir, tmp_path, capsys, arguments, message):
    command = ["--workdir", str(workdir), "--out", str(tmp_path / "clips.npz")]
    with pytest.raises(SystemExit, match="2"):
        codec.main([*command, *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_frames_are_reconstructed_and_only_known_fields_taken():
    with pytest.raises(ValueError, match=r"data\.reconstruct is for frames .*'digits'"):
        data.load(dict(name="digits", reconstruct=True))
    model = {**config().model.to_dict(), "outputs": 1}
    assert build({**model, "layer_args": {"depths": [4]}}) == VQ(1, (4,))
    with pytest.raises(
        ValueError,
        match=r"layer_args: must be among .*'depths'.* for vq, got \['depth'\]",
    ):
        build({**model, "layer_args": {"depth": 2}})
