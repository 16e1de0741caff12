import hashlib
import json
import pickle
import re

import numpy as np
import pytest
from test_configs import check_fit, flag_values

from configs import synthetic as configs
from layers import LAYERS
from train import data, evaluate, loop, losses, resolve
from train.data import synthetic
from train.reproduce import __main__ as reproduce
from train.reproduce import contest, ledger

SMALL = {
    "mqar": dict(length=24, vocab_size=20, pairs=5),
    "copying": dict(length=17, vocab_size=6, tokens=4),
    "selective_copying": dict(length=17, vocab_size=6, tokens=4),
    "induction": dict(length=9, vocab_size=5),
    "passkey": dict(length=411, digits=5),
}


def dataset(name, **changes):
    sizes = dict(train=400, validation=30, test=20)
    return data.load(dict(name=name, **(SMALL[name] | sizes | changes)))


def examples(name, count=300, **changes):
    """(inputs, {place: answer}) of training examples."""
    source = dataset(name, **changes).sources["train"]
    for i in range(count):
        example = source[i]
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        assert example["mask"].all()
        asked = np.flatnonzero(example["targets"] != losses.IGNORED).tolist()
        yield example["inputs"], {t: int(example["targets"][t]) for t in asked}


def test_mqar_asks_for_every_value_once():
    for inputs, answers in examples("mqar"):
        keys, values = inputs[:10:2].tolist(), inputs[1:10:2].tolist()
        assert len(set(keys)) == len(set(values)) == 5
        assert min(keys) >= 1 and max(keys) < 10 <= min(values) and max(values) < 20
        value = dict(zip(keys, values, strict=True))
        assert sorted(inputs[t] for t in answers) == sorted(keys)
        for place, answer in answers.items():
            assert place >= 10 and place % 2 == 0 and answer == value[inputs[place]]
        quiet = [t for t in range(10, 24) if t not in answers]
        assert not inputs[quiet].any()


def test_mqar_queries_follow_the_power_law():
    slots = 11
    found = np.zeros(slots)
    for _, answers in examples("mqar", 4000, pairs=1, train=4000, power=0.2):
        (place,) = answers
        found[place // 2 - 1] += 1
    expected = np.arange(1, slots + 1) ** -0.8
    expected *= 4000 / expected.sum()
    assert np.sum((found - expected) ** 2 / expected) < 29.6  # 0.1 % at 10 degrees


def test_mqar_filler_may_be_random():
    filler = [
        inputs[t]
        for inputs, answers in examples("mqar", random_filler=True)
        for t in range(10, 24)
        if t not in answers
    ]
    counts = np.bincount(filler, minlength=20)
    assert len(counts) == 20
    assert abs(counts / len(filler) - 1 / 20).max() < 0.02


@pytest.mark.parametrize("name", ["copying", "selective_copying"])
def test_copying_asks_for_the_tokens_in_order(name):
    places, tokens = [], []
    for inputs, answers in examples(name):
        assert list(answers) == [13, 14, 15, 16]
        assert (inputs[13:] == 5).all()
        stood = np.flatnonzero(inputs[:13])
        assert inputs[stood].tolist() == list(answers.values())
        places += stood.tolist()
        tokens += answers.values()
    assert set(tokens) == {1, 2, 3, 4}
    assert abs(np.bincount(tokens)[1:] / len(tokens) - 1 / 4).max() < 0.05
    if name == "copying":
        assert set(places) == {0, 1, 2, 3}
    else:
        assert abs(np.bincount(places) / len(places) - 1 / 13).max() < 0.03


def test_induction_asks_for_what_followed_the_trigger():
    places, tokens = [], []
    for inputs, answers in examples("induction"):
        first, last = np.flatnonzero(inputs == 4)
        assert last == 8 and answers == {8: inputs[first + 1]}
        places.append(first)
        tokens.append(answers[8])
    assert set(places) == set(range(7)) and set(tokens) == {0, 1, 2, 3}
    assert abs(np.bincount(places) / 300 - 1 / 7).max() < 0.08


@pytest.mark.parametrize("length", [161, 162, 251, 252, 411])
def test_passkey_states_the_number_once_and_asks_for_it(length):
    befores, firsts = set(), set()
    for inputs, answers in examples("passkey", 100, length=length):
        text = bytes(inputs.tolist()).decode()
        assert len(text) == length
        (stated,) = re.finditer(r"\nThe pass key is (\d+)\. Remember it\. \1 is", text)
        key = stated[1]
        assert len(key) == 5
        assert bytes(answers.values()).decode() == key
        assert list(answers) == list(range(length - 5, length))
        assert text.endswith("What is the pass key? The pass key is " + key[:-1])
        befores.add(text[: stated.start()].count("back again."))
        firsts.add(key[0])
    blocks = (length - 161) // 90
    assert len(befores) == blocks + 1 and "0" in firsts


@pytest.mark.parametrize("name", SMALL)
def test_an_example_depends_on_seed_split_and_number_alone(name):
    first, again = dataset(name), dataset(name, train=50)
    first = pickle.loads(pickle.dumps(first.sources["train"]))
    for i in (49, 3):
        for key, array in first[i].items():
            np.testing.assert_array_equal(array, again.sources["train"][i][key])
    others = [again.sources["test"], dataset(name, seed=1).sources["train"]]
    for other in others:
        assert any((first[i]["inputs"] != other[i]["inputs"]).any() for i in range(5))
    with pytest.raises(IndexError):
        first[400]


def test_examples_are_those_of_any_machine():
    drawn = b"".join(
        example[key].tobytes()
        for name in SMALL
        for example in map(dataset(name).sources["train"].__getitem__, range(20))
        for key in ("inputs", "targets")
    )
    assert hashlib.sha256(drawn).hexdigest()[:16] == "021dcd1b7031f691"


def test_the_stream_does_not_depend_on_workers_and_resumes_exactly():
    source = dataset("mqar", train=synthetic.TRAIN)
    whole = source.train(8, seed=3)
    batches = [next(whole) for _ in range(4)]
    assert len(np.unique(np.concatenate([b["inputs"] for b in batches]), axis=0)) == 32
    iterator = source.train(8, seed=3, workers=2)
    iterator.set_state(whole.get_state() | {"batches": 2})
    for batch in batches[2:]:
        for key, array in next(iterator).items():
            np.testing.assert_array_equal(array, batch[key])
    iterator.close()
    other = next(source.train(8, seed=4))
    assert (other["inputs"] != batches[0]["inputs"]).any()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mqar", dict(pairs=7), r"length must be 28 or more \(4 data.pairs\), got 24"),
        ("mqar", dict(length=25), "length must be even, got 25"),
        (
            "mqar",
            dict(vocab_size=11),
            r"vocab_size must be 12 or more \(2 \(data.pairs",
        ),
        ("mqar", dict(pairs=0), "pairs must be 1 or more, got 0"),
        ("mqar", dict(power=0), r"power must lie in \(0, 1\], got 0"),
        ("mqar", dict(train=0), "train must be 1 or more, got 0"),
        ("mqar", dict(seed=-1), "seed must be 0 or more"),
        ("copying", dict(tokens=9), r"length must be 18 or more \(2 data.tokens\)"),
        ("selective_copying", dict(vocab_size=3), "vocab_size must be 4 or more"),
        ("induction", dict(length=2), "length must be 3 or more"),
        ("induction", dict(vocab_size=2), "vocab_size must be 3 or more"),
        ("passkey", dict(length=160), "length must be 161 or more"),
        ("passkey", dict(digits=0), "digits must be 1 or more"),
        ("passkey", dict(test=-1), "test must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(name, change, message):
    with pytest.raises(ValueError, match=rf"data\.{message}"):
        dataset(name, **change)


def test_a_split_may_be_left_out():
    assert list(dataset("induction", validation=0).sources) == ["train", "test"]


def test_only_what_is_drawn_can_be_longer():
    config = dict(name="induction", length=9)
    assert data.stretched(config, 4).spec.length == 36
    assert data.stretched(dict(name="copying"), 2).spec.length == 2_048
    with pytest.raises(ValueError, match=r"'digits' has one length only; .* copying"):
        data.stretched(dict(name="digits"), 2)


PAPER = [f"{task},layer=mamba,scale=paper" for task in configs.TASKS]


@pytest.mark.parametrize("arg", [*(f"{t},layer=gru" for t in configs.TASKS), *PAPER])
def test_synthetic_config_fits(arg):
    config = flag_values(f"synthetic:{arg}")
    config.data.update(train=40, validation=2, test=2)
    found = data.load(config.data)
    check_fit(config, found)
    assert config.model.length in (found.spec.length, 8 * found.spec.length)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_fits_the_small_scale(layer):
    """As the README's commands say, at the width of the config."""
    config = configs.get_config(f"mqar,layer={layer}")
    config = resolve.complete(config, data.load(config.data).spec)
    assert contest.parameters(config) > 0


@pytest.mark.parametrize("layer", ["flash_butterfly", "attention"])
def test_what_reads_the_future_is_refused_where_the_targets_lie(layer, tmp_path):
    config = tiny(f"induction,layer={layer}")
    config.data = configs.get_config("passkey").data
    config.model.update(length=256)
    if layer == "attention":
        config.model.layer_args.bidirectional = True
    with pytest.raises(ValueError, match=r"^model.layer must not read the future, wh"):
        loop.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def tiny(arg):
    """A run of two steps."""
    config = configs.get_config(arg)
    config.data.update(length=12, vocab_size=5, validation=8, test=8)
    config.model.update(features=4, depth=1, length=24)
    config.optimizer.warmup = 0
    config.train.update(steps=2, batch_size=4, eval_every=2, log_every=2)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("induction")
    loop.run(tiny("induction,layer=gru"), workdir)
    return workdir


def test_a_run_is_tested_at_several_lengths(trained, capsys):
    command = ["--workdir", str(trained), "--lengths"]
    assert evaluate.main([*command, "1,2"]) == 0
    found = json.loads((trained / evaluate.LENGTHS).read_text())
    assert (found["step"], found["split"]) == (2, "test")
    assert [(r["times"], r["length"]) for r in found["lengths"]] == [(1, 12), (2, 24)]
    assert all(0 <= row["accuracy"] <= 1 for row in found["lengths"])
    shown = capsys.readouterr().out
    assert (
        "sequence accuracy" in shown and f"{found['lengths'][1]['loss']:.4f}" in shown
    )
    results = json.loads((trained / "results.json").read_text())["test"]
    assert found["lengths"][0]["loss"] == pytest.approx(results["loss"], rel=1e-5)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*command, "0"])
    assert "--lengths must be whole numbers from 1" in capsys.readouterr().err


def test_a_split_without_end_is_scored_in_part(trained, capsys):
    command = ["--workdir", str(trained), "--split", "train"]
    for arguments, message in (
        ([], "split train has 100,000,000 examples; --examples N scores the first N"),
        (["--examples", "0"], "examples must be 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*command, *arguments])
        assert message in capsys.readouterr().err
    assert evaluate.main([*command, "--examples", "5"]) == 0
    assert evaluate.main([*command, "--examples", "5", "--lengths", "1"]) == 0
    found = json.loads(capsys.readouterr().out.partition("}")[0] + "}")
    rows = json.loads((trained / evaluate.LENGTHS).read_text())["lengths"]
    assert rows[0]["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_lengths_are_positive_whole_numbers():
    assert evaluate.parse_times("1,2,16") == (1, 2, 16)
    for words in ("2,0", "x", "", "1.5", "-1"):
        with pytest.raises(ValueError, match=f"such as 1,2,4,8, got '{words}'"):
            evaluate.parse_times(words)


def test_parameters_and_states_are_counted():
    config = tiny("induction,layer=s4d")
    config.model.update(features=6, encoder="token", vocab_size=5, outputs=5)
    config.model.layer_args.state_size = 8
    assert (
        contest.state_floats(config) == 6 * 8
    )  # 4 complex numbers for each of 6 features
    mixer = 6 * (4 * 2 + 4 * 2 + 4 * 2) + 2 * 6  # A, B, C; log_dt, D
    block = mixer + 2 * 6 + 6 * 12 + 12  # norm, gate
    assert contest.parameters(config) == 5 * 6 + block + 2 * 6 + 6 * 5 + 5
    config = tiny("induction,layer=attention")
    config.model.update(features=8, encoder="token", vocab_size=5, outputs=5)
    assert contest.state_floats(config) == 2 * 23 * 8  # not how many tokens there are


def test_contenders_get_the_same_number_of_parameters(monkeypatch):
    monkeypatch.setattr(contest, "FEATURES", range(4, 65, 4))
    config = tiny("induction,layer=gru")
    config.model.update(encoder="token", vocab_size=5, outputs=5)
    contest.match_parameters(config, 5_000)
    assert config.model.features % 4 == 0
    assert abs(contest.parameters(config) / 5_000 - 1) < 0.1
    with pytest.raises(ValueError, match=r"within 10% of 100; \d+ with 4 features"):
        contest.match_parameters(config, 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", contest.CONTESTS)
def test_every_contest_is_fair(name):
    found = contest.CONTESTS[name]
    for contender in found.contenders:
        config = contest.config_of(found, contender)
        assert abs(contest.parameters(config) / found.parameters - 1) <= 0.1
        assert contest.state_floats(config) > 0


def small_contest(*layers):
    contenders = tuple(contest.Contender(layer, {}, "0.9") for layer in layers)
    return contest.Contest(tiny, "induction", 213, (1, 2), contenders)


def test_validation_chooses_the_rate_and_the_test_does_not(tmp_path, monkeypatch):
    accuracy = {1e-3: (0.5, 0.99), 3e-3: (0.7, 0.2), 1e-2: None}
    trained = []

    def run(config, folder):
        rate = config.optimizer.lr
        if accuracy[rate] is None:
            raise FloatingPointError("loss is nan")
        trained.append((rate, config.seed))
        folder.mkdir(exist_ok=True)
        rows = [
            {"split": "validation", "accuracy": 1.0, "loss": 0.0},  # but not at its end
            {"split": "validation", "accuracy": accuracy[rate][0], "loss": 1.0},
            {"split": "train", "accuracy": 0.0, "loss": 9.0},
        ]
        lines = [json.dumps({"step": n, **row}) for n, row in enumerate(rows, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        lengths = [dict(times=n, accuracy=accuracy[rate][1]) for n in (1, 2)]
        (folder / evaluate.LENGTHS).write_text(
            json.dumps(dict(step=2, lengths=lengths))
        )
        return {"step": 2, "seconds": 7}

    monkeypatch.setattr(ledger, "trained", run)
    found = small_contest("gru")
    row = contest.run_contender(found, found.contenders[0], (4, 5, 6), tmp_path)
    assert trained[:2] == [(1e-3, 4), (3e-3, 4)]
    assert trained[2:] == [(3e-3, 4), (3e-3, 5), (3e-3, 6)]
    assert row.config.optimizer.lr == 3e-3 and row.accuracies == [[0.2, 0.2]] * 3
    accuracy.update({1e-3: None, 3e-3: None})
    with pytest.raises(FloatingPointError, match="gru: finite at none of"):
        contest.run_contender(found, found.contenders[0], (4,), tmp_path)


@pytest.mark.slow
def test_reproduce_writes_the_table_of_a_contest_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(contest.CONTESTS, "induction", small_contest("gru", "mamba"))
    monkeypatch.setattr(contest, "RATES", (1e-3, 1e-2))
    page = tmp_path / "results.md"
    page.write_text("<!-- induction:begin -->\n<!-- induction:end -->\nafter\n")
    command = ["--task", "induction", "--seeds", "0", "--layers", "gru"]
    command += ["--workdir", str(tmp_path / "runs"), "--page", str(page)]
    assert reproduce.main(command) == 0
    text = page.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `gru` |"))
    features, parameters, state = (int(cell) for cell in row.split("|")[2:5])
    assert state == features and abs(parameters / 213 - 1) < 0.1
    assert text.count("test at") == 2 and "mamba" not in text
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["induction-gru-0.001-0", "induction-gru-0.01-0"]
    capsys.readouterr()
    assert reproduce.main(command) == 0
    assert page.read_text() == text
    assert capsys.readouterr().out.count("finished before") == 3
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([*command, "--layers", "s5"])
    assert "--layers must be among gru, mamba, got 's5'" in capsys.readouterr().err
