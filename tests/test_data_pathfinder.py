import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tiny_run
from arena import everything, write_pathfinder
from PIL import Image
from scipy import ndimage

from configs import lra
from train import data
from train.bench import pictures as timed
from train.data import pathfinder, prepare, prepared, snakes
from train.data.spec import Spec

SMALL = dict(name="pathfinder", side=16, train=30, validation=6, test=5)


@pytest.fixture(scope="module")
def pictures():
    """Hundreds of 32 x 32 pixels."""
    return snakes.draw(pathfinder.RULES[32], range(600), 3)


def long_snakes(pictures, rules):
    """Heads of each [2 n, contour, 2]."""
    heads = pictures.heads[:, : 2 * rules.contour]
    return heads.reshape(-1, rules.contour, 2).astype(float)


@pytest.mark.parametrize("side", [16, 32, 128])
def test_a_picture_does_not_depend_on_its_company(side):
    rules = pathfinder.RULES[side]
    together = snakes.draw(rules, range(5, 13), 1, 2)
    alone = snakes.draw(rules, [9], 1, 2)
    for one, several in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[0], several[4])
    other = snakes.draw(rules, [9], 2, 2)
    assert (other.pixels != alone.pixels).any()


def test_no_memory_bound_changes_a_picture(monkeypatch):
    rules = pathfinder.RULES[24]
    expected = snakes.draw(rules, range(20), 0).pixels
    monkeypatch.setattr(snakes, "CELLS", 1)
    np.testing.assert_array_equal(snakes.draw(rules, range(20), 0).pixels, expected)


def test_labels_are_balanced_and_say_which_tips_are_marked(pictures):
    rules, n = pathfinder.RULES[32], len(pictures.labels)
    assert abs(pictures.labels.mean() - 0.5) < 4 * 0.5 * n**-0.5
    # The second disk is at the head of the snake that begins at the first one.
    heads = pictures.heads[:, [rules.contour - 1, 2 * rules.contour - 1]]
    first = np.linalg.norm(
        pictures.heads[:, [0, rules.contour]] - pictures.disks[:, :1], axis=-1
    )
    marked = np.argmin(first, axis=1)
    own = (pictures.disks[:, 1] == heads[np.arange(n), marked]).all(axis=1)
    other = (pictures.disks[:, 1] == heads[np.arange(n), 1 - marked]).all(axis=1)
    np.testing.assert_array_equal(own, pictures.labels == 1)
    np.testing.assert_array_equal(other, pictures.labels == 0)
    assert abs(marked.mean() - 0.5) < 4 * 0.5 * n**-0.5
    for row, (y, x) in enumerate(pictures.disks[:, 0]):
        assert pictures.pixels[row, y, x] == 255


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_snakes_have_the_lengths_and_turns_of_the_rules(side):
    rules = pathfinder.RULES[side]
    drawn = snakes.draw(rules, range(40), 0)
    assert set(drawn.margins) == set(rules.margins)
    heads = long_snakes(drawn, rules)
    assert heads.min() >= rules.padding and heads.max() < side - rules.padding
    steps = np.diff(heads, axis=1)
    # From a pivot a margin beyond a head; the pivot and the next head are pixels.
    margins = np.repeat(drawn.margins, 2)[:, None]
    length = np.hypot(*np.moveaxis(steps, -1, 0))
    assert (length <= rules.length + 2 * margins + 1.3).all()
    directions = np.arctan2(steps[..., 0], steps[..., 1])
    turns = np.abs((np.diff(directions) + np.pi) % (2 * np.pi) - np.pi)
    # Beyond that only where there is no other way, which is soon in a small picture.
    free = (turns < np.pi / 2 / rules.continuity + 0.3).mean()
    assert free > (0.7 if side == 16 else 0.85)
    assert np.median(turns) < np.pi / 4 / rules.continuity + 0.2
    short = drawn.heads[:, 2 * rules.contour :, 0] >= 0
    short = short.reshape(40, rules.distractors, rules.distractor)
    np.testing.assert_array_equal(short.all(axis=2), short.any(axis=2))
    assert short.mean() > 0.6


def test_the_tails_of_long_snakes_lie_as_far_apart_as_the_rules_say():
    # Of one paddle: what is marked are tails, then heads.
    rules = pathfinder.RULES[64]._replace(contour=1)
    drawn = snakes.draw(rules, range(200), 0)
    heads = long_snakes(drawn, rules)[:, 0].reshape(-1, 2, 2)
    apart = np.linalg.norm(heads[:, 0] - heads[:, 1], axis=1)
    assert (np.abs(apart - rules.distance) <= 2 * rules.length + 1.5).all()
    assert abs(apart.mean() - rules.distance) < 1.5


@pytest.mark.parametrize("side", [128, 256])
def test_every_paddle_stands_alone(side):
    """But where its snake turns back upon it."""
    rules = pathfinder.RULES[side]._replace(radius=0.0)
    drawn = snakes.draw(rules, range(20), 0)
    steps = np.diff(long_snakes(drawn, rules), axis=1)
    cosine = (steps[:, 1:] * steps[:, :-1]).sum(axis=-1)
    back = (cosine < 0).reshape(20, -1).sum(axis=1)
    alone = False
    for pixels, heads, turns in zip(drawn.pixels, drawn.heads, back, strict=True):
        _, count = ndimage.label(pixels > 100)
        paddles = (heads[:, 0] >= 0).sum()
        assert paddles - turns - 1 <= count <= paddles  # a short snake's turn too
        alone |= count == paddles
    assert alone


def test_what_is_drawn_covers_the_same_share_of_every_picture(pictures):
    share = (pictures.pixels > 64).mean(axis=(1, 2))
    paddles = (pictures.heads[..., 0] >= 0).sum(axis=1)
    assert 0.12 < share.mean() < 0.25 and share.std() < 0.03
    assert np.corrcoef(share, paddles)[0, 1] > 0.3
    joined = pictures.labels == 1
    assert abs(share[joined].mean() - share[~joined].mean()) < 0.005


def test_too_long_snakes_are_refused(monkeypatch):
    monkeypatch.setattr(snakes, "ATTEMPTS", 50)
    with pytest.raises(ValueError, match="two snakes of 40 paddles do not fit into"):
        snakes.draw(pathfinder.RULES[16]._replace(contour=40), [0], 0)


def test_the_tasks_of_the_configs_are_those_that_can_be_prepared():
    assert {*lra.SIDES.values()} == {*pathfinder.RULES}
    assert set(lra.TASKS) - {"image"} == set(prepare.DATASETS)
    assert set(lra.VARIANTS) - {""} == set(pathfinder.VARIANTS)


@pytest.mark.parametrize("variant", pathfinder.VARIANTS)
def test_what_a_pixel_is(tmp_path, variant):
    dataset = data.load(SMALL | dict(folder=str(tmp_path), variant=variant))
    batch = everything(dataset, "train")
    pixels = snakes.draw(pathfinder.RULES[16], range(30), 0, 0)
    raw = pixels.pixels.reshape(30, 256)
    expected = {"lra": raw, "s4": raw / 255, "s5": raw / 127.5 - 1}[variant]
    np.testing.assert_allclose(batch["inputs"], expected, atol=1e-6)
    assert batch["inputs"].dtype == (np.int32 if variant == "lra" else np.float32)
    np.testing.assert_array_equal(batch["targets"], pixels.labels)
    assert batch["mask"].all()
    assert dataset.spec == Spec(
        encoder="token" if variant == "lra" else "scalar",
        length=256,
        outputs=2,
        loss="classification",
        vocab_size=256 if variant == "lra" else 0,
        classes=("apart", "joined"),
    )
    assert [dataset.num_examples(s) for s in ("validation", "test")] == [6, 5]


def test_parts_differ_and_seeds_too(tmp_path):
    settings = SMALL | dict(folder=str(tmp_path))
    dataset = data.load(settings)
    parts = [everything(dataset, s)["inputs"] for s in ("train", "validation", "test")]
    other = data.load(settings | dict(seed=1))
    parts.append(everything(other, "train")["inputs"])
    rows = np.concatenate(parts)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_pictures_are_grids_too(tmp_path):
    settings = SMALL | dict(folder=str(tmp_path))
    grids = data.load(settings | dict(layout="image"))
    assert grids.spec.size == (16, 16) and grids.spec.encoder == "image"
    assert grids.spec == data.known(settings | dict(layout="image"))
    rows = everything(data.load(settings), "test")["inputs"]
    inputs = everything(grids, "test")["inputs"]
    np.testing.assert_array_equal(inputs, rows.reshape(-1, 16, 16, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(side=48), r"data\.side must be one of 16, 24, 32, 64, .*, got 48"),
        (dict(variant="mega"), r"data\.variant must be one of 'lra', 's4', 's5'"),
        (dict(contour=2), r"data\.contour must be 3 to 5 with data\.side=16, or 0"),
        (dict(contour=9), r"data\.contour must be 3 to 5 .* got 9"),
        (dict(train=0), r"data\.train must be 1 or more, got 0"),
        (dict(test=-1), r"data\.test must be 0 or more, got -1"),
        (dict(seed=-1), r"data\.seed must be"),
        (dict(layout="grid"), r"data\.layout must be one of"),
        (
            dict(layout="image", variant="lra"),
            r"data\.layout must be sequence where data\.variant is lra",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(SMALL | dict(folder=str(tmp_path / "data")) | change)
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_files_do_not_depend_on_how_many_processes_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(pathfinder, "IN_A_SHARD", 16**2 * 20)
    homes = [
        pathfinder.prepare(
            str(tmp_path / str(workers)),
            side=16,
            train=50,
            validation=20,
            test=5,
            workers=workers,
        )
        for workers in (1, 2)
    ]
    names, others = (sorted(path.name for path in home.iterdir()) for home in homes)
    assert names == others and len(names) == 3 + 1 + 1 + 1
    for name in names:
        assert (homes[0] / name).read_bytes() == (homes[1] / name).read_bytes()
    assert prepared.digest(homes[0]) == prepared.digest(homes[1])


# Files of 50 pictures.
IN_SMALL_FILES = """
import sys
from train.data import pathfinder, prepare
pathfinder.IN_A_SHARD = 24**2 * 50
if __name__ == "__main__":
    sys.exit(prepare.main(sys.argv[1:]))
"""


def prepare_in_small_files(folder, program):
    command = [sys.executable, str(program), "--dataset=pathfinder24", "--limit=400"]
    return subprocess.Popen(
        [*command, "--workers=2", f"--folder={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


@pytest.mark.slow
def test_killed_half_way_it_goes_on_and_ends_the_same(tmp_path):
    program = tmp_path / "small_files.py"
    program.write_text(IN_SMALL_FILES)
    with prepare_in_small_files(tmp_path / "run", program) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("run/.*/train-*"))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        others = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive
    assert not list(tmp_path.glob("run/24-*"))  # what is not whole has another name
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/.*/train-*")}
    assert 2 <= len(made) < 24
    with prepare_in_small_files(tmp_path / "run", program) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (home,) = tmp_path.glob("run/*")
    for path, written in made.items():
        assert (home / path.name).stat().st_mtime_ns == written
    whole = pathfinder.prepare(
        str(tmp_path / "whole"), side=24, train=60, validation=1, test=1, workers=1
    )
    first = prepared.Records([home / "train-00000-of-00008.array_record"], bytes)
    again = prepared.Records([whole / "train-00000-of-00001.array_record"], bytes)
    assert [again[i] for i in range(50)] == [first[i] for i in range(50)]
    assert f"sha256 {prepared.digest(home)}" in out


def test_the_command_says_what_it_made_and_how_to_train_on_it(tmp_path, capsys):
    flags = ["--dataset=pathfinder16", "--limit=7", f"--folder={tmp_path}"]
    assert prepare.main([*flags, "--workers=1"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert "pathfinder16, 7 train, 7 validation, 7 test examples" in first[0]
    assert first[2] == (
        "python -m train.main --config lra:pathfinder16,scale=paper "
        f"--config.data.folder={tmp_path} "
        "--config.data.train=7 --config.data.validation=7 --config.data.test=7"
    )
    assert prepare.main(flags) == 0  # there already
    assert capsys.readouterr().out.splitlines()[1] == first[1]
    listops = ["--dataset=listops", "--limit=2", f"--folder={tmp_path}"]
    assert prepare.main(listops) == 0
    assert "listops, 2 train, 2 validation, 2 test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=letters"], "invalid choice: 'letters'"),
        ([], "required: --dataset"),
        (["--dataset=pathx", "--limit=0"], "--limit must be 1 or more, got 0"),
        (["--dataset=pathx", "--workers=-1"], "workers must be 0 or more, got -1"),
        (["--dataset=pathx", "--seed=-1"], "data.seed must be"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_are_named(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        prepare.main(flags)
    assert ending.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_arena_s_own_pictures_are_converted(tmp_path):
    drawn = write_pathfinder(tmp_path / "pathfinder32")
    settings = dict(
        name="pathfinder",
        path=str(tmp_path / "pathfinder32"),
        folder=str(tmp_path / "d"),
    )
    pixels = drawn.pixels.reshape(20, -1)
    slices = data.load(settings | dict(variant="lra"))
    for split, rows in dict(
        train=range(16), validation=(16, 17), test=(18, 19)
    ).items():
        batch = everything(slices, split)
        np.testing.assert_array_equal(batch["inputs"], pixels[list(rows)])
        np.testing.assert_array_equal(batch["targets"], drawn.labels[list(rows)])
    # The other tradition draws them from all.
    mixed = data.load(settings)
    parts = {s: everything(mixed, s) for s in ("train", "validation", "test")}
    assert [len(part["targets"]) for part in parts.values()] == [16, 2, 2]
    inputs = np.concatenate([part["inputs"] for part in parts.values()])
    labels = np.concatenate([part["targets"] for part in parts.values()])
    order = [np.abs(inputs - row / 255).sum(axis=1).argmin() for row in pixels]
    assert sorted(order) == list(range(20)) != order
    np.testing.assert_array_equal(labels[order], drawn.labels)
    (home,) = (tmp_path / "d").iterdir()  # both from one conversion
    assert home.name.startswith("lra-32-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imgs/0 sample_0.png 0", r"0\.npy, line 1: must have a folder, a file"),
        ("imgs/0 sample_0.png 0 2", r"0\.npy, line 1: .* label of 0 or 1"),
        ("../.. x.png 0 1", r"0\.npy, line 1: must name a file below curv_contour"),
        ("/etc x.png 0 1", r"0\.npy, line 1: must name a file below curv_contour"),
        ("imgs/0 lost.png 0 1", r"lost\.png: not a readable image"),
    ],
)
def test_every_fault_of_the_arena_s_lists_is_named(tmp_path, line, message):
    write_pathfinder(tmp_path / "arena", lines=[line])
    settings = dict(name="pathfinder", path=str(tmp_path / "arena"))
    with pytest.raises(ValueError, match=message):
        data.load(settings | dict(folder=str(tmp_path / "d")))
    assert not list(tmp_path.glob("d/*"))


def test_every_fault_of_the_arena_s_pictures_is_named(tmp_path):
    settings = dict(name="pathfinder", folder=str(tmp_path / "d"))
    with pytest.raises(
        ValueError, match=r"data\.path: no curv_contour_length_14/metad"
    ):
        data.load(settings | dict(path=str(tmp_path)))
    write_pathfinder(tmp_path / "two_sizes")
    picture = tmp_path / "two_sizes/curv_contour_length_14/imgs/1/sample_13.png"
    Image.new("L", (64, 64)).save(picture)
    with pytest.raises(
        ValueError, match=r"sample_13\.png: must have 32 x 32 pixels, as"
    ):
        data.load(settings | dict(path=str(tmp_path / "two_sizes")))
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"sample_13\.png: not a readable image"):
        data.load(settings | dict(path=str(tmp_path / "two_sizes")))
    assert not list(tmp_path.glob("d/*"))


def test_the_page_has_the_pictures_that_were_timed():
    path = tiny_run.ROOT / "train" / "bench" / "results" / "pictures-cpu.json"
    rows = [timed.cells(row) for row in json.loads(path.read_text())["pictures"]]
    page = (tiny_run.ROOT / "docs" / "data.md").read_text()
    assert [row[0] for row in rows] == ["32", "64", "128", "256", "512", "128"]
    assert [row for row in rows if f"| {' | '.join(row)} |" not in page] == []
