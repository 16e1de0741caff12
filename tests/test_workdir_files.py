"""Whatever lies in a workdir, whoever reads it says in one line what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from absl import flags

from train import data, evaluate, generate, loop, main, metrics, predict, records, runs
from train.report import __main__ as report
from train.video import codec, rollout, section

RUN = Path(__file__).parent / "old_runs" / "695c40c"

COMMANDS = {
    "evaluate": lambda run: evaluate.main(["--workdir", run]),
    "evaluate --lengths": lambda run: evaluate.main(["--workdir", run, "--lengths=1"]),
    "generate": lambda run: generate.main(["--workdir", run]),
    "predict": lambda run: predict.main(["--workdir", run, "--inputs", "-"]),
    "report": lambda run: report.main(["--workdir", run]),
    "report --compare": lambda run: report.main(["--compare", run, str(RUN)]),
    "rollout": lambda run: rollout.main(["--workdir", run]),
    "codec": lambda run: codec.main(["--workdir", run, "--out", "x.npz"]),
}
REPORTS = ("report", "report --compare")

NESTED = "[" * 200_000
BROKEN = {
    "cut off": ('{"step": 1,\n "sp', "line 2 must be JSON"),
    "empty": ("", "line 1 must be JSON"),
    "a list": ("[1, 2]", "must hold a JSON object, got '[1, 2]'"),
    "a number": ("3", "must hold a JSON object, got '3'"),
    "nothing": ("null", "must hold a JSON object, got 'null'"),
    "nested": (NESTED, "must be JSON of some levels, got very many"),
    "no text": (b'{"a":\n "\xff"}', "line 2 must be UTF-8 text"),
    "digits": ("[" + "9" * 5000 + "]", "cannot be read: "),
    "a folder": (None, "cannot be read: Is a directory"),
}
LINES = {
    "cut off": ('{"step": 1,\n{"step": 2}\n', "line 1 must be a JSON object"),
    "a list": ('{"step": 1, "split": "train"}\n[]\n{}\n', "line 2 must be a JSON"),
    "no split": ('{"step": 1}\n{}\n', "line 1 must be a JSON object"),
    "text": ('{"step": 1, "split": "train", "loss": "x"}\n{}\n', "the rest numbers"),
    "a late time": ('{"step": 1, "split": "a", "time": 1e99}\n{}\n', "line 1 must"),
    "a huge step": ('{"step": 1e400, "split": "train"}\n{}\n', "line 1 must be"),
    "nested": (NESTED + "\n{}\n", "line 1 must be a JSON object"),
    "a folder": (None, "cannot be read: Is a directory"),
}
RESULTS = {
    "no step": ({"step": None}, "step must be a whole number, got None"),
    "unknown loss": ({"loss": "x"}, "loss must be one of "),
    "a list of losses": ({"loss": []}, "loss must be one of "),
    "a test of text": ({"test": "good"}, "test must have accuracy, got 'good'"),
    "an empty test": ({"test": {}}, "test must have accuracy, got {}"),
    "a best of text": ({"best": "x"}, "best must have a step, got 'x'"),
    "a best alone": ({"best": {"step": 3}}, "best.validation must be an object"),
}


def harmed(tmp_path, name, content):
    """A copy of a run in which a file holds `content`; None: is a folder."""
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    (run / name).unlink(missing_ok=True)
    if content is None:
        (run / name).mkdir()
    elif isinstance(content, bytes):
        (run / name).write_bytes(content)
    else:
        (run / name).write_text(content)
    return run


def answer(command, run, capsys):
    """The line that a command ends with, whose exit code is 2."""
    with pytest.raises(SystemExit, match="2"):
        COMMANDS[command](str(run))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_config(tmp_path, capsys, command, content, reason):
    run = harmed(tmp_path, "config.json", content)
    said = answer(command, run, capsys)
    assert str(run / "config.json") in said and reason in said


@pytest.mark.parametrize("section", records.SECTIONS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_without_a_section(tmp_path, capsys, command, section):
    config = json.loads((RUN / "config.json").read_text())
    run = harmed(tmp_path, "config.json", json.dumps(config | {section: 3}))
    said = answer(command, run, capsys)
    assert f"{run / 'config.json'}: {section} must be an object, got 3" in said


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["results.json", "versions.json"])
@pytest.mark.parametrize("command", REPORTS)
def test_a_broken_file_of_a_report(tmp_path, capsys, command, name, content, reason):
    run = harmed(tmp_path, name, content)
    said = answer(command, run, capsys)
    assert str(run / name) in said and reason in said


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["evaluate", "generate", "predict", "report"])
def test_broken_facts_of_the_data(tmp_path, capsys, command, content, reason):
    run = harmed(tmp_path, "data.json", content)
    said = answer(command, run, capsys)
    assert str(run / "data.json") in said and reason in said


@pytest.mark.parametrize(("content", "reason"), LINES.values(), ids=LINES)
@pytest.mark.parametrize("command", REPORTS)
def test_broken_metrics(tmp_path, capsys, command, content, reason):
    run = harmed(tmp_path, "metrics.jsonl", content)
    said = answer(command, run, capsys)
    assert str(run / "metrics.jsonl") in said and reason in said


@pytest.mark.parametrize(("change", "reason"), RESULTS.values(), ids=RESULTS)
def test_results_of_another_kind(tmp_path, capsys, change, reason):
    results = json.loads((RUN / "results.json").read_text())
    run = harmed(tmp_path, "results.json", json.dumps(results | change))
    said = answer("report", run, capsys)
    assert str(run / "results.json") in said and reason in said


def test_versions_of_another_kind(tmp_path, capsys):
    run = harmed(tmp_path, "versions.json", '{"devices": [3]}')
    assert "versions.json: devices must be a list of names" in answer(
        "report", run, capsys
    )


def test_what_is_right_is_read():
    told = runs.read(RUN)
    assert told.results["step"] == 8 and len(told.rows) == 9 and told.devices()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_workdir_that_is_none(tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file" / "run", tmp_path / "file"):
        assert str(run) in answer(command, run, capsys)
    long = tmp_path / ("x" * 260)
    assert "File name too long" in answer(command, long, capsys)


@pytest.mark.parametrize("command", ["evaluate", "generate", "report"])
def test_checkpoints_that_are_none(tmp_path, capsys, command):
    run = harmed(tmp_path, "x", "")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    assert f"{run / 'checkpoints'} cannot be read: Not a" in answer(
        command, run, capsys
    )


@pytest.fixture
def train(monkeypatch, capsys):
    """What `python -m train.main` answers, with exit code 2, before it compiles."""

    def compiles(*_):
        raise AssertionError("it went on to compile")

    monkeypatch.setattr(loop, "set_up", compiles)

    def start(run, *more):
        arguments = [
            "train.main",
            "--config=configs/pixels.py:digits,layer=gru",
            f"--workdir={run}",
            "--noreport",
            *more,
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        flags.FLAGS.unparse_flags()
        for name in ("workdir", "seeds", "lengths", "report", "config"):
            flags.FLAGS[name].unparse()
        with pytest.raises(SystemExit, match="2"):
            main.command(main.main)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    yield start
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "tensorboard",
        "config.json",
        "data.json",
        "metrics.jsonl",
        "run.lock",
    ],
)
def test_something_in_the_way_is_said_before_compiling(tmp_path, train, name):
    if "." in name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    said = train(tmp_path)
    assert name in said
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/run", "got the file"),
        ("file", "got the file"),
        ("x" * 260, "File name too long"),
        ("~nouser/run", "got '~nouser/run' (Could not determine home"),
    ],
)
def test_a_workdir_that_cannot_be(tmp_path, monkeypatch, train, place, reason):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parents[1] / "configs", tmp_path / "configs")
    assert reason in train(place if place.startswith("~") else tmp_path / place)


def test_a_read_only_disk_is_said_before_compiling(tmp_path, monkeypatch, train):
    def refuse(*_, **__):
        raise OSError(30, os.strerror(30), "somewhere")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "workdir must be a folder that can be written, got" in train(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Read-only file system" in train(tmp_path / "new")


def test_a_broken_config_is_said_on_resuming(tmp_path, train):
    run = harmed(tmp_path, "config.json", "{")
    assert f"{run / 'config.json'} cannot be read: line 1 must be JSON" in train(run)
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"spec": 3}', NESTED, None])
def test_broken_facts_of_the_data_are_said_on_resuming(tmp_path, content):
    """And nothing is touched: only the user knows whether the data are still those."""
    run = harmed(tmp_path, "data.json", content)
    dataset = data.load(records.read_config(run).data)
    with pytest.raises(ValueError, match=r"if the data .* remove the file") as refusal:
        records.check_data(run, dataset)
    line, path = str(refusal.value), run / "data.json"
    assert str(path) in line and "\n" not in line
    if content is None:
        path.rmdir()
    else:
        path.unlink()
    records.check_data(run, dataset)  # the cure
    records.write_data(run, dataset)
    assert records.read_data(run) == dataset.spec


def test_broken_facts_of_the_data_end_a_resume_before_compiling(tmp_path, monkeypatch):
    run = harmed(tmp_path, "data.json", "{")
    monkeypatch.setattr(loop, "set_up", None)
    config = records.read_config(run)
    config.train.steps = 12
    with pytest.raises(ValueError, match=r"data\.json .* remove the file"):
        loop.run(config, run)
    assert (run / "data.json").read_text() == "{"


@pytest.mark.parametrize("content", ["{", "[]", '{"step": "x"}', NESTED])
def test_broken_results_do_not_keep_a_run_from_going_on(tmp_path, content, capsys):
    run = harmed(tmp_path, "results.json", content)
    assert records.finished(run, records.read_config(run)) is None
    said = capsys.readouterr().out
    assert str(run / "results.json") in said and said.count("\n") == 1
    assert "the run goes on from its last checkpoint" in said


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3", '{"step": "x"}', NESTED, "\0"])
def test_a_broken_line_of_the_log_is_left_out_and_named(tmp_path, line, capsys):
    """Going on with a run does not hang on it; only what a kill cut off goes unsaid."""
    path, row = tmp_path / metrics.FILE, '{"step": 1, "split": "train"}\n'
    path.write_text(f"{row}{line}\n{row}{row[:9]}")
    metrics.Metrics(tmp_path, 1, 2).__exit__(None)
    assert path.read_text() == row * 2
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: line 2 is left out") and said.count("\n") == 1


@pytest.mark.parametrize(
    "found",
    ["x", {"scores": {}}, {"scores": {"model": {"psnr": [1.0]}}, "clips": 2}],
    ids=["text", "no scores", "no split"],
)
def test_a_broken_rollout(found):
    """What a report of a video run reads."""
    with pytest.raises(ValueError, match=r"a/results\.json: rollout must have clips, "):
        section.check(Path("a/results.json"), found)
