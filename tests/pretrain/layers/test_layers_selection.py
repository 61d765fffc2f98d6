"""The kernel choice of the config yields to the environment."""

from __future__ import annotations

import os

import pytest

from trichord.layers.selection import ENVIRONMENT, select_kernels


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [("auto", None, None), ("reference", None, "reference"), ("triton", "reference", "reference")],
)
def test_selection(monkeypatch, choice, before, after):
    monkeypatch.setenv(ENVIRONMENT, "to be undone")
    if before is None:
        monkeypatch.delenv(ENVIRONMENT)
    else:
        monkeypatch.setenv(ENVIRONMENT, before)
    select_kernels(choice)
    assert os.environ.get(ENVIRONMENT) == after


def test_the_name_is_the_one_the_kernels_read(monkeypatch):
    from trichord_kernels.dispatch import requested_backend

    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert requested_backend() == "reference"


def test_a_word_that_is_no_choice_is_told_before_a_run_folder_is_made(monkeypatch):
    from trichord.core.errors import ConfigError
    from trichord.layers.selection import select_kernels

    monkeypatch.setenv("TRICHORD_KERNELS", "fast")
    with pytest.raises(ConfigError, match="auto, triton, reference, got 'fast'"):
        select_kernels("auto")
