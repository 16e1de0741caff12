"""python -m kernels.check --compile: what is compiled, its verdicts and its file."""

import hashlib
import json
from dataclasses import replace

import jax
import pytest

from kernels import compat
from kernels.check import __main__ as check
from kernels.check import ahead, comparison, compiled, conformance, peers
from kernels.check.cases import OPERATIONS, Case
from kernels.check.targets import TARGETS
from kernels.dispatch import OnPlatform

V5E, H200 = TARGETS["tpu:v5e"], TARGETS["gpu:h200"]


def described(arrays):
    return jax.tree.map(lambda x: (tuple(x.shape), x.dtype), arrays)


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_those_of_the_inputs(name):
    """Made without their numbers, at any length."""
    sizes = {name: 14 if n == 10 else n for name, n in OPERATIONS[name].small.items()}
    operation = replace(OPERATIONS[name], small=sizes, wide=sizes)
    for variant in operation.variants:
        for options in ((True, True), (False, False)):
            case = Case(variant, 40, *options)
            expected = described(operation.inputs(case))
            assert described(operation.shapes(case)) == expected


def test_a_size_that_stands_for_a_length_is_refused():
    with pytest.raises(ValueError, match=r"sizes must be none of \[12, 13\], got"):
        OPERATIONS["linear_scan"].shapes(Case("real", 40), D=13)


def programs(target, name, quick=False, dtypes=ahead.DTYPES, backends=None):
    operation = OPERATIONS[name]
    backends = list(operation.backends) if backends is None else backends
    return list(ahead.programs(target, [operation], backends, dtypes, quick))


def test_what_is_compiled():
    def rows_of(target, **options):
        return [program.row for program in programs(target, "linear_scan", **options)]

    rows = rows_of(V5E)
    assert {row.backend for row in rows} == {"pallas_tpu", "xla"}
    assert {row.backend for row in rows_of(H200)} == {"triton", "xla"}
    assert {row.size for row in rows} == {"small", "benchmark", "large"}
    assert {row.size for row in rows_of(TARGETS["tpu:v6e"])} == {"benchmark"}
    assert {(row.dtype, row.part) for row in rows} == {
        (dtype, part) for dtype in ahead.DTYPES for part in ahead.PASSES
    }
    assert len({row.key for row in rows}) == len(rows)
    variants = {row.case.partition(", L=")[0] for row in rows if row.size == "small"}
    assert variants == {*OPERATIONS["linear_scan"].variants}
    quick = rows_of(V5E, quick=True)
    assert {(row.backend, row.size, row.dtype) for row in quick} == {
        ("pallas_tpu", "benchmark", "float32")
    }


COMPLEX = {"cauchy"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_compiled_in_what_it_has(name):
    """Those of complex numbers alone have no bfloat16."""
    dtypes = {program.row.dtype for program in programs(H200, name)}
    assert dtypes == ({"float32"} if name in COMPLEX else {*ahead.DTYPES})


@pytest.mark.parametrize("dtype", ahead.DTYPES)
def test_large_cases_have_an_array_of_more_than_two_gigabytes(dtype):
    for name, operation in OPERATIONS.items():
        cases = [*ahead._cases(operation, "large", [dtype], False)]
        if name in COMPLEX and dtype == "bfloat16":
            assert not cases, name
            continue
        ((case, _),) = cases
        shapes = jax.tree.leaves(operation.shapes(case))
        size = max(
            x.size * comparison.precision(x.dtype, dtype).itemsize for x in shapes
        )
        if name == "vandermonde":  # [R, H, length]
            size = 4 * operation.wide["R"] * operation.wide["H"] * case.length
        elif name == "cauchy":  # 4 sums at length / 2 + 1 points, complex
            size = 8 * 4 * operation.wide["H"] * (case.length // 2 + 1)
        assert size > ahead.LARGE, name


def row(**values):
    what = "linear_scan", "triton", "float32", "benchmark", "real, L=4096", "forward"
    return ahead.Row(*what, "hash", **{"verdict": "compiled"} | values)


def test_a_gpu_fails_what_spills_or_needs_too_much_shared_memory(monkeypatch):
    assert not ahead._judged(row(spilled_bytes=0, shared_bytes=1000)).bad
    spilled = ahead._judged(row(spilled_bytes=8))
    assert spilled.bad and spilled.reason == "8 bytes are spilled"
    assert "232448" in ahead._judged(row(shared_bytes=300_000)).reason
    allowed = {("linear_scan", "triton", "float32", "forward"): (8, "a reason")}
    monkeypatch.setattr(ahead, "SPILLS", allowed)
    assert not ahead._judged(row(spilled_bytes=8)).bad
    assert ahead._judged(row(spilled_bytes=9)).bad


@pytest.mark.parametrize(
    ("problem", "verdict"),
    [
        (RuntimeError("Ran out of memory in memory space vmem"), "failed"),
        (RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM"), "does not fit"),
        (
            ValueError("linear_scan: backend 'triton' cannot run; 'triton': no"),
            "not taken",
        ),
        (ValueError("linear_scan: something else"), "failed"),
    ],
    ids=str,
)
def test_what_a_compiler_says_is_a_verdict(problem, verdict):
    assert ahead._refused(row(), problem).verdict == verdict


@pytest.fixture
def instant(monkeypatch):
    """Compiles nothing, and remembers what it was asked for."""
    asked = []

    def compile_row(target, program, before):
        assert before is None or before.subject == program.row.subject
        asked.append(program.row.key)
        return replace(program.row, verdict="compiled", seconds=1.0, temporaries=10**8)

    monkeypatch.setattr(ahead, "compile_row", compile_row)
    return asked


def test_a_run_goes_on_where_it_was(tmp_path, instant):
    place, wanted = tmp_path / "v5e.json", programs(V5E, "short_conv")
    compiled.run(compiled.File(V5E, place), wanted[:3])
    assert len(instant) == 3
    rows = compiled.run(compiled.File(V5E, place), wanted)
    assert sorted(instant) == sorted(program.row.key for program in wanted)
    assert [row.key for row in rows] == [program.row.key for program in wanted]
    changed = [
        replace(program, row=replace(program.row, source="another"))
        for program in wanted
    ]
    compiled.run(compiled.File(V5E, place), changed)
    assert len(instant) == 2 * len(wanted)
    file = compiled.File(V5E, place)
    file.keep(rows)
    assert len(json.loads(place.read_text())["rows"]) == len(wanted)


@pytest.mark.parametrize(
    "platform", ["tpu", pytest.param("gpu", marks=pytest.mark.slow)]
)
def test_every_variant_can_be_traced_for_another_platform(platform):
    """By every backend in XLA, which may do there what it does not do here."""
    jax.clear_caches()  # what was traced for this machine would be taken again
    for operation in OPERATIONS.values():
        for backend, module in operation.backends.items():
            if isinstance(module, OnPlatform) or backend == "reference":
                continue
            for variant in operation.variants:
                case = Case(variant, ahead.SHORT)
                forward, both, arrays = conformance.passes(
                    operation, case, "float32", backend
                )
                with compat.lowering_for(platform):
                    results = jax.eval_shape(forward, *arrays)
                    jax.eval_shape(both, *arrays, results)
    jax.clear_caches()


class Lowered:
    """What a compiler would be given, and refuses."""

    def as_text(self):
        return "a program"

    def compile(self):
        raise RuntimeError("the compiler was asked")


def test_other_sources_of_the_same_program_need_no_compiler(monkeypatch):
    monkeypatch.setattr(ahead, "_lowered", lambda *arguments: Lowered())
    program = programs(V5E, "short_conv")[0]
    digest = hashlib.sha256(b"a program").hexdigest()
    before = replace(row(seconds=1.0), program=digest)
    found = ahead.compile_row(V5E, program, before)
    assert found == replace(before, source=program.row.source)
    for other in (None, replace(before, program="another")):
        refused = ahead.compile_row(V5E, program, other)
        assert refused.bad and refused.program == digest
        assert "the compiler was asked" in refused.reason


def test_other_versions_begin_anew(tmp_path, instant, monkeypatch):
    place, wanted = tmp_path / "v5e.json", programs(V5E, "short_conv")[:2]
    compiled.run(compiled.File(V5E, place), wanted)
    monkeypatch.setattr(compiled, "versions", lambda target: {"jax": "0"})
    compiled.run(compiled.File(V5E, place), wanted)
    assert len(instant) == 4


def test_a_program_that_kills_the_compiler_fails_after_a_while(tmp_path, instant):
    place, (program,) = tmp_path / "v5e.json", programs(V5E, "short_conv")[:1]
    for _ in range(compiled.DEATHS):
        file = compiled.File(V5E, place)
        assert not file.died(program.row)
        file.begin(program.row)  # and then the process is gone
    (found,) = compiled.run(compiled.File(V5E, place), [program])
    assert found.bad and "died 2 times" in found.reason and instant == []


def test_a_file_of_something_else_is_refused(tmp_path):
    place = tmp_path / "v5e.json"
    for text in ("{", "[]", '{"format": 1, "target": "gpu:h200"}', "null"):
        place.write_text(text)
        with pytest.raises(ValueError, match="must be a table of tpu:v5e that this"):
            compiled.File(V5E, place)


def test_the_page_has_a_table_for_every_file(tmp_path, instant, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{compiled.BEGIN}\nold\n{compiled.END}\nafter\n")
    compiled.run(compiled.File(V5E, compiled.path(V5E)), programs(V5E, "short_conv"))
    compiled.write_page(TARGETS.values(), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "### tpu:v5e" in text and "h200" not in text
    assert "| short_conv | pallas_tpu | bias, L=4096 | float32 | 1.0 / 1.0 |" in text
    assert "| 100 / 100 |" in text and ", state" not in text
    compiled.write_page(TARGETS.values(), page)
    assert page.read_text() == text


def test_a_peer_stands_beside_the_first_backend_that_takes_the_work():
    def shown(refused=()):
        rows = []
        for program in programs(H200, "chunked_scan", dtypes=[peers.DTYPE]):
            row = program.row
            verdict = "not taken" if row.backend in refused else "compiled"
            size = {"triton": 2, "xla": 3}[row.backend] * 2**20
            rows.append(
                replace(
                    row, verdict=verdict, arguments=size, outputs=size, temporaries=size
                )
            )
        return compiled.beside_peers(rows)

    works = [work for work in peers.WORK if work.op == "chunked_scan"]
    lines = shown()
    assert [line[:2] for line in lines] == [(w.op, w.variant) for w in works]
    work, line = works[0], lines[0]
    assert line[3:5] == ("2 + 2", "2 / 2 (triton)")
    assert line[5:] == (f"{work.forward} / {work.gradient}", work.package)
    assert {line[4] for line in shown(["triton"])} == {"3 / 3 (xla)"}
    assert not shown(["triton", "xla"])


def test_what_is_not_compiled_is_a_line_with_its_reason():
    failed = row(verdict="failed", reason="why")
    assert compiled.lines([row(), failed, failed]) == [
        "failed: linear_scan, backend triton, float32 (benchmark: real, L=4096, forward"
        " and 1 more): why"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile", "tpu:v9"], "argument --compile: invalid choice: 'tpu:v9'"),
        (["--compile", "tpu:v5e", "--full"], "argument --full: not with --compile"),
        (["--compile", "tpu:v5e", "--dtype", "float64"], "takes float32 and bfloat16"),
        (["--compile", "tpu:v5e", "tpu:v6e", "--out", "x"], "names several targets"),
        (["--compile", "tpu:v5e"], "tpu:v5e needs libtpu, which `make compiled` gets"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_no_table_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("kernels.check.targets.prepare", lambda: None)
    (place := tmp_path / "v5e.json").write_text("{")
    arguments = ["--compile", "tpu:v5e", "--op", "short_conv", "--out", str(place)]
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)
    assert capsys.readouterr().err.startswith(f"error: {place} must be a table of")
    assert place.read_text() == "{"
