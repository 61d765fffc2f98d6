"""Building shards: the rows are listed once, shards of even size are cut from the list and written side by side, and
appear under their names when all of them are whole.

The bytes depend on the rows, their order and the sizes asked for, never on the number of workers or on interruptions.
Until it is done, a build lives in `OUT/.PREFIX.partial`: the list of rows, the plan, the shards that are finished.
"""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trichord.building.balance import cut, shuffled
from trichord.building.partial import PLAN_FILE, after_bad_source, partial_folder, refuse_taken
from trichord.building.places import refuse_remote_out
from trichord.building.processes import run_tasks
from trichord.building.rows import BadRow, BuildRow, located
from trichord.building.spool import SpoolWriter, write_order
from trichord.building.writer import ShardDone, ShardStopped, ShardTask, make_shard
from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.core.seed import derive_seed
from trichord.core.status import write_atomically
from trichord.shards.config import FieldsConfig
from trichord.shards.index import index_shards
from trichord.shards.quarantine import BadSample

__all__ = ["BuildResult", "BuildRow", "Layout", "build", "build_shards"]

_log = get_logger(__name__)
DEFAULT_SAMPLES_PER_SHARD = 10_000
DEFAULT_MAX_BYTES = 2**30
_MOVES_FILE = "moves.json"
_LISTED_PER_LINE = 100_000
_MAX_NAMED = 3


@dataclass(frozen=True)
class Layout:
    """How rows become shards.

    samples_per_shard, max_bytes: no shard holds more (a single larger sample aside). even: shards of a group hold about
    as much; else each is filled before the next begins. shuffle: seed of an order over all rows; None keeps theirs.
    """

    prefix: str = "shard"
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    max_bytes: int = DEFAULT_MAX_BYTES
    shuffle: int | None = None
    even: bool = True

    def __post_init__(self):
        if self.samples_per_shard < 1 or self.max_bytes < 1:
            raise ConfigError(f"a shard holds at least one sample and one byte, got {self}")
        if not self.prefix or "/" in self.prefix or self.prefix.startswith("."):
            raise ConfigError(f"expected a prefix such as 'train', got {self.prefix!r}")


@dataclass(frozen=True)
class BuildResult:
    """shards: paths by group, in order. samples: in them. left_out: (origin, reason) of what is bad."""

    shards: dict[str, list[str]]
    samples: int
    left_out: list[tuple[str, str]]

    @property
    def paths(self) -> list[str]:
        return [path for paths in self.shards.values() for path in paths]


def build_shards(
    rows: Iterable[BuildRow | BadRow],
    out_dir: str | Path,
    prefix: str = "shard",
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    max_bytes: int = DEFAULT_MAX_BYTES,
    fields: FieldsConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 1,
    shuffle: int | None = None,
    even: bool = True,
    check_contents: bool = False,
) -> list[str]:
    """Write rows that a program makes to `out_dir/PREFIX-000000.tar`, ... with their sidecars; returns the paths.

    The same rows give the same bytes; what is bad raises. See `build`, which this calls without a way to go on later.
    """
    layout = Layout(prefix, samples_per_shard, max_bytes, shuffle, even)
    return build(
        rows,
        out_dir,
        layout,
        fields=fields,
        on_progress=on_progress,
        workers=workers,
        check_contents=check_contents,
    ).paths


def build(
    rows: Iterable[BuildRow | BadRow],
    out_dir: str | Path,
    layout: Layout,
    *,
    identity: dict[str, Any] | None = None,
    fields: FieldsConfig | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    check_contents: bool = True,
    workers: int = 1,
    ray: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildResult:
    """Write rows to `OUT/[GROUP/]PREFIX-000000.tar`, ... with sidecars. Shards appear when all of them are whole.

    Args:
        rows: read once, in one process. identity: what the rows come from, as JSON; with it, a build that was cut off
            goes on from its list and its finished shards (`rows` is not read again), without it, it starts anew.
        on_bad: a BadRow, a file that is not there, a header that cannot be read: stop, or leave it out and count it.
        check_contents: look at the header of every image and clip, and whether texts are UTF-8.
        workers, ray: see `run_tasks`. on_progress: called with (samples in finished shards, samples in all).

    Raises:
        ConfigError: `out_dir` is a URL, shards of that prefix are there already, or the half-done build there is
            another one or is at work.
        DataError: there is no row, a row is bad, or something cannot be read or written.
    """
    refuse_remote_out(out_dir)
    out_dir = Path(out_dir)
    fields = fields or FieldsConfig()
    checked = fields.model_dump() if check_contents else None
    of = {"layout": asdict(layout), "source": identity, "checked": checked}
    with partial_folder(out_dir, layout.prefix, of, keep=identity is not None) as folder:
        if not (folder / _MOVES_FILE).exists():
            if not (folder / PLAN_FILE).exists():
                _plan(rows, folder, out_dir, layout, of, on_bad)
            plan = json.loads((folder / PLAN_FILE).read_text())
            for group in {group for group, _, _ in plan["shards"]}:
                refuse_taken(out_dir / group, layout.prefix)
            tasks = _tasks(folder, plan, check_contents, on_bad, fields)
            done = _write_all(tasks, workers, ray, on_progress)
            if isinstance(done, ShardStopped):
                listed_again = done.by_source and identity is not None
                raise DataError(done.reason + (after_bad_source(folder) if listed_again else ""))
            _note_moves(folder, layout.prefix, plan, done)
        result = _publish(folder, out_dir)
        index_shards(result.paths, workers, fields=fields)  # fresh by now; one look each
        _report(result, out_dir, layout.prefix)
    return result


def _plan(
    rows: Iterable[BuildRow | BadRow], folder: Path, out_dir: Path, layout: Layout, of: dict[str, Any], on_bad: str
) -> None:
    """List the rows, order them, cut them into shards; `plan.json` is written last."""
    import numpy as np

    spool = SpoolWriter(folder)
    left_out = _list_rows(rows, spool, on_bad, lambda group: refuse_taken(out_dir / group, layout.prefix))
    spool.close()
    if not len(spool):
        raise DataError(
            "there is no sample to write: " + (_examples(left_out) if left_out else "the table or folder is empty")
        )
    places, sizes = np.frombuffer(spool.places, np.uint64), np.frombuffer(spool.sizes, np.uint64)
    group_of = np.frombuffer(spool.group_of, np.uint32)
    order, shards, first = array("Q"), [], 0
    for group in sorted(spool.groups):
        members = np.flatnonzero(group_of == spool.groups[group])
        if layout.shuffle is not None:
            members = members[shuffled(len(members), derive_seed(layout.shuffle, "build", group))]
        bounds = cut(sizes[members], layout.samples_per_shard, layout.max_bytes, layout.even)
        shards += [[group, first + start, first + stop] for start, stop in itertools.pairwise(bounds)]
        order.frombytes(places[members].tobytes())
        first += len(members)
    write_order(folder, order)
    plan = {"of": of, "shards": shards, "left_out": left_out}
    write_atomically(folder / PLAN_FILE, json.dumps(plan))


def _list_rows(
    rows: Iterable[BuildRow | BadRow], spool: SpoolWriter, on_bad: str, on_new_group: Callable[[str], None]
) -> list[tuple[str, str]]:
    left_out: list[tuple[str, str]] = []
    previous: dict[str, str] = {}
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise BadSample(row.reason)
            if row.group not in previous:
                on_new_group(row.group)
            elif previous[row.group] == row.key:
                raise BadSample(f"two samples in a row have the key {row.key!r} and would read back as one; rename one")
            spool.append(located(row))
            previous[row.group] = row.key
        except BadSample as error:
            place = row.origin if isinstance(row, BadRow) else row.place
            if on_bad == "stop":
                raise DataError(f"{place}: {error}") from error
            left_out.append((place, str(error)))
        if (len(spool) + len(left_out)) % _LISTED_PER_LINE == 0:
            _log.info("%d samples listed", len(spool))
    return left_out


def _tasks(folder: Path, plan: dict[str, Any], check: bool, on_bad: str, fields: FieldsConfig) -> list[ShardTask]:
    options = (check, on_bad, fields.model_dump())
    return [
        ShardTask(str(folder.absolute()), number, first, last, *options)
        for number, (_, first, last) in enumerate(plan["shards"])
    ]


def _write_all(
    tasks: list[ShardTask], workers: int, ray: bool, on_progress: Callable[[int, int], None] | None
) -> list[ShardDone] | ShardStopped:
    """All shards, or the first that stopped; processes started here have ended by then."""
    done: dict[int, ShardDone] = {}
    written = 0
    with closing(run_tasks(make_shard, tasks, workers, ray)) as results:
        for result in results:
            if isinstance(result, ShardStopped):
                return result
            done[result.number] = result
            written += result.samples + len(result.left_out)
            if on_progress is not None:
                on_progress(written, tasks[-1].last)
    return [done[task.number] for task in tasks]


def _note_moves(folder: Path, prefix: str, plan: dict[str, Any], done: list[ShardDone]) -> None:
    """`moves.json`: which finished file gets which name. A shard of bad samples only gets none."""
    numbers: dict[str, int] = {}
    moves = []
    for shard, (group, _, _) in zip(done, plan["shards"]):
        if not shard.samples:
            continue
        number = numbers.setdefault(group, 0)
        numbers[group] += 1
        moves.append([group, f"{shard.number:06d}", f"{prefix}-{number:06d}"])
    left_out = [*plan["left_out"], *(pair for shard in done for pair in shard.left_out)]
    if not moves:
        raise DataError(f"there is no sample to write: {_examples(left_out)}")
    facts = {"moves": moves, "samples": sum(shard.samples for shard in done), "left_out": left_out}
    write_atomically(folder / _MOVES_FILE, json.dumps(facts))


def _publish(folder: Path, out_dir: Path) -> BuildResult:
    """Give the shards their names, the tars last; what a killed attempt has moved already is passed over."""
    facts = json.loads((folder / _MOVES_FILE).read_text())
    shards: dict[str, list[str]] = {}
    for ending in (".idx", ".len", ".tar"):
        for group, name, public in facts["moves"]:
            target = out_dir / group / (public + ending)
            if (folder / (name + ending)).exists():
                target.parent.mkdir(exist_ok=True)
                os.replace(folder / (name + ending), target)
            if ending == ".tar":
                shards.setdefault(group, []).append(str(target))
    return BuildResult(shards, facts["samples"], [(place, reason) for place, reason in facts["left_out"]])


def _report(result: BuildResult, out_dir: Path, prefix: str) -> None:
    if not result.left_out:
        return
    lines = (json.dumps({"origin": origin, "reason": reason}) + "\n" for origin, reason in result.left_out)
    listing = write_atomically(out_dir / f"{prefix}.left-out.jsonl", "".join(lines))
    _log.warning("%s; all of them: %s", _examples(result.left_out), listing)


def _examples(left_out: list[tuple[str, str]]) -> str:
    named = "; ".join(f"{origin}: {reason}" for origin, reason in left_out[:_MAX_NAMED])
    more = f"; and {len(left_out) - _MAX_NAMED} more" if len(left_out) > _MAX_NAMED else ""
    return f"{len(left_out)} left out as bad: {named}{more}"
