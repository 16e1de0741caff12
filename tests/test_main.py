import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_run
from absl import flags

from train import main, runs

CONFIG = "configs/pixels.py:digits"
FLAGS = ("workdir", "seeds", "lengths", "report", "config", "certificate")
FLAGS += ("compilation_cache",)
PLAN = ("target", "json", "memory", "emulate", "propose", "table", "workload")


def answer(*arguments):
    """What `python -m train.main` says to something that it cannot do."""
    command = [sys.executable, "-m", "train.main", *arguments]
    done = subprocess.run(
        command, cwd=tiny_run.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config", CONFIG, "--config.train.stpes=3"], "has no 'stpes'; it has acc"),
        (["--config", CONFIG, "--wrkdir=x"], "Did you mean: workdir"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    said = answer(*arguments)
    assert said.startswith("error: ") and message in said
    assert said.count("\n") == 1


def test_an_unknown_layer_is_one_line_too(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    said = answer("--config", CONFIG, workdir, "--config.model.layer=nope")
    assert said.startswith("error: layer: must be one of [")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parsed(monkeypatch):
    """Parses flags for `main.main` in this process."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.main", *arguments])
        flags.FLAGS.unparse_flags()
        for name in [n for n in flags.FLAGS if n.startswith("config.")]:
            delattr(flags.FLAGS, name)  # what another command line has overridden
        sys.modules.pop("config_config", None)  # what a file lacks, another had
        for name in {*FLAGS, *PLAN} & {*flags.FLAGS}:
            flags.FLAGS[name].unparse()
        return main._parse(sys.argv)

    yield parse
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nope:a"], "or one of images, lra, own, pixels, synthetic, video"),
        (["--config=configs/pixels.py:digits,lyer=s5"], "'lyer=s5' is not valid"),
        (["--config", CONFIG, "--config.trian.steps=3"], "has no 'trian'; it has data"),
        (["--config", CONFIG, "--config.train.steps=x"], "--config.train.steps=x: inv"),
        (
            ["--config", CONFIG, "--seeds=0,one"],
            "whole numbers such as 0,1,2, got 'one'",
        ),
        (["--config", CONFIG, "extra"], r"arguments must be flags, got \['extra'\]"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_mistakes_of_every_kind_are_named(parsed, arguments, message):
    with pytest.raises((ValueError, flags.Error), match=message) as raised:
        main.main(parsed(*arguments))
    assert main._ours(raised.value)


def test_the_compilation_cache_is_of_the_machine(parsed, monkeypatch, tmp_path):
    from train import loop

    used = []

    def run(config, *_, **__):
        used.append(jax.config.jax_compilation_cache_dir)
        return {"stopped": "SIGTERM"}

    monkeypatch.setattr(loop, "run", run)
    before, folder = jax.config.jax_compilation_cache_dir, str(tmp_path / "programs")
    try:
        assert main.main(parsed(f"--config={CONFIG}")) == 0
        flag = f"--compilation_cache={folder}"
        assert main.main(parsed(f"--config={CONFIG}", flag)) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert used == [before, folder]
    flag = f"--compilation_cache={__file__}"
    with pytest.raises(ValueError, match="--compilation_cache must be a folder, got"):
        main.main(parsed(f"--config={CONFIG}", flag))


def results(seed):
    test = {"accuracy": 0.5 + seed / 10, "loss": 1.0}
    best = {"step": 1, "validation": test, "test": {"accuracy": 0.9, "loss": 1.0}}
    return {"step": 2, "loss": "classification", "test": test, "best": best}


def test_several_seeds(parsed, monkeypatch, capsys, tmp_path):
    from train import loop

    started = []

    def run(config, workdir, profile, typed):
        started.append((config.seed, str(workdir)))
        return results(config.seed)

    monkeypatch.setattr(loop, "run", run)
    argv = parsed(f"--config={CONFIG},layer=s5", "--seeds=0,1,3")
    assert main.main(argv) == 0
    name = "runs/pixels-digits,layer=s5-"
    assert started == [(seed, f"{name}{seed}") for seed in (0, 1, 3)]
    out = capsys.readouterr().out
    assert "median           0.6000    0.9000" in out
    assert "lowest           0.5000    0.9000" in out
    assert "highest          0.8000    0.9000" in out
    started.clear()
    main.main(parsed(f"--config={CONFIG}", "--seeds=0,1", f"--workdir={tmp_path}"))
    assert started == [(seed, str(tmp_path / str(seed))) for seed in (0, 1)]


def test_a_stopped_run_ends_the_row_of_seeds(parsed, monkeypatch, capsys):
    from train import loop

    monkeypatch.setattr(
        loop, "run", lambda *_, typed: {"step": 1, "stopped": "SIGTERM"}
    )
    assert main.main(parsed(f"--config={CONFIG}", "--seeds=0,1")) == 0
    assert capsys.readouterr().out.count("workdir:") == 1


def test_main_tests_at_several_lengths(parsed, monkeypatch, tmp_path):
    from train import evaluate, loop

    asked = []
    monkeypatch.setattr(loop, "run", lambda *_, typed: {"step": 1})
    monkeypatch.setattr(runs, "load_run", lambda workdir, trust: workdir)
    monkeypatch.setattr(evaluate, "at_lengths", lambda *words: asked.append(words))
    command = ["--config=configs/synthetic.py:induction", f"--workdir={tmp_path}"]
    command += ["--noreport", "--lengths=1,4"]
    assert main.main(parsed(*command)) == 0
    assert asked == [(tmp_path, tmp_path, "test", (1, 4))]
    monkeypatch.setattr(loop, "run", None)  # what cannot be is said before
    with pytest.raises(ValueError, match="'digits' has one length only"):
        main.main(parsed(f"--config={CONFIG}", "--lengths=2"))


def test_default_workdir(parsed, monkeypatch):
    from train import loop

    found = []
    monkeypatch.setattr(
        loop, "run", lambda _, workdir, __, typed: found.append(workdir) or {}
    )
    main.main(parsed("--config=configs/own.py:path=a/b c.npz"))
    assert str(found[0]) == "runs/own-path=a_b_c.npz-0"


@pytest.mark.slow
def test_profile(tmp_path):
    process = tiny_run.start(tmp_path, tmp_path / "cache", "--profile")
    tiny_run.finish(process)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("path", ["configs/pixels.py", "pixels"])
@pytest.mark.parametrize("given", [["--config"], ["-config"], []], ids=str)
def test_a_name_alone_is_a_config_of_this_project(
    parsed, path, given, tmp_path, monkeypatch
):
    """As its path is from the project's folder, and from any other."""
    if path == "pixels":
        monkeypatch.chdir(tmp_path)
    else:
        monkeypatch.chdir(tiny_run.ROOT)
    value = f"{path}:digits,layer=gru"
    parsed(*([*given, value] if given else [f"--config={value}"]))
    assert main.CONFIG.value.model.layer == "gru"
    assert main._workdir(3, several=False) == Path("runs/pixels-digits,layer=gru-3")


SAME = ("-?", "--helpfull")


@pytest.mark.parametrize(
    "flag", ["--help", *(pytest.param(f, marks=pytest.mark.slow) for f in SAME)]
)
def test_help_ends_with_0(flag):
    command = [sys.executable, "-m", "train.main", flag]
    done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--workdir" in done.stdout and not done.stderr


NO_CONFIGS = {
    "syntax": ("x = (", r"cannot be used \(SyntaxError: '\(' was never closed"),
    "no get_config": ("x = 1", r"cannot be used \(AttributeError: .*'get_config'"),
    "another type": ("def get_config(): return 3", "must return a ConfigDict, got int"),
    "nothing": ("def get_config(): pass", "must return a ConfigDict, got NoneType"),
    "import": ("import nothere", r"cannot be used \(ModuleNotFoundError: .*nothere"),
    "bytes": ("\udcff", r"cannot be used \(SyntaxError: .*'utf-8' codec can't decode"),
    "key": ("def get_config(): return {}['x']", r"cannot be used \(KeyError: 'x'\)"),
    "file": (
        "def get_config(): open('nowhere')",
        r"cannot be used \(OSError: .*no",
    ),
}


@pytest.mark.parametrize(("text", "message"), NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_what_is_no_config_file_is_named(parsed, tmp_path, text, message):
    path = tmp_path / "own.py"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"own\.py {message}") as raised:
        parsed(f"--config={path}")
    assert "\n" not in str(raised.value) and main._ours(raised.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("README.md", "must be a Python file with get_config, such as .* 'README.md'"),
        ("configs", "must be a Python file with get_config"),
        ("", "there is no file ''"),
        (":digits", "there is no file ''"),
        ("~nouser/x.py", "must be a path that can be, got '~nouser"),
        (f"{'x' * 260}.py", "must be a path that can be.*File name too long"),
        ("nowhere.py:a", "there is no file 'nowhere.py'"),
    ],
    ids=str,
)
def test_what_is_no_file_is_named(parsed, file, message):
    with pytest.raises(ValueError, match=f"--config:? {message}"):
        parsed(f"--config={file}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seeds=18446744073709551616", r"--seeds must be below 2\^32"),
        (f"--seeds={'9' * 5000}", "--seeds must be whole numbers such as 0,1,2"),
        ("--seeds=-1", "--seeds must be whole numbers such as 0,1,2, got '-1'"),
        ("--seeds=\N{SUPERSCRIPT TWO}", "--seeds must be whole numbers"),
        ("--seeds=1,1", "--seeds must name a seed once, got 1,1"),
        ("--config.seed=18446744073709551616", r"seed must be below 2\^32"),
        (f"--workdir={'x' * 260}", "--workdir must be a path that can be.*too long"),
        ("--workdir=~nouser/x", "--workdir must be a path that can be, got '~nouser/x"),
        ("--lengths=", "--lengths must be whole numbers from 1"),
        ("--certificate=/", "--certificate must be a file"),
    ],
    ids=lambda value: value[:30],
)
def test_flags_that_cannot_be_are_named(parsed, monkeypatch, flag, message):
    from train import loop

    monkeypatch.setattr(loop, "run", None)  # nothing is begun
    with pytest.raises(ValueError, match=message) as raised:
        main.main(parsed(f"--config={CONFIG}", flag))
    assert main._ours(raised.value)


def test_a_workdir_may_begin_with_the_home(parsed, monkeypatch, tmp_path):
    from train import loop

    found = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        loop, "run", lambda _, workdir, __, typed: found.append(workdir) or {}
    )
    main.main(parsed(f"--config={CONFIG}", "--workdir=~/run", "--noreport"))
    assert found == [tmp_path / "run"]


def test_an_error_of_the_file_system_is_the_users():
    assert main._ours(PermissionError(13, "Permission denied", "runs/a"))
    assert not main._ours(OSError("of nobody's file"))
