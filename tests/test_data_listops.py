import concurrent.futures
import errno
import hashlib
import importlib.util
import itertools
import os
import pickle
import random
import statistics
import threading
import time

import numpy as np
import pytest
from arena import RULES, everything, take, write_listops

from train import data
from train.data import expressions, listops, prepared
from train.data.expressions import CLOSE, EOS, OPEN, PAD, SYMBOLS, TOKENS, ZERO, Rules
from train.data.spec import Spec
from train.reproduce import baseline

SMALL = dict(
    name="listops",
    train=300,
    validation=40,
    test=50,
    min_length=10,
    max_length=50,
    max_depth=4,
    max_args=4,
)


def text(tokens):
    return " ".join(SYMBOLS[token - ZERO] for token in tokens)


def tokens_of(line):
    return [TOKENS[word] for word in line.split()]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("7", 7),
        ("[MAX 4 [MIN 2 3 ] 9 ]", 9),
        ("[MIN 4 [MAX 2 3 ] 9 ]", 3),
        ("[SM 9 9 5 ]", 3),
        ("[MED 1 8 2 ]", 2),
        ("[MED 1 8 2 5 ]", 3),
        ("[MED [SM 8 8 ] [MAX 0 1 ] ]", 3),
    ],
)
def test_values_by_hand(line, value):
    assert expressions.value(tokens_of(line)) == value


@pytest.mark.parametrize("line", ["", "1 2", "[MAX 1 2", "[MAX ]", "1 ]", "[SM 1 ] ]"])
def test_what_is_no_expression_has_no_value(line):
    with pytest.raises(ValueError, match=r"closes nothing|are open"):
        expressions.value(tokens_of(line))


@pytest.mark.parametrize(
    "rules", [RULES, Rules(1, 20, 3, 2), Rules(200, 400, 10, 10)], ids=str
)
def test_drawn_expressions_are_well_formed_with_the_value_they_claim(rules):
    drawn = expressions.draw(rules, seed=1, number=0)
    assert len(drawn) > 100
    assert {value for value, _ in drawn} == set(range(10))
    for value, tokens in drawn[:200]:
        assert rules.min_length < len(tokens) < rules.max_length
        assert expressions.value(tokens) == value
        depth, arguments = 1, [0]
        for token in tokens:
            if token == CLOSE:
                assert 2 <= arguments.pop() <= rules.max_args
                depth -= 1
            else:
                assert depth <= rules.max_depth
                arguments[-1] += 1
                if token >= OPEN:
                    arguments.append(0)
                    depth += 1


def test_every_expression_of_a_small_world_is_found_once(monkeypatch):
    monkeypatch.setattr(expressions, "BARREN_DRAWS", 3)
    rules = Rules(3, 6, 2, 4)
    world = {
        bytes([operator, *(ZERO + digit for digit in digits), CLOSE])
        for operator in range(OPEN, OPEN + 4)
        for count in (2, 3)
        for digits in itertools.product(range(10), repeat=count)
    }
    found = [tokens for _, tokens in take(rules, len(world))]
    assert len(found) == len(set(found)) and set(found) == world
    with pytest.raises(ValueError, match=r"only 4400 different .*data\.max_length=6"):
        take(rules, len(world) + 1)


def plain_draw(rng, rules, depth=1):
    """An expression of the definition, drawn node by node."""
    if depth == rules.max_depth or rng.random() > 0.25:
        return [ZERO + rng.randrange(10)]
    arguments = [
        plain_draw(rng, rules, depth + 1) for _ in range(rng.randint(2, rules.max_args))
    ]
    return [OPEN + rng.randrange(4), *itertools.chain(*arguments), CLOSE]


def statistics_of(drawn):
    """Mean and its standard error of what describes an expression."""
    features = [
        (
            len(tokens),
            sum(OPEN <= token < CLOSE for token in tokens),
            tokens[0],
            tokens[-2] == CLOSE,
            tokens[1],
            expressions.value(tokens),
        )
        for tokens in drawn
    ]
    columns = list(zip(*features, strict=True))
    error = len(drawn) ** -0.5
    return [(statistics.fmean(c), statistics.pstdev(c) * error) for c in columns]


def test_the_draw_follows_the_definition():
    rng, plain = random.Random(0), []
    while len(plain) < 2000:
        tokens = plain_draw(rng, RULES)
        if RULES.min_length < len(tokens) < RULES.max_length:
            plain.append(tokens)
    fast = [tokens for _, tokens in expressions.draw(RULES, 0, 0)[:8000]]
    assert len(fast) > 4000
    for (a, s), (b, t) in zip(statistics_of(plain), statistics_of(fast), strict=True):
        assert abs(a - b) < 4 * (s**2 + t**2) ** 0.5


def test_the_draw_depends_on_the_seed_alone():
    first = take(Rules(100, 300, 8, 8), 3000)
    assert first == take(Rules(100, 300, 8, 8), 3000, workers=3)
    assert not set(first) & set(take(Rules(100, 300, 8, 8), 3000, seed=1))


def test_examples_change_only_with_the_version():
    drawn = b"".join(bytes([v]) + tokens for v, tokens in take(RULES, 1000))
    digest = hashlib.sha256(drawn).hexdigest()[:16]
    assert (listops.VERSION, digest) == (1, "6693a105c848626f")


def test_examples_are_tokens_end_and_padding(tmp_path):
    dataset = data.load(SMALL | dict(folder=str(tmp_path)))
    symbols = dataset.spec.symbols
    expected = Spec("token", 50, 10, "classification", vocab_size=18, padded=True)
    assert dataset.spec == expected.but(symbols=symbols)
    assert [symbols[TOKENS[word]] for word in ("[MAX", "9", "]")] == ["[MAX", "9", "]"]
    seen = set()
    for split, count in (("train", 300), ("validation", 40), ("test", 50)):
        batch = everything(dataset, split)
        assert batch["inputs"].shape == batch["mask"].shape == (count, 50)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        for row, mask, target in zip(
            batch["inputs"], batch["mask"], batch["targets"], strict=True
        ):
            real = mask.sum()
            assert mask[:real].all() and row[real - 1] == EOS
            assert (row[real:] == PAD).all()
            tokens = row[: real - 1].tolist()
            assert expressions.value(tokens) == target
            assert 10 < len(tokens) < 50
            seen.add(tuple(tokens))
    assert len(seen) == 390
    source = pickle.loads(pickle.dumps(dataset.sources["test"]))
    assert source[3]["target"] == batch["targets"][3]
    batch = next(dataset.train(8, seed=0))
    assert batch["inputs"].shape == (8, 50)


def test_a_split_may_be_left_out(tmp_path):
    dataset = data.load(SMALL | dict(folder=str(tmp_path), validation=0, test=0))
    assert list(dataset.sources) == ["train"]


def home_of(folder):
    (home,) = folder.iterdir()
    return home


def test_what_was_prepared_is_not_prepared_again(tmp_path, monkeypatch):
    config = SMALL | dict(folder=str(tmp_path))
    first = everything(data.load(config), "test")
    monkeypatch.setattr(expressions, "distinct", None)
    np.testing.assert_array_equal(
        everything(data.load(config), "test")["inputs"], first["inputs"]
    )
    with pytest.raises(TypeError):  # other settings need other examples
        data.load(config | dict(seed=1))
    assert home_of(tmp_path).name == "10-50-4-4-300-40-50-0"


DAMAGE = {
    "altered": (
        lambda home: _flip(home / "test.array_record"),
        "test.array_record was altered",
    ),
    "cut": (
        lambda home: os.truncate(home / "train.array_record", 1000),
        "train.array_record was altered",
    ),
    "missing": (
        lambda home: (home / "validation.array_record").unlink(),
        "validation.array_record is missing",
    ),
    "unfinished": (
        lambda home: (home / "manifest.json").unlink(),
        "manifest.json is missing",
    ),
    "manifest": (
        lambda home: (home / "manifest.json").write_text("{}"),
        "manifest.json is damaged",
    ),
    "version": (
        lambda home: (home / "manifest.json").write_text(
            (home / "manifest.json").read_text().replace('"version": 1', '"version": 0')
        ),
        "made with other settings",
    ),
}


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_mended(tmp_path, capsys, damage, message):
    config = SMALL | dict(folder=str(tmp_path))
    first = everything(data.load(config), "test")
    assert capsys.readouterr().out == ""
    home = home_of(tmp_path)
    damage(home)
    again = everything(data.load(config), "test")
    assert f"{home}: {message}" in capsys.readouterr().out
    np.testing.assert_array_equal(again["inputs"], first["inputs"])
    assert home_of(tmp_path) == home


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_an_interrupted_preparation_goes_on(tmp_path, error):
    home, found = tmp_path / "home", []

    def write(folder):
        found.append(sorted(path.name for path in folder.iterdir()))
        prepared.write_records(folder / f"file_{len(found)}", [b"whole"])
        (folder / f"{prepared.UNFINISHED}3").write_text("half")
        if len(found) == 1:
            raise error

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        prepared.prepare(home, {"a": 1}, write, "It")
    assert not home.exists()
    prepared.prepare(home, {"a": 1}, write, "It")
    left = [prepared.LOCK, f"{prepared.UNFINISHED}3", "file_1"]
    assert found == [[prepared.LOCK], left]
    assert home_of(tmp_path) == home
    files = {path.name for path in home.iterdir()}
    assert files == {"file_1", "file_2", prepared.MANIFEST}


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "file").write_text("half")
        raise ValueError("a file of the user's own")

    with pytest.raises(ValueError, match="of the user's own"):
        prepared.prepare(tmp_path / "home", {}, write, "It")
    assert not list(tmp_path.iterdir())


def test_one_prepares_where_two_ask(tmp_path, capsys):
    home, begun, written = tmp_path / "home", threading.Event(), []

    def write(folder):
        written.append(folder)
        begun.set()
        time.sleep(0.5)
        prepared.write_records(folder / "file", [b"content"])

    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(prepared.prepare, home, {"a": (1, 2)}, write, "It")
        begun.wait()
        prepared.prepare(home, {"a": (1, 2)}, write, "It")
    first.result()
    assert len(written) == 1
    assert "It: another process prepares it" in capsys.readouterr().out
    assert home_of(tmp_path) == home
    assert {path.name for path in home.iterdir()} == {"file", prepared.MANIFEST}


def test_two_may_prepare_at_once_where_files_cannot_be_locked(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)

    def write(folder):
        (folder / "file").write_text("content")

    def write_slowly(folder):
        prepared.prepare(home, {"a": (1, 2)}, write, "It")
        write(folder)

    prepared.prepare(home, {"a": (1, 2)}, write_slowly, "It")
    assert home_of(tmp_path) == home and (home / "file").read_text() == "content"


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_who_waits_goes_on_where_the_first_failed(tmp_path):
    home, begun = tmp_path / "home", threading.Event()

    def fail(folder):
        begun.set()
        time.sleep(0.5)
        raise ValueError("a file of the user's own")

    def write(folder):
        prepared.write_records(folder / "file", [b"content"])

    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(prepared.prepare, home, {}, fail, "It")
        begun.wait()
        prepared.prepare(home, {}, write, "It")
    assert isinstance(first.exception(), ValueError)
    assert home_of(tmp_path) == home


def test_without_array_record_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package array_record is missing here"):
        data.load(SMALL | dict(folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train=0), r"data\.train must be 1 or more, got 0"),
        (dict(test=-1), r"data\.test must be 0 or more, got -1"),
        (dict(min_length=0), r"data\.min_length must be 1 or more"),
        (dict(max_length=11), r"data\.max_length must be 12 or more, got 11"),
        (dict(max_depth=1), r"data\.max_depth must be 2 or more"),
        (dict(max_args=1), r"data\.max_args must be 2 or more"),
        (dict(seed=-1), r"data\.seed must be 0 or more"),
        (
            dict(max_depth=2, max_args=8),
            r"data\.min_length must be below 10, the greatest length with max_depth 2",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(SMALL | dict(folder=str(tmp_path / "data")) | change)
    assert not (tmp_path / "data").exists()


def test_the_lra_files_are_converted(tmp_path):
    made = write_listops(tmp_path / "lra")
    config = dict(name="listops", path=str(tmp_path / "lra"), max_length=50)
    config["folder"] = str(tmp_path / "data")
    dataset = data.load(config)
    assert dataset.num_examples("train") == 40
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        batch = everything(dataset, split)
        assert batch["targets"].tolist() == [value for value, _ in made[name]]
        for row, (_, tokens) in zip(batch["inputs"], made[name], strict=True):
            assert row[: len(tokens)].tolist() == list(tokens)
            assert row[len(tokens)] == EOS
    (tmp_path / "lra" / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"data\.path: basic_val\.tsv not found"):
        data.load(config)


BAD_TSV = {
    "only a header": ("Source\tTarget\n", "basic_val.tsv: must have an example below"),
    "header": ("Text\tLabel\n", "basic_val.tsv: the first line must be Source<tab>"),
    "empty": ("", "the first line must be Source<tab>Target, got ''"),
    "symbol": ("Source\tTarget\n( [AVG 1 ) ]\t1\n", "line 2: unknown symbol '.AVG'"),
    "no target": ("Source\tTarget\n[MAX 1 ]\n", "line 2: the target is '', but .* 1"),
    "target": ("Source\tTarget\n1\t1\n[MAX 1 ]\t2\n", "line 3: the target is '2'"),
    "open": ("Source\tTarget\n[MAX 1\t1\n", "line 2: 1 lists are open"),
    "length": (f"Source\tTarget\n{'1 ' * 50}\t1\n", "line 2: 50 tokens; data.max_leng"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TSV.values(), ids=BAD_TSV)
def test_every_fault_of_the_lra_files_is_named(tmp_path, content, message):
    write_listops(tmp_path / "lra", val=content)
    with pytest.raises(ValueError, match=message):
        data.load(
            dict(
                name="listops",
                path=str(tmp_path / "lra"),
                max_length=50,
                folder=str(tmp_path / "data"),
            )
        )
    assert not list((tmp_path / "data").iterdir())


def test_a_file_of_another_encoding_is_named(tmp_path):
    write_listops(tmp_path / "lra")
    with (tmp_path / "lra" / "basic_val.tsv").open("ab") as file:
        file.write(b"\xff\t1\n")
    config = dict(name="listops", path=str(tmp_path / "lra"), max_length=50)
    with pytest.raises(ValueError, match=r"basic_val\.tsv: not a UTF-8 text file"):
        data.load(config | dict(folder=str(tmp_path / "data")))


def test_a_setting_never_becomes_part_of_a_path_elsewhere(tmp_path):
    config = dict(name="listops", folder=str(tmp_path / "data"))
    for key in ("max_length", "max_args", "train", "seed"):
        with pytest.raises(ValueError, match=rf"data\.{key} must be a whole number"):
            data.load(config | {key: "/../../elsewhere"})
    assert not list(tmp_path.iterdir())


def test_baseline_counts_tokens_and_sees_the_first():
    inputs = np.array([[13, 4, 4, 17, 2, 0], [14, 5, 2, 0, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
    found = baseline.features(
        Spec("token", 1, 1, "classification", vocab_size=18), inputs, mask
    )
    expected = np.zeros((2, 36))
    expected[0, [13, 4, 17, 2, 18 + 13]] = 1, 2, 1, 1, 1
    expected[1, [14, 5, 2, 18 + 14]] = 1
    np.testing.assert_array_equal(found, expected)
    numbers = baseline.features(
        Spec("scalar", 1, 1, "classification"),
        np.ones((2, 3, 2)),
        np.array([[1, 0, 1], [1, 1, 1]], bool),
    )
    np.testing.assert_array_equal(numbers, [[1, 1, 0, 0, 1, 1], [1] * 6])


def test_baseline_beats_chance_and_is_far_from_the_value(tmp_path):
    config = SMALL | dict(folder=str(tmp_path), train=1500, test=500)
    accuracy = baseline.logistic_regression(data.load(config))
    assert 0.2 < accuracy < 0.5
    with pytest.raises(
        ValueError, match="must be 'classification' for a baseline, got"
    ):
        baseline.logistic_regression(data.load(dict(name="digits", target="next")))
