"""The page of a run: every section, nothing from outside, and what it shows is so."""

import dataclasses
import html.parser
import json
import re
import shutil
import sys

import browser
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, own, pixels
from kernels.tolerance import assert_close
from layers import LRU, S4D, S5, build
from layers.inside import EXPOSED
from train import (
    data,
    loop,
    main,
    metrics,
    probe,
    records,
    resolve,
    runs,
    sharding,
    state,
)
from train.checkpoint import CheckpointError
from train.data import examined, said
from train.data.spec import Spec
from train.draw import figures
from train.report import answers, facts, inside, mixing, pages
from train.report.__main__ import main as command

VOID = {"meta", "br", "img"}
TRAIN = dict(steps=2, batch_size=8, eval_every=2, log_every=1, checkpoint_every=2)


def small(config, layer, **model):
    arguments = dict(common.LAYER_ARGS[layer]) if isinstance(layer, str) else {}
    with config.ignore_type():  # of a tuple in place of a name
        config.model.layer = layer
    config.model.layer_args = arguments
    if "state_size" in arguments:
        config.model.layer_args.state_size = 4
    config.model.update(features=6, depth=1, **model)
    config.train.update(TRAIN)
    return config


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Classes from pixels, in two blocks."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    config = small(pixels.get_config("digits"), "lru")
    config.model.depth = 2
    loop.run(config, path)
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A GRU that predicts the next pixel."""
    path = tmp_path_factory.mktemp("runs") / "tokens"
    loop.run(small(pixels.get_config("digits,layer=gru,target=next"), "gru"), path)
    return path


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """Two values per token, of sequences of unequal length."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 9)).astype(np.float32)
    targets = np.stack([x.cumsum(axis=1), x], axis=2)
    lengths = rng.integers(4, 10, 40)
    np.savez(folder / "sums.npz", inputs=x, targets=targets, lengths=lengths)
    config = own.get_config(f"path={folder / 'sums.npz'},layer=gru,head=token")
    loop.run(small(config, "gru"), folder / "regression")
    return folder / "regression"


GATED = """
import flax.linen as nn
import jax.numpy as jnp

from kernels import linear_scan
from layers.checks import checked
from layers.inside import expose


class Gated(nn.Module):
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        sequence = checked(self, x, state, sequence)
        state = self.init_state(len(x)) if state is None else state
        decay = nn.sigmoid(nn.Dense(self.features)(x))
        h, state = linear_scan(decay, self.values(x), state)
        return nn.silu(x) * self.mixed(h), state

    def values(self, x):
        return x

    mixed = values

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.features))


class Skip(nn.Module):
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        return gain * x, self.init_state(len(x)) if state is None else state

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, 1))


class Shown(Gated):
    def values(self, x):
        return expose(self, "values", x)

    def mixed(self, h):
        return expose(self, "mixed", h)
"""


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """A config of two classes of short waves, and where Python looks for layers."""
    folder = tmp_path_factory.mktemp("waves")
    (folder / "my_gates.py").write_text(GATED)
    rng = np.random.default_rng(0)
    targets = np.arange(40) % 2
    x = np.sin(np.arange(16) * (1 + targets[:, None]) + 6 * rng.random((40, 1)))
    np.savez(folder / "waves.npz", inputs=x, targets=targets)
    config = own.get_config(f"path={folder / 'waves.npz'},layer=gru")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield config
    sys.modules.pop("my_gates", None)


def reported(waves, layer, folder):
    """The page of a run of one step."""
    config = small(waves.copy_and_resolve_references(), layer, dropout=0.0)
    config.train.update(steps=1, eval_every=1, checkpoint_every=1)
    loop.run(config, folder / "run")
    return read(pages.write(folder / "run", trust=True))


LONG = "a_name_that_goes_on_and_on_without_any_place_to_break_it_into_lines"


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """Classes and a file of long names, and data that a run warns of."""
    folder = tmp_path_factory.mktemp("runs") / LONG
    folder.mkdir()
    rng = np.random.default_rng(0)
    x = 1e4 * rng.normal(size=(60, 30, 2))
    x[..., 1] = 3  # a constant channel
    x[30:] = x[:30]  # and copies, which parts have in common
    names = [f"{i}_{LONG}" for i in range(3)] + ["one of a few words in a row", "x"]
    targets = np.arange(60) // 6 % 5
    place = folder / f"{LONG}.npz"
    np.savez(place, inputs=x, targets=targets, class_names=names)
    config = own.get_config(f"path={place},layer=lru")
    config.data.normalise = False
    loop.run(small(config, "lru"), folder / "run")
    return folder / "run"


class Page(html.parser.HTMLParser):
    """A page's sections, text and references; an error where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.references, self.said = [], [], [], []
        self.tags, self.text, self.loose = set(), {}, []
        source = path.read_text(encoding="ascii")
        self.size = len(source)
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        boxed = any(dict(a).get("class") == "wide" for _, a in self.open)
        if tag == "table" and not boxed:
            self.loose.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name.split(":")[-1] in ("href", "src", "srcset", "data", "action"):
                self.references.append(value)
            elif not name.startswith("xmlns"):
                assert "//" not in value, (tag, name, value)
                self.references += re.findall(r"url\(([^)]*)\)", value)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        section = next(
            (dict(a)["id"] for tag, a in self.open if tag == "section"), "top"
        )
        self.text[section] = self.text.get(section, "") + data
        if any(tag == "style" for tag, _ in self.open):
            assert "url(" not in data and "@import" not in data

    def sections(self):
        return [key for key in self.text if key != "top"]


def read(path):
    """The page in a file, which refers to nothing outside of it."""
    page = Page(path)
    assert len(set(page.ids)) == len(page.ids)
    inside = {f"#{name}" for name in page.ids}
    for reference in page.references:
        assert reference in inside or reference.startswith("data:image/"), reference
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert page.size < 2_000_000
    assert not page.loose, "a table that is in no box that scrolls"
    return page


EVERY = ["verdict", "curves", "filters", "spectra", "answers"]
EVERY += ["reproduce", "environment"]


def test_a_report_of_classes_has_every_section(digits, capsys):
    assert command(["--workdir", str(digits)]) == 0
    assert capsys.readouterr().out == f"report: {digits / 'report.html'}\n"
    page = read(digits / "report.html")
    assert page.sections() == EVERY
    results = runs.read(digits).results
    assert f"{results['test']['accuracy']:.4f}" in page.text["verdict"]
    assert f"{results['parallel_vs_recurrent']:.1e}" in page.text["verdict"]
    assert "gradient norm" in page.text["curves"]
    for block in ("block 1, LRU", "block 2, LRU"):
        assert f"{block}: initial" in page.text["filters"]
        assert f"{block}: trained" in page.text["filters"]
        assert block in page.text["spectra"]
    assert "of 144 are right" in page.text["answers"]
    dataset = runs.load_run(digits).dataset
    said = examined.facts(dataset)
    (batch,) = dataset.evaluation("test", dataset.num_examples("test"))
    counts = np.bincount(batch["targets"])
    level = facts.level(said)
    largest = counts[int(said["largest"]["class"])]
    assert level.metric == "accuracy" and level.value == largest / counts.sum()
    assert re.search(r"Chance is 0\.\d{4}.*: always answering", page.text["verdict"])
    assert "without reading the inputs" in page.text["curves"]
    assert '"features": 6' in page.text["reproduce"]
    assert jax.__version__ in page.text["environment"]


def test_reports_fit_into_wide_and_narrow_windows(digits, tmp_path):
    one = pages.write(digits, tmp_path / "page.html")
    other = tmp_path / "a run of a name that is long enough to be broken into lines"
    shutil.copytree(digits, other)
    several = pages.compare([digits, other], tmp_path / "compare.html")
    browser.fits(one, several)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens", "regression", "long_names"])
def test_pages_of_every_kind_fit(name, request, tmp_path):
    page = pages.write(request.getfixturevalue(name), tmp_path / f"{name}.html")
    if name == "long_names":
        text = read(page).text
        assert LONG in text["answers"] and "Warning: " in text["verdict"]
    browser.fits(page)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["mamba", ("my_gates.Gated",)], ids=str)
def test_pages_of_layers_that_select_fit(waves, tmp_path, layer):
    reported(waves, layer, tmp_path)
    browser.fits(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    "wrong",
    [
        '<p style="width: 400px">wide</p>',
        '<img src="data:image/png;base64,AAAA">',
        '<script>console.log("hear me")</script>',
        '<img src="missing.png">',
    ],
)
def test_what_is_wrong_with_a_page_is_seen(wrong, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f'<meta name="viewport" content="width=device-width">{wrong}')
    with pytest.raises(AssertionError, match="'messages': "):
        browser.fits(page)


@pytest.mark.slow
def test_the_command_of_a_report_starts_the_same_run(digits, tmp_path, monkeypatch):
    page = read(pages.write(digits, tmp_path / "page.html"))
    code = re.search(r"from train import loop.*\n.*\)", page.text["reproduce"])[0]
    monkeypatch.chdir(tmp_path)
    exec(code)
    again = runs.read(tmp_path / "runs" / "again")
    assert again.results["test"] == runs.read(digits).results["test"]


@pytest.mark.slow
def test_a_report_of_tokens_without_eigenvalues(tokens):
    page = read(pages.write(tokens, step=2))
    assert page.sections() == [name for name in EVERY if name != "spectra"]
    assert "Accuracy by position" in page.text["answers"]
    assert len(re.findall("target  ", page.text["answers"])) == 3
    assert "Chance is 0." in page.text["verdict"]


@pytest.mark.slow
def test_a_report_of_a_regression(regression):
    page = read(pages.write(regression))
    assert page.sections() == [name for name in EVERY if name != "spectra"]
    assert "test error" in page.text["verdict"]
    assert "Predictions over targets" in page.text["answers"]
    assert "absolute error" in page.text["curves"]
    assert "mean of the training targets has the error" in page.text["verdict"]
    dataset = runs.load_run(regression).dataset
    train, test = (
        columns["targets"][columns["mask"]].astype(float)
        for columns in (dataset.sources[split][:] for split in ("train", "test"))
    )
    level = facts.level(examined.facts(dataset))
    assert level.metric == "loss"
    error = ((test - train.mean(axis=0)) ** 2).mean()
    assert_close(level.value, error, dtype="float32")


def test_the_facts_of_the_data_are_shown_where_a_run_has_kept_them(digits, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(digits, path)
    length = {"min": 9, "median": 40, "max": 64}
    said = {
        "splits": {"train": {"sequences": 1153, "examined": 512, "length": length}},
        "encoder": "scalar",
        "dtype": "uint8",
        "low": 0,
        "high": 16,
        "channels": 1,
        "why": "numbers, as they have no names",
        "normalised": {"mean": [0.25], "std": [0.5]},
        "outputs": 3,
        "classes": ["ant", "bee", "<cat>"],
        "largest": {"class": "bee", "share": 0.4},
        "loss": "classification",
        "chance": {"split": "test", "metric": "accuracy", "value": 0.375},
        "warnings": ["the rows are <sorted>"],
    }
    spec = dataclasses.asdict(runs.load_run(digits).dataset.spec)
    kept = {"spec": spec, "examples": {}, "said": said}
    (path / "data.json").write_text(json.dumps(kept))
    text = read(pages.write(path)).text["verdict"]
    assert "1,153 sequences of 9 to 64 (median 40) tokens; 512 were looked at" in text
    assert "uint8 in [0, 16], 1 channel: numbers, as they have no names" in text
    assert "mean 0.25, std 0.5" in text
    assert "3: ant, bee, <cat>; the largest is bee, 40.0% of training" in text
    assert "Chance is 0.3750 on test: always answering bee" in text
    assert "Warning: the rows are <sorted>" in text
    out, line = tmp_path / "compare.html", "without reading the inputs"
    assert line not in read(pages.compare([path, digits], out)).text["curves"]
    shutil.copytree(path, tmp_path / "same")
    assert line in read(pages.compare([path, tmp_path / "same"], out)).text["curves"]


def test_the_facts_that_a_run_keeps_are_in_its_first_section(digits, tmp_path):
    kept = records.read_said(digits)
    rows = dict(facts.rows(kept))
    expected = ["inputs", "as the model reads them", "classes", "loss"]
    assert [*rows] == ["train", "validation", "test", *expected]
    text = read(pages.write(digits, tmp_path / "page.html")).text["verdict"]
    assert "What the run took its data for" in text
    dataset = runs.load_run(digits).dataset
    for split in dataset.sources:
        count = dataset.num_examples(split)
        assert f"{count:,} sequences of 64 tokens" in rows[split]
        assert f"{split}{rows[split]}" in text.replace("\n", "")
    assert facts.warned(kept) == said.warnings(kept)


@pytest.mark.parametrize(
    "said", [{}, {"said": 3}, {"said": {"splits": 1, "chance": {"metric": 2}}}]
)
def test_facts_of_the_data_that_cannot_be_are_left_out(said, tmp_path):
    assert records.read_said(tmp_path) == {}
    (tmp_path / "data.json").write_text(json.dumps(said))
    found = records.read_said(tmp_path)
    assert facts.rows(found) == facts.warned(found) == []
    assert facts.level(found) is None


def test_an_unfinished_run_has_a_report_too(digits, tokens, tmp_path):
    path = tmp_path / "killed"
    shutil.copytree(tokens, path)
    (path / "results.json").unlink()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    page = read(pages.write(path))
    assert "not finished: 2 of 2 steps" in page.text["verdict"]
    shutil.rmtree(path / "checkpoints")
    (path / "metrics.jsonl").write_text("")
    (path / "versions.json").unlink()
    page = read(pages.compare([path, digits], tmp_path / "compare.html"))
    assert "0 of 2" in page.text["scores"]
    with pytest.raises(RuntimeError, match="there is no checkpoint in"):
        pages.write(path)


@pytest.mark.slow
def test_several_runs_beside_one_another(digits, tokens, regression, tmp_path, capsys):
    out = tmp_path / "compare.html"
    paths = [str(path) for path in (digits, tokens, regression)]
    assert command(["--compare", *paths, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    page = read(out)
    assert page.sections() == ["scores", "curves", "configs", "environment"]
    for told in map(runs.read, paths):
        assert told.name in page.text["scores"] and told.name in page.text["curves"]
        name, _ = told.score
        assert f"{told.results['test'][name]:.4f}" in page.text["scores"]
    assert "model.layer" in page.text["configs"] and "data.path" in page.text["configs"]
    assert "model.features" not in page.text["configs"]
    assert "Nothing." in page.text["environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "nowhere"], "workdir must be that of a run, got nowhere"),
        (["--workdir", "{run}", "--step", "7"], "no checkpoint of step 7"),
        (["--workdir", "{run}", "--out", "no/where"], "exists, got no/where"),
        (["--compare", "{run}"], "--compare must name two runs or more, got 1"),
        (["--compare", "{run}", "{run}"], "--compare must name a run once"),
        (["--compare", "{run}", "x", "--step", "2"], "--step goes with --workdir"),
        ([], "one of the arguments --workdir --compare is required"),
    ],
)
def test_mistakes_are_named(digits, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        command([argument.format(run=digits) for argument in arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "{}\n{}\n", "metrics.jsonl: line 1 must be a JSON object"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read: No such file"),
        ("config.json", "{", "config.json cannot be read"),
        ("versions.json", "{", "versions.json cannot be read"),
        ("results.json", "", "results.json cannot be read"),
    ],
)
def test_unreadable_files_are_named(digits, tmp_path, name, text, message):
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(digits / file, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        runs.read(tmp_path)


def test_a_run_ends_well_without_its_report(tmp_path, monkeypatch, capsys):
    main._write_report(tmp_path / "nowhere")
    monkeypatch.setattr(pages, "write", lambda workdir, **_: workdir / "report.html")
    main._write_report(tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("report: not written (ValueError: ")
    assert second == f"report: {tmp_path / 'report.html'}"


def test_the_initial_variables_are_those_of_the_run(tokens, capsys):
    run = runs.load_run(tokens)
    batch = next(run.dataset.train(8, 0))
    mesh = sharding.make_mesh(run.config)
    begun = state.create(run.model, optax.identity(), batch, run.config.seed, mesh)
    found = probe.initial_variables(run)
    chex.assert_trees_all_equal(found, begun.variables())
    run.config.train.init_from = str(tokens)
    found = probe.initial_variables(run)
    chex.assert_trees_all_equal(found, run.variables)


def test_a_report_says_that_a_beginning_is_lost(tokens, monkeypatch):
    def lost(run):
        raise CheckpointError("there is no checkpoint in elsewhere")

    monkeypatch.setattr(probe, "initial_variables", lost)
    stages, remark = inside._stages(runs.load_run(tokens))
    assert list(stages) == ["trained"] and "no checkpoint in elsewhere" in remark


@pytest.mark.parametrize(
    "layer",
    [
        S4D(4, 8, discretization="bilinear", step_scale=0.5),
        S5(4, 8, blocks=2),
        S5(4, 8, conj_sym=False),
        LRU(4, 8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_eigenvalues_are_what_the_state_decays_by(layer):
    zeros = jnp.zeros((1, 1, 4))
    variables = jax.jit(layer.init)({"params": jax.random.key(0)}, zeros)
    apply = jax.jit(layer.apply)
    _, state = apply(variables, zeros + 1, layer.init_state(1))
    _, later = apply(variables, zeros, state)
    log_a = layer.apply(variables, method="eigenvalues")
    assert log_a.shape == state.shape[1:]
    assert_close(later[0], jnp.exp(log_a) * state[0])


def test_blocks_are_probed_with_their_own_variables():
    """Against the recurrent mode, which reads the impulse token by token."""
    config = small(common.base(), ("lru", "gru")).model
    config.update(encoder="scalar", outputs=2, depth=5)
    model = build(config)
    shapes = state.param_shapes(model, {"inputs": jnp.zeros((1, 7))})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype("f"), shapes)
    variables = {"params": params}
    blocks = probe.blocks(model, {"now": variables}, 7)
    assert [b.title.split(", ")[1] for b in blocks] == ["LRU", "GRU"] * 2 + ["LRU"]
    stack = params["stack"]
    second = jax.tree.map(lambda x: x[1], stack["repeated"])
    for block, given in (
        (blocks[2], second["block_0"]),
        (blocks[3], second["block_1"]),
        (blocks[4], stack["rest_0"]),
    ):
        kind = 1 if "GRU" in block.title else 0
        layer = model.stack().pattern[kind]().mixer()
        step = jax.jit(layer.apply)
        impulse = jnp.eye(6)[:, None]  # the batch: an impulse in every feature
        outputs = []
        for x in (impulse, jnp.zeros_like(impulse)):
            found, carry = [], layer.init_state(6)
            for t in range(7):
                y, carry = step(
                    {"params": given["mixer"]}, x if t == 0 else 0 * x, carry
                )
                found.append(y[:, 0])
            outputs.append(jnp.stack(found, axis=1))
        answer = outputs[0] - outputs[1]
        response = block.responses["now"]
        np.testing.assert_array_equal(block.features, np.arange(6))
        assert_close(response.filters, answer[jnp.arange(6), :, jnp.arange(6)])
        assert_close(response.memory, jnp.sqrt((answer**2).sum(-1).mean(0)))
        assert (response.log_a is None) == (kind == 1)


def test_a_layer_that_reads_the_future_gets_its_impulse_in_the_middle():
    config = small(common.base(), "s4d").model
    config.layer_args.bidirectional = True
    config.update(encoder="scalar", outputs=2)
    model = build(config)
    variables = jax.jit(model.init)({"params": jax.random.key(0)}, jnp.zeros((1, 8)))
    variables = jax.tree.map(np.asarray, state.meta.unbox(variables))
    (block,) = probe.blocks(model, {"now": variables}, 8)
    np.testing.assert_array_equal(block.lags, np.arange(-4, 4))
    assert np.all(block.responses["now"].memory > 0)


def shown(loss, inputs, answered, targets, **spec):
    """The section of made-up answers, its text."""
    n, mask = len(inputs), spec.pop("mask", None)
    mask = np.ones(inputs.shape[:2], bool) if mask is None else mask
    confidence = None if loss == "regression" else np.linspace(0.5, 0.9, n)
    found = answers.Answers("test", n + 3, inputs, targets, mask, answered, confidence)
    return answers.section(
        found,
        Spec(**dict(encoder="scalar", length=1, outputs=4, loss=loss) | spec),
        step=1,
    )


def test_answers_are_shown_as_pictures_lines_or_text():
    rng = np.random.default_rng(0)
    targets, outputs = np.array([0, 1, 2, 3, 3]), np.array([0, 1, 1, 3, 0])
    said = shown(
        "classification", rng.normal(size=(5, 16)), outputs, targets, encoder="scalar"
    )
    assert "3 of 5 are right" in said and "; 5 of 8 examples, evenly spaced" in said
    assert said.count("data:image/png") == 5 and 'class="counts"' in said
    assert "(90%)" in said and "(70%)" in said
    lines = shown(
        "classification",
        rng.normal(size=(5, 16, 2)),
        outputs,
        targets,
        encoder="scalar",
    )
    assert lines.count("<svg ") == 5 and "data:image/png" not in lines
    colour = rng.integers(0, 255, (5, 4, 4, 3), np.uint8)
    said = shown(
        "classification",
        colour,
        outputs,
        targets,
        encoder="image",
        mask=np.ones((5, 16), bool),
    )
    assert said.count("data:image/png") == 5
    words = rng.integers(0, 3, (5, 300))
    said = shown(
        "classification",
        words,
        outputs,
        targets,
        encoder="token",
        symbols=("<a>", "b", "c"),
    )
    assert "&lt;a&gt; " in said and "<a>" not in said and " ...</td>" in said
    documents = rng.integers(0, 3, (5, 2, 10))
    said = shown(
        "classification",
        documents,
        outputs,
        targets,
        encoder="token",
        mask=np.ones((5, 2, 10), bool),
    )
    assert "(90%)</th>" in said


def test_examples_are_of_every_class_and_classes_have_their_names():
    """The file is sorted, and the model is right but for one class."""
    targets = np.repeat(np.arange(5), 20)
    outputs = np.where(targets == 3, 0, targets)
    names = ("ant", "bee", "cat", "dog", "<elk>")
    said = shown(
        "classification",
        np.zeros((100, 7)),
        outputs,
        targets,
        encoder="scalar",
        outputs=5,
        classes=names,
    )
    right = said[said.index("Right, 80") : said.index("Wrong, 20")]
    found = re.findall('<div class="name">(.*?)</div>', right)
    assert sorted({*found}) == ["&lt;elk&gt;", "ant", "bee", "cat"]
    assert len(found) == answers.SHOWN
    assert f"dog {answers.ARROW} ant (" in said and "<elk>" not in said
    assert '<th scope="row">bee</th>' in said


def test_many_classes_are_shown_by_some_of_them():
    classes = np.arange(100) % 30
    rows = answers.mixed(classes, np.arange(100))
    assert len(rows) == answers.SHOWN == len({*classes[rows]})
    assert {0, 29} <= {*classes[rows]}
    assert answers.mixed(classes, []).size == 0
    few = answers.mixed(np.zeros(3, int), [2, 1])
    np.testing.assert_array_equal(few, [2, 1])


def test_confusions_of_many_classes_have_their_names():
    targets = np.arange(90) % 30
    outputs = targets.copy()
    outputs[[4, 34, 64]] = 7  # every e is an h
    outputs[2] = 3
    names = tuple(f"the letter {chr(97 + i)}" for i in range(30))
    page = shown(
        "classification",
        np.zeros((90, 5)),
        outputs,
        targets,
        outputs=30,
        classes=names,
    )
    rows = re.findall(r"<tr>(.*?)</tr>", page.replace("\n", ""))
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    at = cells.index(["class", "answer", "times", "share of the class"])
    assert cells[at + 1 : at + 3] == [
        ["the letter e", "the letter h", "3", "100%"],
        ["the letter c", "the letter d", "1", "33%"],
    ]
    assert len(cells) == at + 3
    right = shown("classification", np.zeros((90, 5)), targets, targets, outputs=30)
    assert "taken for what" not in right


def untrained(config):
    """A run at its first step."""
    dataset = data.load(config.data)
    config = resolve.complete(config, dataset.spec)
    model = build(config.model)
    batch = next(iter(dataset.evaluation("train", 1)))
    init = jax.jit(lambda key: state.init_variables(model, batch, key))
    variables = init(jax.random.key(0))
    return runs.Run(config, dataset.spec, model, variables, 0, lambda: dataset)


@pytest.mark.slow
def test_a_layer_that_selects_shows_how_it_mixes_one_example():
    """Of the values that it shows in the model's own call, the matrix makes what it
    shows as their mixture; a GRU has no values, and so none; an LRU has filters."""
    config = small(common.base(), ("gru", "lru", "mamba"), dropout=0.0)
    config.data.update(name="digits", target="label")
    config.model.depth = 3
    run = untrained(config)
    kinds = mixing.kinds(run)
    assert kinds == {0: 0, 2: 64}
    (shown,) = mixing.of(run, {"trained": run.variables}, kinds)
    assert shown.title == "block 3, Mamba" and shown.channels == (12,)
    batch = next(iter(run.dataset.evaluation(shown.split, 1)))
    _, exposed = jax.jit(lambda *x: run.model.apply(*x, mutable=[EXPOSED]))(
        run.variables, batch["inputs"]
    )
    exposed = probe.mixer_variables(exposed, run.model.stack(), 2)[EXPOSED]
    values, mixed = (exposed[k][0][0, :, shown.channel[0]] for k in ("values", "mixed"))
    M = shown.matrices["trained"]
    assert M.shape == (64, 64) and np.abs(np.triu(M, 1)).max() == 0
    assert np.abs(np.tril(M, -1)).max() > 0
    assert_close(M @ values, mixed, "gradient")


@pytest.mark.slow
def test_a_gated_layer_of_ones_own_has_no_filters_and_the_page_says_why(
    waves, tmp_path
):
    page = reported(waves, ("my_gates.Gated",), tmp_path)
    assert "filters" not in page.sections()
    text = page.text["mixing"]
    assert "block 1, Gated: what it lets pass depends on the input" in text
    assert "layers.inside.expose" in text and "How block" not in text


@pytest.mark.slow
@pytest.mark.parametrize("layer", [("my_gates.Shown",), "mamba"], ids=str)
def test_a_page_of_a_layer_that_selects_has_its_matrix(waves, tmp_path, layer):
    page = reported(waves, layer, tmp_path)
    assert "filters" not in page.sections() and "Learned" not in str(page.text)
    assert "mixes the first 16 tokens of the first example" in page.text["mixing"]
    assert "leaves no trace" not in page.text["mixing"]


@pytest.mark.slow
def test_a_layer_that_is_bent_has_filters_and_the_page_says_that_they_are_not_all(
    waves, tmp_path
):
    page = reported(waves, "gru", tmp_path)
    assert "mixing" not in page.sections()
    assert (
        "Not linear, so that other inputs are answered otherwise: block 1, GRU."
        in (page.text["filters"])
    )


@pytest.mark.slow
def test_a_linear_layer_that_tells_other_tokens_nothing_has_flat_filters(
    waves, tmp_path
):
    """They are all that there is to know of it: nothing in it depends on the input."""
    page = reported(waves, ("my_gates.Skip",), tmp_path)
    assert "block 1, Skip: trained" in page.text["filters"]
    assert "Not linear" not in page.text["filters"]
    assert "mixing" not in page.sections()
    run = runs.load_run(tmp_path / "run", trust=True)
    stages = {"trained": run.variables}
    (block,) = probe.blocks(run.model, stages, run.spec.length)
    assert block.silent() and mixing.kinds(run) == {}


def test_a_page_of_a_layer_that_broke_says_so(digits):
    run, workdir = runs.load_run(digits), runs.read(digits)
    stack = run.variables["params"]["stack"]
    mixer = stack["repeated"]["block_0"]["mixer"]

    def broken(path, leaf):
        """The second block's mixer is NaN."""
        where = jax.tree_util.keystr(path)
        return leaf.at[1].set(np.nan) if "mixer" in where else leaf

    assert all(len(leaf) == 2 for leaf in jax.tree.leaves(mixer))
    variables = jax.tree.map(jnp.asarray, run.variables)
    variables = jax.tree_util.tree_map_with_path(broken, variables)
    run = dataclasses.replace(run, variables=variables)
    found = {name: content for name, _, content in inside.sections(workdir, run, {})}
    assert "block 2, LRU: answers with what is not finite" in found["filters"]
    assert "block 1, LRU: trained" in found["filters"]
    assert "block 2, LRU: trained" not in found["filters"]
    assert "Not linear" not in found["filters"] and not found["mixing"]
    (row,) = re.findall(r"<tr><th[^>]*>block 2, LRU</th>.*</tr>", found["spectra"])
    assert row.count("<td>\N{EN DASH}</td>") == 4


def test_regressed_values_are_shown():
    x = np.linspace(-1, 1, 20)
    said = shown(
        "regression", np.tile(x[:, None], (1, 5)), 2 * x[:, None], x, encoder="scalar"
    )
    assert "1 \N{RIGHTWARDS ARROW} 2" in said
    one = shown(
        "regression", np.ones((1, 5)), np.ones((1, 1)), np.ones(1), encoder="scalar"
    )
    assert "1 \N{RIGHTWARDS ARROW} 1" in one


@pytest.mark.slow
def test_figures_of_long_sequences_and_deep_stacks_stay_small():
    rng = np.random.default_rng(0)
    L, n = 4096, 20_000

    def response():
        log_a = -rng.exponential(size=n) + 1j * rng.normal(size=n)
        return probe.Response(rng.normal(size=(9, L)), rng.uniform(size=L) + 0.1, log_a)

    responses = {"initial": response(), "trained": response()}
    block = probe.Block("block", np.arange(9), np.arange(L), responses)
    one = figures.filters([block]) + figures.spectra([block], L)
    assert sum(len(panel.content) for panel in one) * figures.BLOCKS < 1_700_000
    block = block._replace(lags=block.lags[:1])
    few = {k: probe.Response(np.ones((9, 1)), np.ones(1), None) for k in responses}
    many = figures.filters([block._replace(responses=few)] * (figures.BLOCKS + 5))
    titles = [panel.title for panel in many]
    assert titles.count("size over all features") == figures.BLOCKS
    ids = [i for panel in many for i in re.findall(r'\bid="([^"]*)"', panel.content)]
    assert len({*ids}) == len(ids)


def test_curves_of_many_steps_are_drawn_in_bounded_size(tmp_path):
    """100,000 logs and 10,000 validations take no more than a screen can show."""
    rng = np.random.default_rng(0)
    for name, count in {"short": 50, "long": 100_000}.items():
        records.write_config(tmp_path / name, pixels.get_config("digits"))
        losses = (2 / np.arange(1, count + 1) ** 0.3 + rng.random(count)).tolist()
        with open(tmp_path / name / metrics.FILE, "w") as file:
            for step, loss in enumerate(losses, 1):
                row = {"step": step, "split": "train", "loss": loss}
                print(json.dumps(row), file=file)
                if step % 10 == 0:
                    print(json.dumps(row | {"split": "validation"}), file=file)
    text = pages.compare(
        [tmp_path / "short", tmp_path / "long"], tmp_path / "compare.html"
    ).read_text()
    assert "100,000 of" in text
    # what the marks and the lines of all curves are made of
    assert 5 <= text.count("<use") < 200
    lines = [len(re.findall("[ML]", d)) for d in re.findall(r'\bd="([^"]*)"', text)]
    assert 2_000 < max(lines) < 10_000
    assert len(text) < 500_000
