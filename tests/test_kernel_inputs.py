"""What no operation takes, and the dtype that every state has."""

import jax
import numpy as np
import pytest
from kernel_cases import check_one_narrow, real_arrays

import kernels
from kernels.bench import __main__ as bench
from kernels.check import certificate
from kernels.check.cases import OPERATIONS, Case
from kernels.check.comparison import rounded
from kernels.tolerance import error

REQUIRED = {
    "linear_scan": ("a", "x"),
    "contracted_scan": ("log_a", "b", "c", "u"),
    "selective_scan": ("u", "dt", "A", "B", "C"),
    "chunked_scan": ("q", "k", "v"),
    "fft_conv": ("u", "k"),
    "butterfly_conv": ("u", "k"),
    "short_conv": ("u", "w"),
    "vandermonde": ("c", "log_z"),
    "vandermonde_transpose": ("u", "log_z"),
    "cauchy": ("v", "z"),
}


def made(name, variant=None):
    operation = OPERATIONS[name]
    case = Case(variant or operation.variants[0], 4, state=True)
    inputs = rounded(operation.inputs(case), "float32")
    return {k: x for k, x in inputs.items() if k != "reset"}, operation.static(case)


def narrowed():
    """(operation, case, array), of all operations that have real arrays, but that whose
    factors are lists."""
    for name, operation in OPERATIONS.items():
        if name == "butterfly_conv":
            continue
        variant = "real" if "real" in operation.variants else operation.variants[0]
        case = Case(variant, 37, state=True, reset=True)
        for array in real_arrays(operation.inputs(case)):
            quick = (name, array) == ("chunked_scan", "q")
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(name, case, array, id=f"{name}-{array}", marks=marks)


@pytest.mark.parametrize(("name", "case", "array"), list(narrowed()))
def test_one_array_may_be_narrower_than_the_others(name, case, array):
    operation = OPERATIONS[name]
    inputs, static = operation.inputs(case), operation.static(case)
    check_one_narrow(operation.call, inputs, array, "xla", **static)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_no_array_is_named(name):
    inputs, static = made(name)
    for argument in REQUIRED[name]:
        for bad, kind in (
            (None, "None"),
            ([1.0, 2.0], "a list"),
            (1.0, "a float"),
            (np.float32(1), "a float32"),
        ):
            words = f"^{name}: {argument} must be an array .*, got {kind}$"
            with pytest.raises(ValueError, match=words):
                OPERATIONS[name].call(**inputs | {argument: bad}, **static)


ROWS = {
    "linear_scan": ("a", "x"),
    "contracted_scan": ("u",),
    "selective_scan": ("u", "dt", "B", "C"),
    "chunked_scan": ("q", "k", "v"),
    "fft_conv": ("u",),
    "butterfly_conv": ("u",),
    "short_conv": ("u",),
    "vandermonde_transpose": ("u",),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_axis_is_named(name):
    inputs, static = made(name)
    for argument in REQUIRED[name]:
        # the batch may be empty, if it is in all arguments
        for axis in range(argument in ROWS.get(name, ()), inputs[argument].ndim):
            empty = np.take(inputs[argument], [], axis)
            words = f"^{name}: {argument} must be without an empty axis, got shape"
            with pytest.raises(ValueError, match=words):
                OPERATIONS[name].call(**inputs | {argument: empty}, **static)


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if "initial_state" in made(name)[0]]
)
def test_options_are_arrays_or_none(name):
    inputs, static = made(name)
    for argument in ("initial_state", "reset"):
        with pytest.raises(ValueError, match=f"^{name}: {argument} must be an array"):
            OPERATIONS[name].call(**inputs | {argument: [[True]]}, **static)


def test_other_arguments():
    x = np.ones((1, 4, 2), np.float32)
    taps, z = np.ones((2, 3), np.float32), np.ones((2, 3), np.complex64)
    with pytest.raises(ValueError, match=r"u_factors must be a list .* got NoneType"):
        kernels.butterfly_conv(x, taps, None, [])
    with pytest.raises(ValueError, match=r"sizes must be a sequence .* got 4"):
        kernels.dft_factors(4)
    with pytest.raises(
        ValueError, match=r"dplr_filter: b must be complex, got float32"
    ):
        kernels.dplr_filter(z[None], taps, z[None], z, 4)
    with pytest.raises(ValueError, match=r"dplr_filter: p must be an array .* None"):
        kernels.dplr_filter(z[None], z, None, z, 4)
    with pytest.raises(
        ValueError, match=r"dplr_filter: length must be an integer >= 1"
    ):
        kernels.dplr_filter(z[None], z, z[None], z, 0)
    assert kernels.dplr_filter(
        z[None], z, np.zeros((0, 2, 3), np.complex64), z, 4
    ).shape == (1, 2, 4)
    assert kernels.vandermonde(z, z, np.int64(4)).shape == (2, 4)
    assert kernels.block_sizes(np.int32(64), np.int64(2)) == kernels.block_sizes(64, 2)
    with pytest.raises(ValueError, match=r"length must be an integer >= 1, got True"):
        kernels.vandermonde(z, z, True)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("linear_scan", "initial_state"),
        ("contracted_scan", "dt"),
        ("contracted_scan", "initial_state"),
        ("selective_scan", "skip"),
        ("selective_scan", "initial_state"),
        ("chunked_scan", "initial_state"),
        ("fft_conv", "skip"),
        ("fft_conv", "initial_state"),
        ("short_conv", "w"),
        ("short_conv", "initial_state"),
    ],
)
def test_one_wide_argument_widens_the_state(name, argument):
    inputs, static = made(name, "complex, dt" if argument == "dt" else None)
    wide = np.complex128 if np.iscomplexobj(inputs[argument]) else np.float64
    with jax.enable_x64(True):
        _, final, *_ = jax.eval_shape(
            lambda inputs: OPERATIONS[name].call(**inputs, **static),
            inputs | {argument: inputs[argument].astype(wide)},
        )
    assert final.dtype in (np.float64, np.complex128)


def test_the_transition_of_many_steps_keeps_its_phase():
    rng = np.random.default_rng(0)
    length, shape = 20000, (2, 3)
    rate = rng.uniform(0, 1, shape) / length
    log_a = (-rate + 1j * rng.uniform(-3, 3, shape)).astype(np.complex64)
    one, u = np.ones(shape, np.complex64), np.zeros((1, length, 2), np.float32)
    dt = rng.uniform(0, 2, (1, length)).astype(np.float32)

    def transition(log_a, dt):
        return kernels.contracted_scan(log_a, one, one, u, dt, return_transition=True)[
            2
        ]

    total = dt.astype(np.float64).sum(1)[:, None, None]
    expected = np.exp(total * log_a.astype(np.complex128))
    assert error(jax.jit(transition)(log_a, dt), expected) < 2e-5
    gradient = jax.jit(jax.grad(lambda *x: transition(*x).real.sum(), (0, 1)))
    by_rate, by_dt = gradient(log_a, dt)
    assert error(by_rate, (total * expected)[0]) < 1e-4
    slope = (log_a * expected).real.sum((1, 2))[:, None]
    assert error(by_dt, np.broadcast_to(slope, dt.shape)) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "00"], "--lengths: must be none or numbers >= 1"),
        (["--lengths", "1,,2"], "--lengths: must be none or numbers >= 1"),
        (["--limit", "nan"], "--limit: must be a number > 0, got nan"),
        (["--limit", "0"], "--limit: must be a number > 0, got 0.0"),
        (["--repeats", "0"], "--repeats: must be >= 1, got 0"),
        (["--device", "tpu"], "--device: there is no tpu here"),
        (["--out", "figures.txt"], "--out: must end in .json, got figures.txt"),
        (["--out", "/proc/here/x.json"], "--out: [Errno"),
    ],
)
def test_bad_flags_are_found_before_anything_is_measured(
    arguments, says, capsys, monkeypatch
):
    monkeypatch.setattr(bench.timing, "floors", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert says in capsys.readouterr().err


def test_an_obstacle_is_found_and_nothing_is_left(tmp_path):
    assert certificate.obstacle(tmp_path) == f"must be a file, got folder {tmp_path}"
    (tmp_path / "file").touch()
    assert "[Errno" in certificate.obstacle(tmp_path / "file" / "x.json")
    assert certificate.obstacle(tmp_path / "new" / "x.json") is None
    assert {path.name for path in tmp_path.iterdir()} == {"file", "new"}
    assert not list((tmp_path / "new").iterdir())
