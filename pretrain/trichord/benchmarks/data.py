"""`trichord bench data`: the loader against plain webdataset, in alternated rounds of one run.

Every measurement is a fresh process; a round takes each pipeline once, and figures are medians over rounds. What a
loader costs is its CPU time less that of the bare loop with the same decoders.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trichord.benchmarks.data_corpus import Corpus, make_corpus
from trichord.benchmarks.data_measure import Measurement, Request, measure

NUM_SAMPLES = 512
_WARM_BATCHES = 8
_EPOCHS = 5
_BARE_OF = {"webdataset": "bare docs", "trichord": "bare trichord"}
_LOADERS = (
    "webdataset", "trichord", "trichord, mel on device", "trichord, mel on device, wav", "webdataset, raw",
    "trichord, raw",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A bar: what is compared, what came out, what is asked for (`at_most`: a ceiling)."""

    what: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def bench_data(
    folder: Path,
    workers: Sequence[int] = (1, 2),
    rounds: int = 5,
    batches: int = 16,
    num_samples: int = NUM_SAMPLES,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Everything that was measured, as JSON types: `corpus`, `rows` of the table, `targets`, `memory`.

    Args:
        folder: where the shards are made, or lie from an earlier run. batches: of 32, timed per measurement.

    Raises:
        DataError: the corpus cannot be made, or a pipeline failed.
    """
    corpus = make_corpus(folder, num_samples)
    runs = [(name, 0) for name in _BARE_OF.values()] + [(name, n) for n in workers for name in _LOADERS]
    taken: dict[tuple[str, int], list[Measurement]] = {run: [] for run in runs}
    for number in range(rounds):
        for name, count in runs if number % 2 == 0 else reversed(runs):
            on_progress(f"round {number + 1} of {rounds}: {name}, {count} workers")
            taken[name, count].append(measure(_request(corpus, name, count, batches)))
    memory = []
    for name in ("webdataset", "trichord"):
        on_progress(f"memory over {_EPOCHS} epochs: {name}")
        pss = measure(_request(corpus, name, 1, 0, _EPOCHS)).pss_mib
        memory.append({"pipeline": name, "peak PSS MiB": max(pss), "growth MiB": pss[-1] - pss[0], "epochs": pss})
    rows = [_row(name, count, taken, workers) for name, count in runs]
    targets = [asdict(target) | {"met": target.met} for target in _targets(rows, workers)]
    return {"corpus": asdict(corpus), "rounds": rounds, "rows": rows, "targets": targets, "memory": memory}


def _request(corpus: Corpus, name: str, workers: int, batches: int, epochs: int = 0) -> Request:
    return Request(name, workers, _WARM_BATCHES if workers else 2, batches, epochs, asdict(corpus))


def _row(
    name: str, workers: int, taken: dict[tuple[str, int], list[Measurement]], all_workers: Sequence[int]
) -> dict[str, Any]:
    def median(key: tuple[str, int], field: str) -> float:
        return statistics.median(getattr(measurement, field) for measurement in taken[key])

    raw, baseline = name.endswith("raw"), "webdataset, raw" if name.endswith("raw") else "webdataset"
    against = baseline, workers or min(all_workers)
    wall, cpu = median((name, workers), "wall_us"), median((name, workers), "cpu_us")
    row: dict[str, Any] = {
        "pipeline": name,
        "workers": workers,
        "samples/s": 1e6 / wall,
        "wall us": wall,
        "CPU us": cpu,
        "x wall": median(against, "wall_us") / wall,
        "x CPU": median(against, "cpu_us") / cpu,
    }
    if name in _BARE_OF:  # the same work, so that the rest is the loader
        decode = median((_BARE_OF[name], 0), "cpu_us")
        row |= {"decode us": decode, "loader us": cpu - decode}
    elif raw:
        row |= {"decode us": 0.0, "loader us": cpu}
    if workers:
        row["first batch s"] = median((name, workers), "first_batch_s")
    row["spread %"] = 100 * _spread([measurement.wall_us for measurement in taken[name, workers]])
    return row


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def _targets(rows: Sequence[dict[str, Any]], workers: Sequence[int]) -> list[Target]:
    """What is asked of the loader; every ratio is against plain webdataset of the same run."""
    of = {(row["pipeline"], row["workers"]): row for row in rows}
    targets = []
    for count in workers:
        behind = f", {count} worker{'s' if count > 1 else ''}"
        targets.append(
            Target("same work, x wall" + behind, of["trichord", count]["x wall"], 1.5 if count == 1 else 1.7)
        )
        as_shipped = of["trichord, mel on device", count]["x wall"], of["trichord, mel on device, wav", count]["x wall"]
        targets.append(Target("as shipped, FLAC, x wall" + behind, as_shipped[0], 1.9))
        targets.append(Target("as shipped, 16-bit WAV, x wall" + behind, as_shipped[1], 3.0))
        if count == 1:  # the bare loop is one process; a worker's time is all that its wall time shows
            share = of["trichord", 1]["samples/s"] / of["bare trichord", 0]["samples/s"]
            targets.append(Target("share of the bare loop's speed, wall" + behind, share, 0.95))
        share = of["bare trichord", 0]["CPU us"] / of["trichord", count]["CPU us"]
        targets.append(Target("share of the bare loop's speed, CPU" + behind, share, 0.95))
        cost = of["trichord, raw", count]["CPU us"] / of["webdataset, raw", count]["CPU us"]
        targets.append(Target("loader's own cost over webdataset's, CPU" + behind, cost, 1 / 3, at_most=True))
        first = of["trichord", count]["first batch s"]
        targets.append(Target("first batch, s" + behind, first, 1.0, at_most=True))
    return targets
