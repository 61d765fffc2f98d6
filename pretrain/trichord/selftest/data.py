"""The proof: one mixture, read undisturbed, and read again with stops, each time on other hardware."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trichord.batches.loader import LoaderState
from trichord.core.seed import derive_seed
from trichord.selftest.mixture import Mixture, build_mixture
from trichord.selftest.stretches import Seen, Shape, run_stretch
from trichord.shards.index import index_shards
from trichord.shards.sources import expand_shards

WORLD_SIZES = (1, 2, 3, 4, 6, 8)
MAX_WORKERS = 3


def prove(
    num_samples: int = 100_000,
    stops: int = 25,
    seed: int = 0,
    on_stretch: Callable[[int, str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Read a 3-source mixture (one source for two epochs, about 1 % bad) undisturbed, and again with `stops` stops.

    After each stop the job goes on with another number of ranks (1, 2, 3, 4, 6, 8), of workers (0 to 3) and of dealing
    ranks, from a state that went through JSON; steps taken after that state are thrown away.

    Returns:
        JSON types: counts, the stops and what each went on with, and `faults`: what was not as it must be, in words.
    """
    with tempfile.TemporaryDirectory(prefix="trichord-selftest-") as own:
        return _Proof(Path(folder or own), num_samples, stops, seed, on_stretch or (lambda number, what: None)).run()


class _Proof:
    def __init__(self, folder: Path, num_samples: int, stops: int, seed: int, say: Callable[[int, str], None]) -> None:
        self._folder, self._num_samples, self._stops, self._seed, self._say = folder, num_samples, stops, seed, say
        self._rng = random.Random(derive_seed(seed, "selftest", "stops"))
        self._faults: list[str] = []

    def run(self) -> dict[str, Any]:
        begun = time.monotonic()
        mixture = build_mixture(self._folder, self._num_samples, self._seed)
        for source in mixture.shards.sources:
            index_shards(expand_shards(source), 1)
        built = time.monotonic()
        self._say(0, "undisturbed, 1 rank, 2 workers")
        end, seen = run_stretch(mixture, self._seed, Shape(num_workers=2), None, None)
        undisturbed = time.monotonic()
        self._judge(mixture, seen, "undisturbed")
        legs, stopped_end, stopped_seen = self._run_with_stops(mixture, end.step)
        self._judge(mixture, stopped_seen, "with stops")
        self._compare(end, stopped_end)
        return {
            "samples": mixture.num_samples,
            "good_draws": mixture.num_good_draws,
            "bad_draws": mixture.num_bad_draws,
            "steps": end.step,
            "stops": len(legs) - 1,
            "stretches": legs,
            "digest": end.digest(),
            "digest_with_stops": stopped_end.digest(),
            "quarantine_digest": end.quarantine_digest(),
            "quarantine_digest_with_stops": stopped_end.quarantine_digest(),
            "faults": self._faults,
            "seconds": {
                "build": round(built - begun, 1),
                "undisturbed": round(undisturbed - built, 1),
                "with_stops": round(time.monotonic() - undisturbed, 1),
            },
        }

    def _run_with_stops(self, mixture: Mixture, steps: int) -> tuple[list[dict[str, Any]], LoaderState, Seen]:
        places = sorted(self._rng.sample(range(1, steps), min(self._stops, steps - 1)))
        state, seen, legs = None, Seen(), []
        for number, (first, last) in enumerate(zip([0, *places], [*places, steps])):
            shape = self._shape(number)
            wasted = self._rng.choice((0, 0, 1, 3)) if last < steps else 0
            leg = {"steps": [first, last], **vars(shape), "wasted": wasted}
            self._say(number + 1, f"steps {first} to {last}: {_described(shape)}")
            state, found = run_stretch(mixture, self._seed, shape, state, last - first, wasted)
            seen.add(found)
            legs.append(leg)
        assert state is not None
        return legs, state, seen

    def _shape(self, number: int) -> Shape:
        """Every world size and number of workers in turn, so that each is met; the rest by chance."""
        world_size = WORLD_SIZES[number % len(WORLD_SIZES)]
        workers = (number // 2) % (MAX_WORKERS + 1)
        deals = [ranks for ranks in (1, 2, 3, 4) if world_size % ranks == 0]
        return Shape(world_size, workers, self._rng.choice(deals), workers > 0 or self._rng.random() < 0.3)

    def _judge(self, mixture: Mixture, seen: Seen, what: str) -> None:
        """Every good sample once per epoch; no bad one; every bad one in the quarantine once per epoch."""
        refs, counts = np.unique(seen.all_refs(), axis=0, return_counts=True)
        wanted = [
            np.stack([np.full(len(good), source), np.full(len(good), epoch), good], axis=1)
            for source, (good, epochs) in enumerate(zip(mixture.good, mixture.epochs))
            for epoch in range(epochs)
        ]
        if not np.array_equal(refs, np.concatenate(wanted)):
            missing = {tuple(ref) for ref in np.concatenate(wanted).tolist()} - {tuple(ref) for ref in refs.tolist()}
            others = {tuple(ref) for ref in refs.tolist()} - {tuple(ref) for ref in np.concatenate(wanted).tolist()}
            named = f"{sorted(missing)[:3]} and {sorted(others)[:3]}"
            self._faults.append(f"{what}: {len(missing)} good samples never came, {len(others)} others did: {named}")
        if (counts != 1).any():
            self._faults.append(f"{what}: {int((counts != 1).sum())} samples came more than once in an epoch")
        planted = Counter(
            {
                (name, f"{sample:09d}"): epochs
                for bad, epochs, name in zip(mixture.bad, mixture.epochs, (s.name for s in mixture.shards.sources))
                for sample in bad.tolist()
            }
        )
        found: Counter[tuple[str, str]] = Counter()
        for (shard, key), times in seen.bad.items():
            found[Path(shard).name.rsplit("-", 1)[0], key] += times
        if found != planted:
            wrong = sorted((found - planted) + (planted - found))[:3]
            self._faults.append(f"{what}: quarantined {found.total()} times, planted {planted.total()}; wrong: {wrong}")

    def _compare(self, end: LoaderState, other: LoaderState) -> None:
        if other.step != end.step or not other.exhausted:
            self._faults.append(f"with stops: not used up at step {other.step}, as it was undisturbed at {end.step}")
        for name in ("digest", "quarantine_digest"):
            then, now = getattr(end, name)(), getattr(other, name)()
            if then != now:
                self._faults.append(f"{name} undisturbed {then}, with stops {now}")


def _described(shape: Shape) -> str:
    where = "processes" if shape.processes else "one process"
    return f"{shape.world_size} ranks in {where}, {shape.num_workers} workers each, {shape.deal_ranks} ranks dealing"
