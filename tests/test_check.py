"""python -m kernels.check, its certificate, and what a training run makes of it."""

import dataclasses
import inspect
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import compat, dispatch
from kernels.check import __main__ as check
from kernels.check import cases, certificate, comparison, conformance, machine_code
from kernels.check.cases import DTYPES, OPERATIONS, Case
from kernels.linear_scan import xla
from train import exclusions

ROOT = Path(__file__).parents[1]


def can_run(*arguments):
    return None


def test_every_operation_is_checked():
    public = {name: getattr(kernels, name) for name in kernels.__all__}
    with_backends = {
        name
        for name, op in public.items()
        if "backend" in inspect.signature(op).parameters
    }
    # the one calls cauchy, the other takes a backend's name
    assert with_backends - {"dplr_filter", "exclude"} == {*OPERATIONS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_variant_can_be_called(name):
    operation = OPERATIONS[name]
    chosen = cases.covering(list(operation.product((7, 1), DTYPES)), strength=1)
    for *values, dtype in chosen:
        case = Case(*values)
        inputs = comparison.rounded(operation.inputs(case), dtype)
        assert ("initial_state" in inputs) == case.state
        assert ("reset" in inputs) == case.reset
        values = jax.eval_shape(
            lambda inputs, case=case: operation.call(
                **inputs, **operation.static(case), backend="reference"
            ),
            inputs,
        )
        assert comparison.named_outputs(values)
    assert {variant for variant, *_ in chosen} == {*operation.variants}


def test_few_cases_show_every_two_values_together():
    candidates = list(OPERATIONS["linear_scan"].product((7, 1, 64), DTYPES))
    chosen = cases.covering(candidates)
    assert chosen[0] == candidates[0] and len(chosen) < len(candidates) / 10
    for i, j in itertools.combinations(range(len(candidates[0])), 2):
        wanted = {(case[i], case[j]) for case in candidates}
        assert {(case[i], case[j]) for case in chosen} == wanted
    singly = cases.covering(candidates, strength=1)
    assert {case[0] for case in singly} == {case[0] for case in candidates}
    assert len(singly) == len({case[0] for case in candidates})


# A backend that is wrong.


def drops_the_states_gradient():
    def backward(*arguments):
        da, dx, dstate = xla.backward(*arguments)
        return da, dx, jnp.zeros_like(dstate)

    return {"backward": backward}


def ignores_reverse():
    def forward(a, x, state, keep, reverse):
        return xla.forward(a, x, state, keep, False)

    return {"forward": forward}


def has_no_memory():
    def forward(a, x, state, keep, reverse):
        if keep is not None:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a stack")
        return xla.forward(a, x, state, keep, reverse)

    return {"forward": forward}


def writes_nothing():
    def forward(a, x, state, keep, reverse):
        h, final = xla.forward(a, x, state, keep, reverse)
        return h * jnp.nan, final

    return {"forward": forward}


@pytest.fixture
def inject(monkeypatch):
    """Puts a backend before the others of linear_scan, at a short length."""

    def put(name, variants=("real",), **changes):
        functions = {"forward": xla.forward, "backward": xla.backward, **changes}
        backend = SimpleNamespace(
            **{"PAIRS": False, "unsupported": can_run, **functions}
        )
        module = sys.modules["kernels.linear_scan"]
        table = {name: backend, "xla": xla, "reference": module.reference}
        monkeypatch.setattr(module, "BACKENDS", table)
        operation = OPERATIONS["linear_scan"]
        fewer = dataclasses.replace(operation, variants=variants)
        monkeypatch.setitem(OPERATIONS, "linear_scan", fewer)

    monkeypatch.setattr(conformance, "LENGTHS", (7,))
    monkeypatch.setattr(dispatch, "_excluded", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    return put


COMMAND = ["--op", "linear_scan", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            drops_the_states_gradient,
            "real, L=7, state, reset, reverse: gradient of initial_state: error 1, "
            "limit 1e-04",
        ),
        (ignores_reverse, "real, L=7, state, reset, reverse: output: error"),
        (
            has_no_memory,
            "real, L=7, state, reset, reverse: RuntimeError: RESOURCE_EXHAUSTED: out "
            "of memory\n",
        ),
        (writes_nothing, "real, L=7, state, reset, reverse: output: not finite"),
    ],
)
def test_a_broken_backend_is_caught_named_and_left_out(
    broken, says, inject, tmp_path, capsys
):
    name = broken.__name__
    inject(name, **broken())
    out = tmp_path / "here" / "found.json"
    assert check.main([*COMMAND, "--backend", name, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and f"certificate: {out}" in said
    assert f"FAILED: linear_scan, backend {name}, float32 (run): {says}" in said

    made = json.loads(out.read_text())
    assert made["coverage"] == "default, part"
    (row,) = made["results"]
    assert row["backend"] == name and row["verdict"] == "failed"
    if broken is ignores_reverse:
        assert all("reverse: " in text for text in row["failures"])
    if broken is drops_the_states_gradient:
        worst = row["gradient"]
        assert worst["name"] == "initial_state" and worst["error"] == 1
        assert row["value"]["error"] < 1e-6
    if broken is writes_nothing:
        assert row["value"]["error"] is None
    assert list(out.parent.iterdir()) == [out]

    x = jnp.ones((1, 3, 2))
    kernels.linear_scan(x, x)
    assert kernels.backend_report()["linear_scan"][0] == name
    exclusions.apply(out)
    said = capsys.readouterr().out
    assert said.startswith(
        f"linear_scan: backend {name} is left out: failed in float32"
    )
    assert said.count("\n") == 1
    kernels.linear_scan(x, x)
    chosen, why = kernels.backend_report()["linear_scan"]
    assert chosen == "xla"
    assert f"{name}: failed in float32 ({says.strip()[:40]}" in why and str(out) in why
    kernels.linear_scan(x, x, backend=name)
    assert kernels.backend_report()["linear_scan"][0] == name


def test_a_backend_may_refuse_some_cases(inject, tmp_path, capsys):
    def unsupported(a, x):
        return "no complex; not 'yet'" if jnp.iscomplexobj(x) else None

    inject("picky", ("real", "complex"), unsupported=unsupported)
    out = tmp_path / "found.json"
    assert check.main([*COMMAND, "--backend", "picky", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "not run: linear_scan, backend picky (run; complex, L=7" in said
    assert "): no complex; not 'yet'" in said and "not taken" in said
    (row,) = json.loads(out.read_text())["results"]
    assert row["verdict"] == "passed" and row["not_taken"] and row["cases"]


def test_a_backend_that_cannot_run_here_fails_nothing(inject, capsys):
    inject("far", unsupported=lambda a, x: "needs another machine")
    assert check.main([*COMMAND, "--quick", "--backend", "far"]) == 0
    said = capsys.readouterr().out
    assert "needs another machine" in said and "not run" in said


def test_a_whole_check_writes_where_training_looks(
    inject, tmp_path, monkeypatch, capsys
):
    inject("broken", **drops_the_states_gradient())
    for name in set(OPERATIONS) - {"linear_scan"}:
        monkeypatch.delitem(OPERATIONS, name)
    monkeypatch.setattr(conformance, "LENGTHS", (2,))
    monkeypatch.setattr(cases.Operation, "product", one_of_each_dtype)
    monkeypatch.chdir(tmp_path)
    assert check.main(["--quick"]) == 1
    assert not list(tmp_path.iterdir())  # a part is not written unasked
    assert check.main([]) == 1
    path = Path("runs/kernels/cpu.json")
    assert json.loads(path.read_text())["coverage"] == "default"
    capsys.readouterr()
    exclusions.apply()
    assert f"certificate {path}" in capsys.readouterr().out
    assert ("linear_scan", "broken") in dispatch._excluded


def one_of_each_dtype(operation, lengths, dtypes):
    for dtype in dtypes:
        yield ("real", lengths[0], True, False, False, dtype)


# The certificate.


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """A certificate of this device by which a backend failed, and a way to change it;
    with it the file."""
    monkeypatch.setattr(dispatch, "_excluded", {})
    row = conformance.Row("linear_scan", "xla", "run", "float32", 1)
    row.failures.append("real, L=7: output: error 1, limit 2e-05")
    path = tmp_path / "found.json"

    def write(change=lambda made: None):
        made = check.contents([row], "default")
        change(made)
        certificate.write(path, made)
        return path

    return write


def test_a_failure_that_holds_here_is_excluded(failed, capsys):
    exclusions.apply(failed())
    assert list(dispatch._excluded) == [("linear_scan", "xla")]
    assert "error 1, limit 2e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["device"].update(kind="H200"), "(kind H200 there, cpu here)"),
        (lambda m: m["device"].update(driver="1.2"), "(driver 1.2 there, cpu here)"),
        (lambda m: m["versions"].update(jaxlib="0.1"), "(jaxlib 0.1 there, "),
        (lambda m: m["sources"].update(linear_scan="0"), "for linear_scan (other sou"),
        (lambda m: m["results"][0].update(op="gone") or m["sources"].update(gone="0"),
         "for gone (other sources)"),
    ],
    ids=["device", "driver", "version", "source", "operation"],
)  # fmt: skip
def test_what_was_made_elsewhere_is_named_and_ignored(change, says, failed, capsys):
    path = failed(change)
    exclusions.apply(path)
    said = capsys.readouterr().out
    assert said.startswith(f"certificate {path} is ignored ") and says in said
    assert "python -m kernels.check makes a new one" in said
    assert said.count("\n") == 1 and not dispatch._excluded


@pytest.mark.parametrize("how", ["interpreted", "lowered", "compiled sm_90"])
def test_what_was_not_run_here_excludes_nothing(how, failed):
    exclusions.apply(failed(lambda made: made["results"][0].update(how=how)))
    assert not dispatch._excluded


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "not json",
        pytest.param("[" * 200_000, id="nested without end"),
        '{"format": 1}',
        '{"format": 2, "device": {}, "versions": {}, "sources": {}, "results": []}',
        '{"format": 1, "device": [], "versions": {}, "sources": {}, "results": []}',
        '{"format": 1, "device": {}, "versions": {}, "sources": {}, "results": [3]}',
        '{"format": 1, "device": {}, "versions": {}, "sources": {}, "results": 3}',
        '{"format": 1, "device": {}, "versions": {}, "sources": {}, "results": [{}]}',
    ],
)
def test_a_file_that_is_no_certificate(text, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is no certificate of python -m ker"):
        exclusions.apply(path)


def test_a_row_without_its_failure_is_no_certificate(failed):
    path = failed(lambda made: made["results"][0].update(failures=[]))
    with pytest.raises(ValueError, match="is no certificate"):
        exclusions.apply(path)


def test_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exclusions.apply()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"--certificate must be a file .* got nope"):
        exclusions.apply("nope")


def test_training_takes_the_flag():
    command = [sys.executable, "-m", "train.main", "--certificate=nope"]
    done = subprocess.run(
        [*command, "--config=configs/pixels.py:digits"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --certificate must be a file that python -m")


FOLLOWER = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from kernels import dispatch
from train import exclusions
try:
    exclusions.apply(sys.argv[3] if jax.process_index() == 0 else "elsewhere")
except ValueError as error:
    print("refused", str(error)[-30:])
print("excluded", list(dispatch._excluded))
"""


@pytest.mark.slow
def test_all_processes_follow_the_first(failed, tmp_path):
    good, bad = failed(), tmp_path / "bad.json"
    bad.write_text("{}")
    for path, says in ((good, "[('linear_scan', 'xla')]"), (bad, "refused")):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-c", FOLLOWER, address]

        def follow(rank, command=command, path=path):
            return subprocess.run(
                [*command, str(rank), str(path)],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
                timeout=120,
            )

        with ThreadPoolExecutor() as pool:
            for done in pool.map(follow, range(2)):
                assert says in done.stdout


def test_the_hash_is_of_the_operation_and_what_it_imports(tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", copy)
    monkeypatch.setattr(certificate, "HERE", copy)

    def hashes():
        return {
            op.folder: certificate.source_hash(op.folder) for op in OPERATIONS.values()
        }

    def changed(path):
        before = hashes()
        with (copy / path).open("a") as file:
            file.write("# changed\n")
        after = hashes()
        return {folder for folder in before if before[folder] != after[folder]}

    everything = {*hashes()}
    assert changed("dispatch.py") == everything
    assert changed("compat.py") == changed("interpreter.py") == everything
    assert changed("cauchy/xla.py") == {"cauchy"}
    assert changed("cauchy/new.py") == {"cauchy"}
    assert "linear_scan" in changed("linear_scan/triton.py")
    assert changed("bench.py") == changed("check/cases.py") == set()
    monkeypatch.undo()
    assert certificate.source_hash("cauchy") == certificate.source_hash("cauchy")


# What cannot run here.


@pytest.fixture
def triton():
    if conformance._not_installed():
        pytest.skip("triton is not installed")


@pytest.mark.slow
def test_what_other_devices_run_is_tried_too(triton, tmp_path, capsys):
    """The reduced check: Pallas interpreted and lowered, Triton interpreted in its own
    process and compiled."""
    out = tmp_path / "found.json"
    command = ["--quick", "--op", "linear_scan", "short_conv", "--out", str(out)]
    command += ["--backend", "triton", "pallas_tpu"]
    assert check.main(command) == 0, capsys.readouterr().out
    rows = [conformance.Row.from_json(row) for row in read_results(out)]
    for op in {row.op for row in rows}:
        ways = {(row.backend, row.how) for row in rows if row.op == op}
        if "triton" in OPERATIONS[op].backends:
            assert {("triton", "interpreted"), ("triton", "compiled sm_90")} <= ways
        if "pallas_tpu" in OPERATIONS[op].backends:
            assert {("pallas_tpu", "interpreted"), ("pallas_tpu", "lowered")} <= ways
    for row in rows:
        assert row.verdict == "passed", row
        if row.how == "interpreted":
            assert 0 < row.gradient.error < row.gradient.limit
        else:
            assert row.kernels
    said = capsys.readouterr().out
    assert "registers, 0 B spilled" in said and "forward 1, backward 1" in said


def read_results(path):
    return json.loads(path.read_text())["results"]


def test_rows_survive_the_file(tmp_path):
    row = conformance.Row("linear_scan", "xla", "run", "float32", 2)
    row.value = conformance.Worst(float("inf"), 2e-5, "output", "real, L=7")
    again = conformance.Row.from_json(json.loads(json.dumps(row.as_json())))
    assert again == row


def test_a_dead_interpreter_is_a_failure_of_each_operation(triton, monkeypatch):
    monkeypatch.setattr(conformance.sys, "executable", shutil.which("false"))
    chosen = [OPERATIONS[name] for name in ("linear_scan", "cauchy")]
    rows = conformance.interpreted(chosen, ["float32"], "quick")
    assert [row.op for row in rows] == ["linear_scan", "cauchy"]
    for row in rows:
        (failure,) = row.failures
        assert failure == "the interpreter's process ended with code 1: no message"


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compat, "_installed", lambda name: False)
    command = ["--op", "linear_scan", "--backend", "triton", "--quick"]
    assert check.main(command) == 0
    said = capsys.readouterr().out
    assert "triton (interpreted; all): triton is not installed: the extra" in said


def test_what_does_not_compile_is_named(triton, monkeypatch):
    def fail(call, capability):
        raise RuntimeError(f"ptxas: no sm_{capability}")

    monkeypatch.setattr(machine_code, "compiled", fail)
    operation = OPERATIONS["linear_scan"]
    (row,) = conformance.compiled(operation, ["float32"], "quick")
    assert row.how == "compiled sm_90" and row.verdict == "failed"
    forward, backward = row.failures
    assert "state, reset, reverse: _forward: RuntimeError: ptxas: no sm_90" in forward
    assert "_backward" in backward


def test_what_no_gpu_has_room_for_is_caught(triton, monkeypatch):
    figures = {"registers": 32, "spilled_bytes": 0, "shared_bytes": 232449}
    monkeypatch.setattr(machine_code, "compiled", lambda call, capability: figures)
    operation = OPERATIONS["linear_scan"]
    (row,) = conformance.compiled(operation, ["float32"], "quick")
    assert "_forward: 232449 B of shared memory, there are 232448" in row.failures[0]
    assert row.kernels[0]["shared_bytes"] == 232449


def test_a_tpu_backend_without_a_kernel_is_caught(monkeypatch):
    module = sys.modules["kernels.linear_scan"]
    monkeypatch.setattr(module, "BACKENDS", {"pallas_tpu": xla})
    (row,) = conformance.lowered(OPERATIONS["linear_scan"], ["float32"], "quick")
    assert row.verdict == "failed"
    assert "there is no TPU kernel in any lowered program" in row.failures[0]


# The command.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "scan"], "--op: invalid choice: 'scan' (choose from 'linear_scan',"),
        (["--backend", "cuda"], "--backend: invalid choice: 'cuda' (choose from 'tri"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8' (choose from 'float32"),
        (["--full", "--quick"], "not allowed with argument --full"),
        (["--out", "."], "--out: must be a file, got folder ."),
        (["--out", f"{ROOT}/README.md/x"], "--out: [Errno 17] File exists"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)
    # Python 3.12 writes the choices without quotes
    said, says = (x.replace("'", "") for x in (capsys.readouterr().err, says))
    assert says in said


def test_the_definition_needs_the_cpu(monkeypatch, capsys):
    real = jax.devices

    def devices(*platform):
        if platform:
            raise RuntimeError("Unknown backend cpu")
        return real()

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit, match="2"):
        check.main(["--quick"])
    assert "such as cuda,cpu; got cuda" in capsys.readouterr().err


def test_a_backend_that_the_operation_lacks(inject, capsys):
    inject("broken")
    with pytest.raises(SystemExit, match="2"):
        check.main(["--op", "cauchy", "--backend", "broken"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--backend: cauchy has reference" in said and "not broken" in said


def test_the_definition_is_float64_on_the_cpu():
    operation = OPERATIONS["short_conv"]
    case = Case("bias", 3, True, True, False)
    inputs = comparison.rounded(operation.inputs(case), "bfloat16")
    values, gradients = comparison.expected(operation.call, inputs, reverse=False)
    assert values[0].dtype == gradients["w"].dtype == np.float64
    assert {*gradients} == {"u", "w", "bias", "initial_state"}


@pytest.mark.slow
def test_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check.main([]) == 0, capsys.readouterr().out
    rows = read_results(Path("runs/kernels/cpu.json"))
    assert {row["op"] for row in rows} == {*OPERATIONS}
    assert {row["verdict"] for row in rows} <= {"passed", "not run"}
    assert {row["dtype"] for row in rows} == {*DTYPES}
