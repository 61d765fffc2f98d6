"""Each op's page shows its signature as it is, defaults included; its twin has the same one."""

import inspect
import re
from pathlib import Path

import pytest

import trichord_kernels
from trichord_kernels import reference

PAGES = Path(__file__).parents[2] / "docs" / "kernels"
OPS = [name for name in trichord_kernels.__all__ if name != "num_mel_frames"]


def shown(function) -> str:
    """`name(a, b=None, *, c=1)`: what a page prints, white space aside."""
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        has_default = parameter.default is not parameter.empty
        words.append(f"{parameter.name}={parameter.default!r}" if has_default else parameter.name)
    return f"{function.__name__}({', '.join(words)})".replace("'", '"')


@pytest.mark.parametrize("name", OPS)
def test_the_page_shows_the_signature(name):
    page = re.sub(r"\s+", " ", (PAGES / f"{name}.md").read_text())
    assert shown(getattr(trichord_kernels, name)) in page


@pytest.mark.parametrize("name", [name for name in OPS if name != "log_mel"])
def test_the_twin_has_the_same_signature(name):
    assert shown(getattr(reference, name)) == shown(getattr(trichord_kernels, name))
