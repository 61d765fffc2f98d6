"""`data.json` of a run: how often each shard was drawn from, and what filters left out, up to the last checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trichord.core.log import get_logger
from trichord.core.status import write_atomically

_log = get_logger(__name__)
_COUNTS = ("samples_per_source", "samples_per_shard", "filtered")


class DataRecord:
    """Counts of one rank; those of all ranks together are written by `write`."""

    def __init__(self, path: Path, start_step: int = 0) -> None:
        """start_step: steps of the run that were taken before. What the file says goes on only if it is of that step;
        else it counts from here on, and says so."""
        self.path = path
        self._since = start_step
        self._before: dict[str, Counter[str]] = {name: Counter() for name in _COUNTS}
        self._own: dict[str, Counter[str]] = {name: Counter() for name in _COUNTS}
        if start_step:
            self._go_on(start_step)

    def add(self, **counts: Mapping[str, int]) -> None:
        """Counts of one step, by the names in the file."""
        for name, found in counts.items():
            self._own[name].update(found)

    def own(self) -> dict[str, dict[str, int]]:
        """What this rank has counted, as plain types."""
        return {name: dict(counter) for name, counter in self._own.items()}

    def write(self, step: int, of_all_ranks: Iterable[Mapping[str, Mapping[str, int]]]) -> set[str]:
        """Write the sums over ranks, with what was counted before `start_step`. For rank 0.

        Returns:
            Sources that have given no sample.
        """
        totals = {name: Counter(counter) for name, counter in self._before.items()}
        for counts in of_all_ranks:
            for name, counter in counts.items():
                totals[name].update(counter)
        fields: dict[str, Any] = {"step": step, "since_step": self._since}
        fields |= {name: dict(sorted(counter.items())) for name, counter in totals.items()}
        write_atomically(self.path, json.dumps(fields, indent=1) + "\n")
        return {name for name, count in totals["samples_per_source"].items() if not count}

    def _go_on(self, start_step: int) -> None:
        try:
            fields = json.loads(self.path.read_text(encoding="utf-8"))
            if fields["step"] == start_step:
                self._before = {name: Counter(fields[name]) for name in _COUNTS}
                self._since = fields["since_step"]
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _log.info("%s is not of step %d: samples per shard are counted from there on", self.path.name, start_step)
