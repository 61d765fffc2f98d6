"""Fixtures of the tracking tests."""

import logging

import pytest


@pytest.fixture
def log_lines(caplog):
    """A function that gives all `trichord` log messages so far, whatever an earlier test did to the logger."""
    root = logging.getLogger("trichord")
    before = (root.level, root.propagate, list(root.handlers))
    root.handlers, root.propagate = [caplog.handler], False
    root.setLevel(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records]
    root.handlers, root.propagate = before[2], before[1]
    root.setLevel(before[0])
