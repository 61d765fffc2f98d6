"""Targets: values of each kind, absent ones, wrong ones."""

import numpy as np
import pytest

from trichord.samples.config import TargetConfig
from trichord.samples.targets import count_columns, read_targets
from trichord.shards.quarantine import BadSample

TARGETS = {
    "species": TargetConfig(key="bird.species", names=("heron", "owl")),
    "tags": TargetConfig(key="tags", kind="classes", num_classes=3),
    "age": TargetConfig(key="age", kind="number"),
}


def test_all_kinds_side_by_side():
    values, present = read_targets({"bird": {"species": "owl"}, "tags": [0, 2], "age": 2.5}, TARGETS)
    np.testing.assert_array_equal(values, np.array([1, 1, 0, 1, 2.5], dtype=np.float32))
    assert present.tolist() == [True, True, True]
    assert count_columns(TARGETS) == 5


def test_absent_ones_are_marked():
    values, present = read_targets({"tags": [], "age": None}, TARGETS)
    assert values.tolist() == [0, 0, 0, 0, 0]
    assert present.tolist() == [False, True, False], "an empty list says: none of the classes"


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"bird": {"species": "stork"}}, "'stork' is none of its 2 names"),
        ({"bird": {"species": 1}}, "none of its 2 names"),
        ({"tags": [3]}, "class number from 0 to 2, got 3"),
        ({"tags": [-1]}, "class number"),
        ({"tags": [True]}, "class number"),
        ({"tags": 1}, "must be a list of classes, got 1"),
        ({"age": "7"}, "finite float32 number, got '7'"),
        ({"age": float("nan")}, "finite"),
        ({"age": float("inf")}, "finite"),
        ({"age": 10**400}, "finite"),
        ({"age": True}, "finite"),
        ({"age": {}}, "got dict"),
    ],
)
def test_wrong_values_are_named(meta, words):
    with pytest.raises(BadSample, match=words):
        read_targets(meta, TARGETS)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "class"}, {"kind": "classes", "names": ("a",), "num_classes": 1}, {"kind": "number", "num_classes": 2}],
)
def test_classes_must_be_counted_once(fields):
    with pytest.raises(ValueError, match="names"):
        TargetConfig(key="x", **fields)
