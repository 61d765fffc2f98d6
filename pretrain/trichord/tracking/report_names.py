"""Which runs a report is about, and what each of them is called in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from trichord.tracking.record import RunRecord

_SEPARATORS = "-_/. "
_WORTH = 8  # characters that all names share: fewer are not worth an explanation


def distinct_folders(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Each folder once, by where it lies, and what to say of those that were given again."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(Path(folder).resolve(), Path(folder))
    times = Counter(Path(folder).resolve() for folder in folders)
    again = [(folder, times[at]) for at, folder in found.items() if times[at] > 1]
    notes = [f"{folder} was given {count} times, and is shown once" for folder, count in again]
    return list(found.values()), notes


def tell_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, called by their folders where they share a name."""
    taken = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if taken[run.name] > 1 else run for run in runs]


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without what all of them begin and end with, for legends; and how a whole name is made: `sweep-…-base`.

    The second is empty where nothing was cut.
    """
    start = _up_to_separator(_common_start(names))
    end = _up_to_separator(_common_start([name[len(start) :][::-1] for name in names]))[::-1]
    shorts = [name[len(start) : len(name) - len(end)] for name in names]
    if len(names) < 2 or len(start) + len(end) < _WORTH or not all(shorts):
        return list(names), ""
    return shorts, f"{start}…{end}"


def _common_start(names: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))


def _up_to_separator(text: str) -> str:
    return text[: max(text.rfind(mark) for mark in _SEPARATORS) + 1]
