import io
import sys
import types

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from train.draw import markup
from train.video import metrics as video_metrics
from train.video import pictures

RNG = np.random.default_rng(0)
B, T, SIDE = 2, 3, 16
TRUTH = RNG.integers(256, size=(B, T, SIDE, SIDE, 1), dtype=np.uint8)
PREDICTION = np.clip(TRUTH / 255 + 0.1 * RNG.normal(size=TRUTH.shape), 0, 1)
PREDICTION = PREDICTION.astype(np.float32)
CONTEXT = RNG.integers(256, size=(B, 5, SIDE, SIDE, 1), dtype=np.uint8)


def slow_ssim(a, b):
    """Of two grey frames, by the paper's formula and another library's filter."""

    def mean(x):
        blurred = ndimage.gaussian_filter(x, 1.5, radius=5)
        return blurred[5:-5, 5:-5]

    m, n = mean(a), mean(b)
    c1, c2 = 0.01**2, 0.03**2
    covariance = mean(a * b) - m * n
    variances = mean(a * a) - m**2 + mean(b * b) - n**2
    top = (2 * m * n + c1) * (2 * covariance + c2)
    return (top / ((m**2 + n**2 + c1) * (variances + c2))).mean()


def test_scores_of_every_frame():
    scores = video_metrics.frame_metrics(TRUTH, PREDICTION)
    assert {k: v.shape for k, v in scores.items()} == dict.fromkeys(
        ("mse", "psnr", "ssim"), (B, T)
    )
    error = np.mean((TRUTH / 255 - PREDICTION) ** 2, axis=(2, 3, 4))
    np.testing.assert_allclose(scores["mse"], error, rtol=1e-5)
    np.testing.assert_allclose(scores["psnr"], -10 * np.log10(error), rtol=1e-5)
    expected = [
        [
            slow_ssim(TRUTH[b, t, ..., 0] / 255, PREDICTION[b, t, ..., 0])
            for t in range(T)
        ]
        for b in range(B)
    ]
    np.testing.assert_allclose(scores["ssim"], expected, rtol=1e-4)


def test_scores_do_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    whole = video_metrics.frame_metrics(TRUTH, PREDICTION)
    monkeypatch.setattr(video_metrics, "PART", 4)  # of six frames
    for name, score in video_metrics.frame_metrics(TRUTH, PREDICTION).items():
        np.testing.assert_allclose(score, whole[name], rtol=1e-6)


def test_an_exact_copy_has_the_cap_and_no_other_frame_does():
    large = np.zeros((1, 1, 128, 128, 3), np.uint8)
    other = large.copy()
    other[0, 0, 3, 5, 1] = 1  # as near as 8 bits come
    exact = video_metrics.frame_metrics(large, large)
    near = video_metrics.frame_metrics(large, other)
    assert exact["psnr"] == video_metrics.PSNR_CAP and exact["ssim"] == 1
    assert 90 < near["psnr"] < video_metrics.PSNR_CAP


def test_a_prediction_that_is_no_number_is_scored_so():
    broken = np.full_like(PREDICTION, np.nan)
    assert np.isnan(video_metrics.frame_metrics(TRUTH, broken)["psnr"]).all()


def test_copying_the_last_frame():
    copied = video_metrics.copy_last(CONTEXT, 4)
    assert copied.shape == (B, 4, SIDE, SIDE, 1)
    assert (copied == CONTEXT[:, -1:]).all()
    with pytest.raises(ValueError, match="horizon must be 1 or more, got 0"):
        video_metrics.copy_last(CONTEXT, 0)
    with pytest.raises(ValueError, match=r"context must be \[B, T, ...\]"):
        video_metrics.copy_last(CONTEXT[:, :0], 1)


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        (TRUTH, PREDICTION[:, :2], r"must have the shape of truth, .* got \(2, 2, 16"),
        (TRUTH[0], PREDICTION[0], r"truth must be \[B, T, h, w, C\], got shape \(3,"),
        (TRUTH, 2 * PREDICTION - 1, r"prediction must be uint8 or lie in \[0, 1\], it"),
        (TRUTH, TRUTH.astype(int), "prediction must be uint8 or floating, got int64"),
    ],
    ids=["shape", "rank", "range", "dtype"],
)
def test_frames_that_do_not_fit_are_named(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        video_metrics.frame_metrics(truth, prediction)


def test_frechet_distance_of_known_gaussians():
    n, F = 400_000, 3
    deviations = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    turn, _ = np.linalg.qr(RNG.normal(size=(F, F)))
    rows = [(RNG.normal(size=(n, F)) * s) @ turn for s in deviations]
    shift = np.array([1.0, -2.0, 0.5])
    # With the same axes: |m|^2 + sum of (s_a - s_b)^2.
    expected = shift @ shift + np.sum((deviations[0] - deviations[1]) ** 2)
    found = video_metrics.frechet(rows[0], rows[1] + shift)
    assert abs(found - expected) < 0.05
    few = RNG.normal(size=(5, 40))  # a covariance that cannot be inverted
    assert abs(video_metrics.frechet(few, few)) < 1e-9
    # One feature: (m_a - m_b)^2 + (s_a - s_b)^2 exactly, whatever the order.
    a, b = RNG.normal(size=(9, 1)), 3 * RNG.normal(size=(7, 1)) + 1
    by_hand = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    for pair in ((a, b), (b, a)):
        np.testing.assert_allclose(video_metrics.frechet(*pair), by_hand, rtol=1e-9)


def test_fvd_and_lpips_with_injected_networks(monkeypatch):
    sizes = []
    monkeypatch.setattr(video_metrics, "SHOWN", 8 * T + 2)

    def features(videos):
        assert videos.shape[1:] == (T, SIDE, SIDE, 3) and videos.dtype == np.float32
        sizes.append(len(videos))
        return videos.mean(axis=(2, 3, 4))

    truth = RNG.integers(256, size=(11, T, SIDE, SIDE, 1), dtype=np.uint8)
    darker = truth // 2
    found = video_metrics.fvd(truth, darker, features)
    means = [(x / 255).mean(axis=(2, 3, 4)) for x in (truth, darker)]
    np.testing.assert_allclose(found, video_metrics.frechet(*means), rtol=1e-3)
    assert sizes == [8, 3, 8, 3]

    def distances(a, b):
        assert len(a) <= 8 * T + 2
        return np.abs(a - b).mean(axis=(1, 2, 3))

    found = video_metrics.lpips(truth, darker, distances)
    expected = np.abs(truth / 255 - darker / 255).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_a_network_metric_lacks_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(video_metrics.importlib.util, "find_spec", lambda name: None)
    for metric, function in (
        ("FVD", video_metrics.fvd),
        ("LPIPS", video_metrics.lpips),
    ):
        said = video_metrics.unavailable(metric, "")
        assert said.startswith(
            f"{metric} needs the TorchScript file of a network (none"
        )
        assert "pip install torch" in said and "https://" in said
        long = np.repeat(TRUTH, 4, axis=1)
        with pytest.raises(ValueError, match=f"{metric} needs .* no file 'none.pt'"):
            function(long, long, "none.pt")
    path = tmp_path / "i3d.pt"
    path.write_bytes(b"")
    assert video_metrics.unavailable("FVD", str(path)).startswith("FVD needs PyTorch")
    monkeypatch.setattr(video_metrics.importlib.util, "find_spec", lambda name: name)
    assert video_metrics.unavailable("FVD", str(path)) == ""
    with pytest.raises(ValueError, match=r"truth: must be clips of 10 .*, got 3"):
        video_metrics.fvd(TRUTH, TRUTH, str(path))
    with pytest.raises(ValueError, match=r"truth: must be 2 clips or more .*, got 1"):
        video_metrics.fvd(TRUTH[:1], TRUTH[:1], str(path))
    two = np.repeat(TRUTH, 2, axis=-1)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        video_metrics.lpips(two, two, str(path))


def test_networks_are_shown_what_they_expect(tmp_path, monkeypatch):
    """With a stand-in for torch, which is no dependency: only what is passed on."""

    class Tensor(np.ndarray):
        def numpy(self):
            return np.asarray(self)

    class Network:
        def eval(self):
            return self

        def __call__(self, *tensors, **options):
            if options:
                assert options == dict(rescale=True, resize=True, return_features=True)
                (videos,) = tensors
                assert videos.shape[1:] == (3, 12, SIDE, SIDE) and videos.max() == 255
                return videos.mean(axis=(2, 3, 4))
            a, b = tensors
            assert a.shape[1:] == (3, SIDE, SIDE) and (a.min(), a.max()) == (-1, 1)
            return np.abs(a - b).mean(axis=(1, 2, 3))[:, None, None, None]

    class no_grad:
        __enter__ = __exit__ = lambda *_: None

    def load(path, map_location):
        return Network()

    torch = types.ModuleType("torch")
    torch.no_grad, torch.jit = no_grad, types.SimpleNamespace(load=load)
    torch.from_numpy = lambda array: array.view(Tensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(video_metrics.importlib.util, "find_spec", lambda name: name)
    path = tmp_path / "network.pt"
    path.write_bytes(b"")
    truth = np.repeat(TRUTH, 4, axis=1)
    truth[:, :, 0, :2, 0] = [0, 255]
    assert abs(video_metrics.fvd(truth, truth, str(path))) < 1e-6
    found = video_metrics.lpips(truth, 255 - truth, str(path))
    expected = 2 * np.abs(truth / 255 - (255 - truth) / 255).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_film_shows_the_context_and_then_both():
    data = pictures.gif(CONTEXT[0], TRUTH[0], PREDICTION[0])
    film = Image.open(io.BytesIO(data))
    assert (film.format, film.n_frames) == ("GIF", 5 + T)
    scale = pictures.FILM_SIDE // SIDE
    for t, right in ((0, CONTEXT[0, 0]), (5, 255 * PREDICTION[0, 0])):
        film.seek(t)
        frame = np.asarray(film.convert("RGB")).astype(float)[-SIDE * scale :]
        left = CONTEXT[0, 0] if t < 5 else TRUTH[0, 0]
        halves = frame[:, : SIDE * scale], frame[:, -SIDE * scale :]
        for half, expected in zip(halves, (left, right), strict=True):
            assert np.abs(half[::scale, ::scale] - expected).mean() < 4  # its palette
    long = np.repeat(TRUTH[0], 100, axis=0)
    long[:, 0, 0, 0] = np.arange(300) % 256
    film = Image.open(io.BytesIO(pictures.gif(long, long, long)))
    assert film.n_frames == pictures.FILM_CONTEXT + pictures.FILM_HORIZON


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_is_a_picture_for_the_page(channels):
    truth, prediction, context = (
        np.repeat(x[:1], channels, axis=-1) for x in (TRUTH, PREDICTION, CONTEXT)
    )
    data = pictures.contact_sheet(context, truth, prediction)
    sheet = Image.open(io.BytesIO(data))
    assert sheet.format == "PNG" and sheet.width == round(9.6 * 120)
    assert pictures.contact_sheet(context, truth, prediction) == data
    other = pictures.contact_sheet(context, truth, np.zeros_like(prediction))
    assert other != data
    html = markup.picture(data, "a < b")
    assert 'alt="a &lt; b" src="data:image/png;base64,iVBOR' in html
    assert "image/gif" in markup.picture(b"GIF89a", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prediction=PREDICTION[:, :2]), "prediction must have the shape of truth"),
        (dict(context=CONTEXT[:1]), "context must have as many clips as truth"),
        (dict(context=CONTEXT[0]), r"context must be \[n, T, h, w, C\], got shape"),
        (dict(context=CONTEXT[:, :, :8]), "frames of its size"),
        (dict(context=CONTEXT / 1.0), r"context must be uint8 or lie in \[0, 1\]"),
    ],
    ids=["horizon", "clips", "rank", "size", "range"],
)
def test_frames_that_no_sheet_can_show_are_named(changes, message):
    frames = dict(context=CONTEXT, truth=TRUTH, prediction=PREDICTION) | changes
    with pytest.raises(ValueError, match=message):
        pictures.contact_sheet(**frames)
