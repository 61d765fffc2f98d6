"""Samples that cannot be used: what is said about each, where it is written, and how many are too many."""

import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trichord.core.errors import DataError
from trichord.shards.config import ShardsConfig

_MAX_NAMED = 5
_MAX_REASONS = 2
_MAX_REASON_CHARS = 160
_MAX_READ_BYTES = 16 * 2**20
# What the words of a reason say about the config or the data, most telling first -> what to do.
_CURES = (
    (
        r"\b(samples|shards|batches)\.[a-z_.]+",
        "that key is too small for them; raise it, or leave them out by `filters` of the source, which is not bad data",
    ),
    (
        r"requires|has no|has none of|and the model takes|nothing else",
        "the samples are not what `fields` and `require` of the source and the model's towers ask for; "
        "`trichord data stats` says what they hold",
    ),
    (
        r"^target |metadata|messages",
        "their json is not what the config asks for; `trichord data lint` says where: correct it, or samples.targets",
    ),
    (
        "",
        "their bytes are damaged; fetch or build these shards again, or name what `trichord data lint --out` finds in "
        "`filters.exclude` of the source, in a new run",
    ),
)


class BadSample(Exception):  # noqa: N818  not an error of the run: the sample is left out and the run goes on
    """The content of a sample cannot be used: a pure function of its bytes, never of the storage or the time.

    Args:
        reason: what was expected and what came, the same words on every attempt.
        member: name of the tar member at fault, where it is one.
    """

    def __init__(self, reason: str, member: str | None = None):
        super().__init__(reason, member)
        self.reason = reason
        self.member = member

    def __str__(self) -> str:
        return self.reason if self.member is None else f"{self.member}: {self.reason}"


@dataclass(frozen=True)
class QuarantineRecord:
    """One line of `quarantine.jsonl`. `key` and `offset` are None where a whole shard is concerned."""

    shard: str
    key: str | None
    offset: int | None
    member: str | None
    reason: str
    source: str
    step: int | None = None


class QuarantineLog:
    """Appends records to a JSON-lines file, each flushed at once: the line must outlive a crash of the run.

    Steps that are done again after a crash leave their lines twice.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    def append(self, records: Iterable[QuarantineRecord]) -> None:
        lines = [json.dumps(asdict(record)) + "\n" for record in records]
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(lines)
            file.flush()

    def read(self, last_step: int) -> list[QuarantineRecord]:
        """Records of samples up to a step, each once, out of the last `_MAX_READ_BYTES`. None of them where the file
        cannot be read."""
        found: dict[tuple[str, str, str | None, int | None], QuarantineRecord] = {}
        for line in self._last_lines():
            try:
                record = QuarantineRecord(**json.loads(line))
            except (ValueError, TypeError):  # torn by a crash
                continue
            if record.step is not None and record.step <= last_step:
                found[record.source, record.shard, record.key, record.step] = record
        return list(found.values())

    def _last_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - _MAX_READ_BYTES)
                file.seek(start)
                lines = file.read().splitlines()
        except OSError:
            return []
        return lines[1:] if start else lines  # the first is cut


def is_too_bad(bad: int, seen: int, config: ShardsConfig) -> bool:
    """Whether at least `min_samples_for_bad_fraction` samples were seen, and more than `max_bad_fraction` are bad. Both
    are counts over all ranks, so that all stop at the same step."""
    return seen >= config.min_samples_for_bad_fraction and bad > config.max_bad_fraction * seen


def check_bad_fraction(bad: int, seen: int, config: ShardsConfig, records: Sequence[QuarantineRecord]) -> None:
    """Stop when too much is bad. records: of the run so far; they name the worst shards, and the reasons.

    Raises:
        DataError: it `is_too_bad`.
    """
    if not is_too_bad(bad, seen, config):
        return
    shards = Counter((record.source, record.shard) for record in records)
    named = ", ".join(f"{shard} of source {source!r} ({n})" for (source, shard), n in shards.most_common(_MAX_NAMED))
    more = f" and {len(shards) - _MAX_NAMED} more shards" if len(shards) > _MAX_NAMED else ""
    reasons = _commonest_reasons(records)
    said = "; ".join(f"{textwrap.shorten(reason, _MAX_REASON_CHARS)} ({n})" for reason, n in reasons)
    raise DataError(
        f"{bad} of {seen} samples are bad ({bad / seen:.2%}), more than shards.max_bad_fraction allows "
        f"({config.max_bad_fraction:.2%}); "
        + (f"worst: {named}{more}. Commonest: {said}. Of the first: {_cure_of(reasons[0][0])}. " if reasons else "")
        + "quarantine.jsonl lists each sample and why. To go on with this run as it is, raise shards.max_bad_fraction"
    )


def _cure_of(reason: str) -> str:
    return next(cure for pattern, cure in _CURES if re.search(pattern, reason))


def _commonest_reasons(records: Iterable[QuarantineRecord]) -> list[tuple[str, int]]:
    """One example of each of the commonest reasons and how many there are, most frequent first; reasons that differ in
    numbers are one."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for record in records:
        kind = re.sub(r"\d+", "0", record.reason)
        examples.setdefault(kind, record.reason)
        counts[kind] += 1
    return [(examples[kind], n) for kind, n in counts.most_common(_MAX_REASONS)]
