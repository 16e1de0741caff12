"""data.json: what is written is read, and what cannot be is refused by file and key."""

import dataclasses
import json

import numpy as np
import pytest

from train import data, records
from train.data import described
from train.data.spec import Spec

SPEC = Spec(
    encoder="scalar",
    length=12,
    outputs=3,
    loss="classification",
    channels=2,
    padded=True,
    classes=("ant", "bee", "cow"),
    mean=(0.5, -2.0),
    std=(1.0, 0.25),
)


class Counted(list):
    """Examples that are only counted."""


def dataset(spec=SPEC):
    return data.Dataset(spec, {"train": Counted(range(30)), "test": Counted(range(4))})


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SPEC.but(size=(np.int64(8), 8), mean=(np.float32(0.5), 1.0), outputs=3),
        data.load(dict(name="digits", target="next")).spec,
        data.load(dict(name="passkey", length=200)).spec,
        data.load(dict(name="moving_digits")).spec,
        Spec("grid", 6, 2, "classification", size=(2, 3)),
    ],
    ids=["own", "numpy", "digits", "passkey", "video", "grid"],
)
def test_a_spec_comes_back(tmp_path, spec):
    records.write_data(tmp_path, dataset(spec), said={"scale": [1, 2.5]})
    assert records.read_data(tmp_path) == spec
    assert records.read_said(tmp_path) == {"scale": [1, 2.5]}
    found = json.loads((tmp_path / records.DATA).read_text())
    assert {*found["spec"]} == {field.name for field in dataclasses.fields(Spec)}
    assert found["examples"] == {"train": 30, "test": 4}


def test_there_may_be_none(tmp_path):
    assert records.read_data(tmp_path) is None and records.read_said(tmp_path) == {}
    records.write_data(tmp_path, dataset())
    assert records.read_said(tmp_path) == {}


def test_a_key_that_an_older_file_lacks_has_its_default(tmp_path):
    records.write_data(tmp_path, dataset())
    found = json.loads((tmp_path / records.DATA).read_text())
    for key in ("classes", "mean", "std", "symbols"):
        del found["spec"][key]
    (tmp_path / records.DATA).write_text(json.dumps(found))
    assert records.read_data(tmp_path) == SPEC.but(classes=(), mean=(), std=())


HARM = {
    "cut off": ("{", "line 1 must be JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "nothing": ({}, "spec is missing"),
    "no counts": ({"spec": {}}, "examples is missing"),
    "another key": ({"code": "x"}, "code is no known key"),
    "a spec of text": ({"spec": "x"}, "spec must be an object, got 'x'"),
    "a list said": ({"said": [1]}, r"said must be an object, got \[1\]"),
    "another split": ({"examples": {"tests": 1}}, "examples.tests is no known key"),
    "half an example": ({"examples": {"test": 0.5}}, "examples.test must be a whole"),
    "fewer than none": ({"examples": {"test": -1}}, "examples.test must be a whole"),
}
SPECS = {
    "another key": (dict(code="x"), r"spec\.code is no known key"),
    "no encoder": (dict(encoder=None), r"spec\.encoder must be a text, got None"),
    "an encoder": (dict(encoder="os.system"), r"spec\.encoder must be one of scalar"),
    "a loss": (dict(loss="x"), r"spec\.loss must be one of classification"),
    "a true length": (dict(length=True), r"spec\.length must be a whole number, got T"),
    "a long length": (dict(length=2**40), r"spec\.length must lie between 1 and 21474"),
    "no channel": (dict(channels=0), r"spec\.channels must lie between 1 and"),
    "a flag": (dict(padded=1), r"spec\.padded must be true or false, got 1"),
    "a size": (dict(size=[8, "8"]), r"spec\.size\[1\] must be a whole number, got '8'"),
    "a size of 0": (dict(size=[0, 8]), r"spec\.size\[0\] must lie between 1 and"),
    "names of text": (dict(classes="abc"), r"spec\.classes must be a list, got 'abc'"),
    "two names": (
        dict(classes=["a", "b"]),
        r"spec\.classes must have 3 items, as many",
    ),
    "a name twice": (dict(classes=["a", "b", "a"]), r"spec\.classes must name every"),
    "a number": (dict(classes=["a", "b", 3]), r"spec\.classes\[2\] must be a text"),
    "one mean": (
        dict(mean=[0.5]),
        r"spec\.mean must have 2 items, as many as spec\.ch",
    ),
    "no mean": (dict(mean=[]), r"spec\.mean and spec\.std must have as many items"),
    "a NaN": (dict(mean=[float("nan"), 1]), r"spec\.mean\[0\] must be finite and fit"),
    "infinite": (dict(std=[1, float("inf")]), r"spec\.std\[1\] must be finite"),
    "a huge number": (dict(mean=[10**400, 1]), r"spec\.mean\[0\] must be a number"),
    "a std of 0": (dict(std=[1.0, 0.0]), r"spec\.std must be above 0"),
    "no vocabulary": (dict(encoder="token"), r"spec\.vocab_size must be 1 or more"),
    "symbols": (dict(symbols=["a"]), r"spec\.symbols must have 0 items"),
}


@pytest.mark.parametrize(("change", "message"), HARM.values(), ids=HARM)
def test_a_file_of_another_kind(tmp_path, change, message):
    text = change
    if change == {} or change == {"spec": {}}:
        text = json.dumps(change)
    elif isinstance(change, dict):
        text = json.dumps(described.described(dataset()) | change)
    (tmp_path / records.DATA).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        records.read_data(tmp_path)
    said = str(raised.value)
    assert said.startswith(str(tmp_path / records.DATA)) and "\n" not in said


@pytest.mark.parametrize(("change", "message"), SPECS.values(), ids=SPECS)
def test_a_spec_that_cannot_be(tmp_path, change, message):
    found = described.described(dataset())
    found["spec"] |= change
    (tmp_path / records.DATA).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as raised:
        records.read_data(tmp_path)
    said = str(raised.value)
    assert said.startswith(str(tmp_path / records.DATA)) and "\n" not in said


def test_what_of_data_is_another():
    assert described.differing(SPEC, SPEC) == ""
    lists = SPEC.but(classes=[*SPEC.classes], length=np.int32(12))
    assert described.differing(SPEC, lists) == ""
    near = SPEC.but(mean=(0.5 * (1 + 1e-6), -2.0))
    assert described.differing(SPEC, near) == ""
    far = SPEC.but(mean=(0.51, -2.0), channels=3)
    assert described.differing(SPEC, far).startswith("channels was 2, is 3; mean was [")
