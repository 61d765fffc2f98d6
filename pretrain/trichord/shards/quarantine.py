"""Samples that cannot be used: what is said about each, where it is written, and how many are too many."""

import json
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
    """Appends records to a JSON-lines file, each flushed at once: the line must outlive a crash of the run."""

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


def check_bad_fraction(bad: int, seen: int, config: ShardsConfig, records: Sequence[QuarantineRecord] = ()) -> None:
    """Stop when too much is bad. `bad` and `seen` are sample counts over all ranks, so that all stop at the same step.

    `records` are the records at hand (this rank's); they only name shards and reasons.

    Raises:
        DataError: at least `min_samples_for_bad_fraction` samples were seen, more than `max_bad_fraction` of them bad.
    """
    if seen < config.min_samples_for_bad_fraction or bad <= config.max_bad_fraction * seen:
        return
    shards = Counter((record.source, record.shard) for record in records)
    named = ", ".join(f"{shard} of source {source!r} ({n})" for (source, shard), n in shards.most_common(_MAX_NAMED))
    more = f" and {len(shards) - _MAX_NAMED} more shards" if len(shards) > _MAX_NAMED else ""
    reasons = "; ".join(_commonest_reasons(records))
    raise DataError(
        f"{bad} of {seen} samples are bad ({bad / seen:.2%}), more than shards.max_bad_fraction allows "
        f"({config.max_bad_fraction:.2%}); worst: {named or 'see quarantine.jsonl'}{more}. "
        f"{f'Commonest here: {reasons}. ' if reasons else ''}"
        "quarantine.jsonl lists each sample and why; repair or drop these shards, or raise shards.max_bad_fraction"
    )


def _commonest_reasons(records: Iterable[QuarantineRecord]) -> list[str]:
    """One example of each of the commonest reasons, most frequent first; reasons that differ in numbers are one."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for record in records:
        kind = re.sub(r"\d+", "0", record.reason)
        examples.setdefault(kind, record.reason)
        counts[kind] += 1
    return [
        f"{textwrap.shorten(examples[kind], _MAX_REASON_CHARS)} ({n})" for kind, n in counts.most_common(_MAX_REASONS)
    ]
