"""What `trichord data lint` found: counts by source and reason, as tables and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.inspection.walk import MAX_EXAMPLES
from trichord.samples.unread import Unread, scattered, sentences
from trichord.shards.quarantine import QuarantineRecord

UNREADABLE = "cannot be read"
DAMAGED = "damaged"
SIDECARS = "sidecars"
UNSAFE = "pickled code, ignored"
RETURNING = "key comes back"
REPEATED = "key in several shards"
SAME_NAME = "same base name"
NO_SAMPLES = "no samples"
LOOSE = "files of no sample"
_MAX_REASONS = 200


@dataclass
class Reason:
    """Samples that are bad for one reason: how many, in how many shards, and some of them."""

    count: int = 0
    shards: set[str] = field(default_factory=set)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SourceReport:
    """What was found in one source. problem: why it cannot be read at all. notes: (what, where, detail) of shards.

    unread: what is in its samples and tars that no sample reads. returning: how often a key comes back after others,
    with examples. unmatched: a sentence about each exclude list that leaves nothing out.
    """

    name: str
    problem: str | None = None
    shards: int = 0
    samples: int = 0
    bad: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Reason] = field(default_factory=dict)
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    unread: Unread = field(default_factory=Counter)
    returning: int = 0
    returning_examples: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What does not stop training, and is hardly what anyone wants."""
        back = [scattered(self.returning, self.returning_examples)] if self.returning else []
        return [*back, *sentences(self.unread), *self.unmatched]

    def add_reason(self, record: QuarantineRecord) -> None:
        """Count a bad sample under its reason; the first of each are kept as examples."""
        text = general(record)
        if text not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            text = "(other reasons)"
        reason = self.reasons.setdefault(text, Reason())
        reason.count += 1
        reason.shards.add(record.shard)
        if len(reason.examples) < MAX_EXAMPLES:
            reason.examples.append({k: v for k, v in asdict(record).items() if k not in ("source", "step")})


@dataclass
class LintReport:
    """All sources; `fails` says whether training would stop over this data."""

    sources: list[SourceReport]
    max_bad_fraction: float

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    @property
    def bad(self) -> int:
        return sum(source.bad for source in self.sources)

    @property
    def unreadable(self) -> bool:
        """Whether a source or a shard cannot be read at all."""
        return any(source.problem or any(what == UNREADABLE for what, _, _ in source.notes) for source in self.sources)

    @property
    def stops(self) -> bool:
        """Whether training would stop: more samples bad than allowed, or something that cannot be read."""
        return self.unreadable or self.bad > self.max_bad_fraction * self.samples

    @property
    def torn(self) -> bool:
        """Whether more samples than may be bad come in parts, each taken for a sample: training would not notice."""
        return sum(source.returning for source in self.sources) > self.max_bad_fraction * self.samples

    @property
    def fails(self) -> bool:
        """Whether the data must be mended before training."""
        return self.stops or self.torn

    def verdict(self) -> str:
        """One line about all of it."""
        share = f" ({self.bad / self.samples:.2%})" if self.samples else ""
        counts = f"{self.bad} of {self.samples} samples are bad{share}, {self.max_bad_fraction:.2%} are allowed"
        said = [counts]
        if self.stops:
            said.append("training would stop" + (": not all of it can be read" if self.unreadable else ""))
        if self.torn:
            said.append("samples come in parts, and training would take each for a sample")
        warnings = sum(len(source.warnings) for source in self.sources)
        if warnings:
            said.append("1 warning" if warnings == 1 else f"{warnings} warnings")
        return "; ".join(said)

    def source_rows(self) -> list[dict[str, Any]]:
        """A table of the sources."""
        return [
            {
                "source": source.name,
                "shards": source.shards,
                "samples": source.samples,
                "bad": source.bad,
                "bad %": f"{100 * source.bad / source.samples:.2f}" if source.samples else "",
                "filtered": source.filtered.total() if source.filtered else "",
            }
            for source in self.sources
        ]

    def reason_rows(self) -> list[dict[str, Any]]:
        """A table of why samples are bad, most frequent first."""
        found = [(source.name, text, reason) for source in self.sources for text, reason in source.reasons.items()]
        return [
            {
                "bad": reason.count,
                "source": name,
                "shards": len(reason.shards),
                "reason": text,
                "for example": "{shard}: {member}".format(**{**first, "member": first["member"] or first["key"]}),
            }
            for name, text, reason in sorted(found, key=lambda one: (-one[2].count, one[0], one[1]))
            for first in reason.examples[:1]
        ]

    def note_rows(self) -> list[dict[str, Any]]:
        """A table of what is odd about sources and shards; shards with the same to say about share a row."""
        rows = [{"what": UNREADABLE, "where": s.name, "detail": s.problem} for s in self.sources if s.problem]
        places: dict[tuple[str, str], list[str]] = {}
        for source in self.sources:
            for what, where, detail in source.notes:
                places.setdefault((what, detail), []).append(where)
        for (what, detail), where in places.items():
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            rows.append({"what": what, "where": where[0] + more, "detail": detail})
        return rows

    def warning_rows(self) -> list[dict[str, Any]]:
        """A table of what does not stop training."""
        return [{"source": source.name, "warning": text} for source in self.sources for text in source.warnings]

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "bad": self.bad,
            "max_bad_fraction": self.max_bad_fraction,
            "fails": self.fails,
            "sources": [_source_json(source) for source in self.sources],
        }


def general(record: QuarantineRecord) -> str:
    """A reason without what differs from sample to sample: its key, where a name in quotes begins with it, and its
    numbers."""
    text = record.reason
    if record.key:
        names = "|".join(re.escape(name) for name in (record.key, record.key.rsplit("/", 1)[-1]))
        text = re.sub(rf"""(?<=['"])(?:{names})(?=['".])""", "KEY", text)
    return re.sub(r"(?<![\w'\"-])\d+(\.\d+)?", "N", text)  # not in quotes: that is what stands in the data


def _source_json(source: SourceReport) -> dict[str, Any]:
    reasons = sorted(source.reasons.items(), key=lambda item: -item[1].count)
    return {
        "name": source.name,
        "problem": source.problem,
        "shards": source.shards,
        "samples": source.samples,
        "bad": source.bad,
        "filtered": dict(source.filtered),
        "reasons": [
            {"reason": text, "count": reason.count, "shards": len(reason.shards), "examples": reason.examples}
            for text, reason in reasons
        ],
        "warnings": source.warnings,
        "unread": [{"why": why, "what": name, "count": count} for (why, name), count in sorted(source.unread.items())],
        "notes": [{"what": what, "where": where, "detail": detail} for what, where, detail in source.notes],
    }


def write_report(report: LintReport, file: Path) -> None:
    """The report as JSON. Raises ConfigError where the file cannot be written."""
    try:
        write_atomically(file, json.dumps(report.to_json(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: cannot be written: {error.strerror}") from error
