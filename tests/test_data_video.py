import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from train import data
from train.data import images, moving_digits
from train.data.spec import Spec

RNG = np.random.default_rng(0)
N, T = 20, 6
FRAMES = RNG.integers(256, size=(N, T, 4, 5, 3), dtype=np.uint8)
CODES = RNG.integers(7, size=(N, T, 4, 5))
CODES.flat[0] = 6
ACTIONS = RNG.integers(3, size=(N, T))
ACTIONS[:, 1] = 2
PIXELS = Spec("video", 4, 1, "frames", causal=True)
SMALL = dict(name="moving_digits", length=5, side=20, digit_side=8)


def moving(**changes):
    sizes = dict(train=50, validation=4, test=4)
    return data.load(SMALL | sizes | changes)


def load_npz(tmp_path, config=None, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return data.load(dict(name="clips", path=str(path), **(config or {})))


def write_videos(place, lengths, size=(4, 5), mode="RGB", suffix="png"):
    """Frame t of video v is of the colour 10 v + t; returns the folders."""
    for v, length in enumerate(lengths):
        folder = place / f"video{v}"
        folder.mkdir(parents=True)
        for t in range(length):
            colour = (10 * v + t,) * len(mode)
            Image.new(mode, size[::-1], colour if len(mode) > 1 else colour[0]).save(
                folder / f"{t}.{suffix}"
            )
    return sorted(place.iterdir())


def load_frames(place, **config):
    config = dict(length=3, validation=0.0, test=0.0) | config
    return data.load(dict(name="frames", folder=str(place), **config))


def test_a_batch_of_moving_digits():
    dataset = moving()
    size = dict(size=(20, 20), channels=1, outputs=1, length=4)
    assert dataset.spec == PIXELS.but(**size)
    stream = dataset.train(3, seed=0)
    batch = next(stream)
    assert batch["inputs"].shape == batch["targets"].shape == (3, 4, 20, 20, 1)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.uint8
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (batch["inputs"][:, 0] != batch["targets"][:, 0]).any(axis=(1, 2, 3)).all()
    assert batch["mask"].shape == (3, 4) and batch["mask"].all()
    first, last = dataset.evaluation("test", 3)
    assert first["mask"].all() and last["mask"].any(axis=1).tolist() == [1, 0, 0]


def test_a_clip_depends_on_seed_split_and_index_alone():
    def clip(split="train", index=7, **changes):
        return moving(**changes).sources[split][index]["frames"]

    np.testing.assert_array_equal(clip(), clip(train=2_000, test=0))
    np.testing.assert_array_equal(clip(), clip(length=9)[:5])
    others = [clip(index=8), clip(seed=1), clip("validation", 3), clip("test", 3)]
    for other in [*others, clip(length=5, digits=1)]:
        assert (clip() != other).any()
    with pytest.raises(IndexError):
        clip(index=50)


def test_digits_move_straight_and_flip_at_the_walls():
    length, step = 200, 0.15
    for seed in range(20):
        rng = np.random.default_rng(seed)
        path = np.array(list(moving_digits._path(rng, length, step)))
        assert path.min() >= 0 and path.max() <= 1
        assert (path == 0).any() and (path == 1).any()
        moved = np.diff(path, axis=0)
        free = (
            (path[:-1] > 0) & (path[:-1] < 1) & (path[1:] > 0) & (path[1:] < 1)
        ).all(1)
        np.testing.assert_allclose(np.hypot(*moved[free].T), step, rtol=1e-9)
        for x, went in zip(path.T, moved.T, strict=True):
            signs, inside = np.sign(went), (x[1:-1] > 0) & (x[1:-1] < 1)
            turned = signs[1:] != signs[:-1]
            assert not (turned & inside).any()  # only a wall turns it
            assert turned[~inside].all()
        start = np.random.default_rng(seed).random(2)
        inside = (path[0] > 0) & (path[0] < 1)
        assert (path[0] != start).any()  # one step was taken before frame 0
        assert np.hypot(*(path[0] - start)) <= step + 1e-9
        if inside.all():
            np.testing.assert_allclose(np.hypot(*(path[0] - start)), step, rtol=1e-9)


def test_a_start_is_uniform_and_so_is_a_heading():
    paths = np.array(
        [
            list(moving_digits._path(np.random.default_rng(i), 2, 1e-6))
            for i in range(4000)
        ]
    )
    x, (dx, dy) = paths[:, 0].T.ravel(), (paths[:, 1] - paths[:, 0]).T
    for values, edges in ((x, (0, 1)), (np.arctan2(dy, dx), (-np.pi, np.pi))):
        counts, _ = np.histogram(values, 10, edges)
        expected = len(values) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 0.1 % at 9 degrees


def test_a_frame_is_the_brightest_of_its_digits():
    glyphs = RNG.integers(256, size=(4, 3, 3), dtype=np.uint8)
    for seed in range(30):
        clip = moving_digits._moving(np.random.default_rng(seed), glyphs, 8, 6, 2, 0.15)
        rng, digits = np.random.default_rng(seed), np.zeros((2, 8, 6, 6, 1))
        for digit in digits:
            glyph = glyphs[rng.integers(4), ..., None]
            for t, place in enumerate(moving_digits._path(rng, 8, 0.15)):
                left, top = (int(3 * p) for p in place)
                digit[t, top : top + 3, left : left + 3] = glyph
        np.testing.assert_array_equal(clip["frames"], digits.max(axis=0))


def test_digits_of_a_split_are_not_those_of_another():
    parts = moving_digits._glyphs("digits", "", False, 12)
    seen = {split: {g.tobytes() for g in glyphs} for split, glyphs in parts.items()}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert {k: v.shape for k, v in parts.items()} == {
        "train": (1293, 12, 12),
        "validation": (144, 12, 12),
        "test": (360, 12, 12),
    }
    assert all(v.dtype == np.uint8 and v.max() > 240 for v in parts.values())


def test_scaling_keeps_the_picture_where_it_is():
    small = np.zeros((1, 8, 8))
    small[0, 2:4, 4:6] = 255
    large = moving_digits._scaled(small, 28)[0].astype(float)
    places = np.mgrid[:28, :28]
    centre = (places * large).sum(axis=(1, 2)) / large.sum()
    # The middle of the square, (3, 5) of 8, is (10.5, 17.5) of 28, half a pixel less.
    np.testing.assert_allclose(centre, [10.0, 17.0], atol=0.05)
    np.testing.assert_array_equal(moving_digits._scaled(small, 8), small)


def test_mnist_moves_too(tmp_path):
    count = 20
    for name, part in zip(images.MNIST, (0, 0, 1, 1), strict=True):
        rank = 3 if "images" in name else 1
        shape = (count, 28, 28)[:rank]
        values = np.full(shape, 100 * (part + 1), np.uint8) if rank == 3 else None
        labels = np.arange(count, dtype=np.uint8) % 10
        content = struct.pack(f">BBBB{rank}I", 0, 0, 8, rank, *shape)
        content += (labels if values is None else values).tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    dataset = moving(source="mnist", folder=str(tmp_path), side=64, digit_side=28)
    for split in ("train", "test"):  # glyphs of MNIST's training part in both
        clip = dataset.sources[split][0]["frames"]
        assert clip.shape == (5, 64, 64, 1) and clip.max() == 100
    with pytest.raises(ValueError, match="lacks train-images"):
        moving(source="mnist", folder=str(tmp_path / "none"))


def test_clips_may_be_long_and_are_stretched():
    assert moving(length=1300).sources["test"][3]["frames"].shape[0] == 1300
    config = SMALL | dict(train=5, validation=0, test=0)
    assert data.stretched(config, 3).spec.length == 14
    with pytest.raises(ValueError, match="a number of frames"):
        data.stretched(dict(name="clips", path="x.npz"), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=1), "length must be 2 or more .*, got 1"),
        (dict(side=7), r"side must be 8 or more \(data.digit_side\), got 7"),
        (dict(digits=0), "digits must be 1 or more"),
        (dict(step=0.0), r"step must lie in \(0, 1\], got 0"),
        (dict(source="letters"), "source must be one of 'digits', 'mnist'"),
        (dict(train=0), "train must be 1 or more"),
        (dict(seed=-1), "seed must be 0 or more"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=rf"data\.{message}"):
        moving(**change)


def test_npz_of_frames(tmp_path):
    split = np.array(["train"] * 15 + ["test"] * 5)
    dataset = load_npz(tmp_path, frames=FRAMES, split=split)
    size = dict(size=(4, 5), channels=3, outputs=3, length=T - 1)
    assert dataset.spec == PIXELS.but(**size)
    (batch,) = dataset.evaluation("test", 5)
    np.testing.assert_array_equal(batch["inputs"], FRAMES[15:, :-1])
    np.testing.assert_array_equal(batch["targets"], FRAMES[15:, 1:])
    grey = load_npz(tmp_path, frames=FRAMES[..., 0])
    assert grey.spec.channels == 1
    assert set(grey.sources) == {"train", "validation", "test"}
    assert next(grey.train(2, seed=0))["inputs"].shape == (2, T - 1, 4, 5, 1)


def test_npz_of_codes(tmp_path):
    config = dict(codec="runs/codec", validation=0.0, test=0.0)
    dataset = load_npz(tmp_path, config, codes=CODES)
    expected = dict(vocab_size=7, outputs=7, loss="codes", codec="runs/codec")
    assert dataset.spec.but(**expected) == dataset.spec and dataset.spec.channels == 1
    (batch,) = dataset.evaluation("train", N)
    np.testing.assert_array_equal(batch["targets"], CODES[:, 1:])
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert load_npz(tmp_path, dict(vocab_size=9), codes=CODES).spec.outputs == 9


def test_actions_lead_from_a_frame_to_the_next(tmp_path):
    # The action before frame t is that frame's number, so that windows show themselves.
    number = np.broadcast_to(np.arange(T), (N, T))
    frames = np.broadcast_to(number[:, :, None, None], (N, T, 2, 2)).astype(np.uint8)
    arrays = dict(frames=frames, actions=np.where(number == 0, -1, number))
    dataset = load_npz(tmp_path, dict(length=4), **arrays)
    assert dataset.spec.actions == T and dataset.spec.length == 3
    stream, starts = dataset.train(4, seed=0), set()
    for _ in range(20):
        batch = next(stream)
        shown, actions = batch["inputs"]["frames"], batch["inputs"]["actions"]
        assert shown.shape == (4, 3, 2, 2, 1) and actions.dtype == np.int32
        np.testing.assert_array_equal(actions, batch["targets"][..., 0, 0, 0])
        np.testing.assert_array_equal(actions, shown[..., 0, 0, 0] + 1)
        starts |= set(shown[:, 0, 0, 0, 0].tolist())
    assert starts == {0, 1, 2}
    (batch,) = dataset.evaluation("test", 4)  # the first window, filled up
    assert batch["inputs"]["actions"].tolist() == [[1, 2, 3]] * 4
    assert batch["mask"].any(axis=1).tolist() == [True, True, False, False]


BAD_NPZ = {
    "nothing": (dict(), {}, "frames is missing; .* one of frames, codes"),
    "both": (dict(frames=FRAMES, codes=CODES), {}, "frames and codes are both there"),
    "floats": (
        dict(frames=FRAMES / 255),
        {},
        r"frames is float64 \(20, 6, 4, 5, 3\); it must be uint8 \[n, T, h, w, C\]",
    ),
    "rank": (
        dict(frames=FRAMES[:, 0, ..., 0]),
        {},
        r"frames has shape \(20, 4, 5\); it must be uint8 \[n, T, h, w, C\]",
    ),
    "channels first": (
        dict(frames=FRAMES.transpose(0, 1, 4, 2, 3)),
        {},
        r"frames has shape \(20, 6, 3, 4, 5\); .* 1 or 3 channels",
    ),
    "one frame": (
        dict(frames=FRAMES[:, :1]),
        {},
        r"frames has shape \(20, 1, 4, 5, 3\); T must be 2 or more",
    ),
    "float codes": (dict(codes=CODES + 0.5), {}, r"codes is float64 .*; it must be"),
    "codes": (
        dict(codes=CODES),
        dict(vocab_size=5),
        r"codes is [56] at .*; it must lie between 0 and 4",
    ),
    "actions": (
        dict(frames=FRAMES, actions=ACTIONS[:, 1:]),
        {},
        r"actions is int64 \(20, 5\); it must be integers \[n, T\] = \(20, 6\)",
    ),
    "large codes": (
        dict(codes=CODES.astype(np.int64) + 2**40),
        {},
        r"codes is 10995116277\d+ at \[0, 0, 0, 0\]; it must lie between 0 and 2147483",
    ),
    "large actions": (
        dict(frames=FRAMES, actions=ACTIONS.astype(np.int64) + 2**32),
        {},
        r"actions is 429496729\d at \[0, 0\]; it must lie between 0 and 21474836",
    ),
    "number of actions": (
        dict(frames=FRAMES, actions=ACTIONS),
        dict(actions=2),
        r"actions is 2 at .*; it must lie between 0 and 1",
    ),
    "no actions": (
        dict(frames=FRAMES),
        dict(actions=2),
        "actions is missing, but data.actions is 2",
    ),
    "counts": (
        dict(frames=FRAMES, actions=ACTIONS[1:]),
        {},
        r"actions has shape \(19, 6\), but frames has 20 sequences",
    ),
    "unknown": (dict(frames=FRAMES, videos=FRAMES), {}, "videos is no known key"),
    "split": (dict(frames=FRAMES, split=np.full(N, "dev")), {}, "split is .* 'dev'"),
    "few": (dict(frames=FRAMES[:1]), {}, "its 1 sequences cannot be divided"),
}


@pytest.mark.parametrize(("arrays", "config", "fault"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_every_fault_of_an_npz_is_named(tmp_path, arrays, config, fault):
    with pytest.raises(ValueError, match=rf"own\.npz: {fault}"):
        load_npz(tmp_path, config, **arrays)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(length=7), "length must lie between 2 and 6, .* or be 0, got 7"),
        (dict(length=1), "length must lie between 2 and 6"),
        (dict(codec="runs/x"), "codec is about codes, .* it must be '', got 'runs/x'"),
        (dict(vocab_size=4), "vocab_size is about codes, .* it must be 0, got 4"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_clips_is_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=rf"data\.{message}"):
        load_npz(tmp_path, config, frames=FRAMES)


def test_folders_of_frames(tmp_path):
    write_videos(tmp_path, (12, 4))
    (tmp_path / "video1" / "notes.txt").write_text("")
    dataset = load_frames(tmp_path, length=4)
    assert dataset.spec == PIXELS.but(size=(4, 5), channels=3, outputs=3, length=3)
    (batch,) = dataset.evaluation("train", 2)
    colours = [[0, 1, 2], [10, 11, 12]]
    assert (batch["inputs"] == np.array(colours)[..., None, None, None]).all()
    stream, starts = dataset.train(2, seed=0), set()
    for _ in range(20):
        batch = next(stream)
        first = batch["inputs"][:, :, 0, 0, 0].astype(int)
        assert (np.diff(first) == 1).all()  # 9.png comes before 10.png
        starts |= set(first[:, 0].tolist())
    assert starts > {0, 8, 10} and max(starts) == 10


def test_frames_are_scaled_and_grey(tmp_path):
    write_videos(tmp_path, (3,), size=(8, 6), suffix="JPG")
    dataset = load_frames(tmp_path, size=(4, 2), channels=1)
    assert (dataset.spec.size, dataset.spec.channels) == ((4, 2), 1)
    (batch,) = dataset.evaluation("train", 1)
    assert batch["inputs"].shape == (1, 2, 4, 2, 1)
    assert abs(batch["targets"][0, :, 0, 0, 0] - np.array([1.0, 2.0])).max() <= 1


def test_folders_may_say_the_split(tmp_path):
    write_videos(tmp_path / "train", (3, 3))
    write_videos(tmp_path / "test", (5,))
    dataset = load_frames(tmp_path, validation=0.5)
    sizes = {split: dataset.num_examples(split) for split in dataset.sources}
    assert sizes == {"train": 2, "test": 1}
    (tmp_path / "dev").mkdir()
    with pytest.raises(ValueError, match=r"dev: beside a folder train .* validation"):
        load_frames(tmp_path)


def test_videos_are_divided_by_the_seed(tmp_path):
    write_videos(tmp_path, (3,) * 10)

    def tested(seed):
        dataset = load_frames(tmp_path, test=0.2, seed=seed)
        (batch,) = dataset.evaluation("test", 2)
        return set(batch["inputs"][:, 0, 0, 0, 0].tolist())

    assert tested(0) == tested(0) and len({frozenset(tested(i)) for i in range(4)}) > 1


def test_every_fault_of_a_folder_is_named(tmp_path):
    def fails(message, **config):
        with pytest.raises(ValueError, match=message):
            load_frames(tmp_path, **config)

    fails(f"{tmp_path}: has no folder")
    first, second = write_videos(tmp_path, (4, 3))
    fails(r"video1: has 3 frames .* data\.length, 4", length=4)
    fails(r"data\.size must be two pixel counts .* got \(4,\)", size=(4,))
    fails(r"data\.channels must be 1 or 3, got 2", channels=2)
    fails(r"2 videos cannot be divided", test=0.9)
    fails(r"data\.length must be 2 or more", length=1)
    Image.new("RGB", (3, 3)).save(second / "0.png")
    fails(r"video1/0\.png: has 3 x 3 pixels, .* has 4 x 5; data\.size")
    Image.new("I;16", (5, 4)).save(second / "0.png")
    fails(r"video1/0\.png: has pixels of mode I;16; they must have 8 bits")
    (second / "0.png").write_bytes((first / "0.png").read_bytes()[:40])
    fails(r"video1/0\.png: not a readable image")
    Image.new("RGB", (5, 4)).save(second / "0.png")
    (second / "1.png").write_bytes(b"no image")
    dataset = load_frames(tmp_path)
    with pytest.raises(ValueError, match=r"video1/1\.png: not a readable image"):
        list(dataset.evaluation("train", 2))
    for folder in ("", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"data\.folder must name a folder"):
            data.load(dict(name="frames", folder=folder))
