"""What a workdir from elsewhere may do: nothing but be read."""

import json
import sys

import jax
import pytest

from configs import pixels
from train import (
    checkpoint,
    evaluate,
    generate,
    loop,
    main,
    rollout,
    state,
    tokenize,
)
from train.report import __main__ as report_command

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


def test_nothing_else_that_reads_a_run_imports_what_it_names(
    run, stranger, tmp_path, capsys
):
    executed = stranger(layer=NAME)
    with pytest.raises(ValueError, match="must be of an autoencoder"):
        tokenize.load_codec(run)
    with pytest.raises(SystemExit, match="2"):
        tokenize.main(["--workdir", str(run), "--out", str(tmp_path / "x.npz")])
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
    found = evaluate.load_run(run, trust=True)
    assert type(found.model.stack().pattern[0]().mixer()).__name__ == "Layer"


def test_a_run_that_was_trained_here_needs_no_trust(run, stranger):
    stranger(layer=NAME)
    main._write_report(run)
    assert (run / "report.html").exists()


def test_a_run_cannot_choose_a_network(run, stranger):
    stranger()
    kept = json.loads((run / "config.json").read_text())
    kept["rollout"] |= {"fvd": "evil.pt", "lpips": "evil.pt", "other": 1}
    (run / "config.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="2"):  # no video model; nothing was loaded
        rollout.main(["--workdir", str(run)])
    assert "torch" not in sys.modules
