import json
import re

import numpy as np
import pytest
import tiny_run

from configs import common
from train.reproduce import __main__ as reproduce
from train.reproduce import ledger
from train.reproduce.entries import ENTRIES, Entry, Published

TINY = {
    "model.features": 4,
    "model.depth": 1,
    "train.steps": 2,
    "train.eval_every": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
}


def test_the_page_has_the_table_of_the_rows_that_are_kept():
    page = (tiny_run.ROOT / reproduce.PAGE).read_text()
    found = re.search(r"<!-- ledger:begin -->\n(.*)\n<!-- ledger:end -->", page, re.S)
    assert found[1] == ledger.table()


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_can_be_run_and_their_rows_are_of_them(name):
    entry = ENTRIES[name]
    for layer, variant in ledger.runs_of(entry):
        config = ledger.config_of(entry, layer, variant, seed=5)
        assert config.seed == 5
        flat = config.to_dict()
        for key, value in ledger.changes(entry, variant).items():
            section, _, field = key.partition(".")
            assert flat[section][field] == value
    assert set(entry.only) <= set(entry.variants)
    assert set(entry.published) <= set(entry.layers)
    for row in ledger.kept(name):
        assert (row.layer, row.variant) in ledger.runs_of(entry)
        assert row.changes == ledger.changes(entry, row.variant)
        assert 0 <= row.last <= 1 and row.seconds > 0 and row.revision


def test_layers_of_entries_are_known():
    for entry in ENTRIES.values():
        assert set(entry.layers) <= set(common.LAYER_ARGS)


@pytest.mark.slow
def test_an_entry_is_trained_once_and_its_table_written(tmp_path, monkeypatch, capsys):
    entry = Entry(
        "digits",
        "pixels:digits",
        ("gru",),
        overrides=TINY,
        variants={"from scratch": {}, "self-pretrained": {"pretrain.steps": 2}},
        seeds=(0, 1),
        published={"gru": Published(0.9, "https://example.org")},
    )
    monkeypatch.setitem(ENTRIES, "tiny", entry)
    folders = [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    assert reproduce.main(["run", "tiny", *folders, "--seeds=0"]) == 0
    first = ledger.kept("tiny", tmp_path / "results")
    assert [row.key for row in first] == [
        ("gru", "from scratch", 0),
        ("gru", "self-pretrained", 0),
    ]
    assert first[1].changes == TINY | {"pretrain.steps": 2}
    assert [step for step, _ in first[0].curve] == [1, 2]
    assert reproduce.main(["run", "tiny", *folders]) == 0
    assert "| `tiny` | `gru`, self-pretrained | " in capsys.readouterr().out
    rows = ledger.kept("tiny", tmp_path / "results")
    assert len(rows) == 4 and {row.key for row in rows} >= {row.key for row in first}
    monkeypatch.setattr(ledger, "trained", None)  # nothing is left to be trained
    assert reproduce.main(["run", "tiny", *folders]) == 0
    (line,) = [
        line
        for line in ledger.table({"tiny": entry}, tmp_path / "results").splitlines()
        if "from scratch" in line
    ]
    scores = sorted(row.last for row in rows if row.variant == "from scratch")
    assert f"{np.median(scores):.4f} ({scores[0]:.4f}-{scores[1]:.4f})" in line
    assert "[0.9000](https://example.org)" in line


def a_row(seed):
    texts = dict.fromkeys(("machine", "revision", "data"), "x")
    texts["config"] = ENTRIES["smnist"].config
    scores = dict(step=1, last=0.5, best_step=None, best=None, seconds=1.0)
    kinds = dict(versions={}, changes={}, curve=[])
    return ledger.Row("lstm", "", seed, **scores, **texts, **kinds)


def test_rows_that_another_process_keeps_meanwhile_stay(tmp_path, monkeypatch):
    def trained(entry, layer, variant, seed, workdir):
        if seed == 0:  # while it trains, the other one ends
            ledger.run("smnist", [1], ["lstm"], tmp_path, tmp_path)
        return a_row(seed)

    monkeypatch.setattr(ledger, "_row", trained)
    rows = ledger.run("smnist", [0], ["lstm"], tmp_path, tmp_path)
    assert [row.seed for row in rows] == [0, 1]


def test_a_row_of_what_the_entry_was_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_row", lambda *arguments: a_row(arguments[3]))
    ledger.run("smnist", [0], ["lstm"], tmp_path, tmp_path)
    entry = ENTRIES["smnist"]
    changed = entry._replace(overrides={"train.steps": 7})
    other = entry._replace(config="pixels:smnist")
    shown = [ledger.table({"smnist": x}, tmp_path) for x in (entry, changed, other)]
    assert ["0.5000" in table for table in shown] == [True, False, False]


def test_what_is_not_run_is_visibly_empty(tmp_path):
    lines = ledger.table(results=tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == sum(len(ledger.runs_of(entry)) for entry in ENTRIES.values())
    assert all("not run yet" in line for line in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "NAME must be one of smnist, "),
        (["run", "smnist", "--layers=gru"], "--layers must be of s5, s4d, lstm for"),
        (["run", "smnist", "--seeds=a"], "--seeds must be whole numbers"),
        (["table", "--page=missing.md"], "missing.md"),
    ],
)
def test_what_cannot_be_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as ending:
        reproduce.main(arguments)
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_file_of_rows_is_named(tmp_path):
    (tmp_path / "smnist.json").write_text(json.dumps([{"layer": "s5"}]))
    with pytest.raises(ValueError, match=r"smnist\.json must have rows of the ledger"):
        ledger.kept("smnist", tmp_path)
