"""Models of video: next frames, actions, codes, open-loop rollouts, reports."""

import json

import browser
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from configs import video
from kernels.tolerance import assert_close
from layers import FRAME_LAYERS, Sequence, build
from layers.models.video import PIECE
from train import data, loop, losses, metrics, resolve
from train.report import pages
from train.reproduce import ledger
from train.reproduce import video as video_contest
from train.video import rollout

B, L, SIDE = 2, 5, 8


def tiny(layer="conv_s5", **changed):
    """The config of a run of seconds, on frames of 8 x 8."""
    config = video.get_config(f"moving_digits,layer={layer}")
    config.data.update(length=6, side=SIDE, digit_side=4, validation=4, test=4)
    config.model.update(features=4, depth=1)
    config.model.video.depths = (4, 4)
    if "state_size" in config.model.layer_args:
        config.model.layer_args.state_size = 4
    if "heads" in config.model.layer_args:
        config.model.layer_args.heads = 2
    config.optimizer.warmup = 0
    config.train.update(steps=2, batch_size=2, eval_every=2, log_every=1)
    config.rollout.update(context=3, horizon=4, clips=3)
    config.update(changed)
    return config


def model_of(layer="conv_s5", **given):
    config = tiny(layer).model
    config.update(encoder="video", outputs=1, length=8)
    config.video.update(size=(SIDE, SIDE), channels=1)
    config.video.update({k: v for k, v in given.items() if k in config.video})
    config.update({k: v for k, v in given.items() if k not in config.video})
    return build(config)


def made(model, inputs):
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))


def clips(length=L, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(B, length, SIDE, SIDE, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    "layer",
    [
        "conv_s5",
        pytest.param("conv_lstm", marks=pytest.mark.slow),
        pytest.param("frame_attention", marks=pytest.mark.slow),
        pytest.param("full_frame_attention", marks=pytest.mark.slow),
    ],
)
def test_frame_by_frame_is_the_whole_clip(layer):
    model, frames = model_of(layer), clips()
    variables = made(model, frames)
    apply = jax.jit(model.apply)
    whole, _ = apply(variables, frames)
    state, answers = model.init_state(B), []
    for t in range(L):
        y, state = apply(variables, frames[:, t : t + 1], state)
        answers.append(y)
    assert_close(whole, jnp.concatenate(answers, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_masked_frames_change_nothing_in_training(norm):
    model, frames = model_of(norm=norm), clips()
    variables = made(model, frames)
    longer = np.concatenate([frames, clips(2, seed=1)], axis=1)
    mask = np.arange(L + 2) < np.full((B, 1), L)

    def trained(frames, sequence):
        kept = [name for name in variables if name != "params"]
        return model.apply(variables, frames, None, sequence, True, mutable=kept)

    (whole, state), statistics = jax.jit(trained)(frames, None)
    (y, masked), found = jax.jit(trained)(longer, Sequence(mask=jnp.asarray(mask)))
    assert_close((y[:, :L], masked, found), (whole, state, statistics))
    assert jnp.all(y[:, L:] == 0)


@pytest.mark.slow
def test_a_masked_frame_of_nan_reaches_no_gradient():
    model, frames = model_of(), clips() / np.float32(255)
    variables = made(model, frames)
    mask = jnp.ones((B, L), bool).at[:, 2].set(False)

    @jax.jit
    @jax.grad
    def gradients(params, frames):
        y, _ = model.apply({"params": params}, frames, None, Sequence(mask=mask))
        return jnp.sum(y**2)

    found, expected = (
        gradients(variables["params"], jnp.asarray(frames).at[:, 2].set(value))
        for value in (jnp.nan, 0.5)
    )
    assert_close(found, expected)


@pytest.mark.slow
def test_frames_in_pieces_are_the_same_frames():
    """A remainder of the last piece, and the same parameters."""
    frames = clips(PIECE + 3)
    whole, pieces = model_of(), model_of(remat=True)
    variables = made(whole, frames)
    assert_close(made(pieces, frames), variables)

    def loss(model):
        def total(variables):
            y, _ = model.apply(variables, frames, train=True)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(variables)
        # As one vector: a bias before a norm over its channel has none of its own.
        return y, jax.flatten_util.ravel_pytree(gradient)[0]

    assert_close(loss(pieces), loss(whole))


@pytest.mark.slow
def test_training_memory_of_frames_in_pieces():
    """Without pieces every frame's activations are there at once."""
    variables = made(model_of(depths=(16, 16)), clips())

    def temporary(remat, length):
        model = model_of(depths=(16, 16), remat=remat)

        @jax.jit
        @jax.grad
        def gradient(variables, frames):
            return jnp.sum(model.apply(variables, frames, train=True)[0] ** 2)

        compiled = gradient.lower(variables, jnp.asarray(clips(length))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(True, 8 * PIECE) < temporary(False, 8 * PIECE) / 3


def test_a_rollout_feeds_answers_back():
    model, context = model_of(), clips(3)
    variables = made(model, context)
    found = rollout.open_loop(model, variables, context, 4)
    seen = context.astype(np.float32) / 127.5 - 1
    # The answer at every place is to what was seen before it, answers included.
    whole = np.concatenate([seen, found[:, :-1]], axis=1)
    y, _ = jax.jit(model.apply)(variables, whole)
    assert_close(found, jnp.clip(y[:, 2:], -1, 1))


@pytest.mark.slow
def test_actions_lead_to_the_next_frame():
    frames, actions = clips(), jnp.arange(B * L).reshape(B, L) % 3
    model = model_of(actions=3)
    inputs = {"frames": frames, "actions": actions}
    variables = made(model, inputs)
    apply = jax.jit(model.apply)
    y, _ = apply(variables, inputs)
    changed = {"frames": frames, "actions": actions.at[:, 2].set(0).at[0, 2].set(1)}
    moved = jnp.any(apply(variables, changed)[0] != y, axis=(2, 3, 4))
    assert not moved[:, :2].any() and moved[:, 2:].any()
    # What is predicted from each action is what that action leads to in one call.
    found = rollout.open_loop(model, variables, frames[:, :3], 3, actions)
    seen = frames[:, :3].astype(np.float32) / 127.5 - 1
    whole = np.concatenate([seen, found[:, :-1]], axis=1)
    y, _ = apply(variables, {"frames": whole, "actions": actions})
    assert_close(found, jnp.clip(y[:, 2:], -1, 1))
    with pytest.raises(
        ValueError, match=r"^actions: .* = \(2, 6\), got shape \(2, 5\)"
    ):
        rollout.open_loop(model, variables, frames, 2, actions)
    with pytest.raises(ValueError, match=r"^horizon: must be at least 1, got 0"):
        rollout.open_loop(model, variables, frames, 0, actions)


@pytest.mark.slow
def test_codes_may_be_drawn():
    codes = np.random.default_rng(0).integers(7, size=(B, L, SIDE, SIDE))
    model = model_of(vocab_size=7)
    variables = made(model, codes)
    draws = [
        rollout.open_loop(model, variables, codes, 3, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).mean() > 0.5
    assert (draws[0][:, 1] != draws[0][:, 2]).any()
    assert draws[0].min() >= 0 and draws[0].max() < 7


def test_what_is_no_number_has_no_score():
    clips = np.zeros((2, 3, SIDE, SIDE, 1), np.uint8)
    answers = np.zeros(clips.shape, np.float32)
    answers[1, 1:, 0, 0] = np.nan
    found = rollout.Rollout(clips, clips, *rollout._shown(answers))
    scores = rollout.horizon_scores(found)
    psnr = scores["model"]["psnr"]
    assert np.isfinite(psnr[0]) and np.isnan(psnr[1:]).all()
    assert np.isfinite(scores[rollout.COPY]["psnr"]).all()


@pytest.mark.slow
def test_codes_are_classified_place_by_place():
    codes = np.random.default_rng(0).integers(7, size=(B, L, SIDE, SIDE))
    model = model_of(vocab_size=7)
    variables = made(model, codes)
    y, _ = jax.jit(model.apply)(variables, codes)
    assert y.shape == (B, L, SIDE, SIDE, 7)
    found = rollout.open_loop(model, variables, codes, 2)
    assert found.shape == (B, 2, SIDE, SIDE)
    np.testing.assert_array_equal(found[:, 0], jnp.argmax(y[:, -1], -1))
    mask = np.ones((B, L), bool)
    mask[1, 2:] = False
    batch = {"inputs": codes, "targets": codes, "mask": mask}
    loss, weight, metrics = losses.make("codes")(y, batch)
    log_p = jax.nn.log_softmax(y)[mask]
    expected = -np.take_along_axis(np.asarray(log_p), codes[mask][..., None], -1)
    assert weight == mask.sum()
    assert_close(loss, expected.mean((1, 2, 3)).sum())
    right = (np.asarray(y[mask]).argmax(-1) == codes[mask]).mean((1, 2)).sum()
    assert_close(metrics["accuracy"], right)


def test_the_loss_of_frames():
    frames = clips()
    y = jax.random.normal(jax.random.key(0), frames.shape)
    mask = np.ones((B, L), bool)
    mask[0, 3:] = False
    batch = {"targets": frames, "mask": mask}
    y = jnp.where(mask[..., None, None, None], y, jnp.nan)
    loss, weight, metrics = losses.make("frames")(y, batch)
    wrong = (np.asarray(y) - (frames / 127.5 - 1))[mask]
    assert weight == mask.sum()
    assert_close(metrics["mse"], np.float32((wrong**2).mean((1, 2, 3)).sum()))
    total = (wrong**2 / 2 + np.abs(wrong) / 2).mean((1, 2, 3)).sum()
    assert_close(loss, np.float32(total))
    with pytest.raises(ValueError, match=r"outputs must be frames .* like the targets"):
        losses.make("frames")(y[:, :, :4], batch)


@pytest.mark.parametrize(
    ("given", "inputs", "message"),
    [
        ({}, clips()[:, :, :4], r"^inputs: frames must be \[B, L, 8, 8, 1\], got"),
        ({"vocab_size": 7}, clips()[..., 0] / 255, r"^inputs: codes must be integers"),
        ({}, clips().astype(np.int32), r"^inputs: pixels must be uint8 or floats"),
        ({"actions": 3}, clips(), r"^actions: must be .* got frames alone"),
        ({"actions": 3}, {"frames": clips()}, r"^actions: must .* got \['frames'\]"),
        ({}, {"frames": clips(), "actions": clips()}, r"^inputs: must be frames alone"),
        (
            {"actions": 3},
            {"frames": clips(), "actions": np.zeros((B, L - 1), int)},
            r"^actions: must be integers \[B, L\] = \(2, 5\), got",
        ),
        ({"size": (6, 7)}, clips(), r"^video.size: must .* of 2 .* got \(6, 7\)"),
        ({"depths": ()}, clips(), r"^video.depths: must be"),
        ({"layer": "s4d", "layer_args": {}}, clips(), r"^layer: must read frames .* '"),
    ],
)
def test_what_does_not_fit_is_named(given, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model_of(**given).init, jax.random.key(0), inputs)


def test_a_layer_over_frames_reads_no_tokens():
    config = tiny().model
    config.update(encoder="scalar", outputs=1, length=8)
    with pytest.raises(ValueError, match=r"^layer: must read tokens .*, got 'conv_s5'"):
        build(config)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_context_longer_than_the_clip_stops_before_training(tmp_path):
    path = npz(
        tmp_path / "my.npz", frames=np.concatenate([clips(6, i) for i in range(5)])
    )
    config = video.get_config(f"clips,path={path}")
    config.rollout.update(context=5, horizon=4)
    message = r"^rollout.context \+ rollout.horizon is 5 \+ 4 frames: .*length"
    with pytest.raises(ValueError, match=message):
        loop.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_context_beyond_that_of_attention_stops_before_training(tmp_path):
    config = tiny("frame_attention")
    config.rollout.context = 6
    with pytest.raises(ValueError, match=r"^rollout.context is 6 frames, .* got 5$"):
        loop.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_codec_that_is_none_stops_before_training(tmp_path):
    codes = np.arange(5 * 6 * 16).reshape(5, 6, 4, 4) % 7
    path = npz(tmp_path / "codes.npz", codes=codes)
    config = video.get_config(f"clips,stage=codes,path={path}")
    config.data.codec = str(tmp_path / "vq")
    with pytest.raises(ValueError, match=r"^data.codec: workdir must be .*no config"):
        loop.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layer", FRAME_LAYERS)
def test_every_layer_trains_in_bfloat16(layer, tmp_path):
    config = tiny(layer)
    config.model.dtype = "bfloat16"
    config.train.steps = 4
    found = loop.run(config, tmp_path)
    assert np.isfinite(found["test"]["loss"])


@pytest.mark.slow
def test_a_run_ends_in_rollouts_and_a_report(tmp_path, capsys):
    found = loop.run(tiny(), tmp_path)
    assert found["rollout"]["context"] == 3 and found["rollout"]["clips"] == 3
    written = json.loads((tmp_path / rollout.JSON).read_text())
    assert written == found["rollout"]
    for name in ("model", rollout.COPY):
        for metric in ("psnr", "ssim", "mse"):
            assert len(written["scores"][name][metric]) == 4
    assert (tmp_path / rollout.PNG).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / rollout.GIF).read_bytes().startswith(b"GIF8")
    page = pages.write(tmp_path).read_text()
    # Of each clip the context, and truth and prediction of what follows; a film.
    assert page.count("data:image/png") == rollout.SHOWN * (3 + 2 * 4)
    assert page.count("data:image/gif") == 1 and "frames ahead" in page
    capsys.readouterr()
    arguments = ["--workdir", str(tmp_path), "--horizon", "2", "--clips", "2"]
    assert rollout.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "fvd: FVD needs" in shown and "lpips: LPIPS needs" in shown
    written = json.loads((tmp_path / rollout.JSON).read_text())
    assert len(written["scores"]) == 2 and written["against"] == "the true frames"
    psnr = written["scores"]["model"]["psnr"]
    assert written["mean"]["model"]["psnr"] == pytest.approx(np.mean(psnr))
    with pytest.raises(SystemExit):
        rollout.main([*arguments, "--sample", "1"])
    assert "--sample must be a seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rollout.main(["--workdir", str(tmp_path), "--horizon", "-1"])
    assert "rollout.horizon must be 0 or more, got -1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_of_rollouts_fits_into_wide_and_narrow_windows(tmp_path):
    loop.run(tiny(), tmp_path)
    browser.fits(pages.write(tmp_path))


@pytest.mark.slow
def test_codes_of_an_autoencoder_train_a_model_that_is_shown_as_pixels(tmp_path):
    from train.video import codec

    config = video.get_config("moving_digits,stage=autoencoder")
    config.data.update(length=4, side=SIDE, digit_side=4, validation=4, test=4)
    config.model.layer_args.update(depths=(4,), codes=8, code_features=2)
    config.optimizer.warmup = 0
    config.train.update(steps=2, batch_size=2, eval_every=2, log_every=1)
    loop.run(config, tmp_path / "vq")
    pages.write(tmp_path / "vq")
    out = tmp_path / "codes.npz"
    arguments = ["--workdir", str(tmp_path / "vq"), "--clips", "6", "--length", "8"]
    assert codec.main([*arguments, "--out", str(out)]) == 0
    config = video.get_config(f"clips,stage=codes,path={out}")
    config.data.update(vocab_size=8, codec=str(tmp_path / "vq"))
    config.model.update(features=4, depth=1)
    config.model.video.depths = (4,)
    config.optimizer.warmup = 0
    config.train.update(steps=2, batch_size=2, eval_every=2, log_every=1)
    found = loop.run(config, tmp_path / "run")
    assert "psnr" in found["rollout"]["scores"]["model"]
    assert (tmp_path / "run" / rollout.GIF).exists()


def test_actions_that_the_config_conditions_on_must_be_there(tmp_path):
    path = npz(tmp_path / "my.npz", frames=np.concatenate([clips(6)] * 5))
    config = video.get_config(f"clips,path={path}")
    config.lock()  # as on the command line: the key must be there
    config.data.actions = 3
    with pytest.raises(ValueError, match=r"my\.npz: actions is missing, but data\.ac"):
        loop.run(config, tmp_path / "run")


def test_clips_without_a_length_are_rolled_out_by_halves(tmp_path):
    path = npz(
        tmp_path / "my.npz", frames=np.concatenate([clips(6, i) for i in range(5)])
    )
    config = video.get_config(f"clips,path={path}")
    spec = data.load(config.data).spec
    assert rollout.lengths(config.rollout, spec) == (3, 3)


def test_actions_that_the_dataset_does_not_have_are_refused(tmp_path):
    path = npz(tmp_path / "my.npz", frames=np.concatenate([clips(6)] * 5))
    config = video.get_config(f"clips,path={path}")
    config.model.video.actions = 3
    with pytest.raises(ValueError, match=r"^model.video.actions must be 0, what the"):
        loop.run(config, tmp_path / "run")
    config.model.video.update(actions=0, size=(SIDE, SIDE))
    assert (
        resolve.complete(config, data.load(config.data).spec).model.video.actions == 0
    )


def rolled(psnr, copied=(9.0,) * 30):
    def scores(values):
        return {"psnr": list(values), "ssim": [0.5] * 30, "mse": [0.1] * 30}

    rollouts = {"model": scores(psnr), rollout.COPY: scores(copied)}
    return {"scores": rollouts, "clips": 4, "split": "test", "context": 10}


@pytest.mark.slow
def test_the_table_is_of_all_clips_to_test(tmp_path):
    found = loop.run(tiny(), tmp_path)
    assert found["rollout"]["clips"] == 3
    whole = video_contest.rolled(tmp_path, found["step"])
    assert whole["clips"] == 4
    written = tmp_path / rollout.JSON
    before = written.stat().st_mtime_ns
    assert video_contest.rolled(tmp_path, found["step"]) == whole
    assert written.stat().st_mtime_ns == before


def test_others_train_for_as_long_as_the_first(tmp_path, monkeypatch):
    speed = {"conv_s5": 2.0, "conv_lstm": 0.5}
    steps = {}

    def trained(config, folder):
        layer = config.model.layer
        steps[folder.name] = config.train.steps
        folder.mkdir()
        row = {"step": 1, "split": "train", "steps_per_second": speed[layer]}
        (folder / metrics.FILE).write_text(json.dumps(row) + "\n")
        return {"step": config.train.steps, "seconds": 5.0}

    def rolled_out(folder, step):
        layer, seed = folder.name.split("-")[1:]
        if layer != "conv_s5":
            return rolled([8.0] * 30)
        return rolled([8.0] * 3 + [10.0] * 27 if int(seed) else [10.0] * 30)

    monkeypatch.setattr(ledger, "trained", trained)
    monkeypatch.setattr(video_contest, "rolled", rolled_out)
    text = video_contest.table("moving_digits", (), (0, 1), tmp_path)
    own = video.get_config().train.steps
    assert steps["moving_digits-conv_s5-1"] == own
    assert steps["moving_digits-conv_lstm-trial"] == video_contest.TRIAL
    assert steps["moving_digits-conv_lstm-0"] == own / 4
    rows = text.splitlines()
    assert "| +4 |" in rows[2] and "| never |" in rows[3]
    assert rows[4].startswith(f"| {rollout.COPY} |") and "9.00" in rows[4]
