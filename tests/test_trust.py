"""What a workdir from elsewhere may do: nothing but be read."""

import importlib.machinery
import json
import subprocess
import sys
import traceback
import types
from pathlib import Path

import jax
import pytest

from configs import common, pixels, video
from layers.models.build import LAYERS, build
from train import (
    checkpoint,
    data,
    evaluate,
    generate,
    lock,
    loop,
    main,
    optimizers,
    predict,
    records,
    resolve,
    runs,
    state,
    step,
)
from train.report import __main__ as report_command
from train.reproduce import __main__ as reproduce
from train.video import codec, rollout

PAYLOAD = """
import pathlib

pathlib.Path(__file__).with_name("executed").touch()

from layers.gru import GRU


class Layer(GRU):
    pass
"""
NAME = "stranger.payload.Layer"


def small():
    config = pixels.get_config("digits,target=next,layer=gru")
    config.model.update(features=4, depth=1)
    config.train.update(steps=1, batch_size=4, eval_every=1, checkpoint_every=1)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a layer of this project."""
    workdir = tmp_path_factory.mktemp("trust") / "run"
    loop.run(small(), workdir)
    return workdir


@pytest.fixture
def stranger(run, tmp_path, monkeypatch):
    """What makes of the run one that names code which lies beside it."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path)
    kept = json.loads((run / "config.json").read_text())

    def named(**changes):
        config = json.loads(json.dumps(kept))
        config["model"].update(changes)
        (run / "config.json").write_text(json.dumps(config))
        return folder / "executed"

    yield named
    (run / "config.json").write_text(json.dumps(kept))
    for name in [name for name in sys.modules if name.startswith("stranger")]:
        del sys.modules[name]


COMMANDS = {
    "evaluate": (evaluate.main, ["--workdir"]),
    "lengths": (evaluate.main, ["--lengths", "1", "--workdir"]),
    "generate": (generate.main, ["--workdir"]),
    "predict": (predict.main, ["--inputs", "-", "--workdir"]),
    "rollout": (rollout.main, ["--workdir"]),
    "report": (report_command.main, ["--workdir"]),
}


@pytest.mark.parametrize("layer", [NAME, [NAME], ["gru", NAME]], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_what_a_run_names(run, stranger, capsys, command, layer):
    start, arguments = COMMANDS[command]
    executed = stranger(layer=layer)
    with pytest.raises(SystemExit, match="2"):
        start([*arguments, str(run)])
    assert not executed.exists() and "stranger" not in sys.modules
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(run) in said and repr(NAME) in said and "--trust" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_calls_the_dataset_that_a_run_names(tmp_path, capsys, command):
    (tmp_path / "stranger.py").write_text(PAYLOAD)
    config = small()
    config.data = {"name": "stranger.load", "workers": 0}
    records.write_config(tmp_path / "run", config)
    (tmp_path / "run" / "metrics.jsonl").touch()
    start, arguments = COMMANDS[command]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.syspath_prepend(tmp_path)
        start([*arguments, str(tmp_path / "run")])
    assert not (tmp_path / "executed").exists() and "stranger" not in sys.modules
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "names the dataset 'stranger.load'" in said and "--trust" in said


def test_nothing_else_that_reads_a_run_imports_what_it_names(
    run, stranger, tmp_path, capsys
):
    executed = stranger(layer=NAME)
    with pytest.raises(ValueError, match="must be of an autoencoder"):
        codec.load_codec(run)
    with pytest.raises(SystemExit, match="2"):
        codec.main(["--workdir", str(run), "--out", str(tmp_path / "x.npz")])
    assert "must be of an autoencoder, model.layer 'vq'" in capsys.readouterr().err
    other = tmp_path / "copy"
    other.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (other / name).write_text((run / name).read_text())
    command = ["--compare", str(run), str(other), "--out", str(tmp_path / "c.html")]
    assert report_command.main(command) == 0
    variables, step = checkpoint.restore_params(run)
    fresh = state.TrainState(step, variables["params"], {}, {}, None, None)
    assert checkpoint.init_from(run, jax.tree.map(jax.numpy.asarray, fresh)).step == 1
    assert not executed.exists() and "stranger" not in sys.modules


def test_a_run_of_other_layers_is_not_gone_on_with(run, stranger, tmp_path):
    executed = stranger(layer=NAME)
    with pytest.raises(ValueError, match=r"another config .*model.layer was 'stranger"):
        loop.run(small(), run)
    assert not executed.exists()


def test_trust_reads_a_run_of_a_layer_of_ones_own(run, stranger, capsys):
    executed = stranger(layer=NAME)
    assert evaluate.main(["--workdir", str(run), "--trust", "--examples", "4"]) == 0
    assert executed.exists()
    assert json.loads(capsys.readouterr().out)["step"] == 1
    found = runs.load_run(run, trust=True)
    assert type(found.model.stack().pattern[0]().mixer()).__name__ == "Layer"


def test_a_run_that_was_trained_here_needs_no_trust(run, stranger):
    stranger(layer=NAME)
    main._write_report(run)
    assert (run / "report.html").exists()


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from train import lock
with lock.held(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


READERS = {
    "evaluate": (evaluate.main, "--examples=4"),
    "generate": (generate.main, "--count=1", "--length=4"),
    "report": (report_command.main,),
}


@pytest.mark.parametrize(
    "reader",
    [
        "evaluate",
        pytest.param("generate", marks=pytest.mark.slow),
        pytest.param("report", marks=pytest.mark.slow),
    ],
)
def test_who_only_reads_needs_no_lock(run, reader):
    """Another process trains in the workdir meanwhile, and its lock stays as it is."""
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parents[1]), str(run)]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            record = (run / lock.NAME).read_text()
            with pytest.raises(ValueError, match="in use by another run"):
                lock.held(run).__enter__()
            start, *few = READERS[reader]
            assert start(["--workdir", str(run), *few]) == 0
            assert holder.poll() is None
            assert (run / lock.NAME).read_text() == record
        finally:
            holder.kill()
    (run / lock.NAME).unlink()


@pytest.fixture
def film(tmp_path, monkeypatch):
    """What reads a run on videos whose config names a network wherever it has room, and
    the files that PyTorch, a stub here, is asked to load."""
    network = tmp_path / "network.pt"
    network.touch()
    config = video.get_config("moving_digits,layer=conv_lstm")
    config.data.update(length=4, side=8, digit_side=4, validation=2, test=2)
    config.model.update(features=4, depth=1)
    config.model.video.depths = (4,)
    config.rollout.update(context=2, horizon=2, clips=2)
    dataset = data.load(config.data)
    config = resolve.complete(config, dataset.spec)
    workdir = tmp_path / "run"
    records.write_config(workdir, config)
    written = json.loads((workdir / "config.json").read_text())
    named = {"fvd": str(network), "lpips": str(network)}
    for section in ("rollout", "train", "model"):
        written[section] |= named
    (workdir / "config.json").write_text(json.dumps(written | named))

    def load_run(workdir, step=None, trust=False):
        """The untrained run: training takes a while and changes nothing here."""
        config = records.read_config(workdir)
        model = build(config.model)
        variables = jax.jit(model.init)(
            jax.random.key(0), next(iter(dataset.evaluation("test", 2)))["inputs"]
        )
        return runs.Run(config, dataset.spec, model, variables, 0, lambda: dataset)

    loaded = []

    def load(path, map_location):
        loaded.append(path)
        raise RuntimeError("a stub")

    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    torch.jit = types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(runs, "load_run", load_run)
    return ["--workdir", str(workdir)], network, loaded


def test_a_run_cannot_choose_a_network(film, monkeypatch, capsys):
    """Only the command line can."""
    command, network, loaded = film
    of_run, rollouts = rollout.of_run, []

    def once(*arguments):
        """It takes some seconds to compile."""
        rollouts.append(rollouts[0] if rollouts else of_run(*arguments))
        return rollouts[0]

    monkeypatch.setattr(rollout, "of_run", once)
    assert rollout.main(command) == 0
    assert loaded == []
    with pytest.raises(SystemExit, match="2"):
        rollout.main([*command, "--lpips", str(network)])
    assert loaded == [str(network)]
    assert "not a TorchScript file (a stub)" in capsys.readouterr().err


class Reached(Exception):
    """Everything was checked: training would begin."""


VALUES = (-1, 0, 1e300, float("nan"), 2**40, 2**70, "", "x", None, [], [1], {})


def keys(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def changed(key, value):
    config = pixels.get_config("digits")
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section[name]
    with config.ignore_type():
        section[last] = value
    return config


def raised_here(error):
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(loop.__file__).parents[1] in Path(last).parents


@pytest.mark.parametrize("key", [*keys(pixels.get_config("digits").to_dict())])
def test_every_key_of_a_config_says_what_it_must_be(key, tmp_path, monkeypatch):
    shape = jax.ShapeDtypeStruct((4,), jax.numpy.float32)

    def set_up(config, *_):
        optimizers.make(config, {"x": {"bias": shape, "kernel": shape}})
        raise Reached

    monkeypatch.setattr(loop, "set_up", set_up)
    for value in VALUES:
        try:
            config = changed(key, value)
        except (TypeError, ValueError, AttributeError):
            continue  # ml_collections knows better
        if value == {} and key in ("data", "mesh", "model", "optimizer", "train"):
            continue  # everything is missing, not wrong
        try:
            loop.run(config, tmp_path / "run")
        except Reached:
            assert value is not None and value != 1e300 and value == value, key
        except ValueError as error:
            assert key.rpartition(".")[2] in str(error), (key, value, error)
            assert raised_here(error), (key, value, error)
            assert "\n" not in str(error)
        assert not (tmp_path / "run").exists()


def token_layer(layer):
    config = pixels.get_config(f"digits,layer={layer}")
    config.model.update(features=8, depth=1)
    config.train.batch_size = 2
    return config


def frame_layer(layer):
    config = video.get_config(f"moving_digits,layer={layer}")
    config.model.update(features=8, depth=1)
    config.model.video.depths = (2, 4, 8)
    config.data.update(side=8, digit_side=4, length=4)
    config.rollout.update(context=2, horizon=2, clips=1)
    config.train.batch_size = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("layer", common.LAYER_ARGS)
def test_every_field_of_a_layer_says_what_it_must_be(layer, tmp_path, monkeypatch):
    def reached(*_):
        raise Reached

    monkeypatch.setattr(step, "make_train_step", reached)  # the shapes are known
    for name in common.LAYER_ARGS[layer]:
        for value in (-1, 0, 1e300, 2**70, "x", None, []):
            config = (token_layer if layer in LAYERS else frame_layer)(layer)
            with config.ignore_type():
                config.model.layer_args[name] = value
            try:
                loop.run(config, tmp_path / "run")
            except Reached:
                assert value is not None and value != 1e300, (name, value)
            except ValueError as error:
                assert name in str(error), (name, value, error)
                assert raised_here(error), (name, value, error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pattern="("), r"groups: '\(' must be a regular expression"),
        (dict(groups="x"), "groups must be a sequence of pairs, got 'x'"),
        (dict(groups=[3]), r"groups\[0\] must be a pair of a pattern and its factors"),
        (dict(factors=dict(lr="x")), r"groups\[0\]\.lr must be a number, got 'x'"),
        (dict(factors=dict(lr=-1.0)), "lr must be a factor of 0 or more"),
    ],
    ids=str,
)
def test_groups_are_checked(changes, message, monkeypatch, tmp_path):
    shape = jax.ShapeDtypeStruct((4,), jax.numpy.float32)
    given = [(changes.get("pattern", ".*"), changes.get("factors", {}))]
    config = changed("groups", changes.get("groups", given))
    monkeypatch.setattr(loop, "set_up", lambda c, *_: optimizers.make(c, {"x": shape}))
    with pytest.raises(ValueError, match=message):
        loop.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(name="frames", folder=".", size=(10**6, 10**6)),
            r"data\.size must be smaller: a clip of 20 such frames would take 60,0",
        ),
        (dict(name="frames", folder=".", size=(0, 4)), r"data\.size must be two pixel"),
        (dict(name="frames", folder=".", size=("a", 4)), r"data\.size must be a whole"),
        (
            dict(name="moving_digits", side=10**6, length=1000),
            r"data\.side must be smaller: a clip of 1000 frames would take 1,000,",
        ),
        (
            dict(name="moving_digits", side=10**6, digit_side=10**6),
            r"data\.(digit_)?side must be smaller: ",
        ),
        (dict(name="induction", length=2**31), r"data\.length must be at most 2147483"),
        (dict(name="induction", seed=2**32), r"data\.seed must be below 2\^32"),
        (dict(name="induction", seed=2**64), r"data\.seed must be below 2\^32"),
        (dict(name="induction", vocab_size=2**40), r"data\.vocab_size must be at most"),
        (dict(name="passkey", digits="5"), r"data\.digits must be a whole number, got"),
        (dict(name="mqar", power=float("nan")), r"data\.power must be finite"),
        (dict(name="digits", workers=-1), r"data\.workers must be 0 or more, got -1"),
        (dict(name=["digits"]), r"data\.name must be a text"),
    ],
    ids=str,
)
def test_data_that_cannot_be_are_refused_before_anything_is_allocated(config, message):
    with pytest.raises(ValueError, match=message):
        data.load(config)


def test_a_batch_that_has_no_room_is_refused():
    dataset = data.load(dict(name="induction", length=10**7))
    with pytest.raises(ValueError, match=r"train\.batch_size must be smaller: .*1,?0*"):
        dataset.train(10**6, seed=0)


@pytest.mark.parametrize(
    "command",
    [evaluate, generate, predict, rollout, codec, report_command, reproduce],
)
def test_help_ends_with_0(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


LONG = "x" * 260
FLAGS = {
    "evaluate": {
        "--workdir": ("", LONG, "~nouser/x", "/dev/null", "x\0y"),
        "--split": ("", "nope"),
        "--step": ("", "x", "-1", "9" * 30),
        "--examples": ("", "x", "0", "-1", "1e3"),
        "--lengths": ("", "x", "0", "-1", "²", "9" * 30, "1,,2", "2"),
        "--data": ("", LONG, "~nouser/x", "/dev/null", "x\0y", "nope.npz", "."),
    },
    "generate": {
        "--workdir": ("", LONG, "~nouser/x", "/dev/null", "x\0y"),
        "--step": ("", "x", "-1", "9" * 30),
        "--count": ("", "x", "0", "-1", "9" * 30),
        "--length": ("x", "-1", "9" * 30),
        "--prompt": ("x", "-1", "9" * 30, "1.5"),
        "--temperature": ("x", "-1", "nan", "inf"),
        "--seed": ("x", "-1", "9" * 30, "4294967296"),
        "--out": (LONG, "~nouser/x", "/dev/null/x", ".", "nowhere/x"),
        "--picture": (LONG, "~nouser/x", ".", "nowhere/x.png"),
    },
    "predict": {
        "--workdir": ("", LONG, "~nouser/x", "/dev/null", "x\0y"),
        "--inputs": ("", LONG, "~nouser/x", "nowhere/x.npz", "x\0y"),
        "--out": (LONG, "~nouser/x", "/dev/null/x", ".", "nowhere/x"),
        "--step": ("", "x", "-1", "9" * 30),
        "--batch": ("", "x", "-1", "9" * 30),
        "--length": ("", "x", "-1", "9" * 30),
    },
    "rollout": {
        "--workdir": ("", LONG, "~nouser/x", "/dev/null", "x\0y"),
        "--context": ("", "x", "-1", "9" * 30),
        "--clips": ("", "x", "0", "9" * 30),
        "--sample": ("x", "-1", "9" * 30),
    },
    "report": {
        "--workdir": ("", LONG, "~nouser/x", "/dev/null", "x\0y"),
        "--step": ("", "x", "-1", "9" * 30),
        "--out": (LONG, "~nouser/x", "/dev/null/x", ".", "nowhere/x"),
    },
}


@pytest.mark.parametrize(
    ("command", "flag"), [(c, f) for c, given in FLAGS.items() for f in given]
)
def test_every_flag_says_what_it_must_be(run, command, flag, capsys):
    start, arguments = COMMANDS[command]
    for value in FLAGS[command][flag]:
        with pytest.raises(SystemExit) as ended:
            start([*arguments, str(run), f"{flag}={value}"])
        assert ended.value.code == 2, (flag, value)
        said = capsys.readouterr().err.strip().splitlines()
        assert "error: " in said[-1] and "Traceback" not in said, (flag, value, said)
        assert "are required" not in said[-1], (flag, value, said)
