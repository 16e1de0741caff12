"""Runs made by older commits stay readable and resumable.

Each folder of tests/old_runs is a workdir as the commit of its name left it. That of
695c40c is

    python -m train.main --config configs/pixels.py:digits,layer=s4d+attention
        --config.model.features=8 --config.model.depth=2
        --config.model.layer_args.attention.heads=2
        --config.model.layer_args.s4d.state_size=8 --config.train.batch_size=16
        --config.train.log_every=1 --config.train.eval_every=8
        --config.train.checkpoint_every=8 --config.train.keep=1 --config.train.steps=8

and LATER what the same commit wrote when it went on to step 12.
"""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_main

from configs import common, lra, own, pixels
from layers.models.build import GELUS, NORMS, VQ, get
from train import checkpoint, evaluate, loop, main, records, runs
from train.data import DATASETS
from train.report import pages

parsed = test_main.parsed

RUN = Path(__file__).parent / "old_runs" / "695c40c"
# Of the configs of that commit: the keys of `configs.common.base()`, the fields of each
# layer and the arguments of each data set.
KEYS = RUN.with_name("695c40c-keys.json")
STEPS = 12
LATER = {9: 2.515373468399048, 10: 2.517977237701416, 11: 2.392080783843994}
LATER[12] = 2.3091166019439697
LATER_TEST = {"accuracy": 0.10000000149011612, "loss": 2.394155263900757}


def command():
    """Today's config of the command that made the run, but for the number of steps."""
    config = pixels.get_config("digits,layer=s4d+attention")
    config.model.update(features=8, depth=2)
    config.model.layer_args.attention.heads = 2
    config.model.layer_args.s4d.state_size = 8
    config.train.update(batch_size=16, log_every=1, eval_every=8, checkpoint_every=8)
    config.train.update(keep=1, steps=STEPS)
    return config


@pytest.fixture
def workdir(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_scores_are_those_of_its_commit(workdir):
    expected = json.loads((RUN / records.RESULTS).read_text())["test"]
    assert records.read_data(workdir) is None
    found = evaluate.scores(runs.load_run(workdir), "test")
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_goes_on_as_its_commit_did(workdir, capsys):
    results = loop.run(command(), workdir)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
    assert {s: losses[s] for s in LATER} == pytest.approx(LATER, rel=1e-6)
    assert results["test"] == pytest.approx(LATER_TEST, rel=1e-6)
    assert "it keeps 'tanh'" in capsys.readouterr().out
    assert records.read_config(workdir).model.gelu == "tanh"  # from now on it says so
    assert records.read_data(workdir) == runs.load_run(workdir).dataset.spec


@pytest.mark.slow
def test_has_a_report(workdir):
    page = Path(pages.write(workdir)).read_text()
    assert "0.1000" in page


def test_another_value_is_another_run(workdir):
    config = command()
    config.model.gelu = "erf"
    with pytest.raises(ValueError, match=r"model.gelu was 'tanh', is 'erf'"):
        loop.run(config, workdir)


@pytest.mark.slow
def test_a_recipe_that_changed_leaves_what_began_before(tmp_path, parsed, capsys):
    """`own:` had another learning rate, and the same command must go on."""
    rng = np.random.default_rng(0)
    place = tmp_path / "my.npz"
    np.savez(place, inputs=rng.normal(size=(20, 6)), targets=np.arange(20) % 2)
    config = own.get_config(f"path={place},layer=lru")
    config.model.update(features=4, depth=1)
    config.train.update(batch_size=4, steps=2, log_every=1, checkpoint_every=1)
    today = config.optimizer.lr
    ((key, ((then, *_), now)),) = records.OWN_RECIPE.items()
    assert (key, now) == ("optimizer.lr", today)
    config.optimizer.lr = then
    loop.run(config, tmp_path / "run")
    config.optimizer.lr, config.train.steps = today, 3
    assert loop.run(config, tmp_path / "run")["step"] == 3
    assert f"began with {key} = {then}: it keeps that" in capsys.readouterr().out
    assert records.read_config(tmp_path / "run").optimizer.lr == then
    config.optimizer.lr = 2e-3
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.001, is 0.002"):
        loop.run(config, tmp_path / "run")
    # Who types today's rate means it.
    command = ["--config", f"own:path={place},layer=lru", f"--workdir={tmp_path}/run"]
    command += ["--config.model.features=4", "--config.model.depth=1"]
    command += ["--config.train.batch_size=4", "--config.train.steps=3", "--noreport"]
    assert main.main(parsed(*command)) == 0
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.001, is 0.01"):
        main.main(parsed(*command, f"--config.optimizer.lr={today}"))


def test_absent_keys_are_keys_with_their_default():
    flat = records.flat(common.base().to_dict())
    for key, (meaning, default) in records.ABSENT.items():
        assert flat[key] == default
        assert type(meaning) is type(default)
    assert records.ABSENT["model.gelu"][0] in GELUS
    # 0 is each norm's own epsilon, what Flax gave them before there was a key.
    assert NORMS == {"layer": 1e-6, "batch": 1e-5, "rms": 1e-6}


def meaningless():
    """The keys of today's configs that a config of KEYS lacks, and of which no table
    says what that means. Layers and data sets that it did not have are left out."""
    old = json.loads(KEYS.read_text())
    new = (
        set(records.flat(common.base().to_dict()))
        - set(old["config"])
        - {*records.ABSENT}
    )
    fields = common.LAYER_ARGS | {"vq": own_fields(VQ)}
    for name in old["layer_args"]:
        # There is no table of fields: the first one that is new needs it.
        new |= {f"{name}.{key}" for key in {*fields[name]} - {*old["layer_args"][name]}}
    for name, arguments in old["data"].items():
        now = inspect.signature(DATASETS[name]).parameters.keys() - {*arguments}
        tabled = {
            key.removeprefix("data.") for key in records.ABSENT_DATA.get(name, {})
        }
        new |= {f"{name}.{key}" for key in now - tabled}
    return new


def own_fields(cls):
    return {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}


def test_a_key_that_old_runs_lack_has_a_meaning(monkeypatch):
    assert meaningless() == set()
    monkeypatch.delitem(records.ABSENT, "model.gelu")
    monkeypatch.delitem(records.ABSENT_DATA["arrays"], "data.rate")
    monkeypatch.setitem(common.LAYER_ARGS, "s5", common.LAYER_ARGS["s5"] | {"new": 1})
    assert meaningless() == {"model.gelu", "arrays.rate", "s5.new"}


def test_every_key_of_old_runs_is_one_today():
    old = json.loads(KEYS.read_text())
    assert set(old["config"]) <= set(records.flat(common.base().to_dict()))
    for name, fields in old["layer_args"].items():
        assert set(fields) <= own_fields(get(name) if name != "vq" else VQ), name
    for name, arguments in old["data"].items():
        assert {*arguments} <= inspect.signature(DATASETS[name]).parameters.keys()


@pytest.mark.parametrize("layer", ["attention", "long_conv"])
def test_a_run_of_the_arena_that_read_one_way_goes_on_with_its_own(
    layer, tmp_path, monkeypatch
):
    """Today's recipe is refused, by the names and values of what it began with."""
    then = lra.get_config(f"pathfinder16,layer={layer}")
    then.model.layer_args.bidirectional = False
    records.write_config(tmp_path, then)
    monkeypatch.setattr(checkpoint, "steps", lambda workdir: [1])
    now = lra.get_config(f"pathfinder16,layer={layer}")
    named = r"model\.layer_args\.bidirectional was False, is True"
    with pytest.raises(ValueError, match=named):
        records.check_workdir(tmp_path, now)
    now.model.layer_args.bidirectional = False
    records.check_workdir(tmp_path, now)
