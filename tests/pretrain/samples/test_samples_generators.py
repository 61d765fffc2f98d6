"""Generators for named purposes: the same on every platform and version, different for every purpose."""

from trichord.samples.generators import numpy_generator


def test_draws_are_fixed_by_the_parts_alone():
    assert numpy_generator(7, "augment", "image", 3).integers(0, 1000, 4).tolist() == [244, 735, 362, 16]
    numpy_generator(1)  # another one in between changes nothing
    assert numpy_generator(7, "augment").random() == numpy_generator(7, "augment").random()


def test_parts_are_told_apart_by_kind_and_place():
    firsts = {numpy_generator(*parts).random() for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("1\x1f2",)]}
    assert len(firsts) == 6
