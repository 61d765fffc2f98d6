"""The command line: verbs by group, one file each; nobody imports it."""

from trichord.cli import runs, building, data, inspection, proof, configs, bench  # noqa: F401, I001 - each adds its verbs, in the order of `--help`
from trichord.cli.app import main

__all__ = ["main"]
