"""Reading YAML: values, lines, and what is refused."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trichord.config.yaml_text import dump_yaml, parse_yaml
from trichord.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("0x10", 16),
        ("0o17", 15),
        ("017", 17),
        ("-.inf", -math.inf),
        ("true", True),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'3e-4'", "3e-4"),
        ("~", None),
        ("", None),
        ("{a: [1, x]}", {"a": [1, "x"]}),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got = parse_yaml(f"k: {text}", "f").data["k"]
    assert got == value
    assert type(got) is type(value)


def test_keys_keep_their_lines():
    lines = parse_yaml("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - y: 3\n", "f").lines
    assert lines[("a",)] == 1
    assert lines[("b", "c")] == 3
    assert lines[("b", "d", 1)] == 6
    assert lines[("b", "d", 1, "y")] == 6


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\na: 2\n", 2, "given twice, first in line 1"),
        ("b:\n  1: x\n", 2, "expected a text as key, got '1'"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "is not allowed"),
        ("a: !secret x\n", 1, "is not allowed"),
        ("a: !!int five\n", 1, "'five' is not a valid int"),
    ],
)
def test_values_that_are_yaml_but_no_config_are_problems(text, line, words):
    problems = parse_yaml(text, "f").problems
    assert [p[0] for p in problems] == [line]
    assert words in problems[0][2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n b: 2\n", "f:2: not valid YAML"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "f:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f:2: not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: &x [*x]", "nested too deeply"),
        ("[" * 1500, "nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{n}: &{n} [{', '.join(['*' + p] * 10)}]\n" for p, n in zip("abcde", "bcdef")
        ), "aliases multiply"),
    ],
)  # fmt: skip
def test_text_that_is_no_yaml_names_file_and_line(text, words):
    with pytest.raises(ConfigError, match=r"^f") as caught:
        parse_yaml(text, "f")
    assert words in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
WORDS = st.sampled_from(
    ["3e-4", "off", "1:30", "0o17", "null", "~", "1_0", "2024-01-01", "on", "=", "<<", "a: b", "#x"]
)


@given(st.recursive(SCALARS | WORDS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | WORDS, inner)))
def test_dump_reads_back_equal(data):
    text = dump_yaml({"data": data})
    assert parse_yaml(text, "f").data == {"data": data}


@given(WORDS)
def test_dump_reads_back_equal_in_other_yaml_readers(word):
    assert yaml.safe_load(dump_yaml({"data": word})) == {"data": word}
