"""The commands a user types, at smoke sizes."""

import json
import runpy
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from configs import pixels
from kernels.bench import __main__ as kernels_bench
from kernels.bench import timing
from kernels.tolerance import assert_close
from layers import build, prepare
from train import evaluate, generate, loop, runs
from train.bench import __main__ as bench
from train.reproduce import __main__ as reproduce


def small(arg):
    config = pixels.get_config(arg)
    config.model.update(features=6, depth=1)
    config.model.layer_args.state_size = 4
    config.train.update(steps=2, batch_size=8, eval_every=2, checkpoint_every=2)
    return config


@pytest.fixture(scope="module")
def next_pixel(tmp_path_factory):
    """A finished run that predicts the next pixel."""
    workdir = tmp_path_factory.mktemp("next")
    loop.run(small("digits,target=next"), workdir)
    return workdir


def test_evaluate_prints_scores_and_the_gap_between_modes(next_pixel, capsys):
    assert evaluate.main(["--workdir", str(next_pixel), "--split", "validation"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and found["split"] == "validation"
    assert 0 <= found["accuracy"] <= 1 and found["parallel_vs_recurrent"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tests"], "split must be one of train, test, validation"),
        (["--step", "7"], "no checkpoint of step 7"),
        (["--workdir", "nowhere"], "workdir must be that of a run"),
    ],
)
def test_evaluate_says_what_is_wrong(next_pixel, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--workdir", str(next_pixel), *arguments])
    assert message in capsys.readouterr().err


def test_generate_writes_tokens_and_a_picture(next_pixel, tmp_path, capsys):
    out, picture = tmp_path / "tokens.npy", tmp_path / "digits.png"
    command = ["--workdir", str(next_pixel), "--count", "2", "--out", str(out)]
    assert generate.main([*command, "--picture", str(picture)]) == 0
    tokens = np.load(out)
    assert tokens.shape == (2, 64) and tokens.min() >= 0 and tokens.max() < 17
    printed = [line.split() for line in capsys.readouterr().out.strip().split("\n")]
    np.testing.assert_array_equal(np.array(printed, int), tokens)
    assert picture.stat().st_size > 0
    for arguments, message in (
        (["--prompt", "a"], "prompt: must be integers"),
        (["--prompt", "99"], r"prompt: tokens must be in [0, 18)"),
        (["--count", "0"], "count: must be at least 1"),
        (["--temperature", "-1"], "temperature: must be 0 or more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            generate.main([*command, *arguments])
        assert message in capsys.readouterr().err


def test_greedy_generation_is_the_argmax_of_the_parallel_mode(next_pixel):
    run = runs.load_run(next_pixel)
    prompt = np.array([[17, 3, 0], [17, 9, 16]], np.int32)
    made = generate.generate(
        run.model, run.variables, prompt, 5, jax.random.key(0), temperature=0
    )
    whole = jnp.concatenate([jnp.asarray(prompt), made], axis=1)
    logits, _ = jax.jit(run.model.apply)(run.variables, whole)
    np.testing.assert_array_equal(made, jnp.argmax(logits[:, 2:-1], axis=-1))


@pytest.mark.parametrize("layer", ["s4d", pytest.param("s5", marks=pytest.mark.slow)])
def test_prepared_variables_change_nothing_but_the_time(layer):
    config = small(f"digits,layer={layer}").model
    config.update(encoder="scalar", outputs=3, depth=2)
    model = build(config)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    variables = jax.jit(model.init)({"params": jax.random.key(1)}, x)
    fast = prepare(model, variables, x[:, :1])
    assert ("constants" in fast) == (layer == "s4d")
    apply, states = jax.jit(model.apply), [model.init_state(2)] * 2
    for t in range(4):
        outputs = [
            apply(v, x[:, t : t + 1], s)
            for v, s in zip((variables, fast), states, strict=True)
        ]
        states = [state for _, state in outputs]
        assert_close(outputs[1], outputs[0])


@pytest.mark.slow
def test_reproduce_rewrites_the_table_and_does_not_train_twice(
    tmp_path, monkeypatch, capsys
):
    task = reproduce.Task(small, "digits", ("s4d",))
    monkeypatch.setitem(reproduce.TASKS, "digits", task)
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- digits:begin -->\nold\n<!-- digits:end -->\nafter\n")
    command = ["--seeds", "0,1", "--workdir", str(tmp_path / "runs")]
    assert reproduce.main([*command, "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| `s4d` |" in text and "logistic regression" in text and "old" not in text
    assert reproduce.main([*command, "--readme", str(page)]) == 0
    assert page.read_text() == text
    assert "finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmarks_run_at_small_sizes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--case", "decode", "--small", "--repeats", "1", "--out", str(out)]
    assert bench.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [row["form"] for row in found["decode"]] == ["S4D", "dense state matrices"]
    command = ["bench", "--op", "short_conv", "--small", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    kernels_bench.main()
    assert json.loads(out.read_text())["rows"][0]["op"] == "short_conv"
    assert "short_conv" in capsys.readouterr().out


@pytest.mark.slow
def test_the_suite_over_frames_runs_at_small_sizes(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--suite", "video", "--small", "--repeats", "1", "--out", str(out)]
    assert bench.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [row["form"] for row in found["step"]][:2] == ["ConvS5", "ConvLSTM"]
    assert {row["frames"] for row in found["memory"]} == {4, 8}
    assert len(found["generation"]) == 8
    with pytest.raises(SystemExit):
        bench.main(["--suite", "video", "--case", "step"])
    assert "--case is of the suite tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_the_suite_over_pictures_runs_at_small_sizes(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--suite", "pictures", "--small", "--repeats", "2", "--out", str(out)]
    assert bench.main(arguments) == 0
    rows = json.loads(out.read_text())["pictures"]
    assert [(row["side"], row["what"]) for row in rows] == [
        (16, "drawn"),
        (32, "drawn"),
        (16, "prepared"),
    ]
    assert all(row["median"] > 0 for row in rows)
    assert "a second and core" in capsys.readouterr().out


def test_a_slow_form_is_timed_once():
    calls = []

    def slow(x):
        calls.append(x)
        time.sleep(0.02)
        return x

    found = timing.measure({"slow": (slow, (1,))}, repeats=5, limit=0.01)
    assert len(found["slow"]) == 1 and len(calls) == 2


def test_every_peer_has_its_case():
    timed = {(case.op, case.name) for case in kernels_bench.WORKLOADS}
    assert {(peer.op, peer.case) for peer in kernels_bench.peers.PEERS} <= timed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.rounding", "layers.laws.rounding"),
        ("train.rollout", "train.video.rollout"),
        ("train.tokenize", "train.video.codec"),
    ],
)
def test_old_commands_answer_with_the_new_ones(old, new, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [old, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(old, run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 0 and f"usage: python -m {new}" in said.out
    assert said.err == f"python -m {old} is now python -m {new}\n"


@pytest.mark.slow
def test_the_old_command_of_the_baseline():
    command = [sys.executable, "-m", "train.baseline", "--config=configs/pixels.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny_run.ROOT)
    assert done.returncode == 0 and "logistic regression: test" in done.stdout
    assert "is now python -m train.reproduce.baseline" in done.stderr
